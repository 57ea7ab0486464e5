"""Sums in pairs, and what is divided among virtual ranks; real processes are in tests/integration."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gitlight.compatibility import check_virtual_ranks
from gitlight.config import DataConfig, ExactGeneratorConfig, FullyConnectedConfig, GradientsConfig
from gitlight.config_loading import load_config
from gitlight.data.images import ImageSplits, InMemoryImages
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.errors import ConfigError
from gitlight.fitting import fit_in_closed_form
from gitlight.generators.base import FitOn
from gitlight.generators.exact.generator import ExactGenerator
from gitlight.generators.exact.weights import LeastSquares
from gitlight.leaked.model import LeakedModel
from gitlight.virtual_ranks import (
    DividedBatch,
    PairwiseSum,
    Share,
    current_share,
    fanned_out,
    mean_loss,
    sum_over_processes,
    working_on,
)


def test_sums_are_made_in_pairs():
    values = [torch.tensor(value) for value in (1e8, 3.0, 3.0, 3.0, 5.0, 7.0, -1e8, 1.0)]
    a, b, c, d, e, f, g, h = values
    assert sum_over_processes(values) == ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert sum_over_processes(values) != sum(values), "the order matters"


def test_a_sum_that_is_not_whole_is_an_error():
    total = PairwiseSum()
    for _ in range(3):
        total.add([torch.ones(2)])
    with pytest.raises(ValueError, match="unpack"):
        total.result()


def test_what_is_missing_counts_as_zero():
    total = PairwiseSum()
    for values in ([torch.ones(2), None], [None, None], [None, None], [torch.ones(2), None]):
        total.add(values)
    both, nothing = total.result()
    assert both.tolist() == [2, 2]
    assert nothing is None


@pytest.mark.parametrize("n_shares", [2, 4])
def test_the_mean_of_losses_has_the_mean_of_their_gradients(n_shares):
    torch.manual_seed(0)
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(n_shares, 7, 5, dtype=torch.float64)
    losses = [lambda part=part: (part @ weight.T).tanh().square().mean() for part in inputs]
    found = mean_loss(losses, {"weight": weight})
    (3 * found).backward()
    wanted = (inputs.flatten(0, 1) @ weight.T).tanh().square().mean()
    (gradient,) = torch.autograd.grad(3 * wanted, weight)
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-12, atol=1e-15)


def test_a_parameter_that_no_loss_depends_on_is_named():
    weight, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ConfigError, match="the loss does not depend on bias"):
        mean_loss([weight.sum, weight.sum], {"weight": weight, "bias": unused})


def test_gradients_of_shares_are_added_up_in_pairs():
    factors = [torch.tensor(value) for value in (3.0, 3.0, 1e8, 5.0)]
    by_losses, by_copies = (torch.ones((), requires_grad=True) for _ in range(2))
    (4 * mean_loss([lambda factor=factor: factor * by_losses for factor in factors], {"weight": by_losses})).backward()
    copies = fanned_out(by_copies, 4)
    sum(factor * copy for factor, copy in zip(factors, copies, strict=True)).backward()
    a, b, c, d = factors
    assert by_losses.grad == by_copies.grad == (a + b) + (c + d)
    assert ((d + c) + b) + a != (a + b) + (c + d), "autograd's own order is another"


def test_a_copy_that_is_not_used_has_no_gradient():
    value = torch.ones(2, requires_grad=True)
    fanned_out(value, 4)[1].sum().backward()
    assert value.grad.tolist() == [1, 1]


def test_outside_of_a_share_a_process_does_all():
    assert current_share() == Share(0, 1)
    with working_on(Share(2, 4)):
        assert current_share() == Share(2, 4)
    assert current_share() == Share(0, 1)


def test_least_squares_keep_the_factors_of_shares_apart():
    torch.manual_seed(0)
    rows, targets = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    squares = LeastSquares()
    for number, part in enumerate((slice(0, 3), slice(3, 40))):
        with working_on(Share(number, 2)):
            squares.add(rows[part][: len(rows[part]) // 2], targets[part][: len(rows[part]) // 2])
            squares.sums()
            squares.add(rows[part][len(rows[part]) // 2 :], targets[part][len(rows[part]) // 2 :])
            stacked, count = squares.sums()
    assert stacked.shape == (2, 6, 6)
    assert int(count) == 40
    found, determined = squares.solve("them")
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, targets).solution)
    assert determined.all()


def data_module(**changed):
    images = torch.randint(256, (130, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = InMemoryImages(images, torch.arange(130) % 3, [str(number) for number in range(130)])
    settings = DataConfig(**{"image_size": 8, "n_validation": 10, "batch_size": 8, **changed})
    leaked = LeakedModel(FullyConnectedConfig(hidden_sizes=[5]), (3, 8, 8), 3)
    splits = ImageSplits(source, None, source, ("cat", "dog", "eel"))
    return GradientPairDataModule(splits, settings, leaked, GradientsConfig(dtype="float64"), [], 0)


class TrainerOfRank(SimpleNamespace):
    """As much of Lightning's as a data module asks for."""

    def __init__(self, rank, world_size):
        super().__init__(global_rank=rank, world_size=world_size, training=True, current_epoch=0, num_devices=1)


