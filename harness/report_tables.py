"""The files of a report but its pictures: every table in every format, texts, and the page."""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from harness.cpu import features_text
from harness.formats import WIDTH, html_table, latex, markdown
from harness.page import page
from harness.record import machines
from harness.results import Results
from harness.store import write_atomic, write_text
from harness.summary import key_improvements, tradeoffs
from harness.tables import llama_bench_table, plus_minus, seconds, size

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


class Written:
    """Writes files into one folder, atomically, and remembers them in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def text(self, name: str, content: str) -> None:
        """A file of that text."""
        write_text(self.folder / name, content)
        self.paths.append(self.folder / name)

    def file(self, name: str, write: Callable[[Path], object]) -> None:
        """A file that `write` fills."""
        write_atomic(self.folder / name, write)
        self.paths.append(self.folder / name)


def write_main_tables(results: Results, written: Written) -> str:
    """The tables that lie beside the records of a sweep; the text for the terminal."""
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
    return text


def write_tables(results: Results, written: Written) -> str:
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


def write_page(results: Results, written: Written, captions: Mapping[Path, str]) -> None:
    """`report.html`. captions: of the pictures to show."""
    tables = [*results.tables.values(), *results.more_tables.values()]
    summary = [*key_improvements(results.comparison), *tradeoffs(results.comparison, results.runs, results.speed)]
    written.text("report.html", page(results.title, summary, tables, captions, _flat(results), _facts(results)))


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
