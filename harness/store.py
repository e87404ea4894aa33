"""Files that are whole or absent: atomic writes, the cache of things made once, checksums."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from harness.errors import UserError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LEASE_S = 60.0  # without a sign of life for that long, the owner of a lock on another machine counts as dead
MAX_JSON_BYTES = 64 << 20  # records of large mixtures have about 0.2 MB
_UMASK_LOCK = threading.Lock()


def key_of(*parts: Any) -> str:
    """sha256 of the parts as canonical JSON, 64 hex digits. The identity of everything that is cached or recorded."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path, offset: int = 0, n_bytes: int | None = None) -> str:
    """sha256 of a file's bytes, or of `n_bytes` of them from `offset`."""
    digest, left = hashlib.sha256(), n_bytes
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 22 if left is None else min(1 << 22, left)):
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk (`durable`), and rename it to `path`.

    Raises OSError, which names `path`, where the disk is full or refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{_machine()}-{os.getpid()}-"
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; results are for reading
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, name) and error.errno is not None:  # a failed write names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    with _UMASK_LOCK:  # it can only be read by setting it, for all threads
        umask = os.umask(0)
        os.umask(umask)
    return umask


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files below `folder` whose writers died on this machine."""
    import psutil

    for path in folder.rglob(".*.tmp"):
        match = re.search(r"\.([^.]*)-(\d+)-[^-.]*\.tmp$", path.name)
        if match and match[1] == _machine() and not psutil.pid_exists(int(match[2])):
            path.unlink(missing_ok=True)


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32]


def write_text(path: Path, text: str) -> None:
    """Atomically, UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: Path, data: Any) -> None:
    """Atomically. NaN and infinities are refused: an absent number is null."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_npz(path: Path, **arrays: Any) -> None:
    """Atomically; `read_npz` reads it back."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    write_atomic(path, write)


def read_json(path: Path) -> Any:
    """What a JSON file says that may be anybody's. Raises OSError, ValueError (too large, no JSON, or what could not be
    written again: NaN, 1e999, half of a surrogate pair) and RecursionError."""
    if not path.is_file():  # a device or a pipe has no end
        raise ValueError("it is no file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES >> 20} MiB")
    text = path.read_bytes().decode()
    data = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if _SURROGATE.search(text):
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number")
    return value


