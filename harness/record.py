"""Records: everything measured of one case and everything that moves its numbers, as one JSON file each.

results/README.md documents the fields. The per-token values lie beside the record in an .npz file.
"""

import hashlib
import os
import platform
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness import __version__
from harness.errors import UserError, nearest
from harness.kld_reference import PROBABILITIES
from harness.record_check import record_flaw
from harness.store import read_json, read_npz, sha256_file, write_json, write_npz

SCHEMA_VERSION = 1
_LARGEST_NLL = 700.0  # exp of it is close to the largest float64
RECORDS = "records"  # folder below the sweep's folder

# Without these a file is no record.
REQUIRED = ("key", "status", "quant", "mode", "policy", "created_utc")

# Rows may stand in one table only when these fields of their records are equal.
COMPARABLE = (
    "reference.id",
    "prompt_set.id",
    "prompt_set.n_windows",
    "prompt_set.window_tokens",
    "calibration.id",
    "settings.first_scored",
    "settings.ubatch_tokens",
    "settings.flash_attention",
    "settings.threads",
    "settings.kld_reference",
    "versions.metrics",
    "versions.llama_cpp_python",
)

# Rows that differ in these were still measured on the same tokens against the same reference.
MAY_DIFFER = (
    "calibration.id",
    "settings.ubatch_tokens",
    "settings.flash_attention",
    "settings.threads",
    "settings.kld_reference",
    "versions.llama_cpp_python",
)
_WHEN_ABSENT = {"settings.kld_reference": PROBABILITIES}


class NewerRecordError(UserError):
    """A record that a newer harness wrote: to be kept, not to be measured again."""


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

    @property
    def name(self) -> str:
        """quant-mode[+policy], as `compare` takes it; 'reference' for the reference."""
        quant, mode, policy = self.label
        return mode if mode == "reference" else f"{quant}-{mode_label(mode, policy)}"

    @property
    def flaw(self) -> str | None:
        """What a table cannot use about this record; None when it is sound. A record may be anybody's file."""
        return record_flaw(self.data)

    def per_token(self) -> dict[str, np.ndarray]:
        """Per-token values, [n_windows, n_scored] each: nll and kld float64, nats; top int32, the likeliest token.

        Read once and kept, so read-only. Raises UserError when the side file is missing or not the one that
        was measured.
        """
        return self._per_token

    @cached_property
    def _per_token(self) -> dict[str, np.ndarray]:
        path = self.path.with_suffix(".npz")
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.data.get("side_file_sha256"):
            raise UserError(f"{path} is missing or was changed: run the sweep again, it will measure this case anew")
        arrays = read_npz(content) or {}
        values: dict[str, np.ndarray] = {name: arrays[name] for name in ("nll", "kld", "top") if name in arrays}
        nll = values.get("nll", np.empty(0))
        numbers = all(one.dtype.kind in "fi" and one.shape == nll.shape for one in values.values())
        if nll.ndim != 2 or not nll.size or "top" not in values or not numbers:
            sound = False
        else:
            sound = bool(all(np.isfinite(one).all() for one in values.values()) and nll.mean() <= _LARGEST_NLL)
        if not sound:
            raise UserError(f"{path} holds no per-token values: run the sweep again, it will measure this case anew")
        for value in values.values():
            value.setflags(write=False)
        return values


def mode_label(mode: str, policy: str | None) -> str:
    """'dynamicgate', or 'dynamicgate+mine' when the mode applied a policy of another name."""
    return mode if policy in (None, mode) else f"{mode}+{policy}"


def record_path(folder: Path, quant: str, mode: str, key: str) -> Path:
    """Where the record of a case is, or would be."""
    return folder / RECORDS / f"{quant}-{mode}-{key[:12]}.json"


def record_paths(folder: Path) -> list[Path]:
    """The record files of a sweep, whole or not."""
    return sorted((folder / RECORDS).glob("*.json"))


def write_record(path: Path, data: dict[str, Any], side: dict[str, np.ndarray]) -> None:
    """Write the per-token values first, then the record that vouches for them; both atomically."""
    if side:
        side_path = path.with_suffix(".npz")
        write_npz(side_path, **side)
        data = {**data, "side_file_sha256": sha256_file(side_path)}
    write_json(path, data)


def read_record(path: Path) -> Record:
    """Raises UserError when the file is damaged or of another version, NewerRecordError when of a newer one."""
    try:
        data = read_json(path)
        version = data["schema_version"]
        missing = [name for name in REQUIRED if name not in data]
        if missing and version == SCHEMA_VERSION:
            raise KeyError(missing[0])
        if version == SCHEMA_VERSION and not all(
            isinstance(data[name], str) or (name == "policy" and data[name] is None) for name in REQUIRED
        ):
            raise TypeError(f"one of {', '.join(REQUIRED)} is no text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no whole record ({error}): delete it and run the sweep again") from error
    if version != SCHEMA_VERSION:
        is_newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise (NewerRecordError if is_newer else UserError)(
            f"{path} has record version {version}, this harness reads {SCHEMA_VERSION}: use the harness that wrote it, "
            "or another folder with results.name=NAME"
        )
    return Record(data, path)


