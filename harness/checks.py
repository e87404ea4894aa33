"""Warnings as data: what a reader of a table must know. Pure: plans and measured values in, findings out."""

from collections.abc import Sized
from dataclasses import asdict, dataclass
from typing import Any

from harness.ggml_types import GGML_TYPES
from harness.plan import Plan

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
    if plan.policy and all(t.type == t.standard_type for t in plan.tensors):
        findings.append(
            Finding(
                "no_effect",
                f"the policy {plan.policy} changes no tensor, the file equals the standard one",
                "no difference between the two modes can be seen",
                "choose a quant that the policy's rules name",
            )
        )
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


def overlap_findings(share: float | None, limit: float) -> list[Finding]:
    """What calibration and evaluation text share, in 13-grams of tokens; None when it is not known."""
    if share is None or share <= limit:
        return []
    return [
        Finding(
            "overlap",
            f"{share:.1%} of the prompts' 13-grams occur in the calibration text",
            "the imatrix has seen the test, so the quantized variants look better than they are",
            "choose another calibration text",
        )
    ]


def _count(tensors: Sized) -> str:
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}"


def lowered_summary(plan: Plan) -> str:
    """'token_embd Q8_0 -> Q5_1; ffn_down (15) IQ2_XS -> IQ2_XXS'."""
    groups: dict[tuple[str, str, str], int] = {}
    for tensor in plan.lowered:
        group = (tensor.role, tensor.standard_type.upper(), tensor.type.upper())
        groups[group] = groups.get(group, 0) + 1
    order = sorted(groups, key=lambda g: GGML_TYPES[g[2].lower()].bpw - GGML_TYPES[g[1].lower()].bpw)
    return "; ".join(
        f"{role}{f' ({groups[role, old, new]})' if groups[role, old, new] > 1 else ''} {old} -> {new}"
        for role, old, new in order
    )
