"""Records -> tables, plots and a page. Reads records only; runs without llama.cpp."""

import json
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from harness import checks
from harness.compare import difference
from harness.cpu import features_text
from harness.errors import UserError
from harness.formats import WIDTH, html_table, latex, markdown
from harness.frames import attribution_frame, comparison_frame, in_order, measured_cases, percent_change, runs_frame
from harness.page import page
from harness.pass_frames import layers_frame, llama_bench, speed_frame
from harness.passes import SpeedPass, Timing, of_one_machine, read_speed
from harness.record import Record, all_records, first_difference, machines, newest, record_paths
from harness.stats import MIN_BLOCKS, SMALLEST_P, Interval
from harness.store import write_atomic, write_text
from harness.summary import key_improvements, tradeoffs
from harness.tables import (
    Table,
    attribution_table,
    board_table,
    card_table,
    case_table,
    divergence_table,
    file_table,
    layer_table,
    llama_bench_table,
    percent,
    plus_minus,
    pure_notes,
    seconds,
    size,
    speed_table,
)

QUICK = ("tradeoff", "delta", "layers")  # the pictures that every sweep draws
WHOLE_COLUMNS = ("n_windows", "n_scored", "peak_rss_bytes")  # a gap in them must not turn them into floats


_KEY = {
    "cases": (
        "PPL: perplexity, lower is better. KLD: KL(reference || variant), nats. ±: standard error, tokens independent.",
        "[a, b]: 95 % interval of the paired difference, from blocks of tokens. *: no other is smaller and better.",
        "At equal size: against the two standard files around it, interpolated in bytes (change of PPL in brackets).",
        "Size: G and M are binary.",
    ),
    "speed": (
        "Tokens/s: median of the timing pass; spread: (slowest - fastest) / median; changes are against standard.",
    ),
    "layers": ("Layers: |variant - reference| / |reference| of the hidden state, mean over tokens.",),
}


@dataclass(frozen=True)
class Report:
    """What was written, and the text for the terminal."""

    text: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Results:
    """What was read of one or several sweeps, and everything that a report shows of it, as data frames, each made when
    first asked for. records: in the order of the tables; measured: those that succeeded; seen: what reading told."""

    records: tuple[Record, ...]
    measured: tuple[Record, ...]
    passes: tuple[SpeedPass, ...]
    seen: tuple[checks.Finding, ...]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """`runs_frame`."""
        return runs_frame(self.records, self._timings)

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """`comparison_frame`."""
        return comparison_frame(self.runs, self.measured)

    @cached_property
    def attribution(self) -> pd.DataFrame:
        """`attribution_frame`."""
        return attribution_frame(self.measured)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """`speed_frame`."""
        return speed_frame(self.measured, self._timings)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """`layers_frame`."""
        return layers_frame(self.measured)

    @cached_property
    def bench(self) -> list[dict[str, Any]]:
        """`llama_bench`."""
        return llama_bench(self.measured, self.timed_passes)

    @cached_property
    def findings(self) -> dict[str, list[dict[str, Any]]]:
        """`collect_findings`, and what reading and the timing passes tell of every case."""
        found = collect_findings(self.runs, self.comparison, self.measured)
        keys = {record.data["key"] for record in self.measured}
        others = (one for one in self.passes if one not in self.timed_passes and one.cases.keys() & keys)
        elsewhere = [replace(one, cases={key: one.cases[key] for key in one.cases.keys() & keys}) for one in others]
        of_speed = checks.speed_findings(self.timed_passes, self.speed, elsewhere)
        found["all"] += [one.to_json() for one in (*self.seen, *of_speed)]
        return found

    @cached_property
    def timed_passes(self) -> tuple[SpeedPass, ...]:
        """Those whose speeds are shown: `of_one_machine`."""
        return of_one_machine(self.passes, {record.data["key"] for record in self.measured})

    @cached_property
    def _timings(self) -> dict[str, Timing]:
        return {key: timing for one in self.timed_passes for key, timing in one.cases.items()}

    @property
    def title(self) -> str:
        """Model and prompt set."""
        if not self.measured:
            return "nothing was measured"
        data = self.measured[0].data
        prompts = data["prompt_set"]
        return (
            f"{data['reference']['name']} on {prompts['name']}: {prompts['n_windows']} windows of "
            f"{prompts['window_tokens']} tokens, {data['settings']['threads']} threads"
        )

    @cached_property
    def tables(self) -> dict[str, Table]:
        """The tables that have rows, by name."""
        tables = {}
        parts = set(self.attribution.name) if len(self.attribution) else set()  # they have a table of their own
        if len(self.comparison):
            tables["card"] = card_table(self.comparison[~self.comparison.dg_name.isin(parts)])
            tables["cases"] = case_table(self.runs[~self.runs.name.isin(parts)])
        if parts:
            tables["attribution"] = attribution_table(self.attribution)
        if len(self.speed):
            tables["speed"] = speed_table(self.speed)
        if len(self.layers):
            tables["layers"] = layer_table(self.layers)
        frames = {"attribution": self.attribution, "speed": self.speed, "layers": self.layers}
        return {name: self._noted(table, frames.get(name, self.runs)) for name, table in tables.items()}

    @cached_property
    def more_tables(self) -> dict[str, Table]:
        """The same figures in the columns of others, for `report`."""
        tables = {
            "board": board_table(self.runs),
            "divergence": divergence_table(self.runs),
            "files": file_table(self.runs),
        }
        return {name: self._noted(table, self.runs) for name, table in tables.items() if table.rows}

    def _noted(self, table: Table, named: pd.DataFrame) -> Table:
        """With a note on the pure presets among the quants that it names."""
        notes = pure_notes(self.runs[self.runs.quant.isin(named.quant)])
        return replace(table, notes=(*table.notes, *notes))


