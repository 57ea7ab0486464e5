"""Iterative attacks as users run them: results, priors, what the attacker knows, interruptions, errors."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image

from gitlight.attacks import private
from gitlight.attacks.iterative import IterativeAttack
from gitlight.config import DLGConfig
from gitlight.config_loading import load_config
from gitlight.errors import CheckpointError, ConfigError
from gitlight.evaluation import evaluate
from gitlight.training import build_pairs, train

SMALL = (
    "data: {name: photos, n_public_images: 96, n_validation: 16, batch_size: 4}\n"
    "leaked: {width: 4}\n"
    "trainer: {max_epochs: 1, accelerator: cpu}\n"
    'logging: {wandb: "off", quiet: true}\n'
    "attack: {name: ig, iterations: 30, record_every: 10, total_variation: 0.01}\n"
    "evaluation: {n_images: 6, bootstrap_samples: 200, n_pictures: 3}\n"
)


@pytest.fixture
def load(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return lambda *overrides: load_config(tmp_path / "small.yaml", [f"output_dir={tmp_path / 'run'}", *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a learned generator."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL)
    train(
        load_config(
            folder / "small.yaml", ["generator.name=mlp", "generator.hidden_size=16", f"output_dir={folder / 'mlp'}"]
        )
    )
    return folder


IDENTIFIABLE = ["leaked.width=12", "data.image_size=16"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A run that has identified a leaked model's weights."""
    folder = tmp_path_factory.mktemp("identified")
    (folder / "small.yaml").write_text(SMALL)
    enough = [
        "data.n_public_images=400",
        "data.batch_size=200",
        "gradients.dtype=float64",
        "trainer.limit_train_batches=1",
    ]
    train(
        load_config(
            folder / "small.yaml", ["generator.name=exact", *enough, *IDENTIFIABLE, f"output_dir={folder / 'exact'}"]
        )
    )
    return folder / "exact"


def entry(folder):
    (result,) = json.loads((folder / "evaluation" / "metrics.json").read_text())["results"]
    return result


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["ig", "dlg", "idlg", "gradinversion"])
def test_every_attack_leaves_results_and_its_way(load, tmp_path, name):
    evaluation = evaluate(load(f"attack={name}", "attack.iterations=12", "attack.record_every=4"))
    run = tmp_path / "run"
    found = entry(run)
    assert found["attack"].startswith(f"{name}(")
    assert found["knowledge"] == ["architecture", "parameters"]
    assert found["n_images"] == 6
    assert found["seconds_per_image"] > 0
    assert found["label_accuracy"] == 1
    (path,) = (run / "evaluation" / "trajectories").glob("*.csv")
    points = rows(path)
    assert {row["iteration"] for row in points} >= {"0", "4", "8"}
    assert len({row["leak"] for row in points}) == 6
    with Image.open(path.with_name("all.png")) as picture:
        assert picture.width > 600
    with Image.open(path.with_suffix(".png")) as picture:
        # truth, iterations 0 and 10, result
        assert (picture.width, picture.height) == (2 * 12 + 150 + 3 * 68 - 4, 2 * 12 + 4 * 68)
        shown = torch.tensor(picture.getdata()).view(picture.height, picture.width, 3)
        assert shown[12 + 34, 12 + 150 : -12].float().std() > 10, "images, not blanks"
    report = (run / "evaluation" / "report.html").read_text()
    assert "How the search went" in report
    assert report.count('<img class="wide" src="data:image/png;base64,') == 2
    assert (run / "config.yaml").is_file(), "so that the folder alone can be evaluated again"
    assert not (run / "evaluation" / private.UNFINISHED).exists() or not any(
        (run / "evaluation" / private.UNFINISHED).rglob("*.pt")
    )
    assert evaluation.result.metrics["psnr"].mean > 5


