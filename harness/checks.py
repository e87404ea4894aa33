"""Warnings as data: what a reader of a table must know. Pure: measured values in, findings out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.compare import Measured
from harness.ggml_types import UNQUANTIZED
from harness.passes import SpeedPass, machine_of
from harness.record import COMPARABLE, first_difference
from harness.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

NEARLY_NOTHING_NATS = 1e-5
BUSY_SHARE = 0.05
WIDE_SPREAD = 0.05


@dataclass(frozen=True)
class Finding:
    """what was seen, why it matters, what to do. `kind` is stable, for programs."""

    kind: str
    what: str
    why: str
    todo: str

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def case_findings(
    cases: Sequence[Measured],
    reference: Measured | None,
    dominated: Mapping[str, str],
    no_neighbours: Mapping[str, str],
) -> dict[str, list[Finding]]:
    """What measured variants tell beside each other, by the name of the case.

    dominated: what `compare.dominators` found; no_neighbours: why a case has no verdict at equal size.
    """
    found: dict[str, list[Finding]] = {case.name: [] for case in cases}
    standard = sorted((case for case in cases if case.mode == "standard"), key=lambda case: case.file_bytes)
    by_name = {case.name: case for case in cases}
    for name, better in dominated.items():
        saved = by_name[name].file_bytes - by_name[better].file_bytes
        found[name].append(
            Finding(
                "dominated",
                f"{better} is better beyond noise and "
                + ("of the same size" if saved == 0 else f"{saved:,} bytes smaller"),
                "nobody should choose this file",
                f"publish {better} instead",
            )
        )
    for name, reason in no_neighbours.items():
        found[name].append(
            Finding(
                "no_neighbours",
                reason,
                "whether its bytes would be better spent on a standard type cannot be told",
                "run the sweep again with that quant as well: what is measured stays",
            )
        )
    for small, large in pairwise(standard):
        worse = small.file_bytes < large.file_bytes and small.mean_nll < large.mean_nll
        if worse and mean_interval(large.nll - small.nll).sign == 1:
            found[large.name].append(
                Finding(
                    "out_of_order",
                    f"it is larger than {small.name} and worse beyond noise; with their results exchanged the ladder "
                    "would be in order",
                    "two rows or files may have been mixed up, or the type does not suit this model",
                    "check both files before believing either row",
                )
            )
    for case in cases:
        lower = reference is not None and case.mean_nll < reference.mean_nll
        if reference and lower and mean_interval(case.nll - reference.nll).sign == -1:
            found[case.name].append(
                Finding(
                    "better_than_reference",
                    "its perplexity is lower than the reference's beyond noise",
                    "quantizing adds no knowledge: chance, or a prompt set that favours a blunter model",
                    "look at the KL divergence, and measure more and other text",
                )
            )
        quantized = case.quant not in UNQUANTIZED  # f16 of an F16 reference is meant to be the same
        if quantized and case.kld is not None and float(case.kld.mean()) < NEARLY_NOTHING_NATS:
            found[case.name].append(
                Finding(
                    "nothing_quantized",
                    f"its mean KLD is {float(case.kld.mean()):.1e} nats",
                    "the file is as good as the reference: perhaps nothing was quantized",
                    "look at the plan",
                )
            )
    return found


def pair_findings(other: Measured, standard: Measured, p_holm: float | None, n_rows: int = 1) -> list[Finding]:
    """What a row of the comparison tells. p_holm: adjusted for the number of rows, n_rows."""
    if np.array_equal(other.nll, standard.nll) or (p_holm is not None and p_holm <= 0.05):
        return []
    paired = mean_interval(other.nll - standard.nll)
    if paired.sign is None:
        return [
            Finding(
                "too_little_text",
                f"whether it differs from {standard.name} cannot be told: {paired.reason}",
                "without an interval a difference means nothing",
                "measure more windows with prompts.n_windows",
            )
        ]
    if paired.sign:
        return [
            Finding(
                "within_noise",
                f"its difference to {standard.name} is beyond noise by itself, but not among {n_rows} rows",
                "of many comparisons some look real by chance (Holm's adjustment)",
                "measure more windows with prompts.n_windows",
            )
        ]
    need = paired.windows_to_resolve(other.nll.shape[0])
    need = need if need and need > other.nll.shape[0] else None
    return [
        Finding(
            "within_noise",
            f"its difference to {standard.name} is within noise"
            + (f"; about {need} windows would show it" if need else ""),
            "the sign of the difference may be chance",
            "measure more windows with prompts.n_windows",
        )
    ]


def type_findings(other: dict[str, Any], standard: dict[str, Any]) -> list[Finding]:
    """Whether the two sides of a row differ in more than layers. Both: the record's `variant`."""
    sides = [
        f"{name} {str(standard[f'{name}_type']).upper()} and {str(other[f'{name}_type']).upper()}"
        for name in ("embedding", "output")
        if standard[f"{name}_type"] != other[f"{name}_type"]
    ]
    if not sides:
        return []
    return [
        Finding(
            "types_differ",
            f"standard and policy differ in their {' and in their '.join(sides)}",
            "part of the difference comes from there, not from the choice of layers",
            "compare with a policy without these rules",
        )
    ]


