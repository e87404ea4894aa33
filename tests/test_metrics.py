"""Per-token values and estimates against naive loops and numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from harness.metrics import Estimate, ln_ppl_ratio, perplexity, shared_ngram_share, token_values


def nll_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The negative log-likelihoods alone."""
    return token_values(logits, targets).nll


def naive_nll(logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """-log softmax, one float64 number after the other."""
    result = []
    for row, target in zip(logits.astype(np.float64).tolist(), targets.tolist(), strict=True):
        top = max(row)
        result.append(math.log(math.fsum(math.exp(x - top) for x in row)) + top - row[target])
    return result


def random_case(n: int, vocab: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Normal logits and random targets."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, (n, vocab)).astype(np.float32), rng.integers(0, vocab, n)


# 16 rows are worked on at a time: the cases lie around that and its multiples.
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 50])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_token_nll_equals_a_naive_loop(n: int, scale: float) -> None:
    logits, targets = random_case(n, 257, scale, seed=n)
    nll = nll_of(logits, targets)
    assert nll.dtype == np.float64
    assert nll.shape == (n,)
    np.testing.assert_allclose(nll, naive_nll(logits, targets), rtol=1e-6, atol=1e-6)


def test_token_nll_of_no_rows_is_empty() -> None:
    assert nll_of(np.empty((0, 8), np.float32), np.empty(0, np.int32)).shape == (0,)


def test_token_nll_of_one_word_is_zero() -> None:
    assert nll_of(np.full((3, 1), 7.5, np.float32), np.zeros(3, np.int64)).tolist() == [0.0, 0.0, 0.0]


def test_token_nll_of_equal_logits_is_the_log_of_their_number() -> None:
    nll = nll_of(np.full((20, 1000), -3.25, np.float32), np.arange(20))
    np.testing.assert_allclose(nll, math.log(1000), rtol=1e-12)


def test_token_nll_of_ties_at_the_top() -> None:
    logits = np.array([[5.0, 5.0, -100.0, 5.0]], np.float32)
    assert nll_of(logits, np.array([1]))[0] == pytest.approx(math.log(3), rel=1e-12)
    assert nll_of(logits, np.array([2]))[0] == pytest.approx(math.log(3) + 105, rel=1e-12)


def test_token_nll_of_logits_too_large_for_exp() -> None:
    logits = np.array([[1e4, 1e4 - 2, 0.0], [-1e4, -1e4 + 1, -2e4], [1e6, -1e6, 0.0]], np.float32)
    targets = np.array([1, 0, 1])
    nll = nll_of(logits, targets)
    assert np.isfinite(nll).all()
    np.testing.assert_allclose(nll, [2 + math.log1p(math.exp(-2)), 1 + math.log1p(math.exp(-1)), 2e6], rtol=1e-7)


def test_token_nll_of_float32_extremes() -> None:
    top = float(np.finfo(np.float32).max)
    with np.errstate(over="ignore"):  # the largest number minus the smallest is no float32
        nll = nll_of(np.array([[top, 0.0, -top], [-top, 0.0, top]], np.float32), np.array([2, 2]))
    np.testing.assert_allclose(nll, [2 * top, 0.0], rtol=1e-7)
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    assert nll_of(np.array([[tiny, -tiny, 0.0]], np.float32), np.array([1]))[0] == pytest.approx(math.log(3))


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e30, 3.4028234e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_token_nll_of_ties_at_any_magnitude(magnitude: float, sign: int) -> None:
    nll = nll_of(np.full((1, 3), sign * magnitude, np.float32), np.array([1]))
    assert nll[0] == pytest.approx(math.log(3), rel=1e-9)


def test_token_nll_of_a_masked_token_is_infinite_and_harms_no_other() -> None:
    logits = np.array([[1.0, -np.inf, 2.0], [1.0, -np.inf, 2.0]], np.float32)
    nll = nll_of(logits, np.array([1, 2]))
    assert nll[0] == math.inf
    assert nll[1] == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


def test_token_nll_passes_nan_on_for_its_row_alone() -> None:
    logits, targets = random_case(20, 30, 1.0)
    logits[17, 3] = np.nan
    assert np.flatnonzero(np.isnan(nll_of(logits, targets))).tolist() == [17]


def test_token_nll_sums_in_float64() -> None:
    # 1 + 100 * 2e-9: next to 1, a float32 sum would lose most of the small ones.
    logits = np.full((1, 101), -20.0, np.float32)
    logits[0, 0] = 0.0
    assert nll_of(logits, np.array([0]))[0] == pytest.approx(math.log1p(100 * math.exp(-20.0)), rel=1e-6)


def test_token_nll_leaves_its_input_alone() -> None:
    logits, targets = random_case(40, 64, 5.0)
    before = logits.copy()
    nll_of(logits, targets)
    assert (logits == before).all()


