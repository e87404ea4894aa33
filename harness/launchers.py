"""What Hydra's launchers need before work is given to them: that they are there, reachable, and have the room."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.compose import LAUNCHERS, launcher_settings
from harness.cost import file_size
from harness.errors import UserError, nearest
from harness.record import physical_cores

_EXTRAS = {
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
    "submitit": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
}
_CONNECT_S = 10.0
_HEALTH_S = 30.0
_SBATCH_S = 60.0
_USUAL_REASONS = ("None", "Resources", "Priority", "BeginTime", "JobArrayTaskLimit", "Dependency", "Cleaning")
_OBJECT_STORE_BYTES = 200_000_000  # results are some megabytes


@dataclass(frozen=True)
class Capacity:
    """How many jobs a launcher runs at one time, None where only the queue knows; cores of the machine that times."""

    at_once: int | None
    timing_cpus: int
    queue: str | None = None  # the name of the jobs in SLURM's queue


def launcher_name(overrides: Sequence[str]) -> str | None:
    """The launcher that is asked for; None: cases are measured here, one after another. Raises UserError."""
    chosen = [one.partition("=")[2] for one in overrides if one.startswith("hydra/launcher=")]
    if overrides and not chosen:
        raise UserError(f"{overrides[0]}: say of which launcher with hydra/launcher=")
    if not chosen or chosen[-1] == "basic":
        return None
    if len(chosen) > 1:
        raise UserError("hydra/launcher= is given twice")
    if chosen[0] not in LAUNCHERS:
        raise UserError(f"hydra/launcher={chosen[0]}: the harness knows no such one.{nearest(chosen[0], LAUNCHERS)}")
    return chosen[0]


def job_folder(name: str, folder: Path) -> Path:
    """Where jobs may put their files: SLURM's beside the results, which the nodes see; Ray's machines share nothing."""
    return Path(tempfile.gettempdir()) / "gguf-harness-jobs" if name == "ray" else folder / "jobs"


def exclusive(name: str, capacity: Capacity) -> tuple[str, ...]:
    """Overrides that give a job a machine for itself, whatever the others ask for."""
    cpus = capacity.timing_cpus
    return {
        "ray": (f"hydra.launcher.ray.remote.num_cpus={cpus}",),
        "submitit_slurm": ("++hydra.launcher.additional_parameters.exclusive=true",),
    }.get(name, ())


def ready(name: str, overrides: Sequence[str], request: dict[str, Any]) -> Capacity:
    """Check the launcher, and complete the request of a cluster that is started here.

    Raises UserError when it is not installed, cannot be reached, or has no machine for such a job.
    """
    package, extra = _EXTRAS[name.split("_", maxsplit=1)[0]]
    if find_spec("hydra_plugins") is None or find_spec(package) is None:
        raise UserError(f"hydra/launcher={name} is not installed: pip install 'gguf-harness[{extra}]'")
    if name == "ray":
        return _ray(overrides, request)
    settings = launcher_settings(overrides, request)
    if name == "submitit_slurm":
        if shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=submitit_slurm: there is no sbatch on this machine: run the sweep where jobs are "
                "queued, or try hydra/launcher=submitit_local"
            )
        _require_accepted(settings)
        return Capacity(None, request["cpus"], settings["name"])
    import psutil

    cores, memory = physical_cores(), psutil.virtual_memory().available
    _require_fit([{"CPU": cores, "memory": memory}], request)
    at_once = min(cores // settings["cpus_per_task"], int(memory // max(1, request["memory_bytes"])))
    return Capacity(max(1, at_once), cores)


def _require_accepted(settings: Mapping[str, Any]) -> None:
    """Raises UserError unless SLURM would take such a job: partition, account, and a machine that it fits."""
    flags = {
        "nodes": settings["nodes"],
        "ntasks-per-node": settings["tasks_per_node"],
        "cpus-per-task": settings["cpus_per_task"],
        "mem": f"{int(settings['mem_gb'] * 1024)}M" if settings["mem_gb"] else None,
        "time": settings["timeout_min"],
        **{name: settings[name] for name in ("partition", "qos", "account", "constraint", "exclude")},
        **settings["additional_parameters"],
    }
    given = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value is not None
    ]
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", *given, "--wrap=true"],
            capture_output=True,
            text=True,
            timeout=_SBATCH_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"SLURM does not answer: `sbatch --test-only` took more than {_SBATCH_S:.0f} s") from error
    if done.returncode:
        raise _refused_by_slurm(done.stderr, " ".join(given))


def _refused_by_slurm(said: str, asked: str) -> UserError:
    """What sbatch said, in one line."""
    lines = [re.sub(r"^sbatch: (error: |fatal: )?", "", line).strip() for line in said.splitlines()]
    reasons = "; ".join(line for line in lines if line) or "no reason given"
    if any(words in said.lower() for words in ("configuration source", "slurm controller", "socket timed out")):
        return UserError(f"SLURM does not answer on this machine ({reasons}): run the sweep where sbatch works")
    return UserError(f"SLURM refuses a job of {asked} ({reasons}): change hydra.launcher.SETTING")


def why_queued(queue: str) -> set[str]:
    """Why SLURM lets jobs of that name wait, but for other jobs; none where it does not answer."""
    command = ["squeue", "--me", "--noheader", "--states=PENDING", f"--name={queue}", "--format=%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SBATCH_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {line.strip() for line in done.stdout.splitlines()} - {"", *_USUAL_REASONS}


def _ray(overrides: Sequence[str], request: dict[str, Any]) -> Capacity:
    settings = launcher_settings(overrides, request)["ray"]
    address = settings["init"].get("address") or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    if address in (None, "local"):
        request |= {"local_cpus": physical_cores(), "local_object_store_bytes": _OBJECT_STORE_BYTES}
        settings = launcher_settings(overrides, request)["ray"]
    else:
        _require_reachable(address)
    import ray

    try:
        if not ray.is_initialized():
            ray.init(**settings["init"])
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray at {address or 'this machine'}: {str(error).splitlines()[0]}") from error
    remote = settings["remote"]
    wanted = {"cpus": remote["num_cpus"], "memory_bytes": remote.get("memory") or 0}
    _require_fit(nodes, wanted)
    at_once = sum(
        min(int(node.get("CPU", 0) // wanted["cpus"]), int(node.get("memory", 0) // max(1, wanted["memory_bytes"])))
        for node in nodes
    )
    return Capacity(at_once, int(max(node.get("CPU", 0) for node in nodes)))


def _require_reachable(address: str) -> None:
    """Raises UserError in seconds where Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise UserError(
            f"hydra.launcher.ray.init.address={address}: give HOST:PORT, as `ray start --head` prints, or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"hydra.launcher.ray.init.address={address}: nobody answers there ({error}): start the cluster with "
            "`ray start --head`, or leave the address out"
        ) from error
    if address.startswith("ray://"):
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_HEALTH_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"hydra.launcher.ray.init.address={address}: no Ray cluster answers in {_HEALTH_S:.0f} s: something else "
            "listens there; give the address that `ray start --head` printed"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"hydra.launcher.ray.init.address={address}: Ray does not let this machine in: {reason}")


def _require_fit(nodes: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Raises UserError unless one machine has the cores and the memory of a job."""
    cpus, memory_bytes = wanted["cpus"], wanted["memory_bytes"]
    if not any(node.get("CPU", 0) >= cpus for node in nodes):
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        raise UserError(
            f"a job takes {cpus} cores and no machine has more than {most:.0f}: give runtime.threads={most:.0f}"
        )
    if not any(node.get("CPU", 0) >= cpus and node.get("memory", 0) >= memory_bytes for node in nodes):
        most = max(node.get("memory", 0) for node in nodes)
        raise UserError(
            f"a job takes about {file_size(memory_bytes)} of memory and no machine has more than "
            f"{file_size(int(most))}: give the sweep larger machines"
        )
