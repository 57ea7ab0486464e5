import json
from dataclasses import replace
from pathlib import Path

import pytest

from gitlight.errors import CheckpointError
from gitlight.report.results import Estimate, Result, merge_results, read_results, write_results

RESULT = Result(
    attack="hybrid",
    leaked="lenet",
    data="photos",
    channel="none",
    client_batch_size=1,
    n_images=10,
    seed=0,
    metrics={"mse": Estimate(0.1, 0.05, 0.2), "psnr": Estimate(10.0, 7.0, 13.0), "ssim": Estimate(0.5, 0.4, 0.6)},
    label_accuracy=None,
    seconds_per_image=0.001,
    knowledge=("architecture", "pairs"),
)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [RESULT, replace(RESULT, channel="noise", n_failed=3, label_accuracy=0.5)]
    write_results(results, tmp_path / "metrics.json")
    assert read_results(tmp_path / "metrics.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_an_entry_has_the_keys_of_the_schema() -> None:
    assert RESULT.to_plain() == {
        "attack": "hybrid",
        "leaked": "lenet",
        "data": "photos",
        "channel": "none",
        "client_batch_size": 1,
        "n_images": 10,
        "seed": 0,
        "metrics": {
            "mse": {"mean": 0.1, "ci95": [0.05, 0.2]},
            "psnr": {"mean": 10.0, "ci95": [7.0, 13.0]},
            "ssim": {"mean": 0.5, "ci95": [0.4, 0.6]},
        },
        "label_accuracy": None,
        "seconds_per_image": 0.001,
        "knowledge": ["architecture", "pairs"],
    }


@pytest.mark.parametrize(
    "change",
    [
        {"attack": "mlp"},
        {"leaked": "resnet20"},
        {"data": "faces"},
        {"channel": "pruning(fraction=0.9)"},
        {"client_batch_size": 2},
        {"n_images": 20},
        {"seed": 1},
    ],
)
def test_a_result_under_another_condition_is_added(change: dict[str, object]) -> None:
    other = replace(RESULT, **change)  # type: ignore[arg-type]
    assert merge_results([RESULT], other) == [RESULT, other]


def test_a_result_under_the_same_condition_is_replaced_in_its_place() -> None:
    other = replace(RESULT, channel="noise")
    again = replace(RESULT, seconds_per_image=7.0)
    assert merge_results([RESULT, other], again) == [again, other]


def test_no_file_holds_no_results(tmp_path: Path) -> None:
    assert read_results(tmp_path / "metrics.json") == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"schema": 2, "results": []}',
        '{"schema": 1, "results": [{"attack": "hybrid"}]}',
        '{"schema": 1, "results": [7]}',
        '{"schema": 1, "results": 7}',
        json.dumps({"schema": 1, "results": [RESULT.to_plain() | {"unknown": 1}]}),
    ],
)
def test_a_file_of_another_kind_is_an_error_that_names_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"metrics\.json exists and cannot be read"):
        read_results(path)
    assert path.read_text() == content


def test_what_leaked_is_told_where_it_is_no_gradient_and_keeps_results_apart(tmp_path: Path) -> None:
    update = replace(RESULT, leak="update(epochs=2, batch_size=2, learning_rate=0.1)")
    assert update.to_plain()["leak"] == update.leak
    results = merge_results([RESULT], update)
    assert results == [RESULT, update]
    write_results(results, tmp_path / "metrics.json")
    assert read_results(tmp_path / "metrics.json") == results
