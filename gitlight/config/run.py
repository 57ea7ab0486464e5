"""Settings of a run: how it trains, evaluates and reports."""

from dataclasses import dataclass
from typing import Any

from gitlight.config.fields import setting


@dataclass
class OptimizerConfig:
    """How weights are trained."""

    name: str = setting("adam", "optimiser", choices=["adam", "adamw", "sgd"])
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    momentum: float = setting(0.9, "momentum; sgd only", minimum=0, maximum=1)
    epsilon: float = setting(
        1e-14,
        "added to the size of a gradient that is divided by, adam and adamw only: below it steps shrink; larger, "
        "rounding is magnified less, and small gradients count less",
        above=0,
    )
    weight_decay: float = setting(0.0, "weight decay", minimum=0)
    schedule: str = setting(
        "cosine",
        "learning rate over the run: constant, cosine to zero, or step (tenfold down at 75 %)",
        choices=["constant", "cosine", "step"],
    )
    ema_decay: float | None = setting(
        None,
        "validate with, and keep as the generator, an exponential moving average of the trained weights, of which each "
        "step keeps this share, the first ones less (0.999: about the last thousand steps); null: the weights",
        minimum=0,
        maximum=0.999999,
    )
    warmup_fraction: float = setting(0.02, "share of the run over which the rate rises from zero", minimum=0, maximum=1)


@dataclass
class LossConfig:
    """What generators are trained to make small beside their mean squared error."""

    perceptual: str | None = setting(
        None,
        "a term for likeness to the eye, at a cost in squared error: one less SSIM, the difference of image gradients, "
        "or LPIPS, for which AlexNet's weights are needed; null: none",
        choices=["ssim", "gradient_difference", "lpips"],
    )
    weight: float = setting(0.1, "of that term, where the squared error (pixels in [0, 1]) has one", above=0)


@dataclass
class TrainerConfig:
    """Lightning's own names (`lightning.Trainer`); and which checkpoints are kept and continued from."""

    accelerator: str = setting("auto", "auto, cpu, gpu; not mps, which has no float64")
    devices: Any = setting("auto", "number of devices, list of device indices, or auto")
    num_nodes: int = setting(1, "number of machines", minimum=1)
    strategy: str = setting("auto", "auto, ddp, fsdp, …")
    precision: str = setting(
        "32-true",
        "precision of trained layers; closed forms are float64 throughout",
        choices=["32-true", "bf16-mixed", "16-mixed"],
    )
    max_epochs: int = setting(10, "passes over the public images", minimum=1)
    max_steps: int = setting(-1, "optimiser steps at most; -1: no limit", minimum=-1)
    max_time: str | None = setting(None, "training time at most, as DD:HH:MM:SS")
    limit_train_batches: Any = setting(None, "batches (int) or share (float) of an epoch; null: all")
    limit_val_batches: Any = setting(None, "batches (int) or share (float) of the validation set; null: all")
    check_val_every_n_epoch: int = setting(1, "epochs between validations", minimum=1)
    log_every_n_steps: int = setting(10, "steps between logged training losses", minimum=1)
    gradient_clip_val: float | None = setting(None, "largest norm of the generator's own gradient", minimum=0)
    virtual_ranks: int | None = setting(
        None,
        "divide each step's work in so many parts, a power of two, for any number of processes that divides it: "
        "training is then the same on all of them, bit for bit; null: one part each",
        minimum=1,
    )
    accumulate_grad_batches: int = setting(1, "batches summed into one optimiser step", minimum=1)
    deterministic: bool = setting(False, "only deterministic algorithms, an error where there is none")
    detect_anomaly: bool = setting(False, "stop at the operation that made a NaN (slow)")
    profiler: str | None = setting(None, "simple, advanced or pytorch")
    compile: bool = setting(
        False, "compile the trained layers (torch.compile): seconds to minutes at the start, and a C++ compiler on CPUs"
    )
    channels_last: bool = setting(False, "lay the trained layers' weights out channels last; for convolutions")
    checkpoint_every_n_steps: int | None = setting(
        None, "optimiser steps between checkpoints within an epoch; null: at the ends of epochs only", minimum=1
    )
    keep_last: int = setting(2, "latest checkpoints to keep (last.ckpt, last-1.ckpt, …), beside the best", minimum=1)
    resume: str | None = setting(
        None,
        "continue a run: last, previous (the newest before last that can be read), best, a checkpoint's path, "
        "or auto (last, or afresh where there is none)",
    )


@dataclass
class ImagePriorConfig:
    """What ``task=image_prior`` trains: a variational autoencoder of the public images."""

    latent_size: int = setting(128, "numbers that describe an image", minimum=1)
    channels: int = setting(
        128, "maps of 4 × 4 that an image begins as; halved as often as these are doubled", minimum=1
    )


@dataclass
class EvaluationConfig:
    """How a trained generator is measured."""

    n_images: int = setting(1000, "private images to attack; fewer where the test split has fewer", minimum=1)
    checkpoint: str = setting("best", "which checkpoint to evaluate", choices=["best", "last"])
    bootstrap_samples: int = setting(2000, "resamplings of the images for the 95 % intervals", minimum=100)
    n_pictures: int = setting(16, "reconstructions drawn in pictures", minimum=1)


@dataclass
class LoggingConfig:
    """Where a run reports to."""

    wandb: str = setting(
        "auto", "auto: online where an API key is set, else offline", choices=["auto", "online", "offline", "off"]
    )
    project: str = setting("gitlight", "W&B project")
    quiet: bool = setting(False, "no progress bar: one line an epoch, for log files")