def test_token_nll_takes_rows_that_are_not_contiguous() -> None:
    logits, targets = random_case(40, 64, 5.0)
    np.testing.assert_array_equal(nll_of(np.asfortranarray(logits), targets), nll_of(logits, targets))
    np.testing.assert_array_equal(nll_of(logits[::2], targets[::2]), nll_of(logits, targets)[::2])


ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-200, 200, width=32),
)


@settings(deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_token_nll_of_any_logits_equals_a_naive_loop(logits: np.ndarray, random: object) -> None:
    targets = np.array([random.randrange(logits.shape[1]) for _ in logits])  # type: ignore[attr-defined]
    nll = nll_of(logits, targets)
    np.testing.assert_allclose(nll, naive_nll(logits, targets), rtol=1e-6, atol=1e-6)
    assert (nll >= 0).all()


@settings(deadline=None)
@given(
    hnp.arrays(np.int32, st.tuples(st.integers(1, 35), st.integers(1, 20)), elements=st.integers(-40, 40)),
    st.integers(-1000, 1000),
)
def test_token_nll_does_not_change_when_all_logits_shift(rows: np.ndarray, shift: int) -> None:
    logits = rows.astype(np.float32)  # whole numbers: the shift is exact in float32
    targets = np.zeros(len(rows), np.int64)
    shifted = nll_of(logits + np.float32(shift), targets)
    np.testing.assert_allclose(nll_of(logits, targets), shifted, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(ROWS)
def test_the_probabilities_of_all_tokens_add_up_to_one(logits: np.ndarray) -> None:
    vocab = logits.shape[1]
    nll = np.stack([nll_of(logits, np.full(len(logits), token)) for token in range(vocab)], axis=1)
    np.testing.assert_allclose(np.exp(-nll).sum(axis=1), 1.0, rtol=1e-6)


def test_perplexity_by_hand() -> None:
    # nll 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, population variance 3.5, sd / sqrt(3) = sqrt(7/6).
    estimate = perplexity(np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert estimate.value == pytest.approx(20.085536923187668, rel=1e-12)
    assert estimate.se == pytest.approx(20.085536923187668 * 1.0801234497346435, rel=1e-12)


def test_perplexity_of_a_coin_is_two_without_error() -> None:
    estimate = perplexity(np.full((3, 5), math.log(2)))
    assert estimate.value == pytest.approx(2.0, rel=1e-12)
    assert estimate.se == pytest.approx(0.0, abs=1e-12)


def test_perplexity_of_one_token_has_no_error() -> None:
    assert perplexity(np.array([[0.0]])) == Estimate(1.0, None)


def test_perplexity_of_two_tokens_has_one() -> None:
    # nll 0 and 2: mean 1, population sd 1, divided by sqrt(1).
    assert perplexity(np.array([0.0, 2.0])) == Estimate(pytest.approx(math.e), pytest.approx(math.e))


@given(st.lists(st.floats(0, 20), min_size=2, max_size=60), st.floats(-3, 3))
def test_perplexity_scales_with_a_shift_of_the_nll(values: list[float], shift: float) -> None:
    nll = np.array(values)
    before, after = perplexity(nll), perplexity(nll + shift)
    assert before.se is not None
    assert after.value == pytest.approx(before.value * math.exp(shift), rel=1e-9)
    assert after.se == pytest.approx(before.se * math.exp(shift), rel=1e-6, abs=1e-9 * after.value)


def test_ln_ppl_ratio_by_hand() -> None:
    # differences 0.5, 0, 1, 0.5: mean 0.5, population variance 0.125, sd / sqrt(3) = 0.2041241...
    nll, reference = np.array([[1.5, 2.0], [4.0, 6.5]]), np.array([[1.0, 2.0], [3.0, 6.0]])
    estimate = ln_ppl_ratio(nll, reference)
    assert estimate.value == pytest.approx(0.5, rel=1e-12)
    assert estimate.se == pytest.approx(0.20412414523193154, rel=1e-12)


def test_ln_ppl_ratio_is_paired() -> None:
    """A constant loss has no error, however much the tokens differ from each other."""
    reference = np.array([0.1, 9.0, 3.0, 0.5])
    assert ln_ppl_ratio(reference + 0.25, reference) == Estimate(pytest.approx(0.25), pytest.approx(0.0, abs=1e-12))


def test_ln_ppl_ratio_with_itself_is_exactly_zero() -> None:
    nll = np.random.default_rng(0).exponential(2.0, (4, 100))
    assert ln_ppl_ratio(nll, nll) == Estimate(0.0, 0.0)


def test_ln_ppl_ratio_of_one_token_has_no_error() -> None:
    assert ln_ppl_ratio(np.array([[3.0]]), np.array([[1.0]])) == Estimate(2.0, None)


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8,), (1, 8), (2, 3)])
def test_ln_ppl_ratio_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    # (1, 8) would broadcast against (8, 1), and (8,) against it too: numpy alone would not notice
    with pytest.raises(ValueError, match=r"\(8, 1\)"):
        ln_ppl_ratio(np.zeros(shape), np.zeros((8, 1)))


