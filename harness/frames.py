"""Records -> data frames: one row a case, one row a comparison. Every number that a table shows is made here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from harness import metrics
from harness.compare import Measured, Verdict, difference, dominators, equal_size_verdict, pareto_front, standard_ladder
from harness.mixture import Mixture
from harness.pass_frames import speed_columns
from harness.passes import Timing, machine_of
from harness.record import Record, field, in_order
from harness.stats import Interval, holm, mean_interval

TIMED, SCORED = "timing", "scoring"  # what the seconds of the comparison are of


def measured_cases(records: Iterable[Record]) -> list[Measured]:
    """The successful records as the comparisons see them."""
    cases = []
    for record in in_order(records):
        if record.ok:
            values = record.per_token()
            quant, mode, _ = record.label
            n_bytes = record.data["variant"]["file_bytes"]
            cases.append(Measured(record.name, quant, mode, n_bytes, values["nll"], values.get("kld")))
    return cases


def runs_frame(records: Sequence[Record], timings: Mapping[str, Timing] = MappingProxyType({})) -> pd.DataFrame:
    """One row a case, the columns that results/README.md documents; absent numbers are empty, never 0."""
    records = in_order(records)
    reference = next((r for r in records if r.ok and r.data["mode"] == "reference"), None)
    reference_values = reference.per_token() if reference else None
    cases = measured_cases(records)
    variants = [case for case in cases if case.mode != "reference"]
    dominated, front = dominators(variants), pareto_front(variants)
    by_name = {case.name: case for case in variants}
    ladder = standard_ladder(variants)
    placebos = {
        (quant, policy): by_name.get(record.name)
        for record in records
        for quant, mode, policy in [record.label]
        if mode.startswith("placebo") and record.ok
    }
    rows = []
    for record in records:
        row = _run_row(record, reference_values)
        case = by_name.get(record.name)
        row |= _verdict_columns(equal_size_verdict(case, ladder) if case and case.mode != "standard" else None)
        row["vs_placebo"] = _versus_placebo(case, placebos.get((record.data["quant"], record.data["policy"])))
        row["dominated_by"] = dominated.get(record.name)
        row["on_front"] = case.name in front if case else None
        row |= speed_columns(timings.get(record.data["key"]))
        rows.append(row | {"key": record.data["key"], "status": record.data["status"]})
    return pd.DataFrame(rows)


def comparison_frame(runs: pd.DataFrame, records: Sequence[Record]) -> pd.DataFrame:
    """One row for each quant and other mode: standard beside it, as numbers. Deltas are empty without a pair."""
    cases = {case.name: case for case in measured_cases(records)}
    good = runs[(runs.status == "ok") & (runs["mode"] != "reference")]
    speed_from = _speed_from(good)
    of_quants: dict[str, list[Any]] = {}
    for run in good.to_dict("records"):
        policy = None if pd.isna(run["policy"]) else run["policy"]  # a column of texts has NaN where there is none
        of_quants.setdefault(run["quant"], []).append({**run, "policy": policy})
    rows = []
    for quant, of_quant in of_quants.items():
        standard = next((run for run in of_quant if run["mode"] == "standard"), None)
        others = [run for run in of_quant if run["mode"] != "standard"] or [None]
        rows += [_pair_row(quant, standard, other, cases, speed_from) for other in others]
    # The parts of an attribution are a family of their own: they must not make the others harder to tell apart.
    for parts in (False, True):
        family = [row for row in rows if ("_without_" in (row["policy"] or "")) is parts]
        for row, p_holm in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p_holm
    return pd.DataFrame(rows, columns=[*_pair_row("", None, None, {}, None), "p_holm"])


def attribution_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each case that left rules of a policy out, beside the full policy on the same quant.

    saved_*: how much worse the file is without the rules, so what they save; cost_bytes: what they cost.
    """
    cases = {case.name: case for case in measured_cases(records)}
    labels = {record.label: record.name for record in records if record.ok}
    rows = []
    for (quant, mode, policy), name in labels.items():
        full_policy, _, rules = (policy or "").partition("_without_")
        full = cases.get(labels.get((quant, mode, full_policy), ""))
        if not rules or full is None:
            continue
        saved = difference(cases[name], full)
        row: dict[str, Any] = {"name": name, "quant": quant, "policy": full_policy}
        row["rules"] = rules.replace("_without_", ", ")
        row["cost_bytes"] = full.file_bytes - cases[name].file_bytes
        row |= _interval_columns("saved_ln_ppl", saved.ln_ppl) | _interval_columns("saved_kld", saved.kld)
        rows.append(row)
    return pd.DataFrame(rows)


