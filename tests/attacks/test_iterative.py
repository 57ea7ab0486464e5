"""What a search starts from, and which label belongs to which image."""

import torch
from torch import nn
from torch.nn.functional import one_hot

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.iterative import IterativeAttack, _assigned
from gitlight.config import MatchingConfig
from gitlight.generators.base import Reconstruction


def make(settings, client_batch_size=1, prior=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Sigmoid(), nn.Linear(16, 4))
    architecture = Architecture.of(network, (3, 4, 4), 4)
    function = LeakedFunction(architecture, {key: value.detach() for key, value in network.named_parameters()})
    return function, IterativeAttack(architecture, function, settings, client_batch_size, 0, prior)


def leaks(function, n, client_batch_size=1):
    torch.manual_seed(1)
    images = torch.rand(n, client_batch_size, 3, 4, 4)
    labels = torch.randint(4, (n, client_batch_size))
    gradients = torch.func.vmap(function.gradient)(images, one_hot(labels, 4).float())
    return images, labels, gradients


def always(images, labels=None):
    """A prior that has the same images for everyone."""
    return lambda gradients, numbers, given: Reconstruction(images, ("",) * len(images), labels)


def test_a_leaks_noise_is_the_same_whatever_its_batch():
    settings = MatchingConfig(iterations=3)
    function, attack = make(settings)
    _, _, gradients = leaks(function, 4)
    together = attack.search(gradients, torch.arange(4)).images
    alone = attack.search({key: value[2:3] for key, value in gradients.items()}, torch.tensor([2])).images
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-4)


def test_leaks_that_are_zero_or_not_finite_fail_alone():
    function, attack = make(MatchingConfig(iterations=3))
    _, _, gradients = leaks(function, 3)
    gradients = {key: value.clone() for key, value in gradients.items()}
    for value in gradients.values():
        value[0] = 0
    gradients["1.weight"][2, 0, 0] = torch.inf
    found = attack.search(gradients, torch.arange(3))
    assert [torch.isfinite(image).all().item() for image in found.images] == [False, True, False]
    assert found.verdicts[0] == found.verdicts[2] == "failed: the gradient is zero, or not finite"


def test_restarts_keep_the_nearest():
    function, once = make(MatchingConfig(iterations=15))
    _, _, gradients = leaks(function, 5)
    _, often = make(MatchingConfig(iterations=15, restarts=3))
    assert (
        often.search(gradients, torch.arange(5)).distances <= once.search(gradients, torch.arange(5)).distances
    ).all()


def test_where_a_prior_has_no_image_the_search_starts_from_noise():
    images = torch.rand(2, 1, 3, 4, 4)
    images[1] = torch.nan
    function, attack = make(MatchingConfig(iterations=1, step_size=1e-9), prior=always(images))
    _, _, gradients = leaks(function, 2)
    found = attack.search(gradients, torch.arange(2)).images
    torch.testing.assert_close(found[0], images[0])
    assert torch.isfinite(found[1]).all()


def test_a_leak_without_a_priors_image_takes_the_steps_of_noise():
    images = torch.rand(2, 1, 3, 4, 4)
    images[1] = torch.nan
    function, noise = make(MatchingConfig(iterations=20))
    attack = IterativeAttack(
        function.architecture, function, MatchingConfig(iterations=20), 1, 0, always(images), prior_error=0.001
    )
    _, _, gradients = leaks(function, 2)
    found = attack.search(gradients, torch.arange(2)).images
    assert (found[0] - images[0]).abs().max() <= 20 * 1e-4 + 1e-6
    torch.testing.assert_close(found[1], noise.search(gradients, torch.arange(2)).images[1], rtol=0, atol=1e-3)


def test_labels_go_to_the_images_that_they_fit():
    function, _ = make(MatchingConfig())
    images = torch.rand(1, 3, 3, 4, 4)
    logits = function.logits(images[0])
    assigned = _assigned(function, images, torch.tensor([[0, 1, 2]]), of_prior=None)[0]
    costs = {
        order: sum(-logits.log_softmax(dim=1)[row, label].item() for row, label in enumerate(order))
        for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    }
    assert tuple(assigned.tolist()) == min(costs, key=costs.get)


def test_client_batches_start_from_a_prior_in_any_order():
    images, labels, gradients = leaks(make(MatchingConfig())[0], 3, 2)
    settings = MatchingConfig(iterations=1, step_size=1e-9, labels="given", total_variation=0.0)
    _, attack = make(settings, 2, prior=always(images.flip(1)))
    found = attack.search(gradients, torch.arange(3), labels)
    assert found.distances.isfinite().all()
    torch.testing.assert_close(found.images, images.flip(1))


def test_from_a_prior_labels_that_are_searched_for_begin_at_those_that_leak():
    images, _, gradients = leaks(make(MatchingConfig())[0], 4)
    settings = MatchingConfig(iterations=1, step_size=1e-9, labels="optimised", total_variation=0.0, objective="l2")
    _, attack = make(settings, prior=always(images))
    # The right images with labels of a probability of 0.99: no more is wrong.
    assert (attack.search(gradients, torch.arange(4)).distances < 1e-3).all()


def test_labels_that_a_prior_has_read_off_are_its_images_labels():
    images, labels, gradients = leaks(make(MatchingConfig())[0], 6, 3)
    for how in ("recovered", "given"):
        settings = MatchingConfig(iterations=1, step_size=1e-9, labels=how, total_variation=0.0, objective="l2")
        _, attack = make(settings, 3, prior=always(images, labels))
        found = attack.search(gradients, torch.arange(6), labels.flip(1) if how == "given" else None)
        assert (found.distances < 1e-9).all()
        assert found.labels is None if how == "given" else torch.equal(found.labels, labels)
        _, without = make(settings, 3, prior=always(images))
        searched = without.search(gradients, torch.arange(6), labels.flip(1) if how == "given" else None)
        assert (searched.distances > 1e-3).any()  # labels of a network of random weights say nothing of its images
    # Labels that are given outweigh others that the prior has read off.
    wrong = (labels + 1) % 4
    _, attack = make(settings, 3, prior=always(images, wrong))
    _, without = make(settings, 3, prior=always(images))
    torch.testing.assert_close(
        attack.search(gradients, torch.arange(6), labels).distances,
        without.search(gradients, torch.arange(6), labels).distances,
    )
