"""Which checkpoints a run keeps: ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


def best_checkpoint(output_dir: Path, monitor: str) -> ModelCheckpoint:
    """Keeps ``best.ckpt``: the state after the validation with the largest ``monitor``."""
    return _MovableCheckpoint(
        dirpath=output_dir / "checkpoints",
        filename="best",
        monitor=monitor,
        mode="max",
        save_on_train_epoch_end=False,
        # Otherwise a second run into the folder would write best-v1.ckpt.
        enable_version_counter=False,
    )


def last_checkpoint(output_dir: Path) -> ModelCheckpoint:
    """Keeps ``last.ckpt``: the state at the end of the latest epoch, after its validation."""
    return _MovableCheckpoint(
        dirpath=output_dir / "checkpoints",
        filename="last",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class _MovableCheckpoint(ModelCheckpoint):
    """Keeps its score where a run folder is moved or copied and resumed there.

    Lightning forgets it, and would overwrite the best checkpoint with the next one.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        # A checkpoint of another run, continued in a new folder, has left its best checkpoint behind.
        if Path(here(state_dict["best_model_path"])).is_file():
            paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
            scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
            state_dict = {**state_dict, **paths, "best_k_models": scores, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)
