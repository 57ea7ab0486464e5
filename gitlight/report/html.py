"""``report.html``: one page without external resources, for readers outside the team."""

import base64
import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import gitlight
from gitlight.config import Config
from gitlight.config_loading import to_plain
from gitlight.gradients.channel import describe_channel
from gitlight.gradients.updates import describe_leak
from gitlight.metrics import SMALLEST_LPIPS_IMAGE
from gitlight.report.attacked import AttackedImages
from gitlight.report.histogram import HEIGHT, LEFT, WIDTH, histogram
from gitlight.report.results import METRICS, Result

KNOWLEDGE = {
    "architecture": "the structure of the attacked model: its layers and their sizes",
    "pairs": "example pairs: public images of the attacker's own, each with the gradient that the model gives for it",
    "parameters": "the attacked model's weights",
    "labels": "the labels of the private images",
    "image_prior": "a model of what images look like, trained on public ones",
    "prior": "the reconstructions of another attack, as a starting point",
}
"""Words for what an attack may be given, for readers who do not know the field."""

BANDS = (
    (40.0, "40 dB or more", "near-identical"),
    (25.0, "25 to 40 dB", "usually recognisable"),
    (15.0, "15 to 25 dB", "in between: often blurred or partial"),
    (0.0, "under 15 dB", "little recognisable"),
)
"""Rule-of-thumb ranges of PSNR: lower end in dB, name, meaning; from the highest down."""

PICTURES_PER_GROUP = 4
PICTURE_SIZE = 96
"""Width of a picture on the page, in CSS pixels; larger images are shown as they are."""


@dataclass(frozen=True)
class Picture:
    """One image beside its reconstruction, both as ``data:`` addresses of PNGs."""

    truth: str
    reconstruction: str
    identifier: str
    class_name: str
    psnr: str


@dataclass(frozen=True)
class Figure:
    """A picture of its own on the page: a ``data:`` address and a caption."""

    address: str
    caption: str

    @classmethod
    def of(cls, path: Path, caption: str) -> "Figure":
        """From a PNG file."""
        return cls(_address(path.read_bytes()), caption)


def render_report(
    config: Config,
    trained: Config,
    results: Sequence[Result],
    result: Result,
    images: AttackedImages,
    device: torch.device,
    figures: Sequence[Figure] = (),
) -> str:
    """The page.

    Args:
        config: settings of the evaluation.
        trained: settings that the generator was trained with.
        results: everything in ``metrics.json``, ``result`` among it.
        result: the evaluation that the page is about.
        images: what was attacked.
        device: where the attack ran, for its time per image.
        figures: how a search went.
    """
    environment = Environment(
        loader=PackageLoader("gitlight", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    psnr = images.metrics["psnr"]
    height, width = images.truth.shape[-2:]
    return environment.get_template("report.html").render(
        result=result,
        metrics=METRICS,
        knowledge=[KNOWLEDGE[item] for item in result.knowledge],
        unknown=[
            words
            for item, words in KNOWLEDGE.items()
            if item not in result.knowledge and item not in ("prior", "image_prior")
        ],
        results=results,
        other_model=config.leaked != trained.leaked,
        trained_channel=describe_channel(trained.channel),
        trained_leak=describe_leak(trained.gradients.updates, trained.data.client_batch_size),
        bands=_bands(psnr),
        groups=_groups(images),
        picture_size=max(PICTURE_SIZE, width),
        image_size=f"{height} × {width}",
        grey=images.truth.shape[1] == 1,
        histogram=histogram(psnr),
        figures=figures,
        chart=(WIDTH, HEIGHT),
        chart_left=LEFT,
        chart_words=_chart_words(psnr),
        lpips_defined=min(height, width) >= SMALLEST_LPIPS_IMAGE,
        settings=OmegaConf.to_yaml(OmegaConf.create(to_plain(config))),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        versions={"gitlight": gitlight.__version__, "PyTorch": torch.__version__, "Python": platform.python_version()},
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _bands(psnr: Tensor) -> list[dict[str, Any]]:
    """Name, meaning and share of images of each range."""
    rows, upper = [], float("inf")
    for lower, name, meaning in BANDS:
        share = float(((psnr >= lower) & (psnr < upper)).double().mean())
        rows.append({"name": name, "meaning": meaning, "share": share})
        upper = lower
    return rows


def _groups(images: AttackedImages) -> list[tuple[str, str, list[Picture]]]:
    """Title, explanation and pictures of the best, the middle and the worst reconstructions; no image twice."""
    order = images.metrics["psnr"].argsort(descending=True, stable=True).tolist()
    size = min(PICTURES_PER_GROUP, max(1, len(order) // 3))
    middle = (len(order) - size) // 2

    def pictures(chosen: Sequence[int]) -> list[Picture]:
        return [_picture(images, number) for number in chosen]

    groups = [("Best", "highest PSNR of all attacked images", pictures(order[:size]))]
    if len(order) >= 3:
        groups.append(("Median", "in the middle: what to expect", pictures(order[middle : middle + size])))
    if len(order) >= 2:
        groups.append(("Worst", "lowest PSNR of all attacked images", pictures(order[-size:])))
    return groups


def _picture(images: AttackedImages, number: int) -> Picture:
    failed = bool(images.failed[number])
    return Picture(
        truth=_png_address(images.truth[number]),
        reconstruction=_png_address(images.reconstructions[number]),
        identifier=images.identifiers[number],
        class_name=images.class_names[int(images.labels[number])],
        psnr="failed" if failed else f"{float(images.metrics['psnr'][number]):.1f} dB",
    )


def _png_address(image: Tensor) -> str:
    """``(C, H, W)`` uint8 as a ``data:`` address."""
    array = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(file, format="PNG", optimize=True)
    return _address(file.getvalue())


def _address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chart_words(psnr: Tensor) -> str:
    """The histogram for those who cannot see it."""
    low, quarter, half, three_quarters, high = torch.quantile(
        psnr, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=psnr.dtype)
    ).tolist()
    return (
        f"PSNR ranges from {low:.1f} to {high:.1f} dB; the median is {half:.1f} dB, and half of the images lie between "
        f"{quarter:.1f} and {three_quarters:.1f} dB."
    )
