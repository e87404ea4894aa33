"""Collects the importance matrix: what each matrix multiplication of the model sees, through the eval callback.

The same quantity as llama.cpp's llama-imatrix: for every column of a weight matrix the sum of squared activations
that were multiplied with it, and how many rows were added up.
"""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.engine import model as engine
from harness.engine.native import Tensor, ggml
from harness.errors import EngineError
from harness.ggml_types import IMATRIX_MIN_ROWS
from harness.waves import alone, in_waves, threads_of, windows_at_once


@dataclass
class Activations:
    """Of one weight tensor. sums: float32 [n_matrices, columns], squared activations; counts: float32 [n_matrices],
    rows added (per expert; a single count for a dense tensor)."""

    sums: np.ndarray
    counts: np.ndarray


class ActivationTap:
    """Takes the squared activations of one window after another: the eval callback of a context."""

    def __init__(self) -> None:
        self._found: dict[str, Activations] = {}
        self._failure: BaseException | None = None
        self._wanted_ops: dict[int, str] = {}
        self._n_seen = 0
        self._n_in_window: int | None = None

    def on_tensor(self, address: int, ask: bool, _user_data: object) -> bool:
        """The callback: asks for products with the weights of layers, and adds up what these are multiplied with."""
        node = Tensor.from_address(address)
        op = self._wanted_ops.get(node.op)
        if op is None:
            op = self._wanted_ops[node.op] = ggml.ggml_op_name(node.op).decode()
        if op not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        weights, inputs = node.src[0].contents, node.src[1].contents
        name = _weight_name(weights.name)
        if not name.startswith("blk."):  # llama-imatrix leaves the output projection out too
            return False
        if inputs.type != 0 or (op == "MUL_MAT" and inputs.ne[1] < IMATRIX_MIN_ROWS):
            return False
        if ask:
            return True
        self._n_seen += 1
        if self._failure is None:
            try:
                experts = _expert_ids(node) if op == "MUL_MAT_ID" else None
                _add(self._found, name, weights, float_array(inputs), experts)
            except Exception as error:  # an exception cannot cross the C frames between here and llama_decode
                self._failure = error
        # After the last product of a window nothing is wanted: llama.cpp leaves the logits out where this is false.
        return self._n_seen != self._n_in_window

    def take(self) -> dict[str, Activations]:
        """Those of the window that was just decoded. All windows must be decoded alike."""
        if self._failure is not None:
            raise self._failure
        found, self._found = self._found, {}
        self._n_in_window, self._n_seen = self._n_seen, 0
        return found


def collect_activations(
    path: Path,
    windows: np.ndarray,
    *,
    flash_attention: bool,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Activations]:
    """Run calibration windows (int32 [n, n_ctx]) through the model and add up squared activations by tensor name.

    Several windows run at once (`harness.waves`); they are added in their order. Raises EngineError on values that are
    not finite.
    """
    n_ctx = windows.shape[1]
    found: dict[str, Activations] = {}
    with ExitStack() as opened:
        model = opened.enter_context(engine.open_model(path))
        options: dict[str, Any] = {"n_ctx": n_ctx, "ubatch_tokens": n_ctx, "flash_attention": flash_attention}
        fitting = 1 if alone(n_ctx, n_ctx) else engine.contexts_that_fit(model, **options)
        taps = [ActivationTap() for _ in range(windows_at_once(len(windows), n_threads, fitting))]
        callbacks = [tap.on_tensor for tap in taps]
        contexts = opened.enter_context(engine.open_contexts(model, callbacks, **options))
        # Asking for every position keeps llama.cpp from dropping rows before the last layer's feed-forward.
        every = np.ones(n_ctx, bool)
        size = engine.n_vocab(model)

        def run(slot: int, window: np.ndarray, at_once: int) -> dict[str, Activations]:
            engine.use_threads(contexts[slot], threads_of(n_threads, at_once))
            for _ in engine.decode_window(contexts[slot], window, every, size, n_ctx):
                pass
            return taps[slot].take()

        for i, of_window in enumerate(in_waves(list(windows), n_threads, run, len(contexts)), 1):
            for name, activations in of_window.items():
                _merge(found, name, activations)
            if on_progress:
                on_progress(i / len(windows))
    for name, activations in found.items():
        if not np.isfinite(activations.sums).all():
            raise EngineError(f"the activations of {name} are not finite: the reference model is broken")
    return found


def _add(
    found: dict[str, Activations], name: str, weights: Tensor, inputs: np.ndarray, expert_ids: np.ndarray | None
) -> None:
    """inputs: float32 [n3, n2, rows, columns], numpy order."""
    columns = inputs.shape[-1]
    if expert_ids is None:
        # A 3-D weight (several matrices) has one row of sums a matrix; a 2-D weight takes all rows together.
        n_matrices = weights.ne[2] * weights.ne[3]
        n_rows = inputs.size // columns
        flat = inputs.reshape(-1, inputs.shape[-2], columns) if n_matrices > 1 else inputs.reshape(1, -1, columns)
        squares = np.einsum("mrc,mrc->mc", flat, flat)
        sums = squares.reshape(-1, n_matrices, columns).sum(axis=0) if n_matrices > 1 else squares
        counts = np.array([n_rows // n_matrices], np.float32)
    else:
        # inputs [1, tokens, 1 or n_used, columns]; expert_ids [tokens, n_used]
        n_experts = weights.ne[2]
        sums, counts = np.zeros((n_experts, columns), np.float32), np.zeros(n_experts, np.float32)
        rows = np.broadcast_to(inputs[0], (*expert_ids.shape, columns))
        for expert in np.unique(expert_ids):
            chosen = rows[expert_ids == expert]
            sums[expert] = np.einsum("rc,rc->c", chosen, chosen)
            counts[expert] = len(chosen)
    _merge(found, name, Activations(sums.astype(np.float32), counts))


def _merge(found: dict[str, Activations], name: str, more: Activations) -> None:
    if name in found:
        found[name].sums += more.sums
        found[name].counts += more.counts
    else:
        found[name] = more


def _weight_name(raw: bytes) -> str:
    """Without what the scheduler puts around a copied tensor's name: 'CPU#blk.0.attn_k.weight#0'."""
    name = raw.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


def _bytes(tensor: Tensor) -> int:
    """Address of the tensor's data in host memory."""
    if not ggml.ggml_backend_buffer_is_host(tensor.buffer):
        raise EngineError("activations are not in host memory: the harness runs llama.cpp on the CPU only")
    return tensor.data


def float_array(tensor: Tensor) -> np.ndarray:
    """float32 view in numpy order [ne3, ne2, ne1, ne0]; strides as ggml says."""
    shape = tuple(tensor.ne[3 - i] for i in range(4))
    strides = tuple(tensor.nb[3 - i] for i in range(4))
    n_bytes = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)) + 4
    buffer = (ctypes.c_char * n_bytes).from_address(_bytes(tensor))
    return np.ndarray(shape, np.float32, buffer, strides=strides)


def _expert_ids(node: Any) -> np.ndarray:
    """Experts chosen for each token: int32 [tokens, n_used]. The ids tensor is a strided view."""
    ids = node.src[2].contents
    shape, strides = (ids.ne[1], ids.ne[0]), (ids.nb[1], ids.nb[0])
    n_bytes = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)) + 4
    return np.ndarray(shape, np.int32, (ctypes.c_char * n_bytes).from_address(_bytes(ids)), strides=strides)