def _run_row(record: Record, reference: dict[str, np.ndarray] | None) -> dict[str, Any]:
    data = record.data
    row: dict[str, Any] = {"name": record.name}
    row |= {name: data[name] for name in ("quant", "mode", "policy", "file_type")}
    for name in ("n_params", "file_bytes", "bpw", "n_fallback", "fallback_share", "n_quantizable", "n_lowered"):
        row[name] = data["variant"][name]
    row |= {name: data["variant"][name] for name in ("embedding_type", "output_type")}
    recorded = data.get("mixture")
    row["pure"] = recorded["pure"] if recorded else None
    row["mixture"] = Mixture.from_json(recorded).words if recorded else (data["file_type"] or "").upper() or None
    row |= _quality_columns(record.per_token() if record.ok else None, reference)
    pass_s, prompt_set = field(data, "timings.pass_s"), data["prompt_set"]
    row["pass_s"] = pass_s
    row["n_tokens"] = prompt_set["n_windows"] * prompt_set["window_tokens"]
    row["tokens_per_s"] = row["n_tokens"] / pass_s if pass_s else None
    row["windows_at_once"] = field(data, "timings.windows_at_once")
    row["load_s"] = field(data, "timings.load_s")
    row["quantize_s"] = field(data, "timings.quantize_s")
    row["peak_rss_bytes"] = data.get("peak_rss_bytes")
    row["machine"] = " ".join(str(one) for one in machine_of(data["environment"]) if one) or None
    return row


def _quality_columns(values: dict[str, np.ndarray] | None, reference: dict[str, np.ndarray] | None) -> dict[str, Any]:
    """Everything that follows from the per-token values; the same columns, empty, for a failed case."""
    row: dict[str, Any] = dict.fromkeys(QUALITY_COLUMNS)
    if values is None:
        return row
    nll = values["nll"]
    row["ppl"], row["ppl_se"] = metrics.perplexity(nll)
    row["n_windows"], row["n_scored"] = nll.shape[0], nll.size
    if reference is None:
        return row
    ratio = metrics.ln_ppl_ratio(nll, reference["nll"])
    row["ln_ppl_ratio_vs_reference"], row["ln_ppl_ratio_se"] = ratio
    row["delta_ppl"], row["delta_ppl_se"] = metrics.perplexity_difference(nll, reference["nll"])
    if "kld" not in values:
        return row
    interval = mean_interval(nll - reference["nll"])
    row["ln_ppl_ratio_low"], row["ln_ppl_ratio_high"] = interval.low, interval.high
    row["ln_ppl_correlation"] = metrics.correlation(nll, reference["nll"])
    row |= metrics.kld_summary(values["kld"])
    interval = mean_interval(values["kld"])
    row["kld_low"], row["kld_high"] = interval.low, interval.high
    row["same_top"], row["same_top_se"] = metrics.share(values["top"] == reference["top"])
    return row | metrics.probability_change(nll, reference["nll"])


QUALITY_COLUMNS = (
    *("ppl", "ppl_se", "n_windows", "n_scored", "ln_ppl_ratio_vs_reference", "ln_ppl_ratio_se"),
    *("ln_ppl_ratio_low", "ln_ppl_ratio_high", "ln_ppl_correlation", "kld_mean", "kld_se", "kld_low", "kld_high"),
    *("kld_median", "kld_p90", "kld_p95", "kld_p99", "kld_p99_9", "kld_max", "same_top", "same_top_se"),
    *("delta_ppl", "delta_ppl_se", "dp_mean_pct", "dp_mean_se_pct", "dp_rms_pct", "dp_rms_se_pct"),
    *(f"dp_p{percent}_pct" for percent in (1, 5, 25, 50, 75, 95, 99)),
)


def _verdict_columns(verdict: Verdict | None) -> dict[str, Any]:
    names = ("verdict", "verdict_kld", "verdict_between", "verdict_reason")
    row: dict[str, Any] = dict.fromkeys(
        (*names, *_interval_names("equal_size_ln_ppl"), *_interval_names("equal_size_kld"))
    )
    if verdict is None:
        return row
    row["verdict"], row["verdict_kld"], row["verdict_reason"] = verdict.word, verdict.kld_word, verdict.reason
    row["verdict_between"] = " and ".join(verdict.between) if verdict.between else None
    row |= _interval_columns("equal_size_ln_ppl", verdict.ln_ppl)
    return row | _interval_columns("equal_size_kld", verdict.kld)


