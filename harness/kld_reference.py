"""Three ways to keep what the reference said of every scored token, for the KLD of the variants. numpy only.

probabilities: float32 p and sum(p ln p). The fastest, and exact.
log_probs_16: ln p in 16 bits, with a minimum and a scale for each row. Half the disk.
hidden: the vector that the output projection gets; the logits are computed again with the reference's own weights.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from harness import metrics
from harness.errors import EngineError
from harness.store import Cache

PROBABILITIES, LOG_PROBS_16, HIDDEN = FORMS = ("probabilities", "log_probs_16", "hidden")  # the fastest first
LABELS = {
    PROBABILITIES: "the reference's probabilities",
    LOG_PROBS_16: "the reference's log-probabilities in 16 bits",
    HIDDEN: "the reference's hidden states",
}

# With e = KL(reference || recomputed) and D a variant's mean KLD over N tokens, D moves by about e + 2 sqrt(e D / N)
# (docs/method.md): for D = 0.01 and one window of 1,023 tokens this limit means 0.07 %.
MAX_HIDDEN_KLD = 1e-6

_RANGE = 40.0  # nats below the likeliest token that 16 bits reach; all below has e^-40 a token, which is added
_ROWS_AT_A_TIME = 16
# Of recomputed logits; of weights in float32, and how many slices of them at once.
_PRODUCT_ROWS, _PRODUCT_BYTES, _SLICE_BYTES, _MOST_SLICES = 256, 128 << 20, 16 << 20, 4


def reference_bytes(n_rows: int, vocab_size: int, n_embd: int) -> dict[str, int]:
    """Disk that the rows of the reference take in each form."""
    return {
        PROBABILITIES: n_rows * (8 + 4 * vocab_size),
        LOG_PROBS_16: n_rows * (8 + 2 * vocab_size),
        HIDDEN: n_rows * 4 * n_embd,
    }


def choose_form(asked: str, budget_gib: float, n_bytes: Mapping[str, int]) -> str:
    """The form that is asked for; for `auto` the fastest within the budget, and the smallest where none is."""
    if asked != "auto":
        return asked
    fitting = [form for form in FORMS if n_bytes[form] <= budget_gib * (1 << 30)]
    return fitting[0] if fitting else min(FORMS, key=lambda form: n_bytes[form])


def probability_path(folder: Path, i: int) -> Path:
    """What is kept of the reference in one window, in any form."""
    return folder / f"window_{i:05d}.p"


def kept_form(cache: Cache, path: Path, chosen: str) -> str:
    """The form that a window's file has, or will have: where hidden states would not do, another one was taken."""
    facts = cache.facts(path) if chosen == HIDDEN and cache.holds(path) else None
    return str(facts["form"]) if facts else chosen


def hidden_facts(form: str, kld: float | None) -> dict[str, str | float | None]:
    """What is said beside a file of a reference that was to be kept as hidden states: the form it has, and in the first
    window the mean KL(reference || recomputed) in nats (None where nothing could be recomputed)."""
    return {"form": form, "hidden_kld": kld if kld is not None and math.isfinite(kld) else None}


