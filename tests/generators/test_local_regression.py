"""Regressions from neighbourhoods in feature maps."""

import pytest
import torch
from closed_form import run_fits
from small_generators import build
from smooth import smooth_images
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.data.pair import GradientPair
from gitlight.generators.local_regression import LocalOrWhole, LocalRegression, stride_of
from gitlight.generators.ridge import RidgeRegression
from gitlight.gradients.engine import GradientEngine

BODIES = {
    "no padding": ([nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)], (16, 16)),
    "strides": ([nn.Conv2d(3, 16, 3, 2, 1), nn.Sigmoid()], (16, 16)),
    "oblong": ([nn.Conv2d(3, 24, 3, (2, 1), 1), nn.Sigmoid()], (16, 12)),
}


def traced(body, size):
    network = nn.Sequential(*body)
    maps = network(torch.zeros(1, 3, *size))
    network = nn.Sequential(*body, nn.Flatten(), nn.Linear(maps.numel(), 4)).eval().requires_grad_(False)
    architecture = Architecture.of(network, (3, *size), 4)
    return network, architecture, tuple(maps.shape[1:]), architecture.layers[len(body) - 1].name


@pytest.mark.parametrize(("body", "size"), BODIES.values(), ids=BODIES)
def test_every_pixel_comes_from_the_window_around_it(body, size):
    torch.manual_seed(0)
    network, architecture, shape, result = traced(body, size)
    stride = stride_of(architecture, result)
    assert (
        stride
        == {"no padding": (2, 2), "strides": (2, 2), "oblong": (2, 1)}[
            next(name for name, (one, _) in BODIES.items() if one is body)
        ]
    )
    assert LocalRegression.is_possible(shape, (3, *size), stride)
    local = LocalRegression(shape, (3, *size), stride)
    images = smooth_images(120, 0, (3, *size)).double()
    maps = nn.Sequential(*network[: len(body)]).double()(images).flatten(1)
    for part in range(0, 100, 30):
        these = slice(part, min(part + 30, 100))
        local.add(maps[these], images[these].flatten(1), torch.arange(100)[these])
    local.solve()
    found = local(maps[100:]).view(20, 3, *size)
    error = (found - images[100:]).square().mean((0, 1)).sqrt()
    assert error.mean() < 0.5 * images[100:].std(dim=0).mean(), "it tells images apart"
    # A window in the wrong place would show as an edge.
    assert error.max() < 4 * error.mean()
    assert local.error.item() == pytest.approx(error.square().mean().sqrt().item(), rel=0.6)


def test_what_is_said_of_positions_does_not_depend_on_how_pairs_are_divided():
    torch.manual_seed(0)
    maps, images = torch.rand(40, 8 * 20 * 20, dtype=torch.float64), torch.rand(40, 3 * 40 * 40)
    made = []
    for size in (40, 7):
        local = LocalRegression((8, 20, 20), (3, 40, 40), (2, 2))
        for these in torch.arange(40).split(size):
            local.add(maps[these], images[these], these)
        local.solve()
        made.append(local(maps))
    torch.testing.assert_close(*made)


@pytest.mark.parametrize(
    ("shape", "image_shape", "stride"),
    [
        ((8, 17, 17), (3, 33, 33), (2, 2)),  # windows of one pixel, two apart
        ((300, 8, 8), (3, 16, 16), (2, 2)),
        ((8, 2, 2), (3, 16, 16), (8, 8)),
        ((64,), (3, 16, 16), (2, 2)),
        ((8, 8, 8), (3, 16, 16), None),
        ((8, 8, 8), (3, 64, 64), (2, 2)),  # windows of fifty pixels
    ],
)
def test_where_it_is_not_possible(shape, image_shape, stride):
    assert not LocalRegression.is_possible(shape, image_shape, stride)


def test_strides_are_those_of_all_layers_below():
    body = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, (1, 2), 1)]
    _, architecture, _, result = traced(body, (32, 32))
    assert stride_of(architecture, result) == (4, 8)
    assert stride_of(architecture, architecture.output) is None
    _, architecture, _, result = traced([nn.Conv2d(3, 4, 3, 1, 1), nn.AdaptiveAvgPool2d(4)], (32, 32))
    assert stride_of(architecture, result) is None


def test_the_nearer_of_both_is_taken():
    torch.manual_seed(0)
    maps = torch.rand(200, 6 * 4 * 4, dtype=torch.float64)
    local_images = maps.view(200, 6, 4, 4)[:, :3].flatten(1)
    whole_images = local_images.flip(1)
    for images, is_local in ((local_images, True), (whole_images, False)):
        both = LocalOrWhole(RidgeRegression(96, 48), LocalRegression((6, 4, 4), (3, 4, 4), (1, 1)))
        both.add(torch.cat([maps, maps], dim=1), images + 1e-4 * torch.rand_like(images), torch.arange(200))
        both.solve()
        assert both.is_local == is_local
        assert both.error < 1e-3
        torch.testing.assert_close(both(torch.cat([maps, maps], dim=1)), images.float(), rtol=0, atol=5e-3)


def test_hybrid_starts_from_it_where_few_pairs_make_no_whole_regression():
    torch.manual_seed(0)
    network, architecture, _, _ = traced([nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)], (16, 16))
    images, labels = smooth_images(160, 1, (3, 16, 16)).unsqueeze(1), torch.randint(4, (160, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig())(images, labels)
    pairs = []
    for part in (slice(120), slice(120, 160)):
        its = {name: gradient[part] for name, gradient in gradients.items()}
        pairs.append(GradientPair(its, images[part], labels[part], torch.arange(160)[part].unsqueeze(1)))
    errors = {}
    for local in (True, False):
        generator = run_fits(build("hybrid", architecture, local_start=local), pairs[:1])
        start = generator.start(pairs[1].gradients)
        errors[local] = (start - pairs[1].images).square().mean().item()
        again = build("hybrid", architecture, local_start=local)
        again.load_state_dict(generator.state_dict())
        torch.testing.assert_close(again.start(pairs[1].gradients), start)
    assert errors[True] < 0.5 * errors[False]
