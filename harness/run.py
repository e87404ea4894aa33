"""Does the work of a prepared sweep: every case quantized, scored and recorded, then layers and speed."""

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from harness import metrics, plan_checks
from harness.artefacts import (
    Coverage,
    ensure_imatrix,
    ensure_probabilities,
    ensure_variant,
    require_unchanged,
    say_form,
    score_case,
)
from harness.cpu import chosen_features, cpu_features, engine_facts
from harness.errors import EngineError, some
from harness.kld_reference import PROBABILITIES
from harness.layers import measure_layers
from harness.progress import ProgressDisplay
from harness.record import SCHEMA_VERSION, environment, read_record, utc_now, write_record
from harness.speed import measure_speed
from harness.store import remove_leftovers
from harness.sweep import Case, Sweep


def run(sweep: Sweep, display: ProgressDisplay) -> list[str]:
    """Do all that is left to do. Returns one line for each case that failed.

    Raises EngineError when something that all cases need cannot be made, OSError when a disk is full or refuses.
    """
    for folder in (sweep.folder, sweep.cache.folder):
        remove_leftovers(folder)
    if sweep.finished:
        _pin_variants(sweep, sweep.cases)
        return []
    covered = _imatrix(sweep, display)
    if sweep.config.measure.shard is not None:
        return _score_shard(sweep, display)
    engine = engine_of(sweep)
    failures = []
    for case in sweep.open_cases:
        if case is not sweep.reference_case and sweep.stored_scores(case) is None:
            ensure_probabilities(sweep, display)  # nothing to do unless somebody deleted them, before or just now
        failed = _work_on(sweep, case, covered, engine, display)
        failures += failed
        if failed and case is sweep.reference_case:
            return failures  # there is nothing to compare the others with
    if deleted := [case.name for case in sweep.cases if not case.record_path.is_file()]:
        names = some(deleted)
        failures.append(f"somebody deleted records from {sweep.folder} ({names}): the same command measures them again")
    failures += measure_layers(sweep, display)
    failures += time_cases(sweep, [case for case in sweep.speed_cases if case.done], engine, display)
    _pin_variants(sweep, sweep.cases)
    if not sweep.config.runtime.keep_variants:
        for case in sweep.cases:
            remove_variant(sweep, case)
    return failures


def engine_of(sweep: Sweep) -> dict[str, Any]:
    """What is known of llama.cpp on this machine, for records."""
    facts = engine_facts(sweep.cache)
    return {
        **facts,
        "cpu_features": chosen_features(cpu_features(facts["system_info"]), sweep.config.runtime.cpu_features),
    }


def time_cases(sweep: Sweep, cases: Sequence[Case], engine: dict[str, Any], display: ProgressDisplay) -> list[str]:
    """The timing pass of these cases, and of the reference beside them. Returns a line when it failed."""
    return measure_speed(sweep, cases, {**environment(engine), "begun_utc": utc_now()}, display)


def _score_shard(sweep: Sweep, display: ProgressDisplay) -> list[str]:
    """Score the shard's windows of every case and leave them in the cache, for the sweep that makes the records."""
    failures = []
    reference = sweep.reference_case
    for case in (reference, *(one for one in sweep.open_cases if one is not reference)):
        there = case.done or sweep.stored_scores(case) is not None
        if sweep.twin(case) or (there and not (case is reference and sweep.missing_probability_bytes)):
            continue
        folder = sweep.windows_folder(case)
        try:
            with sweep.cache.lock(folder / f"shard {sweep.config.measure.shard}"):
                ensure_variant(sweep, case, display)
                with display.step(f"{case.name}: scoring", sweep.score_s(case)) as on_progress:
                    score_case(sweep, case, folder, on_progress)
            require_unchanged(sweep)
        except EngineError as error:
            failures.append(f"{case.name} failed: {error.with_log}; the same command tries again")
            if case is reference:
                break
    return failures


def _imatrix(sweep: Sweep, display: ProgressDisplay) -> Coverage:
    """What the imatrix has data for, where a case needs it; it is made on the way."""
    if not any(case.plan.file_type for case in (*sweep.open_cases, *sweep.to_quantize)):
        return Coverage()
    try:
        return ensure_imatrix(sweep, display)
    except EngineError as error:
        log = sweep.cache.path("logs", "imatrix", ".log")
        raise EngineError(f"no imatrix can be made, see {log}: {error}", error.log_tail) from error


def _work_on(
    sweep: Sweep, case: Case, covered: Coverage, engine: dict[str, Any], display: ProgressDisplay
) -> list[str]:
    """Measure and record one case. Returns a line when it failed."""
    with sweep.cache.lock(sweep.variant_path(case)):
        if case.done:  # another sweep measured it while this one waited
            return []
        begun = {**environment(engine), "begun_utc": utc_now()}
        failures = []
        try:
            result, per_token = _measure(sweep, case, begun, display)
        except EngineError as error:
            result, per_token = {"status": "failed", "error": str(error), "log_tail": error.log_tail}, {}
            failures = [f"{case.name} failed: {error.with_log}; see {case.record_path}, the same command tries again"]
        write_record(case.record_path, _record(sweep, case, begun, covered) | result, per_token)
        if result["status"] == "ok":
            shutil.rmtree(sweep.windows_folder(case), ignore_errors=True)
        _pin_variants(sweep, [case])
        if not sweep.keeps_variants:
            remove_variant(sweep, case)
    return failures


