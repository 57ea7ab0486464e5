"""Iterative attacks beside `breaching`'s, and from a prior: ``python benchmarks/attacks.py [NAME ...]``.

``breaching`` (a benchmark extra: ``pip install -e '.[benchmarks]'``) attacks the same images, on the same model, from
the same start, with the same number of gradients; one image at a time, as it does. Seconds are those of the search
alone, in one process, one after the other. ``prior_*`` attacks with and without a trained generator's images to start
from; it needs the runs that it names, of which ``--only`` leaves out those of other attacks. Needs the CIFAR-10 sample
at ``data/cifar10_subset``.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from generators import DATA
from machine import ROOT, machine
from torch import Tensor

from gitlight import load_config
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.matching import match_gradients
from gitlight.attacks.variables import Pixels
from gitlight.config import DLGConfig, MatchingConfig
from gitlight.data.pair import GradientPair
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.report.trajectories import mean_curve, read_trajectories
from gitlight.training import build_pairs

N_COMPARED, N_TOGETHER = 10, 32
MODELS = {
    "lenet": (),
    "relu_convnet": ("leaked.activation=relu", "leaked.init=default"),
}
"""The ReLU network is LeNet with ReLU under PyTorch's default initialisation."""

LBFGS_STEPS, EVALUATIONS = 30, 20
"""A step of `torch.optim.LBFGS` is up to 20 iterations; ours are single ones."""

SETTINGS = {
    "ig": MatchingConfig(labels="given", iterations=300, total_variation=0.1, tolerance=0.0),
    "dlg": DLGConfig(labels="optimised", iterations=LBFGS_STEPS * EVALUATIONS, tolerance=0.0, dtype="float32"),
}

IMAGE_PRIOR = "runs/benchmarks/image_prior"
"""Trained by ``python train.py configs/image_prior.yaml`` with this output_dir and the sample as its data."""


class PriorCase(NamedTuple):
    """What is attacked with and without something to start from, and the runs of `generators.py` and `exact.py`.

    L-BFGS attacks ``n_by_lbfgs`` images, in double precision.
    """

    config: str
    generator: str
    n_images: int
    iterations: int
    n_by_lbfgs: int
    recovered: str | None = None


PRIORS = {
    "prior_lenet": PriorCase(
        "lenet_ig", "runs/benchmarks/lenet_hybrid", 50, 1200, 50, recovered="runs/benchmarks/exact_sigmoid"
    ),
    "prior_resnet20": PriorCase("resnet20_ig", "runs/benchmarks/resnet20_hybrid", 50, 200, 10),
}


def private_pair(model: str, n: int) -> tuple[GradientPairDataModule, GradientPair]:
    """Leaks of the first private images."""
    config = load_config(ROOT / "configs" / "lenet_ig.yaml", [*DATA, *MODELS[model], f"data.batch_size={n}"])
    pairs = build_pairs(config)
    return pairs, next(iter(pairs.private_pairs(torch.device("cpu"), n)))


def ours(pairs: GradientPairDataModule, pair: GradientPair, name: str, start: Tensor) -> tuple[Tensor, float]:
    """Images and seconds, all at once."""
    settings = SETTINGS[name]
    network = pairs.leaked_model.network
    function = LeakedFunction(pairs.architecture, dict(network.named_parameters()))
    targets = torch.nn.functional.one_hot(pair.labels, 10).float()
    if settings.labels == "optimised":
        targets = torch.stack([_breachings_label_start(number) for number in range(len(start))])
    leaks = dict(pair.gradients)
    started = time.perf_counter()
    found = match_gradients(function, settings, leaks, Pixels(start.unsqueeze(1), settings.box), targets)
    return found.images[:, 0], time.perf_counter() - started


