"""How long making pairs takes, on the device that makes them."""

import copy
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode


class PairClock:
    """Adds up the seconds spent inside `running`, whose operations it has no counter count.

    On a GPU these are the device's own seconds, by events. Nothing waits for the device: `seconds` has those that it is
    done with.

    >>> clock = PairClock()
    >>> with clock.running(torch.device("cpu")):
    ...     _ = torch.ones(3) + 1
    >>> clock.seconds > 0
    True

    Attributes:
        counter: counts operations at the moment; None: nothing does.
    """

    def __init__(self) -> None:
        self.counter: FlopCounterMode | None = None
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what happens on ``device`` within."""
        # Forgotten afterwards, not subtracted: the first pairs trace the leaked model, whose batch size is a symbol.
        counts = None if self.counter is None else copy.deepcopy(self.counter.flop_counts)
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
        if self.counter is not None and counts is not None:
            self.counter.flop_counts = counts

    @property
    def seconds(self) -> float:
        """Seconds so far; on a GPU, without what the device has not finished yet."""
        while self._events and self._events[0][1].query():
            start, end = self._events.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        return self._seconds
