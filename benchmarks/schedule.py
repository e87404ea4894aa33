"""When jobs are done that free machines take in order, some of whose parts are made once for all. Pure."""

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """A part of a job: seconds, and pieces (seconds by name) that whoever needs them first makes for all who share his
    cache. With a `lock` one machine at a time does such a step, of those that share a cache. Pieces need a lock."""

    fixed_s: float
    pieces: Mapping[Any, float] = field(default_factory=dict)
    lock: str | None = None


Job = Sequence[Step]


def schedule(
    jobs: Iterable[Job], n_machines: int, *, shared: bool, made: Sequence[Iterable[Any]] = ()
) -> tuple[float, list[set[Any]]]:
    """Seconds until all jobs are done, and the pieces in each cache then; `made`: those that are there before.

    A free machine takes the next job; who waits for a lock waits in line, and its machine with it.
    """
    caches = [set(one) for one in made] or [set() for _ in range(1 if shared else n_machines)]
    queue, tick = iter(jobs), itertools.count()
    left: list[Iterator[Step]] = [iter(()) for _ in range(n_machines)]
    held: set[Any] = set()
    waiting: dict[Any, deque[tuple[int, Step]]] = defaultdict(deque)
    events: list[tuple[float, int, int, Step]] = []

    def begin(machine: int, step: Step, now: float) -> None:
        cache, lock = 0 if shared else machine, (0 if shared else machine, step.lock)
        if step.lock and lock in held:
            waiting[lock].append((machine, step))
            return
        if step.lock:
            held.add(lock)
        seconds = step.fixed_s + sum(s for piece, s in step.pieces.items() if piece not in caches[cache])
        heapq.heappush(events, (now + seconds, next(tick), machine, step))

    def go_on(machine: int, now: float) -> None:
        while (step := next(left[machine], None)) is None:
            if (job := next(queue, None)) is None:
                return
            left[machine] = iter(job)
        begin(machine, step, now)

    for machine in range(n_machines):
        go_on(machine, 0.0)
    now = 0.0
    while events:
        now, _, machine, step = heapq.heappop(events)
        cache, lock = 0 if shared else machine, (0 if shared else machine, step.lock)
        caches[cache].update(step.pieces)
        held.discard(lock)
        if waiting[lock]:
            begin(*waiting[lock].popleft(), now)
        go_on(machine, now)
    return now, caches


def lower_bounds(jobs: Sequence[Job], n_machines: int, *, shared: bool) -> dict[str, float]:
    """Seconds that no order of these jobs can beat: all of the work divided by the machines, the longest job with what
    it has to wait for, and what only one machine at a time can do."""
    steps = [step for job in jobs for step in job]
    pieces = {name: s for step in steps for name, s in step.pieces.items()}
    by_lock: dict[str | None, float] = defaultdict(float)
    for name, fixed_s in ((step.lock, step.fixed_s) for step in steps if step.lock):
        by_lock[name] += fixed_s
    for lock, s in {name: (step.lock, s) for step in steps for name, s in step.pieces.items()}.values():
        by_lock[lock] += s
    longest = 0.0
    for job in jobs:
        end = 0.0
        for step in job:
            made_s = sum(step.pieces.values())  # by anybody, but one after the other
            end = (max(end, made_s) if shared else end + made_s) + step.fixed_s
        longest = max(longest, end)
    total = sum(step.fixed_s for step in steps) + sum(pieces.values())
    one_by_one = max(by_lock.values(), default=0.0) if shared else 0.0
    return {"all work": total / n_machines, "longest job": longest, "one at a time": one_by_one}
