import pytest
from torch import nn

from gitlight.errors import misfit


def misfit_of(network, state):
    with pytest.raises(RuntimeError) as raised:
        network.load_state_dict(state)
    return misfit(raised.value)


def test_all_that_does_not_fit_is_said_where_it_is_little():
    state = nn.Linear(4, 2).state_dict()
    state["more"] = state.pop("bias")
    message = misfit_of(nn.Linear(3, 2), state)
    assert message.startswith(
        'Missing key(s) in state_dict: "bias". Unexpected key(s) in state_dict: "more". size mismatch'
    )
    assert message.endswith("current model is torch.Size([2, 3]).")


def test_of_much_that_does_not_fit_the_first_is_said_and_how_much_more_there_is():
    unexpected = {f"layers.{number}": 0 for number in range(50)}
    assert misfit_of(nn.Linear(3, 2), unexpected) == (
        'Missing key(s) in state_dict: "weight", "bias". '
        'Unexpected key(s) in state_dict: "layers.0", "layers.1", "layers.2" and 47 more.'
    )
    deep, wide = (nn.Sequential(*(nn.Linear(size, size) for _ in range(10))) for size in (2, 3))
    message = misfit_of(deep, wide.state_dict())
    assert message.count("size mismatch") == 3
    assert message.endswith(" (and 17 more)")
