"""A trained image prior and a trained generator, for attacks to start from."""

import pytest

from gitlight.config_loading import load_config
from gitlight.training import train

SMALL = (
    "data: {name: photos, n_public_images: 96, n_validation: 16, batch_size: 8}\n"
    "leaked: {width: 4}\n"
    "image_prior: {latent_size: 16, channels: 16}\n"
    "trainer: {max_epochs: 2, accelerator: cpu, log_every_n_steps: 1}\n"
    'logging: {wandb: "off", quiet: true}\n'
    "evaluation: {n_images: 4, bootstrap_samples: 200, n_pictures: 3}\n"
)


@pytest.fixture(autouse=True, scope="module")
def _quick(without_lpips):
    """Every attack is evaluated without LPIPS."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_lpips):
    """A trained image prior, and a generator to compare with."""
    folder = tmp_path_factory.mktemp("image_prior")
    (folder / "small.yaml").write_text(SMALL)
    train(load_config(folder / "small.yaml", ["task=image_prior", f"output_dir={folder / 'vae'}"]))
    generator = ["generator.name=mlp", "generator.hidden_size=16", f"output_dir={folder / 'mlp'}"]
    train(load_config(folder / "small.yaml", generator))
    return folder
