"""Where a run's numbers go: ``metrics.csv`` always, W&B where it is wanted. Neither ever stops a run."""

import logging
import os
import uuid
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from gitlight.config import Config
from gitlight.csv_logger import CSVFileLogger
from gitlight.runs import WANDB_ID
from gitlight.sweep.trial import agent_run_folder

log = logging.getLogger(__name__)

WANDB_INIT_TIMEOUT = 30.0
"""Seconds that W&B's server has to answer when a run starts, before the run is logged offline."""

WANDB_FINISH_TIMEOUT = 60.0
"""Seconds that the end of a run waits for uploads; what is left stays on disk for ``wandb sync``."""


def build_loggers(config: Config, output_dir: Path, run_name: str, resumed: Mapping[str, Any] | None) -> list[Logger]:
    """The loggers of a training run.

    ``logging.wandb=auto`` follows ``WANDB_MODE`` if set; otherwise it is online where W&B finds credentials
    (environment, netrc, its settings), and offline where not. Nothing asks for a key. ``off`` does not import wandb.

    Args:
        config: the run's settings; logged as the W&B run's config.
        output_dir: the run's folder: ``metrics.csv``, ``wandb/``.
        run_name: name of the run at W&B.
        resumed: of the checkpoint that the run continues from, ``global_step``, before which rows of ``metrics.csv``
            are kept, and ``wandb_run_id``, which is continued; ``None`` for a new run, which replaces the file.
    """
    output_dir = Path(output_dir)
    loggers: list[Logger] = [
        CSVFileLogger(output_dir / "metrics.csv", None if resumed is None else resumed["global_step"])
    ]
    # wandb reports its own crashes to a third party unless told not to, before it is imported.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    mode = _wandb_mode(config.logging.wandb)
    if mode is not None:
        run_id = None if resumed is None else resumed.get(WANDB_ID)
        loggers.append(_wandb_logger(config, output_dir, run_name, mode, run_id))
    return loggers


def log_curve(config: Config, folder: Path, name: str, curve: Sequence[tuple[int, float, float]]) -> None:
    """An iterative attack's mean trajectory as a W&B run of its own, where ``logging.wandb`` wants one.

    Args:
        config: the run's settings.
        folder: the evaluation's folder, below which ``wandb/`` is.
        name: of the attack.
        curve: ``(iteration, median distance, mean PSNR)``, in order.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    mode = _wandb_mode(config.logging.wandb)
    if mode is None:
        return
    logger = _wandb_logger(config, folder, f"{folder.parent.name} {name}", mode, run_id=None)
    for iteration, distance, psnr in curve:
        logger.log_metrics({"attack/iteration": iteration, "attack/distance": distance, "attack/psnr": psnr})
    logger.finalize("success")


class ForgivingWandbLogger(WandbLogger):
    """Lightning's WandbLogger, except that no failure of W&B reaches the run: one warning each, and training goes on.

    A run that cannot start online is logged offline. The W&B run is finished when the trainer is, so that the next
    run in the process is another one.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # Lightning passes it on unasked, and wandb warns that it has no effect.
        self._wandb_init.pop("anonymous", None)
        if agent_run_folder() is not None:
            # The agent has given them, and wandb warns of what is given twice.
            for key in ("project", "id"):
                self._wandb_init.pop(key, None)
        self._warned = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; started at the first use."""
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    @property
    def version(self) -> str | None:
        """The W&B run's id."""
        return self._id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Add to the W&B run's config."""
        with self._forgiving():
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers."""
        with self._forgiving():
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log pictures."""
        with self._forgiving():
            super().log_image(key, images, step, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the W&B run; waits for uploads for a minute at most."""
        run, self._experiment = self._experiment, None
        if run is not None:
            with self._forgiving():
                run.finish(exit_code=0 if status == "success" else 1)

    def _start(self) -> Any:
        try:
            return super().experiment
        except Exception as error:  # wandb raises its own errors, those of its service and those of the network
            if self._wandb_init["mode"] == "online":
                rank_zero_warn(f"W&B cannot be reached; the run is logged offline: {error}")
                self._wandb_init["mode"] = "offline"
                with self._forgiving():
                    self._release_run_id()
                return self._start()
            rank_zero_warn(f"W&B cannot be used; metrics.csv has all numbers: {error}")
            self._warned = True
            return _DummyExperiment()

    @staticmethod
    def _release_run_id() -> None:
        # wandb's service holds the id of a run that failed to start until it ends.
        import wandb

        wandb.teardown()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # see _start
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"W&B failed, and may lack some of this run; metrics.csv has all numbers: {error}")


def _wandb_mode(setting: str) -> str | None:
    """``online``, ``offline``, or ``None`` for no W&B at all."""
    if setting == "auto":
        environment = os.environ.get("WANDB_MODE", "")
        if environment == "disabled":
            return None
        # wandb's own older names for the modes are dryrun and run.
        wanted = {"offline": "offline", "dryrun": "offline", "online": "online", "run": "online"}.get(environment)
        setting = wanted or ("online" if _wandb_credentials() else "offline")
    if setting == "online" and not _wandb_credentials():
        rank_zero_warn(
            "W&B is to be online but finds no API key, and the run is logged offline. Set WANDB_API_KEY or run "
            "`wandb login`; `wandb sync` uploads the run later."
        )
        return "offline"
    return None if setting == "off" else setting


def _wandb_credentials() -> bool:
    """Whether wandb would find credentials without asking. Whether they are right shows when the run starts."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    host = wandb.setup().settings.base_url
    try:
        from wandb.sdk.lib import wbauth

        found: Any = wbauth.authenticate_session(host=host, source="gitlight", prompt=False, update_session=False)
    except wandb.errors.AuthenticationError:
        return True
    except (ImportError, TypeError):  # older versions of wandb
        found = wandb.api.api_key
    return found is not None


def _wandb_logger(
    config: Config, output_dir: Path, run_name: str, mode: str, run_id: str | None
) -> ForgivingWandbLogger:
    import wandb

    silent = config.logging.quiet or mode == "offline"
    if silent:
        # A run's own settings come too late for what is said at the login.
        wandb.setup(wandb.Settings(silent=True))
    if mode == "offline":
        log.info("W&B: offline; `wandb sync %s` uploads the run", output_dir / "wandb" / "offline-run-*")
    settings: dict[str, Any] = {
        # wandb's capture of the console and a progress bar get in each other's way.
        "console": "off",
        "silent": silent,
        "init_timeout": WANDB_INIT_TIMEOUT,
        "finish_timeout": WANDB_FINISH_TIMEOUT,
    }
    known = {key: value for key, value in settings.items() if key in wandb.Settings.model_fields}
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        # The other ranks must not touch the folder: the first may not have moved a former run aside yet.
        (output_dir / "wandb").mkdir(parents=True, exist_ok=True)
    return ForgivingWandbLogger(
        name=run_name,
        save_dir=output_dir,
        id=_agent_run_id() or run_id or uuid.uuid4().hex[:8],
        project=config.logging.project,
        mode=mode,
        config=asdict(config),
        settings=wandb.Settings(**known),
    )


def _agent_run_id() -> str | None:
    """The id that ``wandb agent`` gave this run."""
    return os.environ["WANDB_RUN_ID"] if agent_run_folder() is not None else None