def _breachings_label_start(number: int) -> Tensor:
    """The logits ``(1, 10)`` that breaching draws under this seed, after a template of them and an image."""
    generator = torch.Generator().manual_seed(number)
    for shape in ((1, 10), (1, 3, 32, 32)):
        torch.randn(shape, generator=generator)
    return torch.randn((1, 10), generator=generator)


def breachings(pairs: GradientPairDataModule, pair: GradientPair, name: str, start: Tensor) -> tuple[Tensor, float]:
    """Images and seconds, one at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import breaching

    kind = {"ig": "invertinggradients", "dlg": "deepleakage"}[name]
    iterations = SETTINGS[name].iterations if name == "ig" else LBFGS_STEPS
    config = breaching.get_config([f"attack={kind}"])
    config.attack.optim.max_iterations = iterations
    config.attack.optim.callback = 10**9
    network = copy.deepcopy(pairs.leaked_model.network).requires_grad_()
    attacker = breaching.attacks.prepare_attack(network, torch.nn.CrossEntropyLoss(), config.attack)
    metadata = _Metadata(shape=list(start.shape[1:]), modality="vision", classes=10, task="classification")
    payload = [{"parameters": list(network.parameters()), "buffers": list(network.buffers()), "metadata": metadata}]
    images = []
    started = time.perf_counter()
    for number in range(len(start)):
        torch.manual_seed(number)
        shared = {
            "gradients": [gradient[number] for gradient in pair.gradients.values()],
            "buffers": None,
            "metadata": {
                "num_data_points": 1,
                "labels": pair.labels[number] if SETTINGS[name].labels == "given" else None,
                "local_hyperparams": None,
            },
        }
        found, _ = attacker.reconstruct(payload, [shared], {}, initial_data=start[number : number + 1])
        images.append(found["data"][0].detach())
    return torch.stack(images), time.perf_counter() - started


class _Metadata(SimpleNamespace):
    """Read by key and by attribute, as breaching's own."""

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Of each image, in dB."""
    error = (torch.nan_to_num(found).clamp(0, 1) - truth).square().flatten(1).mean(dim=1)
    return -10 * error.clamp_min(1e-12).log10()


def compare() -> None:
    """Quality on ten images, and images per hour with 32 at once."""
    print(
        "| model | attack | ours, dB | breaching, dB | ours ahead on | ours, s an image | breaching | times as fast |"
    )
    print("|" + " --- |" * 8, flush=True)
    for model in MODELS:
        pairs, pair = private_pair(model, N_TOGETHER)
        truth = pair.images[:, 0]
        noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
        start = (0.5 + 0.25 * noise).clamp(0, 1)
        few = GradientPair(
            {k: v[:N_COMPARED] for k, v in pair.gradients.items()},
            *(part[:N_COMPARED] for part in (pair.images, pair.labels, pair.indices)),
        )
        for name in SETTINGS:
            theirs, their_seconds = breachings(pairs, few, name, start[:N_COMPARED])
            found, seconds = ours(pairs, pair, name, start)
            own, other = psnr(found, truth)[:N_COMPARED], psnr(theirs, few.images[:, 0])
            per_image, their_per_image = seconds / N_TOGETHER, their_seconds / N_COMPARED
            cells = [
                model,
                name,
                f"{own.mean():.2f}",
                f"{other.mean():.2f}",
                f"{int((own > other).sum())} of {N_COMPARED}",
                f"{per_image:.3f}",
                f"{their_per_image:.3f}",
                f"{their_per_image / per_image:.1f}",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


WITH_PRIOR = ("ig", "idlg", "dlg", "gias", "recovered")


def with_prior(name: str, only: Sequence[str]) -> None:
    """Attacks from noise and from others' images, those others alone, and IG with weights recovered from pairs."""
    case = PRIORS[name]
    folder, half = ROOT / "runs" / "benchmarks" / f"attacks_{name}", case.iterations // 2
    shared = [*DATA, "logging.wandb=off", "logging.quiet=true", "attack.record_every=10", f"output_dir={folder}"]
    from_generator = f"attack.prior={case.generator}"
    recovered = ["attack.knowledge=recovered", f"attack.recovered_from={case.recovered}"]
    gias_first = ["attack.prior=gias", f"attack.prior_settings={{image_prior: {IMAGE_PRIOR}, iterations: {half}}}"]
    attacks: list[tuple[str, int, int, list[str]]] = [
        ("ig", case.n_images, case.iterations, []),
        ("ig", case.n_images, case.iterations, [from_generator]),
        ("idlg", case.n_by_lbfgs, case.iterations, ["attack=idlg"]),
        ("idlg", case.n_by_lbfgs, case.iterations, ["attack=idlg", from_generator]),
        ("dlg", case.n_by_lbfgs, case.iterations, ["attack=dlg"]),
        ("dlg", case.n_by_lbfgs, case.iterations, ["attack=dlg", from_generator]),
        ("gias", case.n_images, case.iterations, ["attack=gias", f"attack.image_prior={IMAGE_PRIOR}"]),
        ("gias", case.n_images, half, gias_first),
    ]
    if case.recovered is not None:
        attacks.append(("recovered", case.n_images, case.iterations, recovered))
    for kind, n_images, iterations, overrides in attacks:
        if kind not in only:
            continue
        searched = [f"evaluation.n_images={n_images}", f"attack.iterations={iterations}"]
        _run("evaluate.py", f"configs/{case.config}.yaml", *shared, *searched, *overrides)
    _run("evaluate.py", case.generator, f"evaluation.n_images={case.n_images}", "attack=generator")
    print("| attack | images | PSNR, dB | SSIM | s an image |\n| --- | --- | --- | --- | --- |")
    for path in (folder, ROOT / case.generator):
        for found in json.loads((path / "evaluation" / "metrics.json").read_text())["results"]:
            if path is folder or found["n_images"] == case.n_images:
                intervals = {key: (m["mean"], *m["ci95"]) for key, m in found["metrics"].items()}
                named = {key: "{:.4g} [{:.4g}, {:.4g}]".format(*values) for key, values in intervals.items()}
                cells = [found["attack"], found["n_images"], named["psnr"], named["ssim"]]
                print("| " + " | ".join(map(str, [*cells, f"{found['seconds_per_image']:.2f}"])) + " |")
    _print_steps(folder / "evaluation" / "trajectories")


