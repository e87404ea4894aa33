"""The fault table of models: GGUF files that are none, damaged, hostile or of no use."""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from faults import Fault, World, require_refused, table

Make = Callable[[World], Sequence[str]]

MODEL = "{folder}/model.gguf"


def damaged(reason: str) -> str:
    """What is said of a header that does not add up."""
    return f"{MODEL}: {reason}: the header is damaged or truncated, fetch the file again"


def unloadable(reason: str) -> str:
    """What is said of a model that llama.cpp does not load, for a reason in its words."""
    return f"model cannot be scored: llama.cpp cannot load it ({reason}): give another model"


def header(n_tensors: int, n_keys: int, rest: bytes = b"", version: int = 3, order: str = "<") -> bytes:
    """The first bytes of a GGUF file and `rest`."""
    return b"GGUF" + struct.pack(f"{order}IQQ", version, n_tensors, n_keys) + rest


def text(value: bytes) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, extents: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """The description of a tensor."""
    sizes = struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def given(content: bytes) -> Make:
    """A file of that content as the model."""
    return lambda world: [f"model.path={world.write('model.gguf', content)}"]


def one_tensor(*args: Any, **kwargs: Any) -> Make:
    """A GGUF without keys, of one tensor and 4 KB of zeros."""
    return given(header(1, 0, tensor(*args, **kwargs) + bytes(4096)))


def cut(n_bytes: Callable[[Path], int]) -> Make:
    """The first bytes of the tiny model."""
    return lambda world: given(world.model.read_bytes()[: n_bytes(world.model)])(world)


def data_offset(model: Path) -> int:
    """Where the weights begin."""
    return int(gguf.GGUFReader(model).data_offset)


