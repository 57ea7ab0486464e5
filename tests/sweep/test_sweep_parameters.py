import math
from typing import Any

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gitlight.errors import ConfigError
from gitlight.sweep.parameters import extreme_values, grid_values, parse_parameters


def parse(text: str) -> dict[str, Any]:
    return parse_parameters(yaml.safe_load(text), "sweep.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{value: 3}", CategoricalDistribution([3])),
        ("{distribution: constant, value: sgd}", CategoricalDistribution(["sgd"])),
        ("{values: [adam, sgd]}", CategoricalDistribution(["adam", "sgd"])),
        ("{distribution: categorical, values: [true, false]}", CategoricalDistribution([True, False])),
        ("{values: [1e-4, 1e-3]}", CategoricalDistribution(["1e-4", "1e-3"])),  # text, as W&B hands it over, too
        ("{min: 1, max: 5}", IntDistribution(1, 5)),
        ("{distribution: int_uniform, min: -2, max: 2}", IntDistribution(-2, 2)),
        ("{min: 0.0, max: 1}", FloatDistribution(0.0, 1.0)),
        ("{distribution: uniform, min: 1, max: 5}", FloatDistribution(1.0, 5.0)),
        ("{distribution: q_uniform, min: 32, max: 128, q: 16}", IntDistribution(32, 128, step=16)),
        ("{distribution: q_uniform, min: 0, max: 4}", IntDistribution(0, 4)),
        ("{distribution: q_uniform, min: 0.1, max: 0.7, q: 0.1}", FloatDistribution(0.1, 0.7, step=0.1)),
        ("{distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}", FloatDistribution(1e-4, 1e-2, log=True)),
        ("{distribution: q_log_uniform_values, min: 8, max: 512, q: 1}", IntDistribution(8, 512, log=True)),
    ],
)
def test_each_distribution_is_optunas(text: str, expected: Any) -> None:
    assert parse(f"seed: {text}") == {"seed": expected}


def test_bounds_of_log_uniform_are_exponents_of_e() -> None:
    (found,) = parse("x: {distribution: log_uniform, min: -9.0, max: 2}").values()
    assert found.log
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((-9, 2))


def test_nested_parameters_are_joined_by_dots_in_the_order_of_the_file() -> None:
    space = parse("""
        seed: {value: 1}
        optimizer: {parameters: {name: {value: adam}, learning_rate: {min: 0.1, max: 0.2}}}
        generator.blocks: {values: [1, 2]}
    """)
    assert list(space) == ["seed", "optimizer.name", "optimizer.learning_rate", "generator.blocks"]


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (CategoricalDistribution(["b", "a"]), ["b", "a"]),
        (IntDistribution(2, 5), [2, 3, 4, 5]),
        (IntDistribution(16, 48, step=16), [16, 32, 48]),
        (FloatDistribution(0.0, 1.0, step=0.25), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (FloatDistribution(0.1, 0.7, step=0.1), [0.1 + i * 0.1 for i in range(6)] + [0.7]),
        (FloatDistribution(0.0, 1.0), None),
    ],
)
def test_a_grid_has_all_values_where_there_are_finitely_many(distribution: Any, values: list[Any] | None) -> None:
    found = grid_values(distribution)
    assert (None if found is None else list(found)) == values


def test_settings_are_tried_with_all_choices_and_both_bounds() -> None:
    assert extreme_values(CategoricalDistribution([1, 2, 3])) == [1, 2, 3]
    assert extreme_values(IntDistribution(1, 9)) == [1, 9]


