"""What an iterative attack is given: weights, labels, and something to start from."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, resize

from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.iterative import Prior
from gitlight.config import Config, MatchingConfig
from gitlight.data.datamodule import GradientPairDataModule
from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError
from gitlight.gradients.updates import describe_leak
from gitlight.runs import run_folder
from gitlight.trained import generator_of_run

_GRAY = "gray"


class Knowledge(NamedTuple):
    """What an attack is given.

    Attributes:
        function: the leaked model as the attack knows it.
        prior: what the search starts from; None: noise.
        items: for ``metrics.json``.
    """

    function: LeakedFunction
    prior: Prior | None
    items: tuple[str, ...]


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
    if settings.labels == "given":
        items.append("labels")
    prior, from_pairs = _prior(config, settings, datamodule, device)
    if prior is not None:
        items.append("prior")
    if from_pairs and "pairs" not in items:
        items.append("pairs")
    order = ("architecture", "pairs", "parameters", "labels", "prior")
    return Knowledge(LeakedFunction(architecture, weights), prior, tuple(item for item in order if item in items))


def _recovered(
    config: Config, settings: MatchingConfig, datamodule: GradientPairDataModule, device: torch.device
) -> dict[str, Tensor]:
    folder = run_folder(config) if settings.recovered_from is None else Path(settings.recovered_from)
    generator, name = generator_of_run(
        folder, "attack.recovered_from", datamodule.architecture, datamodule.leaked_model.fingerprint(), 1, device
    )
    found = {key: estimate.value for key, estimate in generator.estimated_parameters().items()}
    if not found:
        raise ConfigError(
            f"attack.recovered_from: {folder} is a run of {name}, which has identified no weight of this leaked model. "
            "Give a run of generator.name=exact (configs/lenet_exact.yaml)."
        )
    return found


def _prior(
    config: Config, settings: MatchingConfig, datamodule: GradientPairDataModule, device: torch.device
) -> tuple[Prior | None, bool]:
    """What the search starts from, and whether it rests on pairs."""
    named, n_images, shape = settings.prior, config.data.client_batch_size, datamodule.architecture.image_shape
    if named is None:
        return None, False
    path = Path(named)
    if path.is_dir():
        generator, _ = generator_of_run(
            path, "attack.prior", datamodule.architecture, datamodule.leaked_model.fingerprint(), n_images, device
        )

        def reconstructed(gradients: Gradients) -> Tensor:
            with torch.no_grad():
                return generator.reconstruct(gradients).images

        return reconstructed, True
    image = torch.full(shape, 0.5) if named == _GRAY else _image_file(path, shape)
    return (lambda gradients: image.expand(len(next(iter(gradients.values()))), n_images, *shape)), False


def _image_file(path: Path, shape: tuple[int, int, int]) -> Tensor:
    if not path.exists():
        raise ConfigError(
            f"attack.prior: {path} does not exist. Give a run's folder, an image file, gray, or null for noise."
        )
    try:
        with Image.open(path) as image:
            pixels = pil_to_tensor(image.convert("RGB" if shape[0] == 3 else "L")).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"attack.prior: {path} is neither a run's folder nor an image: {error}") from error
    found: Tensor = resize(pixels, list(shape[1:]), antialias=True).clamp(0, 1)
    return found
