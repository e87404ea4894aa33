"""What the passes after the scoring leave in a sweep's folder: files beside the records, which never change.

`speed/<id>.json`: one timing pass, its cases timed side by side. `layers/<record>.npz`: errors of the hidden states.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.record_check import is_map, is_number, is_plain, is_positive, is_text
from harness.store import read_json, read_npz, write_json, write_npz

SPEED_VERSION = 1
_SHORTEST_S, _LONGEST_S = 1e-9, 1e9
SPEED_UBATCH_TOKENS = 512  # llama-bench's default


@dataclass(frozen=True)
class Timing:
    """One case in one timing pass, a value a round: seconds to load, to process a prompt, to generate tokens."""

    pass_id: str
    prompt_tokens: int
    generate_tokens: int
    load_s: tuple[float, ...]
    prompt_s: tuple[float, ...]
    generate_s: tuple[float, ...]


@dataclass(frozen=True)
class SpeedPass:
    """One timing pass. cases: by key; skipped: key -> why. other_cpu_share: of the machine's cores, taken by others."""

    id: str
    created_utc: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    other_cpu_share: float
    cases: dict[str, Timing]
    skipped: dict[str, str]


def write_speed(folder: Path, done: SpeedPass) -> Path:
    """One file a pass, named by its id."""
    path = folder / "speed" / f"{done.id}.json"
    cases = {
        key: {"load_s": t.load_s, "prompt_s": t.prompt_s, "generate_s": t.generate_s} for key, t in done.cases.items()
    }
    data = {
        "schema_version": SPEED_VERSION,
        "created_utc": done.created_utc,
        "settings": done.settings,
        "environment": done.environment,
        "other_cpu_share": done.other_cpu_share,
        "cases": cases,
        "skipped": done.skipped,
    }
    write_json(path, data)
    return path


def read_speed(folder: Path) -> list[SpeedPass]:
    """All timing passes of a sweep, oldest first. A file that cannot be read counts as absent."""
    passes = [one for path in (folder / "speed").glob("*.json") if (one := _read_pass(path)) is not None]
    return sorted(passes, key=lambda one: one.created_utc)


def looked_at(passes: Iterable[SpeedPass], settings: dict[str, Any]) -> set[str]:
    """Keys of the cases that were timed with these settings, or left out for a reason that another try would not
    change."""
    return {key for one in passes if one.settings == settings for key in (*one.cases, *one.skipped)}


def machine_of(environment: Mapping[str, Any]) -> tuple[Any, Any]:
    """What tells machines apart: their name and their CPU."""
    return environment.get("machine"), environment.get("cpu")


def of_one_machine(passes: Sequence[SpeedPass], keys: Collection[str]) -> tuple[SpeedPass, ...]:
    """The passes whose speeds may stand in one column: those of the machine that timed most of these cases, of equally
    many that with the newest pass. In the given order."""
    machines: dict[tuple[Any, Any], list[SpeedPass]] = {}
    for one in passes:
        machines.setdefault(machine_of(one.environment), []).append(one)

    def rank(of_machine: list[SpeedPass]) -> tuple[int, str]:
        timed = {key for one in of_machine for key in one.cases if key in keys}
        return len(timed), max(one.created_utc for one in of_machine)

    best = max(machines.values(), key=rank, default=[])
    return tuple(best)


def layers_path(record_path: Path) -> Path:
    """Where the errors of a case's hidden states are, or would be."""
    return record_path.parent.parent / "layers" / record_path.with_suffix(".npz").name


def write_layers(record_path: Path, case_key: str, layers_key: str, layers: np.ndarray, errors: np.ndarray) -> None:
    """layers: int32 [n_layers]; errors: float32 [n_layers, n_windows, n_scored], relative error of each token.
    layers_key: of everything but the variant, so that only like is compared with like."""
    keys = np.array([case_key, layers_key])
    write_npz(layers_path(record_path), keys=keys, layers=layers, errors=errors)


def read_layers(record_path: Path, case_key: str) -> tuple[str, np.ndarray, np.ndarray] | None:
    """layers_key, layers and errors as written; None when they are not there, damaged, or those of another case."""
    found = read_npz(layers_path(record_path))
    if found is None or {"keys", "layers", "errors"} - set(found):
        return None
    keys, layers, errors = found["keys"], found["layers"], found["errors"]
    if keys.shape != (2,) or keys.dtype.kind != "U" or str(keys[0]) != case_key:
        return None
    numbers = layers.dtype.kind == "i" and errors.dtype.kind == "f" and np.isfinite(errors).all()
    whole = numbers and layers.ndim == 1 and errors.ndim == 3 and len(layers) == len(errors) and errors.size
    return (str(keys[1]), layers, errors) if whole else None


def _read_pass(path: Path) -> SpeedPass | None:
    """None when the file, which may be anybody's, is damaged or holds what no pass writes."""
    try:
        data = read_json(path)
        settings, environment = data["settings"], data["environment"]
        numbers = ("prompt_tokens", "generate_tokens", "ubatch_tokens", "threads")
        sound = (
            *(data["schema_version"] == SPEED_VERSION, is_text(path.stem), is_text(data["created_utc"])),
            *(is_map(settings), *(is_positive(settings[name]) for name in numbers)),
            *(isinstance(settings["flash_attention"], bool), is_map(environment)),
            *(is_plain(environment.get("machine")), is_plain(environment.get("cpu"))),
            *(is_number(data["other_cpu_share"]), all(map(is_text, data["skipped"].values()))),
        )
        if not all(sound):
            return None
        sizes = (settings["prompt_tokens"], settings["generate_tokens"])
        cases = {
            key: Timing(path.stem, *sizes, *(tuple(map(float, one[n])) for n in ("load_s", "prompt_s", "generate_s")))
            for key, one in data["cases"].items()
        }
        for timing in cases.values():
            rounds = (timing.load_s, timing.prompt_s, timing.generate_s)
            if len(set(map(len, rounds))) != 1 or len(timing.load_s) < 2:
                return None
            if not all(_SHORTEST_S < s < _LONGEST_S for one in rounds for s in one):
                return None
        share = float(data["other_cpu_share"])
        return SpeedPass(path.stem, data["created_utc"], settings, environment, share, cases, data["skipped"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
