"""What scoring costs over llama_decode alone, and the memory it takes: ways of running one window, side by side.

    python benchmarks/scoring_overhead.py MODEL.gguf [ROUNDS]

decode: the logits are computed and left alone; nll: and each token's nll and likeliest token; the others: and the
divergence from a reference that was stored in that form (the model's own: what it says does not change the work).
Rounds go forwards and backwards in turn. Prints medians, ratios with their range over the rounds, and peak memory and
its bound (the file, 1.3 times the logits of one window, and 200 MB for the logits of hidden states).
"""

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from harness import metrics
from harness.engine import model as engine
from harness.engine.output import OutputTap, output_weights
from harness.kld_reference import FORMS, HIDDEN, WRITERS, open_rows
from harness.measure import default_first_scored, peak_rss_bytes
from harness.record import physical_cores

N_TOKENS, UBATCH, WAYS = 2048, 128, ("decode", "nll", *FORMS)


def main(path: Path, rounds: int) -> None:
    rng = np.random.default_rng(0)
    first = default_first_scored(N_TOKENS)
    wanted = np.zeros(N_TOKENS, bool)
    wanted[first - 1 : N_TOKENS - 1] = True
    tap, weights = OutputTap(), output_weights(path)
    options = {"n_ctx": N_TOKENS, "ubatch_tokens": UBATCH, "flash_attention": True, "n_threads": physical_cores()}
    with tempfile.TemporaryDirectory() as folder, engine.open_model(path) as model:
        size = engine.n_vocab(model)
        window = rng.integers(10, size - 10, N_TOKENS).astype(np.int32)
        stored = {form: Path(folder) / form for form in FORMS}
        with engine.open_context(model, **options, eval_callback=tap.on_tensor) as context, ExitStack() as stack:
            files = {form: stack.enter_context(target.open("wb")) for form, target in stored.items()}
            for _, logits, _ in engine.decode_window(context, window, wanted, size, UBATCH):
                for form, write in WRITERS.items():
                    write(files[form], logits)
                files[HIDDEN].write(tap.take().tobytes())
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with engine.open_context(model, **options) as context:
            for i in range(rounds):
                for way in WAYS if i % 2 == 0 else WAYS[::-1]:
                    with stored.get(way, stored[HIDDEN]).open("rb") as file:
                        reader = open_rows(file, way, size, weights) if way in FORMS else None
                        begin = time.perf_counter()
                        for position, logits, _ in engine.decode_window(context, window, wanted, size, UBATCH):
                            if way != "decode" and len(logits):
                                metrics.token_values(logits, window[position + 1 : position + 1 + len(logits)], reader)
                        seconds[way].append(time.perf_counter() - begin)
    peak = peak_rss_bytes() or 0
    for way in WAYS:
        ratios = np.array(seconds[way]) / np.array(seconds["decode"]) - 1
        print(
            f"{way:<13} median {np.median(seconds[way]):7.3f} s   over decode {100 * np.median(ratios):+6.2f} % "
            f"({100 * ratios.min():+.2f} to {100 * ratios.max():+.2f})"
        )
    logits_bytes = (N_TOKENS - first) * size * 4
    bound = path.stat().st_size + 1.3 * logits_bytes + 200e6
    print(f"peak {peak / 1e6:.0f} MB; the file, 1.3 windows of logits and 200 MB are {bound / 1e6:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
