"""`Generator`: a module from gradients to images; and `PairFit`: what it estimates from pairs in closed form."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError


@dataclass(frozen=True)
class ParameterEstimate:
    """What a generator believes one leaked parameter to be.

    Attributes:
        value: of the parameter's shape.
        up_to_common_row: whether a vector added to every row (class) cannot be told from the gradients, as in the last
            linear layer under cross-entropy; distances are then taken between centred rows.
    """

    value: Tensor
    up_to_common_row: bool = False


class Reconstruction(NamedTuple):
    """What a generator makes of ``B`` leaks.

    Attributes:
        images: ``(B, N, C, H, W)`` in [0, 1]; NaN where there is none.
        verdicts: in words, what became of each leak; empty where a generator has nothing to say.
        labels: ``(B, N)`` int64, each image's, where the generator reads them off a leak itself.
    """

    images: Tensor
    verdicts: tuple[str, ...]
    labels: Tensor | None = None


class PairFit(Protocol):
    """An estimate from sums over pairs, made in one pass over the public pairs before training.

    Only sums cross between devices, so that a fit on any number of ranks equals the fit on one.
    """

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs to the sums.

        Args:
            gradients: ``(B, …)`` per parameter.
            images: ``(B, N, C, H, W)``.
            numbers: ``(B,)`` int64, each leak's number among the public ones, the same at every pass.
        """
        ...

    def sums(self) -> Sequence[Tensor]:
        """The sums so far, in the same tensors at every call.

        Other ranks' sums are added to these in place; set to zero, the fit begins anew.
        """
        ...

    def finish(self) -> None:
        """Turn the sums into the estimate and forget them."""
        ...


@dataclass(frozen=True)
class FitPairs:
    """Which pairs a `PairFit` is made of; by default each public leak once, as the channel sends it.

    Attributes:
        single_images: gradients of single images, whatever the client batches are of. Who can have gradients made of
            batches of their own images can have them made of one image, repeated.
        mirrored: every leak a second time, of its mirrored images, where ``data.horizontal_flip`` says that a mirrored
            image is as good as any.
        noise: lowest and highest level to draw the channel's Gaussian noise from, relative to the root mean square of
            a leak's entries; both zero: none. None: the channel's own levels.
        everywhere: all pairs on every device, for a fit that is more than its sums.
    """

    single_images: bool = False
    mirrored: bool = False
    noise: tuple[float, float] | None = None
    everywhere: bool = False


ALL_ONCE = FitPairs()


class FitOn:
    """A `PairFit` with the pairs that it wants; of a fit that wants some already, what is given here comes on top."""

    def __init__(self, fit: PairFit, **wanted: Any) -> None:
        """``wanted``: attributes of `FitPairs`."""
        self.pairs: FitPairs = replace(fit.pairs if isinstance(fit, FitOn) else ALL_ONCE, **wanted)
        self.name: str = fit.name if isinstance(fit, FitOn) else type(fit).__name__
        self.update, self.sums, self.finish = fit.update, fit.sums, fit.finish


class Generator(nn.Module, ABC):
    """Reconstructs images from gradients. Built from an `Architecture` alone.

    Attributes:
        architecture: structure of the leaked model.
        client_batch_size: ``N``, the number of images to reconstruct from one leak.
        refuses: whether it answers leaks that it cannot invert with NaN, on purpose; training leaves them out.
        one_gradient: whether it inverts one gradient exactly, and so takes no updates of several local steps.
        accepts_sketches: whether it can do with sketches of gradients.
        fitted: whether the closed-form parts have been estimated from pairs (kept in checkpoints).
    """

    fitted: Tensor
    refuses: ClassVar[bool] = False
    one_gradient: ClassVar[bool] = False
    accepts_sketches: ClassVar[bool] = False

    def __init__(self, architecture: Architecture, client_batch_size: int) -> None:
        super().__init__()
        if architecture.sketched and not self.accepts_sketches:
            raise ConfigError(
                "gradients.sketch.name: this generator needs whole gradients, and cannot use sketches. "
                "Give gradients.sketch.name=none, or a generator that learns from sketches, such as mlp or coarse."
            )
        self.architecture = architecture
        self.client_batch_size = client_batch_size
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        if architecture.sketched:
            digest = torch.frombuffer(bytearray(architecture.sketch_digest), dtype=torch.uint8)
            self.register_buffer("sketch_digest", digest)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Refuse a state that was trained on another sketch; called by `load_state_dict`."""
        stored = state_dict.get(f"{prefix}sketch_digest")
        if stored is not None and bytes(stored.tolist()) != self.architecture.sketch_digest:
            arguments[-1].append("gradients.sketch is not the one that the generator was trained on.")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @abstractmethod
    def forward(self, gradients: Gradients) -> Tensor:
        """Reconstruct: parameter name → ``(B, *shape)`` to images ``(B, N, C, H, W)`` in [0, 1]."""

    def reconstruct(self, gradients: Gradients) -> Reconstruction:
        """`forward`, with what the generator can say of each leak."""
        images: Tensor = self(gradients)
        return Reconstruction(images, ("",) * len(images))

    def fits(self) -> Iterable[PairFit]:
        """Closed-form estimates to make before training, one pass over the pairs each, in this order.

        Each is finished before the next is asked for, so that a fit may depend on those before.
        """
        return ()

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The leaked parameters that the generator has estimated, by name; empty if it estimates none."""
        return {}

    @property
    def has_own_loss(self) -> bool:
        """Whether it trains on `training_loss`, and not on its reconstructions' mean squared error (and `loss`)."""
        return False

    def training_loss(self, gradients: Gradients, images: Tensor) -> Tensor:
        """A loss of the generator's own to train on, where it has one.

        Args:
            gradients: parameter name → ``(B, *shape)``.
            images: ``(B, N, C, H, W)``, the images behind them.
        """
        raise NotImplementedError

    @property
    def couples_leaks(self) -> bool:
        """Whether its own loss is more than the mean of its leaks', and `coupled_loss` is to be trained on."""
        return False

    def coupled_loss(self, shares: Sequence[tuple[Gradients, Tensor]]) -> Tensor:
        """A loss of a batch that is divided into shares, on this device and on others; averaged over devices.

        Args:
            shares: gradients and images of each on this device, as of `training_loss`.
        """
        raise NotImplementedError

    def describe(self, leak: str = "gradient") -> str:
        """What a user should know of this generator for this architecture, in a line; empty if nothing.

        ``leak``: what a client shares, as `gitlight.gradients.updates.describe_leak` has it.
        """
        return ""

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)`` of one leak's reconstruction."""
        return (self.client_batch_size, *self.architecture.image_shape)


def clamp_passing_gradients(images: Tensor) -> Tensor:
    """Clamped to [0, 1]; the gradient passes as if it were not, so that an overshooting pixel still learns."""
    return images + (images.clamp(0, 1) - images).detach()
