"""Does the work of a prepared sweep: imatrix, then every case quantized, scored and recorded."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from harness import checks, metrics
from harness.calibration import require_coverage
from harness.errors import EngineError, UserError
from harness.imatrix import make_imatrix, read_imatrix
from harness.isolate import run_in_child
from harness.measure import Scores, score
from harness.progress import ProgressDisplay
from harness.quantize import make_variant
from harness.record import SCHEMA_VERSION, environment, mode_label, read_record, utc_now, write_record
from harness.sweep import Case, Sweep


def run(sweep: Sweep, display: ProgressDisplay) -> list[str]:
    """Measure every open case and write its record. Returns one line for each case that failed."""
    if not sweep.open_cases:
        return []
    engine = run_in_child(engine_facts, log_path=sweep.cache.path("logs", "engine", ".log"))
    failures = []
    if estimate := sweep.imatrix_s:
        with display.step("imatrix: running the calibration text", estimate) as on_progress:
            _make_imatrix(sweep, on_progress)
    reference = next(case for case in sweep.cases if case.plan.file_type is None)
    if reference.done and sweep.missing_probability_bytes:
        # Its record is there but its probabilities were removed: compute them again, keep the record.
        folder = sweep.cache.folder / "scores" / f"{reference.key}-again"
        with display.step("reference: probabilities", sweep.steps(reference)["scoring"]) as on_progress:
            _score(sweep, reference, folder, sweep.cache.path("logs", "probabilities", ".log"), on_progress)
        shutil.rmtree(folder, ignore_errors=True)
    for case in sweep.open_cases:
        begun = {**environment(engine), "begun_utc": utc_now()}
        try:
            _run_case(sweep, case, begun, display)
        except EngineError as error:
            log = error.log_tail
            _write(sweep, case, begun, {"status": "failed", "error": str(error), "log_tail": log}, {})
            said = [line.strip() for line in log if "error" in line.lower() or "assert" in line.lower()]
            failures.append(f"{case.name} failed: {error}{f' ({said[-1]})' if said else ''}; see {case.record_path}")
    return failures


def _run_case(sweep: Sweep, case: Case, begun: dict[str, Any], display: ProgressDisplay) -> None:
    if twin := sweep.twin(case):
        _copy_twin(sweep, case, twin, begun)
        return
    variant, steps, quantize_s = sweep.variant_path(case), sweep.steps(case), None
    log = sweep.cache.path(
        "logs", f"{case.plan.quant}-{mode_label(case.plan.mode, case.plan.policy)}-{case.key[:12]}", ".log"
    )
    if case.plan.file_type is not None:
        with display.step(f"{case.name}: quantizing", steps.get("quantizing", 0.0)) as on_progress:
            sweep.cache.make(
                "variants",
                variant.stem,
                ".gguf",
                lambda target: run_in_child(
                    make_variant,
                    sweep.reference.path,
                    target,
                    case.plan,
                    sweep.imatrix_path,
                    n_threads=sweep.n_threads,
                    log_path=log,
                    on_progress=on_progress,
                ),
            )
        quantize_s = sweep.cache.facts(variant)["quantize_s"]
    windows_folder = sweep.cache.folder / "scores" / case.key
    with display.step(f"{case.name}: scoring", steps["scoring"]) as on_progress:
        scores = _score(sweep, case, windows_folder, log, on_progress)
    _write(
        sweep,
        case,
        begun,
        {
            "status": "ok",
            "timings": {
                "quantize_s": quantize_s,
                "load_s": scores.load_s,
                "pass_s": float(scores.pass_s.sum()),
                "window_pass_s": scores.pass_s.tolist(),
                "window_decode_s": scores.decode_s.tolist(),
            },
            "peak_rss_bytes": scores.peak_rss_bytes,
        },
        scores.per_token,
    )
    shutil.rmtree(windows_folder, ignore_errors=True)
    if case.plan.file_type is not None and not sweep.config.runtime.keep_variants:
        variant.unlink(missing_ok=True)


def _score(sweep: Sweep, case: Case, windows_folder: Path, log: Path, on_progress: Any) -> Scores:
    return run_in_child(
        score,
        sweep.variant_path(case),
        sweep.prompts.tokens,
        windows_folder,
        sweep.probability_folder,
        is_reference=case.plan.file_type is None,
        first_scored=sweep.first_scored,
        ubatch_tokens=sweep.config.measure.ubatch_tokens,
        flash_attention=sweep.config.measure.flash_attention,
        n_threads=sweep.n_threads,
        log_path=log,
        on_progress=on_progress,
    )


def _copy_twin(sweep: Sweep, case: Case, twin: Case, begun: dict[str, Any]) -> None:
    """The record of a case whose file is that of another one, measured before."""
    if not twin.done:
        raise EngineError(f"its file is that of {twin.name}, which failed")
    record = read_record(twin.record_path)
    result = {name: record.data[name] for name in ("status", "timings", "peak_rss_bytes")}
    _write(sweep, case, begun, {**result, "same_as": twin.name}, record.per_token())


def _write(
    sweep: Sweep, case: Case, begun: dict[str, Any], result: dict[str, Any], side: dict[str, np.ndarray]
) -> None:
    plan, calibration = case.plan, sweep.calibration if case.plan.file_type else None
    findings = checks.plan_findings(plan) + checks.reference_findings(sweep.reference.describe())
    if calibration:
        findings += checks.overlap_findings(calibration.overlap, calibration.max_overlap)
    data = {
        "schema_version": SCHEMA_VERSION,
        "key": case.key,
        "quant": plan.quant,
        "mode": plan.mode,
        "policy": plan.policy,
        "file_type": plan.file_type,
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
            "lowered": checks.lowered_summary(plan) or None,
            "embedding_type": plan.type_of("token_embd.weight"),
            "output_type": plan.type_of("output.weight") or plan.type_of("token_embd.weight"),
            "tensors": {t.name: {"type": t.type, "standard": t.standard_type, "rule": t.rule} for t in plan.tensors},
        },
        "settings": {
            "first_scored": sweep.first_scored,
            "ubatch_tokens": sweep.config.measure.ubatch_tokens,
            "flash_attention": sweep.config.measure.flash_attention,
            "threads": sweep.n_threads,
        },
        "versions": {"metrics": metrics.VERSION, "llama_cpp_python": sweep.engine_version},
        "environment": begun,
        "findings": [finding.to_json() for finding in findings],
        **result,
    }
    write_record(case.record_path, data, side)


def _make_imatrix(sweep: Sweep, on_progress: Any) -> None:
    calibration = sweep.calibration
    assert calibration is not None
    assert calibration.windows is not None
    windows = calibration.windows

    def make(target: Path) -> None:
        run_in_child(
            make_imatrix,
            sweep.reference.path,
            windows.tokens,
            target,
            dataset=calibration.name,
            flash_attention=sweep.config.measure.flash_attention,
            n_threads=sweep.n_threads,
            log_path=sweep.cache.path("logs", "imatrix", ".log"),
            on_progress=on_progress,
        )

    path = sweep.cache.make("imatrix", calibration.id, ".gguf", make)
    try:
        weights = read_imatrix(path)
    except UserError:  # our own file was damaged on the disk
        path.unlink()
        weights = read_imatrix(sweep.cache.make("imatrix", calibration.id, ".gguf", make))
    require_coverage(weights, [case.plan for case in sweep.cases], path)


def engine_facts() -> dict[str, str]:
    """Runs in a child: what llama.cpp says of itself."""
    from harness.engine.native import engine_facts

    return engine_facts()
