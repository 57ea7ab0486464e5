"""What becomes of a leak."""

import pytest
import torch

from gitlight.generators.exact.status import Status, screen, worsen


def leaks():
    return {"weight": torch.ones(4, 2, 3), "bias": torch.ones(4, 2)}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_broken_entry_of_any_parameter_breaks_its_leak_alone(name, value):
    gradients = leaks()
    gradients[name][1].view(-1)[-1] = value
    assert screen(gradients).tolist() == [Status.EXACT, Status.NOT_FINITE, Status.EXACT, Status.EXACT]


def test_a_leak_is_zero_where_all_its_gradients_are():
    gradients = leaks()
    gradients["weight"][:2], gradients["bias"][0] = 0, 0
    assert screen(gradients).tolist() == [Status.ZERO_GRADIENT, Status.EXACT, Status.EXACT, Status.EXACT]


def test_no_leaks_have_no_status():
    assert screen({"weight": torch.ones(0, 2)}).shape == (0,)


def test_a_leak_keeps_the_worst_that_applies():
    status = torch.tensor([Status.EXACT, Status.SINGULAR, Status.ESTIMATE])
    found = worsen(status, torch.tensor([True, True, False]), Status.SATURATED)
    assert found.tolist() == [Status.SATURATED, Status.SINGULAR, Status.ESTIMATE]
    assert status.tolist() == [Status.EXACT, Status.SINGULAR, Status.ESTIMATE], "the argument is left alone"


@pytest.mark.parametrize("status", Status)
def test_every_status_has_words_that_say_whether_it_failed(status):
    assert status.failed == status.words.startswith("failed")