def load_results(
    folders: Sequence[Path], wanted: Collection[str] = (), allow_different: Collection[str] = ()
) -> Results:
    """All records of one or several sweeps. Of two records with one name the one whose key is `wanted` counts, else
    the newer.

    Raises UserError when there is none, or they may not stand in one table.
    """
    read = [all_records(folder) for folder in folders]
    problems = [problem for _, of_folder in read for problem in of_folder]
    everything = newest((record for of_folder, _ in read for record in of_folder), wanted)
    flaws = {record.path: record.flaw for record in everything}
    problems += [f"{path}: {flaw}" for path, flaw in flaws.items() if flaw]
    records = [record for record in everything if not flaws[record.path]]
    if not records:
        where = ", ".join(map(str, folders))
        raise UserError(problems[0] if problems else f"{where} holds no records: run a sweep into it first")
    measured = in_order(record for record in records if record.ok)
    unlike = first_difference((record.data for record in measured), allow_different)
    if unlike:
        name, one, other = unlike
        where = " and ".join(map(str, folders))
        raise UserError(f"{where} holds records that differ in {name} ({one} and {other}): they make no one table")
    passes = sorted((one for folder in folders for one in read_speed(folder)), key=lambda one: one.created_utc)
    seen = (
        *checks.mixed_findings([record.data for record in measured], allow_different),
        *checks.unreadable_findings(problems),
    )
    return Results(tuple(in_order(records)), tuple(measured), tuple(passes), seen)


def write_report(folder: Path, wanted: Collection[str] = (), allow_different: Collection[str] = ()) -> Report:
    """Tables and plots of all records in a sweep's folder, written beside them. Raises UserError as `load_results`."""
    from harness.pictures import pictures

    results = load_results([folder], wanted, allow_different)
    written = _Written(folder)
    text = _table_text(results)
    written.text("runs.csv", _runs_csv(results.runs))
    written.text("table.csv", results.comparison.to_csv(index=False))
    written.text("table.md", _without_tags(text))
    written.text("findings.json", json.dumps(results.findings, indent=1) + "\n")
    written.text("machine.json", json.dumps(machines(results.measured), indent=1) + "\n")
    if len(results.speed):
        written.text("speed.csv", results.speed.to_csv(index=False))
        written.text("llama_bench.json", json.dumps(results.bench, indent=1) + "\n")
        written.text("llama_bench.md", markdown(llama_bench_table(results.bench)) + "\n")
    if len(results.layers):
        written.text("layers.csv", results.layers.to_csv(index=False))
    for picture in pictures(results, QUICK):
        written.file(f"{picture.name}.png", partial(picture.save, kind="png"))
    return Report(text, tuple(written.paths))


