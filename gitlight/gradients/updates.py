"""Updates of federated averaging (FedAvg, McMahan et al. 2017): what a client shares after local steps of SGD."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, UpdatesConfig
from gitlight.data.pair import Gradients
from gitlight.data.sampling import mixed_seed
from gitlight.errors import ConfigError
from gitlight.gradients.checks import check_images, check_labels, check_seeds
from gitlight.gradients.functional_gradients import FunctionalGradients
from gitlight.gradients.memory import functional_entries, leaks_at_once
from gitlight.gradients.precision import plain_autograd, plain_tensor

_METHODS = ("auto", "vmap", "loop")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}

# As in the gradient engine, beside a client's own weights and their reordered copy for grouped convolutions.
_PARAMETER_COPIES = 4

# Mean entries, results and parameters, of an operation on one client's local batch from which clients take turns on
# CPUs: calls for each cost little then, and what all clients' entries take leaves the caches (docs/decisions.md).
_LARGE_OPERATION = 64_000


def n_local_steps(settings: UpdatesConfig, client_batch_size: int) -> int:
    """Local steps of SGD that a client takes before it shares; 1: what it shares is its gradient.

    >>> n_local_steps(UpdatesConfig(epochs=2, batch_size=3), client_batch_size=8)
    6
    """
    return settings.epochs * -(-client_batch_size // (settings.batch_size or client_batch_size))


def smallest_local_batch(settings: UpdatesConfig, client_batch_size: int) -> int:
    """Images in a client's smallest local batch: the last of an epoch, where the others do not divide ``N``."""
    size = min(settings.batch_size or client_batch_size, client_batch_size)
    return client_batch_size % size or size


def describe_leak(settings: UpdatesConfig, client_batch_size: int) -> str:
    """What a client shares, in one line, for results.

    >>> describe_leak(UpdatesConfig(epochs=1), client_batch_size=4)
    'gradient'
    >>> describe_leak(UpdatesConfig(epochs=2, batch_size=3, learning_rate=0.05), client_batch_size=4)
    'update(epochs=2, batch_size=3, learning_rate=0.05)'
    """
    if n_local_steps(settings, client_batch_size) == 1:
        return "gradient"
    size = min(settings.batch_size or client_batch_size, client_batch_size)
    return f"update(epochs={settings.epochs}, batch_size={size}, learning_rate={settings.learning_rate:g})"


