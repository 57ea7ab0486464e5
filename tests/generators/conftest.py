"""Small leaked models, their architectures, and real gradients of random images."""

import pytest
import torch
from smooth import smooth_images

from gitlight.architecture import Architecture
from gitlight.config import FullyConnectedConfig, GradientsConfig, LeNetConfig
from gitlight.data.pair import GradientPair
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.model import LeakedModel

SHAPE, N_CLASSES = (3, 16, 16), 5


@pytest.fixture
def make_pairs():
    def make(settings, n=8, client_batch_size=1, dtype="float64", seed=0, shape=SHAPE):
        leaked = LeakedModel(settings, shape, N_CLASSES)
        engine = GradientEngine(leaked.network, leaked.architecture, GradientsConfig(dtype=dtype))
        images = smooth_images(n * client_batch_size, seed, shape).view(n, client_batch_size, *shape)
        labels = torch.randint(N_CLASSES, images.shape[:2], generator=torch.Generator().manual_seed(seed))
        indices = torch.arange(n * client_batch_size).view(n, client_batch_size)
        return leaked, GradientPair(engine(images, labels), images, labels, indices)

    return make


@pytest.fixture
def lenet_architecture() -> Architecture:
    return LeakedModel(LeNetConfig(width=4), SHAPE, N_CLASSES).architecture


@pytest.fixture
def mlp_architecture() -> Architecture:
    return LeakedModel(FullyConnectedConfig(hidden_sizes=[20, 10]), SHAPE, N_CLASSES).architecture
