"""Row-wise optimisers against torch.optim, one search at a time."""

import pytest
import torch

from gitlight.attacks.optimizers import LBFGS, Adam, build_optimizer, step_size


def rosenbrock(x):
    return (100 * (x[..., 1::2] - x[..., ::2] ** 2) ** 2 + (1 - x[..., ::2]) ** 2).sum(-1)


def quadratic(x):
    return (torch.arange(1, x.shape[-1] + 1).double() * (x - 1) ** 2).sum(-1) + 0.1 * (x**4).sum(-1)


def gradient(function, x):
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(x).sum(), x)
    return found


@pytest.mark.parametrize("history", [100, 3])  # 3: the oldest pairs make room
@pytest.mark.parametrize("function", [quadratic, lambda x: 0.01 * rosenbrock(x)])
def test_each_row_of_lbfgs_goes_where_torchs_goes(function, history):
    torch.manual_seed(0)
    start = torch.randn(4, 6, dtype=torch.float64) / 2
    x, optimizer = start.clone(), LBFGS(history)
    for _ in range(12):
        x = optimizer.step(x, gradient(function, x), 1.0)
    for row in range(4):
        alone = start[row].clone().requires_grad_()
        reference = torch.optim.LBFGS([alone], lr=1.0, max_iter=1, history_size=history)

        def closure(alone=alone, reference=reference):
            reference.zero_grad()
            loss = function(alone)
            loss.backward()
            return loss

        for _ in range(12):
            reference.step(closure)
        torch.testing.assert_close(x[row], alone.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("signed", [False, True])
def test_adam_is_torchs(signed):
    torch.manual_seed(0)
    start = torch.randn(3, 5, dtype=torch.float64)
    x, optimizer = start.clone(), Adam(signed)
    reference_x = start.clone().requires_grad_()
    reference = torch.optim.Adam([reference_x], lr=0.1)
    for _ in range(20):
        x = optimizer.step(x, gradient(quadratic, x), 0.1)
        found = gradient(quadratic, reference_x.detach())
        reference_x.grad = found.sign() if signed else found
        reference.step()
    torch.testing.assert_close(x, reference_x.detach())


def test_a_step_without_curvature_changes_no_direction():
    def concave_on_the_way(x):  # the second row's gradient is the same everywhere
        return torch.stack([quadratic(x[:1])[0], x[1].sum()])

    torch.manual_seed(0)
    x = torch.randn(2, 6, dtype=torch.float64)
    optimizer = LBFGS(3)
    for _ in range(5):
        before, slope = x, gradient(concave_on_the_way, x)
        x = optimizer.step(x, slope, 1.0)
    torch.testing.assert_close(x[1], before[1] - slope[1])


@pytest.mark.parametrize("name", ["lbfgs", "adam", "signed_adam"])
def test_rows_that_are_kept_go_on_as_if_alone(name):
    torch.manual_seed(0)
    start = torch.randn(5, 6, dtype=torch.float64) / 2
    kept = torch.tensor([1, 4])
    together, alone = build_optimizer(name), build_optimizer(name)
    x, y = start.clone(), start[kept].clone()
    for iteration in range(10):
        if iteration == 4:
            together.keep(kept)
            x = x[kept]
        x = together.step(x, gradient(quadratic, x), 0.5)
        y = alone.step(y, gradient(quadratic, y), 0.5)
    torch.testing.assert_close(x, y)


def test_lbfgs_converges_faster_than_gradient_descent():
    x, optimizer = torch.zeros(1, 10, dtype=torch.float64), LBFGS()
    for _ in range(30):
        x = optimizer.step(x, gradient(quadratic, x), 1.0)
    assert gradient(quadratic, x).norm() < 1e-6


@pytest.mark.parametrize(
    ("decay", "sizes"), [("constant", [1, 1, 1]), ("cosine", [1, 0.5, 0]), ("step", [1, 0.1, 1e-3])]
)
def test_step_sizes(decay, sizes):
    assert [step_size(1.0, decay, at) for at in (0.0, 0.5, 1.0)] == pytest.approx(sizes)
