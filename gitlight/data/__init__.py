"""Images, and the pairs of gradients and images made from them."""

from gitlight.config import DataConfig
from gitlight.registry import Registry

SOURCES = Registry("image source", "data")
SOURCES.register("photos", "gitlight.data.photos:load", DataConfig)
SOURCES.register("faces", "gitlight.data.faces:load", DataConfig)
SOURCES.register("folder", "gitlight.data.folder:load", DataConfig)
for _name in ("cifar10", "cifar100", "mnist", "fashion_mnist", "celeba", "imagenet"):
    SOURCES.register(_name, "gitlight.data.torchvision_sets:load", DataConfig)
