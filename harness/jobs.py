"""The jobs a sweep is cut into for workers: what each is told, what it takes, where what comes back belongs."""

import os
import platform
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import __version__, cost
from harness.config import Config, parse_shard
from harness.errors import UserError
from harness.passes import layers_path, looked_at, read_layers, read_speed
from harness.paths import user_path
from harness.record import RECORDS
from harness.store import key_of, write_atomic, write_text
from harness.sweep import Case, Sweep
from harness.waves import windows_at_once
from harness.worker import WINDOWS, code_id


@dataclass(frozen=True)
class Job:
    """Cases that are measured together (twins are one file), some windows of them, or their timing.

    kind: cases, windows or timing.
    """

    kind: str
    cases: tuple[Case, ...]
    shard: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        part = f", windows {self.shard}" if self.shard else ""
        return "timing" if self.kind == "timing" else f"{self.cases[0].name}{part}"


def cases_apart(sweep: Sweep) -> list[Job]:
    """A job for each file that is still to be measured, in parts where the settings say so: the reference first, then
    the longest, so that no worker is left with it at the end."""
    open_cases = {case.key: case for case in (*sweep.open_cases, *sweep.layer_cases)}
    first = [case for case in sweep.cases if case.key in open_cases and not sweep.twin(case)]
    first.sort(key=lambda case: (case is not sweep.reference_case, -sum(sweep.steps(case).values())))
    same = {case.key: tuple(other for other in sweep.cases if other.key == case.key) for case in first}
    jobs = [Job("windows" if shard else "cases", same[case.key], shard) for shard in _shards(sweep) for case in first]
    # All parts of the reference first; then the first part of every file, so that each is quantized by another worker.
    return sorted(jobs, key=lambda job: job.cases[0] is not sweep.reference_case)


def _shards(sweep: Sweep) -> list[str | None]:
    shard = sweep.config.measure.shard
    if shard is None:
        return [None]
    part, n_parts = parse_shard(shard, len(sweep.prompts.tokens))
    return [shard] if part else [f"{i}/{n_parts}" for i in range(1, n_parts + 1)]


def order_of(
    sweep: Sweep, configs: Sequence[Config], job: Job, *, token: str, with_imatrix: bool, ends_with_me: bool
) -> dict[str, Any]:
    """What `harness.worker` reads. token: names a file of the cache, by which workers find out whether they share it.
    with_imatrix: hand that back too. ends_with_me: the launcher does not end its jobs when this process ends."""
    return {
        "kind": job.kind,
        "keys": [case.key for case in job.cases],
        "names": [case.name for case in job.cases],
        "configs": [asdict(_absolute(one, sweep, job, worker_folder(sweep, one, job.kind))) for one in configs],
        "with_imatrix": with_imatrix,
        "code": code_id(),
        "version": __version__,
        "engine": sweep.engine_version,
        "token": token,
        "shared": sweep.cache.shared,
        "orderer": {"machine": platform.node(), "pid": os.getpid(), "ends_with_me": ends_with_me},
    }


def errand_path(sweep: Sweep, kind: str) -> Path:
    """Where the name stands under which workers keep what they do for jobs of that kind. It goes when all of it came
    back: an interrupted sweep finds what they kept, and what somebody deletes later is measured anew."""
    return sweep.folder / "jobs" / f"{kind}.txt"


def worker_folder(sweep: Sweep, config: Config, kind: str) -> str:
    """The name of the folder of a worker's cache for these jobs, and for no others: those of the same keys may name
    their texts otherwise, or have other findings. Parts of windows make no records, and find none."""
    path = errand_path(sweep, kind)
    if not path.is_file():
        write_text(path, secrets.token_hex(16))
    inputs = {name: asdict(config)[name] for name in ("model", "prompts", "calibration")}
    return key_of(path.read_bytes().hex(), inputs, kind)[:32]


def _absolute(config: Config, sweep: Sweep, job: Job, folder: str) -> Config:
    """The configuration as it reads in another folder, on a machine with another number of cores."""

    def path(given: str | None) -> str | None:
        return str(user_path(given).absolute()) if given else given

    own_cache = config.runtime.cache_dir or sweep.cache.shared
    return replace(
        config,
        model=replace(config.model, path=path(config.model.path)),
        prompts=replace(config.prompts, path=path(config.prompts.path)),
        calibration=replace(
            config.calibration, path=path(config.calibration.path), imatrix=path(config.calibration.imatrix)
        ),
        policy=replace(config.policy, file=path(config.policy.file)),
        measure=replace(
            config.measure,
            shard=job.shard,
            speed=job.kind == "timing",
            layers=config.measure.layers and job.kind == "cases",
        ),
        runtime=replace(
            config.runtime, threads=sweep.n_threads, cache_dir=str(sweep.cache.folder) if own_cache else None
        ),
        results=replace(config.results, name=folder),
    )