UNSUPPORTED = ["inv_log_uniform", "inv_log_uniform_values", "q_log_uniform"]
UNSUPPORTED += ["normal", "q_normal", "log_normal", "q_log_normal", "beta", "q_beta"]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_distribution_that_optuna_lacks_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^parameters\.x: distribution: {name} \(in sweep.yaml\) is not supported"):
        parse(f"x: {{distribution: {name}, min: 1, max: 2, mu: 0, sigma: 1, a: 1, b: 1}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "parameters: [] (in sweep.yaml): expected settings to vary"),
        ("x: 3", "parameters.x: 3 (in sweep.yaml): expected one of value, values, min and max, as in x: {value: 3}."),
        ("x: {}", "parameters.x: {} (in sweep.yaml): expected value, values, or both min and max."),
        ("x: {min: 3}", "expected value, values, or both min and max."),
        ("x: {values: [1, 2], probabilities: [0.1, 0.9]}", "parameters.x: probabilities (in sweep.yaml) is not supp"),
        ("x: {min: 1, maxx: 2}", "parameters.x.maxx (in sweep.yaml): no such key. Did you mean max?"),
        ("x: {min: 1, max: 2, mu: 0}", "parameters.x.mu (in sweep.yaml): no such key."),
        ("x: {distribution: unifrom, min: 1, max: 2}", "'unifrom' (in sweep.yaml) is not known. Did you mean uniform?"),
        ("x: {distribution: uniform, min: 1}", "the distribution uniform lacks max (in sweep.yaml)"),
        ("x: {distribution: uniform, min: 1, max: 2, q: 1}", "the distribution uniform does not use q (in sweep.yaml)"),
        ("x: {value: 1, min: 1}", "the distribution constant does not use min (in sweep.yaml)"),
        ("x: {values: []}", "parameters.x.values: [] (in sweep.yaml): expected a list"),
        ("x: {values: 3}", "parameters.x.values: 3 (in sweep.yaml): expected a list"),
        ("x: {values: [1, 2, 1.0]}", "parameters.x.values: 1.0 (in sweep.yaml) is there twice."),
        ("x: {values: [null, 1]}", "parameters.x: null (in sweep.yaml) is not supported"),
        ("x: {values: [[1], [2]]}", "parameters.x: [1] (in sweep.yaml) is not supported"),
        ("x: {min: 2, max: 1}", "parameters.x: min 2 (in sweep.yaml) is not below max 1."),
        ("x: {min: 1e-4, max: 0.1}", "parameters.x.min: '1e-4' (in sweep.yaml) is not a number. YAML reads it as text"),
        ("x: {min: 1e-4, max: 0.1}", "as 1.0e-4."),
        ("x: {min: a, max: 0.1}", "parameters.x.min: 'a' (in sweep.yaml) is not a number."),
        ("x: {min: 0.1, max: .inf}", "parameters.x.max: inf (in sweep.yaml) is not a number."),
        ("x: {min: false, max: true}", "parameters.x.min: False (in sweep.yaml) is not a number."),
        ("x: {distribution: int_uniform, min: 1.5, max: 3}", "must be whole numbers for int_uniform"),
        ("x: {distribution: log_uniform, min: 1, max: 1000}", "e to the power 1000 is no number"),
        (
            "x: {distribution: log_uniform_values, min: 0, max: 1}",
            "parameters.x.min: 0 (in sweep.yaml) must be above 0",
        ),
        ("x: {distribution: q_uniform, min: 0, max: 1, q: 0}", "parameters.x.q: 0 (in sweep.yaml) must be above 0."),
        ("x: {distribution: q_uniform, min: 10, max: 64, q: 16}", "min: 10 (in sweep.yaml) is not a multiple of q 16"),
        ("x: {distribution: q_uniform, min: 10, max: 64, q: 16}", "The nearest is 16."),
        ("x: {distribution: q_log_uniform_values, min: 8, max: 64, q: 8}", "q_log_uniform_values with min 8, max 64"),
        ("x: {parameters: {y: {value: 1}}, value: 2}", "parameters.x: value beside parameters (in sweep.yaml)"),
        ("{x.y: {value: 1}, x: {parameters: {y: {value: 2}}}}", "parameters.x.y (in sweep.yaml) is given twice"),
        (
            "x: {distribution: [uniform], min: 1, max: 2}",
            "parameters.x.distribution: ['uniform'] (in sweep.yaml) is not",
        ),
        ("x: {distribution: {}, min: 1, max: 2}", "parameters.x.distribution: {} (in sweep.yaml) is not known."),
        ("x: {distribution: log_uniform, min: -1000, max: 1}", "e to the power -1000 is no number"),
        (
            "x: {distribution: q_uniform, min: 0, max: 1, q: 1.0e-300}",
            "parameters.x.q: 1e-300 (in sweep.yaml) is too small",
        ),
        ("x: {min: 1, max: 100000000000000000000}", "parameters.x.max: 100,000,000,000,000,000,000 (in sweep.yaml) is"),
        ("x: {parameters: {}}", "parameters.x: {} (in sweep.yaml): expected settings to vary"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert message in str(raised.value)
