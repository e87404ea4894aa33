"""Plans for reading and for programs."""

import re
from typing import Any

from harness import cost, plan_checks
from harness.kld_reference import FORMS, HIDDEN, LABELS, LOG_PROBS_16, PROBABILITIES, reference_bytes
from harness.mixture import Mixture, plain_overrides
from harness.plan import STANDARD_RULE, Plan, TensorPlan
from harness.sweep import Sweep

_RECIPE_LINE = re.compile(r"line (\d+)\b")  # the name of a recipe's rule; a file has one row for all of a kind


def plan_text(plan: Plan, estimate_s: float) -> str:
    """The plan of one variant: a line for each role, run of layers and type; what falls back; what is lowered."""
    policy = f", policy {plan.policy}" if plan.policy else ""
    lines = [
        f"{plan.quant} {plan.mode}{policy}",
        f"  file: {plan.file_bytes:,} bytes ({plan.file_bytes / (1 << 20):.1f} MiB), {plan.bpw:.4f} bits per weight, "
        f"{len(plan.quantizable)} of {len(plan.tensors)} tensors quantized",
        f"  time: about {cost.minutes(estimate_s)} to quantize and score",
        *_preset_lines(plan),
        "",
    ]
    rows: list[tuple[str, ...]] = [("tensor", "layers", "shape", "type", "MiB", "rule", "")]
    rows += [_group_row(group, plan.mixture) for group in _groups(plan)]
    kept = [t for t in plan.tensors if not t.quantizable]
    if kept:
        types = ", ".join(sorted({t.type for t in kept}))
        mib = sum(t.n_bytes for t in kept) / (1 << 20)
        rows.append((f"{len(kept)} more", "", "", types, f"{mib:.2f}", "never quantized", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [
            cell.rjust(w) if i == 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append(("  " + "  ".join(cells) + "  " + row[-1]).rstrip())
    for finding in (one for one in plan_checks.plan_findings(plan) if one.kind != "preset"):  # said above
        lines += ["", f"  ! {finding.what}."]
    return "\n".join(lines)


def plan_json(plan: Plan, estimate_s: float) -> dict[str, Any]:
    """The same for programs, every tensor by itself."""
    return {
        "quant": plan.quant,
        "mode": plan.mode,
        "policy": plan.policy,
        "file_type": plan.file_type,
        "mixture": plan.mixture.to_json() if plan.mixture else None,
        "file_bytes": plan.file_bytes,
        "bpw": plan.bpw,
        "n_params": plan.n_weights,
        "n_quantizable": len(plan.quantizable),
        "n_fallback": len(plan.fell_back),
        "n_raised": len(plan.raised),
        "n_lowered": len(plan.lowered),
        "estimate_s": round(estimate_s, 1),
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "type": t.type,
                "asked": t.asked,
                "standard": t.standard_type,
                "rule": t.rule if t.quantizable else None,
                "n_bytes": t.n_bytes,
                "fell_back": t.fell_back,
                "lowered": t.lowered,
            }
            for t in plan.tensors
        ],
        "findings": [finding.to_json() for finding in plan_checks.plan_findings(plan)],
    }


def estimate_s(sweep: Sweep, plan: Plan) -> float:
    """Seconds to quantize and score one variant, whatever is already there."""
    quantize = cost.quantize_s(plan.tensors, sweep.n_threads) if plan.file_type else 0.0
    return quantize + cost.score_s(plan.n_weights, sweep.prompts.tokens.size, sweep.n_threads)


def sweep_summary(sweep: Sweep) -> str:
    """What the sweep will do, a line a case, and how long it should take."""
    lines = []
    for case in sweep.cases:
        plan = case.plan
        twin = sweep.twin(case)
        if case.done:
            state = "measured already"
        else:
            state = f"same as {twin.name}" if twin else f"about {cost.minutes(sum(sweep.steps(case).values()))}"
        lines.append(f"  {case.name:<24} {plan.file_bytes / (1 << 20):9.1f} MiB  {plan.bpw:6.3f} bpw  {state}")
    if sweep.finished:
        lines.append("everything is there: no case is left to measure")
    else:
        n = sum(not sweep.twin(case) for case in sweep.open_cases)
        parts = [f"{n} case{'' if n == 1 else 's'} to measure"]
        parts += [f"{len(sweep.layer_cases)} to compare layer by layer"] if sweep.layer_cases else []
        parts += [f"{len(sweep.speed_cases)} to time"] if sweep.speed_cases else []
        lines.append(f"{', '.join(parts)}, about {cost.minutes(sweep.estimate_s)}")
        lines += disk_lines(sweep)
    return "\n".join(lines)


def disk_lines(sweep: Sweep) -> list[str]:
    """The most that a sweep will take of the cache's disk at one time; nothing where it takes nothing."""
    parts = {
        "quantized files": sweep.file_bytes_at_once,
        LABELS[sweep.kept_form]: sweep.missing_probability_bytes,
        "tensors for later use": sweep.new_tensor_bytes,
    }
    if not any(parts.values()):
        return []
    said = ", ".join(f"{what} {cost.file_size(n_bytes)}" for what, n_bytes in parts.items() if n_bytes)
    lines = [f"disk: at most {cost.file_size(sum(parts.values()))} more at one time ({said})"]
    if sweep.kld_reference != PROBABILITIES and sweep.missing_probability_bytes:
        lines.append(_form_line(sweep))
    return lines


def _form_line(sweep: Sweep) -> str:
    """In which form the reference is kept, and what the other ones would take."""
    n_windows, n = sweep.prompts.tokens.shape
    n_rows, reference = n_windows * (n - sweep.first_scored), sweep.reference
    n_bytes = reference_bytes(n_rows, reference.vocab_size, reference.n_embd)
    sizes = ", ".join(f"{form} {cost.file_size(n_bytes[form])}" for form in FORMS)
    instead = f"; {LOG_PROBS_16} where the logits do not follow from them" if sweep.kept_form == HIDDEN else ""
    return f"the reference is kept as {sweep.kept_form} ({sizes}{instead})"


def _groups(plan: Plan) -> list[list[TensorPlan]]:
    """Quantizable tensors that read the same, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[TensorPlan]] = {}
    for t in plan.quantizable:
        rule = "line" if _RECIPE_LINE.match(t.rule) else t.rule
        groups.setdefault((t.layer is None, t.role, t.shape, t.type, t.asked, t.standard_type, rule), []).append(t)
    ordered = sorted(
        groups.values(), key=lambda group: (group[0].layer is not None, group[0].role, group[0].layer or 0)
    )
    return list(ordered)


def _preset_lines(plan: Plan) -> list[str]:
    """What a preset asks for; how its standard file differs from llama.cpp's plain one, and how to have that."""
    mixture = plan.mixture
    if mixture is None or not (mixture.is_preset or plan.quant != mixture.plain_file_type):
        return []
    source = f" ({mixture.description})" if mixture.description and mixture.is_preset else ""
    lines = [f"  preset: {mixture.words}{source}"]
    plain = f"llama.cpp's {mixture.plain_file_type.upper()}"
    lines.append(
        f"  unlike {plain}: {plan_checks.plain_summary(plan)}" if mixture.plain else f"  same types as {plain}"
    )
    if mixture.plain and plan.quant == mixture.plain_file_type:
        lines[-1] += f"; for that one: {plain_overrides(mixture)}"
    return lines


def _group_row(group: list[TensorPlan], mixture: Mixture | None) -> tuple[str, ...]:
    first = group[0]
    notes = []
    if first.fell_back:
        notes.append(f"{first.asked} does not fit width {first.shape[0]}")
    if first.lowered:
        notes.append(f"LOWERED from {first.standard_type}")
    elif first.raised:
        notes.append(f"raised from {first.standard_type}")
    elif first.type != first.standard_type:
        notes.append(f"instead of {first.standard_type}")
    standard = "preset" if mixture and mixture.asks_for(first.name) else "llama.cpp"
    rule = standard if first.rule == STANDARD_RULE else first.rule
    lines = sorted({int(match[1]) for t in group if (match := _RECIPE_LINE.match(t.rule))})
    if len(lines) > 1:
        rule = f"lines {lines[0]} to {lines[-1]}"
    layers = "" if first.layer is None else _runs(sorted(t.layer for t in group if t.layer is not None))
    mib = sum(t.n_bytes for t in group) / (1 << 20)
    shape = "x".join(map(str, first.shape))
    return first.role, layers, shape, first.type, f"{mib:.2f}", rule, "; ".join(notes)


def _runs(numbers: list[int]) -> str:
    """'0-6, 22-29' for sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
