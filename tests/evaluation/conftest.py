"""A run of a trained generator, to be evaluated in every way."""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluated import N_PRIVATE, Load

from gitlight.config import DataConfig
from gitlight.config_loading import load_config, save_config
from gitlight.data.datamodule import load_images
from gitlight.data.images import ImageSplits, ImageSubset
from gitlight.training import build_pairs, train


@functools.cache
def few_photos() -> ImageSplits:
    """Cut up only once, with few private images."""
    splits = load_images(DataConfig(name="photos"))
    few = torch.arange(0, len(splits.test), len(splits.test) // N_PRIVATE)[:N_PRIVATE]
    return replace(splits, test=ImageSubset(splits.test, few))


@pytest.fixture(autouse=True, scope="module")
def _quick(without_lpips: None) -> Iterator[None]:
    """Few photographs, and no LPIPS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gitlight.training.load_images", lambda settings: few_photos())
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, _quick: None) -> Path:
    """A run of two optimiser steps, whose leaked model is read from a file."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "base.yaml").write_text(
        "data: {name: photos, n_public_images: 96, n_validation: 32, batch_size: 32}\n"
        "generator: {name: mlp, hidden_size: 8}\n"
        "trainer: {max_epochs: 1, accelerator: cpu}\n"
        'logging: {wandb: "off", quiet: true}\n'
        "evaluation: {n_images: 12, bootstrap_samples: 200, n_pictures: 3}\n"
    )
    config = load_config(folder / "base.yaml", [f"output_dir={folder / 'run'}"])
    weights = folder / "weights.pt"
    torch.save(build_pairs(config).leaked_model.network.state_dict(), weights)
    config.leaked.weights = str(weights)
    train(config)
    return folder


@pytest.fixture
def load(trained: Path, tmp_path: Path) -> Load:
    """Copies the run, and loads its config with overrides."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    save_config(
        load_config(run, [f"output_dir={run}", f"leaked.weights={tmp_path / 'weights.pt'}"]), run / "config.yaml"
    )
    return lambda *overrides: load_config(run, overrides)
