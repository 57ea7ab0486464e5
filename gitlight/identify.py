"""What an architecture leaks: ``python -m gitlight.identify CONFIG.yaml [key.path=value ...] [--json PATH]``."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from gitlight.cli import identify_command
from gitlight.config import Config

if TYPE_CHECKING:
    from gitlight.identifiability.report import IdentifiabilityReport


class _CallableModule(ModuleType):
    """`gitlight.identify` is a function of this name, and becomes this module once that is imported: the same then."""

    def __call__(self, config: Config) -> "IdentifiabilityReport":
        from gitlight.identifiability.identification import identify

        return identify(config)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(identify_command(sys.argv[1:]))
