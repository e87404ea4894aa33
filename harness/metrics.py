"""From logits to per-token values, and from those to estimates with errors. numpy only; nothing here knows a model."""

import math
from typing import NamedTuple, Protocol

import numpy as np

from harness.stats import quantiles

VERSION = 2  # of every per-token value below; records of different versions are not compared

_ROWS_AT_A_TIME = 16  # 16 rows of a 50k vocabulary are 3 MB: they stay in the cache between the passes over them


class Estimate(NamedTuple):
    """A value and its standard error; the error is None where one sample cannot tell."""

    value: float
    se: float | None


class TokenValues(NamedTuple):
    """Per-token values of one stretch of positions. nll: float64 [n], nats; top: int32 [n], the likeliest token;
    kld: float64 [n], KL(reference || variant) in nats, or None without a reference."""

    nll: np.ndarray
    top: np.ndarray
    kld: np.ndarray | None


class ReferenceRows(Protocol):
    """The reference's probabilities, read in order: the next `n` rows, float32 [n, vocab], and sum(p ln p), [n]."""

    def __call__(self, n: int) -> tuple[np.ndarray, np.ndarray]: ...


def token_values(logits: np.ndarray, targets: np.ndarray, reference: ReferenceRows | None = None) -> TokenValues:
    """Negative log-likelihood of each target, the likeliest token, and the KL divergence from the reference.

    logits: float32 [n, vocab]; targets: int [n]. nll = log(sum(exp(logit))) - logit[target], with the maximum taken
    out, exponentials in float32 and their sum in float64 (as llama-perplexity computes it).
    kld = sum(p ln p) - sum(p ln q) = sum(p ln p) - sum(p logit) + log(sum(exp(logit))), p: the reference.
    """
    n = len(targets)
    nll, top = np.empty(n), np.empty(n, np.int32)
    kld = np.empty(n) if reference else None
    shifted = np.empty((min(_ROWS_AT_A_TIME, n), logits.shape[1]), np.float32)
    exponentials = np.empty_like(shifted)
    for start in range(0, n, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, n)
        rows, here = logits[start:stop], np.arange(stop - start)
        best = rows.argmax(axis=1)
        work, exped = shifted[: stop - start], exponentials[: stop - start]
        maximum = rows[here, best]
        np.subtract(rows, maximum[:, None], out=work)
        np.exp(work, out=exped)
        log_sum = np.log(exped.sum(axis=1, dtype=np.float64))
        nll[start:stop] = log_sum + (maximum.astype(np.float64) - rows[here, targets[start:stop]])
        top[start:stop] = best
        if reference and kld is not None:
            p, p_log_p = reference(stop - start)
            for i in here:  # one dot product a row: BLAS sums in many lanes, so float32 is exact to about 1e-6
                kld[start + i] = p_log_p[i] - float(np.dot(p[i], work[i])) + log_sum[i]
    return TokenValues(nll, top, kld)


