import itertools
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gitlight.metrics import bootstrap_interval, image_metrics, match


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_match_finds_the_least_total_squared_error(n: int) -> None:
    truth, found = images(5, n, 3, 8, 8), images(5, n, 3, 8, 8, seed=1)
    matched = match(found, truth)
    for b in range(5):
        errors = {
            order: float((found[b, list(order)] - truth[b]).double().square().sum())
            for order in itertools.permutations(range(n))
        }
        best = min(errors, key=lambda order: errors[order])
        assert torch.equal(matched[b], found[b, list(best)])


def test_match_undoes_a_permutation_of_nearly_equal_images() -> None:
    truth = 0.5 + 1e-4 * images(1, 8, 1, 8, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(match(truth[:, order], truth), truth)


def test_match_returns_single_images_untouched() -> None:
    found = images(4, 1, 3, 8, 8)
    assert match(found, images(4, 1, 3, 8, 8, seed=1)) is found


def test_match_passes_gradients_to_the_reconstructions() -> None:
    truth = images(2, 3, 1, 8, 8)
    found = truth[:, [1, 2, 0]].clone().requires_grad_()
    (match(found, truth) * torch.arange(3.0).view(1, 3, 1, 1, 1)).sum().backward()
    assert torch.equal(found.grad[0, :, 0, 0, 0], torch.tensor([1.0, 2.0, 0.0]))


def test_match_survives_diverged_reconstructions() -> None:
    truth = images(1, 3, 1, 8, 8)
    found = truth[:, [2, 0, 1]].clone()
    found[0, 0] = math.nan
    matched = match(found, truth)
    assert torch.equal(matched[0, :2], truth[0, :2])
    assert matched[0, 2].isnan().all()


def test_metrics_refuse_images_of_another_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        image_metrics(images(2, 1, 3, 16, 16), images(2, 2, 3, 16, 16))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (11, 15)])
def test_psnr_and_ssim_agree_with_scikit_image(channels: int, size: tuple[int, int]) -> None:
    truth = images(3, 2, channels, *size)
    found = (truth + 0.1 * images(3, 2, channels, *size, seed=1)).clamp(0, 1)
    values = image_metrics(found, truth)
    for b, n in itertools.product(range(3), range(2)):
        a, c = (x[b, n].permute(1, 2, 0).double().numpy() for x in (truth, found))
        assert values["mse"][b, n] == pytest.approx(np.mean((a - c) ** 2), rel=1e-5)
        assert values["psnr"][b, n] == pytest.approx(peak_signal_noise_ratio(a, c, data_range=1), abs=1e-4)
        ssim = structural_similarity(
            a, c, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert values["ssim"][b, n] == pytest.approx(ssim, abs=1e-4)


def test_a_perfect_image_has_120_db_and_ssim_one() -> None:
    truth = images(1, 2, 3, 16, 16)
    values = image_metrics(truth, truth)
    assert values["psnr"].tolist() == [[120.0, 120.0]]
    assert values["ssim"].tolist() == [[1.0, 1.0]]
    almost = image_metrics(truth.double() + 1e-9, truth.double())
    assert almost["psnr"].max() == pytest.approx(120)


def test_metrics_clamp_to_the_range_of_images() -> None:
    truth = torch.ones(1, 1, 3, 16, 16)
    assert image_metrics(truth + 5, truth)["mse"].item() == 0


def test_half_precision_does_not_change_the_metrics() -> None:
    truth, found = images(1, 1, 3, 16, 16).bfloat16(), images(1, 1, 3, 16, 16, seed=1).bfloat16()
    half, full = image_metrics(found, truth), image_metrics(found.float(), truth.float())
    assert all(torch.equal(half[name], full[name]) for name in full)


def test_a_diverged_reconstruction_shows_as_nan() -> None:
    truth = images(1, 1, 3, 16, 16)
    assert image_metrics(truth * math.nan, truth)["psnr"].isnan().all()


def test_ssim_of_images_smaller_than_the_window_stays_in_range() -> None:
    truth = images(2, 1, 1, 8, 8)
    assert image_metrics(truth, truth)["ssim"].tolist() == [[1.0], [1.0]]
    assert image_metrics(1 - truth, truth)["ssim"].max() < 0


def test_ssim_says_which_images_are_too_small() -> None:
    with pytest.raises(ValueError, match="6 × 6 pixels, not 5 × 9"):
        image_metrics(images(1, 1, 1, 5, 9), images(1, 1, 1, 5, 9))


def test_lpips_is_left_out_where_it_is_not_defined() -> None:
    def lpips(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3))

    small, large = images(1, 2, 1, 30, 32), images(1, 2, 1, 31, 32)
    assert "lpips" not in image_metrics(small, small, lpips)
    assert image_metrics(large, large, lpips)["lpips"].shape == (1, 2)


def test_bootstrap_interval_agrees_with_a_plain_loop() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)) ** 2
    rng = np.random.default_rng(0)
    means = [np.mean(rng.choice(values.numpy(), 200)) for _ in range(4000)]
    low, high = bootstrap_interval(values, n_samples=4000, seed=1)
    width = high - low
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.06 * width)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.06 * width)


def test_bootstrap_interval_is_deterministic_and_leaves_the_global_seed_alone() -> None:
    values = images(50)
    state = torch.random.get_rng_state()
    assert bootstrap_interval(values, 500, seed=7) == bootstrap_interval(values.view(5, 10), 500, seed=7)
    assert bootstrap_interval(values, 500, seed=7) != bootstrap_interval(values, 500, seed=8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bootstrap_interval_of_one_value_is_that_value() -> None:
    assert bootstrap_interval(torch.tensor([3.0]), 100, seed=0) == (3.0, 3.0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(torch.zeros(0), 100, seed=0)


def test_bootstrap_interval_of_many_values_is_made_in_pieces() -> None:
    values = images(300_000)
    low, high = bootstrap_interval(values, 40, seed=0)
    assert low < float(values.double().mean()) < high
    assert high - low < 6 * float(values.std()) / math.sqrt(len(values))
