import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from alexnet_weights import empty_hub, put_alexnet
from torch import Tensor

from gitlight.cli import train_command
from gitlight.errors import ConfigError
from gitlight.lpips import load_lpips
from gitlight.metrics import image_metrics
from gitlight.perceptual import perceptual_term

SHAPE = (3, 32, 32)
IMAGES = torch.rand(2, 4, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with empty_hub(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture
def alexnet(hub: Path) -> torch.nn.Module:
    return put_alexnet(hub)


def gradient_difference(a: Tensor, b: Tensor) -> list[float]:
    """Pixel by pixel, in float64. Behind the last row and column there is no step."""
    found = []
    for one, other in zip(a.double(), b.double(), strict=True):
        total = 0.0
        for axis in (1, 2):
            steps = ((one.diff(dim=axis)).abs() - (other.diff(dim=axis)).abs()).abs()
            total += float(steps.sum()) / one.numel()
        found.append(total)
    return found


@pytest.mark.parametrize("name", ["ssim", "gradient_difference", "lpips"])
def test_terms_are_distances_to_train_with(name: str, alexnet: torch.nn.Module) -> None:
    term = perceptual_term(name, SHAPE)
    far, images = IMAGES
    near = (images + 0.1 * (far - images)).requires_grad_()
    assert term(images, images).abs().max() < 1e-6
    distances = term(near, images)
    assert distances.shape == (4,)
    assert (distances < term(far, images)).all()
    distances.sum().backward()
    assert near.grad is not None
    with torch.no_grad():
        assert (term(near - 0.01 * near.grad / near.grad.abs().max(), images) < distances).all()


def test_terms_are_what_they_are_called(alexnet: torch.nn.Module) -> None:
    a, b = IMAGES
    lpips = load_lpips()
    assert lpips is not None
    metrics = image_metrics(a[:, None], b[:, None], lpips)
    torch.testing.assert_close(perceptual_term("ssim", SHAPE)(a, b), 1 - metrics["ssim"][:, 0])
    torch.testing.assert_close(perceptual_term("lpips", SHAPE)(a, b), metrics["lpips"][:, 0])
    found = perceptual_term("gradient_difference", SHAPE)(a, b)
    assert found.tolist() == pytest.approx(gradient_difference(a, b), rel=1e-5)


def test_what_cannot_be_had_is_one_error(hub: object) -> None:
    with pytest.raises(ConfigError, match=r"loss.perceptual: lpips: the AlexNet weights are not .* put alexnet"):
        perceptual_term("lpips", SHAPE)
    with pytest.raises(ConfigError, match=r"loss.perceptual: lpips needs images of at least 31 × 31 pixels, not 16"):
        perceptual_term("lpips", (3, 16, 32))


RUN = [
    *("data.name=photos", "data.n_public_images=48", "data.n_validation=16", "data.batch_size=8", "leaked.width=4"),
    *("trainer.max_epochs=2", "trainer.accelerator=cpu", "logging.quiet=true", "logging.wandb=off"),
]


@pytest.mark.parametrize("client_batch_size", [1, 2])
def test_runs_train_on_the_squared_error_and_the_term(tmp_path, monkeypatch, client_batch_size) -> None:  # type: ignore
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 16}\n")
    own = ["loss.perceptual=ssim", "loss.weight=0.3", f"data.client_batch_size={client_batch_size}"]
    assert train_command(["run.yaml", *RUN, *own], tmp_path) == 0
    with (tmp_path / "runs/run/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert len(rows) == 2
    for row in rows:
        of_both = float(row["val/mse"]) + 0.3 * (1 - float(row["val/ssim"]))
        assert float(row["val/loss"]) == pytest.approx(of_both, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("generator: {name: exact}", "exact has nothing to train"),
        (
            "generator: {name: hybrid}\nchannel: [{name: gaussian_noise, relative_std: 0.1, lowest_std: 0.001}]",
            "hybrid trains on a loss of its own",
        ),
    ],
)
def test_a_term_beside_nothing_is_refused(tmp_path, monkeypatch, capsys, settings, message) -> None:  # type: ignore
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(settings)
    assert train_command(["run.yaml", *RUN, "loss.perceptual=ssim"], tmp_path) == 2
    assert f"loss.perceptual: with these settings {message}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