def write_full_report(folders: Sequence[Path], out: Path, allow_different: Collection[str] = ()) -> Report:
    """Every table in every format, the plots, and one page with all of it. For `python -m harness report`.

    Without pyarrow there are no Parquet files, and the text says so. Raises UserError as `load_results`, EngineError
    when a process that draws dies.
    """
    from harness.pictures import drawing, pictures_of_depth, pictures_of_files

    n_records = sum(len(record_paths(folder)) for folder in folders)
    formats = ("png", "svg")
    with drawing(n_records, out, formats) as draw:  # while others draw, figures and tables are made here
        results = load_results(folders, allow_different=allow_different)
        of_depth = draw(pictures_of_depth(results.measured))
        drawn = draw(pictures_of_files(results)) + of_depth
        written = _Written(out)
        text = _write_tables(results, written)
    written.paths += [out / f"{picture.name}.{kind}" for picture in drawn for kind in formats]
    captions = {out / f"{picture.name}.png": picture.caption for picture in drawn}
    tables = [*results.tables.values(), *results.more_tables.values()]
    summary = [*key_improvements(results.comparison), *tradeoffs(results.comparison, results.runs, results.speed)]
    written.text("report.html", page(results.title, summary, tables, captions, _flat(results), _facts(results)))
    return Report(text, tuple(written.paths))


def _write_tables(results: Results, written: "_Written") -> str:
    """Every table in every format; the text for the terminal."""
    text = _table_text(results)
    written.text("table.md", _without_tags(text))
    written.text("findings.json", json.dumps(results.findings, indent=1) + "\n")
    written.text("machine.json", json.dumps(machines(results.measured), indent=1) + "\n")
    for name, table in {**results.tables, **results.more_tables}.items():
        written.text(f"{name}.md", markdown(table) + "\n")
        written.text(f"{name}.html", html_table(table) + "\n")
        written.text(f"{name}.tex", latex(table) + "\n")
    frames = {"runs": results.runs, "table": results.comparison, "speed": results.speed, "layers": results.layers}
    has_parquet = find_spec("pyarrow") is not None
    for name, frame in frames.items():
        if len(frame):
            written.text(f"{name}.csv", _runs_csv(frame) if name == "runs" else frame.to_csv(index=False))
        if len(frame) and has_parquet:
            written.file(f"{name}.parquet", partial(frame.to_parquet, index=False))
    return text if has_parquet else text + "\nNo Parquet files: they need the package pyarrow.\n"


