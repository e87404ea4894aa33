"""How a sweep gets faster with more workers: measured on this machine, and simulated for a 70B model.

    python benchmarks/scaling.py measure [--rounds N] [--quant A,B] [--width N] [--out FILE.json] [KEY=VALUE ...]
    python benchmarks/scaling.py simulate [--windows 16] [--cores 16] [--gbit 1] [--plot FILE.png]

measure: one sweep without a launcher and with one and two workers of one thread each, with empty caches, in turn; the
records must be equal. --width: of a random Llama, in place of SmolLM2-135M. KEY=VALUE: settings of the sweeps.
simulate: the jobs of harness.apart in their order, with the seconds of harness.cost and files planned from a header
with the shapes of Llama 3 70B. --gbit: from where a machine with a cache of its own fetches the model.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.common import (  # noqa: E402
    empty_folders,
    in_child,
    machine,
    markdown,
    measured,
    ratio_text,
    run_main,
    say,
    seconds_text,
)
from benchmarks.growth import planned, write_model  # noqa: E402
from benchmarks.large_sweep import KEPT, SETUPS, Setup, jobs_of, large_sweep, with_setup  # noqa: E402
from benchmarks.schedule import Job, lower_bounds, schedule  # noqa: E402
from harness.record import physical_cores, read_records  # noqa: E402
from harness.store import write_json  # noqa: E402
from harness.work import kept_tensors  # noqa: E402

if TYPE_CHECKING:
    from killing import Found

    from harness.sweep import Sweep

MACHINES = (1, 2, 4, 8, 16, 32, 64)
AT_BEST = "bound, kept"
STYLES = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#E69F00", "v"), ("#CC79A7", "D"), ("#000000", "x"))
SCORED = ["mode=standard", "calibration=none", "measure.speed=false", "runtime.threads=1"]
RAY, SUBMITIT = "hydra/launcher=ray", "hydra/launcher=submitit_local"


# --- simulated


Curves = dict[str, list[tuple[float, float]]]  # by setup: for each of MACHINES hours of the cases, and with the timing


def setups(sweep: "Sweep", gbit: float) -> Iterator[tuple[Setup, list[Job], Job]]:
    """Each setup that the number of windows allows, its jobs, and the timing pass."""
    for setup in SETUPS:
        if setup.n_parts <= len(sweep.prompts.tokens):
            copy_s = 0.0 if setup.shared else 8e-9 * sweep.reference.info.file_bytes / gbit
            yield setup, *jobs_of(with_setup(sweep, setup), copy_s)


def simulated(sweep: "Sweep", gbit: float) -> Curves:
    """How long it takes, and after the first what no order could beat there if nobody waited for a lock."""
    curves: Curves = {}
    for setup, jobs, timing in setups(sweep, gbit):
        for n in MACHINES:
            cases_s, made = schedule(jobs, n, shared=setup.shared)
            assert cases_s >= (1 - 1e-9) * max(lower_bounds(jobs, n, shared=setup.shared).values())
            timing_s, _ = schedule([timing], 1, shared=True, made=made[:1])
            curves.setdefault(setup.name, []).append((cases_s / 3600, (cases_s + timing_s) / 3600))
            if setup == KEPT:
                bounds = lower_bounds(jobs, n, shared=True)
                least_s = max(bounds["all work"], bounds["longest job"])
                curves.setdefault(AT_BEST, []).append((least_s / 3600, (least_s + timing_s) / 3600))
    return curves


def hours_table(curves: Curves, part: int) -> str:
    """Hours, speed-up and efficiency; part 0: of the cases, 1: with the timing pass."""
    rows = []
    for i, n in enumerate(MACHINES):
        hours = [curve[i][part] for curve in curves.values()]
        speed_ups = [curves[KEPT.name][0][part] / one for one in hours]
        cells = (f"{h:.1f} h, {s:.1f}, {100 * s / n:.0f} %" for h, s in zip(hours, speed_ups, strict=True))
        rows.append((str(n), *cells))
    return markdown(("Machines", *curves), rows)


def limits_table(sweep: "Sweep", gbit: float, curves: Curves) -> str:
    """Hours that remain with any number of machines, and those of the timing pass after one machine and after many."""
    rows = []
    for setup, jobs, _ in setups(sweep, gbit):
        bounds = lower_bounds(jobs, MACHINES[-1], shared=setup.shared)
        timing = (cases_and_timing - cases for cases, cases_and_timing in (curves[setup.name][i] for i in (0, -1)))
        hours = (bounds["longest job"] / 3600, bounds["one at a time"] / 3600, *timing)
        rows.append((setup.name, *(f"{one:.1f}" for one in hours)))
    after = (f"timing pass, {n} machine{'s' * (n > 1)}" for n in (MACHINES[0], MACHINES[-1]))
    return markdown(("Hours at least", "longest job", "one at a time", *after), rows)


def plot(curves: Curves, path: Path) -> None:
    """Speed-up against machines, without and with the timing pass."""
    from harness.plots import new_figure

    figure = new_figure(4.4)
    axes = figure.subplots(1, 2, sharey=True)
    for part, (axis, title) in enumerate(zip(axes, ("the cases", "the cases and the timing pass"), strict=True)):
        axis.plot(MACHINES, MACHINES, color="#999999", linestyle=":", label="ideal")
        for (name, hours), (colour, marker) in zip(curves.items(), STYLES, strict=False):
            speed_up = [curves[KEPT.name][0][part] / one[part] for one in hours]
            line = "--" if name == AT_BEST else "-"
            axis.plot(MACHINES, speed_up, color=colour, marker=marker, linestyle=line, markersize=5, label=name)
        axis.set(xscale="log", yscale="log", title=title, xlabel="machines")
        axis.set_xticks(MACHINES, [str(n) for n in MACHINES], minor=False)
        axis.set_yticks(MACHINES, [str(n) for n in MACHINES], minor=False)
        axis.minorticks_off()
        axis.grid(color="#DDDDDD", linewidth=0.6)
    axes[0].set_ylabel("speed-up over one machine that keeps tensors")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def simulate(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        sweep = large_sweep(Path(name), args.windows, args.cores)
        curves = simulated(sweep, args.gbit)
        plans = [case.plan for case in sweep.cases if case.plan.file_type]
        kept = {(t.name, t.type): t.n_bytes for plan in plans for t in kept_tensors(plan, sweep.source_types).values()}
    sizes = f"{sum(plan.file_bytes for plan in plans) / 1e9:.0f} GB, their tensors {sum(kept.values()) / 1e9:.0f} GB"
    steps = f"imatrix {sweep.imatrix_s / 60:.0f} min, a scoring {sweep.score_s(sweep.reference_case) / 60:.0f} min"
    print(f"{len(plans)} files of {sizes}; {steps}\n\n{hours_table(curves, 0)}\n\nwith the timing pass:\n")
    print(f"{hours_table(curves, 1)}\n\n{limits_table(sweep, args.gbit, curves)}")
    if args.plot:
        plot(curves, args.plot)


# --- measured


@dataclass(frozen=True)
class Took:
    """Seconds of a sweep, and those until its first case was begun: imports, plans, the launcher, a worker's start."""

    wall_s: float
    start_s: float


