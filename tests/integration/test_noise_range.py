"""A generator for a range of noise, from training to evaluation at levels of it."""

import json

from small_run import SMALL

from gitlight import load_config


def test_the_range_is_decided_in_training_and_kept(train, evaluate, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(
        "channel: [{name: gaussian_noise, relative_std: 0.1, lowest_std: 0}]\n"
        "generator: {name: hybrid, channels: 8, blocks: 1}\ntrainer: {max_epochs: 1}\n"
    )
    assert train("run.yaml", *SMALL, f"output_dir={run}") == 0
    assert load_config(run).generator.noise_range == [0, 0.1]
    noises = [[], [{"name": "gaussian_noise", "relative_std": 0.1}]]
    for channel in noises:
        assert evaluate(str(run), f"channel={json.dumps(channel)}", "evaluation.n_images=16") == 0
    clean, noisy = json.loads((run / "evaluation" / "metrics.json").read_text())["results"]
    assert clean["metrics"]["mse"]["mean"] < noisy["metrics"]["mse"]["mean"]


def test_a_range_that_is_none_is_named(train, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("generator: {name: hybrid, noise_range: [0.1, 0.01]}\n")
    assert train("run.yaml", *SMALL, f"output_dir={tmp_path / 'run'}") == 2
    assert "generator.noise_range: [0.1, 0.01]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
