"""Records -> tables. Reads records only; runs without llama.cpp."""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness import checks
from harness.compare import difference
from harness.errors import UserError
from harness.frames import attribution_frame, comparison_frame, in_order, measured_cases, percent_change, runs_frame
from harness.plots import plot_tradeoff
from harness.record import Record, first_difference, read_records
from harness.stats import MIN_BLOCKS, Interval
from harness.store import write_atomic, write_json, write_text

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
CASE_COLUMNS = ("Case", "Size", "bpw", "PPL", "Mean KLD", "Same top", "At equal size", "vs placebo")
ATTRIBUTION_COLUMNS = ("Rule left out", "It costs", "It saves, ln PPL", "It saves, KLD", "ln PPL per MiB")
WHOLE_COLUMNS = ("n_windows", "n_scored", "peak_rss_bytes")  # a gap in them must not turn them into floats
_ABSENT = "-"
_WIDTH = 118


_KEY = (
    "PPL: perplexity, lower is better. KLD: KL(reference || variant), nats. ±: standard error, tokens as independent.",
    "[a, b]: 95 % interval of the paired difference, from blocks of tokens. *: no other file is smaller and better.",
    "At equal size: against the two standard files around it, interpolated in bytes (change of PPL in brackets).",
    "Speed: seconds to score the prompt set once, in scoring order, not a benchmark. Size: G and M are binary.",
)


@dataclass(frozen=True)
class Report:
    """What was written, and the text for the terminal."""

    text: str
    paths: tuple[Path, ...]


def write_report(folder: Path, wanted: Collection[str] = ()) -> Report:
    """Tables and plot of all records in a sweep's folder, written beside them. Of two records with one name the one
    whose key is `wanted` counts, else the newer.

    Raises UserError when the records may not stand in one table.
    """
    records = read_records(folder, wanted)
    if not records:
        raise UserError(f"{folder} holds no records: run a sweep into it first")
    measured = [record for record in records if record.ok]
    unlike = first_difference(record.data for record in measured)
    if unlike:
        name, one, other = unlike
        raise UserError(f"{folder} holds records that differ in {name} ({one} and {other}): they make no one table")
    runs = runs_frame(records)
    table = comparison_frame(runs, measured)
    findings = collect_findings(table, measured)
    text = _table_text(runs, table, measured, findings)
    names = ("runs.csv", "table.csv", "table.md", "findings.json", "tradeoff.png")
    paths = tuple(folder / name for name in names)
    write_text(paths[0], runs.astype(dict.fromkeys(WHOLE_COLUMNS, "Int64")).to_csv(index=False))
    write_text(paths[1], table.to_csv(index=False))
    write_text(paths[2], text)
    write_json(paths[3], findings)
    if measured:
        data = measured[0].data
        title = (
            f"{data['reference']['name']} on {data['prompt_set']['name']}; bars are one standard error of the tokens"
        )
        write_atomic(paths[4], lambda temporary: plot_tradeoff(runs[runs.status == "ok"], title, temporary))
    return Report(text, paths if measured else paths[:4])


def attribution_table(rows: pd.DataFrame) -> str:
    """What each rule of a policy saves, and for how many bytes."""
    cells = []
    for row in rows.to_dict("records"):
        mib = row["cost_bytes"] / (1 << 20)
        per_mib = row["saved_ln_ppl"] / mib if mib > 0 else None
        cells.append(
            (
                f"{row['quant'].upper()} {row['rules']}",
                size(row["cost_bytes"], signed=True),
                _between(row["saved_ln_ppl"], row["saved_ln_ppl_low"], row["saved_ln_ppl_high"]),
                _between(row["saved_kld"], row["saved_kld_low"], row["saved_kld_high"]),
                _ABSENT if per_mib is None else f"{per_mib:+.4f}",
            )
        )
    return _markdown([ATTRIBUTION_COLUMNS, *cells])


