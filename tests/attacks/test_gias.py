"""GIAS: the image prior is trained, and searched through, first by latents and then by its weights."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from gitlight.architecture import Architecture
from gitlight.attacks.gias import GIAS
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.image_prior import ImagePrior, load_image_prior
from gitlight.attacks.knowledge import knowledge_of
from gitlight.attacks.variables import DecoderWeights, Latents
from gitlight.config import GIASConfig, ImagePriorConfig
from gitlight.config_loading import load_config
from gitlight.errors import CheckpointError, ConfigError
from gitlight.evaluation import evaluate
from gitlight.trained import generator_of_run
from gitlight.training import build_pairs, train

SHAPE = (3, 8, 8)
SMALL = (
    "data: {name: photos, n_public_images: 96, n_validation: 16, batch_size: 8}\n"
    "leaked: {width: 4}\n"
    "image_prior: {latent_size: 16, channels: 16}\n"
    "trainer: {max_epochs: 2, accelerator: cpu, log_every_n_steps: 1}\n"
    'logging: {wandb: "off", quiet: true}\n'
    "evaluation: {n_images: 4, bootstrap_samples: 200, n_pictures: 3}\n"
)


@pytest.fixture(autouse=True)
def _no_download(monkeypatch):
    for module in ("gitlight.callbacks.metrics", "gitlight.evaluation.measuring"):
        monkeypatch.setattr(f"{module}.load_lpips", lambda: None)


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
    attack = GIAS(function.architecture, function, settings, 1, 0, lambda *_: images, image_prior=prior)
    found = attack.search(leaks, torch.arange(2)).images
    torch.testing.assert_close(found[:, 0], prior(images[:, 0]), rtol=0, atol=1e-4)
    prior.double()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained image prior, and a generator to compare with."""
    folder = tmp_path_factory.mktemp("image_prior")
    (folder / "small.yaml").write_text(SMALL)
    train(load_config(folder / "small.yaml", ["task=image_prior", f"output_dir={folder / 'vae'}"]))
    generator = ["generator.name=mlp", "generator.hidden_size=16", f"output_dir={folder / 'mlp'}"]
    train(load_config(folder / "small.yaml", generator))
    return folder


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


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (["attack=gias", "attack.image_prior=VAE"], "attack.image_prior"),
        (
            [
                "attack=ig",
                "attack.prior=gias",
                "attack.prior_settings.image_prior=VAE",
                "attack.prior_settings.iterations=2",
            ],
            "attack.image_prior",
        ),
        (["attack=ig", "attack.prior=MLP"], "attack.prior"),
    ],
)
def test_runs_of_other_public_images_are_warned_of(run, tmp_path, caplog, attack, named):
    overrides = [entry.replace("MLP", str(run / "mlp")).replace("VAE", str(run / "vae")) for entry in attack]
    for seed in (0, 1):
        caplog.clear()
        config = load_config(run / "small.yaml", [*overrides, f"seed={seed}", f"output_dir={tmp_path}"])
        knowledge_of(config, build_pairs(config), torch.device("cpu"))
        warned = [record.getMessage() for record in caplog.records if "public images (" in record.getMessage()]
        assert len(warned) == seed
    assert warned[0].startswith(named)
    assert "seed: 0 there, 1 now" in warned[0]