def test_the_mean_curve_goes_to_weights_and_biases(load, tmp_path):
    evaluate(load("logging.wandb=offline", "attack.iterations=4", "attack.record_every=2"))
    (file,) = (tmp_path / "run" / "evaluation" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"attack/distance" in content
    assert b"attack/psnr" in content


def test_another_attack_on_a_saved_run_has_its_own_defaults(load, tmp_path):
    evaluate(load("attack.iterations=2"))
    switched = load_config(tmp_path / "run", ["attack=dlg"]).attack
    assert switched == DLGConfig(iterations=2, record_every=10, total_variation=0.01), "what was set stays"


def test_other_images_and_models_are_other_results(load, tmp_path):
    for overrides in ([], ["seed=3"], ["leaked.seed=2"], ["data.client_batch_size=2"]):
        evaluate(load("attack.iterations=2", *overrides))
    run = tmp_path / "run" / "evaluation"
    assert len(json.loads((run / "metrics.json").read_text())["results"]) == 4
    assert len(list((run / "trajectories").glob("*.csv"))) == 4


def test_parts_of_a_prior_that_has_changed_are_not_used(load, trained, tmp_path, monkeypatch):
    copy = tmp_path / "prior"
    shutil.copytree(trained / "mlp", copy)
    config = load(f"attack.prior={copy}")
    keys = [private._store(config, build_pairs(config))._folder.name]
    checkpoint = copy / "checkpoints" / "best.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes() + b" ")
    keys.append(private._store(config, build_pairs(config))._folder.name)
    same = load(f"attack.prior={copy}", "gradients.memory_limit_gb=1", "data.num_workers=0")
    keys.append(private._store(same, build_pairs(same))._folder.name)
    assert keys[0] != keys[1] == keys[2]


def test_the_report_says_nothing_of_training(load, tmp_path):
    evaluate(load("channel=[{name: gaussian_noise, relative_std: 0.001}]", "attack.iterations=2"))
    report = (tmp_path / "run" / "evaluation" / "report.html").read_text()
    assert "was trained under other conditions" not in report
    assert "once trained" not in report


@pytest.mark.parametrize("restarts", [1, 3])
def test_psnr_in_the_trajectories_is_that_of_the_images(load, tmp_path, restarts):
    steps = ["attack.decay=constant", "attack.step_size=0.005", "attack.record_every=30"]
    evaluate(load(*steps, f"attack.restarts={restarts}"))
    (path,) = (tmp_path / "run" / "evaluation" / "trajectories").glob("*.csv")
    last = [float(row["psnr"]) for row in rows(path) if row["iteration"] == "30"]
    images = [float(row["psnr"]) for row in rows(tmp_path / "run" / "evaluation" / "per_image.csv")]
    assert last == pytest.approx(images, abs=0.3), "the best, by the objective, is nearly the last of its restart"


def test_results_do_not_depend_on_how_many_search_at_once(load, tmp_path):
    evaluate(load(f"output_dir={tmp_path / 'one'}", "attack.memory_limit_gb=1e-6"))
    evaluate(load(f"output_dir={tmp_path / 'all'}"))
    ones, alls = (rows(tmp_path / name / "evaluation" / "per_image.csv") for name in ("one", "all"))
    assert [row["identifier"] for row in ones] == [row["identifier"] for row in alls]
    psnr = [[float(row["psnr"]) for row in part] for part in (ones, alls)]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.5), "signs of tiny gradients may differ"


