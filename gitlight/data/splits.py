"""Which images of a source a run trains on, validates on and attacks."""

import torch
from torch import Tensor

from gitlight.config import DataConfig
from gitlight.data.images import ImageSplits, ImageSubset, LabelledImages
from gitlight.errors import ConfigError, DataError


def divided(loaded: ImageSplits, settings: DataConfig, seed: int) -> dict[str, LabelledImages]:
    """The images of ``train``, ``validation`` and ``test``, no image in two of them.

    The first two are public, of the source's training split where it has none for validation; ``test`` is private. Only
    ``train`` is in the source's order.

    Args:
        loaded: a source's images.
        settings: classes and numbers of images.
        seed: chooses and shuffles.

    Raises:
        DataError: a split has fewer images than a client batch.
        ConfigError: a class name is unknown, or the numbers of images asked for do not fit.
    """
    public = _of_classes(loaded.train, loaded.class_names, settings.public_classes, "public_classes")
    train, held_out = public_positions(len(public), settings, has_validation=loaded.validation is not None, seed=seed)
    validation: LabelledImages
    if loaded.validation is None:
        validation = ImageSubset(public, held_out)
    else:
        own = _of_classes(loaded.validation, loaded.class_names, settings.public_classes, "public_classes")
        validation = _shuffled(own, seed, settings.n_validation)
    private = _of_classes(loaded.test, loaded.class_names, settings.private_classes, "private_classes")
    splits = {"train": ImageSubset(public, train), "validation": validation, "test": _shuffled(private, seed)}
    for name, split in splits.items():
        if len(split) < settings.client_batch_size:
            raise DataError(
                f"data: the {name} images are {len(split)}, fewer than one client batch "
                f"(data.client_batch_size: {settings.client_batch_size})."
            )
    return splits


def public_positions(n_public: int, settings: DataConfig, has_validation: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Divide the public images: positions to train on, and, in random order, those held out for validation.

    Args:
        n_public: number of public images.
        settings: ``n_public_images`` (all that are used) and ``n_validation`` (of these, held out).
        has_validation: whether the source has a validation split of its own; then none is held out.
        seed: chooses which.

    Raises:
        ConfigError: more pairs are asked for than there are images, or validation leaves none to train on.
    """
    n_used = n_public if settings.n_public_images is None else settings.n_public_images
    if n_used > n_public:
        raise ConfigError(
            f"data.n_public_images: {n_used} asked for, but {settings.name} has {n_public} public images "
            "of the chosen classes. Lower it, or give data.n_public_images=null to use all."
        )
    n_held_out = 0 if has_validation else settings.n_validation
    if n_held_out >= n_used:
        raise ConfigError(
            f"data.n_validation: {n_held_out} of {n_used} public images held out leaves none to train on."
        )
    order = torch.randperm(n_public, generator=torch.Generator().manual_seed(seed))[:n_used]
    return order[n_held_out:].sort().values, order[:n_held_out]


def _of_classes(
    images: LabelledImages, class_names: tuple[str, ...], wanted: list[str] | None, key: str
) -> LabelledImages:
    if wanted is None:
        return images
    if unknown := [name for name in wanted if name not in class_names]:
        raise ConfigError(
            f"data.{key}: {', '.join(map(repr, unknown))} not among the classes of the data. "
            f"Valid names: {', '.join(class_names[:50])}{', …' if len(class_names) > 50 else ''}."
        )
    labels = torch.tensor([class_names.index(name) for name in wanted])
    return ImageSubset(images, torch.isin(images.labels, labels).nonzero().squeeze(1))


def _shuffled(images: LabelledImages, seed: int, at_most: int | None = None) -> LabelledImages:
    """In random order, so that the first few are a fair sample; sources often sort by class."""
    return ImageSubset(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:at_most])
