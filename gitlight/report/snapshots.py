"""Pictures of reconstructions on the way: a row for each iteration, a column for each image (the paper's Figure 4)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gitlight.disk import writing

_CELL, _GAP, _MARGIN, _FONT_SIZE, _LABEL = 64, 4, 12, 13, 150
_WIDTH = 1240


class Snapshot(NamedTuple):
    """A reconstruction on the way.

    Attributes:
        leak: its number among the attacked ones.
        iteration: steps taken.
        image: ``(C, H, W)`` uint8, the leak's first.
    """

    leak: int
    iteration: int
    image: Tensor


def draw_snapshots(snapshots: Sequence[Snapshot], truth: Tensor, final: Tensor, path: Path) -> None:
    """Write a PNG: the truth, the reconstructions at each iteration, and the final ones; PSNR is the row's mean.

    A search that had ended before an iteration is shown as it ended.

    Args:
        snapshots: of the leaks.
        truth: ``(K, C, H, W)`` uint8, each leak's first image, in the order of their numbers.
        final: ``(K, C, H, W)`` uint8.
        path: the file to write; missing folders are made.
    """
    size = max(truth.shape[-2:])
    scale = max(1, round(_CELL / size))
    n_columns = max(1, min(len(truth), (_WIDTH - 2 * _MARGIN - _LABEL) // (size * scale + _GAP)))
    rows = [("truth", truth[:n_columns])]
    for iteration in sorted({snapshot.iteration for snapshot in snapshots}):
        row = final[:n_columns].clone()
        for snapshot in snapshots:
            if snapshot.iteration == iteration and snapshot.leak < n_columns:
                row[snapshot.leak] = snapshot.image
        rows.append((f"iteration {iteration}", row))
    rows.append(("result", final[:n_columns]))
    step = size * scale + _GAP
    canvas = Image.new("RGB", (2 * _MARGIN + _LABEL + n_columns * step - _GAP, 2 * _MARGIN + len(rows) * step), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_FONT_SIZE)
    for number, (name, images) in enumerate(rows):
        top = _MARGIN + number * step
        error = ((images.double() - truth[:n_columns].double()) / 255).square().flatten(1).mean(dim=1)
        psnr = float((-10 * error.clamp_min(1e-12).log10()).mean())
        words = name if number == 0 or not math.isfinite(psnr) else f"{name}\n{psnr:.1f} dB"
        pen.multiline_text((_MARGIN, top + size * scale / 2), words, fill=(40, 40, 40), font=font, anchor="lm")
        for column, image in enumerate(images):
            array = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
            cell = Image.fromarray(array).resize(
                (array.shape[1] * scale, array.shape[0] * scale), Image.Resampling.NEAREST
            )
            canvas.paste(cell, (_MARGIN + _LABEL + column * step, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.png")
    with writing(path):
        canvas.save(partial)
        partial.replace(path)
