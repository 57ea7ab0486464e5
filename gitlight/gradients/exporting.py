"""The leaked network as a graph of torch.export, for any number of images."""

import warnings
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from gitlight.architecture import ImageShape
from gitlight.errors import ArchitectureError, first_line
from gitlight.exported import copied, without_autocast, without_hooks
from gitlight.gradients.layer_gradients import NoRuleError

# Any number but 0 and 1, which torch.export would take for constants.
_TRACED_IMAGES = 7

_CONSTANT = f"specialized it to be a constant ({_TRACED_IMAGES})"
"""In what torch.export says where a model took the number of images for a plain one."""


def exported_for_any_number(network: nn.Module, image_shape: ImageShape, dtype: torch.dtype) -> Any:
    """The graph on the CPU, wherever the network is: for batch norm on a GPU, export bounds the number of images.

    Args:
        network: images ``(S, C, H, W)`` to logits, in the mode to be traced.
        image_shape: ``(C, H, W)``.
        dtype: precision of the images.

    Raises:
        NoRuleError: torch.export cannot trace it; the message says why.
    """
    tensors = [*network.parameters(), *network.buffers()]
    same = all(
        t.device.type == "cpu" and (t.dtype == dtype or not t.is_floating_point()) and not t.is_inference()
        for t in tensors
    )
    # Modules are copied, as their hooks are not to see the tracing; weights only where they have another precision.
    try:
        twin = without_hooks(copied(network, tensors if same else ()))
    except ArchitectureError as error:
        raise NoRuleError(str(error)) from error
    if not same:
        twin = twin.to("cpu", dtype)
    images = torch.zeros(_TRACED_IMAGES, *image_shape, dtype=dtype)
    try:
        with warnings.catch_warnings(), torch.no_grad(), without_autocast(kept_where_on=True):
            warnings.simplefilter("ignore")
            shapes: Any = {0: torch.export.Dim("batch")}
            # Wrapped models, as by DataParallel, take all that they are given as one argument.
            shapes = ((shapes,),) if _first_parameter(twin).kind is Parameter.VAR_POSITIONAL else (shapes,)
            return torch.export.export(twin, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many kinds, its own and the model's
        cause = first_line(error)
        if _CONSTANT in str(error):
            cause = "it makes this number a constant, as len(images) does, and images.shape[0] does not"
        raise NoRuleError(f"torch.export cannot trace the model for any number of images: {cause}") from error


def _first_parameter(network: nn.Module) -> Parameter:
    return next(iter(signature(network.forward).parameters.values()))
