"""The identifiability report against what the attack finds, and its numbers against dense algebra and noisy solves."""

import math

import pytest
import torch
from torch import nn
from torchvision.transforms import Normalize

from gitlight.architecture import IMAGE, Architecture
from gitlight.config import Config, CustomConfig, DataConfig, FullyConnectedConfig, LeNetConfig, ResNetConfig, ViTConfig
from gitlight.generators.exact.forward import forward_values
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.exact.plan import rules_of
from gitlight.identifiability.drawn import draw_leaks
from gitlight.identifiability.identification import identify, layer_reports
from gitlight.identifiability.report import Verdict
from gitlight.identifiability.systems import known_outputs, measure

SHAPE, N_CLASSES = (3, 16, 16), 5
VIT = ViTConfig(patch_size=4, hidden_size=20, depth=1, heads=2, mlp_size=24)
CASES = {
    "sigmoid": (LeNetConfig(width=6), "exact"),
    "leaky_relu": (LeNetConfig(width=6, activation="leaky_relu", init="default"), "exact"),
    "relu": (LeNetConfig(width=6, activation="relu", init="default"), "estimate"),
    "mlp": (FullyConnectedConfig(hidden_sizes=[20, 10]), "exact"),
    "vit": (VIT, "exact"),
    "resnet20": (ResNetConfig(width=4), "not reached"),
}


def report_of(settings, folder):
    for number in range(N_CLASSES):
        (folder / "train" / str(number)).mkdir(parents=True, exist_ok=True)
    return identify(Config(leaked=settings, data=DataConfig(name="folder", root=str(folder), image_size=SHAPE[1])))


@pytest.mark.parametrize("case", CASES)
def test_report_says_what_the_attack_finds(case, make_pairs, tmp_path):
    settings, image_is = CASES[case]
    report = report_of(settings, tmp_path)
    assert report.image_is == image_is
    leaked, public = make_pairs(settings, n=400)
    inversion = Inversion(leaked.architecture, None, 1, strict=True)
    for fit in inversion.fits():
        fit.update(public.gradients, public.images, public.indices[:, 0])
        fit.finish()
    _, private = make_pairs(settings, n=4, seed=1)
    found = inversion.find(inversion.usable(private.gradients))
    state = {name: value.double() for name, value in leaked.network.state_dict().items() if value.is_floating_point()}
    truth = forward_values(leaked.architecture, private.images[:, 0], state)
    assert {row.name for row in report.layers if row.verdict.exact}
    for row in report.layers:
        name = leaked.architecture[row.name].inputs[0]
        if row.verdict is Verdict.NOT_REACHED:
            assert name not in found.values, row
            assert not row.reached
            assert row.reason
        else:
            error = (found.values[name].value - truth[name]).flatten(1).norm(dim=1) / truth[name].flatten(1).norm(dim=1)
            assert row.verdict.exact == (float(error.max()) < 1e-5), (row, error)
    assert (IMAGE in found.values) == (image_is != "not reached")


def drawn(network, shape=SHAPE):
    architecture = Architecture.of(network, shape, 2)
    rules = rules_of(architecture, strict=False)
    return architecture, rules, draw_leaks(network, architecture)


def test_drawn_leaks_are_those_of_autograd():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(392, 2))
    architecture, _, (leak, *_) = drawn(network)
    network = network.double()
    image = leak.values[IMAGE]
    before = network[0](image).detach().requires_grad_()
    output = network[3](network[2](before.relu()))
    assert torch.allclose(leak.values[architecture.output], output)
    assert torch.allclose(leak.values["0"], before), "an operation in place overwrites nothing"
    label = int(leak.deltas[architecture.output].argmin())
    loss = nn.functional.cross_entropy(output, torch.tensor([label]))
    (delta,) = torch.autograd.grad(loss, before, retain_graph=True)
    assert torch.allclose(leak.deltas["0"], delta)
    nn.functional.cross_entropy(network(image), torch.tensor([label])).backward()
    squares = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).square()
    assert leak.gradient_size == pytest.approx(float(squares.mean().sqrt()))