@pytest.mark.slow
def test_bad_image_priors_are_named(run, tmp_path):
    def attack(*overrides, name="gias"):
        config = load_config(
            run / "small.yaml", [f"attack={name}", "attack.iterations=2", f"output_dir={tmp_path}/run", *overrides]
        )
        return evaluate(config)

    with pytest.raises(ConfigError, match=r"attack\.image_prior: gias searches.*configs/image_prior\.yaml"):
        attack()
    with pytest.raises(ConfigError, match=r"attack\.image_prior: nowhere is not a run's folder"):
        attack("attack.image_prior=nowhere")
    with pytest.raises(ConfigError, match="is a run of task=generator"):
        attack(f"attack.image_prior={run / 'mlp'}")
    with pytest.raises(ConfigError, match=r"images of \(3, 32, 32\).*\(3, 16, 16\)"):
        attack(f"attack.image_prior={run / 'vae'}", "data.image_size=16")
    with pytest.raises(ConfigError, match=r"attack\.prior_settings\.iterations: 0 \(in the config\) is too small"):
        attack("attack.prior=dlg", "attack.prior_settings.iterations=0", name="ig")
    with pytest.raises(ConfigError, match=r"attack\.prior_settings\.iteration: no such setting.*iterations"):
        attack("attack.prior=dlg", "attack.prior_settings.iteration=3", name="ig")
    with pytest.raises(ConfigError, match=r"attack\.prior_settings: attack\.prior is gray"):
        attack("attack.prior=gray", "attack.prior_settings.iterations=3", name="ig")
    with pytest.raises(ConfigError, match=r"attack\.prior_settings\.prior: the attack before starts from noise"):
        attack("attack.prior=dlg", "attack.prior_settings.prior=gray", name="ig")
    with pytest.raises(ConfigError, match="task: image_prior: an image prior attacks nothing by itself"):
        evaluate(load_config(run / "vae"))
    damaged = tmp_path / "damaged"
    (damaged / "checkpoints").mkdir(parents=True)
    (damaged / "config.yaml").write_text((run / "vae" / "config.yaml").read_text())
    (damaged / "checkpoints" / "best.ckpt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"best\.ckpt"):
        attack(f"attack.image_prior={damaged}")
    assert not (tmp_path / "run" / "evaluation" / "metrics.json").exists()


def test_labels_are_given_to_both_attacks_or_to_none(run, tmp_path):
    def attack(*overrides):
        settings = ["attack=ig", "attack.prior=dlg", "attack.iterations=2", "attack.prior_settings.iterations=2"]
        return evaluate(load_config(run / "small.yaml", [*settings, f"output_dir={tmp_path}/run", *overrides]))

    with pytest.raises(ConfigError, match=r"attack\.prior_settings\.labels: given, and attack\.labels is recovered"):
        attack("attack.prior_settings.labels=given")
    assert attack("attack.labels=given").result.knowledge == ("architecture", "parameters", "labels", "prior")


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


@pytest.mark.parametrize(("size", "channels", "message"), [(24, 16, "power of two"), (32, 12, "multiple of 8")])
def test_sizes_that_cannot_be_made_are_refused(size, channels, message):
    with pytest.raises(ConfigError, match=message):
        ImagePrior(ImagePriorConfig(channels=channels), (3, size, size), 0)


def test_steps_are_in_proportion_to_the_priors_error(run, tmp_path):
    found = {}
    for scaling in ("true", "false"):
        config = load_config(
            run / "small.yaml",
            ["attack=ig", f"attack.prior={run / 'mlp'}", f"attack.prior_scaling={scaling}", f"output_dir={tmp_path}"],
        )
        pairs = build_pairs(config)
        found[scaling] = knowledge_of(config, pairs, torch.device("cpu")).search.settings_from_prior
        prior_error = []
        for pair in pairs.held_out_pairs(torch.device("cpu"), 64):
            generator, _ = generator_of_run(
                run / "mlp", "attack.prior", pairs.architecture, pairs.leaked_model.fingerprint(), 1,
                torch.device("cpu"),
            )  # fmt: skip
            prior_error.append((generator.reconstruct(pair.gradients).images - pair.images).square().flatten(1).mean(1))
    error = torch.cat(prior_error).mean().sqrt().item()
    assert found["false"].step_size == 0.1
    assert found["true"].step_size == pytest.approx(0.3 * 0.1 * error, rel=1e-4)
    assert found["true"].total_variation == pytest.approx(0.1 * error**2, rel=1e-4)
    assert (found["true"].kink_width, found["false"].kink_width) == (0.03, None)


def test_an_attack_before_is_tried_on_public_images_too(run, tmp_path):
    overrides = ["attack.prior=ig", "attack.prior_settings.iterations=20", "attack.labels=given", "attack.iterations=2"]
    config = load_config(run / "small.yaml", ["attack=ig", *overrides, f"output_dir={tmp_path}"])
    pairs = build_pairs(config)
    near = knowledge_of(config, pairs, torch.device("cpu")).search.settings_from_prior
    alone = load_config(
        run / "small.yaml", ["attack=ig", "attack.labels=given", "attack.iterations=20", f"output_dir={tmp_path}"]
    )
    search = knowledge_of(alone, pairs, torch.device("cpu")).search
    (pair,) = pairs.held_out_pairs(torch.device("cpu"), 8)
    found = search.search(pair.gradients, pair.indices[:, 0], pair.labels).images
    error = (found - pair.images).square().mean().sqrt().item()
    assert near.step_size == pytest.approx(0.3 * 0.1 * error, rel=1e-3)


def test_steps_of_lbfgs_have_their_own_length(run, tmp_path):
    overrides = ["attack=dlg", f"attack.prior={run / 'mlp'}", "attack.kink_width=0", f"output_dir={tmp_path}"]
    config = load_config(run / "small.yaml", overrides)
    near = knowledge_of(config, build_pairs(config), torch.device("cpu")).search.settings_from_prior
    assert (near.step_size, near.kink_width) == (1.0, 0.0)