def probabilities(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax in float32 and sum(p ln p) in float64: [n, vocab] and [n]. What a reference keeps for `token_values`."""
    work = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(work)
    total = p.sum(axis=1, dtype=np.float64)
    p /= total.astype(np.float32)[:, None]
    # ln p = shifted logit - ln(total): exact where p itself is too small for float32
    p_log_p = np.einsum("nv,nv->n", p, work, dtype=np.float64) - np.log(total) * p.sum(axis=1, dtype=np.float64)
    return p, p_log_p


def kld_summary(kld: np.ndarray) -> dict[str, float]:
    """Mean, standard error (tokens as independent), median, percentiles and maximum of per-token KLD, in nats."""
    flat = kld.ravel()
    summary = {"kld_mean": float(flat.mean()), "kld_se": float(flat.std() / math.sqrt(max(1, flat.size - 1)))}
    percents = (50, 90, 95, 99, 99.9)
    for percent, value in zip(percents, quantiles(flat, [percent / 100 for percent in percents]), strict=True):
        name = "kld_median" if percent == 50 else f"kld_p{percent:g}".replace(".", "_")
        summary[name] = float(value)
    return {**summary, "kld_max": float(flat.max())}


def probability_change(nll: np.ndarray, nll_reference: np.ndarray) -> dict[str, float]:
    """How the probability of the right token changed: delta p = p_variant - p_reference, in per cent (0 to 100).

    Mean, root mean square and percentiles, as `llama-perplexity --kl-divergence` prints them.
    """
    delta = 100 * (np.exp(-nll.ravel()) - np.exp(-nll_reference.ravel()))
    squares = delta**2
    rms, root_n = float(np.sqrt(squares.mean())), math.sqrt(max(1, delta.size - 1))
    summary = {
        "dp_mean_pct": float(delta.mean()),
        "dp_mean_se_pct": float(delta.std()) / root_n,
        "dp_rms_pct": rms,
        "dp_rms_se_pct": float(squares.std()) / root_n / (2 * rms) if rms else 0.0,
    }
    percents = (1, 5, 25, 50, 75, 95, 99)
    return summary | {
        f"dp_p{percent}_pct": float(value)
        for percent, value in zip(percents, quantiles(delta, [percent / 100 for percent in percents]), strict=True)
    }


def share(flags: np.ndarray) -> Estimate:
    """Share of true flags and its binomial standard error, as llama-perplexity prints for "same top"."""
    p = float(flags.mean())
    return Estimate(p, math.sqrt(p * (1 - p) / (flags.size - 1)) if flags.size > 1 else None)


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation of two arrays of per-token nll; None when one of them does not vary."""
    from_mean, other = a.ravel() - a.mean(), b.ravel() - b.mean()
    variances = float(from_mean @ from_mean) * float(other @ other)
    return float(from_mean @ other) / math.sqrt(variances) if variances else None


def perplexity(nll: np.ndarray) -> Estimate:
    """exp(mean nll) and its standard error as llama-perplexity prints it.

    nll: float64, any shape, nats. The error treats tokens as independent: sd(nll) / sqrt(n - 1) * ppl, with the
    population standard deviation. Tokens of one text are correlated, so it is a lower bound of the true error.
    """
    mean = float(nll.mean())
    value = math.exp(mean)
    if nll.size < 2:
        return Estimate(value, None)
    return Estimate(value, value * float(nll.std()) / math.sqrt(nll.size - 1))


def ln_ppl_ratio(nll: np.ndarray, nll_reference: np.ndarray) -> Estimate:
    """ln(ppl / ppl of the reference) on the same tokens, and the standard error of that paired difference.

    Both float64 of one shape, nats. Raises ValueError when the shapes differ: then the tokens do too.
    """
    if nll.shape != nll_reference.shape:
        raise ValueError(f"per-token values of different prompt sets: {nll.shape} and {nll_reference.shape}")
    difference = nll - nll_reference
    se = float(difference.std()) / math.sqrt(difference.size - 1) if difference.size > 1 else None
    return Estimate(float(difference.mean()), se)


def perplexity_difference(nll: np.ndarray, nll_reference: np.ndarray) -> Estimate:
    """ppl - ppl of the reference, and its paired standard error with tokens as independent.

    Both float64 of one shape, nats. Delta method: the error of exp(a) - exp(b) for means a and b of paired values.
    """
    a, b = math.exp(nll.mean()), math.exp(nll_reference.mean())
    if nll.size < 2:
        return Estimate(a - b, None)
    return Estimate(a - b, float((a * nll - b * nll_reference).std()) / math.sqrt(nll.size - 1))


def shared_ngram_share(evaluation: np.ndarray, calibration: np.ndarray, n: int = 13) -> float | None:
    """Share of the evaluation windows' n-grams of tokens that also occur in the calibration windows.

    Both int32 [windows, tokens]; n-grams do not cross windows. 13 tokens as in the overlap analysis of GPT-3
    (Brown et al. 2020, appendix C). None when windows are shorter than n: it cannot be told.
    """

    def grams(windows: np.ndarray) -> np.ndarray:
        if windows.shape[1] < n:
            return np.empty(0, np.dtype((np.void, 4 * n)))
        view = np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(windows, np.int32), n, axis=1)
        return np.ascontiguousarray(view).view(np.dtype((np.void, 4 * n))).ravel()

    evaluated, known = grams(evaluation), np.unique(grams(calibration))
    if not len(evaluated) or not len(known):
        return None
    return float(np.isin(evaluated, known).mean())
