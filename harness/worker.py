"""What one job of a sweep does, on whatever machine: a case measured, a part of its windows scored, or the timing.

A job is a sweep of its own with fewer cases. It resolves its inputs itself, by sha256, and hands its files back, so it
needs no disk in common with whoever ordered it. Orders and outcomes are plain JSON values.
"""

import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import __version__
from harness.artefacts import ensure_imatrix, ensure_variant
from harness.compose import config_from
from harness.config import Config
from harness.errors import EngineError, UserError, disk_error
from harness.isolate import TERMINATED
from harness.measure import window_path
from harness.passes import layers_path, looked_at, read_speed
from harness.paths import cache_dir
from harness.prepare import prepare
from harness.progress import ProgressDisplay
from harness.record import RECORDS
from harness.run import engine_of, remove_variant, run, time_cases
from harness.store import key_of
from harness.sweep import Sweep

APART = "apart"  # folder of the cache with the results of jobs
TOKENS = "shared"  # folder of the cache by which machines find out whether they share it
WINDOWS = "windows"


class RefusalError(UserError):
    """This machine would measure something else, or spoil what others do."""


def work(orders: Sequence[dict[str, Any]], job: Any) -> dict[str, Any]:
    """Do the order of that number. Returns its outcome: `machine`; `files`, their bytes by name; `failures`, a line
    each; `refused`, why this machine must not do it; `lost`, why it could not.
    """
    order = orders[job.job]
    outcome: dict[str, Any] = {"machine": platform.node(), "files": {}, "failures": [], "refused": None, "lost": None}
    if order["orderer"]["machine"] == platform.node() and order["orderer"]["ends_with_me"]:
        threading.Thread(target=_end_with, args=(order["orderer"]["pid"],), daemon=True).start()
    try:
        _require_alike(order)
        configs = [config_from(plain) for plain in order["configs"]]
        _require_shared(cache_dir(configs[0]), order)
        sweep = _sweep_of(configs, order)
        outcome["failures"] = _do(sweep, order)
        outcome["files"] = _files(sweep, order)
    except RefusalError as error:
        outcome["refused"] = str(error)
    except UserError as error:  # no room, no model: another machine may have both
        outcome["lost"] = str(error)
    except EngineError as error:
        outcome["failures"] = [f"{', '.join(order['names'])}: {error.with_log}; the same command tries again"]
    except OSError as error:
        outcome["lost"] = disk_error(error)
    if any(TERMINATED in line for line in outcome["failures"]):  # a queue stops every process of a job, children too
        outcome.update(failures=[], lost="the job was ended from outside")
    return outcome


@cache
def code_id() -> str:
    """Of the harness' own code: workers of another one would measure something else."""
    package = Path(__file__).resolve().parent
    files = sorted(package.rglob("*.py"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return key_of(__version__, [path.relative_to(package).as_posix() for path in files], hashes)[:12]


def _require_alike(order: dict[str, Any]) -> None:
    """Raises RefusalError on another harness or llama-cpp-python."""
    engine = version("llama-cpp-python")
    if order["engine"] != engine:
        raise RefusalError(
            f"it has llama-cpp-python {engine} and the sweep was started with {order['engine']}: install that one"
        )
    if order["code"] != code_id():
        raise RefusalError(
            f"it has harness {__version__} ({code_id()}) and the sweep was started with {order['version']} "
            f"({order['code']}): install the same one on every machine"
        )


def _require_shared(folder: Path, order: dict[str, Any]) -> None:
    """Raises RefusalError where machines share a cache and do not say so, or the other way round."""
    other, there = order["orderer"]["machine"], (folder / TOKENS / order["token"]).is_file()
    if order["shared"] and not there:
        raise RefusalError(
            f"runtime.shared_cache=true, but {folder} is not the cache of {other}: mount it, or leave "
            "runtime.shared_cache out, then each machine has its own"
        )
    if there and not order["shared"] and other != platform.node():
        raise RefusalError(
            f"{folder} is the cache of {other} as well: say runtime.shared_cache=true, or give each its own"
        )


def _sweep_of(configs: list[Config], order: dict[str, Any]) -> Sweep:
    """The sweep of the order's cases. Raises RefusalError unless they are those that were ordered."""
    for config in configs:
        config.results.dir = str(cache_dir(config) / APART)
    whole = prepare(configs, lambda text: print(text, flush=True))
    wanted = [case for case in whole.cases if case.key in order["keys"]]
    if missing := set(order["keys"]) - {case.key for case in wanted}:
        raise RefusalError(
            f"{len(missing)} of {len(order['keys'])} cases are not the same here: a model, a text, an imatrix or "
            f"llama-cpp-python ({whole.engine_version}) differs from that of {order['orderer']['machine']}"
        )
    kept = {case.key: case for case in (whole.reference_case, *wanted)}
    cases = tuple(case for case in whole.cases if case.key in kept)
    return replace(whole, cases=cases)


def _do(sweep: Sweep, order: dict[str, Any]) -> list[str]:
    from rich.console import Console

    console = Console(file=sys.stdout, force_terminal=False, width=200, soft_wrap=True)
    with ProgressDisplay(console, sweep.estimate_s) as display:
        if order["kind"] != "timing":
            _make_files(sweep, display)
            return run(sweep, display)
        known = looked_at(read_speed(sweep.folder), sweep.speed_settings)
        cases = [case for case in sweep.cases if case.key in order["keys"] and case.key not in known]
        if cases and sweep.to_quantize:
            ensure_imatrix(sweep, display)
        failures = time_cases(sweep, cases, engine_of(sweep), display)
        for case in sweep.cases:
            remove_variant(sweep, case)
        return failures


def _make_files(sweep: Sweep, display: ProgressDisplay) -> None:
    """Quantize before the reference is needed: somebody else may be scoring it. What fails here fails again in `run`,
    which records it."""
    with suppress(EngineError):
        if sweep.to_quantize:
            ensure_imatrix(sweep, display)
        for case in sweep.to_quantize:
            ensure_variant(sweep, case, display)


def _files(sweep: Sweep, order: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of what the job made, by name below the sweep's folder; windows by key of their case."""
    paths: dict[str, Path] = {}
    wanted = [case for case in sweep.cases if case.key in order["keys"]]
    if order["kind"] == "timing":
        keys = set(order["keys"])
        paths = {
            f"speed/{one.id}.json": sweep.folder / "speed" / f"{one.id}.json"
            for one in read_speed(sweep.folder)
            if one.settings == sweep.speed_settings and keys & {*one.cases, *one.skipped}
        }
    elif order["kind"] == "windows":
        for case in wanted:
            for i in sweep.shard_windows:
                path = window_path(sweep.windows_folder(case), i)
                paths[f"{WINDOWS}/{case.key}/{path.name}"] = path
        if order["with_imatrix"] and sweep.calibration and sweep.imatrix_path:
            paths[f"imatrix/{sweep.calibration.id}.gguf"] = sweep.imatrix_path
    else:
        for case in wanted:
            for path in (case.record_path.with_suffix(".npz"), case.record_path):
                paths[f"{RECORDS}/{path.name}"] = path
            if sweep.config.measure.layers:
                layers = layers_path(case.record_path)
                paths[f"layers/{layers.name}"] = layers
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def _end_with(pid: int) -> None:
    """Whoever ordered the work runs on this machine: without it nobody wants the result."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait()
    time.sleep(0.1)
    os._exit(1)
