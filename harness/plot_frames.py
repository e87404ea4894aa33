"""What the plots show, as data frames: one function a plot, pure. `plots` and `depth_plots` draw them."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from harness.ggml_types import GGML_TYPES
from harness.plan import role_and_layer
from harness.record import Record
from harness.shown import MOST_POSITIONS, MOST_QUANTS, MOST_ROWS, of_kld, of_positions, of_types, spread_out
from harness.stats import BLOCK_TOKENS, MIN_BLOCKS, Interval, mean_interval, small_sample_interval

MIB = 1 << 20
KLD_FLOOR = 1e-6  # nats; what is below is rounding and has no place on a log axis
KLD_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
_LLAMA_3_8B = re.compile(r"llama[-_ ]?3[-_ ]8b", re.IGNORECASE)

_POINT_COLUMNS = ("name", "quant", "series", "size_mib", "value", "low", "high", "on_front", "from_mib", "from_value")


def series_of(name: str, quant: str) -> str:
    """What cases of several quants share, and so one colour in every plot: 'standard', 'dynamicgate', ..."""
    return name.removeprefix(f"{quant}-")


def ppl_points(runs: pd.DataFrame) -> pd.DataFrame:
    """Perplexity and size (MiB) of every measured variant; low and high: one standard error around it."""
    return _points(runs.assign(value=runs.ppl, low=runs.ppl - runs.ppl_se, high=runs.ppl + runs.ppl_se))


def kld_points(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean KLD (nats, at least KLD_FLOOR) and size (MiB) of every variant; low and high: its 95 % interval."""
    columns = {"value": "kld_mean", "low": "kld_low", "high": "kld_high"}
    return _points(runs.assign(**{to: runs[name].astype(float).clip(KLD_FLOOR) for to, name in columns.items()}))


def _points(runs: pd.DataFrame) -> pd.DataFrame:
    """on_front: no other variant is as small and as good. from_mib, from_value: the standard file of the same quant."""
    good = runs.loc[
        (runs.status == "ok") & (runs["mode"] != "reference") & runs.value.notna(),
        ["name", "quant", "mode", "file_bytes", "value", "low", "high"],
    ]
    standard = {row["quant"]: row for row in good.to_dict("records") if row["mode"] == "standard"}
    rows = []
    for row in good.to_dict("records"):
        base = standard.get(row["quant"]) if row["mode"] != "standard" else None
        point = {name: row[name] for name in ("name", "quant", "value", "low", "high")}
        point |= {"series": series_of(row["name"], row["quant"]), "size_mib": row["file_bytes"] / MIB}
        point |= {"from_mib": base["file_bytes"] / MIB if base else None, "from_value": base["value"] if base else None}
        rows.append(point)
    front, best = set(), np.inf
    for point in sorted(rows, key=lambda one: (one["size_mib"], one["value"])):
        if point["value"] < best:
            best = point["value"]
            front.add(point["name"])
    numbers = ("size_mib", "value", "low", "high", "from_mib", "from_value")
    frame = pd.DataFrame([{**row, "on_front": row["name"] in front} for row in rows], columns=list(_POINT_COLUMNS))
    return frame.astype(dict.fromkeys(numbers, float))


def delta_frame(comparison: pd.DataFrame) -> pd.DataFrame:
    """Change of PPL against the standard file of the same quant, per cent, with its 95 % interval; one row a pair, at
    most MOST_ROWS, evenly chosen."""
    paired = comparison[comparison.delta_ppl_pct.notna()]
    paired = paired.iloc[spread_out(len(paired), MOST_ROWS)]
    rows = [
        {
            "name": row["dg_name"],
            "quant": row["quant"],
            "series": series_of(row["dg_name"], row["quant"]),
            "delta_pct": row["delta_ppl_pct"],
            "low_pct": row["delta_ppl_pct_low"],
            "high_pct": row["delta_ppl_pct_high"],
        }
        for row in paired.to_dict("records")
    ]
    frame = pd.DataFrame(rows, columns=["name", "quant", "series", "delta_pct", "low_pct", "high_pct"])
    return frame.astype(dict.fromkeys(("delta_pct", "low_pct", "high_pct"), float))


