"""gitlight: what do a model's gradients give away about the images it was trained on?

`train`, `evaluate` and `identify` run what the commands run; the other names are the parts they are made of.
Names are imported when first used, so that ``import gitlight`` stays fast.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Architecture": "gitlight.architecture",
    "Config": "gitlight.config",
    "GITModule": "gitlight.training",
    "GradientEngine": "gitlight.gradients.engine",
    "GradientPair": "gitlight.data.pair",
    "GradientPairDataModule": "gitlight.data.pair_datamodule",
    "LeakedModel": "gitlight.leaked.model",
    "evaluate": "gitlight.evaluation",
    "identify": "gitlight.identifiability.identification",
    "load_config": "gitlight.config_loading",
    "train": "gitlight.training",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gitlight' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
