"""Intervals for means of correlated per-token values, and what follows from them. numpy only; nothing knows a model.

Tokens of one window are correlated: what is hard for one token is hard for its neighbours. So the unit here is a block
of neighbouring tokens; blocks are treated as independent, and an interval comes from resampling whole blocks
(studentized block bootstrap: Davison and Hinkley 1997, chapters 2.4, 5.2 and 8.2). Simulations with correlated
tokens in tests/test_stats.py show the coverage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK_TOKENS = 93  # 1,023 scored tokens are 11 blocks; correlation of nll is gone after some tens of tokens
MIN_BLOCKS = 10  # fewer cannot tell their own spread
ALPHA = 0.05  # of two-sided tests; intervals are of 1 - ALPHA
_REPLICATES = 4000
SMALLEST_P = 2 / _REPLICATES  # what so many replicates can tell apart from 0
_SEED = 20250328
_MAX_WINDOWS = 1_000_000  # 2e9 tokens: a difference that needs more is none
_POWER_Z = 0.8416  # 80 % chance to see a difference that is there


@dataclass(frozen=True)
class Interval:
    """A mean with its error. low and high: 95 % interval; p: two-sided, for "the mean is 0".

    se, low, high and p are None when there are too few blocks to tell (`reason` says so).
    """

    mean: float
    se: float | None
    low: float | None
    high: float | None
    p: float | None
    n_blocks: int
    reason: str | None = None

    @property
    def sign(self) -> int | None:
        """-1 or 1 when the interval leaves out 0, 0 when it holds it, None when there is no interval."""
        if self.low is None or self.high is None:
            return None
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    @property
    def resolvable(self) -> float | None:
        """Smallest true mean that this much text shows with 80 % probability at the 5 % level; None if unknown."""
        return None if self.se is None else (1.96 + _POWER_Z) * self.se

    def windows_to_resolve(self, n_windows: int) -> int | None:
        """Windows of such text that would show a mean of this size with 80 % probability; None beyond a million."""
        if self.resolvable is None or n_windows * self.resolvable**2 >= _MAX_WINDOWS * self.mean**2:
            return None
        return max(1, math.ceil(n_windows * (self.resolvable / abs(self.mean)) ** 2))


def mean_interval(values: np.ndarray, block_tokens: int = BLOCK_TOKENS) -> Interval:
    """The mean of per-token values and its 95 % interval. values: float64 [n_windows, n_scored].

    The same values always give the same interval: the resampling is seeded.
    """
    mean = float(values.mean())
    blocks, sizes = block_means(values, block_tokens)
    n = len(blocks)
    if n < MIN_BLOCKS:
        return Interval(mean, None, None, None, None, n, f"{n} blocks of tokens are too few, {MIN_BLOCKS} are needed")
    if np.ptp(blocks) == 0:
        return Interval(mean, None, None, None, None, n, "all blocks are equal: nothing to resample")
    # Weighted blocks as a ratio estimate: linearize, so that short last blocks count for less.
    scaled = sizes * n / sizes.sum()
    residuals = scaled * (blocks - mean)
    se = math.sqrt(float((residuals**2).sum()) / (n * (n - 1)))
    # A replicate's sums are products with how often it chose each block: the same figures as gathering the blocks.
    weight, weight_squares = _resampled_weights(scaled.tobytes())
    sums, squares, crossed = np.array([residuals, residuals**2, residuals * scaled]) @ _resampled(n)
    shift = sums / weight  # the replicate's mean minus the mean
    squares += shift * (shift * weight_squares - 2 * crossed)
    errors = np.sqrt(np.maximum(squares, 0.0, out=squares) / (n * (n - 1)))
    usable = errors > 1e-9 * se  # not the replicates that chose one block n times
    t = shift / errors if usable.all() else shift[usable] / errors[usable]
    low_t, high_t = quantiles(t, (ALPHA / 2, 1 - ALPHA / 2))
    # Two-sided, from the same replicates as the interval.
    tail = min(np.count_nonzero(t >= mean / se), np.count_nonzero(t <= mean / se))
    p = min(1.0, 2 * (1 + tail) / (len(t) + 1))
    low, high = mean - high_t * se, mean - low_t * se
    # p <= ALPHA just when the interval leaves out 0: counts and interpolated quantiles differ by a replicate there.
    p = min(p, ALPHA) if low > 0 or high < 0 else max(p, math.nextafter(ALPHA, 1))
    return Interval(mean, se, low, high, p, n)


def quantiles(values: np.ndarray, shares: Sequence[float]) -> list[float]:
    """As np.quantile of values [n], n > 1, in a third of the time: a report asks thousands of times."""
    places = [share * (len(values) - 1) for share in shares]
    firsts = [min(math.floor(place), len(values) - 2) for place in places]
    parted = np.partition(values, [place for first in firsts for place in (first, first + 1)])
    return [float(parted[i] + (x - i) * (parted[i + 1] - parted[i])) for x, i in zip(places, firsts, strict=True)]


# Student's t, 97.5 %, for 1 to 30 degrees of freedom (the usual table).
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def small_sample_interval(values: np.ndarray) -> Interval:
    """The mean of a few independent values and its 95 % interval by Student's t. values: float64 [2 .. 31]."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, None, None, None, None, n, "one value tells no spread")
    se = float(values.std(ddof=1)) / math.sqrt(n)
    half = _T_975[n - 2] * se
    return Interval(mean, se, mean - half, mean + half, None, n)


@lru_cache(maxsize=4)
def _resampled(n: int) -> np.ndarray:
    """How often each replicate of the bootstrap chose each of n blocks: float64 [n, _REPLICATES]. Seeded."""
    chosen = np.random.default_rng(_SEED).integers(0, n, (_REPLICATES, n))
    return np.stack([np.bincount(row, minlength=n) for row in chosen], axis=1).astype(np.float64)


@lru_cache(maxsize=4)
def _resampled_weights(scaled: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each replicate's block weights and of their squares: float64 [_REPLICATES] each."""
    weights = np.frombuffer(scaled)
    counts = _resampled(len(weights))
    return weights @ counts, weights**2 @ counts


def block_means(values: np.ndarray, block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of consecutive blocks inside each window, and the number of tokens in each. Blocks do not cross windows.

    A window's tokens are spread evenly over as many blocks as fit, so blocks differ by one token at most.
    """
    begins, sizes = _blocks(*values.shape, block_tokens)
    return np.add.reduceat(values, begins, axis=1).ravel() / sizes, sizes


@lru_cache(maxsize=16)
def _blocks(n_windows: int, n_scored: int, block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the blocks of a window begin: int [n]; the number of tokens in each block of all windows: float64."""
    per_window = max(1, n_scored // block_tokens)
    edges = np.linspace(0, n_scored, per_window + 1).round().astype(int)
    return edges[:-1], np.tile(np.diff(edges), n_windows).astype(float)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment for several comparisons in one table (Holm 1979). None stays None."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted
