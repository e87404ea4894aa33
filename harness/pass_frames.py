"""What the passes after the scoring measured, as data frames: speed, and errors of the hidden states. No llama.cpp."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness.passes import SpeedPass, Timing, read_layers
from harness.record import Record
from harness.stats import Interval, mean_interval, small_sample_interval

SPEED_COLUMNS = (
    *("prompt_tokens_per_s", "prompt_spread", "generate_tokens_per_s", "generate_spread", "warm_load_s", "speed_pass"),
)


def speed_columns(timing: Timing | None) -> dict[str, Any]:
    """Medians of one case, and spread: (slowest - fastest) / median. The same columns, empty, without a timing."""
    row: dict[str, Any] = dict.fromkeys(SPEED_COLUMNS)
    if timing is None:
        return row
    row["prompt_tokens_per_s"] = timing.prompt_tokens / float(np.median(timing.prompt_s))
    row["generate_tokens_per_s"] = timing.generate_tokens / float(np.median(timing.generate_s))
    row["prompt_spread"], row["generate_spread"] = spread(timing.prompt_s), spread(timing.generate_s)
    row["warm_load_s"], row["speed_pass"] = float(np.median(timing.load_s)), timing.pass_id
    return row


def spread(seconds: Sequence[float]) -> float:
    """(slowest - fastest) / median."""
    return (max(seconds) - min(seconds)) / float(np.median(seconds))


def speed_frame(records: Sequence[Record], timings: Mapping[str, Timing]) -> pd.DataFrame:
    """One row a case that was timed; change of tokens/s against the standard file of the same quant, per cent with its
    interval, where both were timed in one pass."""
    standard = {r.data["quant"]: timings.get(r.data["key"]) for r in records if r.data["mode"] == "standard"}
    rows = []
    for record in records:
        timing = timings.get(record.data["key"])
        if timing is None:
            continue
        row: dict[str, Any] = {"name": record.name, "quant": record.data["quant"], "mode": record.data["mode"]}
        row |= {"file_bytes": record.data["variant"]["file_bytes"], **speed_columns(timing)}
        base = standard.get(record.data["quant"]) if record.data["mode"] not in ("standard", "reference") else None
        for step in ("prompt", "generate"):
            names = (f"delta_{step}_pct", f"delta_{step}_pct_low", f"delta_{step}_pct_high")
            row |= dict.fromkeys(names)
            if base is not None and base.pass_id == timing.pass_id:
                ratio = speed_ratio(getattr(timing, f"{step}_s"), getattr(base, f"{step}_s"))
                values = (ratio.mean, ratio.low, ratio.high)
                row |= {n: None if v is None else 100 * math.expm1(v) for n, v in zip(names, values, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows)


def speed_ratio(seconds: Sequence[float], standard_s: Sequence[float]) -> Interval:
    """ln of the ratio of tokens/s, paired by round, with a Student interval."""
    return small_sample_interval(np.log(standard_s) - np.log(seconds))


def llama_bench(records: Sequence[Record], passes: Sequence[SpeedPass]) -> list[dict[str, Any]]:
    """The timings in the fields of `llama-bench -o json`, two tests a case: prompt processing and generation."""
    by_key = {record.data["key"]: record for record in records}
    newest = {key: one for one in passes for key in one.cases}
    rows = []
    for key, record in by_key.items():
        if key not in newest:
            continue
        one = newest[key]
        timing, variant, settings = one.cases[key], record.data["variant"], one.settings
        for n_prompt, n_gen, seconds in (
            (timing.prompt_tokens, 0, timing.prompt_s),
            (0, timing.generate_tokens, timing.generate_s),
        ):
            samples = np.array([(n_prompt + n_gen) / s for s in seconds])
            nanoseconds = 1e9 * np.array(seconds)
            rows.append(
                {
                    "cpu_info": one.environment.get("cpu"),
                    "backends": "CPU",
                    "model_filename": record.name,
                    "model_type": f"{record.data['reference']['architecture']} {record.name}",
                    "model_size": variant["file_bytes"],
                    "model_n_params": variant["n_params"],
                    "n_batch": settings["ubatch_tokens"],
                    "n_ubatch": settings["ubatch_tokens"],
                    "n_threads": settings["threads"],
                    "flash_attn": settings["flash_attention"],
                    "n_prompt": n_prompt,
                    "n_gen": n_gen,
                    "n_depth": 0,
                    "test_time": one.created_utc,
                    "avg_ns": round(float(nanoseconds.mean())),
                    "stddev_ns": round(float(nanoseconds.std(ddof=1))),
                    "avg_ts": float(samples.mean()),
                    "stddev_ts": float(samples.std(ddof=1)),
                    "samples_ns": [round(x) for x in nanoseconds.tolist()],
                    "samples_ts": samples.tolist(),
                }
            )
    return rows


def layers_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each case and layer: mean relative error of the hidden state with its interval, and the change
    against the standard file of the same quant, per cent, with its interval. Layer "mean": averaged over the depth."""
    found = {r.name: one for r in records if r.ok and (one := read_layers(r.path, r.data["key"])) is not None}
    alike = Counter(layers_key for layers_key, _, _ in found.values()).most_common(1)
    errors = {
        name: [*zip(map(str, numbers), values, strict=True), ("mean", values.mean(axis=0))]
        for name, (layers_key, numbers, values) in found.items()
        if layers_key == alike[0][0]  # over other windows or with other settings: not of this table
    }
    standard = {r.data["quant"]: r.name for r in records if r.ok and r.data["mode"] == "standard"}
    rows = []
    for record in records:
        base = dict(errors.get(standard.get(record.data["quant"], ""), []))
        for layer, values in errors.get(record.name, []):
            interval = mean_interval(values)
            row = {"name": record.name, "quant": record.data["quant"], "mode": record.data["mode"], "layer": layer}
            row |= {"error": interval.mean, "error_low": interval.low, "error_high": interval.high}
            names = ("delta_pct", "delta_pct_low", "delta_pct_high")
            row |= dict.fromkeys(names)
            other = base.get(layer)
            if record.data["mode"] != "standard" and other is not None and other.shape == values.shape:
                row |= dict(zip(names, ratio_change(values, other), strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def ratio_change(values: np.ndarray, base: np.ndarray) -> tuple[float, float | None, float | None]:
    """Change of a mean against another on the same tokens, per cent, with its interval. Both [n_windows, n_scored].

    The ratio of means is linearized (Davison and Hinkley 1997, chapter 2.7): values - ratio * base has mean 0, and its
    interval over the base's mean is that of the ratio.
    """
    mean = float(base.mean())
    ratio = float(values.mean()) / mean
    rest = mean_interval(values - ratio * base)
    if rest.low is None or rest.high is None:
        return 100 * (ratio - 1), None, None
    return 100 * (ratio - 1), 100 * (ratio + rest.low / mean - 1), 100 * (ratio + rest.high / mean - 1)
