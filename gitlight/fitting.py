"""A generator's closed-form fits: passes over the public pairs, each process over its share."""

import logging

import torch
from torch.distributed.tensor import DTensor

from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.generators.base import FitOn, Generator
from gitlight.virtual_ranks import PairwiseSum, Share, add_up, n_processes, working_on

log = logging.getLogger(__name__)


@torch.no_grad()
def fit_in_closed_form(generator: Generator, datamodule: GradientPairDataModule, device: torch.device) -> None:
    """Make all fits of a generator, one after the other, and mark it as fitted.

    Args:
        generator: which.
        datamodule: makes the pairs.
        device: where.
    """
    for number, fit in enumerate(generator.fits(), start=1):
        wanted = fit if isinstance(fit, FitOn) else FitOn(fit)
        log.info("fit %d (%s): over the public pairs", number, wanted.name.removeprefix("_"))
        _add_pairs(wanted, datamodule, device)
        for total in wanted.sums():
            add_up(total, in_pairs=datamodule.virtual_ranks is not None)
        wanted.finish()
    generator.fitted.fill_(True)
    if n_processes() > 1:
        # Equal sums need not give equal solutions on unequal devices; fits may start what is trained, too.
        for tensor in (*generator.buffers(), *generator.parameters()):
            if not isinstance(tensor, DTensor):  # of which every device has its share, drawn from one seed
                torch.distributed.broadcast(tensor.data, src=0)


def _add_pairs(fit: FitOn, datamodule: GradientPairDataModule, device: torch.device) -> None:
    """This process's pairs; those of several virtual ranks apart, and their sums as those of processes."""
    shares = (Share(0, 1),) if fit.pairs.everywhere else datamodule.shares
    total = PairwiseSum()
    for share in shares:
        with working_on(share):
            for pair in datamodule.fit_pairs(device, fit.pairs, share):
                # Neither labels nor anything else that the attacker does not have.
                fit.update(pair.gradients, pair.images, datamodule.fit_numbers(pair))
            sums = fit.sums()
            if len(shares) > 1:
                total.add([each.clone() for each in sums])
                for each in sums:
                    each.zero_()
    if len(shares) > 1:
        for each, summed in zip(sums, total.result(), strict=True):
            assert summed is not None
            each.copy_(summed)
