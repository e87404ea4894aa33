"""The header of a quantized GGUF, made by ggml itself as llama_model_quantize does, and where its tensors come from."""

import ctypes
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from harness.engine.gguf_file import SPLIT_KEYS, SourceTensor, open_gguf, tensors_of
from harness.engine.native import ggml
from harness.ggml_types import FILE_TYPES, GGML_TYPES, QUANTIZATION_VERSION
from harness.header import split_parts

_LAYER = re.compile(r"blk\.(\d+)")


@dataclass(frozen=True)
class Layout:
    """A GGUF before its data: its header with padding, and its tensors in order, each with its place in the file."""

    head: bytes
    tensors: tuple[tuple[SourceTensor, int], ...]


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
            gguf, context = opened.enter_context(open_gguf(part))
            if i == 0:
                ggml.gguf_set_kv(target, gguf)
            for tensor in tensors_of(part, gguf):
                tensors[tensor.name], contexts[tensor.name] = tensor, context
        ggml.gguf_set_val_u32(target, b"general.quantization_version", QUANTIZATION_VERSION)
        ggml.gguf_set_val_u32(target, b"general.file_type", FILE_TYPES[file_type])
        for key in SPLIT_KEYS:
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
