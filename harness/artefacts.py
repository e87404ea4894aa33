"""Makes what the cases of a sweep need: the imatrix, the variants, the reference's probabilities. Each made once."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.calibration import Calibration, require_coverage
from harness.errors import EngineError
from harness.imatrix import load_imatrix, make_imatrix
from harness.isolate import run_in_child
from harness.measure import Scores, score
from harness.plan_checks import form_findings
from harness.progress import ProgressDisplay
from harness.prompts import Windows
from harness.quantize import make_variant, tensor_sha256, weights_sha256
from harness.sweep import Case, Sweep
from harness.tensor_cache import HASHES, KIND, Hashes


@dataclass(frozen=True)
class Coverage:
    """What the imatrix has data for. tensors: their names; idle: by tensor, the experts that no token reached."""

    tensors: frozenset[str] = frozenset()
    idle: Mapping[str, Sequence[int]] = field(default_factory=dict)


def ensure_imatrix(sweep: Sweep, display: ProgressDisplay) -> Coverage:
    """Collect the imatrix unless it is held or was given.

    Raises EngineError when the reference is broken, UserError when the text did not reach a tensor that needs data.
    """
    calibration, path = sweep.calibration, sweep.imatrix_path
    if calibration is None or path is None:
        return Coverage()
    if calibration.windows is not None:
        _collect(sweep, calibration, calibration.windows, display)
    imatrix = load_imatrix(path, sweep.cache.path("logs", "imatrix-check", ".log"))
    require_coverage(imatrix.weights, [case.plan for case in sweep.cases], path)
    return Coverage(frozenset(imatrix.weights), imatrix.idle)


def _collect(sweep: Sweep, calibration: Calibration, windows: Windows, display: ProgressDisplay) -> None:
    if sweep.cache.holds(sweep.cache.path("imatrix", calibration.id, ".gguf")):
        return
    with display.step("imatrix: running the calibration text", sweep.imatrix_s) as on_progress:
        sweep.cache.make(
            "imatrix",
            calibration.id,
            ".gguf",
            lambda target: run_in_child(
                make_imatrix,
                sweep.reference.path,
                windows.tokens,
                target,
                dataset=calibration.name,
                flash_attention=sweep.config.measure.flash_attention,
                n_threads=sweep.n_threads,
                log_path=sweep.cache.path("logs", "imatrix", ".log"),
                on_progress=on_progress,
            ),
        )


def ensure_variant(sweep: Sweep, case: Case, display: ProgressDisplay) -> dict[str, Any] | None:
    """Quantize a case's file unless it is held. Returns what `make_variant` said when it was made; None for the
    reference.

    Raises EngineError when ggml fails or the file is not the planned one.
    """
    if case.plan.file_type is None:
        return None
    path = sweep.variant_path(case)
    if not sweep.cache.holds(path):
        estimate = sweep.steps(case).get("quantizing", 0.0)
        with display.step(f"{case.name}: quantizing", estimate) as on_progress:
            hashes = _hashes(sweep)

            def make(target: Path) -> dict[str, Any]:
                made: dict[str, Any] = run_in_child(
                    make_variant,
                    sweep.reference.path,
                    target,
                    case.plan,
                    sweep.imatrix_path,
                    n_threads=sweep.n_threads,
                    kept=sweep.tensor_cache if hashes else None,
                    hashes=hashes,
                    log_path=sweep.log_path(case),
                    on_progress=on_progress,
                )
                require_unchanged(sweep)
                return made

            sweep.cache.make("variants", path.stem, ".gguf", make)
        damaged = sweep.cache.facts(path).get("n_tensors_damaged")
        if damaged:
            display.say(f"warning: {damaged} tensors in {sweep.cache.folder / KIND} were damaged and quantized again")
    facts: dict[str, Any] = sweep.cache.facts(path)
    return facts


def require_unchanged(sweep: Sweep) -> None:
    """Raises EngineError when somebody changed the model or a given imatrix since the sweep resolved it."""
    calibration = sweep.calibration
    if not sweep.reference.is_unchanged(sweep.cache):
        changed = sweep.reference.path
    elif calibration and calibration.file and sweep.cache.sha256(calibration.file) != calibration.id:
        changed = calibration.file
    else:
        return
    raise EngineError(f"{changed} was changed while the sweep ran: what was made of it does not count")


def _hashes(sweep: Sweep) -> Hashes | None:
    """What the tensors are made of; None when they are not kept."""
    if not sweep.tensor_cache.limit_bytes:
        return None
    if sweep.hashes is None:
        log_path = sweep.cache.path("logs", "hashes", ".log")
        _ensure_hashes(
            sweep,
            sweep.reference.id,
            lambda: run_in_child(tensor_sha256, sweep.reference.path, n_threads=sweep.n_threads, log_path=log_path),
        )
        if path := sweep.imatrix_path:
            _ensure_hashes(
                sweep, sweep.cache.sha256(path), lambda: run_in_child(weights_sha256, path, log_path=log_path)
            )
    return sweep.hashes


def _ensure_hashes(sweep: Sweep, of: str, make: Callable[[], Mapping[str, str | None]]) -> None:
    with sweep.cache.lock(sweep.cache.path(HASHES, of, ".json")):
        sweep.cache.json(HASHES, of, make)


def ensure_probabilities(sweep: Sweep, display: ProgressDisplay) -> None:
    """Compute the reference's probabilities again where its record is there but they were removed; keep the record."""
    case = sweep.reference_case
    if not (case.done and sweep.missing_probability_bytes):
        return
    folder = sweep.cache.folder / "scores" / f"{case.key}-again"
    with (
        sweep.cache.lock(sweep.variant_path(case)),
        display.step("reference: probabilities", sweep.score_s(case)) as on_progress,
    ):
        score_case(sweep, case, folder, on_progress)
        shutil.rmtree(folder, ignore_errors=True)
    say_form(sweep, display)


def say_form(sweep: Sweep, display: ProgressDisplay) -> None:
    """Warn where the reference, just scored, is kept in another form than was chosen."""
    for finding in form_findings(sweep.kld_reference, sweep.kept_form):
        display.say(f"warning: {finding.what}; {finding.why}")


def score_case(sweep: Sweep, case: Case, windows_folder: Path, on_progress: Any) -> Scores:
    """Score the sweep's windows of one case. Those that were finished before are taken from `windows_folder`."""
    scores: Scores = run_in_child(
        score,
        sweep.variant_path(case),
        sweep.prompts.tokens,
        windows_folder,
        sweep.probability_folder,
        sweep.cache,
        is_reference=case.plan.file_type is None,
        first_scored=sweep.first_scored,
        ubatch_tokens=sweep.config.measure.ubatch_tokens,
        flash_attention=sweep.config.measure.flash_attention,
        n_threads=sweep.n_threads,
        form=sweep.kld_reference,
        reference_path=sweep.reference.path,
        only=sweep.shard_windows,
        log_path=sweep.log_path(case),
        on_progress=on_progress,
    )
    return scores
