"""The records and timing passes of one or several sweeps, together where their settings agree. Needs no pandas."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import checks
from harness.errors import UserError
from harness.passes import SpeedPass, read_speed
from harness.record import Record, all_records, first_difference, in_order, newest


@dataclass(frozen=True)
class Merged:
    """What was read. records: in the order of the tables; measured: those that succeeded; seen: what reading told."""

    records: tuple[Record, ...]
    measured: tuple[Record, ...]
    passes: tuple[SpeedPass, ...]
    seen: tuple[checks.Finding, ...]


def merge_sweeps(
    folders: Sequence[Path], wanted: Collection[str] = (), allow_different: Collection[str] = ()
) -> Merged:
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
    return Merged(tuple(in_order(records)), tuple(measured), tuple(passes), seen)
