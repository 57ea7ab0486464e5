"""Gradients per leak from one batched backward pass, by capturing each layer's input and output gradient.

The network runs once for a flat batch of all leaks' images. Where an operation uses leaked parameters, a hook receives
the gradient δ of its output during the backward pass, and the operation's rule (`layer_gradients`) makes the
parameters' gradients, leak by leak, from δ and the operation's input at once (Goodfellow 2015, arXiv 1510.01799;
Rochette et al. 2019, arXiv 1912.06015). Autograd itself never computes a gradient of a parameter.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg

from gitlight.architecture import ImageShape
from gitlight.errors import first_line
from gitlight.gradients.buffers import Scratch
from gitlight.gradients.delta_in_order import delta_in_order
from gitlight.gradients.labels import cross_entropy
from gitlight.gradients.layer_gradients import Call, NoRuleError
from gitlight.gradients.layouts import find_layouts
from gitlight.gradients.precision import plain_tensor
from gitlight.gradients.recorder import Prepared, Recorder
from gitlight.gradients.steps import Step
from gitlight.gradients.tracing import trace

Reduction = Callable[[Tensor], Tensor]
"""What a gradient ``(B, *shape)`` goes through before it is kept."""


class CapturedGradients:
    """The gradients of one network in one mode, on one device, in one precision."""

    def __init__(self, network: nn.Module, names: tuple[str, ...], image_shape: ImageShape, images: Tensor) -> None:
        """Trace the network and try every rule on two images.

        Args:
            network: the leaked network, in the mode in which it leaks.
            names: parameters whose gradients are wanted.
            image_shape: ``(C, H, W)``.
            images: any tensor of the device and precision of the images.

        Raises:
            NoRuleError: a rule is missing or does not fit; the message names the operation.
        """
        self._names = frozenset(names)
        self._scratch = Scratch()
        self._traced = trace(network, self._names, image_shape, images.dtype, images.device)
        tensors = {
            name: plain_tensor(tensor, images.dtype).to(images.device)
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
        }
        two = images.new_zeros(2, *image_shape)
        try:
            prepared = self.prepare(tensors)
            find_layouts(self._traced, prepared, images.new_zeros(3, *image_shape))
            trial = _Chunk(self._traced.steps, prepared, 1, None, scratch=self._scratch)
            self._backward(trial, two, torch.zeros(2, dtype=torch.int64, device=images.device), 2)
        except (NoRuleError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a rule of the user's own may raise anything
            raise NoRuleError(f"its graph does not run: {first_line(error)}") from error

    def in_precision(self, dtype: torch.dtype) -> "CapturedGradients":
        """The same graph for tensors of another precision, which it need not bear: it may name its own."""
        twin = copy.copy(self)
        twin._traced, twin._scratch = self._traced.in_precision(dtype), Scratch()
        return twin

    def prepare(self, tensors: Mapping[str, Tensor]) -> Prepared:
        """What many chunks share.

        Args:
            tensors: the network's parameters and buffers by name, detached, of the images' precision.
        """
        traced = self._traced
        values = {**traced.constants, **{name: tensors[target] for name, target in traced.held.items()}}
        # The model's own buffers stay as they are.
        values |= {name: values[name].clone() for name in traced.overwritten}
        leaves: dict[str, Tensor] = {}
        if traced.prologue:
            leaves = {name: tensors[name].detach().requires_grad_() for name in self._names}
            values |= {name: leaves[target] for name, target in traced.held.items() if target in leaves}
        for node in traced.prologue:
            given: Any = map_arg((node.args, node.kwargs), lambda n: values[n.name])
            operation: Any = node.target
            values[node.name] = operation(*given[0], **given[1])
        roots = {
            name: value
            for name, value in values.items()
            if name not in traced.held and isinstance(value, Tensor) and value.requires_grad
        }
        externals = {name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()}
        folded = {n: step.folded(externals) for n, step in enumerate(traced.steps) if step.norm is not None}
        return Prepared(externals, folded, roots, leaves)

    def __call__(
        self,
        prepared: Prepared,
        images: Tensor,
        labels: Tensor,
        results: Mapping[str, Tensor],
        reduce: Mapping[str, Reduction] | None = None,
    ) -> None:
        """Write the gradients of ``B`` leaks.

        Args:
            prepared: by `prepare`.
            images: ``(B, N, C, H, W)``.
            labels: ``(B, N)``.
            results: parameter name → ``(B, …)`` to write into.
            reduce: parameter name → what its gradient ``(B, *shape)`` goes through before it is kept.
        """
        held = self._traced.held
        chunk = _Chunk(self._traced.steps, prepared, len(images), results, reduce or {}, held, self._scratch)
        flat = images.flatten(0, 1)
        # What a forward pass overwrites is not the caller's.
        flat = flat.clone() if self._traced.overwrites else flat
        self._backward(chunk, flat, labels.flatten(), images.shape[1])
        chunk.finish()

    def _backward(self, chunk: "_Chunk", images: Tensor, labels: Tensor, per_leak: int) -> None:
        with delta_in_order(images.device.type, self._traced.has_norms):
            logits = self._traced.body(chunk, images, chunk.prepared.externals)
        loss = cross_entropy(logits, labels, reduction="sum") / per_leak
        # Hooks hold the chunk: if it held tensors in turn, all would stay until Python looks for cycles.
        starts, chunk.starts = chunk.starts, []
        if starts:
            torch.autograd.grad(loss, starts, allow_unused=True)


class _Chunk(Recorder):
    """One chunk's forward pass, and the hooks of its backward pass."""

    def __init__(
        self,
        steps: tuple[Step, ...],
        prepared: Prepared,
        n_leaks: int,
        results: Mapping[str, Tensor] | None,
        reduce: Mapping[str, Reduction] = {},
        held: Mapping[str, str] = {},
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(steps, prepared)
        self._scratch = scratch or Scratch()
        self._n_leaks = n_leaks
        self._results = results
        self._reduce = reduce
        self._held = held
        self._written: set[str] = set()
        self._of_roots: dict[str, Tensor] = {}
        self.starts: list[Tensor] = []

    def run(self, number: int, *computed: Any) -> Tensor:
        step, values = self._steps[number], self.values(number, computed)
        output = step.apply(values)
        if not output.requires_grad:
            output.requires_grad_()
            self.starts.append(output)
        output.register_hook(partial(self._collect, step, values))
        return output

    def _collect(self, step: Step, values: dict[str, Any], delta: Tensor) -> None:
        made: dict[str, Tensor] = {}

        def destination(argument: str) -> Tensor | None:
            source = step.names.get(argument)
            if source is None:
                return None
            if argument not in made:
                again = source in [step.names[other] for other in made]  # one parameter as two arguments
                made[argument] = self._destination(source, again)
            return made[argument]

        try:
            call = Call(step.kind, values, step.layouts, self._n_leaks, destination, self._scratch, step.operation)
            step.rule(call, delta)
        except NoRuleError as error:
            raise NoRuleError(f"{step.place}: {error}") from error
        if left_out := sorted(set(step.names) - set(made)):
            raise NoRuleError(f"{step.place} takes a parameter as {left_out[0]}, and its rule does not")
        for argument, gradient in made.items():
            self._keep(step.names[argument], gradient)

    def _destination(self, source: str, again: bool) -> Tensor:
        """The result itself, if nothing is in it yet, nor being written; else a tensor to be added to it."""
        target = self._held.get(source)
        direct = not again and target is not None and target not in self._written and target not in self._reduce
        if direct and self._results is not None:
            return self._results[target]  # type: ignore[index]
        value = self.prepared.externals[source]
        return value.new_empty(self._n_leaks, *value.shape)

    def _keep(self, source: str, gradient: Tensor) -> None:
        if self._results is None:
            return
        if source in self._held:
            self._add(self._held[source], gradient)
        elif source in self._of_roots:
            self._of_roots[source] += gradient
        else:
            self._of_roots[source] = gradient

    def _add(self, name: str, gradient: Tensor) -> None:
        assert self._results is not None
        kept = self._results[name]
        if name in self._reduce:
            gradient = self._reduce[name](gradient)
        if name in self._written:
            kept += gradient
        elif gradient is not kept:
            kept.copy_(gradient)
        self._written.add(name)

    def finish(self) -> None:
        """Carry the gradients of tensors computed from parameters back to these; zero for parameters without use."""
        assert self._results is not None
        leaves = self.prepared.leaves
        for source, gradient in self._of_roots.items():
            root = self.prepared.roots.get(source)
            if root is None:  # behind a detach
                continue
            carried = torch.autograd.grad(
                root, list(leaves.values()), gradient, is_grads_batched=True, allow_unused=True, retain_graph=True
            )
            for name, part in zip(leaves, carried, strict=True):
                if part is not None:
                    self._add(name, part)
        for name, kept in self._results.items():
            if name not in self._written:
                kept.zero_()