class LocalUpdates:
    """Makes ``(w_before − w_after) / (learning rate · steps)`` of each client after its local epochs of plain SGD.

    An update is in the units of a gradient, and is one where there is a single step. It is summed from the steps'
    gradients, which is the same number without the rounding of a small difference of large weights. Every client begins
    with the leaked model's own weights and shuffles its images afresh in each local epoch; the last batch of an epoch
    may be smaller, and weighs as one step, as in McMahan et al. 2017, Algorithm 1.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> settings = GradientsConfig(updates=UpdatesConfig(epochs=2, batch_size=3))
    >>> updates = LocalUpdates(network, Architecture.of(network, (3, 2, 2), 2), settings)
    >>> images, labels = torch.rand(5, 4, 3, 2, 2), torch.zeros(5, 4, dtype=torch.int64)
    >>> {name: tuple(update.shape) for name, update in updates(images, labels, seeds=torch.arange(5)).items()}
    {'1.weight': (5, 2, 12), '1.bias': (5, 2)}
    """

    def __init__(self, network: nn.Module, architecture: Architecture, settings: GradientsConfig) -> None:
        """Args: the leaked network, its architecture (for sizes), and local steps, method, memory limit and precision.

        Raises:
            ConfigError: ``gradients.method`` makes gradients at the leaked model's own weights alone.
        """
        if settings.method not in _METHODS:
            raise ConfigError(
                f"gradients.method: {settings.method} makes gradients at one set of weights, and clients that take "
                "several local steps (gradients.updates) have each their own. Give gradients.method=auto, vmap or loop."
            )
        self._network = network
        self._architecture = architecture
        self._settings = settings
        self._dtype = _DTYPES[settings.dtype]
        self._in_turn = FunctionalGradients(network, "loop")
        self._together = FunctionalGradients(network, "vmap", falls_back=settings.method != "vmap")

    def __call__(self, images: Tensor, labels: Tensor, seeds: Tensor) -> Gradients:
        """Updates of ``B`` clients; ``B`` may be 0.

        Args:
            images: ``(B, N, C, H, W)`` in [0, 1], of floating point; ``N`` is at least 1.
            labels: ``(B, N)`` int64, in ``range(n_classes)``.
            seeds: ``(B,)`` int64, which fix the order of each client's images, whatever batch it is computed in.

        Returns:
            Parameter name → ``(B, *parameter.shape)``, of the precision ``gradients.dtype``, detached.

        Raises:
            ConfigError: one client alone needs more than ``gradients.memory_limit_gb``; or ``gradients.method=vmap``
                and the model cannot be vectorised.
            DataError: images are none of the model's, labels of another shape or, on the CPU, no classes of it, or
                there is not one seed for each client.
        """
        check_images(images, self._architecture.image_shape)
        check_labels(images, labels, self._architecture.n_classes)
        check_seeds(images, seeds)
        in_turn = self._take_turns(images)
        gradients = self._in_turn if in_turn else self._together
        chunk = self._clients_per_chunk(len(images), images.shape[1])
        chunk = 1 if in_turn else chunk
        orders = self._orders(seeds, images.shape[1]).to(images.device)
        # For the fused kernels of attention vmap has no rule.
        with plain_autograd(images.device.type), sdpa_kernel(SDPBackend.MATH):
            # Tensors made in inference mode cannot be differentiated through; copies can.
            images = images.clone() if images.is_inference() else images.detach()
            labels = labels.clone() if labels.is_inference() else labels
            tensors = {
                name: plain_tensor(value, self._dtype)
                for name, value in (*self._network.named_parameters(), *self._network.named_buffers())
            }
            leaked = {name: tensors.pop(name) for name in self._architecture.parameter_shapes}
            result = {
                name: torch.zeros(len(images), *value.shape, dtype=self._dtype, device=images.device)
                for name, value in leaked.items()
            }
            for start in range(0, len(images), chunk):
                part = slice(start, start + chunk)
                sums = {name: total[part] for name, total in result.items()}
                self._descend(gradients, leaked, tensors, images[part], labels[part], orders[part], sums)
        return result

    def _orders(self, seeds: Tensor, n_images: int) -> Tensor:
        """The orders of all clients' images in each local epoch, ``(B, epochs, N)``."""
        generator = torch.Generator()
        orders = torch.empty(len(seeds), self._settings.updates.epochs, n_images, dtype=torch.int64)
        for client, seed in enumerate(seeds.tolist()):
            for epoch in range(orders.shape[1]):
                generator.manual_seed(mixed_seed("local order", seed, epoch))
                orders[client, epoch] = torch.randperm(n_images, generator=generator)
        return orders

    def _descend(
        self,
        gradients: FunctionalGradients,
        leaked: Gradients,
        others: Gradients,
        images: Tensor,
        labels: Tensor,
        orders: Tensor,
        sums: Gradients,
    ) -> None:
        """Take the local steps of a chunk of clients, and add their mean gradient to ``sums``, in place."""
        settings, n_images = self._settings.updates, images.shape[1]
        n_steps = n_local_steps(settings, n_images)
        weights: Gradients | None = None
        for positions in _local_batches(orders, settings.batch_size or n_images):
            batch = torch.arange(len(images), device=images.device)[:, None], positions
            examples = images[batch].to(self._dtype), labels[batch]
            if weights is None:
                # All clients begin with the same weights: one matrix product serves them all.
                made = gradients(leaked, others, *examples)
                weights = {name: value - settings.learning_rate * made[name] for name, value in leaked.items()}
            else:
                made = gradients(weights, others, *examples, own_weights=True)
                for name, value in weights.items():
                    value.sub_(made[name], alpha=settings.learning_rate)
            for name, total in sums.items():
                total.add_(made[name], alpha=1 / n_steps)

    def _take_turns(self, images: Tensor) -> bool:
        """Whether clients descend one after another, and not all of a chunk at once."""
        if self._settings.method != "auto":
            return self._settings.method == "loop"
        if images.device.type != "cpu":
            return False
        n_images = self._local_batch(images.shape[1])
        entries = n_images * self._architecture.n_activations + self._architecture.n_parameters
        return entries >= _LARGE_OPERATION * len(self._architecture.layers)

    def _local_batch(self, client_batch_size: int) -> int:
        return min(self._settings.updates.batch_size or client_batch_size, client_batch_size)

    def _clients_per_chunk(self, n_clients: int, client_batch_size: int) -> int:
        """How many clients descend at once, as `leaks_at_once` has it."""
        entry = torch.finfo(self._dtype).bits // 8
        n_images = self._local_batch(client_batch_size)
        results = n_clients * self._architecture.n_parameters * entry
        workspace = entry * (
            _PARAMETER_COPIES * self._architecture.n_parameters + n_images * functional_entries(self._architecture)
        )
        chunk = leaks_at_once(
            self._settings.memory_limit_gb,
            results,
            0,
            workspace,
            f"the updates of {n_clients} clients take",
            "and making one at a time",
        )
        return max(1, min(n_clients, chunk))


def _local_batches(orders: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Positions ``(B, ≤ batch_size)`` of every local batch, from orders ``(B, epochs, N)``."""
    for epoch in orders.unbind(1):
        yield from epoch.split(batch_size, dim=1)
