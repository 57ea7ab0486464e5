"""Starts of the searches for the images of a client batch."""

import torch
from torch.nn import functional

from gitlight.generators.exact.separation_starts import can_turn, contrasts, turned

LABELS = torch.tensor(
    [[0, 0, 0, 4, 5, 5], [0, 1, 2, 3, 4, 5], [2, 2, 3, 4, 5, 6], [7, 3, 7, 3, 7, 3], [1, 1, 1, 1, 1, 1]]
)


def test_contrasts_are_orthonormal_differences_between_images_of_one_label():
    rows = contrasts(LABELS)
    gram = rows @ rows.mT
    n_distinct = torch.tensor([len(set(labels)) for labels in LABELS.tolist()])
    assert torch.equal(rows.any(dim=2).sum(dim=1), 6 - n_distinct)
    torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2).round()))
    of_label = functional.one_hot(LABELS, 8).double()
    torch.testing.assert_close(rows @ of_label, torch.zeros(5, 6, 8, dtype=torch.float64))


def test_one_difference_alone_cannot_be_turned():
    assert can_turn(LABELS).tolist() == [True, False, False, True, True]


def test_a_turn_leaves_the_gradient_as_it_is_where_probabilities_are_linear_in_the_inputs():
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    slopes = torch.randn(10, 6, generator=generator, dtype=torch.float64)

    def gradient(inputs):
        return (inputs @ slopes.T - functional.one_hot(LABELS, 10)).mT @ inputs

    starts = turned(found, LABELS, 3, salt=0)
    assert starts.shape == (5, 3, 6, 6)
    for number in range(3):
        torch.testing.assert_close(gradient(starts[:, number]), gradient(found))
    moved = (starts - found.unsqueeze(1)).abs().amax(dim=(1, 2, 3))
    torch.testing.assert_close(starts[1], found[1].expand(3, -1, -1))
    assert (moved[can_turn(LABELS)] > 0.1).all()
    assert not torch.equal(turned(found, LABELS, 3, salt=1)[0], starts[0])


def test_starts_of_a_leak_do_not_depend_on_the_others():
    found = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(turned(found, LABELS, 2, 3)[3:4], turned(found[3:4], LABELS[3:4], 2, 3))
