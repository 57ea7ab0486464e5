import math

import numpy as np
import pytest
import torch
from tiny_run import Fit, TinyData, TinyModule, batches
from torch import nn

from gitlight.callbacks import WeightDistance
from gitlight.callbacks.weight_distance import weight_distances
from gitlight.generators.base import ParameterEstimate


def test_distances_are_euclidean_norms() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.full((2, 2), 6.0), "c": torch.ones(3)}
    estimates = {"a": ParameterEstimate(torch.zeros(2)), "b": ParameterEstimate(torch.zeros(2, 2))}
    distances = weight_distances(estimates, truth)
    assert distances == pytest.approx(
        {"a": 5, "a_relative": 1, "b": 12, "b_relative": 1, "total": 13, "total_relative": 1}
    )


def test_a_common_row_does_not_count_where_it_cannot_be_known() -> None:
    torch.manual_seed(0)
    truth = torch.randn(5, 4)
    shifted = ParameterEstimate(truth + torch.randn(4), up_to_common_row=True)
    assert weight_distances({"w": shifted}, {"w": truth})["w"] < 1e-6
    assert weight_distances({"w": ParameterEstimate(shifted.value)}, {"w": truth})["w"] > 1
    other = torch.randn(5, 4)
    a, b = (x.double().numpy() - x.double().numpy().mean(axis=0) for x in (other, truth))
    distances = weight_distances({"w": ParameterEstimate(other, up_to_common_row=True)}, {"w": truth})
    assert distances["w"] == pytest.approx(np.linalg.norm(a - b))
    assert distances["w_relative"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_a_bias_is_known_up_to_one_number() -> None:
    truth = torch.tensor([1.0, 2.0, 4.0])
    assert weight_distances({"b": ParameterEstimate(truth + 7, up_to_common_row=True)}, {"b": truth})["b"] < 1e-6


def test_tiny_distances_are_measured_in_float64() -> None:
    truth = torch.full((1000,), 1.0, dtype=torch.float64)
    distance = weight_distances({"w": ParameterEstimate(truth + 1e-12)}, {"w": truth})["total"]
    assert distance == pytest.approx(1e-12 * math.sqrt(1000), rel=1e-3)


def test_a_parameter_of_zeros_has_no_relative_distance() -> None:
    zeros = torch.zeros(3)
    assert weight_distances({"w": ParameterEstimate(zeros)}, {"w": zeros})["w_relative"] == 0
    assert weight_distances({"w": ParameterEstimate(zeros + 1)}, {"w": zeros})["w_relative"] == math.inf


def test_an_estimate_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"estimate of w .*\(2,\), not \(3,\)"):
        weight_distances({"w": ParameterEstimate(torch.zeros(2))}, {"w": torch.zeros(3)})


def test_distances_are_logged_at_each_validation(fit: Fit) -> None:
    network = nn.Linear(2, 2)
    estimates = {"weight": ParameterEstimate(network.weight.detach() + 1)}
    trainer = fit([WeightDistance()], TinyModule(estimates), TinyData(batches(4), batches(3), network))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "distance" in name}
    assert set(logged) == {f"weight_distance/{key}{end}" for key in ("weight", "total") for end in ("", "_relative")}
    assert logged["weight_distance/total"] == pytest.approx(2)


def test_generators_without_estimates_log_nothing(fit: Fit) -> None:
    trainer = fit([WeightDistance()])
    assert not any("distance" in name for name in trainer.callback_metrics)
