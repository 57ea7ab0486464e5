import os
import warnings
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import Tensor

from gitlight.lpips import load_lpips

pytest_plugins = ["alexnet_weights"]

FILE = "alexnet-owt-7be5be79.pth"

LAYERS = (1, 4, 7, 9, 11)
"""Positions of AlexNet's five activations among its ``features``."""


def lpips_by_hand(alexnet: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Zhang et al. 2018, Eq. (1), with the linear heads that torchmetrics ships."""
    folder = Path(os.path.dirname(torchmetrics.__file__)) / "functional/image/lpips_models"
    heads = torch.load(folder / "alex.pth", map_location="cpu")
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    std = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x, y = ((2 * image - 1 - mean) / std for image in (a, b))
    total = torch.zeros(len(a))
    for i, layer in enumerate(alexnet.features[: LAYERS[-1] + 1]):
        x, y = layer(x), layer(y)
        if i in LAYERS:
            unit_x, unit_y = (z / (z.square().sum(dim=1, keepdim=True) + 1e-8).sqrt() for z in (x, y))
            head = heads[f"lin{LAYERS.index(i)}.model.1.weight"].view(1, -1, 1, 1)
            total += (head * (unit_x - unit_y).square()).sum(dim=1).mean(dim=(1, 2))
    return total.detach()


def test_lpips_is_zhangs_distance_of_alexnet_features(alexnet: torch.nn.Module) -> None:
    a, b = torch.rand(70, 3, 32, 32), torch.rand(70, 3, 32, 32)
    lpips = load_lpips()
    assert lpips is not None
    torch.testing.assert_close(lpips(a, b), lpips_by_hand(alexnet, a, b), rtol=1e-4, atol=1e-6)
    assert lpips(a, a).abs().max() == 0
    assert lpips(a[:1], b[:1]).shape == (1,)


def test_lpips_repeats_grey_images(alexnet: torch.nn.Module) -> None:
    a, b = torch.rand(3, 1, 40, 31), torch.rand(3, 1, 40, 31)
    lpips = load_lpips()
    assert lpips is not None
    expected = lpips_by_hand(alexnet, a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-6)


def test_lpips_keeps_no_graph(alexnet: torch.nn.Module) -> None:
    lpips = load_lpips()
    assert lpips is not None
    assert not lpips(torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)).requires_grad


def test_without_weights_one_warning_says_how_to_get_them(hub: Path) -> None:
    with pytest.warns(UserWarning, match="LPIPS is left out") as caught:
        assert load_lpips() is None
    message = str(caught[0].message)
    assert str(hub) in message
    assert f"https://download.pytorch.org/models/{FILE}" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_lpips() is None


def test_damaged_weights_are_named_in_a_warning(hub: Path) -> None:
    hub.mkdir()
    (hub / FILE).write_bytes(b"not weights")
    with pytest.warns(UserWarning, match="delete the file") as caught:
        assert load_lpips() is None
    assert str(hub / FILE) in str(caught[0].message)


def test_weights_of_another_network_are_refused(hub: Path) -> None:
    hub.mkdir()
    torch.save({"features.0.weight": torch.zeros(2, 2)}, hub / FILE)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert load_lpips() is None
