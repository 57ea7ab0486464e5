"""What every generator must do, and what is particular to each."""

from dataclasses import replace

import pytest
import torch
from closed_form import add, run_fits
from tied import Tied
from torch import nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.config import (
    CoarseGeneratorConfig,
    ExactGeneratorConfig,
    FullyConnectedConfig,
    GaussianNoiseConfig,
    GradientsConfig,
    HybridGeneratorConfig,
    LeNetConfig,
    MLPGeneratorConfig,
    ResNetConfig,
    SketchConfig,
    ViTConfig,
)
from gitlight.data.pair import GradientPair
from gitlight.errors import ArchitectureError, CheckpointError, ConfigError
from gitlight.generators import GENERATORS, coarse
from gitlight.generators.width import n_trainable
from gitlight.gradients.channel import GaussianNoise
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch

SMALL = {
    "mlp": {"hidden_size": 20},
    "coarse": {"hidden_size": 20, "channels": 4},
    "hybrid": {"channels": 8, "blocks": 1, "gradient_channels": 2},
}
DEEP = [ResNetConfig(width=4), ViTConfig(patch_size=4, hidden_size=12, depth=1, heads=2, mlp_size=16)]


def build(name, architecture, client_batch_size=1, **changed):
    settings = GENERATORS[name].settings(**{**SMALL[name], **changed})
    torch.manual_seed(0)
    return GENERATORS[name].load()(architecture, settings, client_batch_size)


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
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60, client_batch_size=3)
    generator = run_fits(build(name, leaked.architecture, 3), [pair])
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


def test_coarse_has_one_step_per_module_with_the_shapes_of_the_trace(lenet_architecture):
    generator = GENERATORS["coarse"].load()(lenet_architecture, CoarseGeneratorConfig(hidden_size=7, averages=False))
    shapes = [(step.hidden.in_features, step.output.out_features) for step in generator.steps]
    linear, conv, first = 64 * 5 + 5, 4 * 4 * 25 + 4, 4 * 3 * 25 + 4
    assert shapes == [(linear, 64), (64 + conv, 64), (64 + conv, 256), (256 + first, 768)]


def test_a_coarse_step_sees_the_averages_of_its_own_layers(lenet_architecture):
    with_them, without = (
        GENERATORS["coarse"].load()(lenet_architecture, CoarseGeneratorConfig(hidden_size=7, averages=averages))
        for averages in (True, False)
    )
    more = [a.hidden.in_features - b.hidden.in_features for a, b in zip(with_them.steps, without.steps, strict=True)]
    assert more == [64, 4 * 25, 4 * 25, 3 * 25]


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


def test_coarse_corrects_a_regression_on_the_averages_of_the_smallest_layers(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=300)
    generator = run_fits(build("coarse", leaked.architecture, linear_start_features=250), [pair])
    for parameter in generator.steps[-1].parameters():
        nn.init.zeros_(parameter)

    averages = generator.averages.split(generator.averages.features(pair.gradients))
    smallest = ("conv1.weight", "conv2.weight", "linear.weight")  # 75, 100 and 64 entries; conv3's 100 are too many
    features = torch.cat([averages[name] for name in smallest], dim=1).double()
    centred = (features - features.mean(dim=0)) / features.std(dim=0, correction=0)
    images = pair.images.flatten(1).double()
    # The same regression from the pairs themselves, by singular values.
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    shrunk = values / (values.square() + len(images) * generator.ridge.strength)
    wanted = images.mean(dim=0) + centred @ right.T @ (shrunk.unsqueeze(1) * left.T @ images)
    found = generator(pair.gradients).flatten(1).double()
    torch.testing.assert_close(found, wanted.clamp(0, 1), rtol=0, atol=1e-3)


def test_coarse_without_a_linear_start_makes_the_image_by_its_steps_alone(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60)
    generator = run_fits(build("coarse", leaked.architecture, linear_start_features=0), [pair])
    assert generator.ridge is None
    for parameter in generator.steps[-1].parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(generator(pair.gradients), torch.full_like(pair.images, 0.5, dtype=torch.float32))


def test_large_estimates_of_coarse_are_made_by_convolutions(make_pairs, monkeypatch):
    monkeypatch.setattr(coarse, "_MOST_ENTRIES", 600)
    leaked, _ = make_pairs(DEEP[0])
    generator = build("coarse", leaked.architecture)
    # The image, 768 entries, and the four estimates of 4 × 16 × 16.
    assert [step.convolutions is not None for step in generator.steps] == [False] * 6 + [True] * 5


