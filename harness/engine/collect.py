"""Collects the importance matrix: what each matrix multiplication of the model sees, through the eval callback.

The same quantity as llama.cpp's llama-imatrix: for every column of a weight matrix the sum of squared activations
that were multiplied with it, and how many rows were added up.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.engine import model as engine
from harness.engine.native import Tensor, ggml
from harness.errors import EngineError
from harness.ggml_types import IMATRIX_MIN_ROWS


@dataclass
class Activations:
    """Of one weight tensor. sums: float32 [n_matrices, columns], squared activations; counts: float32 [n_matrices],
    rows added (per expert; a single count for a dense tensor)."""

    sums: np.ndarray
    counts: np.ndarray


def collect_activations(
    path: Path,
    windows: np.ndarray,
    *,
    flash_attention: bool,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Activations]:
    """Run calibration windows (int32 [n, n_ctx]) through the model and add up squared activations by tensor name.

    Raises EngineError on values that are not finite.
    """
    found: dict[str, Activations] = {}
    failure: list[BaseException] = []
    wanted_ops: dict[int, str] = {}

    def on_tensor(address: int, ask: bool, _user_data: object) -> bool:
        node = Tensor.from_address(address)
        op = wanted_ops.get(node.op)
        if op is None:
            op = wanted_ops[node.op] = ggml.ggml_op_name(node.op).decode()
        if op not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        weights, inputs = node.src[0].contents, node.src[1].contents
        name = _weight_name(weights.name)
        if not name.startswith("blk."):  # llama-imatrix leaves the output projection out too
            return False
        if inputs.type != 0 or (op == "MUL_MAT" and inputs.ne[1] < IMATRIX_MIN_ROWS):
            return False
        if not ask and not failure:
            try:
                _add(found, name, weights, float_array(inputs), _expert_ids(node) if op == "MUL_MAT_ID" else None)
            except Exception as error:  # an exception cannot cross the C frames between here and llama_decode
                failure.append(error)
        return True

    n_ctx = windows.shape[1]
    with (
        engine.open_model(path) as model,
        engine.open_context(
            model,
            n_ctx=n_ctx,
            ubatch_tokens=n_ctx,
            flash_attention=flash_attention,
            n_threads=n_threads,
            eval_callback=on_tensor,
        ) as context,
    ):
        # Asking for every position keeps llama.cpp from dropping rows before the last layer's feed-forward.
        every = np.ones(n_ctx, bool)
        size = engine.n_vocab(model)
        for i, window in enumerate(windows):
            for _ in engine.decode_window(context, window, every, size, n_ctx):
                pass
            if failure:
                raise failure[0]
            if on_progress:
                on_progress((i + 1) / len(windows))
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
    if name in found:
        found[name].sums += sums
        found[name].counts += counts
    else:
        found[name] = Activations(sums.astype(np.float32), counts)


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
