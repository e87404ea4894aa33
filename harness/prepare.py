"""Settings -> a sweep: its inputs resolved, its cases planned and checked, before anything slow."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import metrics, sources
from harness.calibration import Calibration, calibration_file, require_coverage, resolve_calibration
from harness.config import Config, check, model_label, results_name
from harness.cpu import chosen_features, cpu_features, engine_facts
from harness.errors import EngineError, UserError
from harness.ggml_types import PINNED_VERSION, UNQUANTIZED
from harness.imatrix import load_imatrix
from harness.isolate import run_in_child
from harness.kld_reference import HIDDEN, LABELS, LOG_PROBS_16, choose_form, reference_bytes
from harness.like import with_copied_types
from harness.measure import default_first_scored
from harness.mixture import plain_file_type, standard_mixture
from harness.paths import cache_dir, user_path
from harness.plan import STANDARD_RULE, Plan, make_plan, placebo_plan
from harness.policy import Rule
from harness.policy_file import load_policy
from harness.prompts import load_windows
from harness.provenance import with_provenance
from harness.record import RECORDS, first_difference, mode_label, physical_cores, read_records, record_path
from harness.reference import Reference, require_disk, resolve_reference
from harness.store import Cache, key_of
from harness.sweep import Case, Sweep, form_key


def prepare(configs: Sequence[Config], say: sources.Say, *, with_reference: bool = True) -> Sweep:
    """Resolve the inputs and plan every case. The configurations differ in quant, mode and policy only.
    `with_reference=False` is for a look at plans alone: results are not looked at.

    Raises UserError, before anything slow, on whatever would make a case impossible or its numbers meaningless.
    """
    for one in configs:
        check(one)
    config = configs[0]
    policies = [load_policy(one.policy) for one in configs]
    engine_version = _engine_version()
    n_threads = config.runtime.threads or physical_cores()
    cache = Cache(cache_dir(config), shared=config.runtime.shared_cache)
    folder = user_path(config.results.dir) / results_name(config)
    if with_reference:
        _require_writable(folder / RECORDS, config)
    if config.runtime.cpu_features is not None:
        chosen_features(cpu_features(engine_facts(cache)["system_info"]), config.runtime.cpu_features)

    prompt_file = sources.text_file(config.prompts, "prompts", cache, say)
    text = calibration_file(config.calibration, cache, say)
    try:
        reference = resolve_reference(
            config.model, cache, n_threads=n_threads, engine_version=engine_version, say=say, must_score=with_reference
        )
        policies = with_copied_types(configs, policies, reference, cache)
        _require_context(config, reference)
        prompts = load_windows(
            config.prompts, "prompts", prompt_file, reference.path, reference.id, engine_version, cache
        )
        n_ctx = prompts.tokens.shape[1]
        calibration = resolve_calibration(config, text, reference, prompts, engine_version, cache)
        plans = plans_of(configs, policies, reference, calibration, engine_version, cache)
    except EngineError as error:
        raise UserError(
            f"llama.cpp cannot use {model_label(config.model)}: {_last_words(error)}: give another model, or see "
            f"the logs in {cache.folder / 'logs'}"
        ) from error

    first_scored = config.measure.first_scored or default_first_scored(n_ctx)
    n_rows = len(prompts.tokens) * (n_ctx - first_scored)
    form = choose_form(
        config.measure.kld_reference,
        config.measure.kld_reference_gib,
        reference_bytes(n_rows, reference.vocab_size, reference.n_embd),
    )

    if config.measure.shard is not None and form == HIDDEN:
        raise UserError(
            f"measure.shard={config.measure.shard}: parts cannot be joined with measure.kld_reference=hidden (auto "
            f"chose it, if you did not): give measure.kld_reference={LOG_PROBS_16}"
        )

    def case_of(plan: Plan) -> Case:
        key = key_of(
            reference.id,
            prompts.key,
            calibration.id if calibration and plan.file_type else None,
            plan.id,
            first_scored,
            config.measure.ubatch_tokens,
            config.measure.flash_attention,
            n_threads,
            metrics.VERSION,
            engine_version,
            *form_key(form),
        )
        return Case(plan, key, record_path(folder, plan.quant, mode_label(plan.mode, plan.policy), key))

    all_plans = [reference.plan, *plans] if with_reference else plans
    cases = {case.record_path: case for case in map(case_of, all_plans)}
    _require_distinct_names(cases.values())
    sweep = Sweep(
        folder,
        cache,
        config,
        reference,
        prompts,
        calibration,
        tuple(cases.values()),
        n_threads,
        first_scored,
        engine_version,
        form,
    )
    if with_reference:
        _require_same_settings(sweep)
        _require_room(sweep)
    return sweep


def _engine_version() -> str:
    """Raises UserError unless the llama-cpp-python that is installed is the one that the harness knows."""
    try:
        found = version("llama-cpp-python")
    except PackageNotFoundError:
        found = "not installed"
    if found != PINNED_VERSION:
        raise UserError(
            f"llama-cpp-python is {found}, the harness needs {PINNED_VERSION}: "
            f"pip install llama-cpp-python=={PINNED_VERSION}"
        )
    return found


def _require_distinct_names(cases: Iterable[Case]) -> None:
    seen: set[tuple[str, str, str | None]] = set()
    for case in cases:
        label = (case.plan.quant, case.plan.mode, case.plan.policy)
        if label in seen:
            raise UserError(f"two cases would be called {case.name}: give each policy its own name")
        seen.add(label)


def plans_of(
    configs: Sequence[Config],
    policies: Sequence[tuple[str, tuple[Rule, ...]]],
    reference: Reference,
    calibration: Calibration | None,
    engine_version: str,
    cache: Cache,
) -> list[Plan]:
    """A plan for each configuration that quantizes. Raises UserError where llama.cpp would refuse it."""
    plain, pure = (
        _dry_runs(configs, reference, engine_version, cache, has_imatrix=calibration is not None, pure=pure)
        for pure in (False, True)
    )
    plans: list[Plan] = []
    for one, (policy_name, rules) in zip(configs, policies, strict=True):
        file_type = one.quant.file_type
        if file_type is None:
            continue
        run = pure[file_type] if one.quant.pure else plain[file_type]
        mixture, final, asked = standard_mixture(
            one.quant, run, plain[plain_file_type(one.quant)], reference.info.tensors
        )
        plan = make_plan(
            quant=one.quant.name,
            mode=one.mode.name,
            policy=policy_name if one.mode.apply_policy else None,
            file_type=file_type,
            tensors=reference.info.tensors,
            header_bytes=reference.info.quantized_header_bytes,
            standard_final=final,
            standard_asked=asked,
            rules=rules if one.mode.apply_policy else (),
            metadata=reference.info.metadata,
            unknown=reference.info.unknown_tensors,
            mixture=mixture,
        )
        if one.mode.placebo:
            plan = placebo_plan(plan, one.mode.placebo_seed)
        if file_type in UNQUANTIZED and any(t.rule != STANDARD_RULE for t in plan.tensors):
            raise UserError(
                f"policy={policy_name} names tensors of quant={plan.quant}, but llama.cpp gives the tensors of an "
                f"unquantized file one type: add file_types to its rules"
            )
        if plan.needs_imatrix and calibration is None:
            raise UserError(
                f"quant={plan.quant} needs an imatrix (llama.cpp refuses {plan.type_of(plan.needs_imatrix[0])} "
                f"for {plan.needs_imatrix[0]} without one): leave calibration=none out"
            )
        idle = [name for name in plan.needs_imatrix if name in reference.info.idle_tensors]
        if idle and calibration and not calibration.file:
            raise UserError(
                f"quant={plan.quant} needs imatrix data for {idle[0]} and {len(idle) - 1} more tensors that llama.cpp "
                "does not use when it runs a text: choose a quant of more bits, or convert the model without them"
            )
        # Cases of the same content are one file, which tells the origin of the first.
        named = with_provenance(plan, reference.info, calibration.metadata if calibration else {})
        first = next((other for other in plans if other.id == plan.id), named)
        plans.append(replace(plan, metadata=first.metadata, header_bytes=first.header_bytes))
    if calibration and calibration.file:
        weights = load_imatrix(calibration.file, cache.path("logs", "imatrix-check", ".log")).weights
        require_coverage(weights, plans, calibration.file)
    return plans


def _dry_runs(
    configs: Sequence[Config],
    reference: Reference,
    engine_version: str,
    cache: Cache,
    *,
    has_imatrix: bool,
    pure: bool,
) -> dict[str, Any]:
    """What llama.cpp would make of each file type that plans need, by file type; `pure`: of the pure quants alone."""
    quants = [one.quant for one in configs if one.quant.file_type and (one.quant.pure or not pure)]
    file_types = {quant.file_type for quant in quants} | {plain_file_type(quant) for quant in quants if not pure}
    if not file_types:
        return {}
    names = sorted(name for name in file_types if name)

    def make() -> dict[str, Any]:
        return run_in_child(
            _standard_types,
            reference.path,
            names,
            has_imatrix=has_imatrix,
            pure=pure,
            log_path=cache.path("logs", "dry-run", ".log"),
        )

    key = key_of(reference.id, names, has_imatrix, engine_version, *(["pure"] if pure else []))
    found: dict[str, Any] = cache.json("mixtures", key, make)
    return found


def _require_same_settings(sweep: Sweep) -> None:
    """Raises UserError when the folder holds records that may not stand in one table with this sweep's."""
    old = [record.data for record in read_records(sweep.folder) if record.ok]
    new = {
        "mode": "standard",
        "reference": {"id": sweep.reference.id},
        "prompt_set": {
            "id": sweep.prompts.id,
            "n_windows": len(sweep.prompts.tokens),
            "window_tokens": sweep.prompts.tokens.shape[1],
        },
        "calibration": {"id": sweep.calibration.id if sweep.calibration else None},
        "settings": {
            "first_scored": sweep.first_scored,
            "ubatch_tokens": sweep.config.measure.ubatch_tokens,
            "flash_attention": sweep.config.measure.flash_attention,
            "threads": sweep.n_threads,
            "kld_reference": sweep.kld_reference,
        },
        "versions": {"metrics": metrics.VERSION, "llama_cpp_python": sweep.engine_version},
    }
    difference = first_difference([*old, new], sweep.config.results.allow_different)
    if difference:
        name, before, now = difference
        same = f"measure.kld_reference={before} goes on with that form; or " if name == "settings.kld_reference" else ""
        raise UserError(
            f"{sweep.folder} holds results with another {name} ({_short(before)}, now {_short(now)}): "
            f"{same}give this sweep a folder of its own with results.name=NAME"
        )


