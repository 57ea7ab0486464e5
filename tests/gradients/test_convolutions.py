"""Convolutions of the captured method, each way against autograd in float64."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from gitlight.gradients import convolutions, frozen_convolutions
from gitlight.gradients.buffers import Scratch
from gitlight.gradients.convolutions import Convolution, write_weight_gradient
from gitlight.gradients.frozen_convolutions import carried_through_stride, frozen_conv2d

NO_AVX512, HALVED, WHOLE, INTELS = (
    {"has_avx512": avx512, "has_whole_avx512": whole, "is_intels": intels}
    for avx512, whole, intels in ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
)
WAYS = [
    # how, on what processor, a shape that it is for: (input channels, output channels, kernel, stride, size)
    (convolutions._write_channels_last, WHOLE, (12, 12, 5, 2, 17)),
    (convolutions._write_channels_first, WHOLE, (16, 24, 3, 1, 9)),
    (None, WHOLE, (3, 16, 3, 1, 8)),
    (convolutions._write_channels_first, HALVED, (16, 24, 3, 1, 9)),
    (convolutions._write_padded, HALVED, (12, 12, 5, 2, 17)),
    (convolutions._write_padded, HALVED, (12, 28, 5, 1, 8)),
    (convolutions._write_padded, HALVED, (28, 32, 3, 1, 9)),
    (None, HALVED, (12, 12, 3, 1, 9)),
    (None, HALVED, (96, 88, 3, 1, 9)),
    (None, HALVED, (3, 12, 5, 2, 17)),
    (convolutions._write_channels_first, NO_AVX512, (16, 24, 3, 1, 9)),
    (convolutions._write_padded, NO_AVX512, (12, 12, 5, 2, 17)),
    (None, NO_AVX512, (64, 40, 3, 1, 9)),
    (convolutions._write_channels_first, INTELS, (16, 24, 3, 1, 9)),
    (None, INTELS, (12, 12, 5, 2, 17)),
]


def random_case(shape, n_leaks, n_images, dtype=torch.float32):
    n_in, n_out, kernel, stride, size = shape
    torch.manual_seed(0)
    x = torch.randn(n_leaks * n_images, n_in, size, size, dtype=dtype)
    padding = (kernel // 2, kernel // 2)
    delta = torch.randn_like(F.conv2d(x, x.new_zeros(n_out, n_in, kernel, kernel), None, stride, padding))
    weight_shape = torch.Size((n_out, n_in, kernel, kernel))
    return Convolution(x, weight_shape, (stride, stride), padding, (1, 1), 1, n_leaks, Scratch()), delta


def one_leak_at_a_time(conv, delta):
    found = []
    for x, its_delta in zip(conv.per_leak(conv.input.double()), conv.per_leak(delta.double()), strict=True):
        weight = x.new_zeros(conv.weight_shape, requires_grad=True)
        made = F.conv2d(x, weight, None, conv.stride, conv.padding)
        found.append(torch.autograd.grad(made, weight, its_delta)[0])
    return torch.stack(found)


@pytest.mark.parametrize("n_images", [1, 3])
@pytest.mark.parametrize(("way", "processor", "shape"), WAYS)
def test_every_way_gives_the_gradient_of_each_leak(way, processor, shape, n_images, monkeypatch):
    monkeypatch.setattr(convolutions, "_LEAKS_AT_ONCE", 2)
    monkeypatch.setattr(convolutions, "_CACHED_PATCHES", 100_000)
    for name, answer in processor.items():
        monkeypatch.setattr(convolutions, name, lambda answer=answer: answer)
    conv, delta = random_case(shape, 5, n_images)
    assert convolutions._onednn_kernel(conv, delta) is way or not torch.backends.mkldnn.is_available()
    out = torch.empty(5, *conv.weight_shape)
    write_weight_gradient(conv, delta, out)
    wanted = one_leak_at_a_time(conv, delta)
    assert (out - wanted).norm() < 1e-6 * wanted.norm()


def test_an_input_is_unfolded_channels_last_where_it_is_in_float64():
    conv, delta = random_case((12, 12, 5, 1, 8), 4, 2, torch.float64)
    assert convolutions._onednn_kernel(conv, delta) is None
    assert convolutions._unfolds_channels_last(conv, delta)
    out = torch.empty(4, *conv.weight_shape, dtype=torch.float64)
    write_weight_gradient(conv, delta, out)
    torch.testing.assert_close(out, one_leak_at_a_time(conv, delta))


@pytest.mark.parametrize("avx512", [True, False])
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_delta_passes_a_stride_as_autograd_carries_it(avx512, data):
    stride = data.draw(st.integers(2, 4), "stride")
    kernel = [data.draw(st.integers(1, 6), "kernel") for _ in range(2)]
    padding = [data.draw(st.integers(0, 3), "padding") for _ in range(2)]
    size = [data.draw(st.integers(max(1, k - 2 * p), 11), "size") for k, p in zip(kernel, padding, strict=True)]
    n_in, n_out = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    torch.manual_seed(0)
    x = torch.randn(2, n_in, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n_out, n_in, *kernel, dtype=torch.float64)
    made = F.conv2d(x, weight, None, stride, padding)
    delta = torch.randn_like(made)
    (wanted,) = torch.autograd.grad(made, x, delta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_convolutions, "has_avx512", lambda: avx512)
        found = carried_through_stride(delta, weight, stride, tuple(padding), x.shape[2:])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("padding", [[2, 2], [0, 1], [6, 4]])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_few_channels_has_its_values_and_gradients(stride, padding):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 12, 16, 15, requires_grad=True), torch.randn(12, 12, 5, 4), torch.randn(12)
    made = frozen_conv2d(x, weight, bias, [stride, stride], padding, [1, 1], 1)
    assert "FewChannels" in type(made.grad_fn).__name__
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    assert (made - wanted).norm() < 1e-6 * wanted.norm()
    delta = torch.randn_like(made)
    exact = torch.nn.grad.conv2d_input(x.shape, weight.double(), delta.double(), stride, padding)
    assert (torch.autograd.grad(made, x, delta)[0] - exact).norm() < 1e-6 * exact.norm()
