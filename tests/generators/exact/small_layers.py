"""Hypothesis strategies: small layers with a weight, in float64, and the shape of one input."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

quick = settings(max_examples=60, deadline=None, derandomize=True)


def pairs(lowest, highest):
    return st.tuples(st.integers(lowest, highest), st.integers(lowest, highest))


@st.composite
def convolutions(draw):
    """Any stride, padding, dilation and number of groups."""
    size, padding, dilation = draw(pairs(3, 7)), draw(pairs(0, 2)), draw(pairs(1, 2))
    largest = [min(4, (size[axis] + 2 * padding[axis] - 1) // dilation[axis] + 1) for axis in (0, 1)]
    kernel = (draw(st.integers(1, largest[0])), draw(st.integers(1, largest[1])))
    n_groups = draw(st.sampled_from([1, 2]))
    channels, outputs = n_groups * draw(st.integers(1, 2)), n_groups * draw(st.sampled_from([1, 3, 8]))
    torch.manual_seed(draw(st.integers(0, 100)))
    stride = draw(pairs(1, 3))
    return nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, n_groups).double(), (channels, *size)


@st.composite
def patch_projections(draw):
    """Kernels that do not overlap; some leave a margin that no kernel sees."""
    kernel, patches, margin = draw(pairs(1, 3)), draw(pairs(1, 3)), draw(pairs(0, 1))
    size = [kernel[axis] * patches[axis] + margin[axis] * (kernel[axis] > 1) for axis in (0, 1)]
    channels, outputs = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 9]))
    torch.manual_seed(draw(st.integers(0, 100)))
    return nn.Conv2d(channels, outputs, kernel, kernel).double(), (channels, *size)


@st.composite
def linear_layers(draw):
    """On one vector, on tokens, and on tokens in two dimensions."""
    before = draw(st.sampled_from([(), (1,), (3,), (5,), (2, 3)]))
    features, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 100)))
    return nn.Linear(features, outputs).double(), (*before, features)


affine_layers = convolutions() | patch_projections() | linear_layers()