def _measure(
    sweep: Sweep, case: Case, begun: dict[str, Any], display: ProgressDisplay
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the record says of the measurement, and the per-token values beside it. begun: this machine."""
    if twin := sweep.twin(case):
        if not twin.done:
            raise EngineError(f"its file is that of {twin.name}, which failed")
        record = read_record(twin.record_path)
        names = ("status", "timings", "quantizing", "peak_rss_bytes", "environment")
        result = {name: record.data.get(name) for name in names}
        return {**result, "same_as": twin.name}, record.per_token()
    made: dict[str, Any] = {}
    scores = sweep.stored_scores(case)
    if scores is None:
        made = ensure_variant(sweep, case, display) or {}
        with display.step(f"{case.name}: scoring", sweep.score_s(case)) as on_progress:
            scores = score_case(sweep, case, sweep.windows_folder(case), on_progress)
    require_unchanged(sweep)
    if case is sweep.reference_case:
        say_form(sweep, display)
    timings = {
        "quantize_s": made.get("quantize_s"),
        "load_s": scores.load_s,
        "windows_at_once": scores.windows_at_once,
        "pass_s": float(scores.pass_s.sum()) if len(scores.machines) == 1 else None,
        "window_pass_s": scores.pass_s.tolist(),
        "window_decode_s": scores.decode_s.tolist(),
    }
    quantizing = {name: n for name, n in made.items() if name != "quantize_s"} or None
    result = {"status": "ok", "timings": timings, "quantizing": quantizing, "peak_rss_bytes": scores.peak_rss_bytes}
    if scores.machines != (begun["machine"],):  # joined here of parts that others scored
        result["environment"] = {**begun, "machine": ", ".join(scores.machines), "cpu": None, "memory_bytes": None}
    return result, scores.per_token


def _pin_variants(sweep: Sweep, cases: Sequence[Case]) -> None:
    """Where the files are to be kept, later sweeps shall not remove them."""
    if sweep.config.runtime.keep_variants:
        for case in (one for one in cases if one.plan.file_type):
            sweep.cache.pin(sweep.variant_path(case))


def remove_variant(sweep: Sweep, case: Case) -> None:
    """Unless an earlier sweep was told to keep it."""
    path = sweep.variant_path(case)
    if case.plan.file_type is not None:
        with sweep.cache.lock(path):
            if not sweep.cache.is_pinned(path):
                sweep.cache.remove(path)


def _record(sweep: Sweep, case: Case, begun: dict[str, Any], covered: Coverage) -> dict[str, Any]:
    """Everything about a case but what was measured."""
    plan, calibration = case.plan, sweep.calibration if case.plan.file_type else None
    findings = plan_checks.plan_findings(plan) + plan_checks.reference_findings(sweep.reference.describe())
    findings += plan_checks.thread_findings(sweep.n_threads, begun)
    findings += plan_checks.form_findings(sweep.kld_reference, sweep.kept_form)
    if calibration:
        findings += plan_checks.overlap_findings(calibration.overlap, calibration.max_overlap)
        findings += plan_checks.coverage_findings(plan, covered.tensors) + plan_checks.expert_findings(
            plan, covered.idle
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "key": case.key,
        "quant": plan.quant,
        "mode": plan.mode,
        "policy": plan.policy,
        "file_type": plan.file_type,
        "mixture": plan.mixture.to_json() if plan.mixture else None,
        "created_utc": utc_now(),
        "reference": sweep.reference.describe(),
        "prompt_set": {
            "id": sweep.prompts.id,
            "name": sweep.prompts.name,
            "n_windows": len(sweep.prompts.tokens),
            "window_tokens": sweep.prompts.tokens.shape[1],
            "bos": sweep.prompts.bos,
            "text_sha256": sweep.prompts.text_sha256,
        },
        "calibration": calibration.describe() if calibration else None,
        "variant": {
            "plan_id": plan.id,
            "file_bytes": plan.file_bytes,
            "n_params": plan.n_weights,
            "bpw": plan.bpw,
            "n_quantizable": len(plan.quantizable),
            "n_fallback": len(plan.fell_back),
            "fallback_share": plan.share_of_weights(plan.fell_back),
            "n_raised": len(plan.raised),
            "n_lowered": len(plan.lowered),
            "lowered": plan_checks.lowered_summary(plan) or None,
            "embedding_type": plan.type_of("token_embd.weight"),
            "output_type": plan.type_of("output.weight") or plan.type_of("token_embd.weight"),
            "tensors": {t.name: {"type": t.type, "standard": t.standard_type, "rule": t.rule} for t in plan.tensors},
        },
        "settings": {
            "first_scored": sweep.first_scored,
            "ubatch_tokens": sweep.config.measure.ubatch_tokens,
            "flash_attention": sweep.config.measure.flash_attention,
            "threads": sweep.n_threads,
            **_form_settings(sweep),
        },
        "versions": {"metrics": metrics.VERSION, "llama_cpp_python": sweep.engine_version},
        "environment": begun,
        "findings": [finding.to_json() for finding in findings],
    }


def _form_settings(sweep: Sweep) -> dict[str, str]:
    """How the reference was kept, unless as probabilities; and what was taken instead where that would not do."""
    if sweep.kld_reference == PROBABILITIES:
        return {}
    kept = sweep.kept_form
    instead = {} if kept == sweep.kld_reference else {"kld_reference_kept": kept}
    return {"kld_reference": sweep.kld_reference, **instead}
