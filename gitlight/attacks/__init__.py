"""Attacks: what turns leaks into images when a run is evaluated."""

from gitlight.config import AttackConfig, DLGConfig, GIASConfig, GradInversionConfig, IDLGConfig, MatchingConfig
from gitlight.registry import Registry

_SEARCH = "gitlight.attacks.iterative:IterativeAttack"

ATTACKS = Registry("attack", "attack")
ATTACKS.register("generator", "gitlight.generators.base:Generator", AttackConfig)
ATTACKS.register("dlg", _SEARCH, DLGConfig)
ATTACKS.register("idlg", _SEARCH, IDLGConfig)
ATTACKS.register("ig", _SEARCH, MatchingConfig)
ATTACKS.register("gias", "gitlight.attacks.gias:GIAS", GIASConfig)
ATTACKS.register("gradinversion", _SEARCH, GradInversionConfig)
