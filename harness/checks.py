"""Warnings as data: what a reader of a table must know. Pure: plans and measured values in, findings out."""

from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from harness.compare import Measured
from harness.ggml_types import UNQUANTIZED
from harness.mixture import plain_overrides, type_changes
from harness.passes import SpeedPass
from harness.plan import Plan
from harness.record import COMPARABLE, first_difference
from harness.stats import mean_interval

NEARLY_NOTHING_NATS = 1e-5
BUSY_SHARE = 0.05
WIDE_SPREAD = 0.05
MANY_FELL_BACK = 0.10  # share of the weights above which a file's name misleads


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


def plan_findings(plan: Plan) -> list[Finding]:
    """What a plan alone tells: types that fell back, types that a policy lowered."""
    findings = []
    if plan.unknown:
        findings.append(
            Finding(
                "unknown_tensors",
                f"this llama.cpp does not know {_count(plan.unknown)} of the model ({plan.unknown[0]} ...)",
                "no rule applies to them, they keep llama.cpp's type; and llama.cpp refuses to load such a model",
                "convert the model again with the converter of this llama.cpp",
            )
        )
    mixture = plan.mixture
    if mixture and mixture.plain and plan.quant == mixture.plain_file_type:
        findings.append(
            Finding(
                "preset",
                f"quant={plan.quant} is a preset, {mixture.words}; unlike llama.cpp's {plan.quant.upper()}: "
                + plain_summary(plan),
                "figures of others under this name may be of the plain type",
                f"for the plain type: {plain_overrides(mixture)}",
            )
        )
    if plan.policy and all(t.type == t.standard_type for t in plan.tensors):
        findings.append(
            Finding(
                "no_effect",
                f"the policy {plan.policy} changes no tensor, the file equals the standard one",
                "no difference between the two modes can be seen",
                "choose a quant that the policy's rules name",
            )
        )
    findings += _idle_findings(plan)
    share = plan.share_of_weights(plan.fell_back)
    if plan.fell_back:
        widths = sorted({t.shape[0] for t in plan.fell_back})
        findings.append(
            Finding(
                "fell_back" if share > MANY_FELL_BACK else "few_fell_back",
                f"{len(plan.fell_back)} of {len(plan.quantizable)} tensors ({share:.0%} of the weights) cannot take "
                f"the type asked for, their width ({', '.join(map(str, widths))}) does not fit its blocks; "
                f"the file has {plan.bpw:.2f} bits per weight",
                "the file's name misleads: this says little about the same quant on a model whose widths fit",
                "measure a model whose widths are multiples of 256 before judging the type",
            )
        )
    if plan.lowered:
        share = plan.share_of_weights(plan.lowered)
        findings.append(
            Finding(
                "lowered",
                f"the policy LOWERS {_count(plan.lowered)} ({share:.0%} of the weights) below the standard file: "
                + lowered_summary(plan),
                "a policy that claims more precision takes it away there",
                "read the plan; change the rule if this is not meant",
            )
        )
    return findings


def _idle_findings(plan: Plan) -> list[Finding]:
    """Rules that decide nothing: misspelt ones first, those for other models last and briefly."""
    findings, idle = [], plan.idle
    if idle.misspelt:
        roles = sorted({t.role for t in plan.tensors})
        said = []
        for rule, role in idle.misspelt[:5]:
            near = get_close_matches(role, roles, n=1)
            said.append(f"{role[:80]!r} in {rule}{f' (did you mean {near[0]}?)' if near else ''}")
        more = len(idle.misspelt) - len(said)
        findings.append(
            Finding(
                "misspelt_roles",
                f"rules of the policy {plan.policy} name roles that neither this model nor the GGUF format has: "
                + ", ".join(said)
                + (f" and {more} more" if more else ""),
                "a role that is misspelt changes nothing",
                "take the roles from the plan: tensor names without blk.N. and .weight",
            )
        )
    if idle.rules:
        findings.append(
            Finding(
                "idle_rules",
                f"rules of the policy {plan.policy} decide no tensor of this model: {_first(idle.rules)}",
                "a pattern may be misspelt, earlier rules may take their tensors, or llama.cpp never quantizes them",
                "compare the rule's conditions with the tensors in the plan",
            )
        )
    if idle.other_models:
        n, shown = len(idle.other_models), ", ".join(idle.other_models[:3])
        findings.append(
            Finding(
                "rules_for_other_models",
                f"{n} rule{'' if n == 1 else 's'} of the policy {plan.policy} do{'es' if n == 1 else ''} not concern "
                f"this model: {shown}{f' and {n - 3} more' if n > 3 else ''}",
                "they are for tensors, heads or experts that it does not have",
                "nothing, if the policy is meant for several kinds of model",
            )
        )
    return findings


