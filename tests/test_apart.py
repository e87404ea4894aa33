"""A sweep whose cases are measured by workers: on Ray, by submitit, in parts, on machines that share nothing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from killing import check, records

from harness import apart, isolate, launchers, worker
from harness.compose import compose, launch, launcher_settings
from harness.errors import UserError
from harness.jobs import Job, cases_apart, request_of, store
from harness.passes import read_speed
from harness.prepare import prepare
from harness.record import RECORDS
from harness.store import Cache
from harness.sweep import Sweep

Cli = Callable[..., tuple[int, str, str]]
REQUEST = {
    "cpus": 2,
    "memory_bytes": 3_000_000_000,
    "memory_gb": 3,
    "minutes": 45,
    "folder": "/jobs",
    "local_cpus": 2,
    "local_object_store_bytes": 10**8,
}


def settings(overrides: list[str], folder: Path) -> list[str]:
    """The overrides with one thread, and cache and results below `folder`."""
    own = [f"runtime.cache_dir={folder / 'cache'}", f"results.dir={folder / 'results'}", "runtime.threads=1"]
    return [one for one in overrides if not one.startswith(("runtime.", "results.dir"))] + own


def swept(folder: Path, *arguments: str, code: int = 0) -> str:
    """A sweep in a process of its own, as users start it. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "harness", "sweep", *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def truth(tiny_gguf: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the reference and two files, each under two names, measured one after another in one process."""
    from conftest import _overrides

    folder = tmp_path_factory.mktemp("truth")
    swept(folder, *QUANTS, *settings(_overrides(tiny_gguf, texts, folder), folder))
    return folder / "results" / "tiny"


QUANTS = ("quant=q4_k_s,q8_0", "mode=standard,dynamicgate")  # the policy changes nothing here: twins


def same_results(one: Path, other: Path) -> None:
    """Equal records, timings aside."""
    found, expected = records(one), records(other)
    assert len(expected) == 5 and found.keys() == expected.keys()
    check(found, expected)


# --- with real launchers


@pytest.mark.parametrize("launcher", ["ray", "submitit_local"])
def test_workers_measure_what_one_process_measures(
    launcher: str, truth: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    own = settings(tiny_overrides, tmp_path)
    speed = ["measure.speed=true", "measure.speed_rounds=3", "measure.generate_tokens=2"]
    local = ["hydra.launcher.ray.init.num_cpus=2"] if launcher == "ray" else []
    out = swept(
        tmp_path, *QUANTS, *[one for one in own if "speed" not in one], *speed, f"hydra/launcher={launcher}", *local
    )
    folder = tmp_path / "results" / "tiny"
    same_results(folder, truth)
    assert "Q4_K_S" in out
    (timed,) = (json.loads(path.read_text()) for path in (folder / "speed").glob("*.json"))
    assert len(timed["cases"]) == 3, "all in one pass, twins once"
    assert not (folder / "jobs").exists() and not list((tmp_path / "cache" / "shared").iterdir())
    (machine,) = json.loads((folder / "machine.json").read_text())
    assert machine["machine"] == socket.gethostname()
    again = swept(tmp_path, *QUANTS, *[one for one in own if "speed" not in one], *speed, f"hydra/launcher={launcher}")
    assert "everything is there" in again


@pytest.mark.skipif(shutil.which("sbatch") is None or not os.environ.get("HARNESS_TEST_SLURM"), reason="no SLURM queue")
def test_a_slurm_queue_measures_what_one_process_measures(
    truth: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    swept(tmp_path, *QUANTS, *settings(tiny_overrides, tmp_path), "hydra/launcher=submitit_slurm")
    same_results(tmp_path / "results" / "tiny", truth)


def test_parts_of_the_windows_are_joined(truth: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    swept(
        tmp_path, *QUANTS, *settings(tiny_overrides, tmp_path), "measure.shard=all/2", "hydra/launcher=submitit_local"
    )
    same_results(tmp_path / "results" / "tiny", truth)


def test_a_worker_that_is_killed_is_replaced(truth: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    arguments = [*QUANTS, *settings(tiny_overrides, tmp_path), "hydra/launcher=submitit_local"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "harness", "sweep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    victim = None
    for _ in range(600):
        time.sleep(0.05)
        if workers := _workers_of(sweep.pid, tmp_path):
            victim = workers[0]
            os.kill(victim, signal.SIGKILL)
            break
    out, _ = sweep.communicate(timeout=600)
    assert victim is not None and sweep.returncode == 0, out
    assert "was lost" in out and "once more" in out
    same_results(tmp_path / "results" / "tiny", truth)


def _workers_of(pid: int, folder: Path) -> list[int]:
    """Processes below `pid` that submitit started for a job which has begun to write into the cache's `apart`."""
    import psutil

    if not (folder / "cache" / "apart").exists() and not list((folder / "cache" / "logs").glob("reference*")):
        return []
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if any("submitit.core._submit" in part for part in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


# --- two machines: processes with folders of their own


def test_machines_that_share_nothing_are_merged_by_report(
    truth: Path, tiny_overrides: list[str], tmp_path: Path, cli: Cli
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "harness", "sweep", f"quant={quant}", QUANTS[1], *settings(tiny_overrides, folder)],
            stdout=subprocess.DEVNULL,
        )
        for folder, quant in ((one, "q4_k_s"), (other, "q8_0"))
    ]
    assert [process.wait(600) for process in running] == [0, 0]
    folders = [one / "results" / "tiny", other / "results" / "tiny"]
    for folder in folders:
        assert [entry["machine"] for entry in json.loads((folder / "machine.json").read_text())] == [
            socket.gethostname()
        ]
    code, out, err = cli("report", *(f"results={folder}" for folder in folders), f"out={tmp_path / 'all'}")
    assert code == 0, err
    assert "Q8_0" in out and "Q4_K_S" in out
    merged = tmp_path / "merged" / RECORDS
    merged.mkdir(parents=True)
    for folder in folders:
        for path in (folder / RECORDS).iterdir():
            shutil.copy(path, merged)
    same_results(merged.parent, truth)


