import csv
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from gitlight.config import Config, DataConfig, EvaluationConfig
from gitlight.config_loading import load_config, save_config
from gitlight.data.datamodule import load_images
from gitlight.data.images import ImageSplits, ImageSubset
from gitlight.data.pair import Gradients
from gitlight.errors import CheckpointError, ConfigError
from gitlight.evaluation import attack, evaluate
from gitlight.evaluation.writing import warn_of_few
from gitlight.generators.base import Generator
from gitlight.report.attacked import FAILURE
from gitlight.training import build_generator, build_pairs, train

Load = Callable[..., Config]


N_PRIVATE = 40


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """No download of LPIPS' weights, and the photographs cut up only once, with few private images."""

    @functools.cache
    def photos(name: str) -> ImageSplits:
        splits = load_images(DataConfig(name=name))
        few = torch.arange(0, len(splits.test), len(splits.test) // N_PRIVATE)[:N_PRIVATE]
        return replace(splits, test=ImageSubset(splits.test, few))

    with pytest.MonkeyPatch.context() as patch:
        for module in ("gitlight.callbacks.metrics", "gitlight.evaluation.measuring"):
            patch.setattr(f"{module}.load_lpips", lambda: None)
        patch.setattr("gitlight.training.load_images", lambda settings: photos(settings.name))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, _quick: None) -> Path:
    """A run of two optimiser steps, whose leaked model is read from a file."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "base.yaml").write_text(
        "data: {name: photos, n_public_images: 96, n_validation: 32, batch_size: 32}\n"
        "generator: {name: mlp, hidden_size: 8}\n"
        "trainer: {max_epochs: 1, accelerator: cpu}\n"
        'logging: {wandb: "off", quiet: true}\n'
        "evaluation: {n_images: 12, bootstrap_samples: 200, n_pictures: 3}\n"
    )
    config = load_config(folder / "base.yaml", [f"output_dir={folder / 'run'}"])
    weights = folder / "weights.pt"
    torch.save(build_pairs(config).leaked_model.network.state_dict(), weights)
    config.leaked.weights = str(weights)
    train(config)
    return folder


@pytest.fixture
def load(trained: Path, tmp_path: Path) -> Load:
    """Copies the run, and loads its config with overrides."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    save_config(
        load_config(run, [f"output_dir={run}", f"leaked.weights={tmp_path / 'weights.pt'}"]), run / "config.yaml"
    )
    return lambda *overrides: load_config(run, overrides)


def folder_of(config: Config) -> Path:
    return Path(str(config.output_dir)) / "evaluation"


def entries(config: Config) -> list[dict]:
    return json.loads((folder_of(config) / "metrics.json").read_text())["results"]


