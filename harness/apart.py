"""Gives a sweep's jobs to a cluster or a queue through one of Hydra's launchers.

First the reference and every case, in whatever order the workers take them; then, alone on one machine, the timing.
What comes back is stored as if it had been measured here.
"""

import platform
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harness.compose import launch
from harness.config import Config
from harness.errors import UserError, some
from harness.jobs import (
    Job,
    cases_apart,
    errand_path,
    estimate_s,
    is_done,
    minutes_of,
    of_shard,
    order_of,
    request_of,
    store,
    worker_folder,
)
from harness.launchers import Capacity, exclusive, job_folder, launcher_name, ready, why_queued
from harness.progress import ProgressDisplay
from harness.run import run
from harness.store import write_text
from harness.sweep import Sweep
from harness.worker import APART, TOKENS, work

_POLL_S = 2.0
_QUEUE_POLL_S = 20.0


def run_apart(sweep: Sweep, configs: Sequence[Config], overrides: Sequence[str], display: ProgressDisplay) -> list[str]:
    """Do all that is left to do through the launcher of the overrides. Returns one line for each case that failed.

    Raises UserError when the launcher cannot be used, or a worker may not do its part.
    """
    name = launcher_name(overrides)
    if sweep.finished or name is None:
        return run(sweep, display)
    jobs = cases_apart(sweep)
    request = request_of(sweep, jobs, job_folder(name, sweep.folder))
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
        for folder in (sweep.folder / "jobs", job_folder(name, sweep.folder)):
            shutil.rmtree(folder, ignore_errors=True)
    return failures


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
                store(self.sweep, job, outcome["files"])
                failures |= dict.fromkeys(f"{outcome['machine']}: {line}" for line in outcome["failures"])
                if outcome["refused"]:
                    refused = f"{outcome['machine']}: {outcome['refused']}"
                elif outcome["lost"]:
                    lost[job] = f"{outcome['machine']}: {outcome['lost']}"
            if refused:
                raise UserError(refused)
            left = [job for job in lost if not is_done(self.sweep, job)]
            if not left:
                if not failures:
                    self._forget(jobs[0].kind)
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
        overrides, request = self.overrides, {**self.request, "minutes": minutes_of(self.sweep, jobs)}
        if jobs[0].kind == "timing":
            request["cpus"] = self.capacity.timing_cpus
            overrides += exclusive(self.name, self.capacity)
        orders = [
            order_of(
                self.sweep,
                self.configs,
                job,
                token=token,
                with_imatrix=job is jobs[-1],
                ends_with_me=self.name == "submitit_local",  # Ray and SLURM know how to end their jobs
            )
            for job in jobs
        ]
        at_once = self.capacity.at_once or len(jobs)
        queued = len(jobs) if self.name != "submitit_local" else at_once  # that one starts all that it gets
        seconds = sum(estimate_s(self.sweep, job) for job in jobs) / at_once
        names = some([job.name for job in jobs], 3)
        with (
            self.display.step(f"{self.name}: {names}", seconds) as on_progress,
            _watch(self.sweep, jobs, on_progress),
            self._queue_watched(),
        ):
            for number, outcome in launch(overrides, request, len(jobs), partial(work, orders), queued):
                yield jobs[number], outcome

    def _forget(self, kind: str) -> None:
        """All of these jobs came back: let nobody find again what this machine's workers kept of them."""
        for config in self.configs:
            shutil.rmtree(self.sweep.cache.folder / APART / worker_folder(self.sweep, config, kind), ignore_errors=True)
        errand_path(self.sweep, kind).unlink(missing_ok=True)

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


def _why_lost(error: Any) -> str:
    """In a few words what Ray or submitit say in many lines."""
    text = str(error).strip()
    if job := re.match(r"Job (\S+) [^\n]*\nhas not produced any output \(state: ([^)]*)\)", text):
        return f"job {job[1]} ended as {job[2]}"
    return text.splitlines()[0] if text else repr(error)


def _join(sweep: Sweep, display: ProgressDisplay) -> list[str]:
    """Make the records of the cases whose windows are all there."""
    whole = of_shard(sweep, None, speed=False, layers=False)
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
    n_windows = len(of_shard(sweep, jobs[0].shard).shard_windows)
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
