"""Records: everything measured of one case and everything that moves its numbers, as one JSON file each.

results/README.md documents the fields. The per-token values lie beside the record in an .npz file.
"""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from harness import __version__
from harness.errors import UserError
from harness.store import sha256_file, write_json, write_npz

SCHEMA_VERSION = 1
RECORDS = "records"  # folder below the sweep's folder

# Rows may stand in one table only when these fields of their records are equal.
COMPARABLE = (
    "reference.id",
    "prompt_set.id",
    "calibration.id",
    "settings.first_scored",
    "settings.ubatch_tokens",
    "settings.threads",
    "versions.metrics",
    "versions.llama_cpp_python",
)


@dataclass(frozen=True)
class Record:
    """One record as read: its data and the path of its file."""

    data: dict[str, Any]
    path: Path

    @property
    def ok(self) -> bool:
        """The case was measured."""
        return self.data["status"] == "ok"

    @property
    def label(self) -> tuple[str, str, str | None]:
        """quant, mode, policy: what a person calls the case."""
        return self.data["quant"], self.data["mode"], self.data["policy"]

    def nll(self) -> np.ndarray:
        """Per-token negative log-likelihood: float64 [n_windows, n_scored], nats.

        Raises UserError when the side file is missing or not the one that was measured.
        """
        path = self.path.with_suffix(".npz")
        if not path.is_file() or sha256_file(path) != self.data["side_file_sha256"]:
            raise UserError(f"{path} is missing or was changed: run the sweep again, it will measure this case anew")
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["nll"]


def record_path(folder: Path, quant: str, mode: str, key: str) -> Path:
    """Where the record of a case is, or would be."""
    return folder / RECORDS / f"{quant}-{mode}-{key[:12]}.json"


def write_record(path: Path, data: dict[str, Any], side: dict[str, np.ndarray]) -> None:
    """Write the per-token values first, then the record that vouches for them; both atomically."""
    if side:
        side_path = path.with_suffix(".npz")
        write_npz(side_path, **side)
        data = {**data, "side_file_sha256": sha256_file(side_path)}
    write_json(path, data)


def read_record(path: Path) -> Record:
    """Raises UserError when the file is damaged or of another version."""
    import json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole record ({error}): delete it and run the sweep again") from error
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has record version {version}, this harness reads {SCHEMA_VERSION}: use that harness")
    return Record(data, path)


def read_records(folder: Path) -> list[Record]:
    """All records of a sweep, oldest first; of two with the same label the newer one.

    Raises UserError when one of them cannot be read.
    """
    records = sorted((read_record(p) for p in (folder / RECORDS).glob("*.json")), key=lambda r: r.data["created_utc"])
    return list({record.label: record for record in records}.values())


def is_done(path: Path, key: str) -> bool:
    """Whether a whole, successful record of this very case is there, with its per-token values."""
    if not path.is_file():
        return False
    try:
        record = read_record(path)
        return record.ok and record.data["key"] == key and bool(record.nll().size)
    except UserError:
        return False


def field(data: dict[str, Any], dotted: str) -> Any:
    """data["a"]["b"] for "a.b"; None where it is absent."""
    value: Any = data
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def first_difference(records: Iterable[dict[str, Any]]) -> tuple[str, Any, Any] | None:
    """The first field of COMPARABLE in which records differ, with both values; None when they all agree.

    The reference has no imatrix: a calibration of None is left out of the comparison.
    """
    records = list(records)
    for name in COMPARABLE:
        values = [field(data, name) for data in records]
        values = [value for value in values if value is not None] if name == "calibration.id" else values
        for value in values[1:]:
            if value != values[0]:
                return name, values[0], value
    return None


def environment(engine: dict[str, str]) -> dict[str, Any]:
    """The machine and the software as they are now. `engine`: what `harness.engine.native.engine_facts` returns."""
    import psutil

    commit, dirty = _git_state()
    return {
        "harness": __version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.node(),
        "cpu": _cpu_name(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **engine,
    }


def utc_now() -> str:
    """ISO 8601 with seconds, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def physical_cores() -> int:
    """Physical cores this process may use: what llama.cpp runs fastest on."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and whether files differ from it; None, None outside a checkout (an installed wheel)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
