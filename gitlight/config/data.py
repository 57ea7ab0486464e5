"""Settings of images."""

from dataclasses import dataclass

from gitlight.config.fields import setting


@dataclass
class DataConfig:
    """Which images, and how they are shared out."""

    name: str = setting("photos", "image source")
    root: str | None = setting(None, "folder that holds the images; not needed for photos and faces")
    download: bool = setting(False, "let torchvision download the set into data.root")
    image_size: int = setting(32, "height and width of the images, in pixels", minimum=8, maximum=4096)
    channels: int = setting(3, "3: colour (grey images are repeated); 1: grey (colour is converted)", choices=[1, 3])
    client_batch_size: int = setting(1, "images whose averaged gradient is one leak", minimum=1)
    n_public_images: int | None = setting(None, "images of the training split to use; null: all", minimum=2)
    n_validation: int = setting(
        256, "images to choose the best checkpoint by: of the above, unless the source has its own", minimum=1
    )
    public_classes: list[str] | None = setting(None, "classes that pairs are made from; null: all")
    private_classes: list[str] | None = setting(None, "classes of the attacked images; null: all")
    batch_size: int = setting(128, "leaks in one optimiser step, summed over all devices", minimum=1)
    num_workers: int | None = setting(
        None, "processes that read images, per device; null: none for sets held in memory, else one per core", minimum=0
    )
    memory_limit_gb: float = setting(2.0, "decoded image sets up to this size are held in memory, in GB", minimum=0)
    horizontal_flip: bool = setting(False, "mirror each public image at random, afresh in every epoch")
