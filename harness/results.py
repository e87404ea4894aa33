"""Every data frame and table that a report or card shows of what was read of one or several sweeps."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from harness import checks
from harness.frames import attribution_frame, comparison_frame, measured_cases, runs_frame
from harness.merge import Merged, merge_sweeps
from harness.pass_frames import layers_frame, llama_bench, speed_frame
from harness.passes import SpeedPass, Timing, of_one_machine
from harness.record import Record, in_order
from harness.tables import (
    Row,
    Table,
    attribution_table,
    board_table,
    card_table,
    case_table,
    divergence_table,
    file_table,
    layer_table,
    measured_rows,
    pure_notes,
    speed_table,
)


@dataclass(frozen=True)
class Results(Merged):
    """What was read, and its data frames (`harness.frames`, `harness.pass_frames`), each made when first asked for: a
    picture can be begun as soon as its own are there."""

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row a case."""
        return runs_frame(self.records, self._timings)

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """One row for each quant and other mode."""
        return comparison_frame(self.runs, self.measured)

    @cached_property
    def attribution(self) -> pd.DataFrame:
        """One row for each case that left rules of a policy out."""
        return attribution_frame(self.measured)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """One row for each timed case."""
        return speed_frame(self.measured, self._timings)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row for each case and layer."""
        return layers_frame(self.measured)

    @cached_property
    def bench(self) -> list[dict[str, Any]]:
        """The timed cases in llama-bench's JSON fields."""
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
            tables["cases"] = case_table([row for row in self._rows if row["name"] not in parts])
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
        makers = {"board": board_table, "divergence": divergence_table, "files": file_table}
        tables = {name: make(self._rows) for name, make in makers.items()}
        return {name: self._noted(table, self.runs) for name, table in tables.items() if table.rows}

    @cached_property
    def _rows(self) -> list[Row]:
        return measured_rows(self.runs)

    def _noted(self, table: Table, named: pd.DataFrame) -> Table:
        """With a note on the pure presets among the quants that it names."""
        notes = pure_notes(self.runs[self.runs.quant.isin(named.quant)])
        return replace(table, notes=(*table.notes, *notes))


def load_results(
    folders: Sequence[Path], wanted: Collection[str] = (), allow_different: Collection[str] = ()
) -> Results:
    """Results of `merge_sweeps`, which says what it raises."""
    return Results(**vars(merge_sweeps(folders, wanted, allow_different)))


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
