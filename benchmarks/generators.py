"""Trains and evaluates generators and prints a table: ``python benchmarks/generators.py [NAME ...]``.

``--seeds 0 1 2`` trains each case once per seed, ``--workers N`` trains ``N`` at the same time (on a GPU that one run
does not fill; seconds are then those of runs beside each other). On a GPU the cases get more epochs, and the same time
for LTI as for what it is compared with, or more. Needs the CIFAR-10 sample at ``data/cifar10_subset`` (10,000 training
and 2,000 test images as an image folder). Seconds are those of training alone, closed-form fits and validation
included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import ROOT, machine

from gitlight import evaluate, load_config, train
from gitlight.config import Config
from gitlight.decisions import with_decisions
from gitlight.generators.ridge import RidgeRegression
from gitlight.generators.width import n_trainable
from gitlight.training import build_generator, build_pairs

DATA = ["data.name=folder", "data.root=data/cifar10_subset", "data.download=false"]


def noise(level: float) -> str:
    """The setting of a channel with white noise."""
    return f"channel=[{{name: gaussian_noise, relative_std: {level}}}]"


class Case(NamedTuple):
    """A config, what is changed in it, epochs on a GPU, and the settings of further evaluations."""

    config: str
    settings: tuple[str, ...] = ()
    epochs_on_gpu: int | None = None
    further: tuple[tuple[str, ...], ...] = ()


METRICS = {"PSNR, dB": ("psnr", 2), "SSIM": ("ssim", 4), "LPIPS": ("lpips", 4), "MSE": ("mse", 5)}
"""Column → metric and digits; LPIPS is measured where AlexNet's weights are at hand."""
LEVELS = (1e-3, 1e-2, 1e-1)
AT_LEVELS = tuple((noise(level),) for level in (0, 1e-4, *LEVELS))
LTI = (
    *("generator.hidden_size=3000", "generator.scale_inputs=false", "optimizer.learning_rate=1e-4"),
    *("optimizer.schedule=step", "optimizer.warmup_fraction=0", "data.batch_size=256", "data.horizontal_flip=false"),
    *("trainer.max_epochs=200", "trainer.check_val_every_n_epoch=10"),
)
"""As published (Wu et al. 2023)."""
SHORT = ("trainer.max_epochs=3", "generator.mirrored_start=false")
CASES = {
    "lenet_mlp": Case("lenet_mlp", epochs_on_gpu=50),
    "lenet_coarse": Case("lenet_coarse", epochs_on_gpu=24),
    "lenet_hybrid": Case("lenet_hybrid", epochs_on_gpu=6),
    # LTI as published (Wu et al. 2023): 65.7 million parameters, raw gradients. Hours on two cores.
    "lenet_lti": Case("lenet_mlp", LTI),
    # The same with half-precision products, which CPUs with AMX make several times as fast.
    "lenet_lti_bf16": Case("lenet_mlp", (*LTI, "trainer.precision=bf16-mixed")),
    "lenet_mlp_ssim": Case("lenet_mlp", ("loss.perceptual=ssim",)),
    "lenet_mlp_gradient_difference": Case("lenet_mlp", ("loss.perceptual=gradient_difference",)),
    "resnet20_mlp": Case("resnet20_mlp", epochs_on_gpu=24),
    # At least as long as coarse and hybrid take on two cores.
    "resnet20_mlp_longer": Case("resnet20_mlp", ("trainer.max_epochs=12",), 24),
    "resnet20_coarse": Case("resnet20_coarse", epochs_on_gpu=12),
    "resnet20_hybrid": Case("resnet20_hybrid", epochs_on_gpu=6),
    "vit_mlp": Case("vit_mlp", epochs_on_gpu=14),
    "vit_hybrid": Case("vit_hybrid", epochs_on_gpu=6),
    "mlp_hybrid_n4": Case("mlp_hybrid_n4", epochs_on_gpu=4),
    **{
        name: Case(f"client_batches/{name}", epochs_on_gpu=epochs)
        for name, epochs in (
            *((f"lenet_mlp_n{n}", 30 * n) for n in (2, 4, 8, 16)),
            *(("lenet_hybrid_n2", 16), ("lenet_hybrid_n4", 12), ("lenet_hybrid_n8", 12), ("lenet_hybrid_n16", 192)),
            *(("lenet_coarse_n4", 60), ("resnet20_mlp_n4", 48), ("resnet20_hybrid_n4", 12)),
        )
    },
    # One generator for a range of noise, and one for half of each of its levels.
    "lenet_hybrid_range": Case(
        "lenet_hybrid_range",
        ("generator.mirrored_start=false",),
        12,
        AT_LEVELS,
    ),
    "lenet_coarse_range": Case("lenet_coarse_range", (), 24, AT_LEVELS),
    "lenet_mlp_range": Case("lenet_mlp_range", (), 50, AT_LEVELS),
    "lenet_hybrid_half_0": Case("lenet_hybrid", SHORT, 12),
    **{
        f"lenet_hybrid_half_{level:g}": Case("lenet_hybrid", (noise(level / 2), *SHORT), 12, ((noise(level),),))
        for level in LEVELS
    },
    # What each part is worth.
    **{
        f"lenet_hybrid_n{n}_not_told_apart": Case(
            f"client_batches/lenet_hybrid_n{n}",
            (*("data.batch_size=128", f"trainer.max_epochs={6 * n}"), "generator.separate=false"),
            15 * n,
        )
        for n in (4, 8)
    },
    "lenet_coarse_no_averages": Case("lenet_coarse", ("generator.averages=false",), 24),
    "lenet_coarse_no_start": Case("lenet_coarse", ("generator.linear_start_features=0",), 24),
    "lenet_coarse_one_module": Case("lenet_coarse", ("generator.modules=['*']",), 24),
    # To compare with lenet_hybrid_half_0.
    "lenet_hybrid_head_alone": Case("lenet_hybrid", ("generator.exact_depth=1", *SHORT), 12),
    "lenet_hybrid_no_gradients": Case("lenet_hybrid", ("generator.gradient_channels=0", *SHORT), 12),
    "lenet_hybrid_no_averages": Case("lenet_hybrid", ("generator.averages=false", *SHORT), 12),
    # Trained and attacked under a defence.
    **{
        name: Case(f"defences/{name}", epochs_on_gpu=epochs)
        for defence in ("noise", "pruning")
        for name, epochs in (
            *((f"lenet_mlp_{defence}", 50), (f"lenet_coarse_{defence}", 24), (f"lenet_hybrid_{defence}", 12)),
            *((f"lenet_mlp_n4_{defence}", 120), (f"lenet_hybrid_n4_{defence}", 12)),
            *((f"resnet20_mlp_{defence}", 24), (f"resnet20_coarse_{defence}", 12), (f"resnet20_hybrid_{defence}", 6)),
        )
    },
    # Larger images, crops of photographs; and a deeper network.
    "lenet_mlp_64": Case("larger/lenet_mlp_64", epochs_on_gpu=50),
    "lenet_hybrid_64": Case("larger/lenet_hybrid_64", epochs_on_gpu=6),
    "resnet18_mlp": Case("resnet18_mlp"),
    "resnet18_hybrid": Case("resnet18_hybrid"),
    # What a setting is worth; the hybrids, compared with lenet_hybrid_half_0.
    "lenet_hybrid_bf16": Case("lenet_hybrid", ("trainer.precision=bf16-mixed", *SHORT), 12),
    "lenet_hybrid_epsilon": Case("lenet_hybrid", ("optimizer.epsilon=1e-6", *SHORT), 12),
    "lenet_mlp_ema": Case("lenet_mlp", ("optimizer.ema_decay=0.999",), 50),
    "resnet20_coarse_no_start": Case("resnet20_coarse", ("generator.linear_start_features=0",), 12),
    "resnet20_coarse_no_averages": Case("resnet20_coarse", ("generator.averages=false",), 12),
    "resnet20_hybrid_no_averages": Case("resnet20_hybrid", ("generator.averages=false",), 6),
    "resnet20_hybrid_no_gradients": Case("resnet20_hybrid", ("generator.gradient_channels=0",), 6),
}
"""Name → what is trained. Without names on the command line all but LTI as published are."""


