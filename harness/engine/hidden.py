"""Taps the hidden state after every layer, through the eval callback."""

import re
from pathlib import Path

import numpy as np

from harness.engine import model as engine
from harness.engine.collect import float_array
from harness.engine.native import Tensor
from harness.errors import EngineError

_LAYER_OUTPUT = re.compile(r"l_out-(\d+)")  # llama.cpp's name for what a layer gives to the next


def hidden_states(
    path: Path, window: np.ndarray, *, first_scored: int, ubatch_tokens: int, flash_attention: bool, n_threads: int
) -> dict[int, np.ndarray]:
    """Output of every layer at the positions that predict the scored targets: layer -> float32 [n_scored, n_embd].

    window: int32 [n]. Raises EngineError when the architecture names no layer outputs.
    """
    n = len(window)
    wanted = np.zeros(n, bool)
    wanted[first_scored - 1 : n - 1] = True
    pieces: dict[int, list[np.ndarray]] = {}
    flags = wanted[:0]
    failure: list[BaseException] = []

    def on_tensor(address: int, ask: bool, _user_data: object) -> bool:
        node = Tensor.from_address(address)
        match = _LAYER_OUTPUT.fullmatch(node.name.decode("utf-8", "replace"))
        if not match or node.type != 0 or not flags.any():
            return False
        if not ask and not failure:
            try:
                rows = float_array(node)[0, 0]
                # After the last attention llama.cpp keeps only the rows whose logits are asked for.
                pieces.setdefault(int(match[1]), []).append((rows[flags] if len(rows) == len(flags) else rows).copy())
            except Exception as error:  # an exception cannot cross the C frames between here and llama_decode
                failure.append(error)
        return True

    with (
        engine.open_model(path) as model,
        engine.open_context(
            model,
            n_ctx=n,
            ubatch_tokens=ubatch_tokens,
            flash_attention=flash_attention,
            n_threads=n_threads,
            eval_callback=on_tensor,
        ) as context,
    ):
        size = engine.n_vocab(model)
        steps = engine.decode_window(context, window, wanted, size, ubatch_tokens)
        for start in range(0, n, ubatch_tokens):
            flags = wanted[start : start + ubatch_tokens]
            next(steps)
            if failure:
                raise failure[0]
    states = {layer: np.concatenate(rows) for layer, rows in sorted(pieces.items())}
    broken = [layer for layer, rows in states.items() if len(rows) != wanted.sum()]
    if not states or broken:
        what = f"layer {broken[0]} gave {len(states[broken[0]])} rows" if broken else "llama.cpp names none"
        raise EngineError(f"no layer outputs to compare in this architecture ({what}): measure.layers=false")
    return states
