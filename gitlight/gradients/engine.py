"""The gradient engine: exact gradients, one per leak, on the device where the images are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError
from gitlight.gradients.functional import functional
from gitlight.gradients.precision import full_float32

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Measured on LeNet (docs/decisions.md): the backward pass of vmap holds about three times the activations
# (their values, their gradients, and the unfolded input of one convolution) and two copies of the gradient.
_ACTIVATION_COPIES = 3
_GRADIENT_COPIES = 2


class GradientEngine:
    """Makes the gradient of the mean cross-entropy of each client batch with respect to the leaked parameters.

    The parameters are read anew at every call, so a leaked model that moves or trains between calls is followed.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> engine = GradientEngine(network, Architecture.of(network, (3, 2, 2), 2), GradientsConfig())
    >>> gradients = engine(torch.rand(5, 1, 3, 2, 2), torch.zeros(5, 1, dtype=torch.int64))
    >>> {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    {'1.weight': (5, 2, 12), '1.bias': (5, 2)}
    """

    def __init__(self, network: nn.Module, architecture: Architecture, settings: GradientsConfig) -> None:
        """Args: the leaked network, its architecture (for sizes), and method, memory limit and precision."""
        self._network = network
        self._names = tuple(architecture.parameter_shapes)
        self._architecture = architecture
        self._settings = settings
        self._dtype = _DTYPES[settings.dtype]

    def __call__(self, images: Tensor, labels: Tensor) -> Gradients:
        """Gradients of ``B`` leaks.

        Args:
            images: ``(B, N, C, H, W)`` in [0, 1].
            labels: ``(B, N)`` int64.

        Returns:
            Parameter name → ``(B, *parameter.shape)``, of the precision ``gradients.dtype``, detached.

        Raises:
            ConfigError: one leak alone needs more than ``gradients.memory_limit_gb``.
        """
        chunk = self._leaks_per_chunk(len(images), images.shape[1])
        method = _loop if self._settings.method == "loop" else _vmap
        # Lightning validates under inference mode by default; gradients need autograd, and ordinary tensors.
        with self._plain_autograd(images.device.type):
            images = images.clone() if images.is_inference() else images
            labels = labels.clone() if labels.is_inference() else labels
            tensors = dict(self._network.named_parameters()) | dict(self._network.named_buffers())
            tensors = {
                name: value.detach().to(self._dtype) if value.is_floating_point() else value.detach()
                for name, value in tensors.items()
            }
            attacked = {name: tensors.pop(name) for name in self._names}
            forward = functional(self._network)

            def loss(parameters: dict[str, Tensor], client_images: Tensor, client_labels: Tensor) -> Tensor:
                logits = forward(parameters | tensors, client_images)
                return nn.functional.cross_entropy(logits, client_labels)

            gradient = grad(loss)
            result = {
                name: torch.empty(len(images), *value.shape, dtype=self._dtype, device=images.device)
                for name, value in attacked.items()
            }
            for start in range(0, len(images), chunk):
                part = slice(start, start + chunk)
                made = method(gradient, attacked, images[part].to(self._dtype), labels[part])
                for name in self._names:
                    result[name][part] = made[name]
        return result

    @staticmethod
    @contextmanager
    def _plain_autograd(device_type: str) -> Iterator[None]:
        """Autograd on, mixed precision and TF32 off, wherever the engine is called from.

        Attention is made of plain matrix products, which `full_float32` governs and vmap has rules for. For the fused
        kernel of CPUs vmap has none: it would warn, and compute one leak at a time.
        """
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False),
            full_float32(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield

    def _leaks_per_chunk(self, n_leaks: int, client_batch_size: int) -> int:
        """How many leaks are differentiated at once, so that results and workspace stay within the limit."""
        entry = torch.finfo(self._dtype).bits // 8
        limit = self._settings.memory_limit_gb * 1e9
        results = n_leaks * self._architecture.n_parameters * entry
        workspace = entry * (
            _GRADIENT_COPIES * self._architecture.n_parameters
            + _ACTIVATION_COPIES * client_batch_size * self._architecture.n_activations
        )
        if results + workspace > limit:
            raise ConfigError(
                f"gradients.memory_limit_gb: {self._settings.memory_limit_gb:g} GB is too little: the gradients of "
                f"{n_leaks} leaks take {results / 1e9:.3g} GB and making one at a time {workspace / 1e9:.3g} GB. "
                "Raise gradients.memory_limit_gb or lower data.batch_size."
            )
        return max(1, min(n_leaks, int((limit - results) // workspace)))


_Gradient = Callable[[dict[str, Tensor], Tensor, Tensor], Gradients]


def _vmap(gradient: _Gradient, parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Gradients:
    # randomness="different": a model with active dropout draws a mask per client batch, as separate clients would.
    return vmap(gradient, in_dims=(None, 0, 0), randomness="different")(parameters, images, labels)


def _loop(gradient: _Gradient, parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Gradients:
    made = [gradient(parameters, *client) for client in zip(images, labels, strict=True)]
    return {name: torch.stack([one[name] for one in made]) for name in parameters}