def run_one(name: str, seed: int) -> None:
    """Train and evaluate, and print a line of JSON for each evaluation."""
    case = CASES[name]
    folder = ROOT / "runs" / "benchmarks" / (name if seed == 0 else f"{name}_seed{seed}")
    file = ROOT / "configs" / f"{case.config}.yaml"
    settings = [
        *(DATA if load_config(file).data.name == "cifar10" else ()),
        *case.settings,
        f"seed={seed}",
        f"output_dir={folder}",
        "logging.quiet=true",
        "logging.wandb=off",
    ]
    if torch.cuda.is_available():
        settings += ["gradients.memory_limit_gb=4", "trainer.devices=1"]
        settings += [f"trainer.max_epochs={case.epochs_on_gpu}"] if case.epochs_on_gpu else []
    config = load_config(file, settings)
    started = time.perf_counter()
    train(config)
    seconds = time.perf_counter() - started
    for changed in case.further or ((),):
        evaluate(load_config(folder, [f"output_dir={folder}", *changed]))
        result = json.loads((folder / "evaluation" / "metrics.json").read_text())["results"][-1]
        row = {"name": name, "seed": seed, "changed": " ".join(changed), "seconds": seconds, "result": result}
        print("ROW " + json.dumps(row | n_parameters(config)), flush=True)