def rewritten(
    architecture: str = "llama",
    without: str = "nothing",
    tensors: Mapping[str, np.ndarray | None] | None = None,
    **changed: Any,
) -> Make:
    """The tiny model without the keys that begin with `without`, with other values of llama's keys (dots as __), and
    other tensors; those that are None are left out."""

    def make(world: World) -> list[str]:
        reader = gguf.GGUFReader(world.model)
        path = world.folder / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for one in reader.fields.values():
            key = one.name.removeprefix("llama.").replace(".", "__")
            if not one.name.startswith(("GGUF.", "general.architecture", without)):
                of = one.types[-1] if len(one.types) > 1 else None
                writer.add_key_value(one.name, changed.get(key, one.contents()), one.types[0], of)
        for key in set(changed) - {name.removeprefix("llama.").replace(".", "__") for name in reader.fields}:
            writer.add_uint32(f"llama.{key.replace('__', '.')}", changed[key])
        for one in reader.tensors:
            data = (tensors or {}).get(one.name, one.data)
            if data is not None:
                writer.add_tensor(one.name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [f"model.path={path}"]

    return make


def imatrix(world: World) -> Sequence[str]:
    """The imatrix of the finished sweep in place of a model."""
    (path,) = (world.cache / "imatrix").glob("*.gguf")
    return given(path.read_bytes())(world)


def poisoned(name: str, value: float, position: int) -> Make:
    """The tiny model with one weight of another value."""

    def make(world: World) -> Sequence[str]:
        found = next(one.data for one in gguf.GGUFReader(world.model).tensors if one.name == name)
        data = found.copy()
        data.reshape(-1)[position] = value
        return rewritten(tensors={name: data})(world)

    return make


FAULTS = [
    Fault(
        "empty-file", given(b""), says="{folder}/model.gguf is no GGUF file (it starts with b''): give a .gguf model"
    ),
    Fault(
        "html-page",
        given(b"<!doctype html><title>Sign in</title>"),
        says="{folder}/model.gguf is no GGUF file (it starts with b'<!do'): give a .gguf model",
    ),
    Fault(
        "wrong-magic",
        given(b"ggjt" + bytes(100)),
        says="{folder}/model.gguf is no GGUF file (it starts with b'ggjt'): give a .gguf model",
    ),
    Fault("cut-in-the-header", cut(lambda _: 12), damaged("it ends inside the header, at byte 12")),
    Fault("cut-in-the-metadata", cut(lambda _: 1000), damaged("an array of 310 texts does not fit into the file")),
    Fault(
        "cut-in-the-tensor-list",
        cut(lambda model: data_offset(model) - 500),
        damaged("it ends inside the header, at byte 9,292"),
    ),
    Fault(
        "cut-in-the-weights",
        cut(lambda model: model.stat().st_size // 2),
        says=("{folder}/model.gguf is truncated: 2,527,520 bytes where its header promises 5,055,040: fetch it again"),
    ),
    Fault(
        "one-byte-short",
        cut(lambda model: model.stat().st_size - 1),
        says=("{folder}/model.gguf is truncated: 5,055,039 bytes where its header promises 5,055,040: fetch it again"),
    ),
    Fault(
        "version-1",
        given(header(1, 1, version=1)),
        says="{folder}/model.gguf is of GGUF version 1, this llama.cpp reads 2 and 3: convert the model again",
    ),
    Fault(
        "version-4",
        given(header(1, 1, version=4)),
        says="{folder}/model.gguf is of GGUF version 4, this llama.cpp reads 2 and 3: convert the model again",
    ),
    Fault(
        "big-endian",
        given(header(1, 1, order=">")),
        says=(
            "{folder}/model.gguf is a big-endian GGUF, llama.cpp reads little-endian ones here: give another "
            "file, or turn it round with gguf-convert-endian of the package gguf"
        ),
    ),
    Fault(
        "2**62-tensors",
        given(header(1 << 62, 0)),
        damaged("it promises 4,611,686,018,427,387,904 tensors, at most 8,192 are allowed"),
    ),
    Fault(
        "2**40-keys",
        given(header(10, 1 << 40)),
        damaged("it promises 1,099,511,627,776 keys, at most 8,192 are allowed"),
    ),
    Fault(
        "key-of-2**60-bytes",
        given(header(1, 1, struct.pack("<Q", 1 << 60))),
        damaged("the name of key 0 has 1,152,921,504,606,846,976 bytes, at most 65,535 are allowed"),
    ),
    Fault(
        "array-of-2**60",
        given(header(1, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 60))),
        damaged("it ends inside the header, at byte 49"),
    ),
    Fault(
        "alignment-of-3",
        given(header(1, 1, text(b"general.alignment") + struct.pack("<II", 4, 3))),
        damaged("general.alignment=3 is no power of two"),
    ),
    Fault(
        "tensor-outside-the-file",
        one_tensor(b"t", [256], offset=1 << 40),
        damaged("t lies at 1,099,511,627,776 of the data instead of 0, so tensors overlap or leave gaps"),
    ),
    Fault(
        "tensor-of-2**68-weights",
        one_tensor(b"t", [1 << 34, 1 << 34]),
        damaged("t has extents that its type cannot have (17179869184x17179869184)"),
    ),
    Fault(
        "tensor-of-negative-extent",
        one_tensor(b"t", [1 << 63]),
        damaged("t has extents that its type cannot have (9223372036854775808)"),
    ),
    Fault(
        "tensor-of-5-dimensions",
        one_tensor(b"t", [2] * 5),
        damaged("t has 5 extents, at most 4 are allowed"),
    ),
    Fault(
        "tensor-name-no-utf8",
        one_tensor(b"\xff\xfe", [256]),
        damaged("the name of tensor 0 is no UTF-8"),
    ),
    Fault(
        "unknown-tensor-type",
        one_tensor(b"t", [256], kind=4711),
        says=(
            "{folder}/model.gguf: t has the tensor type 4711, which this llama.cpp does not know: a fork or a "
            "newer release wrote it, give another file"
        ),
    ),
    Fault(
        "duplicate-tensor",
        given(header(2, 0, tensor(b"t", [8]) * 2 + bytes(4096))),
        damaged("two tensors have one name"),
    ),
    Fault(
        "no-tensors",
        given(header(0, 0)),
        says="{folder}/model.gguf: this GGUF holds no tensors: give a model, not a vocabulary",
    ),
    Fault("an-imatrix", imatrix, unloadable("unknown model architecture: ''")),
    Fault("unknown-architecture", rewritten("nonesuch"), unloadable("unknown model architecture: 'nonesuch'")),
    Fault(
        "no-tokenizer",
        rewritten(without="tokenizer"),
        unloadable("error loading model vocabulary: key not found in model: tokenizer.ggml.model"),
    ),
    Fault(
        "a-tensor-missing",
        rewritten(tensors={"blk.1.ffn_up.weight": None}),
        unloadable("check_tensor_dims: tensor 'blk.1.ffn_up.weight' not found"),
    ),
    Fault(
        "widths-contradict-the-header",
        rewritten(feed_forward_length=300),
        unloadable(
            "check_tensor_dims: tensor 'blk.0.ffn_gate.weight' has wrong shape; expected    256,    300, "
            "got    256,    512,      1,      1"
        ),
    ),
    Fault(
        "heads-contradict-the-header",
        rewritten(attention__head_count=3),
        unloadable("error loading model hyperparameters: invalid n_rot: 64, expected 85"),
    ),
    Fault(
        "header-that-aborts-llama.cpp",
        rewritten(expert_count=2, expert_used_count=4),
        says=(
            "llama.cpp cannot use model: the engine's process died of SIGABRT ({words} "
            "GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed): give another model, or see the logs in "
            "{folder}/cache/logs"
        ),
    ),
    Fault(
        "nan-weight",
        poisoned("blk.2.ffn_down.weight", np.nan, -1),
        says="model cannot be scored: blk.2.ffn_down.weight holds NaN or infinite weights: give another model",
    ),
    Fault(
        "infinite-weight",
        poisoned("output_norm.weight", -np.inf, 7),
        says="model cannot be scored: output_norm.weight holds NaN or infinite weights: give another model",
    ),
]


@table(FAULTS)
def test_a_model_of_no_use_is_refused(fault: Fault, world: World) -> None:
    require_refused(fault, world)
