import torch
from hypothesis import given
from hypothesis import strategies as st

from gitlight.config import DataConfig
from gitlight.data.sampling import LeakSampler


def read(n_images, per_leak, batch, world, shuffle, epoch=0, seed=3, mixed=False):
    settings = DataConfig(client_batch_size=per_leak, batch_size=batch)
    shares = []
    for rank in range(world):
        sampler = LeakSampler(n_images, settings, rank, world, seed, shuffle, mixed)
        sampler.set_epoch(epoch)
        positions = list(sampler)
        assert len(positions) == len(sampler)
        shares.append(torch.tensor(positions).view(-1, per_leak))
    return shares


sizes = st.tuples(st.integers(1, 60), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 3]))


@given(sizes)
def test_every_global_batch_is_the_same_for_any_number_of_ranks(size):
    n_images, per_leak, per_rank, world = size
    batch = per_rank * world
    (alone,) = read(n_images, per_leak, batch, 1, shuffle=True)
    shares = read(n_images, per_leak, batch, world, shuffle=True)
    together = torch.cat([share.view(-1, per_rank, per_leak) for share in shares], dim=1).view(-1, per_leak)
    assert torch.equal(together, alone)
    assert alone.unique().numel() == alone.numel() == n_images // per_leak // batch * batch * per_leak


@given(sizes)
def test_evaluation_reads_every_leak_once_over_all_ranks(size):
    n_images, per_leak, per_rank, world = size
    shares = read(n_images, per_leak, per_rank * world, world, shuffle=False)
    leaks = torch.cat(shares)
    assert torch.equal(leaks.flatten().sort().values, torch.arange(n_images // per_leak * per_leak))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_and_seeds_shuffle_differently():
    def order(**changed):
        return read(50, 1, 10, 1, shuffle=True, **changed)[0].flatten().tolist()

    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=4)


@given(sizes)
def test_fits_of_client_batches_group_the_same_images_at_every_pass_and_on_any_number_of_ranks(size):
    n_images, per_leak, per_rank, world = size
    (alone,) = read(n_images, per_leak, per_rank, 1, shuffle=False, mixed=True)
    shares = read(n_images, per_leak, per_rank * world, world, shuffle=False, epoch=1, mixed=True)
    assert sorted(map(tuple, torch.cat(shares).tolist())) == sorted(map(tuple, alone.tolist()))
    assert alone.unique().numel() == alone.numel() == n_images // per_leak * per_leak


def test_fits_of_client_batches_do_not_group_neighbours():
    (alone,) = read(1000, 4, 10, 1, shuffle=False, mixed=True)
    of_class = alone // 100  # a source sorted by class
    n_classes = torch.tensor([row.unique().numel() for row in of_class])
    assert n_classes.double().mean() > 3
