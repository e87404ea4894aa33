"""A sweep as jobs of their own, given to a cluster or a queue through one of Hydra's launchers.

First the reference and every case, in whatever order the workers take them; then, alone on one machine, the timing.
What comes back is stored as if it had been measured here.
"""

import os
import platform
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import __version__, cost
from harness.compose import launch
from harness.config import Config, parse_shard
from harness.errors import UserError, some
from harness.launchers import Capacity, exclusive, job_folder, launcher_name, ready, why_queued
from harness.passes import layers_path, looked_at, read_layers, read_speed
from harness.paths import user_path
from harness.progress import ProgressDisplay
from harness.record import RECORDS
from harness.run import run
from harness.store import key_of, write_atomic, write_text
from harness.sweep import Case, Sweep
from harness.worker import APART, TOKENS, WINDOWS, code_id, work

_POLL_S = 2.0
_QUEUE_POLL_S = 20.0


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


def run_apart(sweep: Sweep, configs: Sequence[Config], overrides: Sequence[str], display: ProgressDisplay) -> list[str]:
    """Do all that is left to do through the launcher of the overrides. Returns one line for each case that failed.

    Raises UserError when the launcher cannot be used, or a worker may not do its part.
    """
    name = launcher_name(overrides)
    if sweep.finished or name is None:
        return run(sweep, display)
    jobs = cases_apart(sweep)
    request = {**_request(sweep, name), "minutes": _minutes(sweep, jobs)}
    capacity = ready(name, overrides, request)
    crew = _Crew(sweep, configs, name, tuple(overrides), request, capacity, display)
    with _token(sweep) as token:
        failures = crew.give(jobs, token)
        if (sweep.config.measure.shard or "").startswith("all/"):
            failures += _join(sweep, display)
        timed = tuple(case for case in sweep.speed_cases if case.done)
        if timed and sweep.reference_case.done:
            failures += crew.give([Job("timing", timed)], token)
    if not failures:
        shutil.rmtree(job_folder(name, sweep.folder), ignore_errors=True)
    return failures


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


