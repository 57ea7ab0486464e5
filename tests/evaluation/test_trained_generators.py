from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated import Load, entries, folder_of, rows
from skimage.metrics import peak_signal_noise_ratio

from gitlight.config import Config
from gitlight.errors import CheckpointError, ConfigError
from gitlight.evaluation import evaluate
from gitlight.training import build_generator, build_pairs


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


def test_an_evaluation_repeats(load: Load) -> None:
    config = load()
    evaluate(config)
    first, table = entries(config), rows(config)
    evaluate(config)
    again = entries(config)
    assert len(again) == 1
    assert rows(config) == table
    assert {**first[0], "seconds_per_image": 0} == {**again[0], "seconds_per_image": 0}


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
