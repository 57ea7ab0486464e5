"""What the stages of Hybrid-GIT see, where not all has room."""

from collections.abc import Sequence
from math import isqrt, prod

from gitlight.architecture import IMAGE, Architecture
from gitlight.errors import ConfigError
from gitlight.generators.exact.features import Feature
from gitlight.generators.local_regression import LocalRegression, stride_of


def smallest_parameters(names: Sequence[str], architecture: Architecture, limit: int) -> tuple[str, ...]:
    """Of these parameters, the smallest whose gradients have at most ``limit`` entries together; in their order."""
    shapes = architecture.gradient_shapes
    chosen: set[str] = set()
    total = 0
    for name in sorted(dict.fromkeys(names), key=lambda name: shapes[name].numel()):
        total += shapes[name].numel()
        if total > limit:
            break
        chosen.add(name)
    return tuple(name for name in dict.fromkeys(names) if name in chosen)


def deepest_that_fit(shapes: Sequence[tuple[int, ...]], limit: int) -> dict[int, tuple[int, ...]]:
    """Positions and shapes of the last features, the nearest to the image, with at most ``limit`` entries in all.

    If not even one fits, the deepest map is averaged down until it does.

    Raises:
        ConfigError: nor does that, averaged to one point.

    >>> deepest_that_fit([(12, 8, 8), (12, 8, 8), (12, 16, 16)], 4000)
    {1: (12, 8, 8), 2: (12, 16, 16)}
    >>> deepest_that_fit([(12, 56, 56)], 4000)
    {0: (12, 18, 18)}
    """
    chosen: dict[int, tuple[int, ...]] = {}
    total = 0
    for position in reversed(range(len(shapes))):
        if total + prod(shapes[position]) <= limit:
            chosen = {position: shapes[position], **chosen}
            total += prod(shapes[position])
    if not chosen and len(shapes[-1]) == 3 and shapes[-1][0] <= limit:
        side = isqrt(limit // shapes[-1][0])
        chosen[len(shapes) - 1] = (shapes[-1][0], min(side, shapes[-1][1]), min(side, shapes[-1][2]))
    if not chosen:
        averaged = shapes[-1][:1] if len(shapes[-1]) == 3 else ()
        raise ConfigError(
            f"generator.linear_start_features: {limit} is less than any feature of this leaked model has. Give at "
            f"least {min((*map(prod, shapes), *averaged))}."
        )
    return chosen


def deepest_for_local_start(architecture: Architecture, features: Sequence[Feature]) -> int | None:
    """Position of the feature nearest to the image of which a `LocalRegression` can be made, and which is exact."""
    for position in reversed(range(len(features))):
        feature = features[position]
        if feature.exact and feature.result != IMAGE:
            stride = stride_of(architecture, feature.result)
            if LocalRegression.is_possible(feature.shape, architecture.image_shape, stride):
                return position
    return None
