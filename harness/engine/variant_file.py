"""The header of a quantized GGUF, made by ggml itself as llama_model_quantize does, and where its tensors come from."""

import ctypes
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.engine.gguf_file import open_gguf
from harness.engine.native import ggml
from harness.ggml_types import FILE_TYPES, GGML_TYPES, QUANTIZATION_VERSION
from harness.header import split_parts

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_LAYER = re.compile(r"blk\.(\d+)")


@dataclass(frozen=True)
class SourceTensor:
    """Data of one tensor: `n_bytes` from `offset` of `path`. `shape` is in ggml's order, row width first; `type` a
    lower-case ggml name."""

    name: str
    shape: tuple[int, ...]
    type: str
    path: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Layout:
    """A GGUF before its data: its header with padding, and its tensors in order, each with its place in the file."""

    head: bytes
    tensors: tuple[tuple[SourceTensor, int], ...]


def source_tensors(path: Path) -> list[SourceTensor]:
    """Every tensor of a GGUF, of all its parts. Raises UserError when its header is damaged."""
    found: list[SourceTensor] = []
    for part in split_parts(path):
        with _opened(part) as (gguf, _):
            found += _tensors_of(part, gguf)
    return found


def plan_layout(source: Path, types: Mapping[str, str], file_type: str, metadata: Mapping[str, str | int]) -> Layout:
    """What llama_model_quantize would write of `source` before its data: the keys of the first part, two of its own,
    then `metadata`; tensors by layer and name, each with its type of `types`.

    Raises UserError when the source's header is damaged.
    """
    tensors: dict[str, SourceTensor] = {}
    with ExitStack() as opened:
        target = ggml.gguf_init_empty()
        opened.callback(ggml.gguf_free, target)
        contexts: dict[str, int] = {}
        for i, part in enumerate(split_parts(source)):
            gguf, context = opened.enter_context(_opened(part))
            if i == 0:
                ggml.gguf_set_kv(target, gguf)
            for tensor in _tensors_of(part, gguf):
                tensors[tensor.name], contexts[tensor.name] = tensor, context
        ggml.gguf_set_val_u32(target, b"general.quantization_version", QUANTIZATION_VERSION)
        ggml.gguf_set_val_u32(target, b"general.file_type", FILE_TYPES[file_type])
        for key in _SPLIT_KEYS:
            ggml.gguf_remove_key(target, key.encode())
        for key, value in metadata.items():
            if isinstance(value, int):
                ggml.gguf_set_val_u32(target, key.encode(), value)
            else:
                ggml.gguf_set_val_str(target, key.encode(), value.encode())
        names = sorted(tensors, key=_place)
        for name in names:
            ggml.gguf_add_tensor(target, ggml.ggml_get_tensor(contexts[name], name.encode()))
            ggml.gguf_set_tensor_type(target, name.encode(), GGML_TYPES[types[name]].id)
        head = ctypes.create_string_buffer(ggml.gguf_get_meta_size(target))
        ggml.gguf_get_meta_data(target, head)
        offsets = [len(head) + ggml.gguf_get_tensor_offset(target, i) for i in range(len(names))]
    return Layout(head.raw, tuple((tensors[name], offset) for name, offset in zip(names, offsets, strict=True)))


def _place(name: str) -> tuple[int, bytes]:
    """llama.cpp keeps tensors by block, those outside of blocks first, then by name."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1, name.encode()


def _tensors_of(path: Path, gguf: int) -> list[SourceTensor]:
    found, data_offset = [], ggml.gguf_get_data_offset(gguf)
    for i in range(ggml.gguf_get_n_tensors(gguf)):
        extents = list(ggml.gguf_get_tensor_ne(gguf, i)[0:4])
        while len(extents) > 1 and extents[-1] == 1:
            extents.pop()
        type_name = ggml.ggml_type_name(ggml.gguf_get_tensor_type(gguf, i)).decode().lower()
        offset, n_bytes = data_offset + ggml.gguf_get_tensor_offset(gguf, i), ggml.gguf_get_tensor_size(gguf, i)
        name = ggml.gguf_get_tensor_name(gguf, i).decode()
        found.append(SourceTensor(name, tuple(extents), type_name, path, offset, n_bytes))
    return found


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    gguf, context = open_gguf(path)
    try:
        yield gguf, context
    finally:
        ggml.gguf_free(gguf)
        ggml.ggml_free(context)
