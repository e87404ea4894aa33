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
    cache. With a `lock` one machine at a time does such a step, of those that share a cache. Without one, each piece is
    made by one machine at a time: what another is making comes last, as in harness.quantize."""

    fixed_s: float
    pieces: Mapping[Any, float] = field(default_factory=dict)
    lock: str | None = None


Job = Sequence[Step]


def schedule(
    jobs: Iterable[Job], n_machines: int, *, shared: bool, made: Sequence[Iterable[Any]] = ()
) -> tuple[float, list[set[Any]]]:
    """Seconds until all jobs are done, and the pieces in each cache then; `made`: those that are there before.

    A free machine takes the next job; who waits for a lock or for pieces waits with its machine.
    """
    jobs = [[part for step in job for part in _parts(step)] for job in jobs]
    caches = [set(one) for one in made] or [set() for _ in range(1 if shared else n_machines)]
    queue, tick = iter(jobs), itertools.count()
    left: list[Iterator[Step]] = [iter(()) for _ in range(n_machines)]
    held: set[Any] = set()
    waiting: dict[Any, deque[tuple[int, Step]]] = defaultdict(deque)
    events: list[tuple[float, int, int, Step]] = []
    for_pieces: dict[int, list[tuple[int, Step]]] = defaultdict(list)

    def begin(machine: int, step: Step, now: float) -> None:
        cache, lock = 0 if shared else machine, (0 if shared else machine, step.lock)
        if step.pieces and not step.lock:
            begin_piece(machine, step, now, cache)
            return
        if step.lock and lock in held:
            waiting[lock].append((machine, step))
            return
        if step.lock:
            held.add(lock)
        seconds = step.fixed_s + sum(s for piece, s in step.pieces.items() if piece not in caches[cache])
        heapq.heappush(events, (now + seconds, next(tick), machine, step))

    def begin_piece(machine: int, step: Step, now: float, cache: int) -> None:
        missing = [piece for piece in step.pieces if piece not in caches[cache]]
        free = next((piece for piece in missing if (cache, piece) not in held), None)
        if free is not None:  # that one, then what is left of the step
            held.add((cache, free))
            one = Step(0.0, {free: step.pieces[free]})
            left[machine] = itertools.chain([step], left[machine])
            heapq.heappush(events, (now + step.pieces[free], next(tick), machine, one))
        elif missing:
            for_pieces[cache].append((machine, step))
        else:
            go_on(machine, now)

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
        if step.pieces and not step.lock:
            held.difference_update((cache, piece) for piece in step.pieces)
            for other, waits in for_pieces.pop(cache, []):
                begin(other, waits, now)
        if waiting[lock]:
            begin(*waiting[lock].popleft(), now)
        go_on(machine, now)
    return now, caches


def _parts(step: Step) -> list[Step]:
    """A step whose pieces have locks of their own: first what is nobody else's."""
    if not step.pieces or step.lock or not step.fixed_s:
        return [step]
    return [Step(step.fixed_s), Step(0.0, step.pieces)]


def lower_bounds(jobs: Sequence[Job], n_machines: int, *, shared: bool) -> dict[str, float]:
    """Seconds that no order of these jobs can beat: all of the work divided by the machines, the longest job with what
    it has to wait for (pieces without a lock may be made by as many machines as there are), and what only one machine
    at a time can do."""
    steps = [step for job in jobs for step in job]
    pieces = {name: s for step in steps for name, s in step.pieces.items()}
    by_lock: dict[str | None, float] = defaultdict(float)
    for name, fixed_s in ((step.lock, step.fixed_s) for step in steps if step.lock):
        by_lock[name] += fixed_s
    for lock, s in {name: (step.lock, s) for step in steps for name, s in step.pieces.items() if step.lock}.values():
        by_lock[lock] += s
    longest = 0.0
    for job in jobs:
        end = 0.0
        for step in job:
            made_s = sum(step.pieces.values())  # by anybody, but one after the other
            if shared and step.pieces and not step.lock:
                made_s = max(*step.pieces.values(), made_s / n_machines)
            end = (max(end, made_s) if shared else end + made_s) + step.fixed_s
        longest = max(longest, end)
    total = sum(step.fixed_s for step in steps) + sum(pieces.values())
    one_by_one = max(by_lock.values(), default=0.0) if shared else 0.0
    return {"all work": total / n_machines, "longest job": longest, "one at a time": one_by_one}
