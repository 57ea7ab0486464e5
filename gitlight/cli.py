"""The command lines ``train.py``, ``evaluate.py``, ``python -m gitlight.identify``. Imports torch only when needed."""

import dataclasses
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gitlight.config import ChannelConfig, Config
from gitlight.config_loading import load_config
from gitlight.config_validation import COMPONENTS
from gitlight.disk import FULL, cannot_write, say_last
from gitlight.errors import (
    BusyFolderError,
    ConfigError,
    DatabaseError,
    GitlightError,
    LostRankError,
    RunStopped,
    UnwrittenError,
)
from gitlight.gradients import CHANNELS
from gitlight.registry import Registry
from gitlight.stop_signals import ignore_stop_signals
from gitlight.sweep.trial import INTERRUPTED, end_with_the_sweep, trial_from_environment

USER_ERROR = 2
"""Exit code for mistakes in what the user gave."""

_TRAIN_USAGE = """\
usage: python train.py [CONFIG.yaml] [key.path=value ...]

Train a generator that reconstructs images from a model's gradients (task=generator),
the leaked model itself (task=leaked), or an image prior for attack=gias
(task=image_prior). Without CONFIG.yaml: configs/demo.yaml.

  python train.py                                        the demo, on embedded photographs
  python train.py configs/lenet_hybrid.yaml seed=1       a config, one setting changed
  python train.py runs/demo trainer.resume=last          continue a run
"""

_EVALUATE_USAGE = """\
usage: python evaluate.py RUN_DIR|CONFIG.yaml [key.path=value ...]

Attack private images with a trained generator, or search for them (attack=ig); write
metrics.json, per_image.csv, reconstructions.png and report.html to RUN_DIR/evaluation/.

  python evaluate.py runs/demo                           a run that train.py left
  python evaluate.py configs/lenet_hybrid.yaml           the run of that config
  python evaluate.py runs/demo evaluation.n_images=100   one setting changed
  python evaluate.py configs/lenet_ig.yaml               an iterative attack
"""

_IDENTIFY_USAGE = """\
usage: python -m gitlight.identify CONFIG.yaml [key.path=value ...] [--json PATH]

Say what the architecture of a config's leaked model leaks, layer by layer, before any
attack is run. No image is read, and no leaked weight. --json PATH writes the report as
JSON, too; with --json - it is printed instead of the table.

  python -m gitlight.identify configs/lenet_exact.yaml                          LeNet
  python -m gitlight.identify configs/lenet_exact.yaml leaked.activation=relu   with ReLU
"""


def train_command(arguments: Sequence[str], default_config: Path) -> int:
    """``train.py``; returns the exit code, which is the process's: after a stop by a signal others are ignored."""
    end_with_the_sweep()
    return _run(arguments, _TRAIN_USAGE, _train, default_config)


def evaluate_command(arguments: Sequence[str]) -> int:
    """``evaluate.py``; returns the exit code."""
    return _run(arguments, _EVALUATE_USAGE, _evaluate, default_config=None)


def identify_command(arguments: Sequence[str]) -> int:
    """``python -m gitlight.identify``; returns the exit code."""
    rest = list(arguments)
    path = None
    if "--json" in rest:
        at = rest.index("--json")
        if at + 1 == len(rest):
            print("error: --json: expected a file to write to, or - for the terminal, after it.", file=sys.stderr)
            return USER_ERROR
        path = rest[at + 1]
        del rest[at : at + 2]
    return _run(rest, _IDENTIFY_USAGE, lambda config: _identify(config, path), default_config=None)


def _train(config: Config) -> None:
    from gitlight.runs import checkpoint_path
    from gitlight.training import train

    folder = train(config)
    # A limit of steps or of time, or no validation at all, leaves no best one.
    unchosen = "" if checkpoint_path(folder, "best").is_file() else " evaluation.checkpoint=last"
    uses = {
        "generator": f"python evaluate.py {{}}{unchosen}",
        "leaked": "python train.py CONFIG leaked.weights={}",
        "image_prior": "python evaluate.py CONFIG attack=gias attack.image_prior={}",
    }
    logging.getLogger(__name__).info(
        "run folder: %s; next: %s", folder, uses[config.task].format(shlex.quote(str(folder)))
    )


def _evaluate(config: Config) -> None:
    from gitlight.evaluation import evaluate

    print(evaluate(config).summary())


def _identify(config: Config, json_path: str | None) -> None:
    from gitlight.identifiability.identification import identify
    from gitlight.report.results import write_text

    if json_path == "-":
        print(identify(config).to_json(), end="")
        return
    if json_path is not None and not Path(json_path).absolute().parent.is_dir():
        raise ConfigError(f"--json: {json_path}: the folder {Path(json_path).parent} does not exist. Make it first.")
    report = identify(config)
    print(report.to_text())
    if json_path is not None:
        try:
            write_text(report.to_json(), Path(json_path))
        except OSError as error:
            raise ConfigError(f"--json: {json_path} cannot be written: {error}.") from error


