"""What every generator must do, and what is particular to LTI."""

from dataclasses import replace

import pytest
import torch
from closed_form import run_fits
from small_generators import DEEP, SMALL, build
from torch import nn

from gitlight.config import (
    FullyConnectedConfig,
    LeNetConfig,
    MLPGeneratorConfig,
    SketchConfig,
)
from gitlight.generators import GENERATORS, coarse
from gitlight.generators.width import n_trainable
from gitlight.gradients.sketch import Sketch


@pytest.fixture(params=list(SMALL))
def name(request):
    return request.param


@pytest.mark.parametrize("leaked_settings", [LeNetConfig(width=4), FullyConnectedConfig(hidden_sizes=[12])])
@pytest.mark.parametrize("client_batch_size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_become_images(make_pairs, name, leaked_settings, client_batch_size, dtype):
    leaked, pair = make_pairs(leaked_settings, n=60, client_batch_size=client_batch_size, dtype=dtype)
    _, single = make_pairs(leaked_settings, n=120, dtype=dtype)
    generator = run_fits(build(name, leaked.architecture, client_batch_size), [pair], [single])
    images = generator(pair.gradients)
    assert images.shape == pair.images.shape
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_mixed_precision_changes_the_trained_layers_alone(make_pairs, name):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=200)
    generator = run_fits(build(name, leaked.architecture), [pair])
    wanted = generator(pair.gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = generator(pair.gradients)
    assert images.dtype == torch.float32
    # Hybrid's refinement starts at zero, so that all it gives is its closed form.
    torch.testing.assert_close(images, wanted, rtol=0, atol=0 if name == "hybrid" else 0.02)


def test_everything_trainable_gets_a_gradient(make_pairs, name):
    # With as many images as classes hybrid tells none apart, and its refinement does not start at zero.
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60, client_batch_size=5)
    generator = run_fits(build(name, leaked.architecture, 5), [pair])
    (generator(pair.gradients) - pair.images).square().mean().backward()
    without = [key for key, p in generator.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_state_restores_the_generator_with_its_fits(make_pairs, name):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60)
    generator = run_fits(build(name, leaked.architecture), [pair])
    copy = build(name, leaked.architecture)
    assert not copy.fitted
    copy.load_state_dict(generator.state_dict())
    assert copy.fitted
    assert torch.equal(copy(pair.gradients), generator(pair.gradients))


def test_fits_do_not_depend_on_how_pairs_are_batched(make_pairs, name):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=200)
    whole = run_fits(build(name, leaked.architecture), [pair])
    rows = torch.arange(200).chunk(4)
    parts = [
        type(pair)({k: g[r] for k, g in pair.gradients.items()}, pair.images[r], pair.labels[r], pair.indices[r])
        for r in rows
    ]
    in_parts = run_fits(build(name, leaked.architecture), parts)
    torch.testing.assert_close(in_parts(pair.gradients), whole(pair.gradients), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [60_000, 300_000])
def test_a_budget_of_parameters_is_met_and_used(lenet_architecture, name, budget):
    generator = build(name, lenet_architecture, parameters=budget)
    assert 0.7 * budget < n_trainable(generator) <= budget


def test_a_step_of_descent_lowers_the_error(make_pairs, name):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=100)
    generator = run_fits(build(name, leaked.architecture), [pair])
    _, pair = make_pairs(LeNetConfig(width=4), n=100, seed=1)  # a closed form fits its own pairs too well to improve
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(generator(pair.gradients), pair.images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_lti_takes_raw_gradients_where_asked_to(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), dtype="float32")
    generator = build("mlp", leaked.architecture, scale_inputs=False)
    assert generator.fits() == ()
    flat = torch.cat([gradient.flatten(1) for gradient in pair.gradients.values()], dim=1)
    torch.testing.assert_close(generator(pair.gradients).flatten(1), generator.network(flat))


def test_lti_has_its_published_size_by_default(lenet_architecture):
    settings = MLPGeneratorConfig()
    generator = GENERATORS["mlp"].load()(lenet_architecture, settings)
    sizes = [module.out_features for module in generator.network if isinstance(module, nn.Linear)]
    assert sizes == [3000, 3000, 3 * 16 * 16]


@pytest.mark.parametrize("deep_name", ["coarse", "hybrid"])
@pytest.mark.parametrize("settings", DEEP)
@pytest.mark.parametrize("client_batch_size", [1, 2])
@pytest.mark.parametrize("sketched", [False, True])
def test_branches_attention_and_sketches_become_images(
    make_pairs, monkeypatch, deep_name, settings, client_batch_size, sketched
):
    monkeypatch.setattr(coarse, "_MOST_ENTRIES", 600)  # so that small models have large maps, too
    leaked, pair = make_pairs(settings, n=60, client_batch_size=client_batch_size, dtype="float32")
    architecture, gradients = leaked.architecture, pair.gradients
    if sketched:
        sketch = Sketch(architecture, SketchConfig(name="count", size=50))
        architecture, gradients = sketch.seen_by_generators(architecture), sketch(gradients)
    _, single = make_pairs(settings, n=120, dtype="float32")
    single = replace(single, gradients=sketch(single.gradients) if sketched else single.gradients)
    pairs = [replace(pair, gradients=gradients)]
    generator = run_fits(build(deep_name, architecture, client_batch_size), pairs, [single])
    images = generator(gradients)
    assert images.shape == pair.images.shape
    if n_trainable(generator) == 0:
        torch.testing.assert_close(images, pair.images, rtol=0, atol=1e-2)  # by the position embedding's gradient
        return
    optimizer = torch.optim.SGD(generator.parameters(), lr=1e-3)
    for _ in range(2):  # hybrid's last layer starts at zero, and lets no gradient pass in the first step
        optimizer.zero_grad()
        (generator(gradients) - pair.images).square().mean().backward()
        without = [key for key, p in generator.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer.step()
    assert not without
