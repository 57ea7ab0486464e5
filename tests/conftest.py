import pytest

# As modules with doctests they would all be imported under one name.
collect_ignore_glob = ["*conftest.py"]


@pytest.fixture(scope="module")
def without_lpips():
    """No download of LPIPS' weights, for whole trainings and evaluations; fixtures of a module's runs use it, too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("gitlight.callbacks.metrics", "gitlight.evaluation.measuring"):
            patch.setattr(f"{module}.load_lpips", lambda: None)
        yield
