"""Files that are whole or absent: atomic writes, the cache of things made once, checksums."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from harness.errors import UserError


def key_of(*parts: Any) -> str:
    """sha256 of the parts as canonical JSON, 64 hex digits. The identity of everything that is cached or recorded."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; results are for reading
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomically, UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: Path, data: Any) -> None:
    """Atomically. NaN and infinities are refused: an absent number is null."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_npz(path: Path, **arrays: Any) -> None:
    """Atomically; read it back with np.load(path, allow_pickle=False)."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    write_atomic(path, write)


class Cache:
    """One folder of things made once, by kind and key: `<folder>/<kind>/<key><suffix>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        return self.folder / kind / f"{key}{suffix}"

    def make(self, kind: str, key: str, suffix: str, make: Callable[[Path], Any]) -> Path:
        """The cached file, made by `make(temporary path)` if absent. One maker at a time, others wait for it.

        What `make` returns, if anything, is kept as JSON beside the file, for `facts`.
        """
        path = self.path(kind, key, suffix)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                # The lock is ours, so what an earlier maker left half-written is nobody's.
                for stale in path.parent.glob(f".{path.name}.*.tmp"):
                    stale.unlink(missing_ok=True)

                def fill(temporary: Path) -> None:
                    facts = make(temporary)
                    if facts is not None:
                        write_json(_facts_path(path), facts)

                write_atomic(path, fill)  # the facts are there before the file is
        return path

    def facts(self, path: Path) -> Any:
        """What the maker of a cached file returned."""
        return json.loads(_facts_path(path).read_text(encoding="utf-8"))

    def json(self, kind: str, key: str, make: Callable[[], Any]) -> Any:
        """A cached JSON value. A damaged file is made again."""
        path = self.path(kind, key, ".json")
        with suppress(ValueError, FileNotFoundError):
            return json.loads(path.read_text(encoding="utf-8"))
        path.unlink(missing_ok=True)
        self.make(kind, key, ".json", lambda temporary: _write_value(temporary, make()))
        return json.loads(path.read_text(encoding="utf-8"))

    def sha256(self, path: Path) -> str:
        """sha256 of a file anywhere, remembered by path, size and time of change."""
        status = path.stat()
        key = key_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
        return self.json("sha256", key, lambda: sha256_file(path))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Number of files and bytes by kind."""
        result: dict[str, tuple[int, int]] = {}
        for folder in sorted(p for p in self.folder.iterdir() if p.is_dir()):
            files = [p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
            result[folder.name] = (len(files), sum(files))
        return result


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.facts.json")


def _write_value(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, or of its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