def _require_room(sweep: Sweep) -> None:
    needed = sweep.file_bytes_at_once + sweep.missing_probability_bytes  # tensors are kept where there is room beside
    if needed:
        require_disk(sweep.cache.folder, needed, f"the quantized variants and {LABELS[sweep.kept_form]}")


def _require_context(config: Config, reference: Reference) -> None:
    trained = reference.info.n_ctx_train
    for group, text in (("prompts", config.prompts), ("calibration", config.calibration)):
        used = group == "prompts" or (config.calibration.enabled and not config.calibration.imatrix)
        if used and trained and text.window_tokens > trained:
            raise UserError(
                f"{group}.window_tokens={text.window_tokens}: the model was trained for {trained} tokens of context, "
                "give at most that"
            )


def _require_writable(folder: Path, config: Config) -> None:
    try:
        existing = folder
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):  # nothing is made for a sweep that is refused later
            pass
    except OSError as error:
        raise UserError(
            f"results.dir={config.results.dir}: {folder} cannot be written ({error.strerror}): give another folder"
        ) from error


def _last_words(error: EngineError) -> str:
    """The error, and what llama.cpp logged last, on one line."""
    for word in ("error", "failed"):
        lines = [line.strip() for line in error.log_tail if word in line.lower()]
        if lines:
            return f"{error} ({lines[-1]})"
    said = [line.strip() for line in error.log_tail if line.strip()]
    return f"{error} (last logged: {said[-1][:200]})" if said else str(error)


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else str(value)


def _standard_types(source: Path, file_types: list[str], *, has_imatrix: bool, pure: bool) -> dict[str, Any]:
    from harness.engine.quantize import standard_types

    runs = standard_types(source, file_types, has_imatrix=has_imatrix, pure=pure)
    return {name: asdict(run) for name, run in runs.items()}