def test_parts_that_are_scored_by_hand_are_joined_by_the_whole_sweep(
    truth: Path, tiny_overrides: list[str], tmp_path: Path, cli: Cli
) -> None:
    """Two machines, each with its own cache; the folder `scores` of both is put together, as docs/scaling.md says."""
    for part, name in (("1/2", "one"), ("2/2", "other")):
        code, out, err = cli("sweep", *QUANTS, *settings(tiny_overrides, tmp_path / name), f"measure.shard={part}")
        assert code == 0 and f"part {part} of the windows is scored" in out, err
        assert not records(tmp_path / name / "results" / "tiny")
    shutil.copytree(tmp_path / "other" / "cache" / "scores", tmp_path / "one" / "cache" / "scores", dirs_exist_ok=True)
    code, out, err = cli("sweep", *QUANTS, *settings(tiny_overrides, tmp_path / "one"))
    assert code == 0 and ": scoring (" not in out, err
    same_results(tmp_path / "one" / "results" / "tiny", truth)


# --- bad input, before anything slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra/launcher=rai"], r"hydra/launcher=rai: the harness knows no such one\. Did you mean ray"),
        (["hydra.launcher.partition=x"], r"say of which launcher with hydra/launcher="),
        (["hydra/launcher=ray", "hydra/launcher=ray"], r"hydra/launcher= is given twice"),
        (["hydra.sweep.dir=x"], r"hydra\.sweep\.dir=x: of Hydra's own settings only"),
        (["hydra/launcher=submitit_local", "hydra.launcher.partitoin=x"], r"partitoin"),
        (
            ["hydra/launcher=ray", "hydra.launcher.ray.init.address=127.0.0.1:1"],
            r"127\.0\.0\.1:1: nobody answers there",
        ),
        (["hydra/launcher=submitit_slurm"], r"there is no sbatch on this machine"),
        (["measure.shard=all/2"], r"measure\.shard=all/2 needs hydra/launcher=ray"),
        (["measure.shard=3/2"], r"measure\.shard=3/2: give PART/PARTS"),
        (["measure.shard=0/2"], r"measure\.shard=0/2: give PART/PARTS"),
        (["measure.shard=1/3"], r"at most as many parts as windows \(2\)"),
        (["measure.shard=half"], r"measure\.shard=half: give PART/PARTS"),
        (["measure.shard=1/2", "measure.layers=true"], r"measure\.layers=true compares whole cases"),
        (["measure.shard=1/2", "measure.kld_reference=hidden"], r"cannot be joined with measure\.kld_reference=hidden"),
        (["runtime.retries=-1"], r"runtime\.retries=-1: give 0 to 20"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    folder = world.folder / "results" / "tiny"
    before = records(folder)
    code, _, err = world.cli("sweep", "quant=q4_0", "mode=standard", *world.settings, *arguments)
    assert code == 2 and err.count("\n") == 1, err
    assert re.search(message, err), err
    check(records(folder), before)


@pytest.mark.parametrize(
    ("launcher", "extra"), [("ray", "ray"), ("submitit_local", "slurm"), ("submitit_slurm", "slurm")]
)
def test_a_launcher_that_is_not_installed_says_how(launcher: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda name: None if "launcher" in name else find_spec(name))
    with pytest.raises(UserError, match=rf"is not installed: pip install 'gguf-harness\[{extra}\]'"):
        launchers.ready(launcher, [f"hydra/launcher={launcher}"], dict(REQUEST))


def test_a_job_that_fits_no_machine_is_refused_before_it_is_placed() -> None:
    nodes = [{"CPU": 8.0, "memory": 10e9}, {"CPU": 64.0, "memory": 20e9}, {"memory": 1e12}]
    launchers._require_fit(nodes, {"cpus": 64, "memory_bytes": 20_000_000_000})
    with pytest.raises(UserError, match=r"takes 65 cores and no machine has more than 64: give runtime\.threads=64"):
        launchers._require_fit(nodes, {"cpus": 65, "memory_bytes": 1})
    with pytest.raises(UserError, match=r"takes about 20\.1 GB of memory and no machine has more than"):
        launchers._require_fit(nodes, {"cpus": 64, "memory_bytes": 20_100_000_000})


def test_a_server_that_is_no_ray_cluster_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself tries for more than five minutes."""
    monkeypatch.setattr(launchers, "_HEALTH_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"address={address}: no Ray cluster answers in 1 s: something else"):
            launchers._require_reachable(address)


# --- what is asked of a queue


SBATCH = """#!/bin/sh
echo "$@" > "$0.said"
echo "sbatch: error: invalid partition specified: nope" >&2
echo "allocation failure: Invalid partition name specified" >&2
exit $(cat "$0.code")
"""  # the words of sbatch 22.05.8


def test_a_job_that_slurm_would_refuse_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code = tmp_path / "sbatch.code"
    code.write_text("1")
    asked = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=nope"]
    with pytest.raises(UserError, match=r"--partition=nope \(invalid partition specified: nope; allocation failure: "):
        launchers.ready("submitit_slurm", asked, dict(REQUEST))
    assert (tmp_path / "sbatch.said").read_text().split() == [
        *("--test-only", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=3072M", "--time=45"),
        *("--partition=nope", "--wrap=true"),
    ]
    code.write_text("0")
    more = [*asked, "+hydra.launcher.additional_parameters.exclusive=true"]
    assert launchers.ready("submitit_slurm", more, dict(REQUEST)).queue == "gguf-harness"
    assert "--exclusive --wrap" in (tmp_path / "sbatch.said").read_text()


def test_a_machine_without_a_queue_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    said = ["error: fetch_config: DNS SRV lookup failed", "fatal: Could not establish a configuration source"]
    sbatch.write_text("#!/bin/sh\n" + "".join(f"echo 'sbatch: {line}' >&2\n" for line in said) + "exit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    why = r"^SLURM does not answer on this machine \(fetch_config: .*; Could not establish a configuration source\)"
    with pytest.raises(UserError, match=why):
        launchers.ready("submitit_slurm", ["hydra/launcher=submitit_slurm"], dict(REQUEST))


def test_reasons_to_wait_that_others_do_not_end_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nprintf 'Priority\\nPartitionTimeLimit\\nResources\\nPartitionTimeLimit\\n'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launchers.why_queued("x") == set(), "no squeue that works"
    squeue.chmod(0o755)
    assert launchers.why_queued("x") == {"PartitionTimeLimit"}


def test_requests_come_from_the_plan_and_from_the_user() -> None:
    slurm = launcher_settings(["hydra/launcher=submitit_slurm", "hydra.launcher.partition=big"], REQUEST)
    assert (slurm["cpus_per_task"], slurm["mem_gb"], slurm["timeout_min"]) == (2, 3, 45)
    assert slurm["partition"] == "big" and slurm["submitit_folder"] == "/jobs/%j"
    ray = launcher_settings(["hydra/launcher=ray", "hydra.launcher.ray.remote.num_cpus=7"], REQUEST)
    assert ray["ray"]["remote"]["num_cpus"] == 7 and ray["ray"]["remote"]["memory"] == 3_000_000_000


def test_memory_of_a_job_is_its_file_the_logits_and_the_rest(sweep: Sweep) -> None:
    request = request_of(sweep, cases_apart(sweep), Path("x"))
    largest = max(case.plan.file_bytes for case in sweep.cases)
    n_logits = 2 * sweep.config.calibration.window_tokens * 310  # more than the prompts' 63, of 310 tokens
    assert request["memory_bytes"] == int(largest + 1.3 * 4 * n_logits + 200e6) and request["cpus"] == 1
    assert request["memory_gb"] == 1, "rounded up"


@pytest.fixture
def sweep(tiny_overrides: list[str], tmp_path: Path) -> Sweep:
    """Two standard files and the reference, nothing measured."""
    return prepare(configs(tiny_overrides, tmp_path), print)


def configs(tiny_overrides: list[str], folder: Path) -> list[Any]:
    return compose(["quant=q4_k_s,q8_0", "mode=standard", *settings(tiny_overrides, folder)])


def test_the_reference_is_first_and_then_the_longest(sweep: Sweep) -> None:
    jobs = cases_apart(sweep)
    assert jobs[0].cases == (sweep.reference_case,)
    seconds = [sum(sweep.steps(job.cases[0]).values()) for job in jobs[1:]]
    assert len(jobs) == 3 and seconds == sorted(seconds, reverse=True)


# --- lost workers, without a cluster


def test_what_others_did_is_kept_when_a_worker_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through submitit's own launcher: Hydra's plugin stops at the first job that is lost."""
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)  # for slow file systems

    def die_if_first(job: Any) -> dict[str, int]:
        if job.job == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"job": job.job}

    request = {**REQUEST, "folder": str(tmp_path), "cpus": 1}
    ended = dict(launch(["hydra/launcher=submitit_local"], request, 2, die_if_first, 2))
    assert ended[1] == {"job": 1}
    assert re.fullmatch(r"job \d+ ended as \w+", apart._why_lost(ended[0])), ended[0]


