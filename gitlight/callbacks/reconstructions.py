"""Pictures of truth above reconstruction: `draw_grid`, and the callback that draws one at each validation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gitlight.data.pair import GradientPair
from gitlight.disk import writing
from gitlight.metrics import image_metrics, match

# Lengths in pixels of the picture.
IMAGE_SIZE = 128
GAP = 6
ROW_GAP = 18
MARGIN = 14
FONT_SIZE = 15
WIDTH = 1240

BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)


class ReconstructionGrid(Callback):
    """Draws the first validation images and their reconstructions to ``reconstructions/epoch_0003.png``.

    One picture a validation, by rank 0 from its own share; sent to W&B as well where a run is logged there. The name
    counts epochs from 0, as the ``epoch`` column of metrics.csv does.

    Args:
        output_dir: the run's folder.
        n_pictures: images in a picture, at most.
    """

    def __init__(self, output_dir: Path, n_pictures: int) -> None:
        self.folder = Path(output_dir) / "reconstructions"
        self.n_pictures = n_pictures
        self._images: list[Tensor] = []
        self._reconstructions: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation."""
        self._images, self._reconstructions = [], []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: GradientPair,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images."""
        missing = self.n_pictures - sum(len(kept) for kept in self._images)
        if missing <= 0 or trainer.sanity_checking or not trainer.is_global_zero:
            return
        leaks = math.ceil(missing / batch.images.shape[1])
        images = batch.images[:leaks]
        reconstructions = match(outputs["reconstructions"][:leaks].detach(), images)
        self._images.append(images.flatten(0, 1)[:missing].float().cpu())
        self._reconstructions.append(reconstructions.flatten(0, 1)[:missing].float().cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was kept."""
        if not self._images:
            return
        images, reconstructions = torch.cat(self._images), torch.cat(self._reconstructions)
        psnr = image_metrics(reconstructions.unsqueeze(1), images.unsqueeze(1))["psnr"].flatten().tolist()
        path = self.folder / f"epoch_{trainer.current_epoch:04d}.png"
        draw_grid(images, reconstructions, path, captions=[f"{value:.1f} dB" for value in psnr])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("reconstructions", [str(path)], step=trainer.global_step)


def draw_grid(images: Tensor, reconstructions: Tensor, path: Path, captions: Sequence[str] | None = None) -> None:
    """Write a PNG: true images, their reconstructions below, in as many double rows as it takes.

    Small images are enlarged by a whole factor, without smoothing, so that every pixel can be seen.

    Args:
        images: the truth, ``(K, C, H, W)`` in [0, 1], grey (``C = 1``) or colour.
        reconstructions: ``(K, C, H, W)``; clamped to [0, 1].
        path: the file to write; missing folders are made. At any moment the file there is the old one or the new one,
            whole.
        captions: one short text for each image, drawn below its reconstruction.

    Raises:
        ValueError: there are no images, or the numbers of images, reconstructions and captions differ.
    """
    n = len(images)
    if n == 0 or images.shape != reconstructions.shape or (captions is not None and len(captions) != n):
        raise ValueError(
            f"A picture needs as many reconstructions and captions as images, at least one: images "
            f"{tuple(images.shape)}, reconstructions {tuple(reconstructions.shape)}, captions "
            f"{None if captions is None else len(captions)}."
        )
    height, width = images.shape[-2:]
    scale = max(1, round(IMAGE_SIZE / max(height, width)))
    cell_height, cell_width = height * scale, width * scale
    font = ImageFont.load_default(size=FONT_SIZE)
    label_width = math.ceil(font.getlength("reconstruction")) + MARGIN
    caption_height = FONT_SIZE + 6 if captions is not None else 0
    fitting = max(1, (WIDTH - label_width - 2 * MARGIN + GAP) // (cell_width + GAP))
    n_rows = math.ceil(n / fitting)
    # Rows of equal length look better than a last row of one.
    n_columns = math.ceil(n / n_rows)
    row_height = 2 * cell_height + GAP + caption_height + ROW_GAP
    canvas = Image.new(
        "RGB",
        (
            label_width + 2 * MARGIN + n_columns * (cell_width + GAP) - GAP,
            2 * MARGIN + n_rows * row_height - ROW_GAP,
        ),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    for row in range(n_rows):
        top = MARGIN + row * row_height
        for label, offset in (("truth", 0), ("reconstruction", cell_height + GAP)):
            draw.text((MARGIN, top + offset + cell_height / 2), label, fill=INK, font=font, anchor="lm")
    for i in range(n):
        row, column = divmod(i, n_columns)
        left = label_width + MARGIN + column * (cell_width + GAP)
        top = MARGIN + row * row_height
        canvas.paste(_picture(images[i], scale), (left, top))
        canvas.paste(_picture(reconstructions[i], scale), (left, top + cell_height + GAP))
        if captions is not None:
            below = (left + cell_width / 2, top + 2 * cell_height + GAP + 4)
            draw.text(below, captions[i], fill=INK, font=font, anchor="ma")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        canvas.save(partial, "PNG")
        partial.replace(path)


def _picture(image: Tensor, scale: int) -> Image.Image:
    # A diverged reconstruction is drawn black where it is not a number.
    levels = torch.nan_to_num(image.detach().float().cpu()).clamp(0, 1).mul(255).round().byte()
    array = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array).resize((array.shape[1] * scale, array.shape[0] * scale), Image.Resampling.NEAREST)
