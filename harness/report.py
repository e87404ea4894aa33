"""Records -> tables. Reads records only; runs without llama.cpp."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness import metrics
from harness.errors import UserError
from harness.plots import plot_tradeoff
from harness.record import Record, field, first_difference, read_records
from harness.store import write_atomic, write_text

TABLE_COLUMNS = (
    "Quantization",
    "Standard PPL",
    "DynamicGate PPL",
    "Δ PPL",
    "Std Size",
    "DG Size",
    "Δ Size",
    "Std Speed",
    "DG Speed",
)
_ABSENT = "-"
_WIDTH = 118


@dataclass(frozen=True)
class Report:
    """What was written, and the text for the terminal."""

    text: str
    paths: tuple[Path, ...]


def write_report(folder: Path) -> Report:
    """Tables and plot of all records in a sweep's folder, written beside them.

    Raises UserError when the records may not stand in one table.
    """
    records = read_records(folder)
    if not records:
        raise UserError(f"{folder} holds no records: run a sweep into it first")
    measured = [record for record in records if record.ok]
    difference = first_difference(record.data for record in measured)
    if difference:
        name, one, other = difference
        raise UserError(f"{folder} holds records that differ in {name} ({one} and {other}): they make no one table")
    runs = runs_frame(records)
    table = comparison_frame(runs, measured)
    text = _table_text(runs, table, measured)
    paths = (folder / "runs.csv", folder / "table.csv", folder / "table.md", folder / "tradeoff.png")
    write_text(paths[0], runs.to_csv(index=False))
    write_text(paths[1], table.to_csv(index=False))
    write_text(paths[2], text)
    if measured:
        data = measured[0].data
        title = (
            f"{data['reference']['name']} on {data['prompt_set']['name']}; bars are one standard error of the tokens"
        )
        write_atomic(paths[3], lambda temporary: plot_tradeoff(runs[runs.status == "ok"], title, temporary))
    return Report(text, paths if measured else paths[:3])


def runs_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a case, the columns that results/README.md documents; absent numbers are empty, never 0."""
    reference = next((r for r in records if r.ok and r.data["mode"] == "reference"), None)
    reference_nll = reference.nll() if reference else None
    return pd.DataFrame([_run_row(record, reference_nll) for record in in_order(records)])


def comparison_frame(runs: pd.DataFrame, measured: Sequence[Record]) -> pd.DataFrame:
    """One row for each quant and policy: standard beside DynamicGate, as numbers. Deltas are None without a pair."""
    nll = {record.data["key"]: record.nll() for record in measured}
    good = runs[(runs.status == "ok") & (runs["mode"] != "reference")]
    rows = []
    for quant in dict.fromkeys(good.quant):
        of_quant = good[good.quant == quant]
        standard = next((row for _, row in of_quant[of_quant["mode"] == "standard"].iterrows()), None)
        others = [row for _, row in of_quant[of_quant["mode"] != "standard"].iterrows()] or [None]
        rows += [_pair_row(quant, standard, other, nll) for other in others]
    return pd.DataFrame(rows)


def markdown_table(table: pd.DataFrame) -> str:
    """The model card's table, cells rounded (not cut), padded so that it reads in a terminal as well."""
    rows = [list(TABLE_COLUMNS), ["-"] * len(TABLE_COLUMNS)]
    for row in table.to_dict("records"):
        rows.append(
            [
                _quant_label(row),
                plus_minus(row["std_ppl"], row["std_ppl_se"]),
                plus_minus(row["dg_ppl"], row["dg_ppl_se"]),
                percent(row["delta_ppl_pct"], row["delta_ppl_pct_se"]),
                size(row["std_bytes"]),
                size(row["dg_bytes"]),
                size(row["delta_bytes"], signed=True),
                seconds(row["std_pass_s"]),
                seconds(row["dg_pass_s"]),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(TABLE_COLUMNS))]
    rows[1] = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in rows)


def plus_minus(value: float | None, se: float | None) -> str:
    """'28.41 ±1.32': the value with as many decimals as its error has up to two figures."""
    if _is_absent(value):
        return _ABSENT
    if _is_absent(se):
        return f"{value:.2f}"
    decimals = max(0, min(4, 1 - math.floor(math.log10(se)))) if se else 4
    return f"{value:.{decimals}f} ±{se:.{decimals}f}"


def percent(value: float | None, se: float | None) -> str:
    """'-43.9% ±1.2'."""
    if _is_absent(value):
        return _ABSENT
    return f"{value:+.1f}%" + ("" if _is_absent(se) else f" ±{se:.1f}")


def size(n_bytes: float | None, *, signed: bool = False) -> str:
    """'2.5G' or '93.6M': binary units, as `ls -lh` has them."""
    if _is_absent(n_bytes):
        return _ABSENT
    assert n_bytes is not None
    unit, scale = ("G", 1 << 30) if abs(n_bytes) >= 1 << 30 else ("M", 1 << 20)
    return f"{n_bytes / scale:{'+' if signed else ''}.1f}{unit}"


def seconds(value: float | None) -> str:
    """'13.3s'; whole seconds from 100 on."""
    if _is_absent(value):
        return _ABSENT
    return f"{value:.0f}s" if value is not None and value >= 100 else f"{value:.1f}s"