def read_records(folder: Path, wanted: Collection[str] = ()) -> list[Record]:
    """All whole records of a sweep, oldest first; of two with one label the one whose key is `wanted`, else the newer.

    What cannot be read counts as absent; `all_records` tells it.
    """

    return newest(all_records(folder)[0], wanted)


def newest(records: Iterable[Record], wanted: Collection[str] = ()) -> list[Record]:
    """Oldest first; of several with one label the one whose key is `wanted`, else the newest."""

    def place(record: Record) -> tuple[bool, str]:
        return record.data["key"] in wanted, record.data["created_utc"]

    return list({record.label: record for record in sorted(records, key=place)}.values())


def all_records(folder: Path) -> tuple[list[Record], list[str]]:
    """The whole records of a sweep, and what is wrong with each file that is none (or has no per-token values)."""
    records, problems = [], []
    for path in record_paths(folder):
        try:
            record = read_record(path)
            if record.ok:
                record.per_token()
            records.append(record)
        except UserError as error:
            problems.append(str(error))
    return records, problems


def in_order(records: Iterable[Record]) -> list[Record]:
    """The reference first, then quants by the size of their standard file, standard before the other modes."""
    records = list(records)
    sizes: dict[str, tuple[bool, int]] = {}
    for record in records:
        quant, mode, _ = record.label
        own = (mode != "standard", record.data["variant"]["file_bytes"])
        sizes[quant] = min(own, sizes.get(quant, own))

    def place(record: Record) -> tuple[Any, ...]:
        quant, mode, policy = record.label
        return mode != "reference", sizes[quant][1], quant, mode != "standard", mode, policy or ""

    return sorted(records, key=place)


def find_record(folder: Path, name: str, sweep_name: str | None = None) -> Record:
    """The measured case that a person calls `name` in the sweeps below `folder`, or the record file of that path.

    Raises UserError when there is none, or several, with what there is.
    """
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise UserError(f"no record at {name}: give a file of a sweep's folder `records`")
        return read_record(Path(name))
    sweeps = [folder / sweep_name] if sweep_name else sorted(path.parent for path in folder.glob(f"*/{RECORDS}"))
    records = [one for sweep in sweeps for one in all_records(sweep)[0] if one.ok]
    found = [record for record in records if record.name == name]
    if not found:
        hint = (
            nearest(name, {record.name for record in records}) if records else " Run a sweep first, or set results.dir."
        )
        raise UserError(f"no measured case {name!r} below {folder}.{hint}")
    names = sorted({record.path.parent.parent.name for record in found})
    if len(names) > 1:
        raise UserError(f"{name} was measured in several sweeps ({', '.join(names)}): say which with results.name=NAME")
    if len(found) > 1:
        paths = ", ".join(str(record.path) for record in found)
        raise UserError(f"several records are called {name}: give the path of one instead ({paths})")
    return found[0]


def is_done(path: Path, key: str) -> bool:
    """Whether a whole, successful record of this very case is there, with its per-token values.

    Raises NewerRecordError on one of a newer harness, which must not be overwritten.
    """
    if not path.is_file():
        return False
    try:
        record = read_record(path)
        return record.ok and record.data["key"] == key and bool(record.per_token())
    except NewerRecordError:
        raise
    except UserError:
        return False


def field(data: dict[str, Any], dotted: str) -> Any:
    """data["a"]["b"] for "a.b"; None where it is absent."""
    value: Any = data
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def first_difference(records: Iterable[dict[str, Any]], allowed: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """The first field of COMPARABLE in which records differ, with both values; None when they all agree.

    The reference has no imatrix, so its calibration is not compared; nor are the `allowed` fields.
    """
    records = list(records)
    for name in (name for name in COMPARABLE if name not in allowed):
        compared = [data for data in records if name != "calibration.id" or data["mode"] != "reference"]
        values = [_WHEN_ABSENT.get(name) if (value := field(data, name)) is None else value for data in compared]
        for value in values[1:]:
            if value != values[0]:
                return name, values[0], value
    return None


def environment(engine: dict[str, Any]) -> dict[str, Any]:
    """The machine and the software as they are now. `engine`: what is known of llama.cpp, see `harness.cpu`."""
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


MACHINE = ("machine", "cpu", "cores_physical", "cores_logical", "memory_bytes", "platform", "system_info")


def machines(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The machines that measured, each once: what of their environments stays the same from case to case."""
    found: list[dict[str, Any]] = []
    for record in records:
        machine = {name: field(record.data, f"environment.{name}") for name in MACHINE}
        if machine not in found:
            found.append(machine)
    return found


def utc_now() -> str:
    """ISO 8601 with microseconds, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


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
