"""The same work with the harness and with llama.cpp's own tools, in turn: is it the same result, what does each take?

    python benchmarks/beside_llama_cpp.py quick|full [--rounds N] [--quantize-only] [--tools DIR] [--work DIR]
        [--out FILE.json] [KEY=VALUE ...]

imatrix, quantized files, the reference's logits, perplexity and KLD of each file: `python -m harness sweep` in an empty
cache (the downloaded sources and the F16 reference, input to both sides, are linked into it), and llama-imatrix,
llama-quantize, llama-perplexity. The sides take turns in beginning a round. After each round the results are compared:
every tensor's type and bytes, imatrix, perplexities, KLD. Where they differ that is all that is told, exit code 1. Then
a table and a JSON file. KEY=VALUE: settings of the sweep, such as prompts.n_windows=2. --quantize-only: the imatrix is
made before, a few tokens are scored, nothing but quantizing counts. A run that was stopped goes on after its last
finished step, as DIR tells; a sweep is one step.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common, llama_tools  # noqa: E402
from benchmarks.both_sides import Inputs, Results, Step, harness_side, imatrix_difference, llama_steps, resolve  # noqa: E402
from benchmarks.common import OUTSIDE, Usage, in_child, run_main, say  # noqa: E402
from harness.record import utc_now  # noqa: E402
from harness.store import read_json, write_json  # noqa: E402

MODES = "mode=standard,dynamicgate"
SIZES = {
    "quick": ["quant=iq1_m,iq2_s", MODES],
    "full": [
        *("model=qwen2_5_coder_1_5b", "quant=iq2_xxs,iq2_xs,iq2_s,iq1_m,iq1_s", MODES, "prompts.n_windows=2"),
    ],
}
# llama-perplexity keeps its reference in 16 bits and leaves out p < e^-16; the kernels are the same.
TOLERANCE = {"ppl": 1e-4, "kld": 5e-4}
RELATIVE_TOLERANCE = {"ppl": 1e-4, "kld": 5e-3}
IMATRIX_TOLERANCE = 1e-3  # relative, of a weight
OURS, THEIRS = "harness", "llama.cpp"
STEPS = ("imatrix", "quantize", "reference", "score", OUTSIDE, "whole")
Side = tuple[dict[str, Usage], Results]  # what each step took, and what came out


def differences(ours: Results, theirs: Results, compared: Sequence[str]) -> list[str]:
    """What is not the same, within the tolerances, or not there. compared: of ppl, kld and tensors."""
    found = []
    for case, a in ours.items():
        b = theirs.get(case, {})
        for name in (one for one in compared if one in a):
            if name not in b:
                found.append(f"{case}: llama.cpp's tools gave no {name}")
            elif name == "tensors":
                x, y = a[name], b[name]
                off = sorted(t for t in x.keys() | y.keys() if x.get(t) != y.get(t))
                if off:
                    shown = f"{off[0]} is {x.get(off[0], 'absent')} and {y.get(off[0], 'absent')}"
                    found.append(f"{case}: {len(off)} of {len(x)} tensors differ, {shown}")
            elif abs(a[name] - b[name]) > TOLERANCE[name] + RELATIVE_TOLERANCE[name] * abs(b[name]):
                found.append(f"{case}: {name} is {a[name]:.6f} of the harness, {b[name]:.6f} of llama.cpp")
    return found


def agreement(ours: Results, theirs: Results) -> str:
    """How near the figures are, in words."""
    ppl = [abs(a["ppl"] / theirs[case]["ppl"] - 1) for case, a in ours.items() if "ppl" in theirs.get(case, {})]
    kld = [abs(a["kld"] - theirs[case]["kld"]) for case, a in ours.items() if "kld" in theirs.get(case, {})]
    n_tensors = sum(len(a.get("tensors", {})) for a in ours.values())
    said = f"{n_tensors} tensors byte for byte"
    return said + (f", PPL within {max(ppl):.1e} of it, mean KLD within {max(kld):.1e}" if ppl and kld else "")


def table(rounds: Sequence[Mapping[str, Mapping[str, Usage]]], steps: Sequence[str]) -> str:
    """A row a step: medians of the rounds, and of their ratios harness / llama.cpp. rounds: by side and step."""
    header = ("Step", "harness, s", "llama.cpp, s", "Ratio (range)", "CPU s", "CPU s, llama.cpp", "CPU ratio")
    rows = []
    for step in steps:
        ours, theirs = ([one[side][step] for one in rounds if step in one[side]] for side in (OURS, THEIRS))
        rows.append((step, *common.compared(ours, theirs)))
    return common.markdown((*header, "Peak MB", "Peak MB, llama.cpp"), rows)


@dataclass(frozen=True)
class Ledger:
    """The finished steps of a run, by name, in a file."""

    path: Path
    done: dict[str, Any]

    def once(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the step gave, now or before it was stopped."""
        if name not in self.done:
            say(name)
            self.done[name] = do()
            write_json(self.path, self.done)
        return self.done[name]  # type: ignore[no-any-return]


