"""The timing pass: after the scoring, alone, every variant in turn, several rounds. Medians and spread, never one run.

What is timed is what llama-bench times: one prompt of a whole window (its logits are asked for at the last token only),
and tokens decoded one by one from an empty KV cache.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from harness.artefacts import ensure_variant
from harness.errors import EngineError
from harness.isolate import run_in_child
from harness.passes import SPEED_UBATCH_TOKENS, SpeedPass, Timing, looked_at, read_speed, write_speed
from harness.progress import ProgressDisplay
from harness.record import utc_now
from harness.store import key_of
from harness.sweep import Case, Sweep


def measure_speed(
    sweep: Sweep, wanted: Sequence[Case], environment: dict[str, Any], display: ProgressDisplay
) -> list[str]:
    """Time the wanted cases, and the reference beside them. Returns one line for what failed."""
    if not wanted:
        return []
    by_key = {case.key: case for case in (sweep.reference_case, *wanted)}
    cases = sorted(by_key.values(), key=lambda case: str(sweep.variant_path(case)))
    try:
        with ExitStack() as locks:
            for case in cases:  # in one order everywhere, so that two sweeps cannot wait for each other
                locks.enter_context(sweep.cache.lock(sweep.variant_path(case)))
            known = looked_at(read_speed(sweep.folder), sweep.speed_settings)
            if all(case.key in known for case in wanted):
                return []  # another sweep timed them while this one waited
            for case in cases:
                ensure_variant(sweep, case, display)
            locks.enter_context(sweep.cache.lock(sweep.cache.folder / "speed"))
            _time(sweep, cases, environment, display)
    except EngineError as error:
        return [f"the timing pass failed: {error.with_log}; the same command tries again"]
    return []


def _time(sweep: Sweep, cases: Sequence[Case], environment: dict[str, Any], display: ProgressDisplay) -> None:
    import psutil

    free = psutil.virtual_memory().available
    skipped = {
        case.key: f"its {case.plan.file_bytes:,} bytes exceed the {free:,} of free memory"
        for case in cases
        if case.plan.file_bytes > free
    }
    fitting = [case for case in cases if case.key not in skipped]
    measure, window = sweep.config.measure, sweep.prompts.tokens[0]
    with display.step("speed: every variant in turn", sweep.speed_s) as on_progress:
        timings, other_cpu_share = run_in_child(
            time_models,
            [(case.key, sweep.variant_path(case)) for case in fitting],
            window,
            rounds=measure.speed_rounds,
            generate_tokens=measure.generate_tokens,
            ubatch_tokens=SPEED_UBATCH_TOKENS,
            flash_attention=measure.flash_attention,
            n_threads=sweep.n_threads,
            log_path=sweep.cache.path("logs", "speed", ".log"),
            on_progress=on_progress,
        )
    settings = sweep.speed_settings
    now = utc_now()
    pass_id = key_of(now, sorted(timings), settings)[:12]
    found = {
        key: Timing(pass_id, len(window), measure.generate_tokens, *(tuple(one[name]) for name in _STEPS))
        for key, one in timings.items()
    }
    write_speed(sweep.folder, SpeedPass(pass_id, now, settings, environment, other_cpu_share, found, skipped))


_STEPS = ("load_s", "prompt_s", "generate_s")


def time_models(
    models: Sequence[tuple[str, Path]],
    window: np.ndarray,
    *,
    rounds: int,
    generate_tokens: int,
    ubatch_tokens: int,
    flash_attention: bool,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Seconds by model and step, a value a round, and the share of the machine that others took meanwhile.

    window: int32 [n]. Runs in a child. Every model is read once before the first round, so that its file is in memory;
    each round begins with another model, so that a drift of the machine hits all about alike.
    """
    for _, path in models:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    found: dict[str, dict[str, list[float]]] = {name: {step: [] for step in _STEPS} for name, _ in models}
    before = _cpu_seconds()
    for i in range(rounds):
        first = round(i * len(models) / rounds) % len(models)
        for j, (name, path) in enumerate([*models[first:], *models[:first]]):
            seconds = _turn(path, window, generate_tokens, ubatch_tokens, flash_attention, n_threads)
            for step, value in zip(_STEPS, seconds, strict=True):
                found[name][step].append(value)
            if on_progress:
                on_progress((i * len(models) + j + 1) / (rounds * len(models)))
    after = _cpu_seconds()
    elapsed, total, own = (b - a for a, b in zip(before, after, strict=True))
    import psutil

    capacity = elapsed * (psutil.cpu_count() or 1)
    return found, min(1.0, max(0.0, (total - own) / capacity)) if capacity else 0.0


def _turn(
    path: Path, window: np.ndarray, generate_tokens: int, ubatch_tokens: int, flash_attention: bool, n_threads: int
) -> tuple[float, float, float]:
    from harness.engine import model as engine

    begin = time.perf_counter()
    with engine.open_model(path) as model:
        load_s = time.perf_counter() - begin
        n_ctx = max(len(window), generate_tokens)
        with engine.open_context(
            model, n_ctx=n_ctx, ubatch_tokens=ubatch_tokens, flash_attention=flash_attention, n_threads=n_threads
        ) as context:
            engine.warm_up(context)
            last = np.zeros(len(window), bool)
            last[-1] = True
            size = engine.n_vocab(model)
            prompt_s = sum(s for _, _, s in engine.decode_window(context, window, last, size, ubatch_tokens))
            tokens = np.resize(window, generate_tokens)
            every = np.ones(generate_tokens, bool)
            generate_s = sum(s for _, _, s in engine.decode_window(context, tokens, every, size, 1))
    return load_s, prompt_s, generate_s


def _cpu_seconds() -> tuple[float, float, float]:
    """Now; seconds that all cores worked since the machine started; seconds of this process among them."""
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # guest time is part of user time already
    busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = psutil.Process().cpu_times()
    return time.monotonic(), busy, own.user + own.system
