"""From logits to per-token values, and from those to estimates with errors. numpy only; nothing here knows a model."""

import math
from typing import NamedTuple

import numpy as np

VERSION = 1  # of every per-token value below; records of different versions are not compared

_ROWS_AT_A_TIME = 16  # 16 rows of a 50k vocabulary are 3 MB: they stay in the cache between the passes over them


class Estimate(NamedTuple):
    """A value and its standard error; the error is None where one sample cannot tell."""

    value: float
    se: float | None


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target, in nats.

    logits: float32 [n, vocab]; targets: int [n]. Returns float64 [n]: log(sum(exp(logit))) - logit[target], with the
    maximum taken out, exponentials in float32 and their sum in float64 (as llama-perplexity computes it).
    """
    nll = np.empty(len(targets))
    buffer = np.empty((min(_ROWS_AT_A_TIME, len(targets)), logits.shape[1]), np.float32)
    for start in range(0, len(targets), _ROWS_AT_A_TIME):
        rows = logits[start : start + _ROWS_AT_A_TIME]
        work = buffer[: len(rows)]
        maximum = rows.max(axis=1)
        np.subtract(rows, maximum[:, None], out=work)
        np.exp(work, out=work)
        chosen = rows[np.arange(len(rows)), targets[start : start + _ROWS_AT_A_TIME]]
        nll[start : start + len(rows)] = np.log(work.sum(axis=1, dtype=np.float64)) + maximum - chosen
    return nll


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


def shared_ngram_share(evaluation: np.ndarray, calibration: np.ndarray, n: int = 13) -> float:
    """Share of the evaluation windows' n-grams of tokens that also occur in the calibration windows.

    Both int32 [windows, tokens]; n-grams do not cross windows. 13 tokens as in the overlap analysis of GPT-3
    (Brown et al. 2020, appendix C). 0.0 when a window is shorter than n.
    """

    def grams(windows: np.ndarray) -> np.ndarray:
        if windows.shape[1] < n:
            return np.empty(0, np.dtype((np.void, 4 * n)))
        view = np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(windows, np.int32), n, axis=1)
        return np.ascontiguousarray(view).view(np.dtype((np.void, 4 * n))).ravel()

    evaluated, known = grams(evaluation), np.unique(grams(calibration))
    if not len(evaluated) or not len(known):
        return 0.0
    return float(np.isin(evaluated, known).mean())
