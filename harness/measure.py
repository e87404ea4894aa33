"""Scores windows through the engine: per-token nll and timings. Runs in a child process, one window file at a time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import metrics
from harness.errors import EngineError
from harness.store import write_npz


@dataclass(frozen=True)
class Scores:
    """nll: float64 [n_windows, n_scored], nats. decode_s, pass_s: float64 [n_windows], seconds in llama_decode and of
    the whole pass (with the log-softmax). load_s: seconds to load the model. peak_rss_bytes: None where the system
    does not tell."""

    nll: np.ndarray
    decode_s: np.ndarray
    pass_s: np.ndarray
    load_s: float
    peak_rss_bytes: int | None


def score(
    model_path: Path,
    windows: np.ndarray,
    window_folder: Path,
    *,
    first_scored: int,
    ubatch_tokens: int,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> Scores:
    """Negative log-likelihood of the targets first_scored .. n-1 of each window.

    windows: int32 [n_windows, n]. Each finished window is stored in `window_folder`, and a window that is already
    there is not measured again. Raises EngineError on logits that are not finite.
    """
    from harness.engine import model as engine

    n_windows, n = windows.shape
    # The logits at position i predict token i + 1; nothing is predicted from the last position.
    wanted = np.zeros(n, bool)
    wanted[first_scored - 1 : n - 1] = True
    paths = [window_folder / f"window_{i:05d}.npz" for i in range(n_windows)]
    begin = time.perf_counter()
    with engine.open_model(model_path) as model:
        load_s = time.perf_counter() - begin
        vocab_size = engine.n_vocab(model)
        with engine.open_context(model, n_ctx=n, ubatch_tokens=ubatch_tokens, n_threads=n_threads) as context:
            engine.warm_up(context)
            for i, (window, path) in enumerate(zip(windows, paths, strict=True)):
                if not path.exists():
                    nll, decode_s, pass_s = _score_window(engine, context, window, wanted, vocab_size, ubatch_tokens)
                    write_npz(path, nll=nll, decode_s=decode_s, pass_s=pass_s)
                if on_progress:
                    on_progress((i + 1) / n_windows)
    loaded = []
    for path in paths:
        with np.load(path, allow_pickle=False) as stored:
            loaded.append({name: stored[name] for name in stored.files})
    return Scores(
        nll=np.stack([window["nll"] for window in loaded]),
        decode_s=np.array([float(window["decode_s"]) for window in loaded]),
        pass_s=np.array([float(window["pass_s"]) for window in loaded]),
        load_s=load_s,
        peak_rss_bytes=peak_rss_bytes(),
    )


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


def _score_window(
    engine: object, context: object, window: np.ndarray, wanted: np.ndarray, vocab_size: int, ubatch_tokens: int
) -> tuple[np.ndarray, float, float]:
    begin = time.perf_counter()
    pieces, decode_s = [], 0.0
    for first, logits, seconds in engine.decode_window(context, window, wanted, vocab_size, ubatch_tokens):  # type: ignore[attr-defined]
        decode_s += seconds
        if len(logits):
            pieces.append(metrics.token_nll(logits, window[first + 1 : first + 1 + len(logits)]))
    nll = np.concatenate(pieces)
    if not math.isfinite(float(nll.sum())):
        bad = int(np.count_nonzero(~np.isfinite(nll)))
        raise EngineError(f"{bad} of {nll.size} tokens got a probability that is not finite: the variant is broken")
    return nll, decode_s, time.perf_counter() - begin
