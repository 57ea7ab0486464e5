"""Telling the images of a client batch apart by the last layer's gradient."""

import pytest
import torch
from torch.nn import functional

from gitlight.generators.exact import separation
from gitlight.generators.exact.labels import labels_of_batch, next_labels_of_batch
from gitlight.generators.exact.separation import Typical, separable, separate
from gitlight.generators.exact.separation_search import nearest

N_CLASSES, N_FEATURES, N_LEAKS = 10, 30, 40


def leaks(n_images, seed=0, relative_noise=0.0, size=0.2):
    """Mean gradients of a linear layer, by autograd: its weights, inputs, labels, gradients and their noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    weight, bias = torch.randn(N_CLASSES, N_FEATURES, **draw) * size, torch.randn(N_CLASSES, **draw)
    inputs = 0.5 + 0.3 * torch.randn(N_LEAKS, n_images, N_FEATURES, **draw)
    labels = torch.randint(N_CLASSES, (N_LEAKS, n_images), generator=generator)
    gradients = []
    for its_inputs, its_labels in zip(inputs, labels, strict=True):
        parameters = (weight.clone().requires_grad_(), bias.clone().requires_grad_())
        loss = functional.cross_entropy(functional.linear(its_inputs, *parameters), its_labels)
        gradients.append(torch.autograd.grad(loss, parameters))
    of_weight, of_bias = (torch.stack(each) for each in zip(*gradients, strict=True))
    noise = relative_noise * of_weight.square().mean(dim=(1, 2)).sqrt()
    of_weight = of_weight + noise[:, None, None] * torch.randn(of_weight.shape, **draw)
    of_bias = of_bias + noise[:, None] * torch.randn(of_bias.shape, **draw)
    probabilities = torch.softmax(functional.linear(inputs, weight, bias), dim=2).mean(dim=(0, 1))
    typical = Typical(inputs.mean(dim=(0, 1)), inputs.flatten(0, 1).var(dim=0).mean().sqrt(), probabilities)
    common = torch.randn(N_FEATURES, **draw)  # a row that no gradient shows
    return weight + common, bias + 1.0, typical, inputs, labels, of_weight, of_bias, noise.clamp_min(1e-14)


def errors(found, inputs, labels):
    """``(B, N)``: root mean square errors of the inputs, each next to the nearest true one of its own label."""
    distances = (found.inputs.unsqueeze(2) - inputs.unsqueeze(1)).square().mean(dim=3).sqrt()
    other = found.labels.unsqueeze(2) != labels.unsqueeze(1)
    return distances.masked_fill(other, torch.inf).min(dim=2).values


@pytest.mark.parametrize("n_images", [2, 3, 4, 6, 8])
def test_images_of_a_batch_are_told_apart_exactly_also_where_they_share_a_label(n_images):
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(n_images)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, n_images)
    assert torch.equal(found.labels, labels.sort(dim=1).values)
    worst = errors(found, inputs, labels).max(dim=1).values
    assert (worst < 1e-6).double().mean() >= 0.9
    shared = torch.tensor([len(set(row)) < n_images for row in labels.tolist()])
    assert shared.sum() >= 3
    assert (worst[shared] < 1e-6).double().mean() >= 0.7
    # No image is found twice.
    order = found.inputs.unsqueeze(2) - found.inputs.unsqueeze(1)
    apart = order.norm(dim=3)[:, ~torch.eye(n_images, dtype=torch.bool)]
    assert apart[worst < 1e-6].min() > 0.1


@pytest.mark.parametrize(("n_images", "n_leaks", "at_least"), [(8, 40, 38), (9, 20, 18)])
def test_images_of_shared_labels_are_told_apart_where_one_search_ends_too_early(
    n_images, n_leaks, at_least, monkeypatch
):
    weight, bias, typical, *of_leaks = leaks(n_images, seed=2)
    inputs, labels, *given = (part[:n_leaks] for part in of_leaks)
    found = separate(*given, weight, bias, typical, n_images)
    apart = errors(found, inputs, labels).max(dim=1).values < 1e-6
    monkeypatch.setattr(separation, "_MOST_TO_TURN", 0)
    once = separate(*given, weight, bias, typical, n_images)
    apart_at_once = errors(once, inputs, labels).max(dim=1).values < 1e-6
    assert apart.sum() >= at_least
    assert (apart_at_once & ~apart).sum() == 0
    assert apart_at_once.sum() < apart.sum()


def test_what_is_found_of_a_leak_does_not_depend_on_the_others():
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(8, seed=2)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 8)
    alone = separate(of_weight[:5], of_bias[:5], noise[:5], weight, bias, typical, 8)
    apart = errors(alone, inputs[:5], labels[:5]).max(dim=1).values < 1e-6
    assert apart.sum() >= 4
    torch.testing.assert_close(alone.inputs[apart], found.inputs[:5][apart], rtol=1e-6, atol=1e-6)


def test_a_search_has_arrived_where_noise_explains_what_is_left(monkeypatch):
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(8, seed=2, relative_noise=1e-7)
    seen = []
    monkeypatch.setattr(separation, "_search_again", lambda leaks, found, *_: seen.append(leaks.arrived(found)))
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 8)
    apart = errors(found, inputs, labels).max(dim=1).values < 0.1 * typical.spread
    assert 0 < apart.sum() < N_LEAKS
    assert (seen[0] == apart).double().mean() >= 0.9
    assert not seen[0][~apart].any()


def test_a_search_does_not_end_where_images_with_one_label_begin_as_their_mean():
    """Between two of them the squared residual has a saddle, and the first steps from it gain little."""
    weight, bias, typical, inputs, _, _, _, noise = leaks(2, seed=3)
    labels = torch.zeros(N_LEAKS, 2, dtype=torch.int64)
    inputs = typical.inputs + 0.1 * (inputs - typical.inputs)  # alike, so that probabilities are, too
    delta = torch.softmax(functional.linear(inputs, weight, bias), dim=2) - functional.one_hot(labels, N_CLASSES)
    found = separate(delta.mT @ inputs / 2, delta.mean(dim=1), noise, weight, bias, typical, 2)
    assert (errors(found, inputs, labels) < 1e-6).double().mean() > 0.95


def test_stated_errors_are_those_under_noise():
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(2, relative_noise=1e-3)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 2)
    distinct = labels[:, 0] != labels[:, 1]
    ratio = errors(found, inputs, labels)[distinct] / found.inputs_variance.sqrt()[distinct]
    assert 0.7 < ratio.median() < 1.4


def test_stated_errors_are_large_where_images_could_not_be_told_apart():
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(6, relative_noise=1e-2)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 6)
    wrong = errors(found, inputs, labels)[found.labels == labels.sort(dim=1).values] > typical.spread
    stated = found.inputs_variance.sqrt()[found.labels == labels.sort(dim=1).values]
    assert wrong.any()
    assert (stated[wrong] > 0.1 * typical.spread).double().mean() > 0.9


def test_labels_are_read_off_where_one_class_has_nearly_all_probability():
    weight, bias, typical, inputs, labels, _, _, noise = leaks(4)
    bias = bias + 6.0 * functional.one_hot(torch.tensor(3), N_CLASSES)
    delta = torch.softmax(functional.linear(inputs, weight, bias), dim=2)
    typical = typical._replace(probabilities=delta.mean(dim=(0, 1)))
    delta = delta - functional.one_hot(labels, N_CLASSES)
    of_weight, of_bias = delta.mT @ inputs / 4, delta.mean(dim=1)
    labels_of_three = (labels == 3).any(dim=1)
    assert (of_bias[labels_of_three, 3] > 0).any()  # its entry is not the smallest, nor below zero
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 4)
    assert torch.equal(found.labels, labels.sort(dim=1).values)


def test_labels_that_are_not_read_off_at_first_are_those_that_lead_to_images():
    """Where probabilities differ much between images, their mean misleads the reading."""
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(6, seed=1, size=0.8)
    labels = labels.sort(dim=1)
    inputs = inputs.gather(1, labels.indices.unsqueeze(2).expand_as(inputs))
    wrong = (labels_of_batch(of_bias, typical.probabilities, 6) != labels.values).any(dim=1)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 6)
    right = (found.labels == labels.values).all(dim=1)
    assert wrong.sum() >= 10
    assert right[wrong].double().mean() >= 0.7
    assert right[~wrong].all()
    assert (errors(found, inputs, labels.values)[right & wrong] < 1e-6).all()


def test_the_right_labels_are_found_wherever_they_are_among_those_tried(monkeypatch):
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(6, seed=1, size=0.8)
    strict = separate(of_weight, of_bias, noise, weight, bias, typical, 6)
    labels = labels.sort(dim=1)
    inputs = inputs.gather(1, labels.indices.unsqueeze(2).expand_as(inputs))
    misread = labels_of_batch(of_bias, typical.probabilities, 6)
    mended = (strict.labels == labels.values).all(dim=1) & (misread != labels.values).any(dim=1)
    assert mended.sum() >= 5
    sets = next_labels_of_batch(of_bias, typical.probabilities, misread, 3)
    for shift in range(3):
        monkeypatch.setattr(
            separation, "next_labels_of_batch", lambda *_, shift=shift: sets[mended].roll(shift, dims=1)
        )
        found = separate(of_weight[mended], of_bias[mended], noise[mended], weight, bias, typical, 6)
        assert torch.equal(found.labels, labels.values[mended])
        torch.testing.assert_close(found.inputs, strict.inputs[mended], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_a_leak_of_an_impossible_size_spoils_no_other(scale):
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(2)
    of_weight[0], of_bias[0] = of_weight[0] * scale, of_bias[0] * scale
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 2)
    assert (errors(found, inputs, labels)[1:] < 1e-6).double().mean() > 0.9


def test_leaks_are_the_same_in_parts(monkeypatch):
    weight, bias, typical, _, _, of_weight, of_bias, noise = leaks(6)
    whole = separate(of_weight, of_bias, noise, weight, bias, typical, 6)
    monkeypatch.setattr(separation, "_MOST_AT_ONCE", 7 * 102 * 36 * 8)
    parts = separate(of_weight, of_bias, noise, weight, bias, typical, 6)
    torch.testing.assert_close(parts.inputs, whole.inputs, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts.labels, whole.labels)
    assert len(separate(of_weight[:0], of_bias[:0], noise[:0], weight, bias, typical, 6).inputs) == 0


def test_the_jacobian_is_the_residuals_derivative():
    weight, bias, typical, _, _, of_weight, of_bias, noise = leaks(3)
    problems = []
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(separation, "search", lambda problem, start: problems.append((problem, start)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            separate(of_weight, of_bias, noise, weight, bias, typical, 3)
    ((problem, start),) = problems
    problem = problem._replace(doubt=torch.full_like(problem.doubt, 0.3))

    def of_one(number):
        one = problem.of(torch.tensor([number]))
        return torch.func.jacfwd(lambda found: one.residual(found.unsqueeze(0)).squeeze(0))(start[number])

    wanted = torch.stack([of_one(number).flatten(1) for number in range(4)])
    torch.testing.assert_close(problem.jacobian(start)[:4], wanted)


@pytest.mark.parametrize(
    ("n_images", "n_classes", "n_features", "can"),
    [(1, 10, 30, False), (2, 10, 30, True), (9, 10, 30, True), (10, 10, 30, False), (4, 10, 3, False)],
)
def test_more_images_than_equations_are_not_separable(n_images, n_classes, n_features, can):
    assert separable(n_images, n_classes, n_features) is can


def test_of_several_searches_for_one_leak_the_nearest_counts():
    found = torch.arange(6.0).view(6, 1, 1)
    chosen, cost, number = nearest(3, found, torch.tensor([3.0, 1.0, 2.0, 5.0, 6.0, 4.0]))
    assert chosen.flatten().tolist() == [1.0, 5.0]
    assert cost.tolist() == [1.0, 4.0]
    assert number.tolist() == [1, 2]
