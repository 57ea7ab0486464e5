"""GIAS: the image prior is searched through, first by latents and then by its weights."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from gitlight.architecture import Architecture
from gitlight.attacks.gias import GIAS
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.image_prior import ImagePrior
from gitlight.attacks.variables import DecoderWeights, Latents
from gitlight.config import GIASConfig, ImagePriorConfig
from gitlight.config_loading import load_config
from gitlight.errors import ConfigError
from gitlight.evaluation import evaluate
from gitlight.generators.base import Reconstruction

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def prior():
    """With weights large enough for images that differ."""
    made = ImagePrior(ImagePriorConfig(latent_size=6, channels=8), SHAPE, seed=0)
    with torch.no_grad():
        for name, value in made.decoder.named_parameters():
            if name.endswith("weight"):
                value.mul_(3)
    return made.double().eval()


@pytest.fixture(scope="module")
def function():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 4)).double()
    values = {key: value.detach() for key, value in network.named_parameters()}
    return LeakedFunction(Architecture.of(network, SHAPE, 4), values)


def leaks_of(function, images):
    labels = torch.arange(len(images))[:, None] % 4
    return labels, torch.func.vmap(function.gradient)(images, one_hot(labels, 4).to(images))


def test_variables_make_the_images_that_the_decoder_makes(prior):
    latents = torch.randn(3, 2, 6, dtype=torch.float64)
    expected = prior.decoder(latents.flatten(0, 1)).view(3, 2, *SHAPE)
    for variables in (Latents(prior, latents, 0.0), DecoderWeights(prior, latents)):
        made = torch.func.vmap(variables.images)(variables.start, variables.constants)
        torch.testing.assert_close(made, expected)


def test_latents_of_an_image_within_the_prior_are_found(prior, function):
    torch.manual_seed(0)
    images = prior.decoder(torch.randn(3, 6, dtype=torch.float64)).unsqueeze(1)
    labels, leaks = leaks_of(function, images)
    settings = GIASConfig(iterations=600, latent_share=1.0, labels="given", latent_weight=0.0, dtype="float64")
    settings.total_variation = 0.0
    attack = GIAS(function.architecture, function, settings, 1, 0, image_prior=prior)
    found = attack.search(leaks, torch.arange(3), labels)
    error = (found.images - images).square().flatten(1).mean(dim=1)
    assert (error < 1e-2 * images.var(dim=0).mean()).all()


def test_weights_reach_images_outside_the_prior(prior, function):
    torch.manual_seed(0)
    images = torch.rand(2, 1, *SHAPE, dtype=torch.float64)
    labels, leaks = leaks_of(function, images)
    distances, seen = [], []
    for share in (1.0, 0.5):
        settings = GIASConfig(
            iterations=400, latent_share=share, labels="given", total_variation=0.0, weights_step_size=0.01,
            record_every=50, dtype="float64",
        )  # fmt: skip
        attack = GIAS(function.architecture, function, settings, 1, 0, image_prior=prior)
        shown = []
        found = attack.search(leaks, torch.arange(2), labels, lambda *args, shown=shown: shown.append(args[2]))
        distances.append(found.distances)
        seen.append(shown)
        assert found.iterations.tolist() == [400, 400]
    assert (distances[1] < 0.5 * distances[0]).all()
    assert seen[1] == sorted(set(seen[1])), "one trajectory over both searches"
    assert seen[1][-1] == 400


def test_from_anothers_images_gias_starts_where_the_encoder_puts_them(prior, function):
    images = torch.rand(2, 1, *SHAPE)
    _, leaks = leaks_of(function, images.double())
    settings = GIASConfig(iterations=1, latent_share=1.0, step_size=1e-12, dtype="float64")
    prior.float()
    start = Reconstruction(images, ("", ""))
    attack = GIAS(function.architecture, function, settings, 1, 0, lambda *_: start, image_prior=prior)
    found = attack.search(leaks, torch.arange(2)).images
    torch.testing.assert_close(found[:, 0], prior(images[:, 0]), rtol=0, atol=1e-4)
    prior.double()


@pytest.mark.parametrize(
    "attack",
    [
        ["attack=gias"],
        ["attack=gias", "attack.labels=optimised"],
        ["attack=gias", "attack.prior=MLP"],
        ["attack=ig", "attack.prior=gias", "attack.prior_settings.iterations=4"],
    ],
)
def test_evaluations_search_through_an_image_prior(run, tmp_path, attack):
    given = "attack.prior_settings.image_prior" if "attack=ig" in attack else "attack.image_prior"
    overrides = [entry.replace("MLP", str(run / "mlp")) for entry in attack]
    config = load_config(
        run / "small.yaml",
        [*overrides, f"{given}={run / 'vae'}", "attack.iterations=6", f"output_dir={tmp_path / 'run'}"],
    )
    evaluation = evaluate(config)
    assert evaluation.result.n_images == 4
    assert evaluation.result.n_failed == 0
    (entry,) = json.loads((evaluation.folder / "metrics.json").read_text())["results"]
    assert ("prior" in entry["knowledge"]) == ("attack.prior=" in " ".join(attack))
    assert "image_prior" in entry["knowledge"]


def test_lbfgs_over_decoder_weights_is_refused(run):
    overrides = ["attack=gias", f"attack.image_prior={run / 'vae'}", "attack.optimizer=lbfgs"]
    with pytest.raises(ConfigError, match=r"attack\.optimizer: lbfgs keeps"):
        evaluate(load_config(run / "small.yaml", overrides))


def test_client_batches_restarts_and_few_at_once(run, tmp_path):
    config = load_config(
        run / "small.yaml",
        ["attack=gias", f"attack.image_prior={run / 'vae'}", "attack.iterations=4", "attack.restarts=2",
         "data.client_batch_size=2", "attack.memory_limit_gb=1e-6", f"output_dir={tmp_path / 'run'}"],
    )  # fmt: skip
    assert evaluate(config).result.n_failed == 0
