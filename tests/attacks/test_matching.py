"""The shared loop: it finds images, ends what is done, and keeps searches apart."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from gitlight.architecture import Architecture
from gitlight.attacks import matching
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.matching import searches_at_once
from gitlight.attacks.objective import batch_norm_distance, gradient_distance, layer_weights, total_variation
from gitlight.attacks.variables import Pixels
from gitlight.config import DLGConfig, MatchingConfig

SHAPE, N_CLASSES = (2, 6, 6), 4
DLG = DLGConfig(labels="given", iterations=150, tolerance=1e-14)


@pytest.fixture(scope="module")
def function():
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3, 1, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(288, 4)
    ).double()
    values = {key: value.detach() for key, value in network.named_parameters()}
    return LeakedFunction(Architecture.of(network, SHAPE, N_CLASSES), values)


def leaks_of(function, n=3, client_batch_size=1):
    torch.manual_seed(2)
    images = torch.rand(n, client_batch_size, *SHAPE, dtype=torch.float64)
    targets = one_hot(torch.randint(N_CLASSES, (n, client_batch_size)), N_CLASSES).double()
    return images, targets, torch.func.vmap(function.gradient)(images, targets)


def match_gradients(function, settings, leaks, start, *others, **named):
    return matching.match_gradients(function, settings, leaks, Pixels(start, settings.box), *others, **named)


def noise(images):
    return 0.5 + 0.25 * torch.randn_like(images)


def test_dlg_finds_the_images(function):
    images, targets, leaks = leaks_of(function)
    found = match_gradients(function, DLG, leaks, noise(images), targets)
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-3)
    assert (found.distances < 1e-10).all()
    assert not found.diverged.any()


def test_dlg_finds_the_labels_too(function):
    images, targets, leaks = leaks_of(function)
    settings = replace(DLG, labels="optimised", iterations=300)
    found = match_gradients(function, settings, leaks, noise(images), torch.randn_like(targets))
    solved = found.distances < 1e-6
    assert solved.any(), "from random labels some searches may stall"
    assert torch.equal(found.targets[solved].argmax(dim=2), targets[solved].argmax(dim=2))


@pytest.mark.parametrize("optimizer", ["adam", "signed_adam"])
def test_ig_comes_near(function, optimizer):
    images, targets, leaks = leaks_of(function)
    settings = MatchingConfig(labels="given", iterations=400, total_variation=0.0, optimizer=optimizer, dtype="float64")
    start = noise(images).clamp(0, 1)
    found = match_gradients(function, settings, leaks, start, targets)
    before = torch.func.vmap(function.gradient)(start, targets)
    cosines = torch.stack(
        [
            gradient_distance(
                {k: v[i] for k, v in before.items()}, {k: v[i] for k, v in leaks.items()}, torch.ones(6), "cosine"
            )
            for i in range(3)
        ]
    )
    assert (found.distances < 0.05 * cosines).all()
    assert (found.images - images).square().mean() < 0.5 * (start - images).square().mean()
    assert found.images.min() >= 0
    assert found.images.max() <= 1


def test_a_client_batch_is_found_together(function):
    images, targets, leaks = leaks_of(function, n=2, client_batch_size=2)
    found = match_gradients(
        function, replace(DLG, iterations=400), leaks, images + 0.05 * torch.randn_like(images), targets
    )
    assert (found.distances < 1e-8).all()


def test_searches_do_not_see_each_other(function):
    images, targets, leaks = leaks_of(function)
    start = noise(images)
    settings = replace(DLG, iterations=40)
    together = match_gradients(function, settings, leaks, start, targets)
    for row in range(3):
        one = slice(row, row + 1)
        alone = match_gradients(function, settings, {k: v[one] for k, v in leaks.items()}, start[one], targets[one])
        torch.testing.assert_close(together.images[one], alone.images, rtol=1e-6, atol=1e-8)


def test_a_search_that_diverges_ends_alone(function):
    images, targets, leaks = leaks_of(function)
    start = noise(images)
    start[1] = torch.nan
    found = match_gradients(function, DLG, leaks, start, targets)
    assert found.diverged.tolist() == [False, True, False]
    assert torch.isnan(found.images[1]).all()
    torch.testing.assert_close(found.images[[0, 2]], images[[0, 2]], rtol=0, atol=1e-3)


def test_client_batches_that_all_diverge_end_in_failures(function):
    images, targets, leaks = leaks_of(function, n=2, client_batch_size=2)
    seen = []
    found = match_gradients(
        function, DLG, leaks, torch.full_like(images, torch.nan), targets, lambda *shown: seen.append(shown)
    )
    assert found.diverged.all()
    assert torch.isnan(found.images).all()
    assert not seen, "there is nothing to show"


def test_one_search_without_a_prior_is_drawn_nowhere(function):
    images, targets, leaks = leaks_of(function)
    start = noise(images).clamp(0, 1)
    prior = start.clone()
    prior[1] = torch.nan
    settings = MatchingConfig(labels="given", iterations=30, dtype="float64", total_variation=0.0)
    free = match_gradients(function, settings, leaks, start, targets)
    held = match_gradients(function, replace(settings, prior_weight=100.0), leaks, start, targets, prior=prior)
    torch.testing.assert_close(held.images[1], free.images[1])
    assert (held.images[0] - start[0]).square().mean() < 0.5 * (free.images[0] - start[0]).square().mean()


def test_a_search_that_has_arrived_ends(function):
    images, targets, leaks = leaks_of(function)
    start = noise(images)
    start[0] = images[0]
    found = match_gradients(function, replace(DLG, tolerance=1e-6), leaks, start, targets)
    assert found.iterations[0] == 0
    assert (found.iterations[1:] > 3).all()
    torch.testing.assert_close(found.images[0], images[0])


def test_the_best_on_the_way_counts(function):
    images, targets, leaks = leaks_of(function)
    settings = MatchingConfig(
        labels="given", iterations=5, step_size=5.0, decay="constant", dtype="float64", total_variation=0.0
    )
    found = match_gradients(function, settings, leaks, images + 1e-3, targets)
    torch.testing.assert_close(found.images, images + 1e-3, msg="every step leads away")


def test_the_record_shows_the_way(function):
    images, targets, leaks = leaks_of(function)
    seen = []
    settings = replace(DLG, iterations=20, record_every=8, snapshots=[3])
    match_gradients(
        function,
        settings,
        leaks,
        noise(images),
        targets,
        lambda rows, iteration, shown, distances: seen.append((rows.tolist(), iteration, shown.shape, distances)),
    )
    assert [iteration for _, iteration, _, _ in seen] == [0, 3, 8, 16, 20]
    assert all(rows == [0, 1, 2] and shape == images.shape for rows, _, shape, _ in seen)
    assert (seen[-1][3] < seen[0][3]).all()


def test_a_prior_that_stays_draws_towards_itself(function):
    images, targets, leaks = leaks_of(function)
    start = noise(images).clamp(0, 1)
    settings = MatchingConfig(labels="given", iterations=30, dtype="float64", total_variation=0.0)
    free = match_gradients(function, settings, leaks, start, targets)
    held = match_gradients(function, replace(settings, prior_weight=100.0), leaks, start, targets, prior=start)
    assert (held.images - start).square().mean() < 0.5 * (free.images - start).square().mean()


def test_distances_are_what_they_say():
    torch.manual_seed(0)
    found = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    leak = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    flat = [torch.cat([part.flatten() for part in gradient.values()]) for gradient in (found, leak)]
    ones = torch.ones(2)
    cosine = 1 - torch.nn.functional.cosine_similarity(*flat, dim=0)
    torch.testing.assert_close(gradient_distance(found, leak, ones, "cosine"), cosine)
    euclidean = (flat[0] - flat[1]).square().sum() / flat[1].square().sum()
    torch.testing.assert_close(gradient_distance(found, leak, ones, "l2"), euclidean)
    tiny = [{name: 1e-20 * part for name, part in gradient.items()} for gradient in (found, leak)]
    for kind, wanted in (("cosine", cosine), ("l2", euclidean)):
        torch.testing.assert_close(gradient_distance(*tiny, ones, kind), wanted)
    assert gradient_distance(leak, leak, ones, "cosine") == 0
    only_a = gradient_distance(found, leak, torch.tensor([1.0, 0.0]), "l2")
    torch.testing.assert_close(only_a, (found["a"] - leak["a"]).square().sum() / leak["a"].square().sum())


def test_layer_weights(function):
    _, _, leaks = leaks_of(function)
    architecture = function.architecture
    assert torch.equal(layer_weights(architecture, leaks, "equal"), torch.ones(3, 6))
    linear = layer_weights(architecture, leaks, "linear")
    assert linear[0].tolist() == pytest.approx([1, 1.2, 1.4, 1.6, 1.8, 2])
    size = layer_weights(architecture, leaks, "size")
    parts = torch.stack([leak.flatten(1).square().sum(dim=1) for leak in leaks.values()], dim=1)
    torch.testing.assert_close(size * parts, parts.mean(dim=1, keepdim=True).expand(-1, 6))
    pruned = leaks | {"0.bias": torch.zeros_like(leaks["0.bias"])}
    assert (layer_weights(architecture, pruned, "size")[:, list(leaks).index("0.bias")] == 0).all()


def test_total_variation_of_a_ramp():
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    assert total_variation(ramp).item() == pytest.approx(1)
    assert total_variation(torch.full((1, 3, 4, 4), 0.3)) == 0


def test_batch_norm_distance_vanishes_at_the_running_statistics():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).double()
    images = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    seen = network[0](images).detach()
    network[1].running_mean.copy_(seen.mean(dim=(0, 2, 3)))
    network[1].running_var.copy_(seen.var(dim=(0, 2, 3), unbiased=False))
    values = {key: value.detach() for key, value in (*network.named_parameters(), *network.named_buffers())}
    function = LeakedFunction(Architecture.of(network, (3, 8, 8), 2), values)
    assert batch_norm_distance(function, images) < 1e-12
    assert batch_norm_distance(function, images.flip(0) * 2) > 0.1


def test_more_memory_is_more_searches(function):
    few = searches_at_once(function.architecture, replace(DLG, memory_limit_gb=0.01), 1)
    many = searches_at_once(function.architecture, replace(DLG, memory_limit_gb=0.1), 1)
    assert 1 <= few < many
    assert searches_at_once(function.architecture, replace(DLG, memory_limit_gb=1e-9), 1) == 1
