import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gitlight
from gitlight.cli import identify_command
from gitlight.config import Config, DataConfig, FullyConnectedConfig, GradientsConfig, LeNetConfig, UpdatesConfig
from gitlight.data import SOURCES
from gitlight.data.classes import count_classes
from gitlight.data.faces import CLASS_NAMES
from gitlight.data.torchvision_sets import CELEBA_CLASS_NAMES

ROOT = Path(__file__).parent.parent
SMALL = [str(ROOT / "configs" / "demo.yaml"), "data.image_size=8", "leaked.name=mlp", "leaked.hidden_sizes=[6]"]


def test_help_does_not_load_torch():
    code = "import sys, runpy; sys.argv = ['identify', '--help']\n"
    code += "try:\n    runpy.run_module('gitlight.identify', run_name='__main__')\nexcept SystemExit as end:\n"
    code += "    assert end.code == 0\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m gitlight.identify" in result.stdout
    assert "leaked.width=12" in result.stdout


def test_table_is_printed_and_json_written(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert identify_command(["--json", str(path), *SMALL]) == 0
    text = capsys.readouterr().out
    assert "The image is exact" in text
    assert "No weight is needed, and so no pair." in text
    lines = text.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["linear2", "linear1"]
    assert lines[header + 2].endswith("exact from the gradient alone")
    report = json.loads(path.read_text())
    assert report["schema"] == 1
    assert report["leaked"] == "mlp"
    assert report["image"] == [3, 8, 8]
    assert report["n_classes"] == 8, "that of the photographs"
    assert [layer["unknowns"] for layer in report["layers"]] == [6, 192]
    assert list(tmp_path.iterdir()) == [path]


def test_json_alone_goes_to_the_terminal(capsys):
    assert identify_command([*SMALL, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["image_is"] == "exact"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["leaked.widht=3"], "leaked.widht"),
        (["--json"], "--json"),
        (["--json", "/nowhere/report.json"], "/nowhere"),
        (["leaked.hidden_sizes=[0]"], "leaked.hidden_sizes"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(arguments, named, capsys):
    assert identify_command([*SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert named in captured.err


def test_no_config_shows_the_usage(capsys):
    assert identify_command([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_function_and_module_of_one_name_do_the_same(monkeypatch):
    config = Config(leaked=FullyConnectedConfig(hidden_sizes=[]), data=DataConfig(image_size=8))
    monkeypatch.delitem(vars(gitlight), "identify", raising=False)
    function = gitlight.identify
    monkeypatch.setattr(gitlight, "identify", importlib.import_module("gitlight.identify"), raising=False)
    assert gitlight.identify is not function
    assert gitlight.identify(config) == function(config)


def test_leaked_weights_are_never_read(tmp_path):
    config = Config(data=DataConfig(image_size=8, name="folder", root=str(tmp_path / "not there")))
    config.leaked.weights = str(tmp_path / "secret.pt")
    report = gitlight.identify(config)
    assert report.n_classes == 10
    assert any("10 classes are assumed" in note for note in report.notes)


def test_several_images_per_leak_are_noted():
    report = gitlight.identify(Config(data=DataConfig(image_size=8, client_batch_size=4)))
    assert any("data.client_batch_size=4" in note for note in report.notes)


@pytest.mark.parametrize(
    ("client_batch_size", "updates", "found"),
    [
        (4, UpdatesConfig(), True),
        (9, UpdatesConfig(), True),
        (10, UpdatesConfig(), False),
        (4, UpdatesConfig(epochs=2), False),
    ],
)
def test_it_is_said_where_images_of_an_average_can_be_told_apart(client_batch_size, updates, found):
    data = DataConfig(name="cifar10", image_size=8, client_batch_size=client_batch_size)
    report = gitlight.identify(Config(data=data, gradients=GradientsConfig(updates=updates)))
    assert found == any("each one's input of linear" in note for note in report.notes)


def test_it_is_said_where_each_image_of_an_average_can_be_found():
    data = DataConfig(name="cifar10", image_size=8, client_batch_size=4)
    for settings, found in ((FullyConnectedConfig(activation="tanh"), True), (LeNetConfig(), False)):
        report = gitlight.identify(Config(data=data, leaked=settings))
        assert found == any("each one can mostly be found" in note for note in report.notes)


def test_updates_of_several_steps_are_noted():
    updates = GradientsConfig(updates=UpdatesConfig(epochs=2))
    report = gitlight.identify(Config(data=DataConfig(image_size=8), gradients=updates))
    assert any("update(epochs=2" in note for note in report.notes)
    assert not gitlight.identify(Config(data=DataConfig(image_size=8))).notes


def test_classes_are_counted_without_reading_images(tmp_path):
    for split, name in (("train", "cat"), ("train", "dog"), ("test", "owl"), ("test", ".hidden")):
        (tmp_path / split / name).mkdir(parents=True)
    assert count_classes(DataConfig(name="folder", root=str(tmp_path))) == (3, False)
    assert count_classes(DataConfig(name="imagenet", root=str(tmp_path))) == (3, False)
    assert count_classes(DataConfig(name="imagenet")) == (1000, False)
    assert count_classes(DataConfig(name="faces")) == (len(CLASS_NAMES), False)
    assert count_classes(DataConfig(name="celeba")) == (len(CELEBA_CLASS_NAMES), False)
    assert [name for name in SOURCES.names() if count_classes(DataConfig(name=name)).assumed] == ["folder"]