class _Written:
    """Writes files into one folder, atomically, and remembers them in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def text(self, name: str, content: str) -> None:
        write_text(self.folder / name, content)
        self.paths.append(self.folder / name)

    def file(self, name: str, write: Callable[[Path], object]) -> None:
        write_atomic(self.folder / name, write)
        self.paths.append(self.folder / name)


def _runs_csv(runs: pd.DataFrame) -> str:
    return runs.astype(dict.fromkeys(WHOLE_COLUMNS, "Int64")).to_csv(index=False)


def _without_tags(text: str) -> str:
    """Markdown takes a name that holds a tag for one."""
    return text.replace("<", "&lt;")


def _facts(results: Results) -> dict[str, dict[str, Any]]:
    """Settings, method and machine for the page."""
    if not results.measured:
        return {}
    data = results.measured[0].data
    reference, environment = data["reference"], data["environment"]
    return {
        "Method": {
            "PPL": "exp(mean nll) over the second half of each window, as llama-perplexity -c 2048",
            "KLD": "KL(reference || variant) over the whole vocabulary, per scored token, nats",
            "[a, b]": "95 % interval of a paired difference, studentized bootstrap over blocks of tokens",
            "±": "one standard error, tokens taken as independent",
            "equal size": "against the two standard files around it, interpolated in bytes on the same tokens",
            "*": "no other file is smaller and better",
        },
        "Settings": {
            "reference": f"{reference['name']} {reference['file_type']}",
            "sha256 of its source": reference["source_sha256"],
            "prompt set": data["prompt_set"]["id"],
            **data["settings"],
            **{f"version of {name}": value for name, value in data["versions"].items()},
        },
        "Machine": {
            "cpu": environment.get("cpu"),
            "CPU features in use": features_text(environment),
            **{
                name: environment.get(name)
                for name in ("cores_physical", "memory_bytes", "platform", "python", "harness", "commit")
            },
        },
    }


def _flat(results: Results) -> list[dict[str, Any]]:
    """Findings one by one, with the cases that share them."""
    by_what: dict[tuple[str, str], dict[str, Any]] = {}
    for name, findings in results.findings.items():
        for finding in findings:
            entry = by_what.setdefault((finding["kind"], finding["what"]), {**finding, "cases": []})
            entry["cases"].append(name)
    return [{**entry, "cases": ", ".join(entry["cases"])} for entry in by_what.values()]


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
    p = f"p < {SMALLEST_P:.4f}" if interval.p is not None and interval.p < SMALLEST_P else f"p = {interval.p:.4f}"
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


def _table_text(results: Results) -> str:
    lines = []
    if results.measured:
        reference = results.measured[0].data["reference"]
        lines.append(results.title)
        good = results.runs[(results.runs["mode"] == "reference") & (results.runs.status == "ok")]
        for row in good.to_dict("records"):
            kind = (reference["file_type"] or "").upper()
            lines.append(
                f"Reference {kind}: PPL {plus_minus(row['ppl'], row['ppl_se'])}, {size(row['file_bytes'])}, "
                f"scored in {seconds(row['pass_s'])}"
            )
        lines.append("")
    for table in results.tables.values():
        lines += [markdown(replace(table, notes=())), ""]
    for name in results.tables:
        lines += _KEY.get(name, ())
    for note in dict.fromkeys(note for table in results.tables.values() for note in table.notes):
        lines += textwrap.wrap(note, WIDTH)
    notes = _notes(results.findings)
    if notes:
        lines += ["", *notes]
    for row in results.runs[results.runs.status != "ok"].to_dict("records"):
        lines += ["", f"FAILED: {row['quant']} {row['mode']}; its record tells why"]
    return "\n".join(lines) + "\n"


def collect_findings(
    runs: pd.DataFrame, table: pd.DataFrame, measured: Sequence[Record]
) -> dict[str, list[dict[str, Any]]]:
    """All findings by case: those in the records and those that show only when cases stand side by side. The key "all"
    has what concerns every case."""
    records = {record.name: record.data for record in in_order(measured)}
    cases = {case.name: case for case in measured_cases(measured)}
    found = {name: list(data["findings"]) for name, data in records.items()}
    reference = cases.pop("reference", None)
    rows = runs.set_index("name")
    alone = rows.verdict_reason[rows.verdict_reason.notna() & rows.verdict_between.isna()]
    dominated = {str(name): str(better) for name, better in rows.dominated_by.dropna().items()}
    no_neighbours = {str(name): str(reason) for name, reason in alone.items()}
    seen = checks.case_findings(list(cases.values()), reference, dominated, no_neighbours)
    for name, findings in seen.items():
        found[name] += [finding.to_json() for finding in findings]
    for row in table.to_dict("records"):
        other, standard = row["dg_name"], row["std_name"]
        if other in cases and standard in cases and "same_as" not in records[other]:
            findings = checks.pair_findings(cases[other], cases[standard], row["p_holm"], len(table))
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
