"""Memory of results that is used again."""

import torch

from gitlight.gradients.buffers import ResultBuffers, Scratch

SHAPES = {"weight": (3000, 2000), "bias": (3000, 1)}


def made(buffers, shapes=SHAPES, dtype=torch.float64):
    return buffers.empty(shapes, dtype, torch.device("cpu"))


def test_what_somebody_holds_is_never_overwritten():
    buffers = ResultBuffers()
    for hold in (
        lambda result: result["bias"],
        lambda result: result["weight"][5:9, ::2],
        lambda result: result["weight"].detach().T,
        lambda result: result["weight"].numpy(),
    ):
        result = made(buffers)
        for tensor in result.values():
            tensor.fill_(7.0)
        held = hold(result)
        del result
        for _ in range(3):
            for tensor in made(buffers).values():
                tensor.fill_(1.0)
        assert (torch.as_tensor(held) == 7).all()


def test_freed_memory_is_used_again():
    buffers = ResultBuffers()
    places = set()
    for _ in range(5):
        result = made(buffers)
        places.add(result["weight"].data_ptr())
        del result
    assert len(places) == 1


def test_results_have_the_shapes_and_types_asked_for():
    buffers = ResultBuffers()
    for dtype in (torch.float32, torch.float64):
        for rows in (10, 4000):
            result = made(buffers, {"a": (rows, 3000), "b": (), "c": (0, 2)}, dtype)
            assert {name: tuple(t.shape) for name, t in result.items()} == {"a": (rows, 3000), "b": (), "c": (0, 2)}
            assert {t.dtype for t in result.values()} == {dtype}


def test_scratch_for_one_purpose_is_one_memory_and_for_two_it_is_not():
    scratch, like = Scratch(), torch.empty(0)
    first = scratch.empty("delta", (4, 5), like)
    assert scratch.empty("delta", (3, 2), like).data_ptr() == first.data_ptr()
    assert scratch.empty("input", (4, 5), like).data_ptr() != first.data_ptr()
    assert scratch.empty("delta", (4, 5), like.double()).dtype == torch.float64
    assert scratch.empty("delta", (40, 5), like).shape == (40, 5)
