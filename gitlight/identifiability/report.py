"""`IdentifiabilityReport`: what an architecture leaks, layer by layer; as text and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from textwrap import wrap
from typing import Any

SCHEMA = 1


class Verdict(StrEnum):
    """What the equations tell of a layer's input."""

    GRADIENT = "exact from the gradient alone"
    WEIGHTS = "exact once the weights are known"
    HERE = "determined at the images drawn, but not for every image"
    ABOVE = "no better than the estimate above it"
    UNDERDETERMINED = "underdetermined"
    OPEN = "not known to be determined"
    NOT_REACHED = "not reached"

    @property
    def exact(self) -> bool:
        """Whether the attack finds the input to rounding."""
        return self in (Verdict.GRADIENT, Verdict.WEIGHTS)


@dataclass(frozen=True)
class LayerReport:
    """One layer with a weight. Its unknowns are the entries of its input.

    Attributes:
        name: the layer's.
        kind: of operation.
        unknowns: entries of its input.
        gradient_equations: entries of its weight's gradient.
        forward_equations: entries of its output that are known before the activation if all above is; mean over images.
        gradient_rank: of the gradient equations alone; None: too large to compute.
        stacked_rank: of gradient and forward equations together; None: too large to compute.
        condition: condition number of the system that the attack solves, without the directions that it leaves open.
        noise_amplification: error of an input entry for errors of relative size 1 in the gradient, both root mean
            squares; infinite where directions are open; None where nothing was computed.
        reached: whether ``δ`` of its output is known.
        verdict: what follows.
        open: unknowns less the rank of the system that the attack solves, where that is underdetermined.
        reason: why it is not reached, or what takes over where it is underdetermined; may be empty.
    """

    name: str
    kind: str
    unknowns: int
    gradient_equations: int
    forward_equations: int
    gradient_rank: int | None
    stacked_rank: int | None
    condition: float | None
    noise_amplification: float | None
    reached: bool
    verdict: Verdict
    open: int
    reason: str

    @property
    def words(self) -> str:
        """The verdict in full, without the reason."""
        by = f" by {self.open} of {self.unknowns}" if self.verdict is Verdict.UNDERDETERMINED else ""
        return f"{self.verdict}{by}"


@dataclass(frozen=True)
class IdentifiabilityReport:
    """What one gradient of an architecture tells of the image it was made of, before any attack is run.

    Attributes:
        leaked: name of the leaked model.
        activation: its activation function.
        image: ``(C, H, W)``.
        n_classes: number of labels.
        n_images: random images that the ranks are medians over.
        image_is: ``exact``, ``estimate`` or ``not reached``.
        headline: what an attacker gets of the image, and what it takes, sentence by sentence.
        layers: from the output to the image.
        lost: operations without a weight that lose information: names, kind and what is lost.
        saturated: activation → mean share of its units that float32 cannot tell from their bounds.
        notes: what was assumed.
    """

    leaked: str
    activation: str
    image: tuple[int, int, int]
    n_classes: int
    n_images: int
    image_is: str
    headline: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    lost: tuple[tuple[tuple[str, ...], str, str], ...]
    saturated: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """The report as JSON.

        ::

            {"schema": 1, "leaked": "lenet", "activation": "sigmoid", "image": [3, 32, 32], "n_classes": 10,
             "n_images": 3, "image_is": "exact", "headline": ["…"],
             "layers": [{"name": "linear", "kind": "linear", "unknowns": 768, "gradient_equations": 7680,
                         "forward_equations": 0, "gradient_rank": 768, "stacked_rank": 768, "condition": 1.0,
                         "noise_amplification": 0.9, "reached": true, "verdict": "exact from the gradient alone",
                         "open": 0, "reason": ""}],
             "lost": [{"layers": ["pool"], "kind": "adaptive_avg_pool2d", "what": "…"}],
             "saturated": {"activation1": 0.0}, "notes": []}

        Ranks, conditions and amplifications that were not computed are null; an infinite one is ``"infinite"``.
        """
        plain: dict[str, Any] = {"schema": SCHEMA} | asdict(self)
        for layer in plain["layers"]:
            for key in ("condition", "noise_amplification"):
                layer[key] = "infinite" if layer[key] == math.inf else layer[key]
        plain["lost"] = [{"layers": names, "kind": kind, "what": what} for names, kind, what in self.lost]
        return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """The report for people: sentences, a table, and what else they need to read it."""
        shape = " × ".join(map(str, self.image))
        reasons = list(dict.fromkeys(layer.reason for layer in self.layers if layer.reason))
        rows = [_HEADER, *(_row(layer, reasons) for layer in self.layers)]
        lines = [
            f"{self.leaked} ({self.activation}), images {shape}, {self.n_classes} classes",
            "",
            *(line for sentence in self.headline for line in wrap(sentence, _WIDTH)),
            "",
            *_aligned(rows),
            "",
            *(
                line
                for number, reason in enumerate(reasons, start=1)
                for line in wrap(f"[{number}] {reason}", _WIDTH, subsequent_indent="    ")
            ),
            *([""] if reasons else []),
        ]
        if self.lost:
            lost = (f"{kind} ({_names(names)}): {what}" for names, kind, what in self.lost)
            wrapped = (wrap(one, _WIDTH, initial_indent="  ", subsequent_indent="    ") for one in lost)
            lines += ["Lost on the way:", *(line for one in wrapped for line in one), ""]
        lines += [
            f"Saturated: {share:.0%} of the units of {name} are within float32 rounding of their bounds; their inputs "
            "are lost."
            for name, share in self.saturated.items()
            if share > MOST_SATURATED
        ]
        lines += _LEGEND.format(n_images=self.n_images).splitlines()
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)


MOST_SATURATED = 0.01
"""Share of saturated units above which it is told."""

_WIDTH = 120
_HEADER = (
    *("layer", "kind", "unknowns", "gradient", "forward", "rank g", "rank g+f", "condition", "noise ×", "δ"),
    "input",
)
_LEGEND = """\
Columns: entries of the layer's input; equations from its weight gradient, and from the forward pass (outputs known
before the activation, if all above is); rank of the former and of both, ≤ where counted, not computed; condition, and
error of an input entry per relative error of the gradient, of the system that the attack solves; is δ known there.
Numbers are medians over random images, of which there are {n_images}, at random weights of the same initialisation."""


def _row(layer: LayerReport, reasons: Sequence[str]) -> tuple[str, ...]:
    counted = min(layer.unknowns, layer.gradient_equations)
    gradient_rank = counted if layer.gradient_rank is None else layer.gradient_rank
    both = min(layer.unknowns, gradient_rank + layer.forward_equations)
    mark = f" [{reasons.index(layer.reason) + 1}]" if layer.reason else ""
    return (
        layer.name,
        layer.kind,
        str(layer.unknowns),
        str(layer.gradient_equations),
        str(layer.forward_equations),
        f"≤ {counted}" if layer.gradient_rank is None else str(layer.gradient_rank),
        f"≤ {both}" if layer.stacked_rank is None else str(layer.stacked_rank),
        _number(layer.condition),
        _number(layer.noise_amplification),
        "yes" if layer.reached else "no",
        layer.words + mark,
    )


def _number(value: float | None) -> str:
    return "–" if value is None else "∞" if value == math.inf else f"{value:.2g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers to the right, words to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = (0, 1, len(widths) - 1)
    return [
        "  ".join(
            cell.ljust(width) if number in words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}, {len(names)} in all"
