"""Windows share the cores: several run at once, each in a context of its own with its part of the threads.

Threads that work on one window wait for each other after every operation; those on several windows do not. No value
depends on it: a window is run from an empty KV cache, and llama.cpp's results do not depend on the number of threads,
but for micro-batches of a single token (`alone`).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import repeat
from typing import TypeVar

MOST_AT_ONCE = 4  # each has a KV cache and buffers of its own

T = TypeVar("T")
R = TypeVar("R")


def windows_at_once(n_windows: int, n_threads: int, most: int = MOST_AT_ONCE) -> int:
    """How many windows of equal length run at once: what ends first if n threads are n times as fast as one; of equals
    the most, since fewer threads wait less. At least 1; at most 4, and `most`, for which there is memory."""

    def turns(at_once: int) -> Fraction:
        whole, rest = divmod(n_windows, at_once)
        return Fraction(whole, n_threads // at_once) + (Fraction(1, n_threads // rest) if rest else 0)

    possible = range(1, max(1, min(MOST_AT_ONCE, most, n_windows, n_threads)) + 1)
    return min(reversed(possible), key=turns)


def in_waves(
    items: Sequence[T], n_threads: int, work: Callable[[int, T, int], R], most: int = MOST_AT_ONCE
) -> Iterator[R]:
    """What `work(slot, item, at_once)` returns, in the order of the items.

    As many items at once as `windows_at_once` says, then the next ones; `slot` counts from 0 within them. The work may
    use `threads_of(n_threads, at_once)` threads. After an exception what was begun is ended, and no more is.
    """
    at_once = windows_at_once(len(items), n_threads, most)
    with ThreadPoolExecutor(at_once) as pool:
        for start in range(0, len(items), at_once):
            wave = items[start : start + at_once]
            yield from pool.map(work, range(len(wave)), wave, repeat(len(wave)))


def alone(window_tokens: int, ubatch_tokens: int) -> bool:
    """Whether a window must run alone, with all threads: flash attention of a single token is cut by threads, and a
    micro-batch of these sizes is or ends with one."""
    return ubatch_tokens == 1 or window_tokens % ubatch_tokens == 1


def threads_of(n_threads: int, at_once: int) -> int:
    """Threads of each of so many windows."""
    return max(1, n_threads // at_once)
