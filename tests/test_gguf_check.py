"""A GGUF's header, damaged in every way that the format allows for: refused before ggml sees the file."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import pytest

from harness.engine.gguf_file import read_float_tensors, read_header, read_metadata
from harness.engine.native import ggml
from harness.errors import UserError
from harness.gguf_check import MAX_KEYS, MAX_TENSORS, check_gguf, check_header
from harness.imatrix import read_imatrix
from harness.reference import read_header_json

F32, Q8_0, U32, F32_VALUE, STRING, ARRAY = 0, 8, 4, 6, 8, 9


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def number(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def tensor(name: bytes, *extents: int, kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)


def header(
    tensors: Sequence[bytes], keys: Sequence[bytes] = (), *, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join([*keys, *tensors])


def file(*tensors: bytes, keys: Sequence[bytes] = (), n_data: int, alignment: int = 32) -> bytes:
    start = header(tensors, keys)
    return start + b"\0" * (-len(start) % alignment) + b"\0" * n_data


TWO = [tensor(b"a", 8), tensor(b"b", 32, 2, kind=Q8_0, offset=32)]  # 32 bytes; 2 blocks of 34


@pytest.mark.parametrize(
    "data",
    [
        file(n_data=0),  # the first part of a split may hold no tensor
        file(*TWO, n_data=32 + 68),  # without the padding at its end
        file(*TWO, keys=[number(b"k", 7)], n_data=32 + 96),
        file(tensor(b"scalar"), n_data=4),
        file(tensor(b"x" * 63, 1, 1, 1, 1), n_data=4),
        file(
            tensor(b"a", 1),
            tensor(b"b", 1, offset=64),
            n_data=68,
            keys=[number(b"general.alignment", 64)],
            alignment=64,
        ),
        file(n_data=0, keys=[text(b"k") + struct.pack("<IIQ", ARRAY, STRING, 2) + text(b"one") + text(b"")]),
        file(n_data=0, keys=[text(b"k") + struct.pack("<I", STRING) + text(b"zero \0 in a value")]),
    ],
)
def test_good_headers_are_taken_as_ggml_takes_them(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(data)
    check_gguf(path)
    if struct.unpack_from("<Q", data, 8)[0]:
        assert read_header(path).file_bytes == len(data)


DAMAGED = {
    "nothing after the magic": (b"GGUF", "ends inside"),
    "more tensors than bytes": (header([], counts=(MAX_TENSORS, 0)), "ends inside"),
    "far too many tensors": (header([], counts=(MAX_TENSORS + 1, 0)), "tensors, at most"),
    "far too many keys": (header([], counts=(0, MAX_KEYS + 1)), "keys, at most"),
    "a negative count": (header([], counts=(0, (1 << 64) - 1)), "keys, at most"),
    "a long key": (header([], [struct.pack("<Q", 1 << 60)]), "the name of key 0"),
    "an empty key": (header([], [number(b"", 1)]), "is empty"),
    "a zero in a key": (header([], [number(b"a\0b", 1)]), "zero byte"),
    "a key that is no UTF-8": (header([], [number(b"\xff", 1)]), "no UTF-8"),
    "a key twice": (header([], [number(b"k", 1), number(b"k", 2)]), "the key k is there twice"),
    "an unknown kind of value": (header([], [text(b"k") + struct.pack("<I", 13)]), "type 13"),
    "an array of arrays": (header([], [text(b"k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)]), "type 9"),
    "a long array": (header([], [text(b"k") + struct.pack("<IIQ", ARRAY, U32, 1 << 62)]), "ends inside"),
    "a long array of texts": (header([], [text(b"k") + struct.pack("<IIQ", ARRAY, STRING, 1 << 62)]), "texts"),
    "a long text in an array": (
        header([], [text(b"k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 1 << 63) + b"x" * 9]),
        "ends inside",
    ),
    "texts after a long one": (
        header([], [text(b"k") + struct.pack("<IIQQ", ARRAY, STRING, 2, 1 << 63) + b"x" * 9]),
        "does not fit",
    ),
    "a long text": (header([], [text(b"k") + struct.pack("<IQ", STRING, 1 << 63)]), "ends inside"),
    "no alignment": (file(n_data=0, keys=[number(b"general.alignment", 0)]), "power of two"),
    "an odd alignment": (file(n_data=0, keys=[number(b"general.alignment", 48)]), "power of two"),
    "an alignment that is a text": (
        file(n_data=0, keys=[text(b"general.alignment") + struct.pack("<I", STRING) + text(b"32")]),
        "no 32-bit number",
    ),
    "a long name": (file(tensor(b"x" * 64, 8), n_data=32), "the name of tensor 0 has 64 bytes"),
    "an empty name": (file(tensor(b"", 8), n_data=32), "is empty"),
    "names that are one up to a zero": (file(tensor(b"a\0b", 8), tensor(b"a\0c", 8, offset=32), n_data=64), "zero"),
    "a name twice": (file(tensor(b"a", 8), tensor(b"a", 8, offset=32), n_data=64), "one name"),
    "five extents": (file(tensor(b"a", 1, 1, 1, 1, 1), n_data=32), "5 extents"),
    "no weights": (file(tensor(b"a", 8, 0), n_data=0), "a has extents that its type cannot have (8x0)"),
    "a product beyond 64 bits": (file(tensor(b"a", 1 << 32, 1 << 32), n_data=32), "cannot have"),
    "half a block": (file(tensor(b"a", 33, kind=Q8_0), n_data=96), "cannot have (33)"),
    "an unaligned offset": (file(tensor(b"a", 8, offset=4), n_data=64), "lies at 4"),
    "an overlap": (file(tensor(b"a", 8), tensor(b"b", 8), n_data=64), "b lies at 0 of the data instead of 32"),
    "a gap": (file(tensor(b"a", 8), tensor(b"b", 8, offset=64), n_data=96), "instead of 32"),
    "the wrong order": (file(tensor(b"a", 8, offset=32), tensor(b"b", 8), n_data=64), "overlap or leave gaps"),
}


@pytest.mark.parametrize(("data", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_headers_are_refused_in_one_line(data: bytes, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_header(data, "x.gguf")
    line = str(caught.value)
    assert line.startswith("x.gguf: ") and said in line and "\n" not in line
    assert line.endswith(": the header is damaged or truncated, fetch the file again")


@pytest.mark.parametrize(("version", "said"), [(1, "of GGUF version 1, "), (3 << 24, "a big-endian GGUF, ")])
def test_other_versions_are_no_damage(version: int, said: str) -> None:
    with pytest.raises(UserError, match=f"x.gguf is {said}"):
        check_header(header([], version=version), "x.gguf")


@pytest.mark.parametrize("type_id", [9, 15, 31, 137, (1 << 32) - 1])
def test_types_of_no_file_are_refused(type_id: int) -> None:
    """q8_1 and q8_k (9, 15) are ggml's own, for sums; the others were taken away or never given."""
    with pytest.raises(UserError, match=f"x.gguf: a has the tensor type {type_id}, .* give another file"):
        check_header(file(tensor(b"a", 256, kind=type_id), n_data=4096), "x.gguf")


