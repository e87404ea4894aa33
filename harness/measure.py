"""Scores windows through the engine: per-token nll and KLD, timings. Runs in a child process."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harness import metrics
from harness.errors import EngineError
from harness.store import Cache, read_npz, write_atomic, write_npz

_BROKEN_NLL = 700.0  # exp of it is close to the largest float64


@dataclass(frozen=True)
class Scores:
    """Per-token values, [n_windows, n_scored] each: nll float64, nats; top int32, the likeliest token; kld float64,
    nats (None for the reference). decode_s, pass_s: float64 [n_windows], seconds in llama_decode and of the whole pass.
    load_s: seconds to load the model. peak_rss_bytes: None where the system does not tell."""

    nll: np.ndarray
    top: np.ndarray
    kld: np.ndarray | None
    decode_s: np.ndarray
    pass_s: np.ndarray
    load_s: float
    peak_rss_bytes: int | None

    @property
    def per_token(self) -> dict[str, np.ndarray]:
        """What the record keeps beside itself."""
        arrays = {"nll": self.nll, "top": self.top}
        return arrays if self.kld is None else {**arrays, "kld": self.kld}


def score(
    model_path: Path,
    windows: np.ndarray,
    window_folder: Path,
    probability_folder: Path,
    cache: Cache,
    *,
    is_reference: bool,
    first_scored: int,
    ubatch_tokens: int,
    flash_attention: bool,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> Scores:
    """Per-token values of the targets first_scored .. n-1 of each window.

    windows: int32 [n_windows, n]. Each finished window is stored in `window_folder`, and a window that is already
    there is not measured again. The reference writes its probabilities to `probability_folder` (in `cache`), a file a
    window; the variants read them there. Raises EngineError on a model that gives no sensible probabilities.
    """
    from harness.engine import model as engine

    n_windows, n = windows.shape
    # The logits at position i predict token i + 1; nothing is predicted from the last position.
    wanted = np.zeros(n, bool)
    wanted[first_scored - 1 : n - 1] = True
    begin = time.perf_counter()
    measured: list[dict[str, np.ndarray]] = []
    with engine.open_model(model_path, check_weights=is_reference) as model:
        load_s = time.perf_counter() - begin
        vocab_size = engine.n_vocab(model)
        with engine.open_context(
            model, n_ctx=n, ubatch_tokens=ubatch_tokens, flash_attention=flash_attention, n_threads=n_threads
        ) as context:
            engine.warm_up(context)
            for i, window in enumerate(windows):
                path, probabilities = window_path(window_folder, i), probability_path(probability_folder, i)
                values = _read_window(path, n - first_scored)
                if values is None or (is_reference and not cache.holds(probabilities)):
                    batches = engine.decode_window(context, window, wanted, vocab_size, ubatch_tokens)
                    if is_reference:
                        values = _score_reference(batches, window, probabilities)
                        cache.seal(probabilities)
                    elif not cache.holds(probabilities):
                        raise EngineError(f"{probabilities} is gone or was changed")
                    else:
                        with probabilities.open("rb") as file:
                            values = _score_window(batches, window, RowReader(file, vocab_size))
                    write_npz(path, **values)
                measured.append(values)
                if on_progress:
                    on_progress((i + 1) / n_windows)
    stacked = {name: np.stack([values[name] for values in measured]) for name in measured[0]}
    return Scores(kld=stacked.pop("kld", None), **stacked, load_s=load_s, peak_rss_bytes=peak_rss_bytes())


class RowReader:
    """Reads a reference's probabilities in order, few rows at a time, into one buffer (the `ReferenceRows`).

    A row of the file: sum(p ln p) as float64, then the vocabulary's probabilities as float32.
    """

    def __init__(self, file: BinaryIO, vocab_size: int) -> None:
        self._file = file
        self._row = np.dtype([("p_log_p", "<f8"), ("p", "<f4", (vocab_size,))])
        self._buffer = np.empty(0, self._row)

    def __call__(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next n rows; valid until the next call. Raises EngineError when the file ends before."""
        if len(self._buffer) < n:
            self._buffer = np.empty(n, self._row)
        rows = self._buffer[:n]
        if self._file.readinto(rows.view(np.uint8)) != rows.nbytes:  # type: ignore[attr-defined]
            raise EngineError("the reference's probabilities end too early: delete the cache's folder `probabilities`")
        return rows["p"], rows["p_log_p"]


