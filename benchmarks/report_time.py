"""Times `python -m harness report` over many records.

    python benchmarks/report_time.py [RECORDS] [ROUNDS]

The records are copies of a committed one (tensors, settings, machine) under other names, sizes and levels of loss, with
random per-token values for 4 windows of the default prompt set. Half of them are standard files, half a policy's.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.record import Record, read_records, record_path, write_record  # noqa: E402
from harness.store import key_of  # noqa: E402

SWEEP = ROOT / "results" / "qwen2_5_coder_1_5b-wiki_sample-8x2048"


def main(n_records: int, rounds: int) -> None:
    records = read_records(SWEEP)
    reference = next(one for one in records if one.data["mode"] == "reference")
    model = next(one for one in records if one.label == ("iq1_m", "dynamicgate", "dynamicgate"))
    with tempfile.TemporaryDirectory(prefix="report-time-") as name:
        folder = Path(name)
        write_copies(folder, reference, model, n_records)
        taken_s = []
        for _ in range(rounds):
            begin = time.perf_counter()
            command = [sys.executable, "-m", "harness", "report", f"results={folder}"]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            taken_s.append(time.perf_counter() - begin)
            print(f"{n_records} records: {taken_s[-1]:.2f} s", flush=True)
        print(
            f"median {statistics.median(taken_s):.2f} s of {rounds} rounds ({min(taken_s):.2f} to {max(taken_s):.2f})"
        )


def write_copies(folder: Path, reference: Record, model: Record, n_records: int) -> None:
    """The reference and n_records - 1 variants of it."""
    rng = np.random.default_rng(0)
    prompt_set = {**reference.data["prompt_set"], "n_windows": 4}
    base = {name: values[:4] for name, values in reference.per_token().items()}
    shape = base["nll"].shape
    write_record(folder / "records" / "reference.json", {**reference.data, "prompt_set": prompt_set}, base)
    for i in range(n_records - 1):
        quant, mode = f"q{i // 2}", ("standard", "dynamicgate")[i % 2]
        loss = 1 / (1 + i / 50)
        data = {**model.data, "quant": quant, "mode": mode, "policy": None if mode == "standard" else mode}
        data |= {"key": key_of(i), "prompt_set": prompt_set}
        data["variant"] = {**model.data["variant"], "file_bytes": 400_000_000 + 1_000_000 * i}
        nll = base["nll"] + loss + rng.normal(0, 0.3, shape)
        values = {"nll": nll, "top": base["top"], "kld": np.abs(rng.normal(loss, 0.3, shape))}
        write_record(record_path(folder, quant, mode, data["key"]), data, values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", nargs="?", type=int, default=1000, metavar="RECORDS")
    parser.add_argument("rounds", nargs="?", type=int, default=3, metavar="ROUNDS")
    args = parser.parse_args()
    main(args.records, args.rounds)
