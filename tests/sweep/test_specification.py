import sys
from collections import Counter
from pathlib import Path

import pytest
from sweep_files import ROOT, write_sweep

from gitlight.errors import ConfigError
from gitlight.sweep.specification import EarlyTermination, load_specification


def test_a_file_is_read(tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path, method="bayes", run_cap="7", description="words", name="shown", project="p", entity="e"
    )
    sweep = load_specification(file)
    assert (sweep.name, sweep.method, sweep.metric, sweep.goal) == ("my_sweep", "bayes", "val/psnr", "maximize")
    assert sweep.run_cap == 7
    assert sweep.early_terminate is None


def test_the_goal_is_to_minimize_if_none_is_given(tmp_path: Path) -> None:
    assert load_specification(write_sweep(tmp_path, metric="{name: val/loss}")).goal == "minimize"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{type: hyperband, min_iter: 2}", EarlyTermination(first=2, eta=3)),
        ("{type: hyperband, min_iter: 4, eta: 2, strict: false}", EarlyTermination(first=4, eta=2)),
        ("{type: hyperband, max_iter: 27, s: 2}", EarlyTermination(first=3, eta=3)),
    ],
)
def test_early_termination_is_that_of_wandb(tmp_path: Path, given: str, expected: EarlyTermination) -> None:
    assert load_specification(write_sweep(tmp_path, early_terminate=given)).early_terminate == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contoller": "{type: local}"}, "contoller (in {file}) is no key of a sweep that is supported."),
        ({"run_cpa": "3"}, "run_cpa (in {file}) is no key of a sweep that is supported. Did you mean run_cap?"),
        ({"program": None}, "program: None (in {file}): expected a script that is there"),
        ({"program": "nowhere.py"}, "program: 'nowhere.py' (in {file}): expected a script that is there"),
        ({"method": "bayesian"}, "method: 'bayesian' (in {file}) is not supported. Did you mean bayes?"),
        ({"method": None}, "method: None (in {file}) is not supported."),
        ({"metric": None}, "metric: None (in {file}): expected what trials are compared by"),
        ({"metric": "{name: val/psnr, target: 3}"}, "metric.target (in {file}) is not supported."),
        ({"metric": "{name: val/psnr, goal: max}"}, "metric.goal: 'max' (in {file}): expected maximize or minimize."),
        ({"run_cap": "0"}, "run_cap: 0 (in {file}): expected a whole number above 0."),
        ({"parameters": None}, "parameters: None (in {file}): expected settings to vary"),
        ({"command": None}, "command: None (in {file}): expected a list. W&B's default passes --key=value"),
        ({"command": '["${program}", x.yaml, "${args}"]'}, "command: ${args} (in {file}) is not supported."),
        ({"command": '["${envvar:HOME}/x", "${program}"]'}, "command: ${envvar:HOME}/x (in {file}) is not supported."),
        ({"command": '["${program}", x.yaml]'}, "command: expected ${args_no_hyphens} once (in {file})"),
        ({"command": '[train.py, "${args_no_hyphens}"]'}, "command: expected ${program} once (in {file})"),
        ({"command": '["${program}", "${args_no_hyphens}"]'}, "command (in {file}): expected a config file in it"),
        ({"early_terminate": "{type: median}"}, "early_terminate: 'median' (in {file}) is not supported."),
        ({"early_terminate": "hyperband"}, "early_terminate: 'hyperband' (in {file}) is not supported."),
        (
            {"early_terminate": "{type: hyperband}"},
            "early_terminate (in {file}): expected min_iter, or max_iter with s.",
        ),
        ({"early_terminate": "{type: hyperband, max_iter: 9}"}, "expected min_iter, or max_iter with s."),
        ({"early_terminate": "{type: hyperband, min_iter: 2.5}"}, "early_terminate.min_iter: 2.5 (in {file})"),
        ({"early_terminate": "{type: hyperband, min_iter: 2, eta: 1}"}, "early_terminate.eta: 1 (in {file})"),
        (
            {"early_terminate": "{type: hyperband, min_iter: 2, strict: true}"},
            "early_terminate.strict: True (in {file})",
        ),
        ({"early_terminate": "{type: hyperband, minn_iter: 2}"}, "early_terminate.minn_iter (in {file}): no such key."),
        (
            {"method": "grid", "parameters": "{optimizer.learning_rate: {min: 0.1, max: 0.2}}"},
            "parameters.optimizer.learning_rate (in {file}) has no end of values, and method: grid tries all.",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_file(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    file = write_sweep(tmp_path, **changes)
    with pytest.raises(ConfigError) as raised:
        load_specification(file)
    assert message.replace("{file}", str(file)) in str(raised.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("{generator.chanels: {values: [32]}}", "generator.chanels: no such setting"),
        ("{generator.channels: {values: [32, 0]}}", "generator.channels: 0 (from {file}) is too small: at least 1"),
        ("{generator.channels: {min: 0.5, max: 3}}", "generator.channels: 0.5 (from {file}) is not a whole number"),
        ("{optimizer.momentum: {min: 0.0, max: 1.5}}", "optimizer.momentum: 1.5 (from {file}) is too large: at most 1"),
    ],
)
def test_parameters_must_be_settings_before_anything_starts(tmp_path: Path, parameters: str, message: str) -> None:
    file = write_sweep(tmp_path, parameters=parameters)
    with pytest.raises(ConfigError) as raised:
        load_specification(file)
    assert message.replace("{file}", str(file)) in str(raised.value)


def test_settings_in_the_command_count_when_parameters_are_checked(tmp_path: Path) -> None:
    demo = ROOT / "configs" / "demo.yaml"
    command = f'["${{program}}", {demo}, generator.name=mlp, "${{args_no_hyphens}}"]'
    file = write_sweep(tmp_path, command=command, parameters="{generator.hidden_size: {values: [10]}}")
    assert "generator.name=mlp" in load_specification(file).expand_command({"generator.hidden_size": 10})


@pytest.mark.parametrize("content", ["- a\n", "a: [\n", "3\n"])
def test_what_is_no_sweep_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"sweep\.yaml"):
        load_specification(path)


def test_a_grid_covers_every_combination_once_the_last_parameter_fastest(tmp_path: Path) -> None:
    parameters = """
        seed: {min: 0, max: 2}
        optimizer.name: {values: [adam, sgd]}
        generator.blocks: {value: 2}
    """
    grid = load_specification(write_sweep(tmp_path, method="grid", parameters=parameters)).grid()
    assert grid[:3] == [
        {"seed": 0, "optimizer.name": "adam", "generator.blocks": 2},
        {"seed": 0, "optimizer.name": "sgd", "generator.blocks": 2},
        {"seed": 1, "optimizer.name": "adam", "generator.blocks": 2},
    ]
    counts = Counter((point["seed"], point["optimizer.name"]) for point in grid)
    assert counts == {(seed, name): 1 for seed in (0, 1, 2) for name in ("adam", "sgd")}


def test_the_interpreter_is_the_one_that_runs_the_sweep(tmp_path: Path) -> None:
    command = load_specification(write_sweep(tmp_path)).expand_command({"generator.channels": 32})
    demo, train = (str(ROOT / name) for name in ("configs/demo.yaml", "train.py"))
    assert command == ["/usr/bin/env", sys.executable, train, demo, "generator.channels=32"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_sweeps_that_come_with_gitlight_are_right(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert load_specification(file).space
