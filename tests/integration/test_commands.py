import csv
import json

import pytest
import torch
from PIL import Image
from small_run import SMALL

from gitlight.config_loading import load_config
from gitlight.runs import load_checkpoint


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def check_run(run, generator):
    assert load_config(run).generator.name == generator
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 12
    load_checkpoint(run / "checkpoints" / "best.ckpt")
    logged = rows(run / "metrics.csv")
    assert [row["step"] for row in logged if row["train/loss"]] == [str(step) for step in range(12)]
    psnr = [float(row["val/psnr"]) for row in logged if row["val/psnr"]]
    assert len(psnr) == 2
    assert all(5 < value < 120 for value in psnr)
    shares = [float(row["throughput/share_making_pairs"]) for row in logged if row["throughput/share_making_pairs"]]
    assert len(shares) >= 12
    assert all(0 < share < 1 for share in shares)
    with Image.open(run / "reconstructions" / "epoch_0001.png") as picture:
        assert picture.width > 200


def check_evaluation(run, generator):
    result = json.loads((run / "evaluation" / "metrics.json").read_text())["results"][0]
    assert (result["attack"], result["leaked"], result["data"]) == (generator, "lenet", "photos")
    assert result["n_images"] == 24
    low, high = result["metrics"]["psnr"]["ci95"]
    assert low <= result["metrics"]["psnr"]["mean"] <= high
    for name in ("per_image.csv", "reconstructions.png", "report.html"):
        assert (run / "evaluation" / name).stat().st_size > 0


