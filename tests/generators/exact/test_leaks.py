import pytest
import torch

from gitlight.generators.exact.leaks import imbalance, rounded, usable_leaks

GENERATOR = torch.Generator().manual_seed(0)
RANK_ONE = torch.randn(4, 5, 1, generator=GENERATOR).double() * torch.randn(4, 1, 7, generator=GENERATOR).double()


def test_noise_is_not_taken_for_a_rounded_probability():
    delta = torch.tensor([[0.9, -0.7, 0.1, 0.05, 0.05], [0.9, -0.7, 0.1, 0.05, 0.05], [0.5, -1.0, 0.25, 0.15, 0.1]])
    noise = torch.tensor([0.1, 1e-6, 1e-6]).double()
    assert rounded(delta.double(), noise).tolist() == [False, True, False]
    torch.testing.assert_close(imbalance(delta), torch.tensor([0.4 / 1.8, 0.4 / 1.8, 0.0]))


def test_leaks_that_are_zero_or_not_finite_are_left_out():
    gradients = {"weight": RANK_ONE.float(), "bias": torch.ones(4, 5), "unused": torch.ones(4, 2)}
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    for gradient in gradients.values():
        gradient[1] = 0
    gradients["unused"][2, 0] = torch.nan
    leaks = usable_leaks(gradients, {"weight", "bias"}, None, "weight")
    assert leaks.which.tolist() == [0, 3]
    assert leaks.n == 2
    assert leaks.dtype is torch.float32
    assert set(leaks.gradients) == {"weight", "bias"}
    assert torch.equal(leaks.gradients["weight"], gradients["weight"][[0, 3]].double())
    some = leaks.where(torch.tensor([False, True]))
    assert some.which.tolist() == [3]
    assert torch.equal(some.gradients["bias"], gradients["bias"][3:].double())
    assert torch.equal(some.noise, leaks.noise[1:])
    every_entry = torch.cat([gradient[[0, 3]].flatten(1) for gradient in gradients.values()], dim=1).double()
    torch.testing.assert_close(leaks.entry_size, every_entry.square().mean(dim=1).sqrt())


@pytest.mark.parametrize("given", [None, 1e-3])
def test_noise_is_what_is_given_or_what_the_last_layer_shows(given):
    level = 0.1
    noisy = RANK_ONE.expand(50, 4, 5, 7).flatten(0, 1)
    noisy = noisy + level * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1)).double()
    leaks = usable_leaks({"weight": noisy}, {"weight"}, given, "weight")
    if given is None:
        assert 0.8 * level < leaks.noise.mean() < 1.2 * level
    else:
        torch.testing.assert_close(leaks.relative_noise, torch.full_like(leaks.noise, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_that_of_rounding_at_least(dtype):
    for given, last_weight in ((None, None), (0.0, "weight")):
        leaks = usable_leaks({"weight": RANK_ONE.to(dtype)}, {"weight"}, given, last_weight)
        assert (leaks.noise >= leaks.rounding).all()
        assert (leaks.noise < 10 * leaks.rounding).all()
