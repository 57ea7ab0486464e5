"""What an iterative attack is given: weights, labels, and something to start from."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, resize

from gitlight.attacks import ATTACKS
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.iterative import IterativeAttack, Prior
from gitlight.attacks.labels import LabelReader
from gitlight.attacks.searches import build_search, check_image_prior
from gitlight.config import Config, GIASConfig, MatchingConfig
from gitlight.config_validation import component_settings
from gitlight.data.pair import Gradients
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.errors import ConfigError
from gitlight.generators.base import Reconstruction
from gitlight.gradients.updates import describe_leak
from gitlight.metrics import match
from gitlight.runs import run_folder
from gitlight.trained import generator_of_run, warn_of_other_images

log = logging.getLogger(__name__)

_GRAY = "gray"
_N_TRIED, _N_SEARCHED = 64, 8
"""Public images that a prior is tried on: a trained generator, and a search, which takes seconds for each."""

_OF_THE_LAST_ATTACK = (
    "name", "prior", "prior_settings", "prior_weight", "prior_scaling", "knowledge", "recovered_from", "record_every",
    "snapshots",
)  # fmt: skip


class Knowledge(NamedTuple):
    """What an attack is given.

    Attributes:
        search: the attack, with what it is given.
        read_labels: reads labels off leaks.
        items: for ``metrics.json``.
    """

    search: IterativeAttack
    read_labels: LabelReader
    items: tuple[str, ...]


class _Start(NamedTuple):
    """What a search starts from.

    Attributes:
        prior: makes it; None: noise.
        items: what it rests on.
        error: its root mean squared error on public images held out, where that was tried.
    """

    prior: Prior | None = None
    items: tuple[str, ...] = ()
    error: float | None = None


def check_attack(config: Config) -> MatchingConfig:
    """The settings of an iterative attack.

    Raises:
        ConfigError: the leaks are not ones whose gradient can be matched.
    """
    settings = config.attack
    assert isinstance(settings, MatchingConfig)
    leak = describe_leak(config.gradients.updates, config.data.client_batch_size)
    if leak != "gradient":
        raise ConfigError(
            f"attack.name: {settings.name} matches gradients; an update of several local steps, {leak}, is none. "
            "Give gradients.updates.epochs=1 gradients.updates.batch_size=null, or attack with a trained generator: "
            "attack=generator."
        )
    if config.gradients.sketch.name != "none":
        raise ConfigError(
            f"attack.name: {settings.name} matches whole gradients, not sketches. Give gradients.sketch.name=none."
        )
    if config.leaked.batch_norm == "batch":
        raise ConfigError(
            f"attack.name: {settings.name} knows batch norm by running statistics only. Give leaked.batch_norm=running."
        )
    check_image_prior(settings)
    _earlier_attack(settings)
    if settings.prior_weight > 0 and settings.prior is None:
        raise ConfigError("attack.prior_weight: there is no prior to stay near to. Give attack.prior.")
    if settings.batch_norm_statistics > 0 and settings.knowledge == "recovered":
        raise ConfigError(
            "attack.batch_norm_statistics: running statistics are the leaked model's, and attack.knowledge=recovered "
            "knows what pairs give. Give attack.batch_norm_statistics=0."
        )
    return settings


def knowledge_of(config: Config, datamodule: GradientPairDataModule, device: torch.device) -> Knowledge:
    """What the attack of a config is given.

    Raises:
        ConfigError, CheckpointError: a run or file that it names is missing or does not fit.
    """
    settings = check_attack(config)
    architecture = datamodule.architecture
    items = ["architecture"]
    if settings.knowledge == "parameters":
        network = datamodule.leaked_model.network
        weights = {name: value.detach() for name, value in (*network.named_parameters(), *network.named_buffers())}
        items.append("parameters")
    else:
        weights = _recovered(config, settings, datamodule, device)
        items.append("pairs")
    needed = {name for layer in architecture.layers for name in (*layer.parameters.values(), *layer.constants.values())}
    if missing := sorted(needed - set(weights)):
        raise ConfigError(
            f"attack.knowledge: {settings.knowledge}: no value is known of {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}, without which no gradient can be computed."
            + (" Give attack.knowledge=parameters." if settings.knowledge == "recovered" else "")
        )
    n_images = config.data.client_batch_size
    read_labels = LabelReader.of(datamodule, device)
    if settings.labels == "given":
        items.append("labels")
    elif n_images > 1 and read_labels.readable and (settings.labels == "recovered" or settings.prior is not None):
        items.append("pairs")
    for folder in _image_priors(settings):
        warn_of_other_images("attack.image_prior", folder, config)
    function = LeakedFunction(architecture, weights)
    start = _start(config, settings, function, datamodule, device, read_labels)
    items += start.items
    search = build_search(
        settings, architecture, function, n_images, config.seed, start.prior, device, read_labels, start.error
    )
    if start.error is not None:
        log.info(
            "the prior's root mean squared error on public images is %.3g: steps of %.2g, total variation weighs %.2g, "
            "kinks of ReLUs are %.2g wide",
            start.error,
            search.settings_from_prior.step_size,
            search.settings_from_prior.total_variation,
            search.settings_from_prior.kink_width,
        )
    if isinstance(settings, GIASConfig):
        items.append("image_prior")
    order = ("architecture", "pairs", "parameters", "labels", "image_prior", "prior")
    return Knowledge(search, read_labels, tuple(item for item in order if item in items))


def _image_priors(settings: MatchingConfig) -> list[Path]:
    """The runs whose image prior an attack, and the one before it, search through."""
    named = [s.image_prior for s in (settings, _earlier_attack(settings)) if isinstance(s, GIASConfig)]
    return [Path(name) for name in named if name is not None]


def _recovered(
    config: Config, settings: MatchingConfig, datamodule: GradientPairDataModule, device: torch.device
) -> dict[str, Tensor]:
    folder = run_folder(config) if settings.recovered_from is None else Path(settings.recovered_from)
    generator, name = generator_of_run(
        folder, "attack.recovered_from", datamodule.architecture, datamodule.leaked_model.fingerprint(), None, device
    )
    found = {key: estimate.value for key, estimate in generator.estimated_parameters().items()}
    if not found:
        raise ConfigError(
            f"attack.recovered_from: {folder} is a run of {name}, which has identified no weight of this leaked model. "
            "Give a run of generator.name=exact (configs/lenet_exact.yaml)."
        )
    return found


def _start(
    config: Config,
    settings: MatchingConfig,
    function: LeakedFunction,
    datamodule: GradientPairDataModule,
    device: torch.device,
    read_labels: LabelReader,
) -> _Start:
    named, n_images, shape = settings.prior, config.data.client_batch_size, datamodule.architecture.image_shape
    if named is None:
        return _Start()
    earlier = _earlier_attack(settings)
    if earlier is not None:
        search = build_search(
            earlier, datamodule.architecture, function, n_images, config.seed, None, device, read_labels
        )

        def found(gradients: Gradients, numbers: Tensor, labels: Tensor | None) -> Reconstruction:
            known = labels if earlier.labels == "given" else None
            parts = []
            for rows in torch.arange(len(numbers)).split(search.at_once):
                own = {name: gradient[rows] for name, gradient in gradients.items()}
                parts.append(search.search(own, numbers[rows], None if known is None else known[rows]).images)
            return Reconstruction(torch.cat(parts), ("",) * len(numbers))

        error = _error(found, datamodule, device, _N_SEARCHED) if _scaled(settings) else None
        return _Start(found, ("image_prior", "prior") if isinstance(earlier, GIASConfig) else ("prior",), error)
    path = Path(named)
    if path.is_dir():
        warn_of_other_images("attack.prior", path, config)
        generator, _ = generator_of_run(
            path, "attack.prior", datamodule.architecture, datamodule.leaked_model.fingerprint(), n_images, device
        )

        def reconstructed(gradients: Gradients, numbers: Tensor, labels: Tensor | None) -> Reconstruction:
            with torch.no_grad():
                return generator.reconstruct(gradients)

        error = _error(reconstructed, datamodule, device, _N_TRIED) if _scaled(settings) else None
        return _Start(reconstructed, ("pairs", "prior"), error)
    image = torch.full(shape, 0.5) if named == _GRAY else _image_file(path, shape)

    def same(gradients: Gradients, numbers: Tensor, labels: Tensor | None) -> Reconstruction:
        return Reconstruction(image.expand(len(numbers), n_images, *shape), ("",) * len(numbers))

    return _Start(same, ("prior",))


def _earlier_attack(settings: MatchingConfig) -> MatchingConfig | None:
    """The settings of the attack that ``attack.prior`` names, if it names one.

    Raises:
        ConfigError: ``attack.prior_settings`` are not that attack's, or there is none to have them.
    """
    named = settings.prior
    if named not in ATTACKS.names() or not issubclass(ATTACKS[named].settings, MatchingConfig):
        if settings.prior_settings:
            raise ConfigError(
                f"attack.prior_settings: attack.prior is {named}, and only an iterative attack's name has settings."
            )
        return None
    place = "attack.prior_settings"
    for key in settings.prior_settings:
        if key in _OF_THE_LAST_ATTACK:
            raise ConfigError(
                f"{place}.{key}: the attack before starts from noise, knows what this one knows, and leaves only "
                "its images. Leave it out."
            )
    sources = {f"{place}.{key}": "in the config" for key in settings.prior_settings}
    earlier = component_settings(ATTACKS, {**settings.prior_settings, "name": named}, place, sources)
    assert isinstance(earlier, MatchingConfig)
    if earlier.labels == "given" and settings.labels != "given":
        raise ConfigError(f"{place}.labels: given, and attack.labels is {settings.labels}. Give attack.labels=given.")
    if earlier.batch_norm_statistics > 0 and settings.knowledge == "recovered":
        raise ConfigError(
            f"{place}.batch_norm_statistics: running statistics are the leaked model's, and attack.knowledge=recovered "
            "knows what pairs give. Give 0."
        )
    if settings.labels == "given" and "labels" not in settings.prior_settings:
        earlier = replace(earlier, labels="given")
    check_image_prior(earlier)
    return earlier


def _scaled(settings: MatchingConfig) -> bool:
    """Whether searches from the prior's images are other than from noise; GIAS does not start from pixels."""
    return settings.prior_scaling and not isinstance(settings, GIASConfig)


def _error(prior: Prior, datamodule: GradientPairDataModule, device: torch.device, n: int) -> float | None:
    """Root mean squared error on ``n`` public images held out; None where there is no image."""
    squares = []
    for pair in datamodule.held_out_pairs(device, max(n, datamodule.settings.client_batch_size)):
        found = match(prior(pair.gradients, pair.indices[:, 0], pair.labels).images, pair.images)
        error = (found - pair.images).square().flatten(1).mean(dim=1)
        squares.append(error[torch.isfinite(error)])
    errors = torch.cat(squares) if squares else torch.zeros(0)
    return float(errors.mean().sqrt()) if len(errors) else None


def _image_file(path: Path, shape: tuple[int, int, int]) -> Tensor:
    if not path.exists():
        raise ConfigError(
            f"attack.prior: {path} does not exist. Give a run's folder, an image file, gray, the name of an "
            "iterative attack, or null for noise."
        )
    try:
        with Image.open(path) as image:
            pixels = pil_to_tensor(image.convert("RGB" if shape[0] == 3 else "L")).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"attack.prior: {path} is neither a run's folder nor an image: {error}") from error
    found: Tensor = resize(pixels, list(shape[1:]), antialias=True).clamp(0, 1)
    return found