def test_the_two_commands_leave_what_they_promise(command, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text("trainer: {max_epochs: 2}\n")
    output = command("train.py", str(config), *SMALL, "logging.wandb=offline")
    assert "evaluate.py runs/small" in output
    run = tmp_path / "runs" / "small"
    check_run(run, "hybrid")
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    output = command("evaluate.py", "runs/small", "evaluation.n_images=24")
    assert "psnr" in output.lower()
    assert "reconstructions.png" in output
    check_evaluation(run, "hybrid")


@pytest.mark.parametrize("generator", ["mlp", "coarse"])
def test_every_generator_is_trained_and_evaluated(train, evaluate, tmp_path, generator):
    (tmp_path / "small.yaml").write_text(
        f"generator: {{name: {generator}, hidden_size: 16}}\ntrainer: {{max_epochs: 2}}\n"
    )
    assert train("small.yaml", *SMALL) == 0
    check_run(tmp_path / "runs" / "small", generator)
    assert evaluate("small.yaml", *SMALL, "evaluation.n_images=24") == 0, "a config stands for its run"
    check_evaluation(tmp_path / "runs" / "small", generator)


def test_a_second_run_moves_the_first_aside(train, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text("generator: {name: mlp, hidden_size: 8}\ntrainer: {max_epochs: 1}\n")
    assert train(str(config), *SMALL) == 0
    first = load_checkpoint(tmp_path / "runs/small/checkpoints/last.ckpt")["state_dict"]
    first = {name: value.clone() for name, value in first.items()}
    assert train("runs/small", "seed=1") == 0
    kept = load_checkpoint(tmp_path / "runs/small.1/checkpoints/last.ckpt")["state_dict"]
    assert all(torch.equal(first[name], kept[name]) for name in first)
    assert load_config(tmp_path / "runs/small").seed == 1


def test_a_folder_that_is_not_a_run_is_never_touched(train, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    config = tmp_path / "small.yaml"
    config.write_text("generator: {name: mlp, hidden_size: 8}\ntrainer: {max_epochs: 1}\n")
    assert train(str(config), *SMALL, "output_dir=mine") == 2
    assert "output_dir: mine" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_saved_config_repeats_its_run(train, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text("generator: {name: hybrid, channels: 8, blocks: 1}\ntrainer: {max_epochs: 1}\n")
    assert train(str(config), *SMALL) == 0
    assert train("runs/small/config.yaml", "output_dir=again") == 0
    first, second = (
        load_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt")["state_dict"] for run in ("runs/small", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_leaked_model_is_trained_and_then_attacked(train, evaluate, tmp_path):
    config = tmp_path / "leaked.yaml"
    config.write_text("task: leaked\nleaked: {init: default, activation: relu}\ntrainer: {max_epochs: 3}\n")
    assert train(str(config), *SMALL) == 0
    logged = rows(tmp_path / "runs" / "leaked" / "metrics.csv")
    losses = [float(row["train/loss"]) for row in logged if row["train/loss"]]
    assert losses[-1] < losses[0]
    assert any(row["val/accuracy"] for row in logged)
    (tmp_path / "attack.yaml").write_text(
        "leaked: {activation: relu, weights: runs/leaked}\n"
        "generator: {name: hybrid, channels: 8, blocks: 1}\ntrainer: {max_epochs: 1}\n"
    )
    assert train("attack.yaml", *SMALL) == 0
    assert evaluate("runs/attack", "evaluation.n_images=16") == 0


def test_a_generator_in_closed_form_needs_no_training(train, evaluate, tmp_path):
    (tmp_path / "exact.yaml").write_text(
        "leaked: {name: mlp, hidden_sizes: [16]}\ngenerator: {name: hybrid}\ntrainer: {max_epochs: 1}\n"
    )
    small = [setting for setting in SMALL if not setting.startswith("leaked")]
    assert train("exact.yaml", *small) == 0
    assert evaluate("runs/exact", "evaluation.n_images=16") == 0
    result = json.loads((tmp_path / "runs/exact/evaluation/metrics.json").read_text())["results"][0]
    assert result["metrics"]["psnr"]["mean"] > 80
    assert result["label_accuracy"] == 1.0


@pytest.mark.parametrize("ending", ["trainer.max_steps=2", "trainer.limit_val_batches=0"])
def test_the_evaluation_that_a_run_without_validation_is_told_of_works(train, evaluate, tmp_path, capfd, ending):
    (tmp_path / "short.yaml").write_text("generator: {name: mlp, hidden_size: 8}\ntrainer: {max_epochs: 1}\n")
    assert train("short.yaml", *SMALL, ending) == 0
    told = capfd.readouterr().out.partition("next: python evaluate.py ")[2].split()
    assert told == ["runs/short", "evaluation.checkpoint=last"]
    assert evaluate(*told, "evaluation.n_images=4") == 0


def test_leaks_without_an_image_count_in_the_loss_of_a_validation(train, tmp_path):
    (tmp_path / "exact.yaml").write_text("generator: {name: exact}\ntrainer: {max_epochs: 1}\n")
    assert train("exact.yaml", *SMALL, "leaked.init=default", "channel=[{name: pruning, fraction: 0.9}]") == 0
    (row,) = (row for row in rows(tmp_path / "runs" / "exact" / "metrics.csv") if row["val/loss"])
    assert float(row["val/mse"]) > 0.5
    assert float(row["val/loss"]) == pytest.approx(float(row["val/mse"]), rel=1e-4)


def test_steps_that_make_the_first_pairs_are_saved(train, tmp_path):
    # Virtual ranks make pairs within the step whose operations are counted, and without a fit no others came before.
    (tmp_path / "parts.yaml").write_text("generator: {name: mlp, hidden_size: 8, scale_inputs: false}\n")
    parts = ["trainer.virtual_ranks=2", "trainer.max_steps=2", "trainer.checkpoint_every_n_steps=1"]
    assert train("parts.yaml", *SMALL, *parts) == 0
    state = load_checkpoint(tmp_path / "runs" / "parts" / "checkpoints" / "last.ckpt")["callbacks"]["Throughput"]
    assert type(state["flops_per_pair"]) is float
    assert state["flops_per_pair"] > 0