def open_ledger(path: Path, settings: dict[str, Any]) -> Ledger:
    """Exits when the file is that of another run."""
    done = read_json(path) if path.is_file() else {"settings": settings, "begun_utc": utc_now()}
    if done["settings"] != settings:
        raise SystemExit(f"{path} is of a run with other settings: give another --work, or delete that folder")
    return Ledger(path, done)


def run_harness(ledger: Ledger, i: int, inputs: Inputs, overrides: Sequence[str]) -> Side:
    """Its part of round i."""
    work = ledger.path.parent
    sweep = ledger.once(f"round {i}: {OURS}", lambda: harness_side(inputs, overrides, work))
    return {step: Usage(**usage) for step, usage in sweep["usage"].items()}, sweep["results"]


def run_llama_cpp(ledger: Ledger, i: int, steps: Iterable[Step]) -> Side:
    """Its part of round i; seconds of the steps of one kind are added up."""
    usages: dict[str, Usage] = {}
    results: Results = {}
    for step in steps:
        found = dict(ledger.once(f"round {i}: {THEIRS}, {step.name}", step.run))
        usage = Usage(**found.pop("usage"))
        for kind in (step.kind, "whole"):
            usages[kind] = usages[kind] + usage if kind in usages else usage
        results.setdefault(step.case, {}).update(found)
    return usages, results


def run_rounds(
    ledger: Ledger, n_rounds: int, inputs: Inputs, overrides: Sequence[str], steps: Sequence[Step]
) -> list[dict[str, dict[str, Usage]]]:
    """What both sides took, by round, side and step. Exits when their results differ."""
    work, rounds = ledger.path.parent, []
    kinds = {step.kind for step in steps}
    compared = ("ppl", "kld", "tensors") if "score" in kinds else ("tensors",)
    for i in range(1, n_rounds + 1):
        both: dict[str, Side] = {}
        for side in (OURS, THEIRS) if i % 2 else (THEIRS, OURS):
            both[side] = run_harness(ledger, i, inputs, overrides) if side == OURS else run_llama_cpp(ledger, i, steps)
        (_, ours), (_, theirs) = both[OURS], both[THEIRS]
        off = differences(ours, theirs, compared)
        if "imatrix" in kinds:
            difference = in_child(imatrix_difference, work / "imatrix.gguf", work / "llama-imatrix.gguf")
            off += [f"imatrix: weights differ by {difference:.1e}"] if difference > IMATRIX_TOLERANCE else []
        if off:
            raise SystemExit("the results differ:\n" + "\n".join(off))
        say(f"round {i}: both sides have the same results ({agreement(ours, theirs)})")
        rounds.append({side: usage for side, (usage, _) in both.items()})
    return rounds


def merged(settings: Sequence[str], more: Sequence[str]) -> list[str]:
    """Settings of which the later ones take the place of the earlier ones with the same key."""
    keys = {one.partition("=")[0] for one in more}
    return [*(one for one in settings if one.partition("=")[0] not in keys), *more]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize-only", action="store_true")
    for name in ("--tools", "--work", "--out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_intermixed_args(argv)
    overrides = merged(SIZES[args.size], args.settings)
    tools = llama_tools.llama_tools(args.tools)
    user_cache = Path(platformdirs.user_cache_dir("gguf-harness", appauthor=False))
    label = f"{args.size}{'-quantize' if args.quantize_only else ''}"
    work = (args.work or user_cache / "beside_llama_cpp" / label).absolute()
    work.mkdir(parents=True, exist_ok=True)
    settings = {"overrides": overrides, "quantize_only": args.quantize_only, "tools": str(tools)}
    ledger = open_ledger(work / "steps.json", settings)
    inputs: Inputs = in_child(resolve, overrides)
    llama_tools.require_same_features(tools, inputs.reference, work, inputs.environment["cpu_features"])
    if args.quantize_only:
        first = next(llama_steps(inputs, tools, work))
        ledger.once("imatrix for all rounds", first.run)
        shutil.copyfile(work / "llama-imatrix.gguf", work / "imatrix.gguf")
        only = [f"calibration.imatrix={work / 'imatrix.gguf'}", "prompts.n_windows=1", "prompts.window_tokens=64"]
        overrides = merged(overrides, only)
        inputs = in_child(resolve, overrides)
    kinds = ("quantize",) if args.quantize_only else STEPS
    steps = [step for step in llama_steps(inputs, tools, work) if step.kind in kinds]
    rounds = run_rounds(ledger, args.rounds, inputs, overrides, steps)
    shown = table(rounds, kinds)
    share = f"{100 * inputs.share:.0f} % of the quantizing is left (estimated) when no tensor is quantized twice."
    print(f"\n{shown}\n\nMedians, rounds: {args.rounds}. Ratio: harness / llama.cpp. {share}")
    out = args.out or work / "results.json"
    usages = [{side: {k: asdict(u) for k, u in usage.items()} for side, usage in one.items()} for one in rounds]
    told = {"settings": settings, "begun_utc": ledger.done["begun_utc"], "environment": inputs.environment}
    write_json(out, {**told, "unique_share": inputs.share, "rounds": usages, "table": shown.splitlines()})
    say(f"written: {out}")


if __name__ == "__main__":
    run_main(main)
