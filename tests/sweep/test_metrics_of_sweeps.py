import csv
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from sweep_files import write_sweep

from gitlight.callbacks import build_callbacks
from gitlight.config import Config
from gitlight.config_loading import load_config
from gitlight.errors import ConfigError
from gitlight.generators import GENERATORS
from gitlight.generators.base import Generator
from gitlight.sweep.metrics import ESTIMATING, TRAINED, VALIDATED, check_metric
from gitlight.sweep.specification import load_specification
from gitlight.training import train

DEMO = Path(__file__).parent.parent.parent / "configs" / "demo.yaml"


def config_of(*settings: str) -> Config:
    return load_config(DEMO, settings)


@pytest.mark.parametrize(
    ("metric", "settings", "message"),
    [
        ("val/pnsr", [], r"val/pnsr HERE is not logged by a run of task=generator\. Did you mean val/psnr\?"),
        ("train/los", [], r"Did you mean train/loss\?"),
        ("throughput/pairs_per_secnd", [], r"Did you mean throughput/pairs_per_second\?"),
        ("val/accuracy", ["task=image_prior"], "is not logged by a run of task=image_prior"),
        ("weight_distance/total", ["generator.name=mlp"], r"not logged by a run of .* with generator\.name=mlp"),
        (
            "train/loss",
            ["generator.name=exact"],
            r"generator\.name=exact with .*=layerwise is fitted in closed form alone",
        ),
        ("val/lpips", ["data.image_size=16"], r"at least 31 × 31 pixels, and these have data\.image_size=16"),
    ],
)
def test_a_metric_that_no_run_logs_is_named(metric: str, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_metric(metric, config_of(*settings), "HERE")


def test_a_distance_is_that_of_a_parameter() -> None:
    names = ["0.weight", "0.bias"]
    for known in ("total", "total_relative", "0.weight", "0.bias_relative"):
        check_metric(f"weight_distance/{known}", config_of("generator.name=exact"), "HERE", names)
    with pytest.raises(ConfigError, match=r"no parameter 0\.wieght\. Did you mean 0\.weight\?"):
        check_metric("weight_distance/0.wieght", config_of("generator.name=exact"), "HERE", names)


def test_what_trains_has_a_loss_and_what_turns_out_not_to_has_none() -> None:
    check_metric("train/loss", config_of("generator.name=exact", "generator.fit=descent"), "HERE")
    hybrid = config_of("generator.name=hybrid")
    check_metric("train/loss", hybrid, "HERE")
    with pytest.raises(
        ConfigError, match=r"train/loss HERE: generator\.name=hybrid for this leaked model is fitted in"
    ):
        check_metric("train/loss", hybrid, "HERE", trains=False)


def test_the_generators_that_estimate_parameters_are_known() -> None:
    loaded = {name: GENERATORS[name].load() for name in GENERATORS.names()}
    own = {name for name, kind in loaded.items() if kind.estimated_parameters is not Generator.estimated_parameters}
    assert own == set(ESTIMATING)


def test_lpips_is_only_a_metric_where_its_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ConfigError("AlexNet's weights are not to be had.")

    monkeypatch.setattr("gitlight.lpips.lpips_network", missing)
    with pytest.raises(ConfigError, match="val/lpips HERE is not logged here: AlexNet"):
        check_metric("val/lpips", config_of(), "HERE")


def test_an_evaluation_is_no_trial(tmp_path: Path) -> None:
    program = tmp_path / "evaluate.py"
    program.touch()
    with pytest.raises(ConfigError, match=r"program: .*evaluate\.py .*logs no metric .*Give train\.py"):
        load_specification(write_sweep(tmp_path, program=str(program)))


class Seen(Callback):
    """The names of metrics that are there when a validation ends, where a sweep looks."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.names.append(set(trainer.callback_metrics))


@pytest.mark.parametrize("task", ["generator", "leaked", "image_prior"])
def test_what_is_known_is_what_a_run_logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str) -> None:
    monkeypatch.setattr("gitlight.callbacks.metrics.load_lpips", lambda: None)
    seen = Seen()
    monkeypatch.setattr("gitlight.trainer.build_callbacks", lambda *given: [*build_callbacks(*given), seen])
    settings = [f"task={task}", f"output_dir={tmp_path / 'run'}", "generator.name=mlp", "generator.hidden_size=4"]
    settings += ["data.n_public_images=32", "data.n_validation=16", "data.batch_size=16", "data.image_size=16"]
    settings += ["image_prior.channels=8", "image_prior.latent_size=4", "leaked.width=2", "trainer.max_epochs=2"]
    settings += ["trainer.accelerator=cpu", "logging.wandb=off", "logging.quiet=true"]
    with (train(config_of(*settings)) / "metrics.csv").open(newline="") as file:
        logged = set(next(csv.reader(file)))
    known = {*VALIDATED[task], *TRAINED[task]} - {"val/lpips"}
    assert [known - names for names in seen.names] == [set(), set()]
    assert {name for name in logged if name.startswith("val/")} == {name for name in known if name.startswith("val/")}
