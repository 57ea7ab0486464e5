import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gitlight.report.histogram import HEIGHT, LEFT, WIDTH, histogram


@given(st.lists(st.floats(0, 120), min_size=1, max_size=200))
def test_every_value_is_in_one_bar_of_the_view_box(values: list[float]) -> None:
    drawn = histogram(torch.tensor(values))
    assert sum(bar.count for bar in drawn.bars) == len(values)
    assert 1 <= len(drawn.bars) <= 32
    for bar in drawn.bars:
        assert LEFT - 1e-6 <= bar.x <= bar.x + bar.width <= WIDTH
        assert 0 <= bar.y <= bar.y + bar.height <= HEIGHT
    assert drawn.bars[0].x <= drawn.mean_x <= drawn.bars[-1].x + drawn.bars[-1].width


def test_counts_are_those_of_the_bins() -> None:
    values = torch.tensor([10.0, 10.4, 11.2, 14.9, 15.0])
    for bar in histogram(values).bars:
        assert bar.count == int(((values >= bar.low - 1e-9) & (values < bar.high - 1e-9)).sum())


@pytest.mark.parametrize("value", [0.0, 37.3, 120.0])
def test_equal_values_make_one_bar_among_empty_ones(value: float) -> None:
    drawn = histogram(torch.full((9,), value))
    assert sorted(bar.count for bar in drawn.bars)[-2:] == [0, 9]


def test_few_images_make_few_bars() -> None:
    values = 30 + 5 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert len(histogram(values).bars) <= 15
