"""What was read of one or several sweeps, and every data frame and table that a report or card shows of it.

Data frames are made when first asked for, and pandas is loaded then: what needs records alone does not wait for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checks
from harness.errors import UserError
from harness.passes import SpeedPass, Timing, of_one_machine, read_speed
from harness.record import Record, all_records, first_difference, in_order, newest

if TYPE_CHECKING:
    import pandas as pd

    from harness.tables import Table


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
        from harness.frames import runs_frame

        return runs_frame(self.records, self._timings)

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """`comparison_frame`."""
        from harness.frames import comparison_frame

        return comparison_frame(self.runs, self.measured)

    @cached_property
    def attribution(self) -> pd.DataFrame:
        """`attribution_frame`."""
        from harness.frames import attribution_frame

        return attribution_frame(self.measured)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """`speed_frame`."""
        from harness.pass_frames import speed_frame

        return speed_frame(self.measured, self._timings)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """`layers_frame`."""
        from harness.pass_frames import layers_frame

        return layers_frame(self.measured)

    @cached_property
    def bench(self) -> list[dict[str, Any]]:
        """`llama_bench`."""
        from harness.pass_frames import llama_bench

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
        from harness.tables import attribution_table, card_table, case_table, layer_table, speed_table

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
        from harness.tables import board_table, divergence_table, file_table

        tables = {
            "board": board_table(self.runs),
            "divergence": divergence_table(self.runs),
            "files": file_table(self.runs),
        }
        return {name: self._noted(table, self.runs) for name, table in tables.items() if table.rows}

    def _noted(self, table: Table, named: pd.DataFrame) -> Table:
        """With a note on the pure presets among the quants that it names."""
        from harness.tables import pure_notes

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


def collect_findings(
    runs: pd.DataFrame, table: pd.DataFrame, measured: Sequence[Record]
) -> dict[str, list[dict[str, Any]]]:
    """All findings by case: those in the records and those that show only when cases stand side by side. The key "all"
    has what concerns every case."""
    from harness.frames import measured_cases

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
