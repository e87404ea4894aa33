"""Seconds to quantize a model into each type: tensor by tensor as a sweep does, and with llama_model_quantize, in turn.

    python benchmarks/quantize_throughput.py [--types q8_0,q4_k_m,...] [--rounds N] [--out FILE.json] [KEY=VALUE ...]

Nothing is kept between files, importances are random, and the two files must be equal byte for byte. Each is made in a
process of its own, whose seconds, CPU seconds and most resident memory are told; loading of libraries does not count.
KEY=VALUE: settings of the model and the machine, such as model=qwen2_5_coder_1_5b or runtime.threads=1.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Usage, compared, markdown, run_main, say  # noqa: E402
from harness.compose import compose  # noqa: E402
from harness.cpu import engine_facts  # noqa: E402
from harness.imatrix import read_imatrix, write_imatrix  # noqa: E402
from harness.isolate import run_in_child  # noqa: E402
from harness.measure import peak_rss_bytes  # noqa: E402
from harness.plan import Plan  # noqa: E402
from harness.prepare import prepare  # noqa: E402
from harness.provenance import IMATRIX_ENTRIES  # noqa: E402
from harness.quantize import make_variant  # noqa: E402
from harness.record import environment  # noqa: E402
from harness.reference import Reference  # noqa: E402
from harness.store import sha256_file, write_json  # noqa: E402

TYPES = "q8_0,q4_0,q4_k_m,q3_k_m,iq4_xs,iq3_s,iq2_xs,iq1_m"


def by_harness(source: Path, target: Path, plan: Plan, imatrix: Path, n_threads: int) -> Usage:
    """In a child."""
    from harness.engine import chunks, gguf_file, variant_file  # noqa: F401  # so that loading does not count

    return timed(lambda: make_variant(source, target, plan, imatrix, n_threads=n_threads))


def by_llama_cpp(source: Path, target: Path, plan: Plan, imatrix: Path, n_threads: int) -> Usage:
    """In a child."""
    from harness.engine import gguf_file  # noqa: F401
    from harness.engine.quantize import quantize

    def make() -> None:
        weights = read_imatrix(imatrix).weights
        metadata = {key: len(weights) if key == IMATRIX_ENTRIES else value for key, value in plan.metadata}
        types, file_type = plan.overrides, plan.file_type or ""
        quantize(source, target, file_type, overrides=types, imatrix=weights, n_threads=n_threads, metadata=metadata)

    return timed(make)


def timed(make: Callable[[], object]) -> Usage:
    wall, cpu = time.perf_counter(), time.process_time()
    make()
    return Usage(time.perf_counter() - wall, time.process_time() - cpu, peak_rss_bytes() or 0)


def random_imatrix(reference: Reference, path: Path) -> None:
    """For every matrix of the blocks."""
    from harness.engine.collect import Activations

    rng, seen = np.random.default_rng(0), {}
    for tensor in reference.info.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            n_matrices = tensor.shape[2] if len(tensor.shape) > 2 else 1
            seen[tensor.name] = Activations(rng.gamma(1.0, 1.0, (n_matrices, tensor.shape[0])), np.ones(n_matrices))
    write_imatrix(path, seen, dataset="random", n_windows=1, window_tokens=16)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(prefix="quantize-throughput-") as name:
        folder = Path(name)
        imatrix = folder / "imatrix.gguf"
        reference = prepare(compose(["quant=reference", *args.settings]), say, with_reference=False).reference
        random_imatrix(reference, imatrix)
        settings = [f"quant={args.types}", "mode=standard", f"calibration.imatrix={imatrix}", *args.settings]
        sweep = prepare(compose(settings), say, with_reference=False)
        usages: dict[str, dict[str, list[Usage]]] = {}
        for i in range(args.rounds):
            for plan in (case.plan for case in sweep.cases):
                say(f"round {i + 1}: {plan.quant}")
                made = {}
                for side in (by_harness, by_llama_cpp)[:: 1 if i % 2 == 0 else -1]:
                    target = folder / f"{side.__name__}.gguf"
                    work = (sweep.reference.path, target, plan, imatrix, sweep.n_threads)
                    usage = run_in_child(side, *work, log_path=folder / "log")
                    usages.setdefault(plan.quant, {}).setdefault(side.__name__, []).append(usage)
                    made[side.__name__] = sha256_file(target)
                    target.unlink()
                if len(set(made.values())) > 1:
                    raise SystemExit(f"{plan.quant}: the two files differ")
        facts = environment(engine_facts(sweep.cache))
    header = ("Type", "harness, s", "llama.cpp, s", "Ratio (range)", "CPU s", "CPU s, llama.cpp", "CPU ratio")
    rows = [(quant, *compared(one["by_harness"], one["by_llama_cpp"])) for quant, one in usages.items()]
    shown = markdown((*header, "Peak MB", "Peak MB, llama.cpp"), rows)
    print(f"\n{shown}")
    if args.out:
        told = {q: {side: [asdict(u) for u in one] for side, one in sides.items()} for q, sides in usages.items()}
        write_json(args.out, {"settings": args.settings, "environment": facts, "rounds": told})


if __name__ == "__main__":
    run_main(main)