def n_parameters(config: Config) -> dict[str, int]:
    """Trained parameters of the generator of a run, and fitted coefficients of its linear start."""
    generator = build_generator(with_decisions(config), build_pairs(config).architecture)
    starts = [module for module in generator.modules() if isinstance(module, RidgeRegression)]
    return {"parameters": n_trainable(generator), "fitted": sum(one.coefficients.numel() for one in starts)}


def measure(name: str, seed: int) -> list[dict[str, Any]]:
    """`run_one` in a process of its own."""
    command = [sys.executable, __file__, name, "--one", str(seed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(f"{name}, seed {seed}, ended with {done.returncode}", file=sys.stderr, flush=True)
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


def table_rows(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each case and evaluation: means over seeds; the interval over images of the first seed."""
    lines = []
    for changed in dict.fromkeys(row["changed"] for row in rows):
        its = [row for row in rows if row["changed"] == changed]
        first = its[0]["result"]
        seconds = statistics.mean(row["seconds"] for row in its)
        cells = [its[0]["name"], changed, f"{its[0]['parameters'] / 1e6:.1f}", f"{its[0]['fitted'] / 1e6:.1f}"]
        cells.append(f"{seconds:.0f}")
        cells.append(f"{1000 * first['seconds_per_image']:.1f}")
        for metric, digits in METRICS.values():
            if metric not in first["metrics"]:
                cells.append("–")
                continue
            means = [row["result"]["metrics"][metric]["mean"] for row in its]
            low, high = first["metrics"][metric]["ci95"]
            cell = f"{statistics.mean(means):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            if len(its) > 1:
                cell += f" ({min(means):.{digits}f} to {max(means):.{digits}f})"
            cells.append(cell)
        cells += [f"{100 * first['label_accuracy']:.1f} %", str(first["n_images"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure the cases named on the command line, or all but the longest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="a file to which each evaluation is added as a line of JSON")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.names or [name for name in CASES if not name.startswith("lenet_lti")]
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case of the name {unknown[0]}; there are {', '.join(CASES)}")
    if arguments.one is not None:
        run_one(names[0], arguments.one)
        return
    print(f"\n{machine(arguments.seeds)}\n")
    columns = ["case", "evaluated with", "million parameters", "million fitted", "training, s", "ms per image"]
    columns += [*METRICS, "labels right", "images"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns), flush=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ThreadPoolExecutor(arguments.workers) as pool:
        tasks = [pool.submit(measure, name, seed) for seed in arguments.seeds for name in names]
        for task in as_completed(tasks):
            for row in task.result():
                found[row["name"]].append(row)
                if arguments.rows is not None:
                    with arguments.rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    for rows in found.values():
        print("\n".join(table_rows(sorted(rows, key=lambda row: row["seed"]))), flush=True)


if __name__ == "__main__":
    main()
