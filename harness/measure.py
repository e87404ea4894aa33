"""Scores windows through the engine: per-token nll and KLD, timings. Runs in a child process."""

import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from harness import metrics
from harness.errors import EngineError
from harness.kld_reference import (
    HIDDEN,
    LABELS,
    LOG_PROBS_16,
    MAX_HIDDEN_KLD,
    PROBABILITIES,
    WRITERS,
    OutputWeights,
    hidden_facts,
    kept_form,
    mean_divergence,
    open_rows,
    probability_path,
    reference_bytes,
)
from harness.store import Cache, read_npz, write_atomic, write_npz

_BROKEN_NLL = 700.0  # exp of it is close to the largest float64


@dataclass(frozen=True)
class Scores:
    """Per-token values, [n_windows, n_scored] each: nll float64, nats; top int32, the likeliest token; kld float64,
    nats (None for the reference). decode_s, pass_s: float64 [n_windows], seconds in llama_decode and of the whole pass.
    machines: names of those that scored, sorted. load_s: seconds to load the model, None where every window was there
    already. peak_rss_bytes: None also where the system does not tell."""

    nll: np.ndarray
    top: np.ndarray
    kld: np.ndarray | None
    decode_s: np.ndarray
    pass_s: np.ndarray
    machines: tuple[str, ...] = ()
    load_s: float | None = None
    peak_rss_bytes: int | None = None

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
    form: str = PROBABILITIES,
    reference_path: Path | None = None,
    only: Sequence[int] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Scores:
    """Per-token values of the targets first_scored .. n-1 of each window.

    windows: int32 [n_windows, n]; `only` tells which of them are scored, all by default. Each finished window is stored
    in `window_folder`, and a window that is already there is not measured again. The reference writes its probabilities
    to `probability_folder` (in `cache`), a file a window, in a `form` of `harness.kld_reference`; the variants read
    them there, and hidden states with the output weights in the file `reference_path`. Raises EngineError on a model
    that gives no sensible probabilities, UserError where hidden states do not give the logits and the disk has no room
    for those.
    """
    from harness.engine import model as engine
    from harness.engine.output import OutputTap, output_weights
    from harness.reference import require_disk

    n = windows.shape[1]
    indices = range(len(windows)) if only is None else only
    # The logits at position i predict token i + 1; nothing is predicted from the last position.
    wanted = np.zeros(n, bool)
    wanted[first_scored - 1 : n - 1] = True
    n_scored = n - first_scored
    first_path = probability_path(probability_folder, 0)
    weights = output_weights(reference_path) if form == HIDDEN and reference_path else None
    tap = OutputTap() if is_reference and kept_form(cache, first_path, form) == HIDDEN else None
    begin = time.perf_counter()
    with engine.open_model(model_path, check_weights=is_reference) as model:
        load_s = time.perf_counter() - begin
        vocab_size = engine.n_vocab(model)
        with engine.open_context(
            model,
            n_ctx=n,
            ubatch_tokens=ubatch_tokens,
            flash_attention=flash_attention,
            n_threads=n_threads,
            eval_callback=tap.on_tensor if tap else None,
        ) as context:
            engine.warm_up(context)
            for n_done, i in enumerate(indices, 1):
                window = windows[i]
                path, rows_path = window_path(window_folder, i), probability_path(probability_folder, i)
                values: dict[str, Any] | None = _read_window(path, n_scored)
                if values is None or (is_reference and not cache.holds(rows_path)):
                    decode = partial(engine.decode_window, context, window, wanted, vocab_size, ubatch_tokens)
                    if is_reference:
                        planned = kept_form(cache, first_path, form)
                        hidden = HiddenSource(tap, weights, check=i == 0) if tap and planned == HIDDEN else None
                        values, here, kld = _score_reference(decode, window, rows_path, planned, hidden)
                        if here != planned:
                            n_bytes = reference_bytes((len(windows) - 1) * n_scored, vocab_size, 0)[here]
                            require_disk(cache.folder, n_bytes, LABELS[here])
                        cache.seal(rows_path, hidden_facts(here, kld) if form == HIDDEN else None)
                    elif not cache.holds(rows_path):
                        raise EngineError(f"{rows_path} is gone or was changed")
                    else:
                        with rows_path.open("rb") as file:
                            rows = open_rows(file, kept_form(cache, rows_path, form), vocab_size, weights)
                            values = _score_window(decode(), window, rows)
                    write_npz(path, **values, machine=platform.node())
                if on_progress:
                    on_progress(n_done / len(indices))
    scores = stored_scores(window_folder, indices, n_scored)
    if scores is None:
        raise EngineError(f"windows that were just scored are gone from {window_folder}: somebody deleted them")
    return replace(scores, load_s=load_s, peak_rss_bytes=peak_rss_bytes())


