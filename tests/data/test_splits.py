import pytest
import torch

from gitlight.config import DataConfig
from gitlight.data.images import ImageSplits, InMemoryImages
from gitlight.data.splits import divided, public_positions
from gitlight.errors import ConfigError, DataError


def images(n, name):
    return InMemoryImages(
        torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.arange(n) % 3, [f"{name}/{i}" for i in range(n)]
    )


def source(n_validation=None):
    validation = None if n_validation is None else images(n_validation, "validation")
    return ImageSplits(images(60, "train"), validation, images(20, "test"), ("cat", "dog", "eel"))


def splits(loaded, seed=0, **changed):
    return divided(loaded, DataConfig(**{"n_validation": 10, **changed}), seed)


def test_public_and_private_images_never_meet():
    names = {name: set(split.identifiers) for name, split in splits(source()).items()}
    assert {name: len(its) for name, its in names.items()} == {"train": 50, "validation": 10, "test": 20}
    assert not names["train"] & names["validation"]
    assert not (names["train"] | names["validation"]) & names["test"]


def test_a_validation_split_of_the_source_is_used_and_nothing_held_out():
    found = splits(source(n_validation=15))
    assert list(found["train"].identifiers) == [f"train/{i}" for i in range(60)]
    assert len(found["validation"]) == 10
    assert all(name.startswith("validation/") for name in found["validation"].identifiers)


def test_the_seed_chooses_and_shuffles():
    def identifiers(seed):
        return {name: list(split.identifiers) for name, split in splits(source(), seed).items()}

    first, other = identifiers(0), identifiers(1)
    assert first == identifiers(0)
    assert all(first[name] != other[name] for name in first)
    assert first["train"] == sorted(first["train"], key=lambda name: int(name.split("/")[1]))


def test_private_images_come_in_random_order_of_classes():
    labels, own = splits(source())["test"].labels, source().test.labels
    assert labels.tolist() != own.tolist()
    assert labels.sort().values.tolist() == own.sort().values.tolist()


def test_classes_choose_public_and_private_images():
    found = splits(source(), public_classes=["cat", "eel"], private_classes=["dog"])
    assert set(found["train"].labels.tolist()) == set(found["validation"].labels.tolist()) == {0, 2}
    assert set(found["test"].labels.tolist()) == {1}
    with pytest.raises(ConfigError, match=r"data.public_classes: 'cow'.*cat, dog, eel"):
        splits(source(), public_classes=["cow"])


def test_fewer_images_than_a_client_batch_are_named():
    with pytest.raises(DataError, match=r"the validation images are 10.*client_batch_size: 15"):
        splits(source(), client_batch_size=15)


def test_training_and_validation_images_are_disjoint_and_counted():
    settings = DataConfig(n_public_images=40, n_validation=15)
    train, validation = public_positions(100, settings, has_validation=False, seed=0)
    assert (len(train), len(validation)) == (25, 15)
    assert not set(train.tolist()) & set(validation.tolist())
    train, validation = public_positions(100, settings, has_validation=True, seed=0)
    assert (len(train), len(validation)) == (40, 0)


@pytest.mark.parametrize(
    ("n_public", "n_validation", "message"),
    # A config file may set the number: left out on the command line, it is that of the file.
    [(101, 5, "data.n_public_images: .* give data.n_public_images=null to use all"), (40, 40, "data.n_validation")],
)
def test_numbers_that_do_not_fit_are_named(n_public, n_validation, message):
    settings = DataConfig(n_public_images=n_public, n_validation=n_validation)
    with pytest.raises(ConfigError, match=message):
        public_positions(100, settings, has_validation=False, seed=0)