@dataclass(frozen=True)
class _Crew:
    """Whom a sweep's jobs are given to."""

    sweep: Sweep
    configs: Sequence[Config]
    name: str
    overrides: tuple[str, ...]
    request: dict[str, Any]
    capacity: Capacity
    display: ProgressDisplay

    def give(self, jobs: Sequence[Job], token: str) -> list[str]:
        """Have the jobs done and store what comes back; what a lost worker had is given to another, within limits."""
        if not jobs:
            return []
        left = list(jobs)
        failures: dict[str, None] = {}  # in order, each once: every job of a broken reference tells of it
        for attempt in range(self.sweep.config.runtime.retries + 1):
            lost, refused = {}, None
            for job, outcome in self._outcomes(left, token):
                if not isinstance(outcome, dict):
                    lost[job] = _why_lost(outcome)
                    continue
                _store(self.sweep, job, outcome["files"])
                failures |= dict.fromkeys(f"{outcome['machine']}: {line}" for line in outcome["failures"])
                if outcome["refused"]:
                    refused = f"{outcome['machine']}: {outcome['refused']}"
                elif outcome["lost"]:
                    lost[job] = f"{outcome['machine']}: {outcome['lost']}"
            if refused:
                raise UserError(refused)
            left = [job for job in lost if not _is_done(self.sweep, job)]
            if not left:
                return list(failures)
            again = "; once more" if attempt < self.sweep.config.runtime.retries else ""
            for job in left:
                self.display.say(f"warning: {job.name} was lost ({lost[job]}){again}")
        given_up = [
            f"{one.name} was lost {attempt + 1} times ({lost[one]}); the same command tries again" for one in left
        ]
        return [*failures, *given_up]

    def _outcomes(self, jobs: Sequence[Job], token: str) -> Iterator[tuple[Job, Any]]:
        """Each job as it ends, and its outcome or what was raised."""
        overrides, request = self.overrides, {**self.request, "minutes": _minutes(self.sweep, jobs)}
        if jobs[0].kind == "timing":
            request["cpus"] = self.capacity.timing_cpus
            overrides += exclusive(self.name, self.capacity)
        orders = [self._order(job, token, with_imatrix=job is jobs[-1]) for job in jobs]
        at_once = self.capacity.at_once or len(jobs)
        queued = len(jobs) if self.name != "submitit_local" else at_once  # that one starts all that it gets
        seconds = sum(_estimate_s(self.sweep, job) for job in jobs) / at_once
        names = some([job.name for job in jobs], 3)
        with (
            self.display.step(f"{self.name}: {names}", seconds) as on_progress,
            _watch(self.sweep, jobs, on_progress),
            self._queue_watched(),
        ):
            for number, outcome in launch(overrides, request, len(jobs), partial(work, orders), queued):
                yield jobs[number], outcome

    @contextmanager
    def _queue_watched(self) -> Iterator[None]:
        """Say why jobs wait in SLURM's queue, where it is not for others to end; and that they stay after a Ctrl-C."""
        queue, said = self.capacity.queue, set[str]()

        def look() -> None:
            for reason in why_queued(queue) - said if queue else ():
                said.add(reason)
                self.display.say(f"warning: SLURM lets jobs wait: {reason} (squeue -n {queue})")

        try:
            with _every(_QUEUE_POLL_S if queue else None, look):
                yield
        except KeyboardInterrupt:
            if queue:
                self.display.say(f"jobs in SLURM's queue go on; to end them: scancel -n {queue}")
            raise

    def _order(self, job: Job, token: str, *, with_imatrix: bool) -> dict[str, Any]:
        """What `harness.worker` reads."""
        sweep = self.sweep
        return {
            "kind": job.kind,
            "keys": [case.key for case in job.cases],
            "names": [case.name for case in job.cases],
            "configs": [asdict(_absolute(one, sweep, job, _folder_name(sweep, one, job))) for one in self.configs],
            "with_imatrix": with_imatrix,
            "code": code_id(),
            "version": __version__,
            "engine": sweep.engine_version,
            "token": token,
            "shared": sweep.cache.shared,
            "orderer": {
                "machine": platform.node(),
                "pid": os.getpid(),
                "ends_with_me": self.name == "submitit_local",  # Ray and SLURM know how to end their jobs
            },
        }


def _folder_name(sweep: Sweep, config: Config, job: Job) -> str:
    """Where a worker keeps what it measures for this sweep, and for no other: those of the same keys may name their
    texts otherwise, or have other findings. Parts of windows make no records, and find none."""
    inputs = {name: asdict(config)[name] for name in ("model", "prompts", "calibration")}
    return key_of(str(sweep.folder.absolute()), sweep.reference_case.key, inputs, job.kind)[:32]


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


def _why_lost(error: Any) -> str:
    """In a few words what Ray or submitit say in many lines."""
    text = str(error).strip()
    if job := re.match(r"Job (\S+) [^\n]*\nhas not produced any output \(state: ([^)]*)\)", text):
        return f"job {job[1]} ended as {job[2]}"
    return text.splitlines()[0] if text else repr(error)