@pytest.mark.parametrize(("stride", "activation"), [(1, nn.Sigmoid()), (2, nn.ReLU()), (3, nn.LeakyReLU())])
def test_ranks_and_conditions_agree_with_dense_algebra(stride, activation):
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, stride, 1)
    n_outputs = 3 * (-(-8 // stride)) ** 2
    network = nn.Sequential(convolution, activation, nn.Flatten(), nn.Linear(n_outputs, 2))
    architecture, rules, (leak, *_) = drawn(network, (2, 8, 8))
    rule = rules["0"]
    measured = measure(architecture, rules, rule, leak, stack=True)
    unit = leak.deltas["0"] / leak.deltas["0"].norm()
    basis = torch.eye(128, dtype=torch.float64).view(128, 2, 8, 8)
    gradient = rule.weight_gradient(basis, unit.expand(128, *unit.shape[1:])).flatten(1).T
    on = leak.values["1"].flatten() > 0 if isinstance(activation, nn.ReLU) else slice(None)
    forward = nn.functional.conv2d(basis, convolution.weight.double(), None, stride, 1).flatten(1).T[on]
    both = torch.cat([gradient, forward])
    assert measured.forward_equations == len(forward)
    for system, matrix in ((measured.gradient, gradient), (measured.stacked, both)):
        singular = torch.linalg.svdvals(matrix)
        rank = int((singular > 1e-7 * singular[0]).sum())
        assert system.rank == rank
        assert system.condition == pytest.approx(float((singular[0] / singular[rank - 1]).detach()), rel=1e-4)
        if rank < 128:
            assert system.amplification == math.inf
        else:
            spread = float(torch.linalg.pinv(matrix.detach()).square().sum() / 128) ** 0.5
            assert system.amplification == pytest.approx(spread * leak.gradient_size / float(leak.deltas["0"].norm()))


def test_noise_is_amplified_as_reported():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.Flatten(), nn.Linear(384, 2))
    architecture, rules, (leak, *_) = drawn(network)
    rule = rules["0"]
    image, delta = leak.values[IMAGE], leak.deltas["0"]
    measured = measure(architecture, rules, rule, leak, stack=False)
    assert measured.stacked == measured.gradient, "the attack does without forward equations here"
    gradient = rule.weight_gradient(image, delta).expand(200, -1, -1, -1, -1)
    noisy = gradient + 1e-3 * leak.gradient_size * torch.randn_like(gradient)
    found, _, _ = rule.solve(delta.expand(200, -1, -1, -1), noisy, torch.full((200,), 1e-14, dtype=torch.float64))
    assert float((found - image).square().mean().sqrt()) == pytest.approx(
        1e-3 * measured.gradient.amplification, rel=0.1
    )


def test_forward_equations_end_where_buffers_and_sums_are_in_the_way():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.normed, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.below, self.gelu, self.head = nn.Conv2d(3, 3, 1), nn.GELU(), nn.Linear(192, 2)

        def forward(self, x):
            x = self.gelu(self.below(x))
            x = (self.norm(self.normed(x)).relu() + self.plain(x)).sigmoid()
            return self.head(x.flatten(1))

    torch.manual_seed(0)
    architecture, rules, (leak, *_) = drawn(Block().eval(), (3, 8, 8))
    assert not known_outputs(architecture, rules, "normed", leak).any()
    assert not known_outputs(architecture, rules, "plain", leak).any()
    assert not known_outputs(architecture, rules, "head", leak).any()
    assert torch.equal(known_outputs(architecture, rules, "below", leak), leak.values["gelu"] > 0)


def rows_of(network, shape):
    architecture = Architecture.of(network, shape, 2)
    inversion = Inversion(architecture, None, 1, strict=False)
    return inversion, list(layer_reports(inversion, draw_leaks(network, architecture)))


def test_large_systems_are_counted():
    report = identify(Config(leaked=LeNetConfig(width=4), data=DataConfig(image_size=84)))
    lowest = report.layers[-1]
    assert (lowest.unknowns, lowest.gradient_rank, lowest.stacked_rank) == (21168, None, None)
    assert "≤ 300" in report.to_text()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(7056, 2))
    _, rows = rows_of(network, (3, 84, 84))
    assert [row.verdict for row in rows] == [Verdict.GRADIENT, Verdict.OPEN]


def test_saturated_units_are_told():
    settings = LeNetConfig(width=4, activation="tanh", init_range=4.0)
    report = identify(Config(leaked=settings, data=DataConfig(image_size=16)))
    assert report.saturated["activation1"] > 0.01
    assert "Saturated: " in report.to_text()
    assert "float32 gives estimates" in report.headline[1]
    assert "Saturated: " not in identify(Config(data=DataConfig(image_size=16))).to_text()


def test_saturated_units_that_nothing_is_read_through_do_no_harm():
    settings = FullyConnectedConfig(hidden_sizes=[20], activation="tanh", init_range=4.0)
    report = identify(Config(leaked=settings, data=DataConfig(image_size=16)))
    assert "Saturated: " in report.to_text()
    assert "float32 gives estimates" not in " ".join(report.headline)


def net(first):
    return nn.Sequential(first, nn.Conv2d(3, 24, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(64 * 24, 8))


def with_hardtanh():
    return net(nn.Hardtanh(0.2, 0.8))


def with_relu():
    return net(nn.ReLU())


def normalised():
    return net(Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (with_hardtanh, "estimate: hardtanh '0' loses how far beyond its bounds a unit is"),
        (with_relu, "estimate: relu '0' loses how far below zero a unit is that is off"),
        (normalised, "reached: div '0.div' takes 0.std, which no gradient tells"),
    ],
)
def test_what_is_lost_below_all_weights_is_named(made, words):
    settings = CustomConfig(target=f"{__name__}:{made.__name__}")
    headline = identify(Config(leaked=settings, data=DataConfig(image_size=8))).headline
    assert f"{words}." in headline[0]


def test_dependent_equations_are_not_called_exact():
    # Counting finds more equations than unknowns; but a kernel of width 1 with stride 3 does not see every pixel.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 40, 1, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(360, 2))
    _, rows = rows_of(network, (3, 8, 8))
    assert rows[-1].words == "underdetermined by 165 of 192"


def test_below_an_estimate_nothing_is_called_exact():
    # The equations of the first layer determine the image, but its δ passed a ReLU whose state is an estimate.
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 4, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 2)),
    )
    _, rows = rows_of(network, (1, 8, 8))
    assert [row.verdict for row in rows] == [Verdict.GRADIENT, Verdict.UNDERDETERMINED, Verdict.ABOVE]
