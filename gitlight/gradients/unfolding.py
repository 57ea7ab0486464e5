"""Images as windows of their pixels: overlapping views, of which one copy unfolds an image."""

from torch import Tensor
from torch.nn import functional as F


def pixels(x: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """``(S, C, H, W)`` with margins (above, under, left, right), channels last."""
    above, under, left, right = margins
    # A transposed matrix first, then whole rows: faster than moving the dimensions of a padded image.
    moved = x.flatten(2).transpose(1, 2).contiguous().unflatten(1, x.shape[2:])
    return F.pad(moved, (0, 0, left, right, above, under)).contiguous()


def windows(padded: Tensor, kernel: tuple[int, int], stride: tuple[int, int], below: int) -> Tensor:
    """What a kernel meets at each position, as a view ``(S, rows, columns, height, width · channels)``.

    Args:
        padded: ``(S, H, W, C)``, contiguous.
        kernel: its height and width.
        stride: rows, columns.
        below: rows from one of the kernel's to its next (dilation).
    """
    (height, width), (down, right) = kernel, stride
    rows = (padded.shape[1] - below * (height - 1) - 1) // down + 1
    columns = (padded.shape[2] - width) // right + 1
    n, n_rows, n_columns, channels = padded.shape  # strides of dimensions of size 1 may be anything
    row, shape = n_columns * channels, (n, rows, columns, height, width * channels)
    return padded.as_strided(shape, (n_rows * row, down * row, right * channels, below * row, 1))
