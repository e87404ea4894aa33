"""Warnings before anything is measured: what a plan, the reference, the imatrix and the settings tell. Pure."""

from collections.abc import Collection, Mapping, Sequence, Sized
from difflib import get_close_matches
from typing import Any

from harness.checks import Finding
from harness.mixture import plain_overrides, type_changes
from harness.plan import Plan

MANY_FELL_BACK = 0.10  # share of the weights above which a file's name misleads


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


def form_findings(chosen: str, kept: str) -> list[Finding]:
    """What was chosen to keep the reference for the KLD, and what had to be taken instead."""
    if chosen == kept:
        return []
    return [
        Finding(
            "kld_reference",
            f"the reference's logits cannot be recomputed from its hidden states, it is kept as {kept} instead",
            "this architecture changes the logits after the output projection, or llama.cpp multiplies otherwise; the "
            "KLD stays right, but takes more of the disk",
            f"say measure.kld_reference={kept} from the start",
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


def lowered_summary(plan: Plan) -> str:
    """'token_embd Q8_0 -> Q5_1; ffn_down (15) IQ2_XS -> IQ2_XXS'."""
    return type_changes((tensor.role, tensor.standard_type, tensor.type) for tensor in plan.lowered)


def plain_summary(plan: Plan) -> str:
    """The same for the standard file against one of llama.cpp's plain file type."""
    plain = dict(plan.mixture.plain) if plan.mixture else {}
    return type_changes((t.role, plain[t.name], t.standard_type) for t in plan.tensors if t.name in plain)
