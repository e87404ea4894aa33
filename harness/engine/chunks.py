"""One tensor at a time through ggml_quantize_chunk, its rows over threads: the bytes that llama_model_quantize writes.

ggml quantizes every row by itself and keeps no state from row to row, so neither threads nor chunks move a byte.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, wait

import numpy as np

from harness.engine.gguf_file import SourceTensor
from harness.engine.native import ggml
from harness.errors import EngineError
from harness.ggml_types import ABORTS_WITHOUT_IMATRIX, GGML_TYPES, tensor_bytes

_SLAB_WEIGHTS = 1 << 22  # in memory at once
_CHUNK_WEIGHTS = (1 << 14, 1 << 18)  # of one call: enough for every thread of a small tensor, few calls of a large one
_CHUNKS = 32  # that a tensor of moderate size is cut into
_TO_FLOAT = {"f16": ggml.ggml_fp16_to_fp32_row, "bf16": ggml.ggml_bf16_to_fp32_row}


def copied(tensor: SourceTensor) -> Iterator[np.ndarray]:
    """The data of a tensor that keeps its type, uint8, in pieces. Raises EngineError as `quantized` on invalid data."""
    row_bytes = tensor_bytes(tensor.type, tensor.shape[:1])
    n_rows = tensor.n_bytes // row_bytes
    per_slab = max(1, _SLAB_WEIGHTS // tensor.shape[0])
    for first in range(0, n_rows, per_slab):
        yield _read(tensor, first, min(per_slab, n_rows - first), row_bytes)


def quantized(
    tensor: SourceTensor, type_name: str, weights: np.ndarray | None, threads: Executor
) -> Iterator[np.ndarray]:
    """The data of a tensor in another type, uint8, in pieces of whole rows.

    weights: float32 [n_matrices * columns], the imatrix of this tensor: every matrix of experts has its own. Raises
    EngineError on a type that cannot be made of the source's, on weights of another size, and on data that ggml calls
    invalid (NaN, infinity).
    """
    width, n_rows = tensor.shape[0], int(np.prod(tensor.shape[1:], dtype=np.int64))
    per_matrix = tensor.shape[1] if len(tensor.shape) > 1 else 1
    if tensor.type != "f32" and tensor.type not in _TO_FLOAT:
        raise EngineError(f"{tensor.name} is {tensor.type}: only F32, F16 and BF16 tensors are quantized")
    if len(tensor.shape) > 3:
        raise EngineError(f"{tensor.name} has {len(tensor.shape)} dimensions: llama.cpp quantizes at most 3")
    if weights is None and type_name in ABORTS_WITHOUT_IMATRIX:
        raise EngineError(f"{tensor.name}: ggml makes no {type_name} without imatrix data for the tensor")
    if weights is not None:
        if weights.size != width * (n_rows // per_matrix):
            raise EngineError(f"imatrix size {weights.size} is different from tensor size for {tensor.name}")
        weights = np.ascontiguousarray(weights, np.float32).reshape(-1, width)
    type_id = GGML_TYPES[type_name].id
    ggml.ggml_quantize_init(type_id)  # tables, once and not by every thread
    source_row_bytes, row_bytes = (tensor_bytes(name, (width,)) for name in (tensor.type, type_name))
    per_chunk = max(1, int(np.clip(n_rows * width // _CHUNKS, *_CHUNK_WEIGHTS)) // width)

    def quantize_rows(begin: int, end: int, target: int) -> None:
        """Rows of one matrix, to the address `target`."""
        stored = _read(tensor, begin, end - begin, source_row_bytes)
        values = stored
        if tensor.type != "f32":
            values = np.empty((end - begin) * width, np.float32)
            _TO_FLOAT[tensor.type](stored.ctypes.data, values.ctypes.data, values.size)
        columns = None if weights is None else weights[begin // per_matrix].ctypes.data
        n_bytes = ggml.ggml_quantize_chunk(type_id, values.ctypes.data, target, 0, end - begin, width, columns)
        if n_bytes != (end - begin) * row_bytes or not ggml.ggml_validate_row_data(type_id, target, n_bytes):
            raise EngineError(f"quantized data validation failed for {tensor.name} as {type_name}")

    for first in range(0, n_rows, max(1, _SLAB_WEIGHTS // width)):
        last = min(n_rows, first + max(1, _SLAB_WEIGHTS // width))
        slab = np.empty((last - first) * row_bytes, np.uint8)
        begins = [*{*range(first, last, per_chunk), *range(-(-first // per_matrix) * per_matrix, last, per_matrix)}]
        begins.sort()
        jobs = [
            threads.submit(quantize_rows, begin, end, slab.ctypes.data + (begin - first) * row_bytes)
            for begin, end in zip(begins, [*begins[1:], last], strict=True)
        ]
        wait(jobs)  # all of them, even if one fails: they write to the slab
        for job in jobs:
            job.result()
        yield slab


def _read(tensor: SourceTensor, first_row: int, n_rows: int, row_bytes: int) -> np.ndarray:
    """Rows of the source, uint8, validated as llama.cpp does."""
    offset, n_bytes = tensor.offset + first_row * row_bytes, n_rows * row_bytes
    data = np.fromfile(tensor.path, np.uint8, n_bytes, offset=offset)
    if data.size != n_bytes:
        raise EngineError(f"{tensor.path.name} ends within {tensor.name}: it was changed while it was read")
    if not ggml.ggml_validate_row_data(GGML_TYPES[tensor.type].id, data.ctypes.data, n_bytes):
        raise EngineError(f"tensor '{tensor.name}' has invalid data")
    return data
