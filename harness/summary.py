"""Sentences from tables: what the data shows beyond noise, and no more. Pure."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from harness.frames import SCORED
from harness.tables import size

SIGNIFICANT = 0.05  # of the p value after Holm's adjustment


def key_improvements(table: pd.DataFrame) -> list[str]:
    """One sentence for each row whose perplexity fell beyond noise, the largest fall first."""
    rows = [row for row in _beyond_noise(table) if row["delta_ppl_pct"] < 0]
    return [
        f"{_label(row)}: perplexity {row['std_ppl']:.2f} → {row['dg_ppl']:.2f}, "
        f"{_percent(row)}, for {size(row['delta_bytes'], signed=True)}"
        for row in sorted(rows, key=lambda row: row["delta_ppl_pct"])
    ]


def tradeoffs(table: pd.DataFrame, runs: pd.DataFrame, speed: pd.DataFrame) -> list[str]:
    """What the improvements cost, and what did not improve."""
    sentences = []
    rows = [row for row in _offered(table) if not pd.isna(row["delta_ppl_pct"])]
    if rows:
        low, high = min(row["delta_bytes"] for row in rows), max(row["delta_bytes"] for row in rows)
        sizes = [100 * row["delta_bytes"] / row["std_bytes"] for row in rows]
        text, share = size(low, signed=True), f"{min(sizes):+.0f}%"
        if len(rows) > 1:
            text, share = f"{text} to {size(high, signed=True)}", f"{share} to {max(sizes):+.0f}%"
        sentences.append(f"Sizes change by {text} ({share})")
    worse = [row for row in _beyond_noise(table) if row["delta_ppl_pct"] > 0]
    sentences += [f"{_label(row)}: perplexity rises, {_percent(row)}" for row in worse]
    told = {row["dg_name"] for row in _beyond_noise(table)}
    noise = [_label(row) for row in rows if row["dg_name"] not in told]
    if noise:
        sentences.append(f"Within noise: {', '.join(noise)}")
    timed = [row for row in rows if not pd.isna(row["std_speed_s"]) and not pd.isna(row["dg_speed_s"])]
    timed = [row for row in timed if row.get("speed_from") != SCORED]  # those seconds measure no speed
    if timed:
        text = _range([100 * (row["dg_speed_s"] / row["std_speed_s"] - 1) for row in timed])
        sentences.append(f"Seconds for the prompt set change by {text}{_spread(speed, 'prompt')}")
    if "delta_generate_pct" in speed and speed.delta_generate_pct.notna().any():
        text = _range(speed.delta_generate_pct.dropna().tolist())
        sentences.append(f"Generated tokens/s change by {text}{_spread(speed, 'generate')}")
    good = runs[(runs.status == "ok") & ~runs["mode"].astype(str).str.startswith("placebo")]
    for verdict, words in (("wins", "better"), ("ties", "not better"), ("loses", "worse")):
        names = good[good.verdict == verdict]["name"]
        if len(names):
            sentences.append(f"At equal size {words} than the standard ladder: {', '.join(names)}")
    beaten = good[(good["mode"] != "standard") & good.dominated_by.notna()]
    if len(beaten):
        pairs = [f"{row['dominated_by']} than {row['name']}" for row in beaten.to_dict("records")]
        sentences.append(f"No larger and better beyond noise: {', '.join(pairs)}")
    return sentences


def _range(percents: Sequence[float]) -> str:
    low, high = min(percents), max(percents)
    return f"{low:+.1f}%" + (f" to {high:+.1f}%" if len(percents) > 1 else "")


def _spread(speed: pd.DataFrame, step: str) -> str:
    """What a change of speed must exceed to mean anything."""
    return f" (rounds of one file differ by up to {100 * speed[f'{step}_spread'].max():.1f}%)" if len(speed) else ""


def _beyond_noise(table: pd.DataFrame) -> Sequence[dict[Any, Any]]:
    if "p_holm" not in table:
        return []
    return [row for row in _offered(table) if not pd.isna(row["p_holm"]) and row["p_holm"] <= SIGNIFICANT]


def _offered(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows of files that somebody might publish: a placebo only shows what a policy is worth."""
    return [row for row in table.to_dict("records") if not str(row["mode"]).startswith("placebo")]


def _label(row: dict[Any, Any]) -> str:
    plain = row["policy"] == row["mode"] == "dynamicgate"
    return row["quant"].upper() if plain else str(row["dg_name"])


def _percent(row: dict[Any, Any]) -> str:
    low, high = row["delta_ppl_pct_low"], row["delta_ppl_pct_high"]
    interval = "" if pd.isna(low) or pd.isna(high) else f" [{low:+.1f}, {high:+.1f}]"
    return f"{row['delta_ppl_pct']:+.1f}%{interval}"