def test_coarse_takes_a_module_whose_parameters_are_an_earlier_ones():
    network = Tied()
    generator = build("coarse", Architecture.of(network, (3, 2, 2), 2))
    gradients = {name: torch.randn(4, *p.shape) for name, p in network.named_parameters()}
    assert generator(gradients).shape == (4, 1, 3, 2, 2)


def test_coarse_of_one_module_is_a_multilayer_perceptron(lenet_architecture):
    generator = build("coarse", lenet_architecture, modules=["*"])
    assert len(generator.steps) == 1


def test_hybrid_is_exact_for_fully_connected_networks_with_nothing_to_train(make_pairs):
    leaked, pair = make_pairs(FullyConnectedConfig(hidden_sizes=[12]))
    generator = run_fits(build("hybrid", leaked.architecture), [])
    assert n_trainable(generator) == 0
    torch.testing.assert_close(generator(pair.gradients), pair.images, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def fully_solved():
    """A small convolutional model whose image forward equations reach, and 300 noisy pairs of it."""
    torch.manual_seed(4)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 6)
    ).requires_grad_(False)
    architecture = Architecture.of(network, (1, 8, 8), 6)
    images, labels = torch.rand(300, 1, 1, 8, 8), torch.randint(6, (300, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    return architecture, gradients, images


def test_hybrid_with_forward_equations_starts_from_exact_inversion(fully_solved):
    architecture, gradients, images = fully_solved
    pair = GradientPair(gradients, images, torch.zeros(300, 1), torch.arange(300).view(300, 1))
    generator = run_fits(build("hybrid", architecture, forward_equations=True), [pair])
    assert generator.walk.features[-1].result == IMAGE
    assert generator.ridge.error < 1e-4
    some = {name: gradient[:4] for name, gradient in gradients.items()}
    torch.testing.assert_close(generator.start(some), images[:4], rtol=0, atol=1e-3)
    assert any(parameter.requires_grad for parameter in generator.parameters()), "what noise leaves is learned"


def test_hybrid_takes_weights_that_clean_pairs_gave(fully_solved, tmp_path):
    architecture, gradients, images = fully_solved
    torch.manual_seed(0)
    exact = GENERATORS["exact"].load()(architecture, ExactGeneratorConfig(), 1)
    pair = GradientPair(gradients, images, torch.zeros(300, 1), torch.arange(300).view(300, 1))
    run_fits(exact, [pair])
    file = tmp_path / "exact.ckpt"
    torch.save({"state_dict": {f"generator.{key}": value for key, value in exact.state_dict().items()}}, file)
    noisy = GaussianNoise(GaussianNoiseConfig(relative_std=1e-4))(gradients, torch.arange(300))
    noisy_pair = replace(pair, gradients=noisy)
    own = run_fits(build("hybrid", architecture, forward_equations=True), [noisy_pair])
    taken = run_fits(build("hybrid", architecture, forward_equations=True, weights_from=str(file)), [noisy_pair])
    assert taken.ridge.error < 0.3 * own.ridge.error, "noisy pairs fit no weights"
    name = next(iter(taken.estimated_parameters()))
    assert torch.equal(taken.estimated_parameters()[name].value, exact.estimated_parameters()[name].value)


def test_hybrid_names_what_it_cannot_take_weights_from(fully_solved, lenet_architecture, tmp_path):
    architecture, _, _ = fully_solved
    given = {"forward_equations": True, "weights_from": str(tmp_path / "none")}
    with pytest.raises(CheckpointError, match=r"generator\.weights_from: .*none does not exist"):
        list(build("hybrid", architecture, **given).fits())
    torch.manual_seed(0)
    other = GENERATORS["exact"].load()(lenet_architecture, ExactGeneratorConfig(), 1)
    for state, message in (({}, "holds no weights"), (other.state_dict(), "is of another leaked model")):
        file = tmp_path / "other.ckpt"
        torch.save({"state_dict": {f"generator.{key}": value for key, value in state.items()}}, file)
        with pytest.raises(CheckpointError, match=rf"generator\.weights_from: .*{message}"):
            list(build("hybrid", architecture, **{**given, "weights_from": str(file)}).fits())
    with pytest.raises(ConfigError, match=r"generator\.weights_from: .*forward_equations=true"):
        build("hybrid", architecture, weights_from="run")


def test_hybrid_takes_forward_equations_of_one_image_per_leak_only(lenet_architecture):
    with pytest.raises(ConfigError, match=r"generator\.forward_equations: .*client_batch_size above 1"):
        build("hybrid", lenet_architecture, client_batch_size=2, forward_equations=True)


def test_hybrid_sees_how_noisy_a_leak_is(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60, dtype="float32")
    generator = run_fits(build("hybrid", leaked.architecture), [pair])
    clean = generator.walk(pair.gradients).levels
    channel = GaussianNoise(GaussianNoiseConfig(relative_std=1e-3))
    noisy = generator.walk(channel(pair.gradients, torch.arange(len(pair)))).levels
    torch.testing.assert_close(noisy[:, 0], torch.full_like(noisy[:, 0], -3.0), rtol=0, atol=0.15)
    assert (clean[:, 0] < -5.5).all()
    assert (noisy[:, 1] > clean[:, 1] + 1).all(), "the first feature's error grows with it"


def test_hybrid_starts_from_its_closed_form(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=12), n=400)
    generator = run_fits(build("hybrid", leaked.architecture), [pair])
    assert torch.equal(generator(pair.gradients), generator.start(pair.gradients))
    error = (generator(pair.gradients) - pair.images).square().mean()
    spread = (pair.images.mean(dim=0) - pair.images).square().mean()
    assert error < 0.01 * spread, "the closed form alone must be far better than the mean image"


def test_hybrids_start_uses_the_averages_of_deeper_layers():
    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    # A convolution with one position: its average is the image. There is no rule for a sine, and no walk passes it.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 6), Sine(), nn.Flatten(), nn.Linear(8, 5)).double()
    architecture = Architecture.of(network, (3, 6, 6), 5)
    images, labels = torch.rand(400, 1, 3, 6, 6), torch.randint(5, (400, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    pair = GradientPair(gradients, images, labels, torch.arange(400).unsqueeze(1))
    errors = {}
    for averages in (True, False):
        generator = run_fits(build("hybrid", architecture, averages=averages), [pair])
        errors[averages] = (generator.start(gradients) - images).square().mean()
    assert errors[True] < 1e-6
    assert errors[False] > 1e-2


def test_hybrid_holds_the_same_share_of_pairs_out_for_any_client_batch(make_pairs):
    for client_batch_size in (1, 5, 10):
        leaked, pair = make_pairs(LeNetConfig(width=4), n=40, client_batch_size=client_batch_size)
        (*_, fit) = build("hybrid", leaked.architecture, client_batch_size).fits()
        add(fit, pair)
        kept, held_out = fit.sums()[:2]
        assert (kept[0, 0], held_out[0, 0]) == (36, 4), "the count is the product of ones"


def test_hybrid_learns_from_pixels_that_overshoot(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60)
    generator = run_fits(build("hybrid", leaked.architecture), [pair])
    with torch.no_grad():
        generator.refinement.leave.bias.fill_(5.0)
    images = generator(pair.gradients)
    assert (images == 1).all()
    (images - pair.images).square().mean().backward()
    assert (generator.refinement.leave.bias.grad > 0).all()


def test_hybrid_uses_the_gradients_of_layers_that_its_walk_does_not_reach(make_pairs):
    leaked, _ = make_pairs(LeNetConfig(width=12), shape=(3, 32, 32))
    generator = build("hybrid", leaked.architecture)
    assert generator.scaling.n_entries == sum(p.numel() for p in leaked.network.conv1.parameters())


def test_hybrid_learns_from_the_smallest_gradients_that_fit(make_pairs):
    leaked, _ = make_pairs(DEEP[0])
    shapes = leaked.architecture.parameter_shapes
    generator = build("hybrid", leaked.architecture, gradient_entries=2000)
    assert 1500 < generator.scaling.n_entries <= 2000
    left_out = sum(shape.numel() for shape in shapes.values()) - generator.scaling.n_entries
    assert left_out > 2000
    assert build("hybrid", leaked.architecture, gradient_entries=0).scaling is None


def test_hybrid_names_the_sketch_that_hides_its_start(lenet_architecture):
    sketch = Sketch(lenet_architecture, SketchConfig(name="count", size=50, keep_exact=["*.bias"]))
    with pytest.raises(ArchitectureError, match=r"of linear.weight there is only a sketch.*keep_exact"):
        build("hybrid", sketch.seen_by_generators(lenet_architecture))


@pytest.mark.parametrize("size", [(3, 15, 17), (1, 9, 9)])
def test_hybrid_takes_images_of_odd_size(size):
    network = nn.Sequential(nn.Conv2d(size[0], 6, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, *size))
    architecture = Architecture.of(network, size, 3)
    generator = GENERATORS["hybrid"].load()(architecture, HybridGeneratorConfig(channels=4, blocks=1))
    gradients = {name: torch.randn(2, *p.shape) for name, p in network.named_parameters()}
    assert generator(gradients).shape == (2, 1, *size)