def _versus_placebo(case: Measured | None, placebo: Measured | None) -> str | None:
    """wins, ties or loses against the placebo of the same quant and policy; None without one."""
    if case is None or placebo is None or case.mode == "standard" or case.mode.startswith("placebo"):
        return None
    sign = difference(case, placebo).ln_ppl.sign
    return None if sign is None else {-1: "wins", 0: "ties", 1: "loses"}[sign]


def _interval_names(prefix: str) -> tuple[str, str, str]:
    return prefix, f"{prefix}_low", f"{prefix}_high"


def _interval_columns(prefix: str, interval: Interval | None) -> dict[str, float | None]:
    values = (None, None, None) if interval is None else (interval.mean, interval.low, interval.high)
    return dict(zip(_interval_names(prefix), values, strict=True))


def _speed_from(good: pd.DataFrame) -> str | None:
    """Where the seconds of the comparison come from. None: nowhere, as seconds of several machines, or of other numbers
    of windows at once, stand in no column."""
    if good.speed_pass.notna().any():
        return TIMED
    return (
        SCORED
        if len(good[["machine", "windows_at_once"]].fillna({"windows_at_once": 1}).drop_duplicates()) <= 1
        else None
    )


def _pair_row(
    quant: str, standard: Any, other: Any, cases: dict[str, Measured], speed_from: str | None
) -> dict[str, Any]:
    def get(row: Any, name: str) -> Any:
        return None if row is None else row[name]

    row: dict[str, Any] = {"quant": quant, "policy": get(other, "policy"), "mode": get(other, "mode")}
    for prefix, side in (("std", standard), ("dg", other)):
        row[f"{prefix}_name"] = get(side, "name")
        row[f"{prefix}_ppl"], row[f"{prefix}_ppl_se"] = get(side, "ppl"), get(side, "ppl_se")
        row[f"{prefix}_kld"], row[f"{prefix}_same_top"] = get(side, "kld_mean"), get(side, "same_top")
        row[f"{prefix}_bytes"], row[f"{prefix}_bpw"] = get(side, "file_bytes"), get(side, "bpw")
    row["std_speed_s"], row["dg_speed_s"] = _speeds_s(standard, other, speed_from)
    row["speed_from"] = speed_from
    deltas = ("delta_ppl_pct", "delta_ppl_pct_low", "delta_ppl_pct_high", "p", "delta_kld", "delta_kld_low")
    row |= dict.fromkeys((*deltas, "delta_kld_high", "delta_bytes", "resolvable_pct", "windows_to_resolve"))
    if standard is not None and other is not None:
        paired = difference(cases[other["name"]], cases[standard["name"]])
        ln_ppl = paired.ln_ppl
        row["delta_ppl_pct"], row["p"] = percent_change(ln_ppl.mean), ln_ppl.p
        row["delta_ppl_pct_low"], row["delta_ppl_pct_high"] = percent_change(ln_ppl.low), percent_change(ln_ppl.high)
        row["resolvable_pct"] = percent_change(ln_ppl.resolvable)
        row["windows_to_resolve"] = ln_ppl.windows_to_resolve(int(other["n_windows"]))
        row |= _interval_columns("delta_kld", paired.kld)
        row["delta_bytes"] = other["file_bytes"] - standard["file_bytes"]
    return row


def _speeds_s(standard: Any, other: Any, speed_from: str | None) -> tuple[float | None, float | None]:
    """Seconds to run the prompt set, at the median speed of the timing pass where both sides were timed in one; None
    where they were not. In a table without any timing: as the scoring itself took, if one machine did all of it."""
    sides = [side for side in (standard, other) if side is not None]
    passes = {side["speed_pass"] for side in sides}
    timed = len(passes) == 1 and all(isinstance(one, str) for one in passes)

    def seconds(side: Any) -> float | None:
        if side is None:
            return None
        if timed:
            return float(side["n_tokens"] / side["prompt_tokens_per_s"])
        return float(side["pass_s"]) if speed_from == SCORED and side["pass_s"] is not None else None

    return seconds(standard), seconds(other)


def percent_change(ln_ratio: float | None) -> float | None:
    """100 * (ratio - 1) from the logarithm of the ratio."""
    return None if ln_ratio is None else 100 * math.expm1(ln_ratio)