def test_the_words_for_a_lost_job() -> None:
    said = "Job 7_0 (task: 0) with path /x/7_0_0_result.pkl\nhas not produced any output (state: CANCELLED by 0)\nmore"
    assert apart._why_lost(RuntimeError(said)) == "job 7_0 ended as CANCELLED by 0"
    assert apart._why_lost(RuntimeError("The worker died\nand more")) == "The worker died"
    assert apart._why_lost(RuntimeError()) == "RuntimeError()"


def test_a_job_that_a_queue_ends_is_lost_and_has_not_failed(
    sweep: Sweep, crew: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM sends SIGTERM to all processes of a job, and the engine's dies of it first."""
    real, seen = worker._do, []

    def ended(*args: Any) -> list[str]:
        seen.append(args)
        died = f"reference failed: {isolate._cause_of_death(-signal.SIGTERM)}; see its record"
        return [died] if len(seen) == 1 else real(*args)

    monkeypatch.setattr(worker, "_do", ended)
    failures, said = crew(Cluster(0))
    assert failures == [] and all(case.done for case in sweep.cases)
    assert len(said) == 1 and "ended from outside); once more" in said[0]


class Cluster:
    """Runs orders in this process, after the first of them were lost: a stand-in for harness.compose.launch."""

    def __init__(self, lost: int, unlucky: list[str] | None = None) -> None:
        self.lost, self.unlucky = lost, unlucky
        self.launched: list[list[str]] = []
        self.folders: set[str] = set()

    def __call__(
        self, _overrides: Any, _request: Any, n_jobs: int, work: Callable[[Any], Any], _at_once: int
    ) -> Iterator[tuple[int, Any]]:
        for i in range(n_jobs):
            self.launched.append(work.args[0][i]["names"])
            self.folders |= {config["results"]["name"] for config in work.args[0][i]["configs"]}
            lost = len(self.launched) <= self.lost or work.args[0][i]["names"] == self.unlucky
            yield i, RuntimeError("node preempted\nand more") if lost else work(SimpleNamespace(job=i))


@pytest.fixture
def crew(
    sweep: Sweep, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Measure the sweep on a cluster of a kind: what failed, and what was said."""

    def measure(cluster: Any, of: Sweep = sweep) -> tuple[list[str], list[str]]:
        from rich.console import Console

        from harness.progress import ProgressDisplay

        said: list[str] = []
        display = ProgressDisplay(Console(quiet=True), 1.0)
        monkeypatch.setattr(display, "say", said.append)
        monkeypatch.setattr(apart, "launch", cluster)
        monkeypatch.setattr(apart, "ready", lambda *_: launchers.Capacity(1, 1))
        ordered = [replace(one, measure=of.config.measure) for one in configs(tiny_overrides, tmp_path)]
        failures = apart.run_apart(of, ordered, ["hydra/launcher=ray"], display)
        return failures, said

    return measure


def test_a_lost_job_is_given_to_another(crew: Callable[..., Any], sweep: Sweep) -> None:
    cluster = Cluster(1)
    failures, said = crew(cluster)
    assert failures == [] and all(case.done for case in sweep.cases)
    assert said == ["warning: reference was lost (node preempted); once more"]
    assert len(cluster.launched) == 4 and cluster.launched[0] == cluster.launched[3] == ["reference"]


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device", "/cache/x"), UserError("no room for it")])
def test_a_machine_without_a_disk_loses_its_job_to_another(
    trouble: Exception, crew: Callable[..., Any], sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    do, calls = worker._do, []

    def fail_first(*arguments: Any) -> list[str]:
        calls.append(arguments)
        if len(calls) == 1:
            raise trouble
        return do(*arguments)

    monkeypatch.setattr(worker, "_do", fail_first)
    failures, (said,) = crew(Cluster(0))
    assert failures == [] and len(calls) == 4 and all(case.done for case in sweep.cases)
    assert said.startswith("warning: reference was lost") and any(why in said for why in ("No space left", "no room"))


def test_what_is_measured_is_timed_later(crew: Callable[..., Any], sweep: Sweep, tiny_overrides: list[str]) -> None:
    """By a machine that has the records only: it makes the imatrix and the files anew."""
    assert crew(Cluster(0))[0] == []
    for kind in ("imatrix", "variants", "tensors"):
        shutil.rmtree(sweep.cache.folder / kind)
    speed = replace(sweep.config.measure, speed=True, speed_rounds=3, generate_tokens=2)
    cluster = Cluster(0)
    failures, _ = crew(cluster, replace(sweep, config=replace(sweep.config, measure=speed)))
    assert failures == [] and cluster.launched == [["reference", "q4_k_s standard", "q8_0 standard"]]
    (timed,) = read_speed(sweep.folder)
    assert set(timed.cases) == {case.key for case in sweep.cases}
    assert not list((sweep.cache.folder / "variants").glob("*.gguf"))


def test_a_job_that_is_always_lost_is_given_up_and_the_others_are_kept(crew: Callable[..., Any], sweep: Sweep) -> None:
    cluster = Cluster(0, unlucky=["q8_0 standard"])
    failures, said = crew(cluster)
    assert failures == ["q8_0 standard was lost 3 times (node preempted); the same command tries again"]
    assert [case.done for case in sweep.cases] == [True, True, False] and len(said) == 3
    assert len(cluster.launched) == 5, "what is done is not given away again"
    failures, _ = crew(Cluster(0))
    assert failures == [] and all(case.done for case in sweep.cases), "a rerun completes it"


def test_what_workers_kept_is_found_until_all_of_it_came_back(crew: Callable[..., Any], sweep: Sweep) -> None:
    """A worker's cache may be on another machine, where nobody deletes what is deleted here."""
    stopped, resumed, anew = Cluster(0, unlucky=["q8_0 standard"]), Cluster(0), Cluster(0)
    crew(stopped)
    crew(resumed, replace(sweep))
    assert resumed.launched == [["q8_0 standard"]] and resumed.folders == stopped.folders
    assert not list((sweep.cache.folder / worker.APART).iterdir()) and not (sweep.folder / "jobs").exists()
    sweep.cases[1].record_path.unlink()
    crew(anew, replace(sweep))
    assert anew.launched == [["q4_k_s standard"]] and sweep.cases[1].done
    assert anew.folders.isdisjoint(stopped.folders)


def test_a_deleted_timing_is_done_again(crew: Callable[..., Any], sweep: Sweep) -> None:
    speed = replace(sweep.config.measure, speed=True, speed_rounds=3, generate_tokens=2)
    timed = replace(sweep, config=replace(sweep.config, measure=speed))
    clusters, begun = [Cluster(0), Cluster(0)], []
    for cluster in clusters:
        assert crew(cluster, replace(timed))[0] == []
        begun += [path.read_bytes() for path in (sweep.folder / "speed").iterdir()]
        shutil.rmtree(sweep.folder / "speed")
    assert clusters[1].launched == clusters[0].launched[-1:] and clusters[0].folders.isdisjoint(clusters[1].folders)
    assert len(set(begun)) == 2, "rounds that were run twice, not a file that was found"


def test_a_sweep_whose_jobs_are_all_lost_says_so(
    tiny_overrides: list[str], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        apart, "launch", lambda _o, _r, n_jobs, _w, _n: ((i, RuntimeError("gone")) for i in range(n_jobs))
    )
    monkeypatch.setattr(apart, "ready", lambda *_: launchers.Capacity(1, 1))
    own = [*settings(tiny_overrides, tmp_path), "hydra/launcher=submitit_slurm", "runtime.retries=0"]
    code, _, err = cli("sweep", "quant=q8_0", "mode=standard", *own)
    assert code == 1
    assert err.splitlines() == [
        f"error: {name} was lost 1 times (gone); the same command tries again"
        for name in ("reference", "q8_0 standard")
    ]


def test_another_harness_is_refused_by_the_worker(
    crew: Callable[..., Any], sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.jobs.code_id", lambda: "0123456789ab")
    with pytest.raises(UserError, match=r"it has harness .* and the sweep was started with .* \(0123456789ab\)"):
        crew(Cluster(0))
    assert not any(case.done for case in sweep.cases)


def test_another_engine_is_refused_by_the_worker(
    crew: Callable[..., Any], sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "version", lambda name: {"llama-cpp-python": "0.3.1"}[name])
    with pytest.raises(UserError, match=r"it has llama-cpp-python 0\.3\.1 and the sweep was started with 0\.3\.36"):
        crew(Cluster(0))


def test_other_inputs_are_refused_by_the_worker(crew: Callable[..., Any], sweep: Sweep) -> None:
    other = replace(
        sweep, cases=tuple(replace(case, key="0" * 64) if case.plan.file_type else case for case in sweep.cases)
    )
    with pytest.raises(UserError, match=r"1 of 2 cases are not the same here: .*llama-cpp-python"):
        crew(Cluster(0), other)


def test_a_cache_that_is_not_shared_though_it_is_said_to_be(tmp_path: Path) -> None:
    order = {"token": "t", "shared": True, "orderer": {"machine": "elsewhere"}}
    with pytest.raises(UserError, match=r"runtime\.shared_cache=true, but .* is not the cache of elsewhere: mount it"):
        worker._require_shared(tmp_path, order)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "t").touch()
    worker._require_shared(tmp_path, order)
    with pytest.raises(UserError, match=r"is the cache of elsewhere as well: say runtime\.shared_cache=true"):
        worker._require_shared(tmp_path, {**order, "shared": False})
    worker._require_shared(tmp_path, {**order, "shared": False, "orderer": {"machine": socket.gethostname()}})


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "records/../../x.json",
        "records/a/b.json",
        "records/.x.json",
        "x.json",
        "logs/x.json",
        "records/x.sh",
        "windows/ab/x.npz",
    ],
)
def test_a_worker_cannot_write_elsewhere(name: str, sweep: Sweep, tmp_path: Path) -> None:
    for job in (*cases_apart(sweep), Job("windows", sweep.cases, "1/2"), Job("timing", sweep.cases)):
        with pytest.raises(UserError, match="which no worker sends"):
            store(sweep, job, {name: b"x"})
    assert not list(tmp_path.rglob("x.*"))


