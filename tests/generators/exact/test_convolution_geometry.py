import pytest
import torch
from dense import layer_of
from hypothesis import given
from small_layers import convolutions, quick
from torch import nn
from torch.nn.functional import conv2d, unfold

from gitlight.architecture import Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.convolution_geometry import ConvolutionGeometry


def numbered(size):
    """An image whose pixels count from one, so that padding alone is zero."""
    return torch.arange(1.0, size[0] * size[1] + 1).view(1, 1, *size)


@quick
@given(convolutions())
def test_a_tap_is_a_convolution_with_a_kernel_of_one_entry(small):
    module, shape = small
    geometry = ConvolutionGeometry.of(layer_of(module, shape))
    image = numbered(geometry.input_size)
    (rows, columns), (height, width) = geometry.phases, geometry.phase_size
    phases = image.view(height, rows, width, columns).permute(1, 3, 0, 2)
    for tap in geometry.taps():
        kernel = torch.zeros(1, 1, *geometry.kernel)
        kernel[..., tap.row, tap.column] = 1
        wanted = conv2d(image, kernel, None, geometry.stride, geometry.padding, geometry.dilation)
        found = torch.zeros_like(wanted)
        found[:, :, *tap.outputs] = image[:, :, *tap.inputs]
        assert torch.equal(found, wanted)
        assert torch.equal(phases[*tap.phase, *tap.of_phase], image[0, 0, *tap.inputs])


@quick
@given(convolutions())
def test_windows_are_those_of_unfold_and_adjoint_windows_carry_what_autograd_does(small):
    module, shape = small
    geometry = ConvolutionGeometry.of(layer_of(module, shape))
    torch.manual_seed(0)
    images = torch.rand(2, *shape, dtype=torch.float64)
    wanted = unfold(images, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    assert torch.equal(geometry.windows(images), wanted)
    one_channel = images[:, :1].requires_grad_()
    kernel = torch.rand(3, 1, *geometry.kernel, dtype=torch.float64)
    made = conv2d(one_channel, kernel, None, geometry.stride, geometry.padding, geometry.dilation)
    outputs = torch.rand_like(made)
    (carried,) = torch.autograd.grad(made, one_channel, outputs)
    found = kernel.flip(2, 3).view(1, -1) @ geometry.adjoint_windows(outputs)
    torch.testing.assert_close(found.view_as(carried), carried)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "tiles"),
    [(2, 2, 0, 1, True), (1, 1, 0, 1, True), (2, 1, 0, 1, False), (2, 2, 1, 1, False), (2, 2, 0, 2, False)],
)
def test_kernels_side_by_side_are_tiles(kernel, stride, padding, dilation, tiles):
    module = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
    assert ConvolutionGeometry.of(layer_of(module, (1, 6, 6))).tiles is tiles


def test_padding_by_different_widths_on_two_sides_is_named():
    (layer, _) = Architecture.of(nn.Sequential(nn.Conv2d(2, 3, 2, padding="same"), nn.ReLU()), (2, 5, 5), 1).layers
    with pytest.raises(ArchitectureError, match=r"conv2d '0'.*padding='same' with an even kernel"):
        ConvolutionGeometry.of(layer)
