"""The moving average of the trained weights."""

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn


def moving_average(decay: float) -> WeightAveraging:
    """Lightning's callback that keeps an exponential moving average, validates with it, and saves it.

    Of the average before, step ``n`` keeps ``min(decay, (1 + n) / (10 + n))``, as TensorFlow's moving average does when
    it is given the number of updates: with ``decay`` alone a short run's average would be for the most part of weights
    that were hardly trained.

    Args:
        decay: what each step keeps in the end, in [0, 1).
    """

    def average(averaged: Tensor, current: Tensor, n_averaged: Tensor) -> Tensor:
        n = int(n_averaged)
        kept: Tensor = get_ema_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, n_averaged)
        return kept

    # Buffers are what fits have found, and digests of sketches: none is an average of others.
    return WeightAveraging(use_buffers=False, avg_fn=average)
