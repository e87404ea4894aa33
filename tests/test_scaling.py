"""The schedules of benchmarks/scaling.py against those made by hand, bounds and simpler rules; its plans against
published files."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import large_sweep, scaling
from benchmarks.large_sweep import KEPT, SETUPS, jobs_of, with_setup
from benchmarks.scaling import Took
from benchmarks.schedule import Job, Step, lower_bounds, schedule
from harness.sweep import Sweep


def seconds(jobs: list[Job], n_machines: int, *, shared: bool) -> float:
    return schedule(jobs, n_machines, shared=shared)[0]


def once(name: str, s: float) -> Step:
    return Step(0.0, {name: s}, name)


def test_free_machines_take_the_next_job() -> None:
    """5 and 4 begin; 3 at 4, 3 at 5, 3 at 7, which ends at 10."""
    jobs: list[Job] = [[Step(float(s))] for s in (5, 4, 3, 3, 3)]
    assert [seconds(jobs, n, shared=True) for n in (1, 2, 3, 5, 9)] == [18.0, 10.0, 7.0, 5.0, 5.0]
    assert schedule([], 4, shared=True) == (0.0, [set()])


def test_what_is_made_once_is_waited_for() -> None:
    """Shared: all wait for the imatrix until 10. Their own: each makes it, and the third job finds one."""
    jobs: list[Job] = [[once("imatrix", 10.0), Step(5.0)]] * 3
    assert [seconds(jobs, n, shared=True) for n in (1, 2, 3)] == [25.0, 20.0, 15.0]
    assert [seconds(jobs, n, shared=False) for n in (1, 2, 3)] == [25.0, 20.0, 15.0]
    own_s, caches = schedule([*jobs, [Step(1.0)]], 2, shared=False)
    assert own_s == 20.0
    assert caches == [{"imatrix"}, {"imatrix"}]
    assert schedule(jobs, 1, shared=True, made=caches[:1])[0] == 15.0


def test_the_reference_goes_beside_the_imatrix() -> None:
    """One scores the reference until 28, the other makes the imatrix until 10, quantizes until 15, waits and scores."""
    reference = once("reference", 28.0)
    jobs: list[Job] = [[reference], [once("imatrix", 10.0), Step(5.0), reference, Step(28.0)]]
    assert seconds(jobs, 2, shared=True) == 56.0
    assert seconds(jobs, 1, shared=True) == 71.0
    assert seconds(jobs, 2, shared=False) == 71.0, "the second machine scores a reference of its own"


def test_one_at_a_time_and_only_new_tensors() -> None:
    """The first makes x and y until 9 and scores until 14; the second waits, makes z until 11 and scores until 16."""
    jobs: list[Job] = [
        [Step(0.0, {"x": 6.0, "y": 3.0}, "tensors"), Step(5.0)],
        [Step(0.0, {"y": 3.0, "z": 2.0}, "tensors"), Step(5.0)],
    ]
    assert seconds(jobs, 2, shared=True) == 16.0
    assert seconds(jobs, 2, shared=False) == 14.0
    assert seconds(jobs, 1, shared=True) == seconds(jobs, 1, shared=False) == 21.0
    assert lower_bounds(jobs, 2, shared=True) == {"all work": 10.5, "longest job": 14.0, "one at a time": 11.0}
    assert lower_bounds(jobs, 2, shared=False)["longest job"] == 14.0


def test_what_another_is_making_comes_last() -> None:
    """The first makes x until 6, the second y until 3 and z until 5, waits until 6 for x; both have all three then."""
    pieces = {"x": 6.0, "y": 3.0, "z": 2.0}
    jobs: list[Job] = [[Step(0.0, pieces), Step(1.0)], [Step(0.0, pieces), Step(1.0)]]
    assert seconds(jobs, 2, shared=True) == 7.0
    assert seconds(jobs, 2, shared=False) == 12.0
    assert seconds(jobs, 1, shared=True) == 13.0
    later: list[Job] = [[Step(0.0, pieces)], [Step(1.0, pieces), Step(1.0)]]  # y from 1 to 4, z from 4 to 6
    assert seconds(later, 2, shared=True) == 7.0
    assert lower_bounds(jobs, 2, shared=True) == {"all work": 6.5, "longest job": 7.0, "one at a time": 0.0}


def test_who_asks_first_gets_the_lock_first() -> None:
    """As many machines as jobs: the i-th has the lock after those before it, then scores."""
    rng = random.Random(1)  # noqa: S311
    for _ in range(50):
        pairs = [(rng.uniform(1, 9), rng.uniform(1, 9)) for _ in range(rng.randint(1, 12))]
        jobs: list[Job] = [[Step(locked, {}, "tensors"), Step(free)] for locked, free in pairs]
        ends = [sum(locked for locked, _ in pairs[: i + 1]) + free for i, (_, free) in enumerate(pairs)]
        assert seconds(jobs, len(jobs), shared=True) == pytest.approx(max(ends))
        assert seconds(jobs, len(jobs), shared=False) == pytest.approx(max(map(sum, pairs)))


def test_plain_jobs_are_list_scheduled() -> None:
    """Without anything in common: each job goes to the machine that is free first."""
    rng = random.Random(2)  # noqa: S311
    for _ in range(50):
        n, durations = rng.randint(1, 8), [rng.uniform(1, 9) for _ in range(rng.randint(1, 30))]
        free = [0.0] * n
        for s in durations:
            free[free.index(min(free))] += s
        assert seconds([[Step(s / 2), Step(s / 2)] for s in durations], n, shared=True) == pytest.approx(max(free))


def test_no_schedule_beats_its_bounds() -> None:
    rng = random.Random(3)  # noqa: S311
    for _ in range(200):
        n, jobs = rng.randint(1, 6), [random_job(rng) for _ in range(rng.randint(1, 12))]
        for shared in (True, False):
            took, bounds = seconds(jobs, n, shared=shared), lower_bounds(jobs, n, shared=shared)
            assert took >= max(bounds.values()) - 1e-9, (jobs, n, shared)
            if shared:
                assert took <= lower_bounds(jobs, 1, shared=True)["all work"] + 1e-9, "somebody always works"
            if n == 1:
                assert took == pytest.approx(bounds["all work"]), "one machine does it all, each piece once"


def random_job(rng: random.Random) -> Job:
    tensors = {f"t{i}": float(i + 1) for i in range(6) if rng.random() < 0.5}
    steps = [
        once("imatrix", 4.0),
        once("reference", 7.0),
        Step(rng.uniform(0, 3), tensors, rng.choice(["tensors", None])),
    ]
    return [step for step in steps if rng.random() < 0.8] + [Step(rng.uniform(1, 9))]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return large_sweep.large_sweep(tmp_path_factory.mktemp("large"), 16, 16, "q3_k_m,q4_k_m")


def test_plans_are_those_of_published_files(sweep: Sweep) -> None:
    """Sizes that bartowski's card of Llama-3.1-70B-Instruct prints, in GB; its files have a vocabulary, 8 MB."""
    assert sweep.reference.plan.n_weights == 70_553_706_496
    sizes = {case.plan.quant: case.plan.file_bytes / 1e9 for case in sweep.cases if case.plan.mode == "standard"}
    assert sizes == {"q3_k_m": pytest.approx(34.27, abs=0.015), "q4_k_m": pytest.approx(42.52, abs=0.015)}


