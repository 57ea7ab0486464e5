"""The image prior of GIAS is trained like a generator."""

import pytest
import torch

from gitlight.attacks.image_prior import ImagePrior, load_image_prior
from gitlight.config import ImagePriorConfig
from gitlight.config_loading import load_config
from gitlight.errors import ConfigError
from gitlight.training import train


def test_training_an_image_prior_leaves_a_run(run):
    folder = run / "vae"
    assert {"config.yaml", "metrics.csv", "checkpoints", "reconstructions"} <= {path.name for path in folder.iterdir()}
    assert list((folder / "reconstructions").glob("*.png"))
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "val/psnr" in header
    assert load_image_prior(folder, (3, 32, 32), torch.device("cpu")).latent_size == 16


def test_an_image_prior_is_the_same_from_the_same_seed(run, tmp_path):
    again = train(load_config(run / "small.yaml", ["task=image_prior", f"output_dir={tmp_path / 'again'}"]))
    other = train(load_config(run / "small.yaml", ["task=image_prior", "seed=1", f"output_dir={tmp_path / 'other'}"]))
    first, same, different = (
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for f in (run / "vae", again, other)
    )
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, different[name]) for name, value in first.items())


@pytest.mark.parametrize(("size", "channels", "message"), [(24, 16, "power of two"), (32, 12, "multiple of 8")])
def test_sizes_that_cannot_be_made_are_refused(size, channels, message):
    with pytest.raises(ConfigError, match=message):
        ImagePrior(ImagePriorConfig(channels=channels), (3, size, size), 0)
