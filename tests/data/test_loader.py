import pytest
import torch
from torch.utils.data import TensorDataset

from gitlight.config import DataConfig
from gitlight.data.loader import LeakLoader
from gitlight.data.sampling import LeakSampler

N_IMAGES, BATCH = 26, 6  # four batches, two images left over


def loader(rank=0, world=1, between=lambda: None, num_workers=0):
    sampler = LeakSampler(N_IMAGES, DataConfig(batch_size=BATCH), rank, world, seed=3, shuffle=True)
    images = TensorDataset(torch.arange(N_IMAGES))
    return LeakLoader(images, sampler, between, batch_size=BATCH // world, num_workers=num_workers)


def batches(of, epoch):
    iterator = iter(of)
    of.sampler.set_epoch(epoch)  # as Lightning does, after it has the iterator
    return [batch[0] for batch in iterator]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_goes_on_where_it_was_for_any_number_of_ranks(world):
    whole = batches(loader(), epoch=5)
    shares = []
    for rank in range(world):
        resumed = loader(rank, world)
        resumed.load_state_dict({"epoch": 5, "batches": 1})
        shares.append(batches(resumed, epoch=5))
        assert len(batches(resumed, epoch=6)) == 4, "the next epoch is whole"
    together = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    assert len(together) == 3
    for resumed_batch, batch in zip(together, whole[1:], strict=True):
        assert torch.equal(resumed_batch, batch)


def test_workers_read_the_epoch_that_is_set_after_the_iterator_is_made():
    for alone, by_worker in zip(batches(loader(), 5), batches(loader(num_workers=1), 5), strict=True):
        assert torch.equal(alone, by_worker)


def test_the_position_between_batches_is_that_of_the_batches_used():
    seen = []
    one = loader(between=lambda: seen.append((len(used), one.state_dict())))
    one.sampler.set_epoch(2)
    used = []
    for batch in one:
        used.append(batch)
    assert seen == [(n, {"epoch": 2, "batches": n}) for n in (1, 2, 3)]


def test_beginning_an_epoch_draws_no_random_number_of_the_process():
    generator = torch.Generator()
    sampler = LeakSampler(N_IMAGES, DataConfig(batch_size=BATCH), 0, 1, 3, shuffle=True)
    one = LeakLoader(TensorDataset(torch.arange(N_IMAGES)), sampler, lambda: None, batch_size=6, generator=generator)
    before = torch.get_rng_state()
    list(one)
    assert torch.equal(torch.get_rng_state(), before)