def _print_steps(folder: Path) -> None:
    """After how many steps each attack's median distance is where the same attack, or else IG, from noise ends."""
    curves = {}
    for path in sorted(folder.glob("*.csv")):
        label, points = read_trajectories(path)
        curves[label] = mean_curve(points)
    from_noise = [label for label in curves if "prior=" not in label and "knowledge=" not in label]
    noise = {label.split("(")[0]: curves[label] for label in from_noise}
    print()
    for label, curve in curves.items():
        kind = label.split("(")[0]
        target = noise[kind if kind in noise and kind != "gias" else "ig"][-1][1]
        reached = next((str(step) for step, distance, _ in curve if distance <= target), "not reached")
        print(
            f"- {label}: median distance {curve[0][1]:.3g}, at the end {curve[-1][1]:.3g}, {curve[-1][2]:.2f} dB; "
            f"as near as from noise ({target:.3g}): {reached}",
            flush=True,
        )


def _run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)


def main() -> None:
    """What is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["compare"], metavar="NAME", help=", ".join(["compare", *PRIORS]))
    parser.add_argument("--only", nargs="+", choices=WITH_PRIOR, default=WITH_PRIOR, metavar="ATTACK")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {"compare", *PRIORS}:
        parser.error(f"there is no {sorted(unknown)[0]}; there are {', '.join(['compare', *PRIORS])}")
    print(f"\n{machine()}\n")
    for name in arguments.names:
        if name == "compare":
            compare()
        else:
            with_prior(name, arguments.only)


if __name__ == "__main__":
    main()
