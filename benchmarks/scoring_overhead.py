"""What scoring costs over llama_decode alone, and the memory it takes: ways of running two windows, side by side.

    python benchmarks/scoring_overhead.py MODEL.gguf [ROUNDS] [--tools DIR --text FILE [--windows N]]

decode: the logits are computed and left alone; nll: and each token's nll and likeliest token; the others: and the
divergence from a reference that was stored in that form (the model's own: what it says does not change the work).
In all of them as many windows run at once as in a sweep. Rounds go forwards and backwards in turn. Prints medians,
ratios with their range over the rounds, and peak memory and the bound that is promised for it.

With --tools (those of benchmarks/llama_tools.py) also whole processes, loading included, in turn: N windows of the text
scored as a reference and as a variant, by the harness and by llama-perplexity with its own micro-batch (512). Their
perplexities must be the same.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import llama_tools  # noqa: E402
from benchmarks.common import Usage, compared, markdown, run_main, say  # noqa: E402
from harness import metrics  # noqa: E402
from harness.cost import scoring_bytes  # noqa: E402
from harness.engine import model as engine  # noqa: E402
from harness.engine.output import OutputTap, output_weights  # noqa: E402
from harness.isolate import run_in_child  # noqa: E402
from harness.kld_reference import FORMS, HIDDEN, WRITERS, open_rows  # noqa: E402
from harness.measure import default_first_scored, peak_rss_bytes, score  # noqa: E402
from harness.prompts import cut_windows  # noqa: E402
from harness.record import physical_cores  # noqa: E402
from harness.store import Cache  # noqa: E402
from harness.waves import in_waves, threads_of, windows_at_once  # noqa: E402

N_TOKENS, N_WINDOWS, UBATCH, WAYS = 2048, 2, 128, ("decode", "nll", *FORMS)
PPL_TOLERANCE = 1e-4  # relative; llama-perplexity prints four decimals


def over_decode(path: Path, rounds: int) -> None:
    rng, n_threads = np.random.default_rng(0), physical_cores()
    first = default_first_scored(N_TOKENS)
    wanted = np.zeros(N_TOKENS, bool)
    wanted[first - 1 : N_TOKENS - 1] = True
    at_once = windows_at_once(N_WINDOWS, n_threads)
    tap, weights = OutputTap(), output_weights(path)
    weights = weights and replace(weights, n_threads=n_threads)
    ways = WAYS if weights else WAYS[:-1]  # of quantized output weights nothing is computed again
    options = {"n_ctx": N_TOKENS, "ubatch_tokens": UBATCH, "flash_attention": True}
    with tempfile.TemporaryDirectory() as folder, engine.open_model(path) as model, ExitStack() as opened:
        size = engine.n_vocab(model)
        window = rng.integers(10, size - 10, N_TOKENS).astype(np.int32)
        stored = {form: Path(folder) / form for form in FORMS}
        with (
            engine.open_context(model, **options, n_threads=n_threads, eval_callback=tap.on_tensor) as context,
            ExitStack() as stack,
        ):
            files = {form: stack.enter_context(target.open("wb")) for form, target in stored.items()}
            for _, logits, _ in engine.decode_window(context, window, wanted, size, UBATCH):
                for form, write in WRITERS.items():
                    write(files[form], logits)
                files[HIDDEN].write(tap.take().tobytes())
        share = threads_of(n_threads, at_once)
        contexts = [
            opened.enter_context(engine.open_context(model, **options, n_threads=share)) for _ in range(at_once)
        ]
        opened.enter_context(threadpool_limits(1, user_api="blas"))  # as in a sweep

        def run(slot: int, way: str, _at_once: int) -> None:
            with stored.get(way, stored[HIDDEN]).open("rb") as file:
                reader = open_rows(file, way, size, weights) if way in FORMS else None
                for position, logits, _ in engine.decode_window(contexts[slot], window, wanted, size, UBATCH):
                    if way != "decode" and len(logits):
                        metrics.token_values(logits, window[position + 1 : position + 1 + len(logits)], reader)

        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(rounds):
            for way in ways if i % 2 == 0 else ways[::-1]:
                begin = time.perf_counter()
                for _ in in_waves([way] * N_WINDOWS, n_threads, run):
                    pass
                seconds[way].append((time.perf_counter() - begin) / N_WINDOWS)
    print(f"{N_WINDOWS} windows, {at_once} at once, {n_threads} threads; seconds of a window")
    peak = peak_rss_bytes() or 0
    for way in ways:
        ratios = np.array(seconds[way]) / np.array(seconds["decode"]) - 1
        print(
            f"{way:<13} median {np.median(seconds[way]):7.3f} s   over decode {100 * np.median(ratios):+6.2f} % "
            f"({100 * ratios.min():+.2f} to {100 * ratios.max():+.2f})"
        )
    bound = scoring_bytes(path.stat().st_size, (N_TOKENS - first) * size, at_once)
    print(f"peak {peak / 1e6:.0f} MB; the bound (harness.cost.scoring_bytes) is {bound / 1e6:.0f} MB")


def by_harness(path: Path, windows: np.ndarray, folder: Path, *, is_reference: bool) -> tuple[Usage, float]:
    """One pass in a process of its own, and its perplexity."""
    before, begin = os.times(), time.perf_counter()
    scores = run_in_child(
        score,
        *(path, windows, folder / f"scores-{is_reference}", folder / "probabilities", Cache(folder / "cache")),
        is_reference=is_reference,
        first_scored=default_first_scored(windows.shape[1]),
        ubatch_tokens=UBATCH,
        flash_attention=True,
        n_threads=physical_cores(),
        log_path=folder / "harness.log",
    )
    wall_s, after = time.perf_counter() - begin, os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Usage(wall_s, cpu_s, scores.peak_rss_bytes or 0), metrics.perplexity(scores.nll)[0]


def by_llama_perplexity(
    path: Path, text: Path, n_windows: int, folder: Path, tools: Path, *, is_reference: bool
) -> tuple[Usage, float]:
    command = [tools / "llama-perplexity", "-m", path, "-t", physical_cores(), "-fa", "on"]
    command += ["-c", N_TOKENS, "-b", N_TOKENS, "--chunks", n_windows, "--kl-divergence-base", folder / "logits.bin"]
    command += ["-f", text] if is_reference else ["--kl-divergence"]
    usage, found = llama_tools.run_tool(command, folder / "tool.log", ["ppl"])
    return usage, found["ppl"]


def beside_llama_perplexity(path: Path, text: Path, n_windows: int, rounds: int, tools: Path) -> None:
    tokens, bos = engine.tokenize(path, text.read_text(encoding="utf-8"))
    windows = cut_windows(tokens, n_windows, N_TOKENS, bos)
    usages: dict[tuple[bool, str], list[Usage]] = {}
    for i in range(rounds):
        with tempfile.TemporaryDirectory(prefix="scoring-") as name:
            folder = Path(name)
            for is_reference in (True, False):
                ppl = []
                for side in ("harness", "llama.cpp")[:: 1 if i % 2 == 0 else -1]:
                    say(f"round {i + 1}: {side}, {'reference' if is_reference else 'variant with KLD'}")
                    if side == "harness":
                        usage, one = by_harness(path, windows, folder, is_reference=is_reference)
                    else:
                        usage, one = by_llama_perplexity(
                            path, text, n_windows, folder, tools, is_reference=is_reference
                        )
                    usages.setdefault((is_reference, side), []).append(usage)
                    ppl.append(one)
                if abs(ppl[0] / ppl[1] - 1) > PPL_TOLERANCE:
                    raise SystemExit(f"the perplexities differ: {ppl[0]:.5f} and {ppl[1]:.5f}")
    header = ("Scored as", "harness, s", "llama.cpp, s", "Ratio (range)", "CPU s", "CPU s, llama.cpp", "CPU ratio")
    rows = [
        (label, *compared(usages[is_reference, "harness"], usages[is_reference, "llama.cpp"]))
        for is_reference, label in ((True, "reference"), (False, "variant, KLD"))
    ]
    print("\n" + markdown((*header, "Peak MB", "Peak MB, llama.cpp"), rows))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    args = parser.parse_args(argv)
    if bool(args.tools) != bool(args.text):
        parser.error("--tools and --text belong together")
    over_decode(args.model, args.rounds)
    if args.tools:
        tools = llama_tools.llama_tools(args.tools)
        beside_llama_perplexity(args.model.resolve(), args.text.resolve(), args.windows, args.rounds, tools)


if __name__ == "__main__":
    run_main(main)
