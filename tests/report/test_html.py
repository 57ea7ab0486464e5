import base64
import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from gitlight.config import Config, GaussianNoiseConfig, LeNetConfig
from gitlight.report.attacked import AttackedImages
from gitlight.report.html import render_report
from gitlight.report.results import Estimate, Result

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not balance."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ")

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def attacked(n: int = 20, size: int = 32, class_name: str = "cat") -> AttackedImages:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return AttackedImages(
        indices=torch.arange(n),
        identifiers=tuple(f"test/{i}" for i in range(n)),
        positions=torch.zeros(n, dtype=torch.int64),
        labels=torch.zeros(n, dtype=torch.int64),
        class_names=(class_name,),
        recovered_labels=torch.zeros(n, dtype=torch.int64),
        metrics={"psnr": torch.linspace(12, 42, n, dtype=torch.float64)},
        failed=torch.zeros(n, dtype=torch.bool),
        verdicts=("",) * n,
        truth=truth,
        reconstructions=truth.flip(3),
    )


def result(n: int = 20) -> Result:
    estimate = Estimate(0.25, 0.125, 0.5)
    return Result(
        "hybrid", "lenet", "photos", "none", 1, n, 0,
        {"mse": estimate, "psnr": Estimate(27.0, 25.5, 28.5), "ssim": estimate},
        1.0, 0.002, ("architecture", "pairs"),
    )  # fmt: skip


def render(
    images: AttackedImages, shown: Result, others: tuple[Result, ...] = (), trained: Config | None = None
) -> str:
    return render_report(Config(), trained or Config(), [*others, shown], shown, images, torch.device("cpu"))


def test_the_page_stands_alone() -> None:
    html = render(attacked(), result())
    page = Page(html)
    assert not page.of("script")
    assert not page.of("link")
    assert not page.of("iframe")
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "url(" not in html
    sources = [attributes["src"] or "" for attributes in page.of("img")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_pictures_are_the_images_best_median_and_worst_first_to_last() -> None:
    images = attacked()
    page = Page(render(images, result()))
    shown = []
    for attributes in page.of("img"):
        encoded = (attributes["src"] or "").split(",")[1]
        shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))))
    order = [19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0]
    for number, index in enumerate(order):
        np.testing.assert_array_equal(shown[2 * number], images.truth[index].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(shown[2 * number + 1], images.reconstructions[index].permute(1, 2, 0).numpy())


def test_the_page_can_be_read_without_seeing_it() -> None:
    page = Page(render(attacked(), result()))
    assert page.of("html")[0]["lang"] == "en"
    assert all(attributes.get("alt") for attributes in page.of("img"))
    assert all(attributes.get("scope") in {"row", "col"} for attributes in page.of("th"))
    assert len(page.of("table")) == len(page.of("caption"))
    assert all(attributes.get("role") == "img" for attributes in page.of("svg"))


def test_numbers_intervals_and_threat_model_are_on_the_page() -> None:
    text = Page(render(attacked(), result())).text
    for expected in ("27.00 dB", "25.50 to 28.50", "0.1250 to 0.5000", "100.0 %", "2 ms", "rule of thumb"):
        assert expected in text
    known, unknown = text.split("The attacker knew")[1].split("The attacker did not know")
    assert "structure of the attacked model" in known
    assert "weights" not in known
    assert "weights" in unknown
    assert "labels" in unknown


def test_shares_of_the_rule_of_thumb_are_counted() -> None:
    images = replace(attacked(4), metrics={"psnr": torch.tensor([10.0, 25.0, 39.9, 40.0], dtype=torch.float64)})
    text = Page(render(images, result(4))).text
    for share in ("near-identical25.0 %", "usually recognisable50.0 %", "partial0.0 %", "little recognisable25.0 %"):
        assert share in text
    assert "75 % of the images reached 25 dB" in text


@pytest.mark.parametrize(("size", "words"), [(32, "alexnet-owt-7be5be79.pth"), (16, "not defined for images under")])
def test_missing_lpips_is_explained(size: int, words: str) -> None:
    html = render(attacked(size=size), result())
    assert words in html
    with_lpips = replace(result(), metrics=result().metrics | {"lpips": Estimate(0.1, 0.05, 0.2)})
    assert words not in render(attacked(size=size), with_lpips)


def test_failed_reconstructions_are_announced() -> None:
    images = replace(attacked(), failed=torch.arange(20) == 0)
    html = render(images, replace(result(), n_failed=1))
    assert "1 of the 20 reconstructions failed" in html
    assert "PSNR failed" in html


def test_other_conditions_are_listed() -> None:
    other = replace(result(), channel="pruning(fraction=0.9)")
    assert "pruning" not in render(attacked(), result())
    assert "pruning(fraction=0.9)" in Page(render(attacked(), result(), (other,))).text


def test_another_channel_than_in_training_is_said() -> None:
    trained = Config(channel=[GaussianNoiseConfig(relative_std=0.5)])
    assert "trained under other conditions: gaussian_noise(relative_std=0.5)" in render(
        attacked(), result(), trained=trained
    )


def test_another_leaked_model_than_in_training_is_said() -> None:
    words = "not the model that the attack's example pairs came from"
    assert words in Page(render(attacked(), result(), trained=Config(leaked=LeNetConfig(seed=1)))).text
    assert words not in Page(render(attacked(), result())).text


def test_names_from_outside_are_escaped() -> None:
    page = Page(render(attacked(class_name='<script>alert("x")</script>'), replace(result(), data="<b>&")))
    assert not page.of("script")
    assert not page.of("b")
    assert "<script>" in page.text


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_images_make_a_page(n: int) -> None:
    page = Page(render(attacked(n), result(n)))
    assert len(page.of("img")) == 2 * len(
        {attributes["alt"] for attributes in page.of("img") if "Private" in str(attributes["alt"])}
    )


def test_grey_images_and_client_batches_make_a_page() -> None:
    images = attacked()
    images = replace(images, truth=images.truth[:, :1], reconstructions=images.reconstructions[:, :1])
    text = Page(render(images, replace(result(), client_batch_size=4, label_accuracy=None))).text
    assert "averaged over 4" in text
    assert "Labels were not read off" in text
