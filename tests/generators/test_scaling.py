import torch
from closed_form import add

from gitlight.architecture import Architecture
from gitlight.config import LeNetConfig
from gitlight.generators.scaling import GradientScaling


def test_the_scale_of_a_leak_does_not_matter(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4))
    scaling = GradientScaling(leaked.architecture)
    add(scaling, pair)
    scaling.finish()
    factors = torch.logspace(-8, 8, len(pair), dtype=torch.float64)
    larger = {name: g * factors.view(-1, *[1] * (g.dim() - 1)) for name, g in pair.gradients.items()}
    torch.testing.assert_close(scaling(larger), scaling(pair.gradients), rtol=1e-4, atol=1e-4)


def test_entries_are_standardised_over_pairs(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=50)
    scaling = GradientScaling(leaked.architecture)
    add(scaling, pair)
    scaling.finish()
    size = pair.gradients["linear.bias"].norm(dim=1)
    relative = torch.cat([g.flatten(1) / size[:, None] for g in pair.gradients.values()], dim=1)
    wanted = (relative - relative.mean(0)) / relative.std(0, correction=0)
    torch.testing.assert_close(scaling(pair.gradients), wanted.float(), rtol=1e-3, atol=1e-3)


def test_sums_of_parts_give_the_statistics_of_the_whole(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=10)
    whole, parts = GradientScaling(leaked.architecture), GradientScaling(leaked.architecture)
    add(whole, pair)
    other = GradientScaling(leaked.architecture)
    for scaling, rows in ((parts, slice(0, 3)), (other, slice(3, 10))):
        gradients = {name: g[rows] for name, g in pair.gradients.items()}
        scaling.update(gradients, pair.images[rows], pair.indices[rows, 0])
    for total, more in zip(parts.sums(), other.sums(), strict=True):
        total += more
    whole.finish()
    parts.finish()
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.std, whole.std)


def test_zero_gradients_and_constant_entries_stay_finite(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4))
    for gradient in pair.gradients.values():
        gradient[0] = 0
    pair.gradients["conv1.weight"][:, 0] = 0
    scaling = GradientScaling(leaked.architecture)
    add(scaling, pair)
    scaling.finish()
    assert torch.isfinite(scaling(pair.gradients)).all()


def test_statistics_are_part_of_the_state(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4))
    scaling, copy = GradientScaling(leaked.architecture), GradientScaling(leaked.architecture)
    add(scaling, pair)
    scaling.finish()
    copy.load_state_dict(scaling.state_dict())
    assert torch.equal(copy(pair.gradients), scaling(pair.gradients))


def test_some_parameters_can_be_chosen_and_split_again(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4))
    scaling = GradientScaling(leaked.architecture, ("conv1.weight", "conv2.bias"))
    split = scaling.split(scaling(pair.gradients))
    assert {name: part.shape[1] for name, part in split.items()} == {"conv1.weight": 300, "conv2.bias": 4}


def test_a_model_without_biases_is_scaled_by_its_last_weight():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3, bias=False))
    scaling = GradientScaling(Architecture.of(network, (1, 2, 2), 3))
    gradient = torch.rand(2, 3, 4)
    expected = gradient.flatten(1) / gradient.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(scaling({"1.weight": gradient}), expected)


def test_the_output_error_is_found_whatever_the_order_of_parameters():
    class HeadFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = torch.nn.Linear(5, 3), torch.nn.Linear(4, 5)

        def forward(self, x):
            return self.head(torch.relu(self.body(x.flatten(1))))

    scaling = GradientScaling(Architecture.of(HeadFirst(), (1, 2, 2), 3), ("head.bias",))
    gradients = {"head.weight": torch.rand(2, 3, 5), "head.bias": torch.rand(2, 3), "body.bias": torch.rand(2, 5)}
    torch.testing.assert_close(scaling(gradients).norm(dim=1), torch.ones(2))
