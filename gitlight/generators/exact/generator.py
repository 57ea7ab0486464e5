"""Exact-GIT: back-propagation inverted with estimated weights, fitted layer by layer or trained by descent."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.config import ExactGeneratorConfig
from gitlight.data.pair import Gradients
from gitlight.errors import ArchitectureError, CheckpointError, ConfigError
from gitlight.generators.base import Generator, PairFit, ParameterEstimate, Reconstruction
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.descent import descend
from gitlight.generators.exact.generator_fits import FallbackFit, SecondFit
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.exact.layer_descent import LayerDescent
from gitlight.generators.exact.noise import rank_one
from gitlight.generators.exact.plan import plan_walk
from gitlight.generators.exact.solvability import Do, Known
from gitlight.generators.exact.status import Status, screen, worsen
from gitlight.generators.ridge import RidgeRegression
from gitlight.gradients.precision import full_float32
from gitlight.runs import checkpoint_path, load_checkpoint

_SECOND_MARGIN = 5.0
"""How far a leak's second singular value may lie above the largest among the pairs before it counts as an average."""


class ExactGenerator(Generator):
    """Exact-GIT (Chen and Liu 2025): the equations of back-propagation, with the leaked weights as its own parameters.

    ``fit: layerwise`` finds these weights in closed form from pairs (docs/inversion.md) and inverts with everything
    that is known of a layer. ``fit: descent`` is the paper's: they are trained on the reconstruction loss, through the
    gradient equations alone. Where the walk does not reach the image, a ridge regression from the deepest layer inputs
    that it does reach stands in, and every leak is reported as an estimate.
    """

    refuses = True
    one_gradient = True

    def __init__(self, architecture: Architecture, settings: ExactGeneratorConfig, client_batch_size: int = 1) -> None:
        """Plan the inversion.

        Raises:
            ArchitectureError: an operation of the leaked model has no inverse rule, or nothing of it can be inverted.
            ConfigError: settings that exact inversion cannot have.
        """
        super().__init__(architecture, client_batch_size)
        if client_batch_size > 1:
            raise ConfigError(
                f"data.client_batch_size: {client_batch_size}: exact inverts the gradient of one image; an average "
                "over several is not of that form. hybrid learns from averages: generator.name=hybrid."
            )
        if settings.parameters is not None:
            raise ConfigError(
                "generator.parameters: exact has the leaked model's own weights as parameters, and no width to choose."
            )
        self._settings = settings
        self.inversion = Inversion(architecture, settings.noise, client_batch_size, strict=True)
        self.known = self.inversion.plan.known
        self._reaches = IMAGE in self.known
        self.trained = nn.ParameterDict()
        self.layer_descent: LayerDescent | None = None
        if settings.fit == "descent":
            self._prepare_descent()
        self.features = [] if self._reaches else self._deepest_features()
        self.ridge: RidgeRegression | None = None
        if not self._reaches:
            if settings.fit == "descent" and settings.start is None:
                self._check_features_need_no_weight()
            n_features = sum(torch.Size(architecture[name].output_shape).numel() for name in self.features)
            self.ridge = RidgeRegression(n_features, torch.Size(architecture.image_shape).numel())
        self.largest_second: Tensor
        self.register_buffer("largest_second", torch.zeros((), dtype=torch.float64))

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, 1, C, H, W)`` in [0, 1]; NaN for leaks that cannot be inverted (`reconstruct` says why)."""
        return self.reconstruct(gradients).images

    def reconstruct(self, gradients: Gradients) -> Reconstruction:
        """Images, and in words what became of each leak."""
        first = next(iter(gradients.values()))
        status = self._screened(gradients)
        images = torch.full((len(first), 1, *self.architecture.image_shape), torch.nan, device=first.device)
        good = (status < Status.ROUNDED).nonzero().squeeze(1)
        if len(good):
            with torch.autocast(first.device.type, enabled=False), full_float32():
                leaks = {name: gradient[good] for name, gradient in gradients.items()}
                found, its_status = self._invert(leaks)
            status[good] = torch.maximum(status[good], its_status)
            usable = (status[good] < Status.ROUNDED) & torch.isfinite(found).flatten(1).all(dim=1)
            status[good] = worsen(status[good], ~usable & (status[good] < Status.ROUNDED), Status.SINGULAR)
            clamped = found + (found.clamp(0, 1) - found).detach()  # an overshooting pixel still learns
            picked = torch.where(usable.view(-1, 1, 1, 1), clamped, torch.nan)
            images = images.index_copy(0, good, picked.float().unsqueeze(1))
        return Reconstruction(images, tuple(Status(int(one)).words for one in status))

    def fits(self) -> Iterable[PairFit]:
        """The weights' fits, where they are not trained alone; and what tells one image's leak from an average."""
        return self._fits()

    @property
    def has_own_loss(self) -> bool:
        """For the objective ``layers``."""
        return self.layer_descent is not None

    @property
    def couples_leaks(self) -> bool:
        """For the same: equations are weighed and moments taken over all of a batch."""
        return self.has_own_loss

    def training_loss(self, gradients: Gradients, images: Tensor) -> Tensor:
        """`coupled_loss` of all leaks as one share."""
        return self.coupled_loss([(gradients, images)])

    def coupled_loss(self, shares: Sequence[tuple[Gradients, Tensor]]) -> Tensor:
        """Residuals of all layers' equations."""
        assert self.layer_descent is not None
        device = shares[0][1].device
        with torch.autocast(device.type, enabled=False), full_float32():
            self.inversion.keep_matched(self._trained())
            return self.layer_descent(self.inversion, shares, self._trained(detached=False))

    def describe(self, leak: str = "gradient") -> str:
        """What is reached, and what stops the walk."""
        steps = ", ".join(f"{step.layer.name} {step.way}" for step in self.inversion.steps) or "none is needed"
        if self.known.get(IMAGE) is Known.EXACT:
            return f"exact reaches the image, which the equations determine. Weights: {steps}."
        obstacles = list(self.inversion.plan.obstacles.items())
        first = f" The walk ends above {obstacles[0][0]}: {obstacles[0][1]}." if obstacles else ""
        what = (
            "an estimate of the image" if self._reaches else f"{', '.join(self.features)}, and a regression from there"
        )
        return f"exact reaches {what}. Weights: {steps}.{first}"

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The weights as fitted or as trained so far; the last layer's up to a row common to all classes."""
        if self._settings.fit == "layerwise":
            return self.inversion.estimated_parameters()
        head = set(self.architecture[self.architecture.output].parameters.values())
        return {name: ParameterEstimate(value, name in head) for name, value in self._trained().items()}

    def _trained(self, detached: bool = True) -> dict[str, Tensor]:
        """Parameter name → the weight as trained so far."""
        return {key.replace("/", "."): value.detach() if detached else value for key, value in self.trained.items()}

    def _fits(self) -> Iterator[PairFit]:
        start = self._settings.start
        found = {} if start is None or start == "layerwise" else self._weights_of(Path(start))
        if self._settings.fit == "layerwise" or start == "layerwise":
            yield from self.inversion.fits(self._settings.matching_epochs, found)
            found = self.inversion.weights()
        self._take(found)
        yield SecondFit(self)
        if self.ridge is not None:
            yield FallbackFit(self, self.ridge)

    def _invert(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, H, W)`` and statuses; gradients flow to trained weights."""
        shape = self.architecture.image_shape
        if self.layer_descent is not None:
            self.inversion.keep_matched(self._trained())
        elif self._settings.fit == "descent":
            weights = self._trained(detached=False)
            leaks = {name: gradient.double() for name, gradient in gradients.items()}
            found = descend(self.architecture, self.inversion.rules, self._plan, leaks, weights, self._settings.damping)
            return found, torch.full((len(found),), int(Status.ESTIMATE), device=found.device)
        with torch.no_grad():
            leaks_found = self.inversion.usable(gradients)
            result = self.inversion.find(leaks_found)
            if self.ridge is None:
                return result.values[IMAGE].value, result.status
            flat = self.ridge(torch.cat([result.values[name].value.flatten(1) for name in self.features], dim=1))
            return flat.reshape(-1, *shape), worsen(result.status, result.status == 0, Status.ESTIMATE)

    def _prepare_descent(self) -> None:
        architecture, rules = self.architecture, self.inversion.rules
        without = plan_walk(architecture, rules, (), 1, stacked=False)
        if not self.inversion.steps or without.known.get(IMAGE) is Known.EXACT:
            raise ConfigError(
                "generator.fit: descent has nothing to train: this leaked model is inverted without any weight. Use "
                "generator.fit=layerwise."
            )
        if self._settings.objective == "layers":
            self.layer_descent = LayerDescent(self.inversion)
            names = [name for step in self.inversion.steps for name in step.layer.parameters.values()]
        else:
            weights = {name for name, shape in architecture.parameter_shapes.items() if len(shape) > 1}
            self._plan = plan_walk(architecture, rules, weights, 1, stacked=False, through_estimates=True)
            if IMAGE not in self._plan.known:
                stopped = "; ".join(f"{name}: {why}" for name, why in self._plan.obstacles.items())
                raise ArchitectureError(
                    f"generator.objective: image needs a walk that reaches the image, which this leaked model stops. "
                    f"{stopped}. generator.fit=layerwise gives what can be had."
                )
            names = [
                action.layer.parameters["weight"]
                for action in self._plan.actions
                if action.do is Do.CARRY and IMAGE not in action.layer.inputs and "weight" in action.layer.parameters
            ]
        for name in names:
            shape = architecture.parameter_shapes[name]
            start = torch.zeros(shape, dtype=torch.float64)
            if len(shape) > 1:
                start.uniform_(-(shape[1:].numel() ** -0.5), shape[1:].numel() ** -0.5)
            self.trained[name.replace(".", "/")] = nn.Parameter(start)

    def _check_features_need_no_weight(self) -> None:
        """The regression is fitted before training, when no weight is known."""
        architecture = self.architecture
        known = plan_walk(architecture, self.inversion.rules, (), 1, stacked=False).known
        if deeper := [name for name in self.features if name not in known]:
            raise ConfigError(
                f"generator.fit: descent from untrained weights ends in no image here: the walk stops at "
                f"{self.features[0]}, and a regression from {', '.join(deeper)} needs fitted weights. Give "
                "generator.fit=layerwise, or generator.start=layerwise to train from fitted weights."
            )

    def _deepest_features(self) -> list[str]:
        """The last results that the walk finds on its way down, within what a ridge regression can take."""
        found = [
            action.layer.inputs[0]
            for action in self.inversion.plan.actions
            if action.do in (Do.SOLVE, Do.STACK, Do.BOUND)
            and isinstance(self.inversion.rules[action.layer.name], AffineRule)
        ]
        chosen: list[str] = []
        total = 0
        sizes = {name: torch.Size(self.architecture[name].output_shape).numel() for name in found}
        for name in reversed(found):
            if total + sizes[name] <= self._settings.ridge_features:
                total += sizes[name]
                chosen.append(name)
        if found and not chosen:
            smallest = min(sizes.values())
            raise ConfigError(
                f"generator.ridge_features: {self._settings.ridge_features} is less than any result has that the walk "
                f"finds. Give {smallest} or more."
            )
        if not chosen:
            raise ArchitectureError(
                "exact finds nothing of this leaked model's activations: its last layer is not a linear layer with a "
                "bias, and no parameter is added to activations. mlp handles every leaked model: generator.name=mlp."
            )
        return chosen

    def _screened(self, gradients: Gradients) -> Tensor:
        """Statuses by the gradients alone."""
        status = screen(gradients)
        head = self.architecture[self.architecture.output]
        rule = self.inversion.rules[head.name]
        if isinstance(rule, AffineRule) and rule.weight is not None and rule.reveals_delta() is not None:
            good = status == Status.EXACT
            if bool(good.any()):
                kept = rank_one(gradients[rule.weight][good])
                limit = _SECOND_MARGIN * self.largest_second.clamp_min(1e-4)
                status[good] = worsen(status[good], kept.structured & (kept.second > limit), Status.SEVERAL_IMAGES)
        return status

    def _weights_of(self, path: Path) -> dict[str, Tensor]:
        """Weights of another run of `exact`, whichever way they were found."""
        file = checkpoint_path(path, "last") if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(f"generator.start: {file} does not exist; give a run's folder or a checkpoint.")
        state = load_checkpoint(file)["state_dict"]
        prefix = "generator.trained."
        values = {k.removeprefix(prefix).replace("/", "."): v for k, v in state.items() if k.startswith(prefix)}
        if not values:
            values = self.inversion.weights_of(
                {k.removeprefix("generator.inversion."): v for k, v in state.items() if "generator.inversion." in k}
            )
        if not values:
            raise CheckpointError(f"generator.start: {file} holds no weights that generator.name=exact found.")
        for name, value in values.items():
            own = self.architecture.parameter_shapes.get(name)
            if own != value.shape:
                raise CheckpointError(
                    f"generator.start: {file} is of another leaked model: its {name} has shape {tuple(value.shape)}, "
                    f"and here {'there is none' if own is None else f'it has {tuple(own)}'}."
                )
        return values

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        for key, parameter in self.trained.items():
            name = key.replace("/", ".")
            if name in values:
                parameter.copy_(values[name])