def _first(names: Sequence[str], n: int = 8) -> str:
    more = len(names) - n
    return ", ".join(names[:n]) + (f" and {more} more" if more > 0 else "")


def reference_findings(reference: dict[str, Any]) -> list[Finding]:
    """What the origin of the reference tells. `reference`: Reference.describe()."""
    if not reference["derived_from"]:
        return []
    return [
        Finding(
            "derived_reference",
            f"the {(reference['file_type'] or '').upper()} reference was dequantized from "
            f"{reference['derived_from'].upper()}, it is not the original model",
            "losses are measured against weights that already lost precision",
            "give the original weights with model.path or model.hub for figures to publish",
        )
    ]


def thread_findings(n_threads: int, environment: dict[str, Any]) -> list[Finding]:
    """What more threads than the machine runs at once do to its speeds."""
    n_logical = environment["cores_logical"]
    if not n_logical or n_threads <= n_logical:
        return []
    return [
        Finding(
            "too_many_threads",
            f"{n_threads} threads ran on a machine of {n_logical} logical cores",
            "they wait for one another: its seconds are slower than those of fewer threads",
            f"set runtime.threads to at most {n_logical}, or time on the machine that was meant",
        )
    ]


def overlap_findings(share: float | None, limit: float) -> list[Finding]:
    """What calibration and evaluation text share, in 13-grams of tokens; None when it is not known."""
    if share is None:
        return [
            Finding(
                "overlap_unknown",
                "whether the calibration text holds the prompts is not known: the imatrix was given ready-made, or the "
                "windows are too short to tell",
                "an imatrix that has seen the test makes the quantized variants look better than they are",
                "let the harness make the imatrix from a text with calibration.path",
            )
        ]
    if share <= limit:
        return []
    return [
        Finding(
            "overlap",
            f"{share:.1%} of the prompts' 13-grams occur in the calibration text",
            "the imatrix has seen the test, so the quantized variants look better than they are",
            "choose another calibration text",
        )
    ]


def coverage_findings(plan: Plan, covered: Collection[str]) -> list[Finding]:
    """Tensors that are quantized without imatrix data. covered: names of the tensors that have some. Embeddings and
    output are left out: no imatrix has data for them."""
    inside = [t for t in plan.quantizable if t.layer is not None]
    bare = [t for t in inside if t.name not in covered]
    if not bare:
        return []
    return [
        Finding(
            "imatrix_gaps",
            f"the imatrix has no data for {len(bare)} of {len(inside)} tensors of the layers ({bare[0].name} ...)",
            "these are quantized as if there were no imatrix",
            "make the imatrix from this model, with more calibration text for a mixture of experts",
        )
    ]


def expert_findings(plan: Plan, idle: Mapping[str, Sequence[int]]) -> list[Finding]:
    """Experts that no calibration token reached. idle: their numbers by tensor."""
    experts = [t for t in plan.quantizable if t.role.endswith("_exps")]
    hit = [t for t in experts if t.name in idle]
    if not hit:
        return []
    n_idle, n_all = sum(len(idle[t.name]) for t in hit), sum(t.shape[-1] for t in experts)
    numbers = ", ".join(map(str, idle[hit[0].name]))
    return [
        Finding(
            "idle_experts",
            f"no token of the calibration text reached {n_idle} of {n_all} matrices of experts "
            f"({hit[0].name}: {numbers}{' ...' if len(hit) > 1 else ''})",
            "these are quantized as if every column were of the same importance",
            "give more calibration text, of more kinds, or live with it for experts that hardly any text reaches",
        )
    ]


def _count(tensors: Sized) -> str:
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}"


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
    if len({(one["machine"], one["cpu"]) for one in environments}) > 1:
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


def speed_findings(passes: Sequence[SpeedPass], speed: pd.DataFrame) -> list[Finding]:
    """What makes timings doubtful. speed: the frame of the cases that were timed."""
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
    if len({one.environment.get("machine") for one in passes if one.cases}) > 1:
        findings.append(
            Finding(
                "timing_machines_differ",
                "the timing passes come from several machines",
                "their tokens/s do not belong in one column",
                "compare within one pass only: the column speed_pass of runs.csv tells",
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


def lowered_summary(plan: Plan) -> str:
    """'token_embd Q8_0 -> Q5_1; ffn_down (15) IQ2_XS -> IQ2_XXS'."""
    return type_changes((tensor.role, tensor.standard_type, tensor.type) for tensor in plan.lowered)


def plain_summary(plan: Plan) -> str:
    """The same for the standard file against one of llama.cpp's plain file type."""
    plain = dict(plan.mixture.plain) if plan.mixture else {}
    return type_changes((t.role, plain[t.name], t.standard_type) for t in plan.tensors if t.name in plain)