def batches_of(rank, world_size, virtual_ranks):
    data = data_module(horizontal_flip=True)
    data.virtual_ranks = virtual_ranks
    data.trainer = TrainerOfRank(rank, world_size)
    return data, [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_shares_are_the_batches_of_as_many_processes():
    alone, ours = batches_of(0, 1, virtual_ranks=4)
    assert alone.shares == tuple(Share(number, 4) for number in range(4))
    assert len(ours[0]) == 8
    for rank in range(4):
        process, theirs = batches_of(rank, 4, virtual_ranks=None)
        assert process.shares == (Share(rank, 4),)
        for batch, pair in zip(ours, theirs, strict=True):
            assert isinstance(batch, DividedBatch)
            share = batch.make(batch.parts[rank])
            assert len(share) == 2
            assert torch.equal(share.indices, pair.indices)
            assert torch.equal(share.images, pair.images)
            assert all(torch.equal(value, pair.gradients[name]) for name, value in share.gradients.items())


def test_two_processes_do_two_of_four():
    second, batches = batches_of(1, 2, virtual_ranks=4)
    assert second.shares == (Share(2, 4), Share(3, 4))
    assert len(batches[0].parts) == 2
    assert len(batches[0]) == 4


def test_a_batch_that_virtual_ranks_cannot_share_is_named():
    data = data_module(batch_size=10)
    data.virtual_ranks = 4
    with pytest.raises(ConfigError, match=r"data.batch_size: 10 .* 4 virtual ranks .* multiple of 4"):
        data.check_shares(1)


@pytest.mark.parametrize("virtual_ranks", [2, 4])
def test_fits_in_shares_find_what_fits_in_one_find(virtual_ranks):
    fitted = []
    for count in (None, virtual_ranks):
        data = data_module(n_validation=2)
        data.virtual_ranks = count
        generator = ExactGenerator(data.architecture, ExactGeneratorConfig())
        fit_in_closed_form(generator, data, torch.device("cpu"))
        assert bool(generator.fitted)
        fitted.append(generator)
    weights = [generator.estimated_parameters() for generator in fitted]
    for name, one in weights[0].items():
        torch.testing.assert_close(one.value, weights[1][name].value, rtol=1e-6, atol=1e-8, msg=name)
    assert fitted[0].largest_second == pytest.approx(float(fitted[1].largest_second), rel=1e-9)
    assert math.isfinite(float(fitted[0].largest_second))


def test_a_fit_that_is_more_than_sums_sees_all_pairs_on_every_process():
    data = data_module(n_validation=2)
    data.virtual_ranks, data.trainer = 4, TrainerOfRank(1, 2)
    seen = []
    fit = SimpleNamespace(update=lambda gradients, images, numbers: seen.extend(numbers.tolist()), sums=list)
    fit.finish = lambda: None
    generator = SimpleNamespace(fits=lambda: [FitOn(fit, everywhere=True)], fitted=torch.zeros((), dtype=torch.bool))
    fit_in_closed_form(generator, data, torch.device("cpu"))
    assert seen == list(range(128))


TRAINED = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (["trainer.virtual_ranks=6"], 2, "6 is not a power of two"),
        (["trainer.virtual_ranks=4"], 8, "4 cannot be shared equally by 8 processes"),
        (["trainer.virtual_ranks=4"], 3, "4 cannot be shared equally by 3 processes"),
        (["trainer.virtual_ranks=2", "trainer.strategy=fsdp"], 2, "trainer.strategy=fsdp .* Give trainer.strategy=ddp"),
        (["trainer.virtual_ranks=2", "trainer.precision=16-mixed"], 2, "16-mixed. Give trainer.precision=bf16-mixed"),
        (["trainer.virtual_ranks=2", "trainer.accumulate_grad_batches=2"], 2, "trainer.accumulate_grad_batches: with"),
        (["trainer.virtual_ranks=2", "task=leaked"], 1, "task=leaked does not divide"),
    ],
)
def test_what_does_not_go_with_virtual_ranks_is_one_message(settings, world_size, message):
    config = load_config("configs/lenet_mlp.yaml", settings)
    with pytest.raises(ConfigError, match=message):
        check_virtual_ranks(config, TRAINED, world_size)


def test_without_weights_to_train_there_are_no_virtual_ranks():
    config = load_config("configs/lenet_exact.yaml", ["trainer.virtual_ranks=2"])
    with pytest.raises(ConfigError, match="exact has no trained weights"):
        check_virtual_ranks(config, nn.Identity(), 1)
