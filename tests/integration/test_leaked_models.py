"""Real runs that attack models of the user's own, and updates of several local steps."""

import json

import pytest
import torch
from small_run import SMALL
from torch import nn

from gitlight import evaluate as evaluate_in_python
from gitlight import train as train_in_python
from gitlight.config_loading import load_config
from gitlight.errors import CheckpointError, ConfigError

QUICK = [setting for setting in SMALL if not setting.startswith("leaked")]
MLP = "generator: {name: mlp, hidden_size: 8}\ntrainer: {max_epochs: 1}\n"


def results(run):
    return json.loads((run / "evaluation" / "metrics.json").read_text())["results"]


@pytest.mark.slow
def test_a_model_in_the_current_folder_is_attacked(command, tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def small(width):\n"
        "    conv = nn.Conv2d(3, width, 3, stride=4)\n"
        "    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.Sigmoid(), nn.Flatten(), nn.Linear(64 * width, 8))\n"
    )
    (tmp_path / "own.yaml").write_text(
        MLP + "leaked: {name: custom, target: nets:small, arguments: {width: 3}, batch_norm: batch}\n"
    )
    command("train.py", "own.yaml", *QUICK)
    command("evaluate.py", "runs/own", "evaluation.n_images=8")
    (result,) = results(tmp_path / "runs" / "own")
    assert (result["attack"], result["leaked"], result["n_images"]) == ("mlp", "custom:nets:small", 8)
    output = command("train.py", "own.yaml", *QUICK, "leaked.target=nets.large", code=2)
    assert "leaked.target: nets.large: nets has no 'large'" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("generator", ["mlp", "hybrid"])
@pytest.mark.slow
def test_updates_are_attacked_and_are_a_condition_of_their_own(train, evaluate, tmp_path, generator, capsys):
    settings = {"mlp": "hidden_size: 8", "hybrid": "channels: 8, blocks: 1"}[generator]
    (tmp_path / "fedavg.yaml").write_text(
        f"generator: {{name: {generator}, {settings}}}\ntrainer: {{max_epochs: 1}}\n"
        "data: {client_batch_size: 4}\n"
        "gradients: {updates: {epochs: 2, batch_size: 3, learning_rate: 0.1}}\n"
    )
    small = [*SMALL, "data.batch_size=4"]
    assert train("fedavg.yaml", *small) == 0
    assert evaluate("runs/fedavg", "evaluation.n_images=8") == 0
    # What was decided for the run counts, also where its config is named.
    assert evaluate("fedavg.yaml", *small, "evaluation.n_images=8") == 0
    assert evaluate("runs/fedavg", "evaluation.n_images=8", "gradients.updates.epochs=1") == 0
    assert evaluate("runs/fedavg", "evaluation.n_images=8", "gradients.updates.batch_size=null") == 0
    assert evaluate("runs/fedavg", "evaluation.n_images=8", "gradients.updates={epochs: 1, batch_size: null}") == 0
    found = [(result["attack"], result.get("leak", "gradient")) for result in results(tmp_path / "runs" / "fedavg")]
    assert found == [
        (generator, "update(epochs=2, batch_size=3, learning_rate=0.1)"),
        (generator, "update(epochs=1, batch_size=3, learning_rate=0.1)"),
        (generator, "update(epochs=2, batch_size=4, learning_rate=0.1)"),
        (generator, "gradient"),
    ]
    report = (tmp_path / "runs" / "fedavg" / "evaluation" / "report.html").read_text()
    assert "trained on another kind of leak: update(epochs=2" in report
    capsys.readouterr()
    assert train("fedavg.yaml", *small, "generator={name: exact}", "data.client_batch_size=1") == 2
    assert "gradients.updates: exact inverts one gradient" in capsys.readouterr().err
    assert train("fedavg.yaml", *small, "generator={name: hybrid, separate: true}") == 2
    assert "generator.separate: the images of one gradient" in capsys.readouterr().err


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.dropout, self.head = nn.Linear(3072, 6), nn.Dropout(), nn.Linear(6, 8)

    def forward(self, images):
        return self.head(self.dropout(torch.tanh(self.hidden(images.flatten(1)))))


def test_a_model_passed_in_python_is_attacked(tmp_path, evaluate, capsys):
    (tmp_path / "given.yaml").write_text(MLP)
    config = load_config(tmp_path / "given.yaml", [*SMALL, f"output_dir={tmp_path / 'run'}", "evaluation.n_images=8"])
    torch.manual_seed(0)
    network = Net()
    folder = train_in_python(config, network=network)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    evaluation = evaluate_in_python(load_config(folder, ["evaluation.n_images=8"]), network=network)
    assert evaluation.result.leaked.startswith("given:")
    assert evaluation.result.leaked.endswith(".Net")
    with pytest.raises(ConfigError, match=r"leaked.name: 'given'.*passed in Python.*Net.*evaluate\(config, network"):
        evaluate_in_python(load_config(folder))
    with pytest.raises(CheckpointError, match="the network passed is not the one that was passed to train"):
        evaluate_in_python(load_config(folder), network=Net())
    assert evaluate(str(folder)) == 2
    assert "leaked.name: 'given'" in capsys.readouterr().err


def test_a_model_passed_in_python_is_trained_and_then_attacked(tmp_path):
    (tmp_path / "leaked.yaml").write_text("task: leaked\ntrainer: {max_epochs: 1}\n")
    torch.manual_seed(0)
    network = Net()
    before = network.head.weight.detach().clone()
    trained = train_in_python(
        load_config(tmp_path / "leaked.yaml", [*QUICK, f"output_dir={tmp_path / 'trained'}"]), network=network
    )
    assert torch.equal(network.head.weight, before), "a copy is trained"
    (tmp_path / "attack.yaml").write_text(MLP + f"leaked: {{name: given, weights: {trained}}}\n")
    config = load_config(tmp_path / "attack.yaml", [*QUICK, f"output_dir={tmp_path / 'attack'}"])
    assert train_in_python(config, network=network).is_dir()