def comparison_text(a: Record, b: Record) -> str:
    """Two records compared on the same tokens, with what this prompt set can and cannot tell.

    Raises UserError when they may not be compared, naming the field that differs.
    """
    for record in (a, b):
        if not record.ok:
            raise UserError(f"{record.name} failed, {record.path} has no values to compare: run its sweep again")
    unlike = first_difference([a.data, b.data])
    if unlike:
        name, one, other = unlike
        raise UserError(f"{a.name} and {b.name} differ in {name} ({one} and {other}): they cannot be compared")
    first, second = measured_cases([a])[0], measured_cases([b])[0]
    paired = difference(first, second)
    n_windows = first.nll.shape[0]
    prompts = a.data["prompt_set"]
    lines = [
        f"{a.name} against {b.name}",
        f"{prompts['name']}, {n_windows} windows of {prompts['window_tokens']} tokens, {first.nll.size} scored, "
        f"{paired.ln_ppl.n_blocks} blocks",
        "",
        f"  PPL      {math.exp(first.nll.mean()):.4f} and {math.exp(second.nll.mean()):.4f}: "
        + percent(*(percent_change(x) for x in (paired.ln_ppl.mean, paired.ln_ppl.low, paired.ln_ppl.high))),
        f"  ln PPL   {_interval_text(paired.ln_ppl)}",
    ]
    if paired.kld:
        lines.append(f"  KLD      {_interval_text(paired.kld)} nats")
    lines += [
        f"  size     {size(first.file_bytes)} and {size(second.file_bytes)}",
        "",
        *_resolution(paired.ln_ppl, n_windows),
    ]
    return "\n".join(lines)


def _interval_text(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.6f}, no interval: {interval.reason}"
    p = f"p < {1 / 4000:.4f}" if interval.p is not None and interval.p < 1 / 4000 else f"p = {interval.p:.4f}"
    return f"{interval.mean:+.6f} [{interval.low:+.6f}, {interval.high:+.6f}], {p}"


def _resolution(interval: Interval, n_windows: int) -> list[str]:
    """What difference this much text can show, and how much text would show the one that was seen."""
    if interval.resolvable is None:
        if interval.n_blocks >= MIN_BLOCKS:
            return [f"No difference to resolve: {interval.reason}."]
        return [f"This prompt set resolves nothing: {interval.reason}. More windows (prompts.n_windows) help."]
    seen = "a difference" if interval.sign else "no difference beyond noise"
    lines = [
        f"This shows {seen}. {n_windows} windows resolve a change of {percent_change(interval.resolvable):.2f}% of PPL "
        "(seen 4 times out of 5)."
    ]
    need = interval.windows_to_resolve(n_windows)
    if interval.sign == 0 and need:
        lines.append(f"If the true change is the one seen here, about {need} windows would show it.")
    return lines


def card_table(table: pd.DataFrame) -> str:
    """The model card's table: standard beside the other mode. Cells are rounded, not cut."""
    rows = [
        (
            _quant_label(row),
            plus_minus(row["std_ppl"], row["std_ppl_se"]),
            plus_minus(row["dg_ppl"], row["dg_ppl_se"]),
            percent(row["delta_ppl_pct"], row["delta_ppl_pct_low"], row["delta_ppl_pct_high"]),
            size(row["std_bytes"]),
            size(row["dg_bytes"]),
            size(row["delta_bytes"], signed=True),
            seconds(row["std_pass_s"]),
            seconds(row["dg_pass_s"]),
        )
        for row in table.to_dict("records")
    ]
    return _markdown([TABLE_COLUMNS, *rows])


def case_table(runs: pd.DataFrame) -> str:
    """Every case by itself: size, perplexity, divergence, and how it stands at equal size."""
    rows = [
        (
            row["name"] + ("" if row["on_front"] is not True else " *"),
            size(row["file_bytes"]),
            f"{row['bpw']:.2f}",
            plus_minus(row["ppl"], row["ppl_se"]),
            plus_minus(row["kld_mean"], row["kld_se"]),
            _ABSENT if _is_absent(row["same_top"]) else f"{100 * row['same_top']:.1f}%",
            _verdict_cell(row),
            row["vs_placebo"] or _ABSENT,
        )
        for row in runs[runs.status == "ok"].astype(object).where(runs.notna(), None).to_dict("records")
    ]
    return _markdown([CASE_COLUMNS, *rows])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads in a terminal as well, and without spaces at the bars where it would be
    too wide for one. The first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    space = " " if sum(widths) + 3 * len(widths) + 1 <= _WIDTH + 2 else ""
    bar = f"{space}|{space}"
    return "\n".join(f"|{space}{bar.join(map(str.ljust, cells, widths))}{space}|" for cells in rows)


def _between(value: float, low: float | None, high: float | None) -> str:
    return f"{value:+.4f}" + ("" if _is_absent(low) or _is_absent(high) else f" [{low:+.4f}, {high:+.4f}]")


def _verdict_cell(row: Mapping[Any, Any]) -> str:
    if row["verdict"]:
        change = percent_change(row["equal_size_ln_ppl"])
        return f"{row['verdict']} ({change:+.1f}%)"
    return "no neighbours" if row["verdict_reason"] and not row["verdict_between"] else _ABSENT


