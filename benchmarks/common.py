"""What the benchmarks share: commands measured from outside, and tables of two sides in turn."""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from harness.plan import Plan

OUTSIDE = "plans and report"  # what of a sweep is none of the steps that llama.cpp's tools do
_LOOK_S = 0.5
Sample = tuple[float, float, int]  # time in s, CPU seconds until then, resident bytes of all processes
Mark = tuple[float, str]  # time in s, the step that begins


@dataclass(frozen=True)
class Usage:
    """What a step took: seconds, CPU seconds (user and system, of all processes), most resident memory in bytes."""

    wall_s: float
    cpu_s: float
    peak_bytes: int

    def __add__(self, other: "Usage") -> "Usage":
        """Of two steps one after the other."""
        return Usage(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, max(self.peak_bytes, other.peak_bytes))


def measured(
    command: Sequence[str | Path],
    log: Path,
    *,
    step_of: Callable[[str], str | None] = lambda line: None,
    last_step_ended: Callable[[], float | None] = lambda: None,
) -> dict[str, Usage]:
    """Run a command, its output into `log`. Returns what each step took, and the "whole".

    step_of: of a line of its output, the step that begins with it. last_step_ended: when the last of them ended, in
    seconds since the epoch. All processes are looked at twice a second: their resident memory is added up (what two
    share counts twice), and the largest single one counts as the system tells it. Exits when the command fails.
    """
    begin = time.time()
    samples: list[Sample] = [(begin, 0.0, 0)]
    marks: list[Mark] = [(begin, OUTSIDE)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), samples, stop), daemon=True)
    watcher.start()
    try:
        assert process.stdout
        with log.open("w", buffering=1, encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                if step := step_of(line):
                    samples.append(_look(psutil.Process(process.pid)) or samples[-1])
                    marks.append((time.time(), step))
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        stop.set()
        watcher.join()
    end = time.time()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))} ended with {process.returncode}, see {log}:\n{tail(log)}")
    cpu_s = usage.ru_utime + usage.ru_stime
    largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    samples.append((end, cpu_s, 0))
    ended = last_step_ended()
    if ended and len(marks) > 1:
        marks.append((max(ended, marks[-1][0]), OUTSIDE))
    steps = by_step(marks, samples, end)
    peak_bytes = max(largest, *(rss for _, _, rss in samples))
    return {**steps, "whole": Usage(end - begin, cpu_s, peak_bytes)}


def by_step(marks: Sequence[Mark], samples: Iterable[Sample], end: float) -> dict[str, Usage]:
    """What each step took, added up over its marks. CPU seconds between two samples are interpolated."""
    ordered = sorted(samples)
    times, cpu, most = [one[0] for one in ordered], [], 0.0
    for _, seconds, _ in ordered:  # a child that ends between two looks is missing in one of them
        most = max(most, seconds)
        cpu.append(most)

    def cpu_at(when: float) -> float:
        i = bisect_left(times, when)
        if i == 0 or i == len(times):
            return cpu[min(i, len(times) - 1)]
        share = (when - times[i - 1]) / max(times[i] - times[i - 1], 1e-9)
        return cpu[i - 1] + share * (cpu[i] - cpu[i - 1])

    found: dict[str, Usage] = {}
    for (begin, step), after in zip(marks, [*(mark[0] for mark in marks[1:]), end], strict=True):
        peak = max((rss for when, _, rss in ordered if begin <= when <= after), default=0)
        usage = Usage(after - begin, cpu_at(after) - cpu_at(begin), peak)
        found[step] = found[step] + usage if step in found else usage
    return found


def _watch(process: psutil.Process, samples: list[Sample], stop: threading.Event) -> None:
    while not stop.wait(_LOOK_S):
        if sample := _look(process):
            samples.append(sample)


def _look(process: psutil.Process) -> Sample | None:
    """Of a process and those that it started; None when it has just ended."""
    cpu_s, rss = 0.0, 0
    try:
        for one in (process, *process.children(recursive=True)):
            with one.oneshot():
                cpu_s += sum(one.cpu_times()[:4])  # of itself and of its children that ended
                rss += one.memory_info().rss
    except psutil.Error:
        return None
    return time.time(), cpu_s, rss


def empty_folders(folder: Path, linked: Iterable[Path] = ()) -> tuple[list[str], Path]:
    """Overrides for a sweep with an empty cache, but for links to these folders of another, and where its results will
    be. What stood there is removed."""
    cache, results = folder / "cache", folder / "results"
    for one in (cache, results):
        shutil.rmtree(one, ignore_errors=True)
    cache.mkdir()
    for one in linked:
        if one.is_dir():
            (cache / one.name).symlink_to(one)
    where = [f"runtime.cache_dir={cache}", f"results.dir={results}", "results.name=sweep"]
    return where, results / "sweep"


def step_of_sweep(line: str) -> str | None:
    """The step that a line of `python -m harness sweep` begins."""
    for start, middle, step in (
        ("imatrix: ", "", "imatrix"),
        ("reference: ", "", "reference"),
        ("", ": quantizing (", "quantize"),
        ("", ": scoring (", "score"),
    ):
        if line.startswith(start) and middle in line and line.rstrip().endswith(" left)"):
            return step
    return None


def last_record(folder: Path) -> float | None:
    """When the last record of a sweep was written: then its scoring has ended."""
    return max((path.stat().st_mtime for path in (folder / "records").glob("*.json")), default=None)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own: what it imports and reads is no memory of ours,
    which the system would count as that of the commands that we start."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def say(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def seconds_text(seconds: float) -> str:
    """'0.12', '12.3'."""
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def ratio_text(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """'0.52 (0.50 to 0.55)': the median of the rounds' ratios, and the smallest and largest one."""
    if len(ours) != len(theirs) or not all(theirs):
        return "-"
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def compared(ours: Sequence[Usage], theirs: Sequence[Usage]) -> tuple[str, ...]:
    """Cells: median seconds of both sides and their ratio, the same for CPU seconds, most memory of both in MB.
    Without `theirs` their cells are empty."""
    cells: list[str] = []
    for name in ("wall_s", "cpu_s"):
        a, b = ([getattr(one, name) for one in side] for side in (ours, theirs))
        cells += [*(seconds_text(statistics.median(side)) if side else "-" for side in (a, b)), ratio_text(a, b)]
    return *cells, *(f"{max(one.peak_bytes for one in side) / 1e6:.0f}" if side else "-" for side in (ours, theirs))


def unique_share(plans: Sequence["Plan"], source_types: Mapping[str, str]) -> float:
    """Share of the estimated seconds of quantizing that is left when each tensor is quantized once into each type."""
    from harness.work import quantizing_s

    named = {str(i): plan for i, plan in enumerate(plans)}
    once_s, often_s = (
        sum(quantizing_s(named, source_types, (), 1, keeps_tensors=keeps).values()) for keeps in (True, False)
    )
    return once_s / often_s


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """A script's `main`, with what a user can mend as one line and exit code 2."""
    from harness.errors import UserError

    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def machine() -> dict[str, Any]:
    """The computer and the time, for files of results."""
    from harness.record import environment, utc_now

    return {**environment({}), "utc": utc_now()}


def tail(log: Path) -> str:
    """Its last lines."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