@given(hnp.arrays(np.float64, (2, 30), elements=st.floats(0, 20)))
def test_ln_ppl_ratio_is_the_difference_of_the_logs_and_changes_sign(pair: np.ndarray) -> None:
    forth, back = ln_ppl_ratio(pair[0], pair[1]), ln_ppl_ratio(pair[1], pair[0])
    assert forth.se is not None
    assert forth.value == pytest.approx(
        math.log(perplexity(pair[0]).value) - math.log(perplexity(pair[1]).value), abs=1e-9
    )
    assert (back.value, back.se) == (pytest.approx(-forth.value, abs=1e-12), pytest.approx(forth.se, abs=1e-12))


def windows(*rows: list[int]) -> np.ndarray:
    """int32 [windows, tokens]."""
    return np.array(rows, np.int32)


def test_no_shared_ngram() -> None:
    assert shared_ngram_share(windows(list(range(20))), windows(list(range(100, 140)))) == 0.0


def test_every_ngram_shared() -> None:
    evaluation = windows(list(range(20)), list(range(5, 25)))
    assert shared_ngram_share(evaluation, windows(list(range(40)))) == 1.0


def test_share_is_exact() -> None:
    # 20 tokens have 8 13-grams. The calibration knows tokens 3..17, which hold those that begin at 3, 4 and 5.
    calibration = windows([900, 901, *range(3, 18), 902, 903])
    assert shared_ngram_share(windows(list(range(20))), calibration) == 3 / 8


def test_share_counts_all_windows_and_repeats() -> None:
    # Two windows of 14 tokens have 2 13-grams each; the first window's 7, 7, ... are one 13-gram twice.
    evaluation = windows([7] * 14, list(range(100, 114)))
    assert shared_ngram_share(evaluation, windows([7] * 13)) == 2 / 4
    assert shared_ngram_share(evaluation, windows(list(range(101, 114)))) == 1 / 4


def test_thirteen_tokens_are_enough_and_twelve_are_not() -> None:
    thirteen, twelve = windows(list(range(13))), windows(list(range(12)))
    assert shared_ngram_share(thirteen, thirteen) == 1.0
    assert shared_ngram_share(thirteen, windows([*range(12), 99])) == 0.0
    # too short to tell is not the same as nothing shared
    assert shared_ngram_share(twelve, thirteen) is None
    assert shared_ngram_share(thirteen, twelve) is None
    assert shared_ngram_share(twelve, twelve) is None


def test_ngrams_do_not_cross_windows() -> None:
    half = windows(list(range(10)), list(range(10, 20)))
    assert shared_ngram_share(windows(list(range(20))), half) is None
    joined = windows(list(range(13)), list(range(13, 26)))
    # of the 14 13-grams of 0..25 only the first and the last lie inside one window
    assert shared_ngram_share(windows(list(range(26))), joined) == 2 / 14


def test_order_matters() -> None:
    assert shared_ngram_share(windows(list(range(13))), windows(list(range(12, -1, -1)))) == 0.0


def test_large_token_ids_are_told_apart() -> None:
    # equal in the lowest byte, and in the lowest two
    base = np.arange(13, dtype=np.int32)[None]
    assert shared_ngram_share(base, base + 256) == 0.0
    assert shared_ngram_share(base, base + 65536) == 0.0
    assert shared_ngram_share(base + 150_000, base + 150_000) == 1.0


def test_other_integer_types_and_strides_are_the_same_tokens() -> None:
    evaluation, calibration = windows(list(range(20))), windows([*range(3, 18), *range(50, 60)])
    expected = shared_ngram_share(evaluation, calibration)
    assert expected == 3 / 8
    assert shared_ngram_share(evaluation.astype(np.int64), calibration) == expected
    doubled = np.repeat(calibration, 2, axis=1)[:, ::2]
    assert shared_ngram_share(evaluation, doubled) == expected


@settings(deadline=None)
@given(
    hnp.arrays(np.int32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 2)),
    hnp.arrays(np.int32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 2)),
    st.integers(1, 4),
)
def test_share_of_short_ngrams_equals_sets_of_tuples(evaluation: np.ndarray, calibration: np.ndarray, n: int) -> None:
    def grams(rows: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + n]) for row in rows.tolist() for i in range(len(row) - n + 1)]

    evaluated, known = grams(evaluation), set(grams(calibration))
    expected = sum(gram in known for gram in evaluated) / len(evaluated) if evaluated and known else None
    assert shared_ngram_share(evaluation, calibration, n) == (None if expected is None else pytest.approx(expected))
