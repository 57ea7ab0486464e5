"""Fixtures: a torch hub cache without a network, and AlexNet's weights in it, of a seed."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from gitlight.lpips import load_lpips

FILE = "alexnet-owt-7be5be79.pth"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache's folder for checkpoints, which is not there yet."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    load_lpips.cache_clear()
    yield tmp_path / "checkpoints"
    load_lpips.cache_clear()


@pytest.fixture
def alexnet(hub: Path) -> torch.nn.Module:
    """AlexNet with weights of a seed, which lie in the cache from now on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.alexnet(weights=None).eval()
    hub.mkdir()
    torch.save(network.state_dict(), hub / FILE)
    return network
