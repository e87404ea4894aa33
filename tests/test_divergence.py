"""KL divergence, same top and change of probability against a naive float64 loop and hand-computed values."""

import io
import math

import numpy as np
import pytest

from harness import metrics
from harness.errors import EngineError
from harness.kld_reference import ProbabilityRows, reference_bytes


def reader(logits: np.ndarray) -> tuple[ProbabilityRows, io.BytesIO]:
    """The reference's rows as `score` stores them."""
    p, p_log_p = metrics.probabilities(logits)
    data = b"".join(np.float64(e).tobytes() + row.tobytes() for row, e in zip(p, p_log_p, strict=True))
    assert len(data) == reference_bytes(*logits.shape, 0)["probabilities"]
    file = io.BytesIO(data)
    return ProbabilityRows(file, logits.shape[1]), file


def naive_kld(reference: np.ndarray, variant: np.ndarray) -> list[float]:
    """Term by term in float64."""
    result = []
    for a, b in zip(reference.astype(float), variant.astype(float), strict=True):
        log_p = a - a.max() - math.log(np.exp(a - a.max()).sum())
        log_q = b - b.max() - math.log(np.exp(b - b.max()).sum())
        result.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
    return result


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_kld_equals_a_naive_loop(n: int, scale: float) -> None:
    rng = np.random.default_rng(n)
    reference = rng.normal(0, scale, (n, 5000)).astype(np.float32) + 300
    variant = (reference + rng.normal(0, 0.3 * scale, reference.shape)).astype(np.float32)
    targets = rng.integers(0, 5000, n)
    values = metrics.token_values(variant, targets, reader(reference)[0])
    assert values.kld is not None
    np.testing.assert_allclose(values.kld, naive_kld(reference, variant), rtol=1e-4, atol=3e-6)
    assert values.top.tolist() == variant.argmax(1).tolist()


def test_kld_of_a_model_with_itself_is_zero() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (64, 50_000)).astype(np.float32)
    values = metrics.token_values(logits, np.zeros(64, int), reader(logits)[0])
    assert values.kld is not None
    assert np.abs(values.kld).max() < 5e-6


def test_kld_by_hand() -> None:
    # reference 1/2, 1/4, 1/4 and variant 1/4, 1/2, 1/4: 1/2 ln 2 - 1/4 ln 2 = 1/4 ln 2
    reference = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    variant = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    values = metrics.token_values(variant, np.array([0]), reader(reference)[0])
    assert values.kld is not None
    assert values.kld[0] == pytest.approx(math.log(2) / 4, abs=1e-6)
    assert values.nll[0] == pytest.approx(math.log(4), abs=1e-6)
    assert values.top[0] == 1


def test_a_certain_reference_has_no_nan() -> None:
    reference = np.array([[0.0, -1e4, -1e4]], np.float32)
    variant = np.array([[0.0, 0.0, 0.0]], np.float32)
    values = metrics.token_values(variant, np.array([0]), reader(reference)[0])
    assert values.kld is not None
    assert values.kld[0] == pytest.approx(math.log(3), abs=1e-6)


def test_rows_that_end_too_early_are_an_error() -> None:
    logits = np.zeros((4, 10), np.float32)
    rows, file = reader(logits)
    file.truncate(3 * 48 + 5)
    rows(2)
    with pytest.raises(EngineError, match="end too early"):
        rows(2)


def test_summaries_by_hand() -> None:
    summary = metrics.kld_summary(np.arange(101.0).reshape(1, 101) / 100)
    assert summary["kld_mean"] == pytest.approx(0.5)
    assert summary["kld_median"] == 0.5
    assert summary["kld_p90"] == pytest.approx(0.9)
    assert summary["kld_p99_9"] == pytest.approx(0.999)
    assert summary["kld_max"] == 1.0
    # p of the right token: 50 % -> 25 % and 20 % -> 40 %
    change = metrics.probability_change(-np.log([[0.25, 0.4]]), -np.log([[0.5, 0.2]]))
    assert change["dp_mean_pct"] == pytest.approx(-2.5)
    assert change["dp_rms_pct"] == pytest.approx(math.sqrt((25**2 + 20**2) / 2))
    assert metrics.share(np.array([True, True, True, False])) == pytest.approx((0.75, 0.25))
    assert metrics.correlation(np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx(1.0)
    assert metrics.correlation(np.ones(3), np.arange(3.0)) is None