def read_npz(source: Path | bytes) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or of its content, by name; None when it is missing, damaged, or holds anything but plain
    arrays as they are: packed ones could unpack to a thousand times the file."""
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        with ZipFile(BytesIO(content)) as file:
            if not content.startswith(b"PK") or sum(entry.file_size for entry in file.infolist()) > len(content):
                return None
            return {entry.filename.removesuffix(".npy"): _array(file.read(entry)) for entry in file.infolist()}
    except Exception:  # numpy, zipfile and its decompressors raise a dozen kinds on bytes of others
        return None


def _array(content: bytes) -> np.ndarray:
    """The array of a .npy file, as np.load gives it. Raises ValueError for what is no plain array.

    A report reads thousands whose headers are alike, and np.load compiles each header anew.
    """
    (n_header,) = struct.unpack_from("<H", content, 8)
    begin = 10 + n_header
    shape, fortran, dtype = _npy_header(content[:begin])
    values = np.frombuffer(content, dtype, offset=begin).copy()  # bytes could not be written to
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


@lru_cache(maxsize=64)
def _npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):  # what np.savez writes for names of ASCII
        raise ValueError("a header of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("objects would have to be unpickled")
    return shape, fortran, dtype


class Cache:
    """One folder of things made once, by kind and key: `<folder>/<kind>/<key><suffix>`.

    `shared`: several machines use it at once, over a network. Their kernels may not see each other's locks there, so
    locks are files that are renewed as long as their owner lives, and expire after it.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder, self.shared = folder.absolute(), shared
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"runtime.cache_dir={folder} cannot be written ({error.strerror}): give another folder"
            ) from error

    def path(self, kind: str, key: str, suffix: str = "") -> Path:
        """Where the thing is, or would be."""
        if "/" in key or "\\" in key:
            raise ValueError(f"a key names no folder: {key!r}")
        return self.folder / kind / f"{key}{suffix}"

    def make(self, kind: str, key: str, suffix: str, make: Callable[[Path], Any]) -> Path:
        """The cached file, made by `make(temporary path)` if it is not held. One maker at a time, others wait for it.

        What `make` returns, if anything, is kept beside the file, for `facts`.
        """
        path = self.path(kind, key, suffix)
        if self.holds(path):
            return path
        with self.lock(path):
            if not self.holds(path):
                # The lock is ours, so what an earlier maker left half-written is nobody's.
                for stale in path.parent.glob(f".{path.name}.*.tmp"):
                    stale.unlink(missing_ok=True)
                facts: list[Any] = []
                write_atomic(path, lambda temporary: facts.append(make(temporary)))
                self.seal(path, facts[0])
        return path

    @contextmanager
    def lock(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """One process at a time, for whatever concerns `path`. The lock of a process that died is free. Without `wait`,
        yields False at once where somebody else holds it.

        In a shared folder it is free at once on its own machine, LEASE_S later on the others. What a lock protects is
        named by its content and renamed into its place whole: two owners would do the work twice, and no harm.
        """
        from filelock import (
            BaseFileLock,
            FileLock,
            SoftFileLease,
            Timeout,
        )  # only here: a report runs without this library

        path, locks = path.absolute(), self.folder / "locks"  # of its own: a model may lie in a folder of others
        name = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        locks.mkdir(parents=True, exist_ok=True)
        file = locks / f"{key_of(name.as_posix())[:32]}.{'lease' if self.shared else 'lock'}"
        # singletons: a holder may enter again
        lock: BaseFileLock
        if self.shared:
            lock = SoftFileLease(file, lease_duration=LEASE_S, poll_interval=0.5, is_singleton=True)
        else:
            lock = FileLock(file, is_singleton=True)
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def seal(self, path: Path, facts: Any = None) -> None:
        """Vouch for a file that was just made: its sha256 goes beside it, last."""
        write_json(_seal_path(path), {"sha256": self.sha256(path), "facts": facts})

    def holds(self, path: Path) -> bool:
        """Whether the file is there and is still the one that was sealed."""
        seal = _read_json(_seal_path(path))
        try:
            return isinstance(seal, dict) and seal.get("sha256") == self.sha256(path)
        except OSError:
            return False

    def facts(self, path: Path) -> Any:
        """What the maker of a held file returned."""
        return _read_json(_seal_path(path))["facts"]

    def pin(self, path: Path) -> None:
        """Let a held file stay when others no longer need it. Whoever makes it anew makes it without."""
        seal = _read_json(_seal_path(path))
        if isinstance(seal, dict) and not seal.get("pinned"):
            write_json(_seal_path(path), {**seal, "pinned": True})

    def is_pinned(self, path: Path) -> bool:
        """Whether somebody wants the file to stay."""
        seal = _read_json(_seal_path(path))
        return isinstance(seal, dict) and seal.get("pinned") is True

    def remove(self, path: Path) -> None:
        """Forget a cached file."""
        _seal_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def json(self, kind: str, key: str, make: Callable[[], Any]) -> Any:
        """A cached JSON value. A damaged file is made again."""
        stored = self._stored_json(kind, key)
        if stored is not None:
            return stored[0]
        value = json.loads(json.dumps(make()))
        write_json(self.path(kind, key, ".json"), {"id": key_of(value), "value": value})
        return value

    def known_json(self, kind: str, key: str) -> Any:
        """A cached JSON value if it is there, else None: nothing is made."""
        stored = self._stored_json(kind, key)
        return stored[0] if stored else None

    def _stored_json(self, kind: str, key: str) -> tuple[Any] | None:
        stored = _read_json(self.path(kind, key, ".json"))
        whole = isinstance(stored, dict) and stored.get("id") == key_of(stored.get("value"))
        return (stored.get("value"),) if whole else None

    def sha256(self, path: Path) -> str:
        """sha256 of a file anywhere, remembered by path, size, times of change and inode."""
        status = path.stat()
        key = key_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return self.json("sha256", key, lambda: sha256_file(path))

    def files(self) -> dict[str, list[tuple[Path, int, float]]]:
        """Every file but locks, by kind: its path, bytes, and when it was changed or used last (seconds)."""
        found: dict[str, list[tuple[Path, int, float]]] = {}
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names if not name.endswith((".lock", ".lease"))):
                with suppress(FileNotFoundError):  # a sweep may be at work
                    status = path.stat()
                    kind = path.relative_to(self.folder).parts[0]
                    found.setdefault(kind, []).append((path, status.st_size, status.st_mtime))
        return dict(sorted(found.items()))


def _seal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal.json")


def _read_json(path: Path) -> Any:
    """None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, or of its nearest parent that exists."""
    return shutil.disk_usage(_existing(folder)).free


def disk_bytes(folder: Path) -> int:
    """Size of that disk."""
    return shutil.disk_usage(_existing(folder)).total


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