def _read_window(path: Path, n_scored: int) -> dict[str, np.ndarray] | None:
    """Stored values of one window; None when there are none, or no whole ones."""
    values = read_npz(path)
    whole = values is not None and {"nll", "top", "decode_s", "pass_s"} <= set(values)
    return values if values is not None and whole and values["nll"].shape == (n_scored,) else None


def window_path(folder: Path, i: int) -> Path:
    """Stored per-token values of one window."""
    return folder / f"window_{i:05d}.npz"


def probability_path(folder: Path, i: int) -> Path:
    """Stored probabilities of the reference in one window."""
    return folder / f"window_{i:05d}.p"


def probability_bytes(n_windows: int, n_scored: int, vocab_size: int) -> int:
    """Disk that the reference's probabilities take."""
    return n_windows * n_scored * (8 + 4 * vocab_size)


def default_first_scored(window_tokens: int) -> int:
    """The second half of a window, whose tokens all have context: llama-perplexity's n/2 + 1."""
    return window_tokens // 2 + 1


def peak_rss_bytes() -> int | None:
    """Highest resident memory of this process since it was started, in bytes."""
    # Linux' getrusage would count the parent's memory at the time of the fork as well; VmHWM does not.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


Batches = Iterable[tuple[int, np.ndarray, float]]  # first position, logits, seconds in llama_decode


def _score_reference(batches: Batches, window: np.ndarray, target: Path) -> dict[str, Any]:
    """Values of one window of the reference; its probabilities go to `target`."""
    result: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:

            def keep(logits: np.ndarray) -> None:
                for start in range(0, len(logits), 16):
                    p, p_log_p = metrics.probabilities(logits[start : start + 16])
                    for row, entropy in zip(p, p_log_p, strict=True):
                        file.write(np.float64(entropy).tobytes())
                        file.write(row.tobytes())

            result.update(_score_window(batches, window, None, keep))

    write_atomic(target, write)
    return result


def _score_window(
    batches: Batches,
    window: np.ndarray,
    reference: metrics.ReferenceRows | None,
    keep: Callable[[np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Per-token values and seconds of one window. `keep` sees the logits too; its time does not count."""
    pieces, decode_s, value_s = [], 0.0, 0.0
    for first, logits, seconds in batches:
        decode_s += seconds
        if not len(logits):
            continue
        begin = time.perf_counter()
        pieces.append(metrics.token_values(logits, window[first + 1 : first + 1 + len(logits)], reference))
        value_s += time.perf_counter() - begin
        if keep:
            keep(logits)
    nll = np.concatenate([piece.nll for piece in pieces])
    bad = int(np.count_nonzero(~np.isfinite(nll)))
    if bad:
        raise EngineError(f"{bad} of {nll.size} tokens got a probability that is not finite: the model is broken")
    if nll.size > 1 and np.ptp(nll) == 0:
        raise EngineError(f"every token has the same nll ({nll[0]:.4g} nats): the model is broken")
    if nll.mean() > _BROKEN_NLL:
        raise EngineError(f"the mean nll is {nll.mean():.0f} nats, no perplexity is that large: the model is broken")
    values = {"nll": nll, "top": np.concatenate([piece.top for piece in pieces])}
    if reference:
        values["kld"] = np.concatenate([piece.kld for piece in pieces if piece.kld is not None])
    return {**values, "decode_s": decode_s, "pass_s": decode_s + value_s}
