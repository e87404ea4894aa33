"""Records -> tables. Reads records only; runs without llama.cpp."""

import json
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness import checks
from harness.compare import difference
from harness.errors import UserError
from harness.frames import attribution_frame, comparison_frame, in_order, measured_cases, percent_change, runs_frame
from harness.pass_frames import layers_frame, llama_bench, speed_frame
from harness.passes import known_speed, read_speed
from harness.plots import plot_layers, plot_tradeoff
from harness.record import Record, first_difference, read_records, unreadable_records
from harness.stats import MIN_BLOCKS, Interval
from harness.store import write_atomic, write_text
from harness.tables import (
    WIDTH,
    attribution_table,
    card_table,
    case_table,
    layer_table,
    llama_bench_table,
    percent,
    plus_minus,
    seconds,
    size,
    speed_table,
)

WHOLE_COLUMNS = ("n_windows", "n_scored", "peak_rss_bytes")  # a gap in them must not turn them into floats


_KEY = (
    "PPL: perplexity, lower is better. KLD: KL(reference || variant), nats. ±: standard error, tokens as independent.",
    "[a, b]: 95 % interval of the paired difference, from blocks of tokens. *: no other file is smaller and better.",
    "At equal size: against the two standard files around it, interpolated in bytes (change of PPL in brackets).",
    "Std and DG Speed: seconds to run the prompt set once. Size: G and M are binary.",
    "Tokens/s: median of the timing pass; spread: (slowest - fastest) / median; changes are against standard.",
    "Layers: |variant - reference| / |reference| of the hidden state, mean over tokens; changes are against standard.",
)


@dataclass(frozen=True)
class Report:
    """What was written, and the text for the terminal."""

    text: str
    paths: tuple[Path, ...]


def write_report(folder: Path, wanted: Collection[str] = (), allow_different: Collection[str] = ()) -> Report:
    """Tables and plot of all records in a sweep's folder, written beside them. Of two records with one name the one
    whose key is `wanted` counts, else the newer.

    Raises UserError when the records may not stand in one table.
    """
    records = read_records(folder, wanted)
    problems = unreadable_records(folder)
    if not records:
        raise UserError(problems[0] if problems else f"{folder} holds no records: run a sweep into it first")
    measured = [record for record in records if record.ok]
    unlike = first_difference((record.data for record in measured), allow_different)
    if unlike:
        name, one, other = unlike
        raise UserError(f"{folder} holds records that differ in {name} ({one} and {other}): they make no one table")
    passes, timings = read_speed(folder), known_speed(folder)
    runs = runs_frame(records, timings)
    table = comparison_frame(runs, measured)
    speed, layers = speed_frame(in_order(measured), timings), layers_frame(in_order(measured))
    findings = collect_findings(table, measured)
    findings["all"] += [
        finding.to_json()
        for finding in (
            *checks.mixed_findings([record.data for record in measured], allow_different),
            *checks.speed_findings(passes, speed),
            *checks.unreadable_findings(problems),
        )
    ]
    text = _table_text(runs, table, measured, findings, speed, layers)
    written: list[Path] = []

    def put(name: str, content: str) -> None:
        write_text(folder / name, content)
        written.append(folder / name)

    def draw(name: str, plot: Callable[[Path], None]) -> None:
        write_atomic(folder / name, plot)
        written.append(folder / name)

    put("runs.csv", runs.astype(dict.fromkeys(WHOLE_COLUMNS, "Int64")).to_csv(index=False))
    put("table.csv", table.to_csv(index=False))
    put("table.md", text)
    put("findings.json", json.dumps(findings, indent=1) + "\n")
    if len(speed):
        bench = llama_bench(in_order(measured), passes)
        put("speed.csv", speed.to_csv(index=False))
        put("llama_bench.json", json.dumps(bench, indent=1) + "\n")
        put("llama_bench.md", llama_bench_table(bench) + "\n")
    if measured:
        reference, prompts = measured[0].data["reference"]["name"], measured[0].data["prompt_set"]["name"]
        title = f"{reference} on {prompts}; bars are one standard error of the tokens"
        draw("tradeoff.png", lambda path: plot_tradeoff(runs[runs.status == "ok"], title, path))
    if len(layers):
        put("layers.csv", layers.to_csv(index=False))
        title = f"{reference} on {prompts}: error of the hidden state; bands are 95 % intervals"
        draw("layers.png", lambda path: plot_layers(layers[layers.layer != "mean"], title, path))
    return Report(text, tuple(written))


def comparison_text(a: Record, b: Record, allow_different: Collection[str] = ()) -> str:
    """Two records compared on the same tokens, with what this prompt set can and cannot tell.

    Raises UserError when they may not be compared, naming the field that differs.
    """
    for record in (a, b):
        if not record.ok:
            raise UserError(f"{record.name} failed, {record.path} has no values to compare: run its sweep again")
    unlike = first_difference([a.data, b.data], allow_different)
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


def _table_text(
    runs: pd.DataFrame,
    table: pd.DataFrame,
    measured: Sequence[Record],
    findings: Mapping[str, Sequence[Mapping[str, Any]]],
    speed: pd.DataFrame,
    layers: pd.DataFrame,
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
    if len(speed):
        lines += [speed_table(speed), ""]
    if len(layers):
        lines += [layer_table(layers), ""]
    if len(table):
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
        lines += textwrap.wrap(f"! {kind}: {text}.", WIDTH, subsequent_indent="  ")
        for what, cases in seen.items():
            text = f"{'all' if len(cases) == len(found) - 1 else ', '.join(cases)}: {what}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return lines
