"""A GGUF's header, read byte by byte, before ggml and llama.cpp are given the file. Only `check_gguf` touches a file.

Format: docs/gguf.md of the ggml repository, versions 2 and 3, little-endian. What ggml itself would stop at in C++ is
refused here in one line, and so is what it takes and nobody writes: zeros inside names, empty tensors, counts far
above those of any model.
"""

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError, some
from harness.ggml_types import GGML_TYPES, GGUF_ALIGNMENT

_VERSIONS = (2, 3)
MAX_TENSORS = 1 << 13  # the largest mixtures have about 2,000; ggml looks names up one by one
MAX_KEYS = 1 << 13  # models have about 50
_MAX_KEY_BYTES = 65_535  # of the format
_MAX_NAME_BYTES = 63  # of ggml
_MAX_EXTENTS = 4
_STRING, _ARRAY, _U32 = 8, 9, 4
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the types of numbers
_TYPES = {one.id: one for one in GGML_TYPES.values()}

Buffer = bytes | mmap.mmap


class _Tensor(NamedTuple):
    name: str
    offset: int
    n_bytes: int


def check_gguf(path: Path) -> None:
    """Raises UserError unless the file is a GGUF whose header adds up."""
    if not path.is_file():
        raise UserError(f"no model file at {path}: check model.path")
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(f"{path} is no GGUF file (it starts with {magic!r}): give a .gguf model")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            check_header(data, str(path))


def check_header(data: Buffer, where: str) -> None:
    """The same for the bytes of a whole file that begin with the magic. `where` begins the messages."""
    try:
        needed = _bytes_needed(_Reader(data), where)
    except _Damaged as error:
        raise UserError(f"{where}: {error}: the header is damaged or truncated, fetch the file again") from error
    if len(data) < needed:
        raise UserError(
            f"{where} is truncated: {len(data):,} bytes where its header promises {needed:,}: fetch it again"
        )


class _Damaged(Exception):
    """What does not add up."""


class _Reader:
    """A place in the bytes. `take` moves on and never beyond the end."""

    def __init__(self, data: Buffer) -> None:
        self.data, self.at, self.end = data, 4, len(data)

    def take(self, n: int) -> int:
        """Where the next n bytes begin."""
        start = self.at
        if n > self.end - start:
            raise _Damaged(f"it ends inside the header, at byte {self.end:,}")
        self.at = start + n
        return start

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.take(8))[0])

    def name(self, what: str, most: int) -> str:
        n = self.u64()
        if n > most:
            raise _Damaged(f"{what} has {n:,} bytes, at most {most:,} are allowed")
        start = self.take(n)
        raw = self.data[start : start + n]
        if not raw or b"\0" in raw:
            raise _Damaged(f"{what} is empty or holds a zero byte")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"{what} is no UTF-8") from error

    def skip_strings(self, n: int) -> None:
        if n > (self.end - self.at) // 8:
            raise _Damaged(f"an array of {n:,} texts does not fit into the file")
        data, at, end, unpack = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        for _ in range(n):  # vocabularies: some hundred thousand
            if at > end - 8:
                raise _Damaged("an array of texts does not fit into the file")
            at += 8 + unpack(data, at)[0]
        self.at = at
        self.take(0)


def _bytes_needed(reader: _Reader, where: str) -> int:
    """Bytes of a whole file with this header."""
    version = reader.u32()
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise UserError(
                f"{where} is a big-endian GGUF, llama.cpp reads little-endian ones here: give another file, or turn it "
                "round with gguf-convert-endian of the package gguf"
            )
        raise UserError(f"{where} is of GGUF version {version}, this llama.cpp reads 2 and 3: convert the model again")
    n_tensors, n_keys = reader.u64(), reader.u64()
    for n, most, what in ((n_tensors, MAX_TENSORS, "tensors"), (n_keys, MAX_KEYS, "keys")):
        if n > most:
            raise _Damaged(f"it promises {n:,} {what}, at most {most:,} are allowed")
    alignment, keys = GGUF_ALIGNMENT, set()
    for i in range(n_keys):
        key = reader.name(f"the name of key {i}", _MAX_KEY_BYTES)
        if key in keys:
            raise _Damaged(f"the key {some([key])} is there twice")
        keys.add(key)
        kind, start = reader.u32(), reader.at
        _skip_value(reader, kind, key)
        if key == "general.alignment":
            if kind != _U32:
                raise _Damaged("general.alignment is no 32-bit number")
            (alignment,) = struct.unpack_from("<I", reader.data, start)
    if alignment == 0 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment={alignment} is no power of two")
    tensors = [_tensor(reader, i, where) for i in range(n_tensors)]
    if len({tensor.name for tensor in tensors}) < n_tensors:
        raise _Damaged("two tensors have one name")
    position = end = 0
    for tensor in tensors:
        if tensor.offset != position:
            place = f"lies at {tensor.offset:,} of the data instead of {position:,}"
            raise _Damaged(f"{some([tensor.name])} {place}, so tensors overlap or leave gaps")
        end = position + tensor.n_bytes
        position = _padded(end, alignment)
    # The padding behind the last tensor may be missing.
    return _padded(reader.at, alignment) + end if tensors else reader.at


def _skip_value(reader: _Reader, kind: int, key: str) -> None:
    n = 1
    if kind == _ARRAY:
        kind, n = reader.u32(), reader.u64()
    if kind == _STRING:
        reader.skip_strings(n)
    elif kind in _VALUE_BYTES:
        reader.take(n * _VALUE_BYTES[kind])
    else:
        raise _Damaged(f"the key {some([key])} has a value of type {kind}, which the format lacks")


def _tensor(reader: _Reader, i: int, where: str) -> _Tensor:
    name = reader.name(f"the name of tensor {i}", _MAX_NAME_BYTES)
    n_extents = reader.u32()
    if n_extents > _MAX_EXTENTS:
        raise _Damaged(f"{some([name])} has {n_extents} extents, at most {_MAX_EXTENTS} are allowed")
    extents = [reader.u64() for _ in range(n_extents)] or [1]
    type_id, offset = reader.u32(), reader.u64()
    if type_id not in _TYPES:
        raise UserError(
            f"{where}: {some([name])} has the tensor type {type_id}, which this llama.cpp does not know: "
            "a fork or a newer release wrote it, give another file"
        )
    kind, n_weights = _TYPES[type_id], 1
    for extent in extents:
        n_weights *= extent
    if n_weights == 0 or n_weights >= 1 << 63 or extents[0] % kind.block_weights:
        shape = "x".join(map(str, extents))
        raise _Damaged(f"{some([name])} has extents that its type cannot have ({shape})")
    return _Tensor(name, offset, n_weights // kind.block_weights * kind.block_bytes)


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