def test_an_interrupted_evaluation_goes_on_where_it_was(load, tmp_path, monkeypatch):
    config = load("attack.memory_limit_gb=1e-6")
    searched = []
    search = IterativeAttack.search

    def interrupted(self, gradients, numbers, *others):
        if len(searched) == 4:
            raise KeyboardInterrupt
        searched.extend(numbers.tolist())
        return search(self, gradients, numbers, *others)

    with monkeypatch.context() as patch:
        patch.setattr(IterativeAttack, "search", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    assert not (tmp_path / "run" / "evaluation" / "metrics.json").exists()
    before = list(searched)

    def counted(self, gradients, numbers, *others):
        searched.extend(numbers.tolist())
        return search(self, gradients, numbers, *others)

    with monkeypatch.context() as patch:
        patch.setattr(IterativeAttack, "search", counted)
        evaluate(load())
    assert len(set(searched)) == 6
    assert len(searched) == 6, "no image is attacked twice"
    whole = load(f"output_dir={tmp_path / 'whole'}", "attack.memory_limit_gb=1e-6")
    evaluate(whole)
    psnr = [
        [float(row["psnr"]) for row in rows(tmp_path / name / "evaluation" / "per_image.csv")]
        for name in ("run", "whole")
    ]
    assert psnr[0][: len(before)] == pytest.approx(psnr[1][: len(before)], abs=1e-6)


def test_a_damaged_part_is_named(load, tmp_path):
    config = load()
    store = private._store(config, build_pairs(config))
    store.add(0, {"numbers": torch.zeros(1)})
    (path,) = (tmp_path / "run" / "evaluation" / private.UNFINISHED).rglob("*.pt")
    path.write_bytes(b"not a part")
    with pytest.raises(CheckpointError, match=r"(?s)a part of an interrupted evaluation, cannot be read.*Delete it"):
        evaluate(config)


def test_a_trained_generator_is_a_prior(load, trained, tmp_path):
    evaluate(load(f"attack.prior={trained / 'mlp'}", "attack.iterations=1", "attack.step_size=1e-9"))
    found = entry(tmp_path / "run")
    assert found["knowledge"] == ["architecture", "pairs", "parameters", "prior"]
    assert f"prior={trained / 'mlp'}" in found["attack"]
    generator = load_config(trained / "mlp", ["attack=generator", "evaluation.n_images=6"])
    by_itself = evaluate(generator).result.metrics["psnr"].mean
    assert found["metrics"]["psnr"]["mean"] == pytest.approx(by_itself, abs=1e-3)


def test_weights_recovered_from_pairs_do_as_well_as_the_leaked_ones(load, exact, tmp_path):
    same = [*IDENTIFIABLE, "attack.iterations=15", "attack.total_variation=0"]
    known = evaluate(load(*same, f"output_dir={tmp_path / 'known'}")).result
    overrides = ["attack.knowledge=recovered", f"attack.recovered_from={exact}"]
    recovered = evaluate(load(*same, *overrides, f"output_dir={tmp_path / 'recovered'}")).result
    assert recovered.knowledge == ("architecture", "pairs")
    assert recovered.metrics["psnr"].mean == pytest.approx(known.metrics["psnr"].mean, abs=0.3)


@pytest.mark.parametrize("kind", ["gray", "file"])
def test_an_image_is_a_prior(load, tmp_path, kind):
    path = tmp_path / "start.png"
    Image.new("RGB", (50, 40), (255, 0, 0)).save(path)
    prior = "gray" if kind == "gray" else str(path)
    evaluate(load(f"attack.prior={prior}", "attack.iterations=1", "attack.step_size=1e-9"))
    found = entry(tmp_path / "run")
    assert "prior" in found["knowledge"]
    assert found["metrics"]["psnr"]["mean"] < 15


def test_labels_can_be_given(load, tmp_path):
    evaluate(load("attack.labels=given", "attack.iterations=3"))
    assert "labels" in entry(tmp_path / "run")["knowledge"]


def test_client_batches_are_attacked_with_their_labels_counted(load, tmp_path):
    evaluate(load("data.client_batch_size=2", "attack.iterations=10"))
    found = entry(tmp_path / "run")
    assert found["client_batch_size"] == 2
    assert found["label_accuracy"] is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attack=igg"], r"attack\.name: 'igg' is not a known attack. Did you mean ig\?"),
        (["attack.prior=nowhere"], r"attack\.prior: nowhere does not exist. Give a run's folder"),
        (["attack.prior_weight=1"], r"attack\.prior_weight: there is no prior"),
        (["attack.knowledge=recovered"], r"attack\.recovered_from: .*is not a run's folder"),
        (["gradients.updates.epochs=2"], r"attack\.name: ig matches gradients; an update of several local steps"),
        (["gradients.sketch.name=count"], r"attack\.name: ig matches whole gradients, not sketches"),
        (
            ["leaked.name=resnet20", "leaked.batch_norm=batch", "data.client_batch_size=2"],
            r"leaked\.batch_norm=running",
        ),
        (
            ["attack.knowledge=recovered", "attack.batch_norm_statistics=0.1"],
            r"attack\.batch_norm_statistics: .*Give attack\.batch_norm_statistics=0",
        ),
    ],
)
def test_what_cannot_be_attacked_is_said_before_anything_is_written(load, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(load(*overrides))
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_prior_of_another_leaked_model_is_refused(load, trained):
    with pytest.raises(CheckpointError, match=r"attack\.prior: .*trained on another leaked model"):
        evaluate(load(f"attack.prior={trained / 'mlp'}", "leaked.seed=5"))


def test_a_generator_that_knows_no_weights_recovers_none(load, trained):
    with pytest.raises(ConfigError, match=r"attack\.recovered_from: .*run of mlp, which has identified no weight"):
        evaluate(load("attack.knowledge=recovered", f"attack.recovered_from={trained / 'mlp'}"))