@dataclass(frozen=True)
class OutputWeights:
    """The output projection as it stands in a file: [vocab_size, n_embd] numbers from a byte on; f32, f16 or bf16.

    n_threads: slices of it that are multiplied at once. BLAS must take one thread: its sums depend on the number.
    """

    path: Path
    offset: int
    type: str
    vocab_size: int
    n_embd: int
    n_threads: int = 1

    def logits(self, states: np.ndarray, out: np.ndarray) -> None:
        """out (float32 [n, vocab_size]) = states (float32 [n, n_embd]) times the weights, slice by slice.

        The states are rounded to the weights' type, as ggml does before it multiplies. Raises EngineError when the file
        is too short.
        """
        rounded = _as_float32(_round(states, self.type), self.type)
        step = max(1, _SLICE_BYTES // (4 * self.n_embd))
        word = np.dtype(_WORDS[self.type])

        def multiply(start: int) -> None:
            n_rows = min(step, self.vocab_size - start)
            offset = self.offset + start * self.n_embd * word.itemsize
            words = np.fromfile(self.path, word, n_rows * self.n_embd, offset=offset)
            if words.size < n_rows * self.n_embd:
                raise EngineError(f"{self.path} was changed: its output weights end too early")
            weights = _as_float32(words, self.type).reshape(n_rows, self.n_embd)
            np.matmul(rounded, weights.T, out=out[:, start : start + n_rows])

        with ThreadPoolExecutor(min(_MOST_SLICES, self.n_threads)) as threads:
            for _ in threads.map(multiply, range(0, self.vocab_size, step)):
                pass


_WORDS = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


def _round(values: np.ndarray, type_name: str) -> np.ndarray:
    """float32 values as words of another type, to the nearest and to even."""
    if type_name == "bf16":  # the upper half of a float32
        bits = values.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return values.astype(_WORDS[type_name])


def _as_float32(words: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "bf16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    return words.astype(np.float32, copy=False)


def product_rows(vocab_size: int) -> int:
    """Rows of logits that are computed from hidden states at a time, 128 MiB at most."""
    return max(_ROWS_AT_A_TIME, min(_PRODUCT_ROWS, _PRODUCT_BYTES // (4 * vocab_size)))


def mean_divergence(real: np.ndarray, states: np.ndarray, weights: OutputWeights) -> float:
    """Mean KL(reference || recomputed) in nats of some rows: float32 logits [n, vocab_size] and hidden states.

    Infinite where the two do not fit together.
    """
    if states.shape != (len(real), weights.n_embd) or real.shape[1] != weights.vocab_size:
        return math.inf
    total, step = 0.0, product_rows(weights.vocab_size)
    logits = np.empty((min(step, len(real)), weights.vocab_size), np.float32)
    with np.errstate(all="ignore"):  # a broken model's NaN is told elsewhere
        for start in range(0, len(real), step):
            part = states[start : start + step]
            weights.logits(part, logits[: len(part)])
            for i in range(len(part)):
                total += divergence(real[start + i], logits[i])
    return total / len(real) if math.isfinite(total) else math.inf


def divergence(real: np.ndarray, other: np.ndarray) -> float:
    """KL(softmax(real) || softmax(other)) of one row of logits, in nats; precise where the two are nearly the same.

    With x = other - real and m = sum(p x): log(sum(p exp(x - m))), which is never negative.
    """
    p = np.exp(real.astype(np.float64) - real.max())
    p /= p.sum()
    x = other.astype(np.float64) - real
    x -= p @ x
    return float(np.log1p(p @ np.expm1(x)))


def write_probabilities(file: BinaryIO, logits: np.ndarray) -> None:
    """A row: sum(p ln p) as float64, then the vocabulary's probabilities as float32."""
    for start in range(0, len(logits), _ROWS_AT_A_TIME):
        p, p_log_p = metrics.probabilities(logits[start : start + _ROWS_AT_A_TIME])
        for row, entropy in zip(p, p_log_p, strict=True):
            file.write(np.float64(entropy).tobytes())
            file.write(row.tobytes())


def write_log_probs_16(file: BinaryIO, logits: np.ndarray) -> None:
    """A row: the smallest ln p and the scale as float32, then for each token (ln p - smallest) / scale in 16 bits."""
    for start in range(0, len(logits), _ROWS_AT_A_TIME):
        rows = logits[start : start + _ROWS_AT_A_TIME]
        packed = np.empty(len(rows), _packed_row(rows.shape[1]))
        with np.errstate(all="ignore"):  # a broken model's NaN is told elsewhere
            shifted = rows - rows.max(axis=1, keepdims=True)
            log_sum = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
            lowest = np.maximum(shifted.min(axis=1), -np.float32(_RANGE))
            scale = -lowest / np.float32(65535)
            steps = (shifted - lowest[:, None]) / np.where(scale > 0, scale, 1)[:, None]
            packed["codes"] = np.rint(np.clip(np.nan_to_num(steps), 0, 65535))
        packed["minimum"], packed["scale"] = lowest - log_sum, scale
        file.write(packed.tobytes())


WRITERS = {PROBABILITIES: write_probabilities, LOG_PROBS_16: write_log_probs_16}


def open_rows(file: BinaryIO, form: str, vocab_size: int, weights: OutputWeights | None) -> metrics.ReferenceRows:
    """What a file of that form says, in order. `weights`: of the reference, for hidden states."""
    if form == PROBABILITIES:
        return ProbabilityRows(file, vocab_size)
    if form == LOG_PROBS_16:
        return LogProb16Rows(file, vocab_size)
    if weights is None or weights.vocab_size != vocab_size:
        raise EngineError("the reference's output weights are not those that its hidden states were kept for")
    return HiddenRows(file, weights)


class ProbabilityRows:
    """Reads probabilities, few rows at a time, into one buffer."""

    def __init__(self, file: BinaryIO, vocab_size: int) -> None:
        self._file = file
        self._row = np.dtype([("p_log_p", "<f8"), ("p", "<f4", (vocab_size,))])
        self._buffer = np.empty(0, self._row)

    def __call__(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next n rows; valid until the next call. Raises EngineError when the file ends before."""
        if len(self._buffer) < n:
            self._buffer = np.empty(n, self._row)
        rows = self._buffer[:n]
        _read(self._file, rows)
        return rows["p"], rows["p_log_p"]


class LogProb16Rows:
    """Reads log-probabilities of 16 bits. What is read is made to sum up to 1 again."""

    def __init__(self, file: BinaryIO, vocab_size: int) -> None:
        self._file = file
        self._row = _packed_row(vocab_size)

    def __call__(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next n rows. Raises EngineError when the file ends before."""
        rows = np.empty(n, self._row)
        _read(self._file, rows)
        log_p = rows["codes"].astype(np.float32)
        log_p *= rows["scale"][:, None]
        log_p += rows["minimum"][:, None]
        return metrics.probabilities(log_p)


class HiddenRows:
    """Reads hidden states and computes their logits, some hundred rows at a time."""

    def __init__(self, file: BinaryIO, weights: OutputWeights) -> None:
        self._file, self._weights = file, weights
        self._logits = np.empty((0, weights.vocab_size), np.float32)
        self._first = self._stop = self._next = 0  # rows of the file: in the buffer from, to; to be given out

    def __call__(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next n rows. Raises EngineError when the file ends before."""
        if self._next + n > self._stop:
            self._fill(n)
        start = self._next - self._first
        self._next += n
        return metrics.probabilities(self._logits[start : start + n])

    def _fill(self, n: int) -> None:
        """Compute the logits from the next row on, of n rows at least."""
        n_embd, most = self._weights.n_embd, max(n, product_rows(self._weights.vocab_size))
        self._file.seek(4 * n_embd * self._next)
        states = np.frombuffer(self._file.read(4 * n_embd * most), np.uint8)
        n_rows = len(states) // (4 * n_embd)
        if n_rows < n:
            raise _too_short()
        if len(self._logits) < n_rows:
            self._logits = np.empty((n_rows, self._weights.vocab_size), np.float32)
        self._first, self._stop = self._next, self._next + n_rows
        part = states[: 4 * n_embd * n_rows].view(np.float32).reshape(n_rows, n_embd)
        self._weights.logits(part, self._logits[:n_rows])


def _packed_row(vocab_size: int) -> np.dtype:
    return np.dtype([("minimum", "<f4"), ("scale", "<f4"), ("codes", "<u2", (vocab_size,))])


def _read(file: BinaryIO, rows: np.ndarray) -> None:
    if file.readinto(rows.view(np.uint8)) != rows.nbytes:  # type: ignore[attr-defined]
        raise _too_short()


def _too_short() -> EngineError:
    return EngineError("the reference's probabilities end too early: delete the cache's folder `probabilities`")
