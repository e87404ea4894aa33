"""Kills a sweep on a tiny model at random moments and checks that nothing is lost, or believed by halves.

Each time the sweep or one of its children gets SIGKILL, SIGINT or SIGTERM, and the same command is started again until
the sweep is finished; then its folders are wiped and it begins anew, until there were enough kills. After every kill:
no process is left, every record that is there is whole and equal to that of an undisturbed sweep (timings aside). After
every finished sweep: all records are there once, no temporary file, no lock that is held.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from filelock import FileLock, Timeout
from tiny_model import random_text, write_tiny_llama

from harness.record import read_record

ROOT = Path(__file__).resolve().parent.parent
TIMING_FIELDS = ("timings", "quantizing", "peak_rss_bytes", "environment", "created_utc")


def kill_sweeps(folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> Counter[str]:
    """Raises AssertionError at the first thing lost. Returns how often who got which signal, and "finished"."""
    rng = random.Random(seed)  # noqa: S311
    write_tiny_llama(folder / "tiny.gguf")
    for text, text_seed in (("prompts", 1), ("calibration", 2)):
        (folder / f"{text}.txt").write_text(random_text(600, text_seed))
    begin = time.monotonic()
    subprocess.run(command(folder, "truth"), check=True, capture_output=True, cwd=ROOT)
    length_s = time.monotonic() - begin
    truth = records(folder / "truth" / "sweep")
    shutil.rmtree(folder / "truth")
    say(f"undisturbed: {len(truth)} records in {length_s:.1f} s")
    seen: Counter[str] = Counter()
    left_s = length_s
    while sum(seen.values()) - seen["finished"] < kills:
        after_s = rng.uniform(0.0, 1.1 * left_s)
        killed = run_and_kill(command(folder, "run"), after_s, rng)
        # What is started again has less to do, but begins with imports and plans.
        left_s = max(0.3 * length_s, left_s - after_s) if killed else length_s
        seen[killed or "finished"] += 1
        check(records(folder / "run" / "sweep"), truth)
        if not killed:
            check_finished(folder / "run", truth)
            shutil.rmtree(folder / "run")
            say(f"{sum(seen.values()) - seen['finished']} kills, {seen['finished']} sweeps finished")
    return seen


def check_finished(folder: Path, truth: "Found") -> None:
    found = records(folder / "sweep")
    assert found.keys() == truth.keys(), f"{found.keys() ^ truth.keys()} differ"
    stray = list(folder.rglob("*.tmp"))
    assert not stray, stray
    for lock in folder.rglob("*.lock"):
        try:
            FileLock(lock).acquire(timeout=0).lock.release()
        except Timeout as error:
            raise AssertionError(f"{lock} is held") from error


def command(folder: Path, name: str) -> list[str]:
    return [
        *(sys.executable, "-m", "harness", "sweep", "quant=iq2_xs,q4_0", f"model.path={folder / 'tiny.gguf'}"),
        *(f"prompts.path={folder / 'prompts.txt'}", "prompts.n_windows=3", "prompts.window_tokens=128"),
        *(f"calibration.path={folder / 'calibration.txt'}", "calibration.n_windows=3", "calibration.window_tokens=128"),
        *("runtime.threads=2", f"runtime.cache_dir={folder / name / 'cache'}", f"results.dir={folder / name}"),
        *("results.name=sweep", "measure.layers=true", "measure.generate_tokens=2"),
    ]


def run_and_kill(arguments: list[str], after_s: float, rng: random.Random) -> str | None:
    """Who got which signal; None when the sweep finished first."""
    sweep = psutil.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        out, err = sweep.communicate(timeout=after_s)
        assert sweep.returncode == 0, f"exit code {sweep.returncode}: {out[-2000:]}{err[-2000:]}"
        return None
    except subprocess.TimeoutExpired:
        pass
    family = [sweep, *sweep.children(recursive=True)]
    victim, number = rng.choice(family), rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    try:
        victim.send_signal(number)
    except psutil.NoSuchProcess:
        victim, number = sweep, signal.SIGKILL
        sweep.send_signal(number)
    # A child that died fails its case, and the sweep goes on to its end with exit code 1; one that looks at the model
    # before any case ends the sweep with 2.
    out, err = sweep.communicate(timeout=300)
    # -SIGINT: CPython's own way out when the interrupt came inside an exec(), as of a dataclass; 130 for a shell too.
    allowed = (0, 1, 2 if "died of SIG" in err else 1) if victim is not sweep else (130, -signal.SIGINT, -number, 0)
    assert sweep.returncode in allowed, f"{number} to {victim}: exit code {sweep.returncode}: {err[-2000:]}"
    assert "Traceback" not in err, err[-3000:]
    _, alive = psutil.wait_procs(family[1:], timeout=20)
    assert not alive, alive
    return f"{signal.Signals(number).name} to the {'sweep' if victim is sweep else 'child'}"


Found = dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]  # file name -> record without timings, values


def records(folder: Path) -> Found:
    """All good records of a sweep's folder; a damaged one raises UserError. Failed ones, tried again, are left out."""
    found: Found = {}
    for path in (folder / "records").glob("*.json"):
        record = read_record(path)
        if record.ok:
            data = {name: value for name, value in record.data.items() if name not in TIMING_FIELDS}
            found[path.name] = (data, record.per_token())
    return found


def check(found: Found, truth: Found) -> None:
    for name, (data, values) in found.items():
        expected_data, expected = truth[name]
        different = [field for field in expected_data if data.get(field) != expected_data[field]]
        assert not different, f"{name}: {different}"
        assert values.keys() == expected.keys()
        assert all(np.array_equal(values[field], expected[field]) for field in expected), name
