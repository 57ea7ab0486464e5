"""The gradient engine: exact gradients, one per leak, on the device where the images are."""

import logging
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError
from gitlight.gradients.buffers import ResultBuffers, keep_freed_memory
from gitlight.gradients.captured import CapturedGradients
from gitlight.gradients.checks import check_images, check_labels
from gitlight.gradients.functional_gradients import FunctionalGradients
from gitlight.gradients.layer_gradients import NoRuleError
from gitlight.gradients.memory import MemoryModel
from gitlight.gradients.precision import autograd_on, full_float32, plain_autograd, plain_tensor
from gitlight.gradients.self_check import check_against_autograd
from gitlight.gradients.sketch import Sketch

log = logging.getLogger(__name__)

_Make = Callable[[Tensor, Tensor, Gradients], None]
"""Makes the gradients of a chunk: images, labels, and the tensors to write into."""

_MOST_CAPTURED = 4
"""States of a network whose graphs are kept: two modes, client batches of one image and of several."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class GradientEngine:
    """Makes the gradient of the mean cross-entropy of each client batch with respect to the leaked parameters.

    The parameters are read anew at every call, so a leaked model that moves or trains between calls is followed.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> engine = GradientEngine(network, Architecture.of(network, (3, 2, 2), 2), GradientsConfig())
    >>> gradients = engine(torch.rand(5, 1, 3, 2, 2), torch.zeros(5, 1, dtype=torch.int64))
    >>> {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    {'1.weight': (5, 2, 12), '1.bias': (5, 2)}
    """

    def __init__(
        self,
        network: nn.Module,
        architecture: Architecture,
        settings: GradientsConfig,
        sketch: Sketch | None = None,
    ) -> None:
        """Set up; nothing is computed yet.

        Args:
            network: the leaked network.
            architecture: its architecture, for sizes.
            settings: method, memory limit and precision.
            sketch: what gradients go through as they are made; None: they stay whole.
        """
        self._network = network
        self._names = tuple(architecture.parameter_shapes)
        self._architecture = architecture
        self._settings = settings
        self._sketch = sketch
        self._dtype = _DTYPES[settings.dtype]
        self._buffers = ResultBuffers()
        self._memory_models: dict[str, MemoryModel] = {}
        self._captured: dict[Hashable, CapturedGradients] = {}
        self._refused: set[Hashable] = set()
        self._functional_gradients = FunctionalGradients(network, self._method, falls_back=settings.method == "auto")

    def __call__(self, images: Tensor, labels: Tensor) -> Gradients:
        """Gradients of ``B`` leaks; ``B`` may be 0.

        Args:
            images: ``(B, N, C, H, W)`` in [0, 1], of floating point; ``N`` is at least 1.
            labels: ``(B, N)`` int64, in ``range(n_classes)``.

        Returns:
            Parameter name → ``(B, *parameter.shape)``, or ``(B, size)`` where it is sketched; of the precision
            ``gradients.dtype``, detached.

        Raises:
            ConfigError: one leak alone needs more than ``gradients.memory_limit_gb``; or ``gradients.method`` names a
                method that does not fit the model, as ``captured`` where an operation has no rule.
            DataError: images are none of the model's, or labels of another shape or, on the CPU, no classes of it.
        """
        check_images(images, self._architecture.image_shape)
        check_labels(images, labels, self._architecture.n_classes)
        if images.device.type == "cpu":
            keep_freed_memory()
        captured = self._captured_gradients(images)
        # Lightning validates under inference mode by default; gradients need autograd, and ordinary tensors.
        with plain_autograd(images.device.type):
            images = images.clone() if images.is_inference() else images.detach()
            labels = labels.clone() if labels.is_inference() else labels
            memory = self._memory_model(self._method if captured is None else "captured")
            chunk = memory.leaks_per_chunk(images, self._settings.memory_limit_gb)
            tensors = {
                name: plain_tensor(value, self._dtype)
                for name, value in (*self._network.named_parameters(), *self._network.named_buffers())
            }
            shapes = self._architecture.parameter_shapes if self._sketch is None else self._sketch.shapes
            result = self._buffers.empty(
                {name: (len(images), *shape) for name, shape in shapes.items()}, self._dtype, images.device
            )
            make = self._functional(tensors) if captured is None else self._capturing(captured, tensors)
            for start in range(0, len(images), chunk):
                part = slice(start, start + chunk)
                make(images[part].to(self._dtype), labels[part], {name: kept[part] for name, kept in result.items()})
        return result

    def _memory_model(self, method: str) -> MemoryModel:
        if method not in self._memory_models:
            self._memory_models[method] = MemoryModel.of(self._architecture, method, self._dtype, self._sketch)
        return self._memory_models[method]

    @property
    def _method(self) -> str:
        """The one to use where `captured` is not."""
        return "vmap" if self._settings.method in ("auto", "captured") else self._settings.method

    def _captured_gradients(self, images: Tensor) -> CapturedGradients | None:
        """The captured method for the network as it is now; None where another is to be used."""
        if self._settings.method not in ("auto", "captured"):
            return None
        # A client batch of one may be treated otherwise than larger ones; these are treated alike.
        images_per_leak = min(images.shape[1], 2)
        modules = tuple(self._network.modules())
        place = (tuple(_state(module) for module in modules), images.device, images_per_leak)
        if place in self._refused:  # whatever its attributes: they may count how often it ran
            return None
        key = (place, tuple(_attributes(module) for module in modules))
        if key not in self._captured:
            device_type = images.device.type
            like = torch.empty(0, dtype=self._dtype, device=images.device)
            try:
                with autograd_on(device_type), sdpa_kernel(_attention(device_type)):
                    self._keep(key, self._checked(like, images_per_leak))
            except NoRuleError as error:
                if self._settings.method == "captured":
                    raise ConfigError(
                        f"gradients.method: captured does not fit this leaked model: {error}. "
                        "Give gradients.method=vmap, or auto."
                    ) from error
                log.info("Gradients are made by %s: %s", self._method, error)
                self._refused.add(place)
                return None
        return self._captured[key]

    def _checked(self, like: Tensor, images_per_leak: int) -> CapturedGradients:
        """The captured method, once it has been seen to give autograd's gradients; else NoRuleError."""
        captured = self._capture(like)
        if like.dtype != torch.float64:
            self._check(captured, like, images_per_leak)
        if like.device.type == "mps":  # has no float64
            self._check(captured, like, images_per_leak, shaken=True)
            return captured
        exact = like.double()
        try:
            self._check(captured.in_precision(exact.dtype), exact, images_per_leak, shaken=True)
        except NoRuleError:
            if like.dtype == torch.float64:
                raise
            # A graph can name the precision that it was traced in; one of float64 then stands for it.
            self._check(self._capture(exact), exact, images_per_leak, shaken=True)
        return captured

    def _capture(self, like: Tensor) -> CapturedGradients:
        return CapturedGradients(self._network, self._names, self._architecture.image_shape, like)

    def _check(self, captured: CapturedGradients, like: Tensor, images_per_leak: int, shaken: bool = False) -> None:
        with full_float32():  # within which torch.export does not work
            check_against_autograd(captured, self._network, self._architecture, like, images_per_leak, shaken)

    def _keep(self, key: Hashable, captured: CapturedGradients) -> None:
        self._captured[key] = captured
        if len(self._captured) > _MOST_CAPTURED:
            del self._captured[next(iter(self._captured))]

    def _capturing(self, captured: CapturedGradients, tensors: Mapping[str, Tensor]) -> _Make:
        prepared = captured.prepare(tensors)
        reductions = {} if self._sketch is None else self._sketch.reductions

        def make(images: Tensor, labels: Tensor, results: Gradients) -> None:
            with sdpa_kernel(_attention(images.device.type)):
                captured(prepared, images, labels, results, reductions)

        return make

    def _functional(self, tensors: dict[str, Tensor]) -> _Make:
        leaked = {name: tensors.pop(name) for name in self._names}

        def make(images: Tensor, labels: Tensor, results: Gradients) -> None:
            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernels
                made = self._functional_gradients(leaked, tensors, images, labels)
            if self._sketch is not None:
                made = self._sketch(made)
            for name, kept in results.items():
                kept.copy_(made[name])

        return make


def _state(module: nn.Module) -> Hashable:
    """Which module it is, its mode, and who changes what goes through it."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return module, module.training, tuple(map(tuple, hooks))  # a hook's key is never used again


def _attributes(module: nn.Module) -> Hashable:
    """A module's own numbers and names, which its computation may depend on: a slope, a temperature, a switch."""
    return tuple((name, value) for name, value in vars(module).items() if _is_plain(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | complex | str | torch.dtype)


def _attention(device_type: str) -> list[SDPBackend]:
    """The attention kernels that compute in full precision: on GPUs, the fused ones may not."""
    return [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION] if device_type == "cpu" else [SDPBackend.MATH]
