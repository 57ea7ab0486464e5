"""Pictures of reconstructions on the way show each image where it belongs."""

import torch
from PIL import Image

from gitlight.report.snapshots import _CELL, _GAP, _LABEL, _MARGIN, Snapshot, draw_snapshots


def grey(value):
    return torch.full((1, 16, 16), value, dtype=torch.uint8)


def test_rows_are_iterations_and_columns_leaks(tmp_path):
    truth, final = torch.stack([grey(10), grey(20)]), torch.stack([grey(11), grey(21)])
    way = [Snapshot(1, 0, grey(100)), Snapshot(0, 0, grey(90)), Snapshot(1, 30, grey(60))]
    draw_snapshots(way, truth, final, tmp_path / "new" / "way.png")
    with Image.open(tmp_path / "new" / "way.png") as picture:
        step = _CELL + _GAP
        seen = [
            [picture.getpixel((_MARGIN + _LABEL + column * step + 5, _MARGIN + row * step + 5))[0] for column in (0, 1)]
            for row in range(4)
        ]
    # The first search had ended before iteration 30.
    assert seen == [[10, 20], [90, 100], [11, 60], [11, 21]]
