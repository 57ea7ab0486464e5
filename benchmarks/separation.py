"""How many client batches the last layer's equations tell apart: ``python benchmarks/separation.py``.

The leaked weights are used as they are, so that the equations alone are measured, not a fit. Needs the CIFAR-10 sample
at ``data/cifar10_subset``.
"""

import time
from collections.abc import Sequence

import torch
from generators import DATA, noise
from machine import ROOT, machine
from torch import Tensor

from gitlight import load_config
from gitlight.generators.exact.labels import output_bias
from gitlight.generators.exact.noise import entry_size
from gitlight.generators.exact.separation import Separated, Typical, separate
from gitlight.metrics import match
from gitlight.training import build_pairs

N_IMAGES = 1000
CASES: Sequence[tuple[str, int, float]] = (
    *(("lenet_mlp", n, 0.0) for n in (2, 4, 6, 8, 9)),
    *(("lenet_mlp", 4, level) for level in (1e-5, 1e-4, 1e-3, 1e-2)),
    ("lenet_mlp", 8, 1e-5),
    *(("resnet20_hybrid", n, 0.0) for n in (2, 4, 6, 8, 9)),
    *(("resnet20_hybrid", 4, level) for level in (1e-4, 1e-3, 1e-2)),
    ("resnet20_hybrid", 8, 1e-4),
)


def measure(name: str, n_images: int, level: float) -> str:
    """A line of the table."""
    settings = [*DATA, f"data.client_batch_size={n_images}", "data.n_validation=800"]
    settings += [noise(level)] if level else []
    pairs = build_pairs(load_config(ROOT / "configs" / f"{name}.yaml", settings))
    architecture, network = pairs.architecture, pairs.leaked_model.network
    names = architecture[architecture.output].parameters
    assert output_bias(architecture) == names["bias"]
    state = {key: value.double() for key, value in network.state_dict().items()}
    last = network.get_submodule(names["weight"].rpartition(".")[0])
    inputs: list[Tensor] = []
    last.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0].detach().double()))

    found: list[Separated] = []
    truths, labels, seconds = [], [], 0.0
    for pair in pairs.private_pairs(torch.device("cpu"), N_IMAGES):
        inputs.clear()
        logits = network(pair.images.flatten(0, 1))
        truth = inputs[-1].view(len(pair), n_images, -1)
        typical = Typical(
            inputs[-1].mean(dim=0),
            inputs[-1].var(dim=0).mean().sqrt(),
            torch.softmax(logits.double(), dim=1).mean(dim=0),
        )
        leak = {role: pair.gradients[key] for role, key in names.items()}
        size = entry_size(pair.gradients)
        deviation = max(level, 4 * torch.finfo(leak["weight"].dtype).eps) * size
        started = time.perf_counter()
        found.append(
            separate(
                leak["weight"].double(), leak["bias"].double(), deviation,
                state[names["weight"]], state[names["bias"]], typical, n_images,
            )
        )  # fmt: skip
        seconds += time.perf_counter() - started
        truths.append(truth)
        labels.append((found[-1].labels == pair.labels.sort(dim=1).values).all(dim=1))
    truth = torch.cat(truths)
    estimate = torch.cat([each.inputs for each in found])
    shape = (*truth.shape[:2], 1, 1, truth.shape[2])
    errors = (match(estimate.view(shape), truth.view(shape)).view(truth.shape) - truth).square().mean(dim=2).sqrt()
    spread = truth.flatten(0, 1).var(dim=0).mean().sqrt()
    apart = (errors < 0.1 * spread).all(dim=1).sum()
    cells = [
        name.rpartition("_")[0],
        n_images,
        f"{level:g}",
        f"{int(apart)} of {len(truth)}",
        f"{float((errors < 0.1 * spread).double().mean()):.1%}",
        f"{float(errors.median() / spread):.1e}",
        f"{float(torch.cat(labels).double().mean()):.1%}",
        f"{1000 * seconds / len(truth):.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """All cases."""
    print(f"\n{machine()}\n")
    columns = ["model", "N", "relative noise", "leaks told apart", "images", "median error / spread", "labels right"]
    print("| " + " | ".join([*columns, "ms a leak"]) + " |\n|" + " --- |" * (len(columns) + 1), flush=True)
    for case in CASES:
        print(measure(*case), flush=True)


if __name__ == "__main__":
    main()
