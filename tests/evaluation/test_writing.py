import json
import logging

import numpy as np
import pytest
from evaluated import N_PRIVATE, Load, entries, folder_of, rows

from gitlight.config import Config, DataConfig, EvaluationConfig
from gitlight.errors import CheckpointError
from gitlight.evaluation import evaluate
from gitlight.evaluation.writing import warn_of_few


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


def test_means_are_those_of_per_image_csv(load: Load) -> None:
    config = load()
    evaluate(config)
    for name, metric in entries(config)[0]["metrics"].items():
        assert metric["mean"] == pytest.approx(np.mean([float(row[name]) for row in rows(config)]), rel=1e-12)


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
