"""Intervals: coverage by simulation with correlated tokens, hand-computed values, Holm."""

import math

import numpy as np
import pytest

from harness.stats import MIN_BLOCKS, block_means, holm, mean_interval


def correlated(rng: np.random.Generator, n_windows: int, n_scored: int, rho: float, skewed: bool) -> np.ndarray:
    """AR(1) tokens within windows, mean 0; heavy to the right when skewed, as differences of nll are."""
    noise = rng.gamma(0.5, 2.0, (n_windows, n_scored)) - 1.0 if skewed else rng.normal(size=(n_windows, n_scored))
    values = np.empty_like(noise)
    values[:, 0] = noise[:, 0] / math.sqrt(1 - rho**2)
    for i in range(1, n_scored):
        values[:, i] = rho * values[:, i - 1] + noise[:, i]
    return values


@pytest.mark.parametrize(
    ("n_windows", "rho", "skewed"), [(4, 0.0, True), (4, 0.5, False), (4, 0.8, True), (16, 0.8, True)]
)
def test_95_per_cent_intervals_cover_in_93_to_97(n_windows: int, rho: float, skewed: bool) -> None:
    rng = np.random.default_rng(7)
    runs = 800
    covered = 0
    for _ in range(runs):
        interval = mean_interval(correlated(rng, n_windows, 1023, rho, skewed))
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / runs <= 0.97


def test_taking_tokens_as_independent_would_not_cover() -> None:
    """What the blocks are for: with rho = 0.8 the token error covers in far fewer than 93 %."""
    rng = np.random.default_rng(8)
    covered = 0
    for _ in range(300):
        values = correlated(rng, 4, 1023, 0.8, False)
        covered += abs(values.mean()) <= 1.96 * values.std() / math.sqrt(values.size - 1)
    assert covered / 300 < 0.7


def test_block_means_by_hand() -> None:
    values = np.array([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    means, sizes = block_means(values, 2)
    # 5 tokens are 2 blocks: edges 0, 2.5 -> 2, 5
    assert means.tolist() == [1.5, 4.0, 6.5, 9.0]
    assert sizes.tolist() == [2, 3, 2, 3]
    assert float((means * sizes).sum() / sizes.sum()) == values.mean()


def test_standard_error_by_hand_for_equal_blocks() -> None:
    values = np.repeat(np.arange(12.0), 93).reshape(12, 93)
    interval = mean_interval(values)
    assert interval.n_blocks == 12
    assert interval.mean == 5.5
    assert interval.se == pytest.approx(np.arange(12.0).std(ddof=1) / math.sqrt(12))
    assert interval.sign == 1


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(1).normal(size=(4, 1023))
    assert mean_interval(values) == mean_interval(values.copy())


def test_p_is_at_most_5_per_cent_just_when_the_interval_leaves_out_0() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0, 1, (4, 1023))
    values -= values.mean()
    se = mean_interval(values + 1).se
    assert se is not None
    intervals = [mean_interval(values + shift * se) for shift in np.linspace(-2.4, 2.4, 400)]
    assert all(((one.p or 0) <= 0.05) == bool(one.sign) for one in intervals)
    assert {one.sign for one in intervals} == {-1, 0, 1}


def test_too_few_blocks_have_no_interval_and_say_why() -> None:
    interval = mean_interval(np.random.default_rng(1).normal(size=(2, 4 * 93)))
    assert interval.n_blocks == 8 < MIN_BLOCKS
    assert interval.se is interval.low is interval.high is interval.p is interval.sign is None
    assert "too few" in (interval.reason or "")


def test_equal_values_have_no_zero_width_interval() -> None:
    interval = mean_interval(np.zeros((4, 1023)))
    assert interval.low is None and interval.mean == 0 and interval.reason


def test_windows_to_resolve_grow_with_the_square() -> None:
    values = np.random.default_rng(3).normal(0.02, 1.0, (8, 1023))
    interval = mean_interval(values)
    assert interval.resolvable is not None
    need = interval.windows_to_resolve(8)
    assert need == math.ceil(8 * (interval.resolvable / abs(interval.mean)) ** 2)
    # ... and with that many windows a difference of this size is found four times out of five
    rng = np.random.default_rng(4)
    found = [mean_interval(rng.normal(abs(interval.mean), 1.0, (need, 1023))).sign == 1 for _ in range(120)]
    assert 0.7 <= np.mean(found) <= 0.9


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, None]) == [0.03, 0.06, 0.06, None]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