def stored_scores(window_folder: Path, indices: Sequence[int], n_scored: int) -> Scores | None:
    """The values of windows that were scored before, by this process or others; None unless all of them are there."""
    found = [_read_window(window_path(window_folder, i), n_scored) for i in indices]
    measured = [values for values in found if values is not None]
    if len(measured) < len(found) or len({tuple(sorted(values)) for values in measured}) != 1:
        return None
    stacked = {name: np.stack([values[name] for values in measured]) for name in measured[0]}
    machines = tuple(sorted(set(map(str, stacked["machine"].tolist()))))
    return Scores(stacked["nll"], stacked["top"], stacked.get("kld"), stacked["decode_s"], stacked["pass_s"], machines)


def _read_window(path: Path, n_scored: int) -> dict[str, np.ndarray] | None:
    """Stored values of one window; None when there are none, or no whole ones."""
    values = read_npz(path)
    whole = values is not None and {"nll", "top", "decode_s", "pass_s", "machine"} <= set(values)
    return values if values is not None and whole and values["nll"].shape == (n_scored,) else None


def window_path(folder: Path, i: int) -> Path:
    """Stored per-token values of one window."""
    return folder / f"window_{i:05d}.npz"


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


class StateTap(Protocol):
    """What takes the hidden states off the engine, see `harness.engine.output`."""

    on: bool

    def take(self) -> np.ndarray:
        """Those since the last call, float32 [n, n_embd]."""


class HiddenSource(NamedTuple):
    """Where hidden states come from; with `check` they must give the reference's logits with its output weights."""

    tap: StateTap
    weights: OutputWeights | None
    check: bool


def _score_reference(
    decode: Callable[[], Batches], window: np.ndarray, target: Path, form: str, hidden: HiddenSource | None
) -> tuple[dict[str, Any], str, float | None]:
    """Values of one window of the reference, which is kept in `target`; the form it has there; and where hidden states
    are checked, the mean KL(reference || recomputed) in nats. Hidden states that fail are replaced by 16 bits a logit.
    """
    kld: list[float] = []

    def write_states(file: BinaryIO, logits: np.ndarray) -> None:
        assert hidden
        states = hidden.tap.take()
        file.write(states.tobytes())
        if hidden.check:
            mean = mean_divergence(logits, states, hidden.weights) if hidden.weights else math.inf
            kld.extend([mean] * len(logits))
        elif len(states) != len(logits):
            raise EngineError(f"{len(states)} hidden states were found for {len(logits)} tokens")

    if hidden:
        values = _score_and_keep(decode(), window, target, write_states)
        mean = float(np.mean(kld)) if kld else None
        if mean is None or mean <= MAX_HIDDEN_KLD:
            return values, HIDDEN, mean
        hidden.tap.on = False
        return _score_and_keep(decode(), window, target, WRITERS[LOG_PROBS_16]), LOG_PROBS_16, mean
    return _score_and_keep(decode(), window, target, WRITERS[form]), form, None


def _score_and_keep(
    batches: Batches, window: np.ndarray, target: Path, write_rows: Callable[[BinaryIO, np.ndarray], None]
) -> dict[str, Any]:
    """Values of one window; what `write_rows` makes of its logits goes to `target`."""
    result: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            result.update(_score_window(batches, window, None, partial(write_rows, file)))

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
