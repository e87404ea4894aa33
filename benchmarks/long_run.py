"""One sweep of many cases on a tiny model: does the parent's memory grow, does it leak files, is the ETA sane?

    python benchmarks/long_run.py [CASES] [FOLDER]

20 quants with as many policies as it takes, each of which gives one tensor another type, so that no two files are
equal. Every second the parent is looked at: resident memory, open file descriptors, threads, children. Printed are
medians of each tenth of the run, what the ETA said against what was left, the time of a report afterwards and of the
same command again. In FOLDER, if one is given, an interrupted run goes on.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice, product
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.tiny_model import random_text, write_tiny_llama  # noqa: E402

QUANTS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s"),
    *("q5_k_m", "q6_k", "iq4_xs", "iq4_nl", "iq3_xs", "iq3_s", "iq3_m", "iq3_xxs"),
)
ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TENTHS = 10
Sample = tuple[float, int, int, int, int]  # seconds, resident bytes, descriptors, threads, children


def main(n_cases: int, folder: Path) -> None:
    policies = write_inputs(folder, -(-n_cases // len(QUANTS)))
    n_cases = len(QUANTS) * len(policies)
    command = [
        *(sys.executable, "-m", "harness", "sweep", f"quant={','.join(QUANTS)}", "mode=dynamicgate"),
        *(f"policy.file={','.join(map(str, policies))}", f"model.path={folder / 'tiny.gguf'}"),
        *(f"prompts.path={folder / 'prompts.txt'}", "prompts.n_windows=1", "prompts.window_tokens=128"),
        *(f"calibration.path={folder / 'calibration.txt'}", "calibration.n_windows=1", "calibration.window_tokens=128"),
        *("runtime.threads=1", f"runtime.cache_dir={folder / 'cache'}", f"results.dir={folder}", "results.name=long"),
        "measure.speed=false",
    ]
    begin = time.monotonic()
    sweep = psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    samples: list[Sample] = []
    threading.Thread(target=watch, args=(sweep, begin, samples), daemon=True).start()
    said, last = [], ""
    assert sweep.stdout
    for line in sweep.stdout:
        last = line.strip() or last
        if match := re.search(r"\(about (.*) left\)", line):
            said.append((time.monotonic() - begin, seconds(match[1])))
            print(f"{said[-1][0]:7.1f} s: {line.strip()}", flush=True)
    assert sweep.wait() == 0, f"exit code {sweep.returncode}: {last}"
    total_s = time.monotonic() - begin
    records = list((folder / "long" / "records").glob("*.json"))
    assert len(records) == n_cases + 1, f"{len(records)} records of {n_cases + 1}"
    assert not list(folder.rglob("*.tmp")), "temporary files are left"
    print(f"{len(records)} records in {total_s:.0f} s, {total_s / len(records):.2f} s a case")
    report_samples(samples)
    for tenth in range(1, TENTHS):
        at, left = min(said, key=lambda one: abs(one[0] - total_s * tenth / TENTHS))
        print(f"at {at:6.0f} s the ETA said {left:6.0f} s, left were {total_s - at:6.0f} s")
    for name, again in (
        ("report", [sys.executable, "-m", "harness", "report", f"results={folder / 'long'}"]),
        ("the same sweep again", command),
    ):
        begin = time.monotonic()
        subprocess.run(again, check=True, cwd=ROOT, capture_output=True)
        print(f"{name}: {time.monotonic() - begin:.1f} s")


def write_inputs(folder: Path, n_policies: int) -> list[Path]:
    """A model, its texts, and policies that each give one tensor another type."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_llama(folder / "tiny.gguf")
    for text, seed in (("prompts", 1), ("calibration", 2)):
        (folder / f"{text}.txt").write_text(random_text(600, seed))
    paths = []
    for layer, role in islice(product(range(4), ROLES), n_policies):
        path = folder / f"{role}_{layer}.yaml"
        path.write_text(
            f"name: {role}_{layer}\nrules:\n"
            f"  - name: one\n    tensors: ['blk\\.{layer}\\.{role}\\.weight']\n    type: f16\n"
        )
        paths.append(path)
    return paths


def watch(sweep: psutil.Popen, begin: float, samples: list[Sample]) -> None:
    """Look at the parent every second until it ends."""
    try:
        while sweep.is_running() and sweep.status() != psutil.STATUS_ZOMBIE:
            with sweep.oneshot():
                look = (sweep.memory_info().rss, sweep.num_fds(), sweep.num_threads(), len(sweep.children()))
            samples.append((time.monotonic() - begin, *look))
            time.sleep(1)
    except psutil.NoSuchProcess:
        pass


def report_samples(samples: list[Sample]) -> None:
    print(f"{'tenth':>5} {'resident MiB':>12} {'descriptors':>11} {'threads':>7} {'children':>8}")
    size = max(1, len(samples) // TENTHS)
    for tenth in range(TENTHS):
        part = samples[tenth * size : (tenth + 1) * size]
        if part:
            rss, fds, threads, children = (statistics.median(one[i] for one in part) for i in range(1, 5))
            print(f"{tenth + 1:5} {rss / 2**20:12.1f} {fds:11.0f} {threads:7.0f} {children:8.0f}")


def seconds(text: str) -> float:
    """'3 min' or '12 s' of the progress display."""
    found = re.fullmatch(r"([\d.]+) (s|min|h)", text)
    assert found, text
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="?", type=int, default=500, metavar="CASES")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.folder:
        main(args.cases, args.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="long-run-") as name:
            main(args.cases, Path(name))
