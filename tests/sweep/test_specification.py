import sys
from collections import Counter
from pathlib import Path

import pytest
from sweep_files import ROOT, write_sweep

from gitlight.callbacks import MONITORS
from gitlight.callbacks.metrics import METRICS
from gitlight.errors import ConfigError
from gitlight.sweep.early_termination import EarlyTermination
from gitlight.sweep.metrics import VALIDATED
from gitlight.sweep.specification import load_specification

DEMO = ROOT / "configs" / "demo.yaml"


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
        ("{type: hyperband, min_iter: 2}", EarlyTermination.upwards(2, 3)),
        ("{type: hyperband, min_iter: 4, eta: 2, strict: false}", EarlyTermination.upwards(4, 2)),
        ("{type: hyperband, min_iter: 2, strict: true}", EarlyTermination.upwards(2, 3, strict=True)),
        ("{type: hyperband, max_iter: 27, s: 2}", EarlyTermination((3, 9), 3)),
        ("{type: hyperband, max_iter: 27, s: 10000000000}", EarlyTermination((1, 3, 9), 3)),
        ("{type: hyperband, max_iter: 25, s: 2, strict: true}", EarlyTermination((2, 8), 3, strict=True)),
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
        (
            {"metric": "{name: val/pnsr, goal: maximize}"},
            "metric.name: val/pnsr (in {file}) is not logged by a run of task=generator. Did you mean val/psnr?",
        ),
        ({"metric": "{name: val/accuracy}"}, "At a validation it logs: val/loss, val/psnr, val/mse, val/ssim"),
        ({"run_cap": "0"}, "run_cap: 0 (in {file}): expected a whole number above 0."),
        ({"parameters": None}, "parameters: None (in {file}): expected settings to vary"),
        ({"command": None}, "command: None (in {file}): expected a list. W&B's default passes --key=value"),
        ({"command": '["${program}", x.yaml, "${args}"]'}, "command: ${args} (in {file}) is not supported."),
        ({"command": '["${envvar:HOME}/x", "${program}"]'}, "command: ${envvar:HOME}/x (in {file}) is not supported."),
        ({"command": '["${program}", x.yaml]'}, "command: expected ${args_no_hyphens} once (in {file})"),
        ({"command": '[train.py, "${args_no_hyphens}"]'}, "command: expected ${program} once (in {file})"),
        ({"command": '["${program}", "${args_no_hyphens}"]'}, "command (in {file}): expected a config file in it"),
        (
            {"command": '["${program}", x.yaml, {seed: 1}, "${args_no_hyphens}"]'},
            "command: {'seed': 1} (in {file}): expected text",
        ),
        (
            {"command": '["${program}", x.yaml, null, "${args_no_hyphens}"]'},
            "command: None (in {file}): expected text",
        ),
        (
            {"command": f'["${{program}}", {DEMO}, "${{args_no_hyphens}}", generator.channels=8]'},
            "command: generator.channels=8 (in {file}) stands after ${args_no_hyphens} and sets what the sweep varies",
        ),
        (
            {"command": f'["${{program}}", {DEMO}, output_dir=runs/x, "${{args_no_hyphens}}"]'},
            "command: output_dir=runs/x (in {file}): the sweep gives each trial its own; leave it out.",
        ),
        (
            {"command": f'["${{program}}", {DEMO}, "${{args_no_hyphens}}", trainer.resume=best]'},
            "command: trainer.resume=best (in {file}): the sweep gives each trial its own; leave it out.",
        ),
        (
            {"command": f'["${{program}}", {DEMO}, --help, "${{args_no_hyphens}}"]'},
            "command: --help (in {file}): train.py would print its help, and train nothing",
        ),
        (
            {"command": f'["${{program}}", {DEMO}, -v, "${{args_no_hyphens}}"]'},
            "command: -v (in {file}): train.py takes one config file, right after ${program}, and then settings",
        ),
        (
            {"command": f'["${{program}}", {DEMO}, {DEMO}, "${{args_no_hyphens}}"]'},
            f"command: {DEMO} (in {{file}}): train.py takes one config file, right after ${{program}}",
        ),
        (
            {"command": f'["${{program}}", seed=1, {DEMO}, "${{args_no_hyphens}}"]'},
            "command: seed=1 (in {file}): train.py takes one config file, right after ${program}",
        ),
        (
            {"command": f'["${{program}}", "${{args_no_hyphens}}", {DEMO}]'},
            f"command: {DEMO} (in {{file}}): train.py takes one config file, right after ${{program}}",
        ),
        (
            {"command": f'["${{args_no_hyphens}}", "${{program}}", {DEMO}]'},
            "command: ${args_no_hyphens} (in {file}) stands before ${program}; expected behind",
        ),
        ({"parameters": "{output_dir: {values: [a, b]}}"}, "parameters.output_dir (in {file}): the sweep gives each"),
        (
            {"parameters": "{trainer: {parameters: {resume: {values: [last]}}}}"},
            "parameters.trainer.resume (in {file}): the sweep gives each trial its own",
        ),
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
            {"early_terminate": "{type: hyperband, min_iter: 2, strict: 1}"},
            "early_terminate.strict: 1 (in {file}): expected true or false.",
        ),
        (
            {"early_terminate": "{type: hyperband, max_iter: 2, s: 1}"},
            "early_terminate.max_iter: 2 (in {file}) is below eta 3, and no trial would be judged",
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
    command = f'["${{program}}", {DEMO}, generator.name=mlp, "${{args_no_hyphens}}", seed=3]'
    file = write_sweep(tmp_path, command=command, parameters="{generator.hidden_size: {values: [10]}}")
    assert "generator.name=mlp" in load_specification(file).expand_command({"generator.hidden_size": 10})


def test_the_metrics_that_are_known_are_those_of_the_callbacks(tmp_path: Path) -> None:
    assert set(VALIDATED["image_prior"]) == {f"val/{name}" for name in METRICS}
    assert all(MONITORS[task] in known for task, known in VALIDATED.items())
    assert VALIDATED.keys() == MONITORS.keys()
    program = tmp_path / "own.py"
    program.touch()
    load_specification(write_sweep(tmp_path, program=str(program), metric="{name: own/metric}"))


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
    sweep = load_specification(write_sweep(tmp_path, method="grid", parameters=parameters))
    grid = [sweep.grid_point(place) for place in range(sweep.grid_size())]
    assert grid[:3] == [
        {"seed": 0, "optimizer.name": "adam", "generator.blocks": 2},
        {"seed": 0, "optimizer.name": "sgd", "generator.blocks": 2},
        {"seed": 1, "optimizer.name": "adam", "generator.blocks": 2},
    ]
    counts = Counter((point["seed"], point["optimizer.name"]) for point in grid)
    assert counts == {(seed, name): 1 for seed in (0, 1, 2) for name in ("adam", "sgd")}


def test_a_large_grid_is_not_laid_out(tmp_path: Path) -> None:
    parameters = """
        seed: {min: 0, max: 4000000000}
        optimizer.momentum: {distribution: q_uniform, min: 0.0, max: 1.0, q: 1.0e-9}
    """
    sweep = load_specification(write_sweep(tmp_path, method="grid", parameters=parameters))
    assert sweep.grid_size() == 4000000001 * 1000000001
    assert sweep.grid_point(sweep.grid_size() - 1) == {"seed": 4000000000, "optimizer.momentum": 1.0}


def test_the_interpreter_is_the_one_that_runs_the_sweep(tmp_path: Path) -> None:
    command = load_specification(write_sweep(tmp_path)).expand_command({"generator.channels": 32})
    assert command == ["/usr/bin/env", sys.executable, str(ROOT / "train.py"), str(DEMO), "generator.channels=32"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_sweeps_that_come_with_gitlight_are_right(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert load_specification(file).space
