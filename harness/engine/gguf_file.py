"""Reads the header of a GGUF file with ggml's own reader: metadata, tensors, sizes. No weights are loaded."""

import ctypes
import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.engine.native import GgufInitParams, ggml
from harness.errors import UserError
from harness.ggml_types import FILE_TYPES, GGUF_ALIGNMENT
from harness.gguf_check import check_gguf
from harness.header import GgufInfo, TensorInfo, split_parts
from harness.provenance import KEYS, kv_bytes

_SCALARS: dict[int, type] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY = 4096  # per-layer arrays are short; vocabularies are long and not needed here
_MAX_STRINGS = 16
_EXPONENTS = {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000)}
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class SourceTensor(TensorInfo):
    """A tensor, and where its data lie: `n_bytes` from `offset` of `path`."""

    path: Path
    offset: int


def read_header(path: Path) -> GgufInfo:
    """Header of a GGUF file; of all parts when it is the first of a split (`-00001-of-0000N.gguf`).

    Raises UserError when the file is missing, no GGUF, or shorter than its header says.
    """
    merged = ggml.gguf_init_empty()
    tensors: list[TensorInfo] = []
    metadata: dict[str, Any] = {}
    file_bytes = 0
    parts = split_parts(path)
    for part in parts:
        with open_gguf(part) as (gguf, tensor_context):
            if part is parts[0]:
                metadata = _metadata(gguf)
                ggml.gguf_set_kv(merged, gguf)
            tensors += [TensorInfo(one.name, one.shape, one.type, one.n_bytes) for one in tensors_of(part, gguf)]
            if len({tensor.name for tensor in tensors}) < len(tensors):  # ggml would abort
                raise UserError(
                    f"{path}: two parts hold a tensor of one name, they are not of one model: fetch it again"
                )
            for i in range(ggml.gguf_get_n_tensors(gguf)):
                tensor = ggml.ggml_get_tensor(tensor_context, ggml.gguf_get_tensor_name(gguf, i))
                ggml.gguf_add_tensor(merged, tensor)
            file_bytes += part.stat().st_size
    if not tensors:
        raise UserError(f"{path}: this GGUF holds no tensors: give a model, not a vocabulary")
    # llama_model_quantize sets these two and drops the split keys; every other key is copied.
    for key in ("general.quantization_version", "general.file_type"):
        ggml.gguf_set_val_u32(merged, key.encode(), 0)
    for key in SPLIT_KEYS:
        ggml.gguf_remove_key(merged, key.encode())
    header_bytes, provenance_bytes = _unpadded_bytes(merged), {}
    left = header_bytes
    for key in KEYS:
        if ggml.gguf_remove_key(merged, key.encode()) >= 0:
            left, before = _unpadded_bytes(merged), left
            provenance_bytes[key] = before - left
    ggml.gguf_free(merged)
    return GgufInfo(
        architecture=str(metadata.get("general.architecture", "")),
        metadata=metadata,
        tensors=tuple(tensors),
        file_type=next((name for name, n in FILE_TYPES.items() if n == metadata.get("general.file_type")), None),
        quantized_header_bytes=header_bytes,
        provenance_bytes=provenance_bytes,
        file_bytes=file_bytes,
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of one file, without its long arrays. Raises UserError as `read_header`."""
    with open_gguf(path) as (gguf, _):
        return _metadata(gguf)


def source_tensors(path: Path) -> list[SourceTensor]:
    """Every tensor of a GGUF, of all its parts. Raises UserError as `read_header`."""
    found: list[SourceTensor] = []
    for part in split_parts(path):
        with open_gguf(part) as (gguf, _):
            found += tensors_of(part, gguf)
    return found


def read_float_tensors(path: Path) -> dict[str, np.ndarray]:
    """The F32 tensors of one file by name, float32 in numpy's order of extents. Raises UserError as `read_header`."""
    with open_gguf(path) as (gguf, _):
        tensors = [tensor for tensor in tensors_of(path, gguf) if tensor.type == "f32"]
    return {
        one.name: np.fromfile(path, "<f4", one.n_weights, offset=one.offset).reshape(one.shape[::-1]) for one in tensors
    }


def broken_tensor(path: Path) -> str | None:
    """The first tensor that holds NaN or infinities, of all parts; None when all float weights are numbers.

    Raises UserError as `read_header`. The file is read once, a few MB at a time.
    """
    tensors = (one for one in source_tensors(path) if one.type in _EXPONENTS)
    return next((one.name for one in tensors if not _is_finite(one)), None)


def _is_finite(tensor: SourceTensor) -> bool:
    """A float is no finite number where all bits of its exponent are set (IEEE 754; bfloat16 likewise)."""
    word, exponent = _EXPONENTS[tensor.type]
    step = 1 << 22
    for first in range(0, tensor.n_weights, step):
        count = min(step, tensor.n_weights - first)
        words = np.fromfile(tensor.path, word, count, offset=tensor.offset + first * np.dtype(word).itemsize)
        if (words & exponent == exponent).any():
            return False
    return True


def _unpadded_bytes(gguf: int) -> int:
    """Size of the header before its padding: ggml tells only the padded one, which jumps as a key's text grows."""
    probe = "harness.padding"

    def padded_with(n: int) -> int:  # n bytes of text
        ggml.gguf_set_val_str(gguf, probe.encode(), b"x" * n)
        return int(ggml.gguf_get_meta_size(gguf))

    least = padded_with(0)
    n = bisect_left(range(GGUF_ALIGNMENT), True, key=lambda n: padded_with(n) > least)
    ggml.gguf_remove_key(gguf, probe.encode())
    return least - kv_bytes(probe, "x" * (n - 1))


@contextmanager
def open_gguf(path: Path) -> Iterator[tuple[int, int]]:
    """ggml's view of a file's header, and the context that has a descriptor of each tensor; both are freed at the end.
    Raises UserError as `read_header`."""
    check_gguf(path)
    context = ctypes.c_void_p()
    # `ctx` of the parameters points to where ggml stores its context; the descriptors of the tensors live there.
    parameters = GgufInitParams(True, ctypes.cast(ctypes.byref(context), ctypes.c_void_p))
    gguf = ggml.gguf_init_from_file(str(path).encode(), parameters)
    if not gguf:
        raise UserError(f"{path}: ggml cannot read this GGUF header, the file is damaged or truncated: fetch it again")
    try:
        yield gguf, context.value or 0
    finally:
        ggml.gguf_free(gguf)
        ggml.ggml_free(context.value or 0)


def _metadata(gguf: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(ggml.gguf_get_n_kv(gguf)):
        key = ggml.gguf_get_key(gguf, i).decode("utf-8", "replace")
        kind = ggml.gguf_get_kv_type(gguf, i)
        if kind == _STRING:
            metadata[key] = ggml.gguf_get_val_str(gguf, i).decode("utf-8", "replace")
        elif kind in _SCALARS:
            value = _SCALARS[kind].from_address(ggml.gguf_get_val_data(gguf, i)).value  # type: ignore[attr-defined]
            metadata[key] = _finite(value)
        elif kind == _ARRAY:
            length, of = ggml.gguf_get_arr_n(gguf, i), ggml.gguf_get_arr_type(gguf, i)
            if of in _SCALARS and 0 < length <= _MAX_ARRAY:
                array = (_SCALARS[of] * length).from_address(ggml.gguf_get_arr_data(gguf, i))  # type: ignore[operator]
                metadata[key] = [_finite(value) for value in array]
            elif of == _STRING and length <= _MAX_STRINGS:
                texts = [ggml.gguf_get_arr_str(gguf, i, j) for j in range(length)]
                metadata[key] = [text.decode("utf-8", "replace") for text in texts]
            else:
                metadata[key] = f"<array of {length}>"
    return metadata


def _finite(value: Any) -> Any:
    """Headers are kept as JSON, which has no NaN: such a number becomes text."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def tensors_of(path: Path, gguf: int) -> list[SourceTensor]:
    """The tensors of an open file."""
    found, data_offset = [], ggml.gguf_get_data_offset(gguf)
    for i in range(ggml.gguf_get_n_tensors(gguf)):
        extents = list(ggml.gguf_get_tensor_ne(gguf, i)[0:4])
        while len(extents) > 1 and extents[-1] == 1:
            extents.pop()
        type_name = ggml.ggml_type_name(ggml.gguf_get_tensor_type(gguf, i)).decode().lower()
        offset, n_bytes = data_offset + ggml.gguf_get_tensor_offset(gguf, i), ggml.gguf_get_tensor_size(gguf, i)
        name = ggml.gguf_get_tensor_name(gguf, i).decode()
        found.append(SourceTensor(name, tuple(extents), type_name, n_bytes, path, offset))
    return found
