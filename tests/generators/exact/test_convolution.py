"""What is peculiar to convolutions; the equations themselves are in test_affine.py."""

import pytest
import torch
from dense import backward, forward_matrix, gradient_matrix, layer_of, relative
from hypothesis import given
from hypothesis import strategies as st
from small_layers import pairs, patch_projections, quick
from torch import nn

from gitlight.architecture import Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact import rule_for


@quick
@given(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5]), pairs(1, 2), st.sampled_from(["same", "valid"]))
def test_padding_in_words_is_that_of_pytorch(height, width, dilation, padding):
    torch.manual_seed(0)
    module = nn.Conv2d(2, 3, (height, width), dilation=dilation, padding=padding).double()
    shape = (2, 9, 9)
    rule = rule_for(layer_of(module, shape))
    inputs = torch.rand(1, *shape, dtype=torch.float64)
    delta = torch.randn_like(module(inputs)).detach()
    gradient, carried = backward(module, inputs, delta)
    torch.testing.assert_close(rule.weight_gradient(inputs, delta), gradient)
    torch.testing.assert_close(rule.adjoint(delta, module.weight), carried)
    matrix = gradient_matrix(module, delta[0], shape)
    torch.testing.assert_close(rule.normal(delta)[0, 0], matrix.T[:81] @ matrix[:, :81])
    torch.testing.assert_close(rule.forward_matrix(module.weight.detach()), forward_matrix(module, shape))


def test_a_weight_that_the_model_computes_is_named():
    module = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    layer = Architecture.of(module, (2, 5, 5), 1).layers[-1]
    with pytest.raises(ArchitectureError, match=r"conv2d .*takes a weight that the model computes"):
        rule_for(layer)


@quick
@given(patch_projections())
def test_patches_are_the_columns_of_kernels_that_do_not_overlap(small):
    module, shape = small
    rows, columns = module.kernel_size
    inputs = torch.rand(2, *shape, dtype=torch.float64)
    found = rule_for(layer_of(module, shape)).columns(inputs)[:, 0]
    for row in range(shape[1] // rows):
        for column in range(shape[2] // columns):
            patch = inputs[:, :, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            assert torch.equal(found[:, :, row * (shape[2] // columns) + column], patch.flatten(1))


def test_pixels_beyond_the_last_whole_patch_are_unknown():
    torch.manual_seed(0)
    module = nn.Conv2d(1, 9, 2, 2).double()
    rule = rule_for(layer_of(module, (1, 5, 4)))
    assert not rule.exact
    assert rule.loses == "pixels beyond the last whole patch are seen by no kernel"
    inputs = torch.rand(1, 1, 5, 4, dtype=torch.float64)
    delta = torch.randn_like(module(inputs)).detach()
    found, variance, _ = rule.solve(delta, backward(module, inputs, delta)[0], torch.full((1,), 1e-15))
    assert relative(found[:, :, :4], inputs[:, :, :4]) < 1e-10
    assert torch.isfinite(variance[:, :, :4]).all()
    assert torch.isinf(variance[:, :, 4]).all()


def test_the_first_layers_of_lenet_leave_what_counting_says():
    # Stride 2 splits the 16×16 input by parity: 5×5 kernels reach odd rows by 2 of 5 taps, so the 64 unknowns at odd
    # rows and odd columns meet 2 · 2 · 12 = 48 equations, all others at least 72: 240 of 256.
    rule = rule_for(layer_of(nn.Conv2d(12, 12, 5, 2, 2), (12, 16, 16)))
    assert (rule.rank, rule.exact) == (240, False)
    assert rule.loses == "rank 240 of 256 unknowns per channel"
    assert rule.determined.sum() == 192


@pytest.mark.parametrize(
    ("stride", "size", "blocks"), [(2, (6, 8), 4), (2, (6, 7), 2), (3, (6, 8), 3), (2, (7, 7), 1), (1, (6, 8), 1)]
)
def test_a_stride_leaves_phases_apart_where_they_are_of_one_size(stride, size, blocks):
    rule = rule_for(layer_of(nn.Conv2d(2, 4, 3, stride, 1, groups=2), (2, *size)))
    assert (rule.n_blocks, rule.column_size) == (2 * blocks, size[0] * size[1] // blocks)
    assert rule.n_unknowns == size[0] * size[1]


def test_groups_have_structurally_alike_blocks():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, 2, 1, groups=2).double()
    rule = rule_for(layer_of(module, (4, 6, 6)))
    delta = torch.randn(1, *rule.layer.output_shape, dtype=torch.float64)
    torch.testing.assert_close(rule.normal_of_one_group(delta), rule.normal(delta)[:, :4])
    assert rule.determined.shape == (8, 1, 9)


def test_a_stride_leaves_more_unknowns_whose_rank_can_be_computed():
    assert rule_for(layer_of(nn.Conv2d(1, 4, 3, 2, 1), (1, 50, 50))).rank is not None
    assert rule_for(layer_of(nn.Conv2d(1, 4, 3, 2, 1), (1, 80, 80))).rank is None


def test_a_rank_that_would_take_too_long_is_not_computed():
    rule = rule_for(layer_of(nn.Conv2d(1, 2, 3, padding=1), (1, 41, 41)))
    assert (rule.rank, rule.determined, rule.exact) == (None, None, False)
    assert rule.loses == "1681 unknowns per channel, 18 equations: rank not computed"


def test_a_convolution_reveals_no_delta():
    assert rule_for(layer_of(nn.Conv2d(2, 3, 3), (2, 5, 5))).reveals_delta() is None


def test_outputs_that_say_nothing_but_for_rounding_determine_nothing():
    # A kernel of one row leaves every second row unseen, and padding the last output rows empty.
    rule = rule_for(layer_of(nn.Conv2d(3, 15, (1, 5), (2, 1), (4, 3), groups=3).double(), (3, 3, 8)))
    assert not rule.exact
    assert not rule.exact_with_outputs
