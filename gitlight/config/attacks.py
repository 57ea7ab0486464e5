"""Settings of attacks."""

from dataclasses import dataclass
from typing import Any

from gitlight.config.fields import redefined, setting


@dataclass
class AttackConfig:
    """What ``evaluate.py`` attacks with: by itself, the trained generator's one forward pass."""

    name: str = setting("generator", "attack")


@dataclass
class MatchingConfig(AttackConfig):
    """An iterative attack: the image whose gradient is nearest to the one that leaked."""

    name: str = setting("ig", "attack")
    knowledge: str = setting(
        "parameters",
        "the weights that gradients are computed with: parameters: the leaked model's own, as in the literature; "
        "recovered: those that generator.name=exact identified from pairs (attack.recovered_from)",
        choices=["parameters", "recovered"],
    )
    recovered_from: str | None = setting(
        None, "run folder of generator.name=exact whose weights attack.knowledge=recovered takes; null: this run's own"
    )
    prior: str | None = setting(
        None,
        "what the search starts from: the run folder of a trained generator, an image file, gray, or the name of "
        "another iterative attack, which is then run first; null: noise",
    )
    prior_settings: dict[str, Any] = setting({}, "settings of the attack that attack.prior names, its defaults else")
    prior_scaling: bool = setting(
        True,
        "from another's images: take steps in proportion to its error on public images held out (not lbfgs), and weigh "
        "total variation in proportion to that error squared (not gias); false: as from noise",
    )
    prior_weight: float = setting(
        0.0, "weight of the mean squared distance to the prior, at the start; falls to zero along a cosine", minimum=0
    )
    labels: str = setting(
        "recovered",
        "given: the attacker knows them; recovered: read off the last layer's gradient; optimised: searched for with "
        "the image",
        choices=["given", "recovered", "optimised"],
    )
    iterations: int = setting(4800, "steps of the optimiser at most", minimum=1)
    objective: str = setting(
        "cosine", "distance of gradients: one minus their cosine, or the squared Euclidean", choices=["cosine", "l2"]
    )
    layer_weights: str = setting(
        "equal",
        "what each parameter's part of the distance counts: equal; linear: from 1 at the image to 2 at the output; "
        "size: the inverse of its squared norm in the leak, over all parameters' mean",
        choices=["equal", "linear", "size"],
    )
    kink_width: float | None = setting(
        None,
        "width over which the second derivative of ReLUs is spread, in root mean squares of their inputs; 0: as if no "
        "unit ever switched; null: 0.03 from another's images with attack.prior_scaling, else 0",
        minimum=0,
    )
    total_variation: float = setting(0.1, "weight of the mean absolute difference of neighbouring pixels", minimum=0)
    batch_norm_statistics: float = setting(
        0.0, "weight of the distance between the images' batch norm statistics and the running ones", minimum=0
    )
    box: bool = setting(True, "keep pixels in [0, 1] after every step")
    optimizer: str = setting(
        "signed_adam", "optimiser; signed_adam: Adam on the signs", choices=["lbfgs", "adam", "signed_adam"]
    )
    step_size: float = setting(0.1, "step size, in pixel values; 1 for lbfgs", above=0)
    decay: str = setting(
        "step",
        "of the step size: constant; step: tenfold at 3/8, 5/8 and 7/8 of the iterations; cosine to zero",
        choices=["constant", "step", "cosine"],
    )
    restarts: int = setting(1, "searches from different noise, of which the nearest counts", minimum=1)
    tolerance: float = setting(
        1e-9,
        "a search ends when the squared distance over the squared norm of the leak (l2), or one minus the cosine, is "
        "below this",
        minimum=0,
    )
    dtype: str = setting("float32", "precision of the search", choices=["float32", "float64"])
    memory_limit_gb: float = setting(2.0, "memory for the searches that run at once, in GB", above=0)
    record_every: int = setting(50, "iterations between points of the trajectories", minimum=1)
    snapshots: list[int] = setting(
        [0, 10, 30, 100, 300, 1000, 3000],
        "iterations at which the first evaluation.n_pictures reconstructions are drawn, beside the last",
        minimum=0,
    )


@dataclass
class DLGConfig(MatchingConfig):
    """DLG (Zhu et al. 2019): Euclidean distance, L-BFGS, noise, labels searched for."""

    name: str = setting("dlg", "attack")
    labels: str = redefined(MatchingConfig, "labels", "optimised")
    iterations: int = redefined(MatchingConfig, "iterations", 1200)
    objective: str = redefined(MatchingConfig, "objective", "l2")
    total_variation: float = redefined(MatchingConfig, "total_variation", 0.0)
    box: bool = redefined(MatchingConfig, "box", False)
    optimizer: str = redefined(MatchingConfig, "optimizer", "lbfgs")
    step_size: float = redefined(MatchingConfig, "step_size", 1.0)
    decay: str = redefined(MatchingConfig, "decay", "constant")
    dtype: str = redefined(MatchingConfig, "dtype", "float64")


@dataclass
class IDLGConfig(DLGConfig):
    """iDLG (Zhao et al. 2020): DLG with the label read off the gradient."""

    name: str = setting("idlg", "attack")
    labels: str = redefined(MatchingConfig, "labels", "recovered")


@dataclass
class GradInversionConfig(MatchingConfig):
    """After GradInversion (Yin et al. 2021): batch norm statistics as a regulariser, for client batches."""

    name: str = setting("gradinversion", "attack")
    objective: str = redefined(MatchingConfig, "objective", "l2")
    layer_weights: str = redefined(MatchingConfig, "layer_weights", "size")
    total_variation: float = redefined(MatchingConfig, "total_variation", 0.01)
    batch_norm_statistics: float = redefined(MatchingConfig, "batch_norm_statistics", 0.01)
    optimizer: str = redefined(MatchingConfig, "optimizer", "adam")
    decay: str = redefined(MatchingConfig, "decay", "cosine")


@dataclass
class GIASConfig(MatchingConfig):
    """GIAS (Jeon et al. 2021): through an image prior's latent space first, then through that prior's weights."""

    name: str = setting("gias", "attack")
    image_prior: str | None = setting(None, "run folder of task=image_prior to search through")
    latent_share: float = setting(
        0.5, "share of the iterations that search for latents; the others, for weights", minimum=0, maximum=1
    )
    latent_weight: float = setting(0.001, "weight of the mean squared latent", minimum=0)
    weights_step_size: float = setting(0.001, "step size of the search for weights", above=0)
    total_variation: float = redefined(MatchingConfig, "total_variation", 0.01)
    optimizer: str = redefined(MatchingConfig, "optimizer", "adam")
    step_size: float = setting(0.1, "step size of the search for latents", above=0)
