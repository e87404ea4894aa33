"""Paired comparisons of measured cases: any two of them, and each against the standard ladder at equal size. Pure."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.stats import Interval, mean_interval

WINS, TIES, LOSES = "wins", "ties", "loses"
_WORD = {-1: WINS, 0: TIES, 1: LOSES}


@dataclass(frozen=True)
class Measured:
    """One case as the comparisons see it. nll, kld: float64 [n_windows, n_scored], nats; the reference has no kld."""

    name: str
    quant: str
    mode: str
    file_bytes: int
    nll: np.ndarray
    kld: np.ndarray | None

    @cached_property
    def mean_nll(self) -> float:
        """Nats; its exponential is the perplexity."""
        return float(self.nll.mean())


@dataclass(frozen=True)
class Difference:
    """a minus b on the same tokens. ln_ppl: of mean nll, so exp of it is the ratio of perplexities; kld: of mean KLD,
    None when one of the two has none."""

    ln_ppl: Interval
    kld: Interval | None


@dataclass(frozen=True)
class Verdict:
    """A case against the standard ladder at its own size.

    word: wins, ties or loses; None without neighbours, and then `reason` names what to add. ln_ppl and kld: case minus
    interpolated ladder, below 0 when the case is better.
    """

    word: str | None
    ln_ppl: Interval | None
    kld: Interval | None
    kld_word: str | None
    between: tuple[str, str] | None
    reason: str | None = None


def difference(a: Measured, b: Measured) -> Difference:
    """Paired difference a - b. Raises ValueError when the two were not measured on the same tokens."""
    if a.nll.shape != b.nll.shape:
        raise ValueError(f"{a.name} and {b.name} were measured on different prompt sets")
    kld = None if a.kld is None or b.kld is None else mean_interval(a.kld - b.kld)
    return Difference(mean_interval(a.nll - b.nll), kld)


def standard_ladder(cases: Iterable[Measured]) -> list[Measured]:
    """The standard files, the smallest first; of several of one size the best first."""
    return sorted((case for case in cases if case.mode == "standard"), key=lambda one: (one.file_bytes, one.mean_nll))


def equal_size_verdict(case: Measured, rungs: Sequence[Measured]) -> Verdict:
    """Does the case beat the standard files around it, had there been one of exactly its size?

    rungs: `standard_ladder`. The two neighbours of the case are interpolated linearly in bytes, token by token, so the
    comparison is paired. Of several rungs of one size the best counts. Outside the ladder there is no verdict.
    """
    sizes = [rung.file_bytes for rung in rungs]
    n_below = bisect_right(sizes, case.file_bytes)
    first_above = bisect_left(sizes, case.file_bytes)
    if not n_below or first_above == len(rungs):
        side = "smaller" if not n_below else "larger"
        rung = _next_rung(case, rungs, larger=bool(n_below))
        hint = f", such as {rung}" if rung else ""
        reason = f"no standard case is {side} than {case.name}: add a {side} standard quant to the sweep{hint}"
        return Verdict(None, None, None, None, None, reason)
    low = rungs[bisect_left(sizes, sizes[n_below - 1])]  # of several of one size the best is the first
    high = rungs[first_above]
    weight = 0.0 if low is high else (case.file_bytes - low.file_bytes) / (high.file_bytes - low.file_bytes)
    ln_ppl = mean_interval(case.nll - ((1 - weight) * low.nll + weight * high.nll))
    kld = None
    if case.kld is not None and low.kld is not None and high.kld is not None:
        kld = mean_interval(case.kld - ((1 - weight) * low.kld + weight * high.kld))
    between = (low.name, high.name)
    return Verdict(_word(ln_ppl), ln_ppl, kld, _word(kld), between, ln_ppl.reason)


def dominators(cases: Sequence[Measured]) -> dict[str, str]:
    """For each dominated case the best of those that are no larger, if its perplexity is lower beyond noise: names.

    A placebo dominates nothing: it is not for use.
    """
    found: dict[str, str] = {}
    usable = sorted((case for case in cases if not case.mode.startswith("placebo")), key=lambda one: one.file_bytes)
    best: Measured | None = None
    place = 0
    for case in sorted(cases, key=lambda one: one.file_bytes):
        while place < len(usable) and usable[place].file_bytes <= case.file_bytes:
            if best is None or usable[place].mean_nll < best.mean_nll:
                best = usable[place]
            place += 1
        if best and best.mean_nll < case.mean_nll and mean_interval(best.nll - case.nll).sign == -1:
            found[case.name] = best.name
    return found


def pareto_front(cases: Sequence[Measured]) -> set[str]:
    """Names of the cases that no other one beats or equals in both size and perplexity."""
    front, best = set(), np.inf
    for case in sorted(cases, key=lambda one: (one.file_bytes, one.mean_nll)):
        if case.mean_nll < best:
            best = case.mean_nll
            front.add(case.name)
    return front


# llama.cpp's usual file types and about how many bits a weight they take (llama-quantize's own list).
_NOMINAL_BPW = {
    **{"iq1_s": 1.6, "iq1_m": 1.8, "iq2_xxs": 2.1, "iq2_xs": 2.3, "iq2_s": 2.5, "iq2_m": 2.7, "q2_k": 3.0},
    **{"iq3_xxs": 3.1, "iq3_s": 3.4, "iq4_xs": 4.3, "q4_k_m": 4.8, "q5_k_m": 5.7, "q6_k": 6.6, "q8_0": 8.5},
}


def _next_rung(case: Measured, rungs: Sequence[Measured], *, larger: bool) -> str | None:
    """The nearest standard quant that should lie beyond the case, judged by the measured rung nearest to it.

    A guess: on a model whose widths do not fit, files are larger than their names say. None where none can be guessed.
    """
    known = [rung for rung in rungs if rung.quant in _NOMINAL_BPW]
    if known and len(known) == len(rungs):
        edge = max(known, key=lambda rung: rung.file_bytes * (1 if larger else -1))
        bytes_per_bit = edge.file_bytes / _NOMINAL_BPW[edge.quant]
        ladder = sorted(_NOMINAL_BPW, key=lambda name: _NOMINAL_BPW[name], reverse=not larger)
        for name in ladder:
            gap = (_NOMINAL_BPW[name] * bytes_per_bit - case.file_bytes) * (1 if larger else -1)
            if gap > 0 and name not in [rung.quant for rung in known]:
                return name
    return None


def _word(interval: Interval | None) -> str | None:
    return None if interval is None or interval.sign is None else _WORD[interval.sign]
