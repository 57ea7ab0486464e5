"""A generator for a range of noise, from training to evaluation at levels of it."""

import json

import pytest
from small_run import SMALL

from gitlight import load_config
from gitlight.decisions import with_decisions
from gitlight.errors import ConfigError

RANGE = "channel: [{name: gaussian_noise, relative_std: 0.1, lowest_std: 0}]\n"


GENERATORS = {
    "mlp": "{name: mlp, hidden_size: 200}",
    "coarse": "{name: coarse, hidden_size: 50, channels: 8}",
    "hybrid": "{name: hybrid, channels: 8, blocks: 1}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
def test_the_range_is_decided_in_training_and_kept(train, evaluate, tmp_path, name):
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(f"{RANGE}generator: {GENERATORS[name]}\ntrainer: {{max_epochs: 1}}\n")
    assert train("run.yaml", *SMALL, f"output_dir={run}") == 0
    assert load_config(run).generator.noise_range == [0, 0.1]
    # A run's folder has the range in its config.yaml; the config that the run was begun with has not.
    noisy = 'channel=[{"name": "gaussian_noise", "relative_std": 0.1}]'
    assert evaluate(str(run), "channel=[]", "evaluation.n_images=16") == 0
    assert evaluate("run.yaml", *SMALL, f"output_dir={run}", noisy, "evaluation.n_images=16") == 0
    clean, noisy = json.loads((run / "evaluation" / "metrics.json").read_text())["results"]
    assert clean["metrics"]["mse"]["mean"] < noisy["metrics"]["mse"]["mean"]


def test_a_range_that_is_none_is_named(train, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"{RANGE}generator: {{name: hybrid, noise_range: [0.1, 0.01]}}\n")
    assert train("run.yaml", *SMALL, f"output_dir={tmp_path / 'run'}") == 2
    assert "generator.noise_range: [0.1, 0.01]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


NO_LEVEL = [
    ["data.client_batch_size=8"],
    ["gradients.sketch.name=count"],
    ["channel=[{name: gaussian_noise, relative_std: 0.1, lowest_std: 0}, {name: pruning, fraction: 0.5}]"],
    ["channel=[]"],
]


@pytest.mark.parametrize("settings", NO_LEVEL)
@pytest.mark.parametrize("name", GENERATORS)
def test_leaks_that_do_not_tell_their_noise_have_no_range(tmp_path, settings, name):
    (tmp_path / "run.yaml").write_text(f"{RANGE}generator: {{name: {name}}}\n")
    config = load_config(tmp_path / "run.yaml", settings)
    assert with_decisions(config).generator.noise_range is None
    config = load_config(tmp_path / "run.yaml", [*settings, "generator.noise_range=[0, 0.1]"])
    with pytest.raises(ConfigError, match=r"generator.noise_range: the noise of a leak"):
        with_decisions(config)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["generator.name=mlp"], [0, 0.1]),
        (["generator.name=mlp", "generator.scale_inputs=false"], None),  # as published
        (["generator.name=mlp", "generator.noise_range=[]"], []),
        (["generator.name=coarse"], [0, 0.1]),
        (["generator.name=hybrid", "generator.noise=0.01"], None),
    ],
)
def test_which_generators_take_the_channels_range(tmp_path, settings, wanted):
    (tmp_path / "run.yaml").write_text(RANGE)
    assert with_decisions(load_config(tmp_path / "run.yaml", settings)).generator.noise_range == wanted