@pytest.mark.parametrize("data", [b"", b"GGUF", DAMAGED["an overlap"][0], file(*TWO, n_data=32)])
def test_neither_ggml_nor_llama_cpp_is_given_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """Every reader of models, of parts, of `policy=like` and of imatrices checks first."""
    monkeypatch.setattr(ggml, "gguf_init_from_file", None)
    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", None)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(data)
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(data)
    (tmp_path / "x.gguf").write_bytes(data)
    for read in (read_header, read_metadata, read_float_tensors, read_imatrix, read_header_json):
        with pytest.raises(UserError):
            read(tmp_path / "x.gguf")
    for read in (read_header, read_header_json):
        with pytest.raises(UserError):
            read(tmp_path / "m-00001-of-00002.gguf")


def test_a_missing_byte_is_told() -> None:
    data = file(*TWO, n_data=32 + 68)
    check_header(data, "x.gguf")
    with pytest.raises(UserError, match=f"x.gguf is truncated: {len(data) - 1} bytes .* promises {len(data)}"):
        check_header(data[:-1], "x.gguf")


def test_a_cut_anywhere_in_the_header_is_told(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    for n_bytes in [*range(4, 600), *range(600, 20_000, 379)]:
        with pytest.raises(UserError, match=r"damaged or truncated|is truncated"):
            check_header(whole[:n_bytes], "x.gguf")


def test_parts_that_share_a_tensor_are_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        (tmp_path / f"m-{i:05d}-of-00002.gguf").write_bytes(file(tensor(b"a", 8), n_data=32))
    with pytest.raises(UserError, match="two parts hold a tensor of one name"):
        read_header(tmp_path / "m-00001-of-00002.gguf")


def test_numbers_that_json_lacks_become_text(tmp_path: Path) -> None:
    keys = [text(b"x.inf") + struct.pack("<If", F32_VALUE, float("inf"))]
    keys += [text(b"x.nan") + struct.pack("<IIQff", ARRAY, F32_VALUE, 2, float("nan"), 0.5)]
    path = tmp_path / "odd.gguf"
    path.write_bytes(file(tensor(b"a", 8), keys=keys, n_data=32))
    info = read_header(path)
    assert info.metadata == {"x.inf": "inf", "x.nan": ["nan", 0.5]}
    json.dumps(info.to_json(), allow_nan=False)
