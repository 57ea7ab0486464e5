"""Where the steps of a traced network have their examples, seen from what a change of one image changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gitlight.gradients.layer_gradients import Layout, NoRuleError
from gitlight.gradients.recorder import Prepared, Recorder
from gitlight.gradients.steps import Step
from gitlight.gradients.tracing import TracedNetwork

_Mark = Callable[[tuple[int, str], Tensor], Tensor | None]
"""Of a step's argument: which entries the second of three images has changed; None where that is seen later."""

_LOGITS = (-1, "output")


@torch.no_grad()
def find_layouts(traced: TracedNetwork, prepared: Prepared, images: Tensor) -> None:
    """See where each step has its examples, from what is made of one of three images.

    That image is NaN, which goes through everything; where pixels become integers, as of embeddings, which NaN has
    none for, it is a random one in the place of another, and what differs is its.

    Args:
        traced: its steps' `layouts` are set.
        prepared: the tensors to run it with.
        images: three of them, ``(3, C, H, W)``; overwritten.

    Raises:
        NoRuleError: a step's, or the network's, output ties images together.
    """
    if not traced.makes_integers:
        images[1] = float("nan")
        _run(traced, prepared, images, lambda _, tensor: tensor.isnan())
        return
    generator = torch.Generator().manual_seed(0)
    images.copy_(torch.rand(images.shape, generator=generator, dtype=images.dtype))
    former: dict[tuple[int, str], Tensor] = {}

    def keep(key: tuple[int, str], tensor: Tensor) -> None:
        former[key] = tensor.clone()

    _run(traced, prepared, images.clone(), keep)
    images[1] = torch.rand(images.shape[1:], generator=generator, dtype=images.dtype)
    _run(traced, prepared, images, lambda key, tensor: tensor != former[key])


def _run(traced: TracedNetwork, prepared: Prepared, images: Tensor, mark: _Mark) -> None:
    externals = dict(prepared.externals)
    externals |= {name: externals[name].clone() for name in traced.overwritten}
    logits = traced.body(_Probe(traced.steps, prepared, mark), images, externals)
    marked = mark(_LOGITS, logits)
    if marked is not None and marked[[0, 2]].any():
        raise NoRuleError("its output ties images together")


class _Probe(Recorder):
    """Finds the steps' layouts."""

    def __init__(self, steps: tuple[Step, ...], prepared: Prepared, mark: _Mark) -> None:
        super().__init__(steps, prepared)
        self._mark = mark

    def run(self, number: int, *computed: Any) -> Tensor:
        step, values = self._steps[number], self.values(number, computed)
        output = step.apply(values)
        for argument, shape in step.symbolic.items():
            marked = self._mark((number, argument), values.get(argument, output))
            if marked is not None:
                step.layouts[argument] = _layout(marked, shape, step)
        return output


def _layout(marked: Tensor, shape: Any, step: Step) -> Layout:
    """Where the second of three images is, from what it has changed."""
    batch = [dim for dim, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if len(batch) != 1:
        raise NoRuleError(f"{step.place} has the images in {len(batch)} of its dimensions")
    (dim,) = batch
    changed = marked.movedim(dim, 0).flatten(1).any(1)
    per_image = len(changed) // 3
    for outer in (n for n in range(1, per_image + 1) if per_image % n == 0):
        pattern = changed.view(outer, 3, -1)
        if not pattern[:, [0, 2]].any() and (pattern.any() or per_image == 1):
            return Layout(dim, outer, per_image // outer)
    raise NoRuleError(f"{step.place} ties images together")
