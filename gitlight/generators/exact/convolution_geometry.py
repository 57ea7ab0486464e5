"""`ConvolutionGeometry`: which entries of its input each kernel entry of a two-dimensional convolution meets."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError

PerAxis = tuple[int, int]
"""Of rows and of columns."""


class Tap(NamedTuple):
    """One kernel position: the output rows and columns that it maps into the image, and where they land there.

    Attributes:
        row: of the kernel.
        column: of the kernel.
        outputs: which output rows and columns; those that it maps onto padding are left out.
        inputs: where they land in the image.
        phase: which of the geometry's phases they land in.
        of_phase: where in that.
    """

    row: int
    column: int
    outputs: tuple[slice, slice]
    inputs: tuple[slice, slice]
    phase: PerAxis
    of_phase: tuple[slice, slice]


@dataclass(frozen=True)
class ConvolutionGeometry:
    """Sizes of a two-dimensional convolution, each of rows and of columns.

    Attributes:
        kernel: size of the kernel.
        stride: inputs from one output to the next.
        padding: zeros on either side.
        dilation: inputs from one kernel entry to the next.
        input_size: of the image, ``(H, W)``.
        output_size: of the output.
    """

    kernel: PerAxis
    stride: PerAxis
    padding: PerAxis
    dilation: PerAxis
    input_size: PerAxis
    output_size: PerAxis

    @classmethod
    def of(cls, layer: Layer) -> "ConvolutionGeometry":
        """Of a ``conv2d``.

        Raises:
            ArchitectureError: it pads by different widths on its two sides.
        """
        return cls(
            kernel=_two(layer.weight_shape[2:]),
            stride=_two(layer.arguments["stride"]),
            padding=_padding(layer),
            dilation=_two(layer.arguments["dilation"]),
            input_size=_two(layer.input_shape[1:]),
            output_size=_two(layer.output_shape[1:]),
        )

    @property
    def tiles(self) -> bool:
        """Whether kernels lie side by side from the first pixel on, as in a patch projection."""
        return self.stride == self.kernel and self.padding == (0, 0) and self.dilation == (1, 1)

    @property
    def phases(self) -> PerAxis:
        """Along rows and columns; all entries of an axis stay together where its phases would differ in size."""
        rows, columns = (
            step if size % step == 0 else 1 for step, size in zip(self.stride, self.input_size, strict=True)
        )
        return rows, columns

    @property
    def phase_size(self) -> PerAxis:
        """Rows and columns of one phase."""
        (rows, columns), (height, width) = self.phases, self.input_size
        return height // rows, width // columns

    def taps(self) -> list[Tap]:
        """One for each kernel position, row after row."""
        taps = []
        for row in range(self.kernel[0]):
            for column in range(self.kernel[1]):
                spans = [
                    _span(
                        self.stride[axis],
                        offset * self.dilation[axis] - self.padding[axis],
                        self.output_size[axis],
                        self.input_size[axis],
                    )
                    for axis, offset in enumerate((row, column))
                ]
                outputs, inputs = zip(*spans, strict=True)
                phase, of_phase = zip(*map(_within_phase, inputs, self.phases), strict=True)
                taps.append(Tap(row, column, outputs, inputs, phase, of_phase))
        return taps

    def windows(self, inputs: Tensor) -> Tensor:
        """What each output position sees: ``(B, C, H, W)`` to ``(B, C · kernel, positions)``."""
        rows, columns = self.padding
        return _windows(pad(inputs, (columns, columns, rows, rows)), self.kernel, self.stride, self.dilation)

    def adjoint_windows(self, outputs: Tensor) -> Tensor:
        """Which outputs each input is seen by: ``(B, C, rows, columns)`` to ``(B, C · kernel, H · W)``.

        Kernel entries are in mirrored order. Zeros stand between the outputs where the stride skips inputs, and where a
        kernel entry reaches no output.
        """
        spans = [self.dilation[axis] * (self.kernel[axis] - 1) for axis in (0, 1)]
        canvas = outputs.new_zeros(*outputs.shape[:2], *(self.input_size[axis] + spans[axis] for axis in (0, 1)))
        places = [
            _span(self.stride[axis], spans[axis] - self.padding[axis], self.output_size[axis], canvas.shape[2 + axis])
            for axis in (0, 1)
        ]
        canvas[:, :, places[0][1], places[1][1]] = outputs[:, :, places[0][0], places[1][0]]
        return _windows(canvas, self.kernel, (1, 1), self.dilation)


def _windows(padded: Tensor, kernel: PerAxis, stride: PerAxis, dilation: PerAxis) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C · kernel, positions)``; `torch.nn.functional.unfold` goes image by image on a GPU."""
    rows, columns = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    windows = padded.unfold(2, rows, stride[0]).unfold(3, columns, stride[1])[..., :: dilation[0], :: dilation[1]]
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


def _padding(layer: Layer) -> PerAxis:
    given = layer.arguments["padding"]
    if not isinstance(given, str):
        return _two(given)
    if given == "valid":
        return (0, 0)
    # "same", which PyTorch allows for stride 1 alone.
    totals = [d * (k - 1) for d, k in zip(_two(layer.arguments["dilation"]), layer.weight_shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        raise ArchitectureError(
            f"{layer.place} pads by different widths on its two sides (padding='same' with an even kernel), which its "
            "inverse rule does not know. An odd kernel, or padding given as a number, works."
        )
    return (totals[0] // 2, totals[1] // 2)


def _two(value: object) -> PerAxis:
    assert isinstance(value, list | tuple)
    return (int(value[0]), int(value[-1]))


def _span(stride: int, shift: int, n_outputs: int, n_inputs: int) -> tuple[slice, slice]:
    """Along one axis: the outputs ``p`` for which ``stride · p + shift`` is inside the input, and where they land."""
    first = max(0, -(shift // stride))
    last = min(n_outputs - 1, (n_inputs - 1 - shift) // stride)
    count = max(0, last - first + 1)
    start = first * stride + shift
    return slice(first, first + count), slice(start, start + count * stride if count else start, stride)


def _within_phase(inputs: slice, n_phases: int) -> tuple[int, slice]:
    """Which of an axis' phases some rows or columns are in, and where in that."""
    phase = inputs.start % n_phases
    start, stop, step = (edge // n_phases for edge in (inputs.start, inputs.stop, inputs.step))
    return phase, slice(start, stop, step)
