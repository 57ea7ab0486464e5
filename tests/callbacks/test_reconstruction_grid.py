import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from tiny_run import Fit, TinyData, batches

from gitlight.callbacks import ReconstructionGrid, draw_grid


def blocks(path: Path, value: tuple[int, int, int]) -> int:
    """Pixels of a colour in a picture."""
    return int((np.asarray(Image.open(path)) == value).all(axis=-1).sum())


def test_each_pixel_becomes_a_square(tmp_path: Path) -> None:
    truth = torch.zeros(1, 3, 32, 32)
    truth[0, 0, 5, 7] = 1
    found = torch.zeros(1, 3, 32, 32)
    found[0, 2, 5, 7] = 1
    draw_grid(truth, found, tmp_path / "new" / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    red, blue = (np.argwhere((picture == colour).all(axis=-1)) for colour in ((255, 0, 0), (0, 0, 255)))
    assert len(red) == len(blue) == 4 * 4
    assert (np.ptp(red, axis=0) == 3).all()
    # The reconstruction is straight below the truth.
    assert (red[:, 1] == blue[:, 1]).all()
    assert (red[:, 0] < blue[:, 0]).all()


def test_large_images_are_not_shrunk(tmp_path: Path) -> None:
    draw_grid(torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 224, 224), tmp_path / "grid.png")
    assert blocks(tmp_path / "grid.png", (0, 0, 0)) >= 4 * 224 * 224


def test_grey_images_and_many_rows(tmp_path: Path) -> None:
    truth = torch.full((50, 1, 25, 25), 0.2)
    draw_grid(truth, truth + 5, tmp_path / "grid.png", captions=["1 dB"] * 50)
    assert blocks(tmp_path / "grid.png", (51, 51, 51)) == pytest.approx(50 * 125 * 125, rel=1e-3)
    width, height = Image.open(tmp_path / "grid.png").size
    assert width < 1300 < height


def test_diverged_reconstructions_are_drawn(tmp_path: Path) -> None:
    draw_grid(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan), tmp_path / "grid.png")


def test_a_picture_that_cannot_be_written_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = torch.rand(2, 3, 8, 8), tmp_path / "grid.png"
    draw_grid(images, images, path)
    before = path.read_bytes()
    save = Image.Image.save

    def full(image: Image.Image, file: Path, *more: Any) -> None:
        save(image, file, *more)
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left") as raised:
        draw_grid(images, 0 * images, path)
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before


def test_captions_must_be_as_many_as_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="captions 1"):
        draw_grid(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), tmp_path / "grid.png", captions=["one"])
    with pytest.raises(ValueError, match="at least one"):
        draw_grid(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), tmp_path / "grid.png")


@pytest.mark.parametrize(("n", "n_pictures", "expected"), [(1, 4, 4), (3, 4, 4), (1, 100, 5)])
def test_one_picture_an_epoch_of_the_first_images(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, n_pictures: int, expected: int
) -> None:
    drawn: list[tuple[Any, ...]] = []

    def record(images: Any, reconstructions: Any, path: Path, captions: Any) -> None:
        drawn.append((images, reconstructions, path, captions))

    monkeypatch.setattr("gitlight.callbacks.reconstructions.draw_grid", record)
    validation = batches(3, 2, n=n)
    fit([ReconstructionGrid(tmp_path, n_pictures)], data=TinyData(batches(4), validation), num_sanity_val_steps=1)
    assert [entry[2].name for entry in drawn] == ["epoch_0000.png", "epoch_0001.png"]
    images, reconstructions, _, captions = drawn[0]
    assert torch.equal(images, torch.cat(validation).flatten(0, 1)[:expected])
    # Matched: close to the image, although the module returns client batches backwards.
    assert (reconstructions - images).abs().max() < 0.1
    assert len(captions) == expected


class RecordingLogger(WandbLogger):
    def __init__(self) -> None:
        self.pictures: list[tuple[str, list[str]]] = []
        self._experiment = None
        self._log_model = False

    experiment = property(lambda self: None)
    save_dir = property(lambda self: None)
    name = property(lambda self: "name")
    version = property(lambda self: "version")

    def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...

    def finalize(self, status: str) -> None: ...

    def log_image(self, key: str, images: list[str], step: int | None = None, **kwargs: Any) -> None:
        self.pictures.append((key, images))


def test_pictures_are_sent_to_wandb(fit: Fit, tmp_path: Path) -> None:
    logger = RecordingLogger()
    fit([ReconstructionGrid(tmp_path, 2)], logger=[logger], max_epochs=1)
    path = tmp_path / "reconstructions" / "epoch_0000.png"
    assert path.exists()
    assert logger.pictures == [("reconstructions", [str(path)])]
