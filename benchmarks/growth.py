"""How the cost of a sweep grows: with the number of variants of one model, and with the size of the model.

    python benchmarks/growth.py [--variants 1,2,4,8] [--widths 512,1024,2048] [--rounds N] [--out FILE.json]
        [--quant iq4_nl] [--type q5_1] [KEY=VALUE ...]

Variants: policies that each give the ffn_down of another slice of the layers another type. A sweep of 1, 2, 4, 8 such
begins with an empty cache (sources are linked into it), once with kept tensors and once without, in turn. Sizes: Llama
models of random weights and 8 layers, quantized and scored in an empty cache each. Scored is one window of 512 tokens.
KEY=VALUE: settings of the first part's sweeps, such as model=qwen2_5_coder_1_5b.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from benchmarks.common import Usage, empty_folders, in_child, markdown, measured, run_main, say, seconds_text  # noqa: E402
from harness.store import write_json  # noqa: E402

SCORED = ["calibration=none", "prompts.n_windows=1", "prompts.window_tokens=512", "measure.speed=false"]
N_LAYERS = 8
Rounds = dict[str, list[dict[str, Usage]]]  # by row: what the steps of each round took


def planned(overrides: list[str]) -> dict[str, Any]:
    """In a child: share of the work that is left when nothing is quantized twice, sizes, what to link."""
    from harness.compose import configs_of_sweep
    from harness.prepare import prepare

    sweep = prepare(configs_of_sweep(overrides), say, with_reference=False)
    return {
        "share": common.unique_share([case.plan for case in sweep.cases], sweep.source_types),
        "n_weights": sweep.reference.plan.n_weights,
        "file_bytes": sweep.reference.info.file_bytes,
        "linked": [sweep.cache.folder / kind for kind in ("sources", "references")],
    }


def write_model(folder: Path, width: int) -> None:
    """In a child: a model and a text for it."""
    from tests.tiny_model import random_text, write_tiny_llama

    heads = width // 64
    write_tiny_llama(
        folder / f"{width}.gguf",
        n_layers=N_LAYERS,
        n_embd=width,
        n_ff=3 * width,
        n_heads=heads,
        n_kv_heads=heads // 2,
        n_ctx=2048,
    )
    (folder / "text.txt").write_text(random_text(2000, seed=1))


def write_policies(folder: Path, n: int, type_name: str) -> list[Path]:
    paths = []
    for i in range(n):
        path = folder / f"slice{i}.yaml"
        rule = f"{{name: slice, roles: [ffn_down], depth: ['{i}/{n}..{i + 1}/{n}'], type: {type_name}}}"
        path.write_text(f"name: slice{i}\nrules:\n  - {rule}\n")
        paths.append(path)
    return paths


def sweep(folder: Path, overrides: Sequence[str], linked: Sequence[Path]) -> dict[str, Usage]:
    """One sweep in an empty cache."""
    where, results = empty_folders(folder, linked)
    return measured(
        [sys.executable, "-m", "harness", "sweep", *overrides, *where],
        folder / "sweep.log",
        step_of=common.step_of_sweep,
        last_step_ended=lambda: common.last_record(results),
    )


def median(rounds: Sequence[dict[str, Usage]], step: str, field: str = "wall_s") -> float:
    return float(statistics.median(getattr(one[step], field) for one in rounds))


def by_variants(folder: Path, args: argparse.Namespace) -> tuple[str, Rounds]:
    numbers = [int(one) for one in args.variants.split(",")]
    policies = write_policies(folder, max(numbers), args.type)
    commands = {}
    for n in numbers:
        files = ",".join(map(str, policies[:n]))
        commands[n] = [f"quant={args.quant}", "mode=dynamicgate", f"policy.file={files}", *SCORED, *args.settings]
    facts = {n: in_child(planned, command) for n, command in commands.items()}
    rounds: Rounds = {}
    for i in range(args.rounds):
        for n in numbers:
            for kept in ("20", "0")[:: 1 if i % 2 == 0 else -1]:
                say(f"round {i + 1}: variants {n}, runtime.tensor_cache_gb={kept}")
                took = sweep(folder, [*commands[n], f"runtime.tensor_cache_gb={kept}"], facts[n]["linked"])
                rounds.setdefault(f"{n} {kept}", []).append(took)
    rows = []
    before: tuple[int, float] | None = None
    for n in numbers:
        kept_s, plain_s = (median(rounds[f"{n} {kept}"], "quantize") for kept in ("20", "0"))
        more = seconds_text((kept_s - before[1]) / (n - before[0])) if before else "-"
        peak = max(one["whole"].peak_bytes for one in rounds[f"{n} 20"])
        score_s, whole_s = (median(rounds[f"{n} 20"], step) for step in ("score", "whole"))
        cells = (
            f"{100 * facts[n]['share']:.0f} %",
            seconds_text(kept_s),
            more,
            seconds_text(plain_s),
            f"{kept_s / plain_s:.2f}",
        )
        rows.append((str(n), *cells, seconds_text(score_s), seconds_text(whole_s), f"{peak / 1e6:.0f}"))
        before = (n, kept_s)
    header = ("Variants", "Unique work", "Quantize, s", "s a further one", "Nothing kept, s", "Ratio")
    return markdown((*header, "Score, s", "Whole, s", "Peak MB"), rows), rounds


def by_size(folder: Path, args: argparse.Namespace) -> tuple[str, Rounds]:
    rounds: Rounds = {}
    rows = []
    for width in [int(one) for one in args.widths.split(",")]:
        say(f"making a model of width {width}")
        in_child(write_model, folder, width)
        command = [f"quant={args.quant}", "mode=standard", *SCORED]
        command += [f"model.path={folder / f'{width}.gguf'}", f"prompts.path={folder / 'text.txt'}"]
        facts = in_child(planned, command)
        for i in range(args.rounds):
            say(f"round {i + 1}: width {width}")
            rounds.setdefault(str(width), []).append(sweep(folder, command, ()))
        took, millions = rounds[str(width)], facts["n_weights"] / 1e6
        cells = [seconds_text(median(took, step)) for step in ("quantize", "reference", "score", "whole")]
        cpu_s = median(took, "quantize", "cpu_s")
        peak = max(one["whole"].peak_bytes for one in took)
        quantizing = max(one["quantize"].peak_bytes for one in took)
        sizes = (f"{millions:.0f}", f"{facts['file_bytes'] / 1e6:.0f}")
        cells.insert(1, f"{1000 * cpu_s / millions:.0f}")
        rows.append((str(width), *sizes, *cells, f"{quantizing / 1e6:.0f}", f"{peak / 1e6:.0f}"))
        (folder / f"{width}.gguf").unlink()
    header = ("Width", "Million weights", "F16 MB", "Quantize, s", "CPU s a billion weights", "Reference, s")
    return markdown((*header, "Score, s", "Whole, s", "Peak MB, quantizing", "Peak MB"), rows), rounds


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    defaults = {"variants": "1,2,4,8", "widths": "512,1024,2048", "quant": "iq4_nl", "type": "q5_1"}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args(argv)
    told: dict[str, Rounds] = {}
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        if args.variants:
            shown, told["variants"] = by_variants(Path(name), args)
            print(f"\n{shown}\n")
        if args.widths:
            shown, told["widths"] = by_size(Path(name), args)
            print(f"\n{shown}\n")
    if args.out:
        rounds = {
            part: {row: [{k: asdict(u) for k, u in one.items()} for one in took] for row, took in rows.items()}
            for part, rows in told.items()
        }
        settings = vars(args) | {"out": str(args.out)}
        write_json(args.out, {"settings": settings, "environment": in_child(common.machine), "rounds": rounds})


if __name__ == "__main__":
    run_main(main)