def speed_points(speed: pd.DataFrame, bench: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Tokens/s and size (MiB); two rows a timed case, step 'generate' and 'prompt'. low and high: slowest and fastest
    round. bench: the fields of llama-bench, which have every round."""
    samples = {
        (test["model_filename"], "prompt" if test["n_prompt"] else "generate"): test["samples_ts"] for test in bench
    }
    rows = [
        {
            "name": row["name"],
            "quant": row["quant"],
            "series": series_of(row["name"], row["quant"]),
            "step": step,
            "size_mib": row["file_bytes"] / MIB,
            "tokens_per_s": row[f"{step}_tokens_per_s"],
            "low": min(samples[row["name"], step]),
            "high": max(samples[row["name"], step]),
        }
        for row in speed.to_dict("records")
        for step in ("generate", "prompt")
    ]
    columns = ["name", "quant", "series", "step", "size_mib", "tokens_per_s", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def types_frame(records: Sequence[Record], most: int = MOST_QUANTS) -> pd.DataFrame:
    """Bits per weight of every tensor under a policy and in the standard file, of the records that `shown.of_types`
    chooses. layer: empty outside the blocks. Roles that stay f32 (norms, biases) are left out."""
    columns = ["name", "quant", "series", "role", "layer", "type", "bpw", "standard_type", "standard_bpw"]
    found = []
    for record in of_types(records, most):
        rows = []
        for tensor, types in record.data["variant"]["tensors"].items():
            role, layer = role_and_layer(tensor)
            row = {"name": record.name, "quant": record.data["quant"], "role": role, "layer": layer}
            row |= {"type": types["type"], "standard_type": types["standard"]}
            row |= {"bpw": GGML_TYPES[types["type"]].bpw, "standard_bpw": GGML_TYPES[types["standard"]].bpw}
            rows.append({**row, "series": series_of(record.name, record.data["quant"])})
        frame = pd.DataFrame(rows, columns=columns).astype({"layer": float})
        plain = (frame.type == "f32") & (frame.standard_type == "f32")
        found.append(frame[~plain.groupby(frame.role).transform("all").astype(bool)])
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def kld_quantiles_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Mean and quantiles of the per-token KLD, nats, at least KLD_FLOOR; columns q0.05 .. q0.999. One row for each
    variant that `shown.of_kld` chooses."""
    rows = []
    for record in of_kld(records):
        kld, quant = record.per_token()["kld"], record.data["quant"]
        row = {"name": record.name, "quant": quant, "series": series_of(record.name, quant), "mean": kld.mean()}
        row |= {f"q{q}": value for q, value in zip(KLD_QUANTILES, np.quantile(kld, KLD_QUANTILES), strict=True)}
        rows.append({k: max(v, KLD_FLOOR) if isinstance(v, float) else v for k, v in row.items()})
    return pd.DataFrame(rows, columns=["name", "quant", "series", "mean", *(f"q{q}" for q in KLD_QUANTILES)])


def position_frame(records: Sequence[Record], most: int = MOST_POSITIONS) -> pd.DataFrame:
    """Mean nll minus the reference's (nats) by position in the window, in blocks of about 93 positions, of the variants
    that `shown.of_positions` chooses, the best first.

    position: middle of the block, counted from the window's first token. low and high: 95 % interval over the windows.
    """
    columns = ["name", "quant", "series", "position", "delta_nll", "low", "high"]
    shown = of_positions(records, most)
    if not shown:
        return pd.DataFrame(columns=columns)
    base, variants = shown[0].per_token()["nll"], shown[1:]
    n_scored = base.shape[1]
    edges = np.linspace(0, n_scored, max(1, n_scored // BLOCK_TOKENS) + 1).round().astype(int)
    rows = []
    for record in variants:
        values = record.per_token()["nll"] - base
        label = (record.name, record.data["quant"], series_of(record.name, record.data["quant"]))
        for begin, end in pairwise(edges):
            interval = _over_windows(values[:, begin:end])
            position = record.data["settings"]["first_scored"] + (begin + end - 1) / 2
            rows.append((*label, position, interval.mean, interval.low, interval.high))
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[3:], float))


def _over_windows(values: np.ndarray) -> Interval:
    """The mean with its interval, one value a window: Student's for a few windows, else the bootstrap."""
    if len(values) < MIN_BLOCKS:
        return small_sample_interval(values.mean(axis=1))
    return mean_interval(values, block_tokens=values.shape[1])


def board_points(reference_name: str, sizes_mib: Sequence[float]) -> pd.DataFrame:
    """llama.cpp's published board of Llama 3 8B: quant, size_mib, ppl, kld; within the sizes given (10 % more on both
    sides). No rows for every other model."""
    if not _LLAMA_3_8B.search(reference_name) or not len(sizes_mib):
        return pd.DataFrame(columns=["quant", "size_mib", "ppl", "kld"])
    with resources.as_file(resources.files("harness") / "data" / "llamacpp_llama3_8b.csv") as path:
        board = pd.read_csv(path, comment="#")
    board["size_mib"] = board.size_gib * 1024
    near = board.size_mib.between(0.9 * min(sizes_mib), 1.1 * max(sizes_mib))
    return board.loc[near, ["quant", "size_mib", "ppl", "kld"]].reset_index(drop=True)
