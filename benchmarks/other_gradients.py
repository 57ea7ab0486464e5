"""Gradients of each leak by other ways than gitlight's, for ``gradients.py``.

All take images ``(B, N, C, H, W)`` and labels ``(B, N)``, and compute in full float32.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.gradients.precision import full_float32


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """One backward pass per leak, copied into place."""
    parameters = list(model.parameters())
    with full_float32():
        results = [torch.empty(len(images), *p.shape, device=p.device) for p in parameters]
        for leak in range(len(images)):
            found = torch.autograd.grad(F.cross_entropy(model(images[leak]), labels[leak]), parameters)
            for result, gradient in zip(results, found, strict=True):
                result[leak] = gradient
    return results


def vmapped(model: nn.Module, images: Tensor, labels: Tensor) -> object:
    """``torch.func.vmap(grad)`` as its documentation has it."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, (parameters, buffers), (images,)), labels)

    with full_float32(), sdpa_kernel(SDPBackend.MATH):  # for the fused kernels there is no rule
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)


def batched(model: nn.Module, images: Tensor, labels: Tensor) -> object:
    """The ordinary gradient of the summed loss."""
    with full_float32():
        loss = F.cross_entropy(model(images.flatten(0, 1)), labels.flatten(), reduction="sum")
        return torch.autograd.grad(loss, list(model.parameters()))


def opacus(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object] | None:
    """Opacus' way, a mean over each client's images; None where it is missing or does not support the model."""
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError:
        return None
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return None  # it has no per-example gradients of batch norm
    for module in model.train().modules():  # its hooks sleep in evaluation mode; there is no dropout
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    try:
        wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    except (NotImplementedError, ValueError):
        return None

    def run() -> object:
        with full_float32():
            wrapped.zero_grad()
            F.cross_entropy(wrapped(images.flatten(0, 1)), labels.flatten(), reduction="sum").backward()
        if images.shape[1] == 1:
            return [p.grad_sample for p in wrapped.parameters()]
        return [p.grad_sample.unflatten(0, images.shape[:2]).mean(dim=1) for p in wrapped.parameters()]

    try:
        run()
    except Exception as error:  # Opacus' own errors for layers that it cannot handle are of many kinds
        print(f"Opacus does not run this model: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return run
