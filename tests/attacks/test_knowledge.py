"""What attacks are given: image priors, generators and attacks to start from, and what is said of bad ones."""

import shutil

import pytest
import torch
import yaml

from gitlight.attacks.knowledge import knowledge_of
from gitlight.config_loading import load_config
from gitlight.errors import CheckpointError, ConfigError
from gitlight.evaluation import evaluate
from gitlight.trained import generator_of_run
from gitlight.training import build_pairs, train


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


@pytest.mark.parametrize(
    ("of_prior", "message"),
    [
        ({"sketch": {"name": "count"}}, r"attack\.prior: .* trained on sketches \(gradients\.sketch\.name=count\)"),
        ({"updates": {"epochs": 2}}, r"attack\.prior: .* trained on updates of several local steps"),
    ],
)
def test_a_prior_that_takes_no_whole_gradients_is_named(run, tmp_path, of_prior, message):
    other = tmp_path / "other"
    other.mkdir()
    settings = yaml.safe_load((run / "mlp" / "config.yaml").read_text())
    for group, changed in of_prior.items():
        settings["gradients"][group].update(changed)
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(run / "small.yaml", ["attack=ig", f"attack.prior={other}", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=message):
        evaluate(config)


def test_labels_are_given_to_both_attacks_or_to_none(run, tmp_path):
    def attack(*overrides):
        settings = ["attack=ig", "attack.prior=dlg", "attack.iterations=2", "attack.prior_settings.iterations=2"]
        return evaluate(load_config(run / "small.yaml", [*settings, f"output_dir={tmp_path}/run", *overrides]))

    with pytest.raises(ConfigError, match=r"attack\.prior_settings\.labels: given, and attack\.labels is recovered"):
        attack("attack.prior_settings.labels=given")
    assert attack("attack.labels=given").result.knowledge == ("architecture", "parameters", "labels", "prior")


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


def test_labels_that_a_prior_has_read_off_are_those_of_the_attack(run, tmp_path):
    def load(name, *overrides):
        batches = ["data.client_batch_size=4", "evaluation.n_images=32", f"output_dir={tmp_path / name}"]
        pruned = "channel=[{name: pruning, fraction: 0.8}]"  # of which labels cannot simply be read
        return load_config(run / "small.yaml", [*batches, pruned, *overrides])

    hybrid = ["generator.name=hybrid", "generator.exact_depth=1", "generator.channels=4"]
    train(load("hybrid", *hybrid))
    by_prior = evaluate(load("hybrid", *hybrid, "attack=generator")).result.label_accuracy
    read_off = evaluate(load("noise", "attack=ig", "attack.iterations=1")).result.label_accuracy
    attack = load("attack", "attack=ig", "attack.iterations=1", f"attack.prior={tmp_path / 'hybrid'}")
    assert read_off < by_prior == evaluate(attack).result.label_accuracy


def test_labels_of_client_batches_are_read_as_pairs_tell(run, tmp_path):
    def attack(*overrides):
        batches = ["data.client_batch_size=4", "evaluation.n_images=32", f"output_dir={tmp_path}"]
        config = load_config(run / "small.yaml", [*batches, "attack.name=ig", "attack.iterations=1", *overrides])
        return evaluate(config).result

    result = attack()
    assert result.knowledge == ("architecture", "pairs", "parameters")
    assert result.label_accuracy == 1
    assert attack("attack.labels=given").knowledge == ("architecture", "parameters", "labels")
    assert attack("attack.labels=optimised").knowledge == ("architecture", "parameters")
    assert attack("data.client_batch_size=1").knowledge == ("architecture", "parameters")


@pytest.mark.parametrize(
    "attack", [["attack=gias", "attack.image_prior=RUN/vae"], ["attack=ig", "attack.prior=RUN/mlp"]]
)
def test_a_run_without_a_validation_is_taken_at_its_last_checkpoint(run, tmp_path, caplog, attack):
    copy = tmp_path / "short"
    shutil.copytree(run, copy)
    for best in copy.rglob("best.ckpt"):
        best.unlink()
    settings = [entry.replace("RUN", str(copy)) for entry in attack]
    config = load_config(run / "small.yaml", [*settings, "attack.iterations=2", f"output_dir={tmp_path / 'run'}"])
    assert evaluate(config).result.n_images == 4
    assert "ended before a validation: its last.ckpt is taken" in caplog.text


def test_weights_of_a_run_of_client_batches_are_asked_for_whatever_their_size(run, tmp_path):
    batches = ["data.client_batch_size=2", f"output_dir={tmp_path}"]
    train(load_config(run / "small.yaml", ["generator.name=mlp", "generator.hidden_size=8", *batches]))
    config = load_config(tmp_path, ["attack=ig", "attack.knowledge=recovered"])
    with pytest.raises(ConfigError, match=r"a run of mlp, which has identified no weight.*generator\.name=exact"):
        knowledge_of(config, build_pairs(config), torch.device("cpu"))