def sides() -> dict[str, list[str]]:
    """By name, what the command of each has more. submitit starts as many workers as the cores have room for."""
    cores = physical_cores()
    return {
        "no launcher": [],
        "ray, 1 worker": [RAY, "hydra.launcher.ray.init.num_cpus=1"],
        "ray, 2 workers": [RAY, "hydra.launcher.ray.init.num_cpus=2"],
        "submitit_local, 1 worker": [SUBMITIT, f"hydra.launcher.cpus_per_task={cores}"],
        "submitit_local, 2 workers": [SUBMITIT, f"hydra.launcher.cpus_per_task={max(1, cores // 2)}"],
    }


def sweep_once(folder: Path, overrides: Sequence[str], linked: Sequence[Path]) -> tuple[Took, "Found"]:
    """One sweep in an empty cache: what it took, and its records without timings."""
    from killing import records

    where, results = empty_folders(folder, linked)
    begin = time.time()
    usage = measured([sys.executable, "-m", "harness", "sweep", *overrides, *where], folder / "sweep.log")["whole"]
    begun = min(one.data["environment"]["begun_utc"] for one in read_records(results))
    return Took(usage.wall_s, datetime.fromisoformat(begun).timestamp() - begin), records(results)


def measure(args: argparse.Namespace) -> None:
    from killing import check

    windows = (2, 512) if args.width else (4, 1024)
    command = [f"quant={args.quant}", *SCORED, f"prompts.n_windows={windows[0]}", f"prompts.window_tokens={windows[1]}"]
    rounds: dict[str, list[Took]] = {side: [] for side in sides()}
    truth: Found = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        if args.width:
            in_child(write_model, Path(name), args.width)
            command += [f"model.path={name}/{args.width}.gguf", f"prompts.path={name}/text.txt"]
        command += args.settings
        linked = in_child(planned, command)["linked"]
        for i in range(args.rounds):
            for side, more in list(sides().items())[:: 1 if i % 2 == 0 else -1]:
                say(f"round {i + 1}: {side}")
                took, found = sweep_once(Path(name), [*command, *more], linked)
                truth = truth or found
                if found.keys() != truth.keys():
                    raise SystemExit(f"{side}: not the same records: {sorted(found.keys() ^ truth.keys())}")
                check(found, truth)
                rounds[side].append(took)
    print(f"\nall records are equal\n\n{rounds_table(rounds)}\n")
    if args.out:
        told = {side: [asdict(one) for one in all_of] for side, all_of in rounds.items()}
        write_json(args.out, {"command": command, "environment": in_child(machine), "rounds": told})


def rounds_table(rounds: dict[str, list[Took]]) -> str:
    """Medians; ratios of the rounds to the sweep without a launcher, and of two workers to one."""
    rows = []
    for side, all_of in rounds.items():
        walls = [one.wall_s for one in all_of]
        others = [rounds[name] for name in ("no launcher", side.replace("2 workers", "1 worker"))]
        ratios = [ratio_text(walls, [one.wall_s for one in other]) if other is not all_of else "-" for other in others]
        start_s = statistics.median(one.start_s for one in all_of)
        rows.append((side, seconds_text(statistics.median(walls)), seconds_text(start_s), *ratios))
    return markdown(("Workers", "s", "start, s", "Ratio to no launcher", "Ratio to one worker"), rows)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("measure")
    one.set_defaults(run=measure)
    one.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--quant", default="q4_0,q5_0,q5_1,q8_0")
    one.add_argument("--width", type=int, help="of a Llama of random weights and 8 layers: 512, 1024 ...")
    one.add_argument("--out", type=Path)
    one = parts.add_parser("simulate")
    one.set_defaults(run=simulate)
    one.add_argument("--windows", type=int, default=16, help="of 2048 tokens")
    one.add_argument("--cores", type=int, default=16, help="of each machine")
    one.add_argument("--gbit", type=float, default=1.0, help="a second, to fetch the model")
    one.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
