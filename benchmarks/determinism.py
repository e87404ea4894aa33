"""The same sweep on the default model, again and with other numbers of threads: are bytes and per-token values equal?

    python benchmarks/determinism.py [THREADS ...]

Each run has a cache and results of its own, so the imatrix is collected and every file quantized each time.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.record import read_records  # noqa: E402
from harness.store import sha256_file  # noqa: E402

Run = tuple[dict[str, str], dict[str, dict[str, np.ndarray]]]


def sweep(folder: Path, n_threads: int) -> Run:
    """sha256 of every file made; per-token values of every case."""
    command = [
        *(sys.executable, "-m", "harness", "sweep", "quant=iq1_m,q4_k_m", "prompts.n_windows=1"),
        *("calibration.n_windows=1", "measure.speed=false", "runtime.keep_variants=true", "results.name=sweep"),
        *(f"runtime.threads={n_threads}", f"runtime.cache_dir={folder}", f"results.dir={folder}"),
    ]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    made = {path.name: sha256_file(path) for kind in ("imatrix", "variants") for path in (folder / kind).glob("*.gguf")}
    return made, {record.name: record.per_token() for record in read_records(folder / "sweep")}


def main(threads: list[int]) -> None:
    with tempfile.TemporaryDirectory(prefix="determinism-") as name:
        first_files, first_values = sweep(Path(name) / "first", threads[0])
        print(f"{threads[0]} threads: {len(first_files)} files, {len(first_values)} cases", flush=True)
        for i, n_threads in enumerate(threads):
            folder = Path(name) / str(i)
            files, values = sweep(folder, n_threads)
            shutil.rmtree(folder)
            unequal = sum(files.get(key) != digest for key, digest in first_files.items())
            print(f"{n_threads} threads: {unequal} of {len(files)} files differ", flush=True)
            for case, arrays in values.items():
                off = np.abs(arrays["nll"] - first_values[case]["nll"])
                shift = float(arrays["nll"].mean() - first_values[case]["nll"].mean())
                share = f"nll of {np.count_nonzero(off)} of {off.size} tokens differs"
                print(f"  {case}: {share}, by {off.max():.1e} at most; mean by {shift:+.1e}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("threads", nargs="*", type=int, default=[2, 1, 3], metavar="THREADS")
    main(parser.parse_args().threads)