def rows(config: Config) -> list[dict[str, str]]:
    with (folder_of(config) / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_json_has_the_schema(load: Load) -> None:
    config = load()
    evaluate(config)
    content = json.loads((folder_of(config) / "metrics.json").read_text())
    assert content["schema"] == 1
    (entry,) = content["results"]
    assert {key: value for key, value in entry.items() if key not in ("metrics", "seconds_per_image")} == {
        "attack": "mlp",
        "leaked": "lenet",
        "data": "photos",
        "channel": "none",
        "client_batch_size": 1,
        "n_images": 12,
        "seed": 0,
        "label_accuracy": 1.0,
        "knowledge": ["architecture", "pairs"],
    }
    assert entry["seconds_per_image"] > 0
    assert set(entry["metrics"]) == {"mse", "psnr", "ssim"}
    for metric in entry["metrics"].values():
        assert set(metric) == {"mean", "ci95"}
        assert metric["ci95"][0] <= metric["mean"] <= metric["ci95"][1]


def test_files_agree_with_an_attack_made_by_hand(load: Load) -> None:
    config = load()
    evaluate(config)
    datamodule = build_pairs(config)
    generator = build_generator(config, datamodule.leaked_model.architecture)
    state = torch.load(Path(str(config.output_dir)) / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    generator.load_state_dict({name.removeprefix("generator."): value for name, value in state.items()})
    (pair,) = datamodule.private_pairs(torch.device("cpu"), 12)
    with torch.no_grad():
        found = generator.eval()(pair.gradients)[:, 0].numpy()
    expected = [
        peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(pair.images[:, 0].numpy(), found, strict=True)
    ]
    written = rows(config)
    np.testing.assert_allclose([float(row["psnr"]) for row in written], expected, rtol=1e-4)
    assert entries(config)[0]["metrics"]["psnr"]["mean"] == pytest.approx(np.mean(expected), rel=1e-4)
    private = datamodule.split("test")
    assert [row["identifier"] for row in written] == list(private.identifiers[:12])
    assert [int(row["label"]) for row in written] == private.labels[:12].tolist()
    assert [int(row["index"]) for row in written] == list(range(12))


def test_means_are_those_of_per_image_csv(load: Load) -> None:
    config = load()
    evaluate(config)
    for name, metric in entries(config)[0]["metrics"].items():
        assert metric["mean"] == pytest.approx(np.mean([float(row[name]) for row in rows(config)]), rel=1e-12)


def test_an_evaluation_repeats(load: Load) -> None:
    config = load()
    evaluate(config)
    first, table = entries(config), rows(config)
    evaluate(config)
    again = entries(config)
    assert len(again) == 1
    assert rows(config) == table
    assert {**first[0], "seconds_per_image": 0} == {**again[0], "seconds_per_image": 0}


def test_results_of_other_conditions_are_kept(load: Load) -> None:
    evaluate(load())
    evaluate(load("channel=[{name: pruning, fraction: 0.5}]"))
    config = load("evaluation.n_images=6")
    evaluate(config)
    evaluate(config)
    conditions = [(entry["channel"], entry["n_images"]) for entry in entries(config)]
    assert conditions == [("none", 12), ("pruning(fraction=0.5)", 12), ("none", 6)]
    assert len(rows(config)) == 6
    assert "pruning(fraction=0.5)" in (folder_of(config) / "report.html").read_text()


def test_an_unreadable_metrics_json_is_not_overwritten(load: Load) -> None:
    config = load()
    folder_of(config).mkdir()
    (folder_of(config) / "metrics.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"metrics\.json"):
        evaluate(config)
    assert [(path.name, path.read_text()) for path in folder_of(config).iterdir()] == [("metrics.json", "{")]


def test_summary_names_metrics_intervals_and_files(load: Load) -> None:
    config = load()
    summary = evaluate(config).summary()
    psnr = entries(config)[0]["metrics"]["psnr"]
    assert f"{psnr['mean']:.2f}" in summary
    assert f"{psnr['ci95'][0]:.2f} to {psnr['ci95'][1]:.2f} dB" in summary
    for name in ("reconstructions.png", "report.html"):
        assert str(folder_of(config) / name) in summary.splitlines()[-1 if name == "report.html" else -2]
        assert (folder_of(config) / name).is_file()


def test_lpips_is_reported_where_it_can_be_had(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gitlight.evaluation.measuring.load_lpips", lambda: lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))
    )
    config = load()
    evaluate(config)
    assert entries(config)[0]["metrics"]["lpips"]["mean"] == pytest.approx(
        np.mean([float(row["lpips"]) for row in rows(config)])
    )


def test_more_images_than_there_are_attacks_all(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    config = load("evaluation.n_images=100000")
    with caplog.at_level(logging.WARNING, logger="gitlight"):
        evaluate(config)
    assert entries(config)[0]["n_images"] == N_PRIVATE == len(rows(config))
    assert "evaluation.n_images: 100000, but 40 private images are attacked: there are 40" in caplog.text


@pytest.mark.parametrize(
    ("asked", "n_private", "per_leak", "n_attacked", "why"),
    [
        (30, 99, 4, 28, "leaks are of 4 images each (data.client_batch_size)"),
        (99, 30, 4, 28, "there are 30, and leaks are of 4 images each (data.client_batch_size)"),
        (99, 30, 5, 30, "there are 30"),
        (30, 30, 5, 30, None),
    ],
)
def test_why_fewer_images_are_attacked_than_asked_for_is_said(
    asked: int, n_private: int, per_leak: int, n_attacked: int, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(data=DataConfig(client_batch_size=per_leak), evaluation=EvaluationConfig(n_images=asked))
    with caplog.at_level(logging.WARNING, logger="gitlight"):
        warn_of_few(config, n_private, n_attacked)
    wanted = [f"evaluation.n_images: {asked}, but {n_attacked} private images are attacked: {why}"] if why else []
    assert caplog.messages == wanted


def test_a_run_that_was_not_trained_says_how_to_train(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"python train\.py CONFIG"):
        evaluate(config)
    assert not (tmp_path / "nothing").exists()


def test_without_a_best_checkpoint_the_last_is_suggested(load: Load) -> None:
    config = load()
    (Path(str(config.output_dir)) / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"evaluation\.checkpoint=last"):
        evaluate(config)
    evaluate(load("evaluation.checkpoint=last"))


@pytest.mark.parametrize("keep", [0, 1000, 0.9])
def test_a_damaged_checkpoint_is_named(load: Load, keep: float) -> None:
    config = load()
    path = Path(str(config.output_dir)) / "checkpoints" / "best.ckpt"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"best\.ckpt"):
        evaluate(config)
    assert not folder_of(config).exists()


def test_other_generator_settings_are_an_error(load: Load) -> None:
    with pytest.raises(CheckpointError, match="differ from those that the generator was trained with"):
        evaluate(load("generator.hidden_size=9"))


def test_a_leaked_models_run_cannot_be_evaluated(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"task: leaked.*leaked\.weights="):
        evaluate(load("task=leaked"))


def test_fewer_images_than_a_client_batch_are_an_error(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.n_images: 2.*client_batch_size: 4"):
        evaluate(load("data.client_batch_size=4", "evaluation.n_images=2"))


def test_changed_leaked_weights_are_an_error(load: Load) -> None:
    config = load()
    path = Path(str(config.leaked.weights))
    state = torch.load(path, weights_only=True)
    torch.save({name: value + 0.1 for name, value in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt \(leaked\.weights\) has changed"):
        evaluate(config)


@pytest.mark.parametrize(
    ("override", "name"),
    [("leaked.activation=tanh", "lenet(activation=tanh)"), ("leaked.weights=null", "lenet(weights=null)")],
)
def test_another_leaked_model_on_purpose_is_a_condition_of_its_own(
    load: Load, override: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(load())
    config = load(override)
    with caplog.at_level(logging.WARNING, logger="gitlight"):
        evaluate(config)
    assert [entry["leaked"] for entry in entries(config)] == ["lenet", name]
    assert caplog.text.count(override.split("=")[0]) == 1


class Given(Generator):
    """Puts out images that it was given, whatever the gradients."""

    def __init__(self, config: Config, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.datamodule = build_pairs(config)
        super().__init__(self.datamodule.leaked_model.architecture, config.data.client_batch_size)
        pairs = self.datamodule.private_pairs(torch.device("cpu"), 100)
        self.images = change(torch.cat([pair.images for pair in pairs]))

    def forward(self, gradients: Gradients) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        n = len(next(iter(gradients.values())))
        return self.images[:n]


def test_diverged_reconstructions_count_as_failures(load: Load) -> None:
    def spoil(images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[0], images[1, 0, 0, 3, 3] = torch.nan, torch.inf
        return images

    generator = Given(load(), spoil)
    images, _ = attack(generator, generator.datamodule, ("a",) * 50, torch.device("cpu"), 4)
    assert images.failed.tolist() == [True, True, False, False]
    assert images.metrics["psnr"].tolist() == [FAILURE["psnr"], FAILURE["psnr"], 120.0, 120.0]
    assert images.metrics["ssim"][:2].tolist() == [0.0, 0.0]
    assert images.metrics["mse"][:2].tolist() == [1.0, 1.0]


def test_client_batches_are_matched_and_their_labels_counted(load: Load) -> None:
    generator = Given(load("data.client_batch_size=3"), lambda images: images.flip(1))
    images, _ = attack(generator, generator.datamodule, ("a",) * 50, torch.device("cpu"), 8)
    assert images.metrics["psnr"].tolist() == [120.0] * 6
    assert images.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.indices.tolist() == list(range(6))
    assert torch.equal(images.truth, images.reconstructions)
    # Each label that is right stands beside its image; of the others there is none.
    assert images.recovered_labels is not None
    assert ((images.recovered_labels == images.labels) | (images.recovered_labels == -1)).all()
    assert images.label_accuracy == pytest.approx((images.recovered_labels >= 0).double().mean().item())
    assert images.label_accuracy >= 0.5
