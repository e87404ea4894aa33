"""Quantized tensors, each kept under what it was made of, so that no sweep quantizes one twice. Bounded in bytes.

An entry is one file: the sha256 of its key and the data, then the data. It is compared whenever the entry is read, so
damage is found. What was not used for longest goes first when room is needed; the time of the last use is the file's
mtime.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harness.cost import quantizes_fast
from harness.errors import EngineError
from harness.plan import TensorPlan
from harness.store import Cache, key_of, write_atomic

KIND = "tensors"
HASHES = "tensor_sha256"  # kind of the cache: what tensors and imatrix weights hash to
VERSION = 3  # of the key and of the file's form
_DIGEST_BYTES = 32
_BLOCK_BYTES = 1 << 22
_STALE_S = 86400.0  # an unfinished entry that nobody wrote to for that long


def is_kept(tensor: TensorPlan, source_type: str) -> bool:
    """Whether a tensor is worth an entry: it is quantized, into a type that takes longer to make than to read."""
    return tensor.type != source_type and not quantizes_fast(tensor.type)


@dataclass(frozen=True)
class Hashes:
    """What quantized tensors are made of: by name, type and sha256 of the source, and sha256 of the imatrix weights;
    and by what: sha256 of libggml-base, whose code quantizes whatever the CPU."""

    source_types: Mapping[str, str]
    source_sha256: Mapping[str, str]
    weights_sha256: Mapping[str, str]
    quantizer_sha256: str

    def keys(self, tensors: Iterable[TensorPlan]) -> dict[str, str]:
        """Key by name, for each of the tensors that is kept."""
        return {t.name: self._key(t) for t in tensors if t.quantizable and is_kept(t, self.source_types[t.name])}

    def require_unchanged(self, name: str, data_sha256: str, weights: np.ndarray | None) -> None:
        """Raises EngineError when a tensor was made of other data, or other imatrix weights, than the key tells."""
        if data_sha256 != self.source_sha256[name] or sha256_of_weights(weights) != self.weights_sha256.get(name):
            raise EngineError(f"{name}: the model or its imatrix was changed while the sweep ran: run it again")

    def _key(self, tensor: TensorPlan) -> str:
        """Of everything that moves a byte."""
        name = tensor.name
        made_of = (self.source_types[name], self.source_sha256[name], tensor.shape, self.weights_sha256.get(name))
        return key_of("tensor", VERSION, *made_of, tensor.type, self.quantizer_sha256)


def sha256_of_weights(weights: np.ndarray | None) -> str | None:
    """sha256 of imatrix weights as float32; None for none."""
    return None if weights is None else hashlib.sha256(np.ascontiguousarray(weights, "<f4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    path: Path
    n_bytes: int
    used_ns: int

    @property
    def key(self) -> str:
        """What it is kept under."""
        return self.path.stem


def entries(cache: Cache) -> list[Entry]:
    """All entries of a cache, the least recently used first."""
    found = []
    for path in (cache.folder / KIND).glob("*.bin"):
        with suppress(FileNotFoundError):  # another process may remove it while we look
            status = path.stat()
            found.append(Entry(path, status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda entry: (entry.used_ns, entry.path))


def prune(cache: Cache, max_bytes: int) -> tuple[int, int]:
    """Remove entries, the least recently used first, until `max_bytes` are left. Returns their number and bytes."""
    with _lock(cache):
        found = entries(cache)
        left, removed = sum(entry.n_bytes for entry in found), []
        for entry in found:
            if left <= max_bytes:
                break
            with suppress(PermissionError):  # Windows: somebody reads it
                entry.path.unlink(missing_ok=True)
            left -= entry.n_bytes
            removed.append(entry.n_bytes)
    return len(removed), sum(removed)


def _lock(cache: Cache) -> AbstractContextManager[bool]:
    return cache.lock(cache.folder / KIND)


@dataclass(frozen=True)
class TensorCache:
    """The entries of one cache folder. `limit_bytes`: of all of them together; 0 keeps nothing.

    Each entry has a lock of its own, under which it is read or made: several processes quantize at a time, and never
    the same tensor. One for all of them is held shortly, while room is made or taken.
    """

    cache: Cache
    limit_bytes: int

    def path(self, key: str) -> Path:
        """Where the entry is, or would be."""
        return self.cache.path(KIND, key, ".bin")

    def lock(self, key: str, *, wait: bool) -> AbstractContextManager[bool]:
        """Hold it while the entry is read or made. Without `wait`, False where somebody else holds it."""
        return self.cache.lock(self.path(key), wait=wait)

    def claim(self, wanted: Mapping[str, int]) -> tuple[set[str], set[str]]:
        """Get ready for a file that is made of these entries (data bytes by key): which of them are there, and which
        of the others there is room for, as far as nobody else takes it meanwhile. Others go, the least recently used
        first."""
        with _lock(self.cache):
            return self._claim(wanted)

    def _claim(self, wanted: Mapping[str, int]) -> tuple[set[str], set[str]]:
        for stale in (self.cache.folder / KIND).glob(".*.tmp"):
            with suppress(OSError):  # its writer may just end
                if time.time() - stale.stat().st_mtime > _STALE_S:  # of another machine; `remove_leftovers` knows ours
                    stale.unlink()
        found = entries(self.cache)
        mine = [entry for entry in found if entry.key in wanted]
        for entry in mine:
            with suppress(PermissionError):  # another user's: it only looks less used than it is
                os.utime(entry.path)
        total, of_mine = sum(entry.n_bytes for entry in found), sum(entry.n_bytes for entry in mine)
        missing = {key: n_bytes + _DIGEST_BYTES for key, n_bytes in wanted.items()}
        for entry in mine:
            missing.pop(entry.key)
        needed = min(sum(missing.values()), max(0, self.limit_bytes - of_mine))
        held = {entry.key for entry in mine}
        for entry in [*(e for e in found if e.key not in wanted), *mine]:
            if total + needed <= self.limit_bytes:
                break
            entry.path.unlink(missing_ok=True)
            total -= entry.n_bytes
            held.discard(entry.key)
        room, fitting = self.limit_bytes - total, set()
        for key, n_bytes in missing.items():
            if n_bytes <= room:
                fitting.add(key)
                room -= n_bytes
        return held, fitting

    def read(self, key: str, n_bytes: int, target: BinaryIO) -> bool | None:
        """Copy an entry's data to `target`. Tells whether it was whole, None where there is none; a damaged one is
        removed, and what was written to `target` is to be written again. Under the entry's lock."""
        path, digest, left = self.path(key), hashlib.sha256(key.encode()), n_bytes
        try:
            with path.open("rb") as file:
                promised = file.read(_DIGEST_BYTES)
                whole = os.fstat(file.fileno()).st_size == _DIGEST_BYTES + n_bytes
                while whole and left:
                    block = file.read(min(left, _BLOCK_BYTES))
                    whole = bool(block)
                    digest.update(block)
                    target.write(block)
                    left -= len(block)
        except FileNotFoundError:
            return None
        if whole and digest.digest() == promised:
            return True
        path.unlink(missing_ok=True)
        return False

    def keep(self, key: str, n_bytes: int, blocks: Iterable[Any], emit: Callable[[Any], None]) -> None:
        """Make an entry of the blocks (anything that is bytes, `n_bytes` in all), and hand each of them on to `emit`.
        Without room for the entry there is none. Under the entry's lock."""
        refusals: list[OSError] = []  # the entry's; those of `emit` are the caller's

        def write(temporary: Path) -> None:
            digest = hashlib.sha256(key.encode())
            with temporary.open("wb", buffering=0) as file:  # blocks are large, and a refusal shows at once
                try:
                    self._take(file, n_bytes)
                except OSError as error:
                    refusals.append(error)
                for block in blocks:
                    digest.update(block)
                    if not refusals:
                        try:
                            if file.write(block) != memoryview(block).nbytes:
                                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                        except OSError as error:
                            refusals.append(error)
                    emit(block)
                if refusals:
                    raise refusals[0]
                file.seek(0)
                file.write(digest.digest())

        try:
            write_atomic(self.path(key), write, durable=False)  # a torn entry is found when it is read
        except OSError as error:
            if not refusals or error.__cause__ is not refusals[0]:
                raise

    def _take(self, file: FileIO, n_bytes: int) -> None:
        """Give an entry that is begun its length, so that others see the room as taken. Raises OSError without any."""
        with _lock(self.cache):
            taken = 0
            for path in (self.cache.folder / KIND).iterdir():  # those that are begun have their length already
                with suppress(FileNotFoundError):
                    taken += path.stat().st_size
            if taken + _DIGEST_BYTES + n_bytes > self.limit_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate(_DIGEST_BYTES + n_bytes)
            file.seek(_DIGEST_BYTES)

    def growth_bytes(self, new: Iterable[int]) -> int:
        """Disk that new entries will take beside those that are there, at most. new: data bytes of each."""
        before = sum(entry.n_bytes for entry in entries(self.cache))
        added = sum(n_bytes + _DIGEST_BYTES for n_bytes in new)
        return max(0, min(added, self.limit_bytes - before))