def test_a_worker_cannot_answer_for_another_case(sweep: Sweep) -> None:
    reference, one, other = sweep.cases
    jobs = (Job("cases", (one,)), Job("windows", (one,), "1/2"))
    names = (f"{RECORDS}/{other.record_path.name}", f"windows/{other.key}/window_00000.npz", "imatrix/other.gguf")
    for job in jobs:
        for name in names:
            with pytest.raises(UserError, match="which no worker sends"):
                store(sweep, job, {name: b"x"})
    store(sweep, jobs[0], {f"{RECORDS}/{one.record_path.name}": b"x"})
    assert one.record_path.read_bytes() == b"x" and not reference.record_path.exists()


def test_what_is_measured_here_stays(finished_sweep: Path, world: Any) -> None:
    done = prepare(compose(["quant=q8_0", "mode=standard", *world.settings]), print)
    case = done.cases[-1]
    before = case.record_path.read_bytes()
    store(done, Job("cases", (case,)), {f"records/{case.record_path.name}": b"{}"})
    assert case.record_path.read_bytes() == before and case.done


def test_windows_of_several_machines_name_them_and_have_no_seconds(
    truth: Path, tiny_overrides: list[str], tmp_path: Path, cli: Cli
) -> None:
    """Scored by `one` and `other`, joined by this machine."""
    own = settings(tiny_overrides, tmp_path)
    for part, machine in (("1/2", "one"), ("2/2", "other")):
        code, _, err = cli("sweep", "quant=q8_0", "mode=standard", *own, f"measure.shard={part}")
        assert code == 0, err
        for path in (tmp_path / "cache" / "scores").rglob("*.npz"):
            values = dict(np.load(path))
            if values["machine"] == socket.gethostname():
                np.savez(path, **{**values, "machine": machine})
    assert cli("sweep", "quant=q8_0", "mode=standard", *own)[0] == 0
    for path in (tmp_path / "results" / "tiny" / RECORDS).glob("*.json"):
        record = json.loads(path.read_text())
        assert record["environment"]["machine"] == "one, other" and record["timings"]["pass_s"] is None
    assert records(tmp_path / "results" / "tiny").keys() < records(truth).keys()


