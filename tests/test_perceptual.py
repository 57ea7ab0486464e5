import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from gitlight.callbacks import build_callbacks
from gitlight.cli import train_command
from gitlight.compatibility import check_loss
from gitlight.config import Config, LossConfig, TrainerConfig
from gitlight.config_loading import load_config
from gitlight.errors import ConfigError
from gitlight.lpips import load_lpips
from gitlight.metrics import image_metrics, match, ssim
from gitlight.perceptual import perceptual_term
from gitlight.training import GITModule, build_generator, build_pairs

pytest_plugins = ["alexnet_weights"]

RUN = [
    *("data.name=photos", "data.n_public_images=48", "data.n_validation=16", "data.batch_size=8", "leaked.width=4"),
    *("trainer.max_epochs=2", "trainer.accelerator=cpu", "logging.quiet=true", "logging.wandb=off"),
]
CONFIGS = Path(__file__).parent.parent / "configs"
SHAPE = (3, 32, 32)
IMAGES = torch.rand(2, 4, *SHAPE, generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("client_batch_size", [1, 2])
def test_a_step_goes_down_the_squared_error_and_the_term(client_batch_size: int) -> None:
    settings = [*RUN, f"data.client_batch_size={client_batch_size}", "generator.name=mlp", "generator.hidden_size=16"]
    config = load_config(CONFIGS / "demo.yaml", settings)
    pairs = build_pairs(config)
    generator = build_generator(config, pairs.architecture)
    module = GITModule(generator, config.optimizer, LossConfig("ssim", 0.3))
    module.log = lambda *arguments, **keywords: None  # type: ignore[method-assign, assignment]
    pair = next(iter(pairs.fit_pairs(torch.device("cpu"))))
    found = match(generator(pair.gradients), pair.images).flatten(0, 1)
    images = pair.images.flatten(0, 1)
    expected = (found - images).square().mean() + 0.3 * (1 - ssim(found, images).mean())
    loss = module.training_step(pair, 0)
    assert loss is not None
    torch.testing.assert_close(loss, expected)
    of_both = [torch.autograd.grad(one, list(generator.parameters())) for one in (loss, expected)]
    torch.testing.assert_close(*of_both)


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


def test_the_best_checkpoint_is_that_of_the_least_loss(tmp_path: Path) -> None:
    kept = [
        next(
            callback
            for callback in build_callbacks(Config(loss=loss), tmp_path)
            if isinstance(callback, ModelCheckpoint)
        )
        for loss in (LossConfig(), LossConfig("ssim"))
    ]
    assert [(one.monitor, one.mode) for one in kept] == [("val/psnr", "max"), ("val/loss", "min")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("generator: {name: exact}", "with these settings exact has nothing to train"),
        (
            "generator: {name: hybrid}\nchannel: [{name: gaussian_noise, relative_std: 0.1, lowest_std: 0.001}]",
            "with these settings hybrid trains on a loss of its own",
        ),
        ("task: leaked", "loss.perceptual: task=leaked has a loss of its own"),
    ],
)
def test_a_term_beside_nothing_is_refused(tmp_path, monkeypatch, capsys, settings, message) -> None:  # type: ignore
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(settings)
    assert train_command(["run.yaml", *RUN, "loss.perceptual=ssim"], tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_weight_without_a_term_is_refused(tmp_path, monkeypatch, capsys) -> None:  # type: ignore
    monkeypatch.chdir(tmp_path)
    assert train_command([str(CONFIGS / "demo.yaml"), *RUN, "loss.weight=0.5"], tmp_path) == 2
    assert "loss.weight: there is no term to weigh" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_deterministic_training_on_gpus_goes_without_ssim() -> None:
    config = Config(loss=LossConfig("ssim"), trainer=TrainerConfig(accelerator="gpu", deterministic=True))
    with pytest.raises(ConfigError, match=r"loss.perceptual: PyTorch has no deterministic backward pass"):
        check_loss(config)
    check_loss(replace(config, loss=LossConfig("gradient_difference")))
    check_loss(replace(config, trainer=TrainerConfig(accelerator="cpu", deterministic=True)))