def _run_row(record: Record, reference_nll: Any) -> dict[str, Any]:
    data = record.data
    row: dict[str, Any] = {name: data[name] for name in ("quant", "mode", "policy", "file_type")}
    for name in ("n_params", "file_bytes", "bpw", "n_fallback", "fallback_share", "n_quantizable", "n_lowered"):
        row[name] = data["variant"][name]
    row |= {name: data["variant"][name] for name in ("embedding_type", "output_type")}
    row |= dict.fromkeys(("ppl", "ppl_se", "ln_ppl_ratio_vs_reference", "ln_ppl_ratio_se", "n_windows", "n_scored"))
    if record.ok:
        nll = record.nll()
        row["ppl"], row["ppl_se"] = metrics.perplexity(nll)
        row["n_windows"], row["n_scored"] = nll.shape[0], nll.size
        if reference_nll is not None:
            row["ln_ppl_ratio_vs_reference"], row["ln_ppl_ratio_se"] = metrics.ln_ppl_ratio(nll, reference_nll)
    pass_s = field(data, "timings.pass_s")
    prompt_set = data["prompt_set"]
    row["pass_s"] = pass_s
    row["tokens_per_s"] = prompt_set["n_windows"] * prompt_set["window_tokens"] / pass_s if pass_s else None
    row["load_s"] = field(data, "timings.load_s")
    row["quantize_s"] = field(data, "timings.quantize_s")
    row["peak_rss_bytes"] = data.get("peak_rss_bytes")
    return {**row, "key": data["key"], "status": data["status"]}


def _pair_row(quant: str, standard: Any, other: Any, nll: dict[str, Any]) -> dict[str, Any]:
    def get(row: Any, name: str) -> Any:
        return None if row is None else row[name]

    row: dict[str, Any] = {"quant": quant, "policy": get(other, "policy"), "mode": get(other, "mode")}
    for prefix, side in (("std", standard), ("dg", other)):
        row[f"{prefix}_ppl"], row[f"{prefix}_ppl_se"] = get(side, "ppl"), get(side, "ppl_se")
        row[f"{prefix}_bytes"], row[f"{prefix}_bpw"] = get(side, "file_bytes"), get(side, "bpw")
        row[f"{prefix}_pass_s"] = get(side, "pass_s")
    row |= dict.fromkeys(("delta_ppl_pct", "delta_ppl_pct_se", "delta_bytes"))
    if standard is not None and other is not None:
        ratio = metrics.ln_ppl_ratio(nll[other["key"]], nll[standard["key"]])
        row["delta_ppl_pct"] = 100 * math.expm1(ratio.value)
        row["delta_ppl_pct_se"] = None if ratio.se is None else 100 * math.exp(ratio.value) * ratio.se
        row["delta_bytes"] = other["file_bytes"] - standard["file_bytes"]
    return row


def _table_text(runs: pd.DataFrame, table: pd.DataFrame, measured: Sequence[Record]) -> str:
    lines = []
    if measured:
        data = measured[0].data
        prompts, reference = data["prompt_set"], data["reference"]
        lines.append(
            f"{reference['name']} on {prompts['name']}: {prompts['n_windows']} windows of {prompts['window_tokens']} "
            f"tokens, {data['settings']['threads']} threads"
        )
        for row in runs[(runs["mode"] == "reference") & (runs.status == "ok")].to_dict("records"):
            kind = (reference["file_type"] or "").upper()
            lines.append(
                f"Reference {kind}: PPL {plus_minus(row['ppl'], row['ppl_se'])}, {size(row['file_bytes'])}, "
                f"{seconds(row['pass_s'])}"
            )
        lines.append("")
    if len(table):
        lines += [markdown_table(table), ""]
        lines.append(
            "PPL: perplexity, lower is better; ± is one standard error that takes tokens as independent (paired for "
            "Δ PPL).\nSpeed: seconds to score the prompt set once, in scoring order, not a benchmark. "
            "Size: G and M are binary."
        )
    notes = _notes(measured)
    if notes:
        lines += ["", *notes]
    for row in runs[runs.status != "ok"].to_dict("records"):
        lines += ["", f"FAILED: {row['quant']} {row['mode']}; its record tells why"]
    return "\n".join(lines) + "\n"


def _notes(measured: Sequence[Record]) -> list[str]:
    """Findings by kind: what was seen in which cases, then once why it matters and what to do."""
    kinds: dict[str, dict[str, list[str]]] = {}
    advice: dict[str, str] = {}
    for record in in_order(measured):
        quant, mode, _ = record.label
        for finding in record.data["findings"]:
            cases = kinds.setdefault(finding["kind"], {}).setdefault(finding["what"], [])
            cases.append(mode if mode == "reference" else f"{quant} {mode}")
            advice[finding["kind"]] = f"{finding['why']}; {finding['todo']}"
    lines = []
    for kind, seen in kinds.items():
        lines += textwrap.wrap(f"! {kind}: {advice[kind]}.", _WIDTH, subsequent_indent="  ")
        for what, cases in seen.items():
            text = f"{'all' if len(cases) == len(measured) else ', '.join(cases)}: {what}"
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return lines


def in_order(records: Iterable[Record]) -> list[Record]:
    """The reference first, then quants by the size of their standard file, standard before the other modes."""
    records = list(records)
    sizes: dict[str, tuple[bool, int]] = {}
    for record in records:
        quant, mode, _ = record.label
        own = (mode != "standard", record.data["variant"]["file_bytes"])
        sizes[quant] = min(own, sizes.get(quant, own))

    def place(record: Record) -> tuple[Any, ...]:
        quant, mode, policy = record.label
        return mode != "reference", sizes[quant][1], quant, mode != "standard", mode, policy or ""

    return sorted(records, key=place)


def _quant_label(row: Mapping[Any, Any]) -> str:
    label = row["quant"].upper()
    plain = row["policy"] is None or row["policy"] == row["mode"] == "dynamicgate"
    return label if plain else f"{label} ({row['policy'] if row['mode'] == 'dynamicgate' else row['mode']})"


def _is_absent(value: float | None) -> bool:
    return value is None or math.isnan(value)