# --- locks of a shared folder


def test_a_lock_of_a_shared_folder_is_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    program = (
        "import sys, time; from pathlib import Path; from harness.store import Cache\n"
        "cache, out = Cache(Path(sys.argv[1]), shared=True), Path(sys.argv[2])\n"
        "for _ in range(5):\n"
        "    with cache.lock(cache.folder / 'thing'), cache.lock(cache.folder / 'thing'):\n"
        "        n = int(out.read_text() or 0); time.sleep(0.02); out.write_text(str(n + 1))\n"
    )
    out = tmp_path / "count"
    out.write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", program, folder, out]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert out.read_text() == "15"
    assert not list((folder / "locks").iterdir()), "nothing stays behind"


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_lock_of_a_dead_owner_is_taken_over(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine nobody can look whether the owner lives: it is waited for until it would have expired."""
    lease_s = 2.0 if elsewhere else 60.0
    program = (
        "import os, signal, socket, sys; from pathlib import Path\n"
        "if sys.argv[2] == 'True': socket.gethostname = lambda: 'elsewhere'\n"
        "from harness import store\n"
        "store.LEASE_S = float(sys.argv[3])\n"
        "cache = store.Cache(Path(sys.argv[1]), shared=True)\n"
        "with cache.lock(cache.folder / 'thing'): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    dead = subprocess.run([sys.executable, "-c", program, tmp_path, str(elsewhere), str(lease_s)], check=False)
    assert dead.returncode == -signal.SIGKILL and list((tmp_path / "locks").iterdir())
    monkeypatch.setattr("harness.store.LEASE_S", lease_s)
    begin = time.monotonic()
    cache = Cache(tmp_path, shared=True)
    with cache.lock(cache.folder / "thing"):
        waited_s = time.monotonic() - begin
    assert waited_s >= lease_s * 0.9 if elsewhere else waited_s < 30


def test_jobs_have_names_for_messages(sweep: Sweep) -> None:
    assert Job("windows", (sweep.cases[1],), "1/2").name == "q4_k_s standard, windows 1/2"
    assert Job("timing", sweep.cases).name == "timing"
