"""What `import gitlight` offers."""

import pytest

import gitlight


@pytest.mark.parametrize("name", gitlight.__all__)
def test_every_public_name_is_there(name):
    assert getattr(gitlight, name) is not None
    assert name in dir(gitlight)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match=r"gitlight.*'Generator2'"):
        _ = gitlight.Generator2