def request_of(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> dict[str, Any]:
    """What a job takes, for conf/launch.yaml: the most that any of them does. folder: for the launcher's own files."""
    passes = [(sweep.prompts.tokens, sweep.prompts.tokens.shape[1] - sweep.first_scored)]
    if sweep.calibration and sweep.calibration.windows:
        tokens = sweep.calibration.windows.tokens
        passes.append((tokens, 2 * tokens.shape[1]))  # llama.cpp holds the logits of a micro-batch twice
    largest_bytes = max(case.plan.file_bytes for case in sweep.cases)
    memory_bytes = max(
        cost.scoring_bytes(
            largest_bytes, rows * sweep.reference.vocab_size, windows_at_once(len(tokens), sweep.n_threads)
        )
        for tokens, rows in passes
    )
    return {
        "cpus": sweep.n_threads,
        "memory_bytes": memory_bytes,
        "memory_gb": -(-memory_bytes // 10**9),
        "minutes": minutes_of(sweep, jobs),
        "folder": str(folder.absolute()),
        "local_cpus": None,
        "local_object_store_bytes": None,
    }


def estimate_s(sweep: Sweep, job: Job) -> float:
    """Estimated seconds of a job with an empty cache."""
    if job.kind == "timing":
        return sweep.speed_s
    return sum(sweep.steps(job.cases[0]).values()) + sweep.imatrix_s


def minutes_of(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """The time limit of each of the jobs."""
    return 30 + int(3 * max((estimate_s(sweep, job) for job in jobs), default=0) / 60)


def is_done(sweep: Sweep, job: Job) -> bool:
    """Whether all that the job makes is here."""
    if job.kind == "timing":
        known = looked_at(read_speed(sweep.folder), sweep.speed_settings)
        return all(case.key in known for case in job.cases)
    if job.shard:
        return of_shard(sweep, job.shard).stored_scores(job.cases[0]) is not None
    wanted = job.cases[:1] if sweep.config.measure.layers and job.cases[0].plan.file_type else ()
    return all(case.done for case in job.cases) and all(read_layers(case.record_path, case.key) for case in wanted)


def of_shard(sweep: Sweep, shard: str | None, **measure: Any) -> Sweep:
    """The sweep with other windows to score; None: all of them. measure: its other settings."""
    return replace(sweep, config=replace(sweep.config, measure=replace(sweep.config.measure, shard=shard, **measure)))


def _may_send(sweep: Sweep, job: Job, name: str) -> bool:
    """Whether a file of that name can come of a job."""
    folder, _, file = name.rpartition("/")
    if job.kind == "timing":
        return re.fullmatch(r"speed/[0-9a-f]{12}\.json", name) is not None
    if job.kind == "windows":
        calibration = sweep.calibration.id if sweep.calibration else ""
        of_case = folder in [f"{WINDOWS}/{case.key}" for case in job.cases]
        return name == f"imatrix/{calibration}.gguf" or (
            of_case and re.fullmatch(r"window_[0-9]{5,9}\.npz", file) is not None
        )
    paths = [case.record_path for case in job.cases]
    records = [path.with_suffix(suffix).name for path in paths for suffix in (".json", ".npz")]
    return (folder == RECORDS and file in records) or (
        folder == "layers" and file in [layers_path(path).name for path in paths]
    )


def store(sweep: Sweep, job: Job, files: dict[str, bytes]) -> None:
    """Put what a job made where this machine would have put it. What is measured here already stays."""
    done = {
        path for case in sweep.cases if case.done for path in (case.record_path, case.record_path.with_suffix(".npz"))
    }
    for name in files:
        if not _may_send(sweep, job, name):
            raise UserError(
                f"a worker sent a file called {name[:100]!r}, which no worker sends: nothing of its job is stored"
            )
    for name, content in files.items():
        kind, _, rest = name.partition("/")
        if kind == "imatrix":
            sweep.cache.make("imatrix", rest.removesuffix(".gguf"), ".gguf", partial(_write, content))
            continue
        path = sweep.cache.folder / "scores" / rest if kind == WINDOWS else sweep.folder / name
        if path not in done:
            write_atomic(path, partial(_write, content))


def _write(content: bytes, target: Path) -> None:
    target.write_bytes(content)