def _run(arguments: Sequence[str], usage: str, command: Callable[[Config], None], default_config: Path | None) -> int:
    if {"-h", "--help"} & set(arguments):
        print(usage)
        print(settings_help())
        return 0
    names_config = bool(arguments) and ("=" not in arguments[0] or Path(arguments[0]).exists())
    first, rest = (arguments[0], arguments[1:]) if names_config else (None, arguments)
    path = Path(first) if first is not None else default_config
    if path is None:
        print(usage, file=sys.stderr)
        return USER_ERROR
    config = None
    try:
        config = load_config(path, rest)
        _configure_logging()
        command(config)
    except GitlightError as error:
        # From a process that reads images an error arrives with that process's traceback before it.
        say_last(f"error: {str(error).rpartition(f'{type(error).__name__}: ')[2].strip()}")
        surroundings = isinstance(error, UnwrittenError | DatabaseError | BusyFolderError)
        return _exit_code_of_surroundings() if surroundings else USER_ERROR
    except LostRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RunStopped as stopped:
        # The first process's exit code has srun end the others by SIGTERM, whose code it would report instead.
        ignore_stop_signals()
        if not _is_first_process():
            return 0  # the first one reports it: launchers end all ranks where any ends badly
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except OSError as error:
        if error.errno not in FULL:
            raise
        said = cannot_write(Path(error.filename or str(config and config.output_dir)), error)
        say_last(f"error: {said}. Make room. A training goes on with trainer.resume=auto.")
        return _exit_code_of_surroundings()
    except KeyboardInterrupt:
        if _is_first_process():
            print("interrupted", file=sys.stderr)
        return 130
    return 0


# What libraries say of choices that are made on purpose, or of each other; a regular expression each.
_NO_NEWS = (
    r".*LeafSpec.* is deprecated",  # Lightning's use of PyTorch
    r".*does not have many workers",  # sets held in memory need none
    r".*Checkpoint directory .* exists and is not empty",  # that is what resuming means
    r".*`training_step` returned `None`",  # a generator in closed form
    r".*`LightningModule.configure_optimizers` returned `None`",
    r".*The number of training batches .* is smaller than the logging interval",
    r".*Please add the following callbacks: \['PruneTrial'\]",  # a sweep's trial, continued outside of it
)


def _exit_code_of_surroundings() -> int:
    """Of a run that nothing is wrong with: a sweep is to keep the trial."""
    return USER_ERROR if trial_from_environment() is None else INTERRUPTED


def _is_first_process() -> bool:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


def _configure_logging() -> None:
    """Plain lines for gitlight's messages, from the first process; of Lightning's, only warnings."""
    own = logging.getLogger("gitlight")
    own.setLevel(logging.INFO if _is_first_process() else logging.WARNING)
    own.handlers[:] = [logging.StreamHandler(sys.stdout)]
    own.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message)


def settings_help() -> str:
    """All settings with their defaults and meaning, section by section."""
    lines = ["settings (set in a YAML file, or as key.path=value; documented in gitlight/config/):", ""]
    defaults = Config()
    plain = [
        field for field in dataclasses.fields(Config) if not dataclasses.is_dataclass(getattr(defaults, field.name))
    ]
    lines += _field_lines(plain, defaults, "")
    for section in dataclasses.fields(Config):
        settings = getattr(defaults, section.name)
        if section.name == "channel":
            lines += _component_lines("channel[i]", CHANNELS, ChannelConfig())
        elif section.name in COMPONENTS:
            lines += _component_lines(section.name, COMPONENTS[section.name], settings)
        elif dataclasses.is_dataclass(settings):
            lines += ["", *_field_lines(dataclasses.fields(settings), settings, f"{section.name}.")]
    return "\n".join(lines)


def _component_lines(section: str, registry: Registry, default: Any) -> list[str]:
    """Settings that all components of a section share, then those of each."""
    classes = [registry[name].settings for name in registry.names()]
    shared = set.intersection(*({field.name for field in dataclasses.fields(cls)} for cls in classes))
    fields = [field for field in dataclasses.fields(default) if field.name in shared]
    lines = ["", f"  {section}.name is one of: {', '.join(registry.names())}"]
    lines += _field_lines(fields, default, f"{section}.")
    for name in registry.names():
        settings = registry[name].settings()
        own = [field for field in dataclasses.fields(settings) if field.name not in shared]
        if own:
            lines += [f"    with {section}.name={name}:", *_field_lines(own, settings, f"{section}.")]
    return lines


def _field_lines(fields: Sequence[dataclasses.Field[Any]], settings: Any, prefix: str) -> list[str]:
    lines = []
    for field in fields:
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            lines += _field_lines(dataclasses.fields(value), value, f"{prefix}{field.name}.")
            continue
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        choices = f" [{', '.join(map(str, field.metadata['choices']))}]" if "choices" in field.metadata else ""
        lines.append(f"  {f'{prefix}{field.name}={shown}':<40} {field.metadata['help']}{choices}")
    return lines
