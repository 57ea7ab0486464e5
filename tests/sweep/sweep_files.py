"""Sweep files for tests."""

import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

HEAD = f"""
program: {ROOT / "train.py"}
command: ["${{env}}", "${{interpreter}}", "${{program}}", {ROOT / "configs" / "demo.yaml"}, "${{args_no_hyphens}}"]
method: random
metric: {{name: val/psnr, goal: maximize}}
parameters: {{generator.channels: {{values: [32, 64]}}}}
"""


def write_sweep(folder: Path, **changes: str | None) -> Path:
    """A sweep file that is right, with some keys changed, left out (None) or added; values are YAML."""
    lines = dict(line.split(": ", 1) for line in HEAD.strip().splitlines())
    for key, value in changes.items():
        if value is None:
            lines.pop(key, None)
        else:
            value = textwrap.dedent(value)
            lines[key] = f"\n{textwrap.indent(value, '  ')}" if "\n" in value else value
    path = folder / "my_sweep.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path
