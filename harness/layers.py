"""Error propagation: how far each layer's output is from the reference's, token by token.

The card that started this speaks of reduced "error propagation" and gives no definition. Here it is the relative error
of the hidden state after each layer: the norm of the difference over the norm of the reference's state.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from harness.artefacts import ensure_variant
from harness.errors import EngineError
from harness.isolate import run_in_child
from harness.passes import read_layers, write_layers
from harness.progress import ProgressDisplay
from harness.store import Cache
from harness.sweep import Sweep


def measure_layers(sweep: Sweep, display: ProgressDisplay) -> list[str]:
    """Compare the layers of every variant that was not compared yet. Returns one line for each that failed."""
    cases = [case for case in sweep.layer_cases if case.done]
    failures = []
    each_s = sweep.layers_s / (len(sweep.layer_cases) + 1)
    windows = sweep.prompts.tokens[: sweep.config.measure.layer_windows]
    for case in cases:
        try:
            with sweep.cache.lock(sweep.variant_path(case)):
                found = read_layers(case.record_path, case.key)
                if found and found[0] == sweep.layers_key:
                    continue  # another sweep compared them while this one waited
                ensure_variant(sweep, case, display)
                with display.step(f"{case.name}: layers", each_s) as on_progress:
                    layers, errors = run_in_child(
                        layer_errors,
                        sweep.reference.path,
                        sweep.variant_path(case),
                        windows,
                        sweep.cache,
                        sweep.layers_key,
                        first_scored=sweep.first_scored,
                        ubatch_tokens=sweep.config.measure.ubatch_tokens,
                        flash_attention=sweep.config.measure.flash_attention,
                        n_threads=sweep.n_threads,
                        log_path=sweep.log_path(case),
                        on_progress=on_progress,
                    )
                write_layers(case.record_path, case.key, sweep.layers_key, layers, errors)
        except EngineError as error:
            failures.append(f"{case.name}, layers: {error.with_log}; the same command tries again")
    return failures


def layer_errors(
    reference: Path,
    variant: Path,
    windows: np.ndarray,
    cache: Cache,
    key: str,
    *,
    first_scored: int,
    ubatch_tokens: int,
    flash_attention: bool,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Layer numbers, int32 [n_layers], and relative errors, float32 [n_layers, n_windows, n_scored].

    The reference's states are kept in `cache` under `key`, a file a window. Runs in a child. Raises EngineError when
    the architecture names no layer outputs, or the two models have different layers.
    """
    from harness.engine.hidden import hidden_states

    states_of = partial(
        hidden_states,
        first_scored=first_scored,
        ubatch_tokens=ubatch_tokens,
        flash_attention=flash_attention,
        n_threads=n_threads,
    )
    errors, numbers = [], []
    for i, window in enumerate(windows):

        def keep(target: Path, window: np.ndarray = window) -> list[int]:
            found = states_of(reference, window)
            with target.open("wb") as file:
                np.save(file, np.stack(list(found.values())))
            return list(found)

        path = cache.make("hidden", f"{key}-{i:05d}", ".npy", keep)
        expected = np.load(path, mmap_mode="r", allow_pickle=False)
        numbers = cache.facts(path)
        states = states_of(variant, window)
        if list(states) != numbers:
            raise EngineError(f"the reference has layers {numbers}, the variant {list(states)}")
        errors.append(np.stack([relative_error(states[layer], expected[j]) for j, layer in enumerate(numbers)]))
        if on_progress:
            on_progress((i + 1) / len(windows))
    return np.array(numbers, np.int32), np.stack(errors, axis=1)


def relative_error(states: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|states - expected| / |expected| of each token. Both [n_tokens, n_embd]; result float32 [n_tokens]."""
    difference = np.linalg.norm(states.astype(np.float64) - expected, axis=1)
    return (difference / np.linalg.norm(expected.astype(np.float64), axis=1)).astype(np.float32)