def environment_findings(environments: Sequence[dict[str, Any]]) -> list[Finding]:
    """What the machines and the checkout tell about all cases together."""
    findings = []
    if any(one["dirty"] for one in environments):
        findings.append(
            Finding(
                "dirty",
                "the working tree had uncommitted changes when cases were measured",
                "nobody can check out the code that made these numbers",
                "commit, then measure again what is to be published",
            )
        )
    if len({machine_of(one) for one in environments}) > 1:
        findings.append(
            Finding(
                "machines_differ",
                "the cases were measured on several machines",
                "their seconds cannot be compared",
                "read the sizes and the quality only",
            )
        )
    elif len({one.get("system_info") for one in environments}) > 1:
        findings.append(
            Finding(
                "builds_differ",
                "the cases were measured with builds of llama.cpp for different CPU features",
                "such builds round differently and have other speeds",
                "measure every case with one build (docs/building.md)",
            )
        )
    return findings


def speed_findings(
    passes: Sequence[SpeedPass], speed: pd.DataFrame, elsewhere: Sequence[SpeedPass] = ()
) -> list[Finding]:
    """What makes timings doubtful. passes: of one machine, those in the tables; speed: the frame of the cases that were
    timed in them; elsewhere: passes of other machines, which are left out."""
    findings = []
    busy = [one for one in passes if one.other_cpu_share > BUSY_SHARE]
    if busy:
        findings.append(
            Finding(
                "busy_machine",
                f"other programs took {max(one.other_cpu_share for one in busy):.0%} of the machine during the timing",
                "tokens/s of that pass are too low, and not equally so for every file",
                "delete the folder `speed`, let the machine rest and run the sweep again: only the timing is repeated",
            )
        )
    wide = [
        f"{row['name']} ({max(row['prompt_spread'], row['generate_spread']):.0%})"
        for row in speed.to_dict("records")
        if max(row["prompt_spread"], row["generate_spread"]) > WIDE_SPREAD
    ]
    if wide:
        findings.append(
            Finding(
                "wide_spread",
                f"rounds of the timing pass differ by more than {WIDE_SPREAD:.0%}: {', '.join(wide)}",
                "a difference in speed of that size means nothing",
                "time again on a machine at rest, with more measure.speed_rounds",
            )
        )
    skipped = sorted({reason for one in passes for reason in one.skipped.values()})
    if skipped:
        findings.append(
            Finding(
                "not_timed",
                f"{len(skipped)} files were not timed: {skipped[0]}",
                "a model that does not fit in memory is timed by the disk",
                "time it on a larger machine",
            )
        )
    if elsewhere:
        others = {machine_of(one.environment) for one in elsewhere}
        alone = len({key for one in elsewhere for key in one.cases} - {key for one in passes for key in one.cases})
        shown = " ".join(str(one) for one in machine_of(passes[-1].environment) if one) or "one of them"
        findings.append(
            Finding(
                "timing_machines_differ",
                f"files were timed on {1 + len(others)} machines: the speeds here are those of {shown}; "
                + ("1 file timed elsewhere only has none" if alone == 1 else f"{alone} timed elsewhere only have none"),
                "tokens/s of different machines do not belong in one column",
                "time every file on one machine: delete the folder `speed` and run the sweep again there",
            )
        )
    return findings


def mixed_findings(records: Sequence[dict[str, Any]], allowed: Collection[str]) -> list[Finding]:
    """Fields that were allowed to differ between rows, and do."""
    different = [name for name in allowed if first_difference(records, [n for n in COMPARABLE if n != name])]
    if not different:
        return []
    return [
        Finding(
            "mixed",
            f"rows differ in {', '.join(different)}, as results.allow_different permits",
            "part of a difference between rows may come from there",
            "measure all rows alike before publishing",
        )
    ]


def unreadable_findings(problems: Sequence[str]) -> list[Finding]:
    """Records that count as absent."""
    return [
        Finding("unreadable_record", problem, "this case is missing from the tables", "run its sweep again")
        for problem in problems
    ]
