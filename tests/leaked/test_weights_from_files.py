import pytest
import torch
from torch import nn

from gitlight.config import GivenConfig, LeNetConfig
from gitlight.errors import CheckpointError
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 32, 32)


class Wrapped(nn.Module):
    """A model whose only child is called as `LeakedModel` calls its own."""

    def __init__(self, n_hidden=4, depth=1):
        super().__init__()
        self.network = (
            Wrapped(n_hidden, depth - 1)
            if depth > 1
            else nn.Sequential(nn.Flatten(), nn.Linear(12, n_hidden), nn.Linear(n_hidden, 2))
        )

    def forward(self, images):
        return self.network(images)


def wrapped(weights=None, **settings):
    settings = {"depth": 1, **settings}
    return LeakedModel(GivenConfig(weights=weights and str(weights)), (3, 2, 2), 2, network=Wrapped(**settings))


def test_weights_load_from_a_state_dict_and_from_a_lightning_checkpoint(tmp_path):
    source = LeakedModel(LeNetConfig(seed=3), SHAPE, 10)
    torch.save(source.network.state_dict(), tmp_path / "plain.pt")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    for weights in ("plain.pt", "run/checkpoints/last.ckpt", "run"):
        loaded = LeakedModel(LeNetConfig(weights=str(tmp_path / weights)), SHAPE, 10)
        assert loaded.fingerprint() == source.fingerprint()


def test_weights_that_do_not_load_are_named(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    torch.save(LeakedModel(LeNetConfig(), SHAPE, 10).network, tmp_path / "pickled.pt")
    torch.save(LeakedModel(LeNetConfig(width=6), SHAPE, 10).network.state_dict(), tmp_path / "narrow.pt")
    mistakes = {
        "missing.pt": "does not exist. Give what",
        "broken.pt": "cannot be read .*damaged.* Give what",
        "pickled.pt": "cannot be read .*a whole model that was pickled.* Give what",
        "narrow.pt": "another architecture",
    }
    for name, words in mistakes.items():
        with pytest.raises(CheckpointError, match=rf"{name} {words}|{name} is of {words}"):
            LeakedModel(LeNetConfig(weights=str(tmp_path / name)), SHAPE, 10)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_that_has_a_child_called_network_keeps_its_names(tmp_path, depth):
    source = wrapped(depth=depth)
    torch.save(source.network.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "last.ckpt")
    for weights in ("plain.pt", "last.ckpt"):
        assert wrapped(tmp_path / weights, depth=depth).fingerprint() == source.fingerprint()


def test_the_names_of_weights_that_do_not_fit_are_the_networks_own(tmp_path):
    torch.save(wrapped(n_hidden=5).network.state_dict(), tmp_path / "wide.pt")
    torch.save({"state_dict": wrapped(n_hidden=5).state_dict()}, tmp_path / "wide.ckpt")
    for name in ("wide.pt", "wide.ckpt"):
        with pytest.raises(CheckpointError, match=rf"{name} is of another .* size mismatch for network\.1\.weight"):
            wrapped(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(2)], "list"),
        (torch.zeros(2), "Tensor"),
        (3, "int"),
        ({0: torch.zeros(2)}, "Tensor under 0"),
        ({"network.1.bias": 0.5}, "float under 'network.1.bias'"),
        ({"model": {"network.1.bias": torch.zeros(2)}, "epoch": 3}, "dict under 'model'"),
        ({"state_dict": None}, "NoneType as its state_dict"),
        ({"state_dict": {"network.1.bias": None}}, "NoneType under 'network.1.bias' as its state_dict"),
    ],
    ids=["list", "tensor", "number", "names", "float", "nested", "none", "none inside"],
)
def test_a_file_that_holds_no_state_dict_is_named_with_what_it_holds(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=rf"leaked.weights: .*other.pt holds {found}, where a tensor is .*Give what"
    ):
        wrapped(tmp_path / "other.pt")


def test_a_modules_own_extra_state_is_loaded(tmp_path):
    class Stateful(Wrapped):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            self.found = state

    network = Stateful()
    torch.save(network.state_dict(), tmp_path / "stateful.pt")
    settings = GivenConfig(weights=str(tmp_path / "stateful.pt"))
    assert LeakedModel(settings, (3, 2, 2), 2, network=network).network.found == {"version": 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite_is_named(tmp_path, value):
    state = Wrapped().state_dict()
    state["network.2.weight"][1, 2] = state["network.2.bias"][0] = value
    torch.save(state, tmp_path / "diverged.pt")
    with pytest.raises(CheckpointError, match=r"diverged.pt holds NaN or infinity in 'network\.2\.weight'"):
        wrapped(tmp_path / "diverged.pt")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_buffer_may_be_infinite_and_not_nan(tmp_path, value):
    network = Wrapped()
    network.register_buffer("mask", torch.zeros(2))
    state = network.state_dict()
    state["mask"] = torch.full((2,), value)
    torch.save(state, tmp_path / "masked.pt")

    def load():
        return LeakedModel(GivenConfig(weights=str(tmp_path / "masked.pt")), (3, 2, 2), 2, network=network)

    if value == float("-inf"):
        assert load().network.mask.isinf().all()
    else:
        with pytest.raises(CheckpointError, match=r"masked.pt holds NaN in 'mask'"):
            load()