def test_jobs_have_the_seconds_of_the_estimates(sweep: Sweep) -> None:
    """One machine that keeps tensors takes what `sweep` itself announces; the reference comes first."""
    whole = with_setup(sweep, KEPT)
    jobs, timing = jobs_of(whole, 0.0)
    assert len(jobs) == len({case.key for case in sweep.cases}) == 5
    assert len(jobs[0]) == 2 and sum(jobs[0][1].pieces.values()) == whole.score_s(whole.reference_case)
    cases_s, made = schedule(jobs, 1, shared=True)
    assert cases_s == pytest.approx(whole.estimate_s - whole.speed_s)
    timing_s, _ = schedule([timing], 1, shared=True, made=made)
    assert whole.speed_s / 8 < timing_s < whole.speed_s
    parts, _ = jobs_of(with_setup(sweep, SETUPS[-1]), 0.0)
    assert len(parts) == 16 * 5
    curves = scaling.simulated(sweep, 1.0)
    assert curves[KEPT.name][0] == pytest.approx((cases_s / 3600, (cases_s + timing_s) / 3600))


def test_tables() -> None:
    curves = {KEPT.name: [(8.0 / n, 8.0 / n + 2.0) for n in scaling.MACHINES], "other": [(4.0, 5.0)] * 7}
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in scaling.hours_table(curves, 0).splitlines()
    ]
    assert lines[0] == ["Machines", KEPT.name, "other"]
    assert lines[4] == ["4", "2.0 h, 4.0, 100 %", "4.0 h, 2.0, 50 %"]
    assert "| 4.0 h, 2.5, 62 %" in scaling.hours_table(curves, 1)
    rounds = {
        "no launcher": [Took(10.0, 2.0), Took(20.0, 3.0), Took(12.0, 1.0)],
        "ray, 1 worker": [Took(20.0, 8.0), Took(30.0, 9.0), Took(36.0, 8.5)],
        "ray, 2 workers": [Took(15.0, 8.0), Took(15.0, 9.0), Took(9.0, 8.5)],
    }
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in scaling.rounds_table(rounds).splitlines()
    ]
    assert lines[2] == ["no launcher", "12.0", "2.00", "-", "-"]
    assert lines[4] == ["ray, 2 workers", "15.0", "8.50", "0.75 (0.75 to 1.50)", "0.50 (0.25 to 0.75)"]
