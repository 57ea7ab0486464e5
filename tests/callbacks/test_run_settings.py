from dataclasses import replace
from pathlib import Path

import pytest

from gitlight.callbacks.run_settings import STATE_KEY, RunSettings, check_resumable
from gitlight.config import Config, LossConfig, MLPGeneratorConfig, TrainerConfig
from gitlight.errors import CheckpointError
from gitlight.runs import FORMAT, VERSION

CONFIG = Config(generator=MLPGeneratorConfig(hidden_size=8))


def checkpoint(without):
    state = {key: value for key, value in RunSettings(CONFIG).state_dict().items() if not key.startswith(without)}
    training = {"global_step": 1, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    return {"callbacks": {STATE_KEY: state}, FORMAT: VERSION, **training}


@pytest.mark.parametrize(
    "foreign", [{"callbacks": []}, {"callbacks": {STATE_KEY: 3}}, {"loops": 3}, {"global_step": None}]
)
def test_what_another_wrote_is_no_run_that_could_be_continued(foreign):
    with pytest.raises(CheckpointError, match=r"last\.ckpt holds weights, but not a run that could be continued"):
        check_resumable(Path("last.ckpt"), {**checkpoint("loss."), **foreign}, CONFIG)


def test_a_setting_that_came_after_the_run_began_has_its_default():
    check_resumable(Path("last.ckpt"), checkpoint("loss."), CONFIG)
    check_resumable(Path("last.ckpt"), checkpoint("generator.scale_inputs"), CONFIG)
    changed = replace(CONFIG, loss=LossConfig(weight=0.5))
    with pytest.raises(CheckpointError, match=r"other settings \(loss.weight: 0.1 there, 0.5 now\)"):
        check_resumable(Path("last.ckpt"), checkpoint("loss."), changed)
    with pytest.raises(CheckpointError, match=r"\(generator.hidden_size: 3000 there, 8 now\)"):
        check_resumable(Path("last.ckpt"), checkpoint("generator.hidden_size"), CONFIG)


@pytest.mark.parametrize(("began", "now"), [(8, None), (8, 4), (None, 8)])
def test_virtual_ranks_are_those_that_the_run_began_with(began, now):
    def of(count):
        return replace(CONFIG, trainer=TrainerConfig(virtual_ranks=count))

    saved = checkpoint("nothing")
    saved["callbacks"][STATE_KEY] = RunSettings(of(began)).state_dict()
    check_resumable(Path("last.ckpt"), saved, of(began))
    with pytest.raises(CheckpointError, match=rf"other settings \(trainer.virtual_ranks: {began} there, {now} now\)"):
        check_resumable(Path("last.ckpt"), saved, of(now))


def test_a_checkpoint_from_before_virtual_ranks_were_kept_goes_on_with_any():
    for count in (None, 8):
        trainer = TrainerConfig(virtual_ranks=count)
        check_resumable(Path("last.ckpt"), checkpoint("trainer."), replace(CONFIG, trainer=trainer))