def _request(sweep: Sweep, name: str) -> dict[str, Any]:
    """What a job takes, for conf/launch.yaml: the most that any of them does."""
    rows = sweep.prompts.tokens.shape[1] - sweep.first_scored
    memory_bytes = cost.scoring_bytes(
        max(case.plan.file_bytes for case in sweep.cases), rows * sweep.reference.vocab_size
    )
    return {
        "cpus": sweep.n_threads,
        "memory_bytes": memory_bytes,
        "memory_gb": -(-memory_bytes // 10**9),
        "folder": str(job_folder(name, sweep.folder).absolute()),
        "local_cpus": None,
        "local_object_store_bytes": None,
    }


def _estimate_s(sweep: Sweep, job: Job) -> float:
    if job.kind == "timing":
        return sweep.speed_s
    return sum(sweep.steps(job.cases[0]).values()) + sweep.imatrix_s


def _minutes(sweep: Sweep, jobs: Sequence[Job]) -> int:
    return 30 + int(3 * max((_estimate_s(sweep, job) for job in jobs), default=0) / 60)


def _is_done(sweep: Sweep, job: Job) -> bool:
    if job.kind == "timing":
        known = looked_at(read_speed(sweep.folder), sweep.speed_settings)
        return all(case.key in known for case in job.cases)
    if job.shard:
        return _of_shard(sweep, job.shard).stored_scores(job.cases[0]) is not None
    wanted = job.cases[:1] if sweep.config.measure.layers and job.cases[0].plan.file_type else ()
    return all(case.done for case in job.cases) and all(read_layers(case.record_path, case.key) for case in wanted)


def _of_shard(sweep: Sweep, shard: str | None, **measure: Any) -> Sweep:
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


def _store(sweep: Sweep, job: Job, files: dict[str, bytes]) -> None:
    """Put what a job made where this machine would have put it. What is measured here already stays."""
    done = {
        path for case in sweep.cases if case.done for path in (case.record_path, case.record_path.with_suffix(".npz"))
    }
    for name, content in files.items():
        if not _may_send(sweep, job, name):
            raise UserError(
                f"a worker sent a file called {name[:100]!r}, which no worker sends: nothing of it is stored"
            )
        kind, _, rest = name.partition("/")
        if kind == "imatrix":
            sweep.cache.make("imatrix", rest.removesuffix(".gguf"), ".gguf", partial(_write, content))
            continue
        path = sweep.cache.folder / "scores" / rest if kind == WINDOWS else sweep.folder / name
        if path not in done:
            write_atomic(path, partial(_write, content))


def _write(content: bytes, target: Path) -> None:
    target.write_bytes(content)


def _join(sweep: Sweep, display: ProgressDisplay) -> list[str]:
    """Make the records of the cases whose windows are all there."""
    whole = _of_shard(sweep, None, speed=False, layers=False)
    waiting = [case for case in whole.cases if not case.done and not whole.twin(case)]
    there = {case.key for case in waiting if whole.stored_scores(case) is not None}
    there |= {case.key for case in whole.cases if case.done}  # a twin may still want its record
    missing = [case.name for case in waiting if case.key not in there]
    cases = tuple(case for case in whole.cases if case.key in there)
    failures = [f"windows are still missing of {some(missing)}: the same command goes on there"] if missing else []
    if whole.reference_case not in cases:
        return failures
    return failures + run(replace(whole, cases=cases), display)


@contextmanager
def _token(sweep: Sweep) -> Iterator[str]:
    """The name of a file in the cache by which workers find out whether they see the same one."""
    token = secrets.token_hex(8)
    path = sweep.cache.folder / TOKENS / token
    write_text(path, f"{platform.node()}\n")
    try:
        yield token
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _watch(sweep: Sweep, jobs: Sequence[Job], on_progress: Callable[[float], None]) -> Iterator[None]:
    """Report the share of the windows that are scored, as far as this machine sees the cache of the workers."""
    n_windows = len(_of_shard(sweep, jobs[0].shard).shard_windows)
    before = {job: _n_scored(sweep, job) for job in jobs}

    def look() -> None:
        n_new = sum(min(n_windows, max(0, _n_scored(sweep, job) - before[job])) for job in jobs)
        on_progress(min(0.99, n_new / (n_windows * len(jobs))))

    with _every(_POLL_S, look):
        yield


@contextmanager
def _every(seconds: float | None, look: Callable[[], None]) -> Iterator[None]:
    """Have a thread call `look` while the block runs; None: never."""
    if seconds is None:
        yield
        return
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _n_scored(sweep: Sweep, job: Job) -> int:
    """Windows of a job in the cache. A case whose record is made has none left there and counts as whole."""
    case = job.cases[0]
    if any((sweep.cache.folder / APART).glob(f"*/records/{case.record_path.name}")):
        return len(sweep.prompts.tokens)
    return len(list(sweep.windows_folder(case).glob("window_*.npz")))
