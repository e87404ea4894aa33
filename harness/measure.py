"""Scores windows through the engine: per-token nll and KLD, timings. Runs in a child process."""

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
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
from harness.waves import alone, in_waves, threads_of, windows_at_once

_BROKEN_NLL = 700.0  # exp of it is close to the largest float64


@dataclass(frozen=True)
class Scores:
    """Per-token values, [n_windows, n_scored] each: nll float64, nats; top int32, the likeliest token; kld float64,
    nats (None for the reference). decode_s, pass_s: float64 [n_windows], seconds in llama_decode and of the whole pass,
    divided by the number of windows that ran at once; windows_at_once: the largest of these numbers. machines: names of
    those that scored, sorted. load_s: seconds to load the model, None where every window was there already.
    peak_rss_bytes: None also where the system does not tell."""

    nll: np.ndarray
    top: np.ndarray
    kld: np.ndarray | None
    decode_s: np.ndarray
    pass_s: np.ndarray
    windows_at_once: int
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

    windows: int32 [n_windows, n]; `only` tells which of them are scored, all by default; several run at once, see
    `harness.waves`. Each finished window is stored in `window_folder`, and a window that is already there is not
    measured again. The reference writes its probabilities to `probability_folder` (in `cache`), a file a window, in a
    `form` of `harness.kld_reference`; the variants read them there, and hidden states with the output weights in the
    file `reference_path`. Raises EngineError on a model that gives no sensible probabilities, UserError where hidden
    states do not give the logits and the disk has no room for those.
    """
    from threadpoolctl import threadpool_limits

    from harness.engine import model as engine
    from harness.engine.output import OutputTap, output_weights

    n = windows.shape[1]
    indices = tuple(range(len(windows)) if only is None else only)
    # The logits at position i predict token i + 1; nothing is predicted from the last position.
    wanted = np.zeros(n, bool)
    wanted[first_scored - 1 : n - 1] = True
    n_scored = n - first_scored
    weights = output_weights(reference_path) if form == HIDDEN and reference_path else None
    weights = weights and replace(weights, n_threads=n_threads)
    kept = KeptReference(cache, probability_folder, form, weights)

    def is_left(i: int) -> bool:
        return _read_window(window_path(window_folder, i), n_scored) is None or (is_reference and not kept.holds(i))

    left = tuple(i for i in indices if is_left(i))
    taps_states = is_reference and kept.form_of(0) == HIDDEN
    # What the first window tells of hidden states decides for the others.
    groups = (left[:1], left[1:]) if taps_states else (left,)

    def score_one(slot: int, i: int, at_once: int) -> None:
        context, tap = contexts[slot], taps[slot]
        engine.use_threads(context, threads_of(n_threads, at_once))
        decode = partial(engine.decode_window, context, windows[i], wanted, vocab_size, ubatch_tokens)
        if is_reference:
            values = kept.keep(
                i, windows[i], decode, tap, reference_bytes((len(windows) - 1) * n_scored, vocab_size, 0)
            )
        else:
            values = kept.compare(i, windows[i], decode, vocab_size)
        shared = {name: values[name] / at_once for name in ("decode_s", "pass_s")}
        write_npz(window_path(window_folder, i), **values | shared, at_once=at_once, machine=platform.node())

    begin = time.perf_counter()
    with ExitStack() as opened:
        model = opened.enter_context(engine.open_model(model_path, check_weights=is_reference))
        load_s = time.perf_counter() - begin
        vocab_size = engine.n_vocab(model)
        opened.enter_context(threadpool_limits(1, user_api="blas"))  # its results depend on the number of threads
        options: dict[str, Any] = {"n_ctx": n, "ubatch_tokens": ubatch_tokens, "flash_attention": flash_attention}
        fitting = 1 if alone(n, ubatch_tokens) else engine.contexts_that_fit(model, **options)
        at_most = max(windows_at_once(len(group), n_threads, fitting) for group in groups)
        taps = [OutputTap() if taps_states else None for _ in range(at_most)]
        callbacks = [tap.on_tensor if tap else None for tap in taps]
        contexts = opened.enter_context(engine.open_contexts(model, callbacks, **options))
        for context in contexts:
            engine.warm_up(context)
        n_done = len(indices) - len(left)
        for group in groups:
            for _ in in_waves(group, n_threads, score_one, len(contexts)):
                n_done += 1
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
    return Scores(
        stacked["nll"],
        stacked["top"],
        stacked.get("kld"),
        stacked["decode_s"],
        stacked["pass_s"],
        int(stacked["at_once"].max()),
        machines,
    )


def _read_window(path: Path, n_scored: int) -> dict[str, np.ndarray] | None:
    """Stored values of one window; None when there are none, or no whole ones."""
    values = read_npz(path)
    whole = values is not None and {"nll", "top", "decode_s", "pass_s", "at_once", "machine"} <= set(values)
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
Decode = Callable[[], Batches]


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


@dataclass(frozen=True)
class KeptReference:
    """What is kept of the reference for the KLD, a file a window in `folder` (of `cache`), in a form of
    `harness.kld_reference`. weights: the reference's own, for hidden states."""

    cache: Cache
    folder: Path
    form: str
    weights: OutputWeights | None

    def holds(self, i: int) -> bool:
        """Whether window i is there, and whole."""
        return self.cache.holds(probability_path(self.folder, i))

    def form_of(self, i: int) -> str:
        """The form that window i has, or will have."""
        return kept_form(self.cache, probability_path(self.folder, i), self.form)

    def compare(self, i: int, window: np.ndarray, decode: Decode, vocab_size: int) -> dict[str, Any]:
        """Values of window i of a variant. Raises EngineError where the reference's are gone."""
        path = probability_path(self.folder, i)
        if not self.holds(i):
            raise EngineError(f"{path} is gone or was changed")
        with path.open("rb") as file:
            return _score_window(decode(), window, open_rows(file, self.form_of(i), vocab_size, self.weights))

    def keep(
        self, i: int, window: np.ndarray, decode: Decode, tap: StateTap | None, others_bytes: Mapping[str, int]
    ) -> dict[str, Any]:
        """Values of window i of the reference, which is kept. Hidden states that do not give the logits in the first
        window are replaced by 16 bits a logit, in all of them. others_bytes: what the other windows take in each form.
        Raises UserError where the disk has no room for them then."""
        from harness.reference import require_disk

        path, planned = probability_path(self.folder, i), self.form_of(0)
        if tap:
            tap.on = planned == HIDDEN
        hidden = HiddenSource(tap, self.weights, check=i == 0) if tap and tap.on else None
        values, form, kld = _score_reference(decode, window, path, planned, hidden)
        if form != planned:
            require_disk(self.cache.folder, others_bytes[form], LABELS[form])
        self.cache.seal(path, hidden_facts(form, kld) if self.form == HIDDEN else None)
        return values


def _score_reference(
    decode: Decode, window: np.ndarray, target: Path, form: str, hidden: HiddenSource | None
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