def plus_minus(value: float | None, se: float | None) -> str:
    """'28.41 ±1.32': the value with as many decimals as its error has up to two figures."""
    if _is_absent(value):
        return _ABSENT
    if _is_absent(se):
        return f"{value:.2f}"
    decimals = max(0, min(4, 1 - math.floor(math.log10(se)))) if se else 4
    return f"{value:.{decimals}f} ±{se:.{decimals}f}"


def percent(value: float | None, low: float | None, high: float | None) -> str:
    """'-43.9% [-46.2, -41.5]': with its 95 % interval."""
    if _is_absent(value):
        return _ABSENT
    return f"{value:+.1f}%" + ("" if _is_absent(low) or _is_absent(high) else f" [{low:+.1f}, {high:+.1f}]")


def size(n_bytes: float | None, *, signed: bool = False) -> str:
    """'2.5G' or '93.6M': binary units, as `ls -lh` has them."""
    if _is_absent(n_bytes):
        return _ABSENT
    assert n_bytes is not None
    unit, scale = ("G", 1 << 30) if round(abs(n_bytes) / (1 << 20), 1) >= 1024 else ("M", 1 << 20)
    return f"{n_bytes / scale:{'+' if signed else ''}.1f}{unit}"


def seconds(value: float | None) -> str:
    """'13.3s'; whole seconds from 100 on."""
    if _is_absent(value):
        return _ABSENT
    return f"{value:.0f}s" if value is not None and value >= 100 else f"{value:.1f}s"


def _table_text(
    runs: pd.DataFrame,
    table: pd.DataFrame,
    measured: Sequence[Record],
    findings: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
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
        attribution = attribution_frame(measured)
        parts = set(attribution.name) if len(attribution) else set()  # they have a table of their own
        lines += [card_table(table[~table.dg_name.isin(parts)]), "", case_table(runs[~runs.name.isin(parts)]), ""]
        if len(attribution):
            lines += [attribution_table(attribution), ""]
        lines += _KEY
    notes = _notes(findings)
    if notes:
        lines += ["", *notes]
    for row in runs[runs.status != "ok"].to_dict("records"):
        lines += ["", f"FAILED: {row['quant']} {row['mode']}; its record tells why"]
    return "\n".join(lines) + "\n"


def collect_findings(table: pd.DataFrame, measured: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """All findings by case: those in the records and those that show only when cases stand side by side. The key "all"
    has what concerns every case."""
    records = {record.name: record.data for record in in_order(measured)}
    cases = {case.name: case for case in measured_cases(measured)}
    found = {name: list(data["findings"]) for name, data in records.items()}
    reference = cases.pop("reference", None)
    for name, findings in checks.case_findings(list(cases.values()), reference).items():
        found[name] += [finding.to_json() for finding in findings]
    for row in table.to_dict("records"):
        other, standard = row["dg_name"], row["std_name"]
        if other in cases and standard in cases and "same_as" not in records[other]:
            findings = checks.pair_findings(cases[other], cases[standard], row["p_holm"])
            findings += checks.type_findings(records[other]["variant"], records[standard]["variant"])
            found[other] += [finding.to_json() for finding in findings]
    environments = [data["environment"] for data in records.values()]
    found["all"] = [finding.to_json() for finding in checks.environment_findings(environments)]
    return found


def _notes(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Findings by kind: what was seen in which cases, then once why it matters and what to do."""
    kinds: dict[str, dict[str, list[str]]] = {}
    advice: dict[str, set[str]] = {}
    for name, findings in found.items():
        for finding in findings:
            kinds.setdefault(finding["kind"], {}).setdefault(finding["what"], []).append(name)
            advice.setdefault(finding["kind"], set()).add(f"{finding['why']}; {finding['todo']}")
    lines = []
    for kind, seen in kinds.items():
        text = min(advice[kind]) if len(advice[kind]) == 1 else min(advice[kind]).split(";")[0]
        lines += textwrap.wrap(f"! {kind}: {text}.", _WIDTH, subsequent_indent="  ")
        for what, cases in seen.items():
            text = f"{'all' if len(cases) == len(found) - 1 else ', '.join(cases)}: {what}"
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return lines


def _quant_label(row: Mapping[Any, Any]) -> str:
    label = row["quant"].upper()
    plain = not isinstance(row["policy"], str) or row["policy"] == row["mode"] == "dynamicgate"
    return label if plain else f"{label} ({row['policy'] if row['mode'] == 'dynamicgate' else row['mode']})"


def _is_absent(value: float | None) -> bool:
    return value is None or math.isnan(value)
