"""Generators keep to the device that they are on: fits, forward and backward pass on a GPU that is pretended."""

from dataclasses import replace

import pytest
import torch
from closed_form import run_fits
from pretended_gpu import GPU, MixedDevicesError, OnGPU, as_on_the_cpu, held, pretended_gpu
from small_generators import DEEP, build
from smooth import smooth_images
from torch import nn

import gitlight.generators.exact.forward
from gitlight.architecture import Architecture
from gitlight.config import GaussianNoiseConfig, GradientsConfig, LeNetConfig
from gitlight.data.pair import GradientPair
from gitlight.gradients.channel import GaussianNoise
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked import LEAKED_MODELS

SHAPE, N_CLASSES = (3, 8, 8), 6


def test_mixed_devices_are_refused():
    with pretended_gpu():
        there = torch.ones(2, 3, device="cuda")
        assert isinstance(there, OnGPU)
        assert there.device == (there * 2).device == there[:, 1].device == torch.zeros_like(there).device == GPU
        assert there.cpu().device == torch.zeros(2, device="cpu").device == torch.device("cpu")
        with pytest.raises(MixedDevicesError, match=r"expected all tensors on cuda:0, found others of \[\(3,\)\]"):
            there + torch.ones(3)
        with pytest.raises(MixedDevicesError):
            torch.ones(3)[torch.tensor([0, 2], device="cuda")]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + torch.tensor(1.0))[torch.tensor([0])].sum().item() == 6


def test_a_module_and_its_gradients_move():
    layer = nn.Linear(3, 2)
    with pretended_gpu():
        layer = layer.to("cuda")
        layer(torch.ones(4, 3, device="cuda")).sum().backward()
        assert isinstance(layer.weight.grad, OnGPU)
        with pytest.raises(MixedDevicesError):
            layer(torch.ones(4, 3))
    assert (held(layer.weight.grad) == 4).all()


CASES = {
    "mlp": ("mlp", LeNetConfig(width=3), {}),
    "coarse": ("coarse", LeNetConfig(width=3), {}),
    "mlp_range_of_noise": ("mlp", LeNetConfig(width=3), {"noise": 1e-2, "noise_range": [0, 1e-2]}),
    "coarse_range_of_noise": ("coarse", LeNetConfig(width=3), {"noise": 1e-2, "noise_range": [0, 1e-2]}),
    "coarse_resnet": ("coarse", DEEP[0], {}),
    "coarse_two_images": ("coarse", LeNetConfig(width=3), {"n_images": 2}),
    "hybrid": ("hybrid", LeNetConfig(width=3), {}),
    "hybrid_local_start": ("hybrid", LeNetConfig(width=3), {"local_start": True}),
    "hybrid_resnet": ("hybrid", DEEP[0], {}),
    "hybrid_vit": ("hybrid", replace(DEEP[1], learned_positions=False), {}),
    "hybrid_two_images": ("hybrid", LeNetConfig(width=3), {"n_images": 2}),
    "hybrid_many_images": ("hybrid", LeNetConfig(width=3), {"n_images": 9}),
    "hybrid_under_noise": ("hybrid", LeNetConfig(width=3), {"noise": 1e-2}),
    "hybrid_range_of_noise": ("hybrid", LeNetConfig(width=3), {"noise": 1e-2, "noise_range": [0, 1e-2]}),
    "hybrid_forward_equations": ("hybrid", LeNetConfig(width=3), {"forward_equations": True}),
    "hybrid_without_bias": ("hybrid", LeNetConfig(width=3), {"last_bias": False}),
    "exact": ("exact", LeNetConfig(width=3), {"dtype": "float64"}),
    "exact_leaky_relu": ("exact", LeNetConfig(width=3, activation="leaky_relu"), {"dtype": "float64"}),
    "exact_vit": ("exact", DEEP[1], {"dtype": "float64"}),
    "exact_descent": ("exact", LeNetConfig(width=3), {"dtype": "float64", "fit": "descent"}),
}


def leaks_of(settings, n_leaks, n_images=1, noise=0.0, dtype="float32", last_bias=True):
    """Gradients, as a channel sends them, images and architecture."""
    torch.manual_seed(0)
    network = LEAKED_MODELS[settings.name].load()(settings, SHAPE, N_CLASSES).eval()
    if not last_bias:
        network.linear = nn.Linear(network.linear.in_features, N_CLASSES, bias=False)
    if settings.name == "lenet":
        for parameter in network.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    images = smooth_images(n_leaks * n_images, 0, SHAPE).view(n_leaks, n_images, *SHAPE)
    labels = torch.randint(N_CLASSES, images.shape[:2])
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype=dtype))(images, labels)
    if noise:
        gradients = GaussianNoise(GaussianNoiseConfig(relative_std=noise))(gradients, torch.arange(n_leaks))
    indices = torch.arange(n_leaks * n_images).view(n_leaks, n_images)
    return architecture, GradientPair(gradients, images, labels, indices)


def on(pair, device, n_leaks=None):
    """The first so many leaks, moved."""
    gradients = {name: gradient[:n_leaks].to(device) for name, gradient in pair.gradients.items()}
    return GradientPair(gradients, *(part[:n_leaks].to(device) for part in (pair.images, pair.labels, pair.indices)))


def trained(generator, public, single, device):
    """A generator after its fits and one backward pass, and what it makes of four leaks; all on one device."""
    generator = run_fits(generator.to(device), [on(public, device)], [on(single, device)])
    few = on(public, device, n_leaks=4)
    with torch.enable_grad():
        loss = (generator(few.gradients) - few.images).square().mean()
        if generator.has_own_loss:
            loss = generator.training_loss(few.gradients, few.images)
        if loss.requires_grad:
            loss.backward()
    with torch.no_grad():
        return generator, generator.reconstruct(few.gradients)


SLOW = ("hybrid_two_images", "hybrid_range_of_noise", "hybrid_without_bias")  # up to 20 s beside other work


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_a_generator_keeps_to_its_device(name, monkeypatch):
    kind, leaked, changed = CASES[name]
    changed = dict(changed)
    of_leaks = {key: changed.pop(key) for key in ("n_images", "dtype", "last_bias") if key in changed}
    noise = changed.pop("noise", 0.0)
    architecture, public = leaks_of(leaked, 80, noise=noise, **of_leaks)
    _, single = leaks_of(leaked, 80, **{**of_leaks, "n_images": 1})
    # vmap of the whole model, which GPUs are known to do.
    by_vmap = as_on_the_cpu(gitlight.generators.exact.forward.model_gradients)
    monkeypatch.setattr(gitlight.generators.exact.forward, "model_gradients", by_vmap)
    n_images = public.images.shape[1]
    _, wanted = trained(build(kind, architecture, n_images, **changed), public, single, "cpu")
    with pretended_gpu():
        generator, found = trained(build(kind, architecture, n_images, **changed), public, single, "cuda")
        estimates = generator.estimated_parameters().values()
        assert all(isinstance(estimate.value, OnGPU) for estimate in estimates)
        assert all(isinstance(p.grad, OnGPU) for p in generator.parameters() if p.grad is not None)
    assert isinstance(found.images, OnGPU)
    torch.testing.assert_close(held(found.images), wanted.images, equal_nan=True)
    assert found.verdicts == wanted.verdicts
    assert (found.labels is None) == (wanted.labels is None)
