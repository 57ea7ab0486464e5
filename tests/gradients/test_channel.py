import pytest
import torch

from gitlight.config import GaussianNoiseConfig, PruningConfig
from gitlight.errors import ConfigError
from gitlight.gradients.channel import GaussianNoise, Pruning, build_channel


@pytest.fixture
def gradients():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 1e-4, 1e3, 1.0])
    return {"weight": torch.randn(4, 40, 50) * scale[:, None, None], "bias": torch.randn(4, 100) * scale[:, None]}


def flat(gradients):
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def test_noise_has_the_strength_asked_for_in_every_leak(gradients):
    noisy = GaussianNoise(GaussianNoiseConfig(relative_std=0.1))(gradients, torch.arange(4))
    noise = flat(noisy) - flat(gradients)
    ratio = noise.square().mean(1).sqrt() / flat(gradients).square().mean(1).sqrt()
    torch.testing.assert_close(ratio, torch.full((4,), 0.1), rtol=0.1, atol=0)


def test_noise_depends_on_the_seed_of_the_leak_alone(gradients):
    noise = GaussianNoise(GaussianNoiseConfig(relative_std=0.1))
    seeds = torch.tensor([5, 6, 7, 8])
    whole = noise(gradients, seeds)
    alone = noise({name: gradient[2:3] for name, gradient in gradients.items()}, seeds[2:3])
    assert all(torch.equal(whole[name][2:3], alone[name]) for name in gradients)
    other = noise(gradients, seeds + 10)
    assert not torch.equal(whole["weight"], other["weight"])
    assert not torch.equal(whole["bias"][0], whole["bias"][3])


def test_noise_leaves_its_input_alone(gradients):
    before = flat(gradients).clone()
    GaussianNoise(GaussianNoiseConfig(relative_std=1.0))(gradients, torch.arange(4))
    assert torch.equal(flat(gradients), before)


def test_levels_fill_their_range_evenly_in_the_logarithm():
    gradients = {"weight": torch.ones(300, 200)}
    channel = GaussianNoise(GaussianNoiseConfig(relative_std=0.1, lowest_std=1e-4))
    levels = (channel(gradients, torch.arange(300))["weight"] - 1).square().mean(dim=1).sqrt().log10()
    assert -4.1 < levels.min() < -3.9
    assert -1.1 < levels.max() < -0.9
    assert ((levels - levels.mean()).square().mean() * 12).sqrt().item() == pytest.approx(3, rel=0.1)
    again = channel(gradients, torch.arange(300))["weight"]
    assert torch.equal(channel({"weight": torch.ones(1, 200)}, torch.tensor([7]))["weight"], again[7:8])


def test_an_empty_range_of_levels_is_named():
    with pytest.raises(ConfigError, match=r"lowest_std=0\.1 is above relative_std=0\.01"):
        build_channel([GaussianNoiseConfig(relative_std=0.01, lowest_std=0.1)])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9, 1.0])
def test_pruning_keeps_the_largest_entries_unchanged(gradients, fraction):
    pruned = Pruning(PruningConfig(fraction=fraction))(gradients, torch.arange(4))
    for name, gradient in gradients.items():
        for leak, kept in zip(gradient.flatten(1), pruned[name].flatten(1), strict=True):
            n_pruned = round(fraction * leak.numel())
            assert (kept == 0).sum() == n_pruned
            threshold = leak.abs().sort().values[n_pruned] if n_pruned < leak.numel() else float("inf")
            assert torch.equal(kept, torch.where(leak.abs() >= threshold, leak, 0.0))


def test_stages_are_built_in_order():
    stages = build_channel([PruningConfig(), GaussianNoiseConfig()])
    assert [type(stage) for stage in stages] == [Pruning, GaussianNoise]
