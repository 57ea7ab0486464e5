import pytest
import torch

from gitlight.architecture import Architecture
from gitlight.config import GaussianNoiseConfig, LeNetConfig, PruningConfig, SketchConfig
from gitlight.errors import ConfigError
from gitlight.gradients.channel import GaussianNoise, Pruning, build_channel, sent
from gitlight.gradients.sketch import Sketch
from gitlight.leaked.lenet import lenet


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


def test_noise_of_a_large_leak_is_the_same_alone_whatever_the_threads():
    torch.manual_seed(0)
    gradients, noise = {"weight": torch.randn(5, 70_000)}, GaussianNoise(GaussianNoiseConfig(relative_std=0.1))
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = noise(gradients, torch.arange(5))["weight"]
        rows = [noise({"weight": gradients["weight"][n : n + 1]}, torch.arange(5)[n : n + 1]) for n in range(5)]
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(whole, torch.cat([row["weight"] for row in rows]))


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


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("n_stages", [0, 1, 2])
@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_leaks_are_sent_in_parts_and_are_the_same_bit_by_bit(sketched, n_stages, at_once):
    torch.manual_seed(0)
    architecture = Architecture.of(lenet(LeNetConfig(width=3), (3, 8, 8), 10), (3, 8, 8), 10)
    gradients = {name: torch.randn(7, *shape) for name, shape in architecture.parameter_shapes.items()}
    seeds = torch.arange(7) + 3
    stages = build_channel([GaussianNoiseConfig(relative_std=0.1, lowest_std=1e-3), PruningConfig()])[:n_stages]
    sketch = Sketch(architecture, SketchConfig(name="count", size=20)) if sketched else None
    wanted = gradients
    for stage in stages:
        wanted = stage(wanted, seeds)
    wanted = sketch(wanted) if sketch else wanted
    sizes, seen = [], []
    if stages:
        stages.insert(0, lambda part, part_seeds: (sizes.append(len(part_seeds)), seen.append(part_seeds), part)[-1])
    limit = bytes_for(gradients, wanted if sketched else {}, at_once, bool(stages))
    found = sent({name: gradient.clone() for name, gradient in gradients.items()}, seeds, stages, sketch, limit / 1e9)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if stages:
        assert sizes == {1: [1] * 7, 2: [2, 2, 2, 1], 3: [3, 2, 2], 9: [7]}[at_once]
        assert torch.equal(torch.cat(seen), seeds)


def bytes_for(gradients, sketched, at_once, has_stages):
    """The limit for so many leaks at once, in bytes, counted as the channel's comments have it."""
    whole = sum(4 * gradient.numel() for gradient in gradients.values())
    a_leak = whole / 7 * (5 if has_stages else 2)
    largest = max(4 * gradient[0].numel() for gradient in gradients.values()) * (4 if has_stages else 0)
    return 2 * whole + sum(4 * part.numel() for part in sketched.values()) + largest + (at_once + 0.5) * a_leak


def test_gradients_are_overwritten_where_they_are(gradients):
    places = {name: gradient.data_ptr() for name, gradient in gradients.items()}
    found = sent(gradients, torch.arange(4), build_channel([PruningConfig()]), None, 1)
    assert {name: gradient.data_ptr() for name, gradient in found.items()} == places


def test_a_limit_too_small_for_one_leak_says_what_is_needed(gradients):
    with pytest.raises(ConfigError, match=r"gradients.memory_limit_gb: 1e-06 GB is too little.*pass channel"):
        sent(gradients, torch.arange(4), build_channel([PruningConfig()]), None, 1e-6)
