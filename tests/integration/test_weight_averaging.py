"""``optimizer.ema_decay``: the moving average of the weights is what is validated, kept and continued."""

import csv

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from small_run import SMALL

from gitlight import load_config
from gitlight.callbacks import build_callbacks
from gitlight.runs import load_checkpoint
from gitlight.training import GITModule, build_generator, build_pairs

MLP = ["generator.name=mlp", "generator.hidden_size=8"]


class Steps(Callback):
    """The first layer's weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.weights.append(next(pl_module.generator.parameters()).detach().double().clone())


def test_the_average_is_that_of_the_definition(tmp_path):
    (tmp_path / "run.yaml").write_text("optimizer: {ema_decay: 0.4}\n")
    config = load_config(tmp_path / "run.yaml", [*SMALL, *MLP])
    pairs = build_pairs(config)
    module = GITModule(build_generator(config, pairs.architecture), config.optimizer)
    (average,) = (one for one in build_callbacks(config, tmp_path) if isinstance(one, WeightAveraging))
    steps = Steps()
    trainer = Trainer(
        callbacks=[average, steps],
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=pairs)
    expected = steps.weights[0]
    for weights, kept in zip(steps.weights[1:], [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, *[0.4] * 6], strict=True):
        expected = kept * expected + (1 - kept) * weights
    assert len(steps.weights) == 12
    found = next(module.generator.parameters()).detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert (found - steps.weights[-1]).abs().max() > 1e-5


@pytest.mark.slow
def test_it_is_continued_and_evaluated(train, evaluate, tmp_path):
    (tmp_path / "run.yaml").write_text("optimizer: {ema_decay: 0.9, schedule: constant}\n")
    settings = ["run.yaml", *SMALL, "generator.name=hybrid", "generator.channels=4", "generator.blocks=1"]
    for name, epochs in (("whole", 4), ("parts", 2)):
        assert train(*settings, f"trainer.max_epochs={epochs}", f"output_dir={tmp_path / name}") == 0
    assert train(str(tmp_path / "parts"), "trainer.resume=last", "trainer.max_epochs=4") == 0
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts")]
    for key in ("state_dict", "current_model_state"):
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name]), (key, name)
    changed = [name for name, value in states[0]["state_dict"].items() if value.is_floating_point()]
    assert any(not torch.equal(states[0]["state_dict"][n], states[0]["current_model_state"][n]) for n in changed)
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        validated = [float(row["val/mse"]) for row in csv.DictReader(file) if row.get("val/mse")]
    assert len(validated) == 4
    assert evaluate(str(tmp_path / "parts"), "evaluation.n_images=8") == 0


def test_a_sketch_and_entries_that_never_vary_are_no_average(train, evaluate, tmp_path):
    (tmp_path / "run.yaml").write_text("optimizer: {ema_decay: 0.0}\n")
    sketch = ["gradients.sketch.name=count", "gradients.sketch.size=64", "leaked.activation=relu"]
    settings = ["run.yaml", *SMALL, *MLP, *sketch, f"output_dir={tmp_path / 'run'}"]
    assert train(*settings) == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert not any(value.isnan().any() for value in state.values())
    assert evaluate(str(tmp_path / "run"), "evaluation.n_images=8") == 0
    assert train(str(tmp_path / "run"), "trainer.resume=last", "trainer.max_epochs=11") == 0


def test_nothing_to_train_has_nothing_to_clip(train, tmp_path, capsys):
    settings = ["generator.name=exact", "trainer.gradient_clip_val=1"]
    assert train(*SMALL, *settings, f"output_dir={tmp_path / 'run'}") == 2
    assert "trainer.gradient_clip_val: exact has no trained weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [(["generator.name=exact"], "exact has no trained weights"), ([*MLP, "trainer.strategy=fsdp"], "sharded")],
)
def test_what_has_no_average_is_named(train, tmp_path, capsys, settings, message):
    (tmp_path / "run.yaml").write_text("optimizer: {ema_decay: 0.9}\n")
    assert train("run.yaml", *SMALL, *settings, f"output_dir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert "optimizer.ema_decay" in error
    assert message in error
    assert not (tmp_path / "run").exists()
