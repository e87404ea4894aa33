"""What a sweep will do: its inputs resolved, its cases planned and checked, before anything slow."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import cost, metrics, sources
from harness.calibration import Calibration, calibration_file, require_coverage, resolve_calibration
from harness.config import Config, check, model_label, results_name
from harness.cpu import chosen_features, cpu_features, engine_facts, ggml_base_path
from harness.errors import EngineError, UserError
from harness.ggml_types import PINNED_VERSION, UNQUANTIZED
from harness.imatrix import load_imatrix
from harness.isolate import run_in_child
from harness.kld_reference import LABELS, PROBABILITIES, choose_form, kept_form, probability_path, reference_bytes
from harness.like import with_copied_types
from harness.measure import default_first_scored
from harness.mixture import plain_file_type, standard_mixture
from harness.passes import SPEED_UBATCH_TOKENS, looked_at, read_layers, read_speed
from harness.paths import cache_dir, user_path
from harness.plan import STANDARD_RULE, Plan, make_plan, placebo_plan
from harness.policy import Rule
from harness.policy_file import load_policy
from harness.prompts import Windows, load_windows
from harness.provenance import with_provenance
from harness.record import RECORDS, first_difference, is_done, mode_label, physical_cores, read_records, record_path
from harness.reference import Reference, require_disk, resolve_reference
from harness.store import Cache, disk_bytes, free_bytes, key_of
from harness.tensor_cache import HASHES, Hashes, TensorCache, entries
from harness.work import Piece, kept_tensors, quantizing_s


@dataclass(frozen=True)
class Case:
    """One variant to measure."""

    plan: Plan
    key: str
    record_path: Path

    @property
    def done(self) -> bool:
        """A whole successful record is there."""
        return is_done(self.record_path, self.key)

    @property
    def name(self) -> str:
        """For the progress display."""
        if self.plan.file_type is None:
            return "reference"
        return f"{self.plan.quant} {mode_label(self.plan.mode, self.plan.policy)}"


@dataclass(frozen=True)
class Sweep:
    """Everything resolved, planned and checked; nothing slow done yet."""

    folder: Path
    cache: Cache
    config: Config
    reference: Reference
    prompts: Windows
    calibration: Calibration | None
    cases: tuple[Case, ...]
    n_threads: int
    first_scored: int
    engine_version: str
    kld_reference: str  # how the reference is kept for the KLD, a form of harness.kld_reference

    @cached_property
    def open_cases(self) -> tuple[Case, ...]:
        """Cases without a record, the reference first, then in the order of work; twins behind each other."""
        place = {key: i for i, key in enumerate(self.quantizing_s)}
        waiting = [case for case in self.cases if not case.done]
        return tuple(sorted(waiting, key=lambda case: (case.plan.file_type is not None, place.get(case.key, -1))))

    @cached_property
    def quantizing_s(self) -> dict[str, float]:
        """Estimated seconds to make the file of each case that needs one, by its key, in the order of work."""
        plans: dict[str, Plan | None] = {}
        for case in (*(c for c in self.cases if not c.done), *self.speed_cases, *self.layer_cases):
            if case.plan.file_type and case.key not in plans:
                plans[case.key] = None if self.cache.holds(self.variant_path(case)) else case.plan
        keeps = self.config.runtime.tensor_cache_gb > 0
        held = self._held_tensors([plan for plan in plans.values() if plan]) if keeps else set()
        return quantizing_s(plans, self.source_types, held, self.n_threads, keeps_tensors=keeps)

    @property
    def reference_case(self) -> Case:
        """The reference itself; every sweep measures it."""
        return next(case for case in self.cases if case.plan.file_type is None)

    @cached_property
    def speed_cases(self) -> tuple[Case, ...]:
        """Cases whose speed is not known yet, without those that are the same file as another."""
        if not self.config.measure.speed:
            return ()
        known = looked_at(read_speed(self.folder), self.speed_settings)
        return tuple(case for case in self.cases if case.key not in known and not self.twin(case))

    @cached_property
    def layer_cases(self) -> tuple[Case, ...]:
        """Variants whose layers are still to be compared with the reference's."""
        if not self.config.measure.layers:
            return ()
        wanted = [case for case in self.cases if case.plan.file_type is not None and not self.twin(case)]
        done = {case.key: read_layers(case.record_path, case.key) for case in wanted}
        return tuple(case for case in wanted if (found := done[case.key]) is None or found[0] != self.layers_key)

    @property
    def layers_key(self) -> str:
        """Of everything that moves the errors of hidden states, the variant excepted."""
        measure = self.config.measure
        return key_of(
            *(self.reference.id, self.prompts.key, measure.layer_windows, self.first_scored),
            *(measure.ubatch_tokens, measure.flash_attention, self.n_threads, self.engine_version),
        )

    @property
    def speed_settings(self) -> dict[str, Any]:
        """Everything that moves a timing, the machine excepted."""
        measure = self.config.measure
        return {
            "rounds": measure.speed_rounds,
            "prompt_tokens": self.prompts.tokens.shape[1],
            "generate_tokens": measure.generate_tokens,
            "ubatch_tokens": SPEED_UBATCH_TOKENS,
            "flash_attention": measure.flash_attention,
            "threads": self.n_threads,
        }

    @property
    def finished(self) -> bool:
        """Nothing is left to do."""
        return not (self.open_cases or self.speed_cases or self.layer_cases)

    @property
    def keeps_variants(self) -> bool:
        """Whether the quantized files stay until the end of the sweep."""
        return self.config.runtime.keep_variants or self.config.measure.speed or self.config.measure.layers

    @property
    def to_quantize(self) -> tuple[Case, ...]:
        """Cases whose file is needed and not there."""
        wanted = (*self.open_cases, *self.speed_cases, *self.layer_cases)
        needed = {case.key: case for case in wanted if case.plan.file_type and not self.twin(case)}
        return tuple(case for case in needed.values() if not self.cache.holds(self.variant_path(case)))

    @property
    def imatrix_path(self) -> Path | None:
        """Where the imatrix is, or will be."""
        if self.calibration is None:
            return None
        return self.calibration.file or self.cache.path("imatrix", self.calibration.id, ".gguf")

    def twin(self, case: Case) -> Case | None:
        """An earlier case with the same content under another name: a policy that changes nothing for this quant."""
        first = next(other for other in self.cases if other.key == case.key)
        return None if first is case else first

    def variant_path(self, case: Case) -> Path:
        """Where the GGUF of a case is, or will be."""
        if case.plan.file_type is None:
            return self.reference.path
        imatrix_id = self.calibration.id if self.calibration else None
        key = key_of(self.reference.id, imatrix_id, case.plan.id, case.plan.metadata, self.engine_version)
        return self.cache.path("variants", key, ".gguf")

    def windows_folder(self, case: Case) -> Path:
        """Where the windows of a case are kept while it is scored."""
        return self.cache.folder / "scores" / case.key

    @property
    def probability_folder(self) -> Path:
        """Where the reference's probabilities are (or what gives them), a file a window."""
        key = key_of(
            self.reference.id,
            self.prompts.key,
            self.first_scored,
            self.config.measure.ubatch_tokens,
            self.config.measure.flash_attention,
            metrics.VERSION,
            self.engine_version,
            *form_key(self.kld_reference),
        )
        return self.cache.folder / "probabilities" / key

    @property
    def kept_form(self) -> str:
        """`kld_reference`, or what was taken instead where hidden states did not give the reference's logits."""
        return kept_form(self.cache, probability_path(self.probability_folder, 0), self.kld_reference)

    @property
    def missing_probability_bytes(self) -> int:
        """Disk that the reference's probabilities will still take."""
        n_windows, n = self.prompts.tokens.shape
        missing = sum(not self.cache.holds(probability_path(self.probability_folder, i)) for i in range(n_windows))
        n_rows = missing * (n - self.first_scored)
        reference = self.reference
        n_bytes = reference_bytes(n_rows, reference.vocab_size, reference.n_embd)[self.kept_form]
        return n_bytes if self.open_cases else 0

    @property
    def source_types(self) -> dict[str, str]:
        """Type of each of the reference's tensors, by name."""
        return {tensor.name: tensor.type for tensor in self.reference.info.tensors}

    @property
    def hashes(self) -> Hashes | None:
        """What the tensors are made of; None when that is not known yet."""
        source, path = self.cache.known_json(HASHES, self.reference.id), self.imatrix_path
        weights: dict[str, str] | None = {}
        if path is not None:
            weights = self.cache.known_json(HASHES, self.cache.sha256(path)) if path.is_file() else None
        if source is None or weights is None:
            return None
        return Hashes(self.source_types, source, weights, self.cache.sha256(ggml_base_path()))

    @cached_property
    def tensor_cache(self) -> TensorCache:
        """Quantized tensors: as many as the configuration says, and as the disk has room for beside the files and a
        twentieth of it that stays free."""
        limit_bytes = round(1e9 * self.config.runtime.tensor_cache_gb)
        if limit_bytes:
            held_bytes = sum(entry.n_bytes for entry in entries(self.cache))
            spare = free_bytes(self.cache.folder) - disk_bytes(self.cache.folder) // 20
            spare -= self.file_bytes_at_once + self.missing_probability_bytes
            limit_bytes = min(limit_bytes, held_bytes + max(0, spare))
        return TensorCache(self.cache, limit_bytes)

    def _held_tensors(self, plans: Iterable[Plan]) -> set[Piece]:
        """Pieces of the plans that are in the cache; none as long as it is not known what they are made of."""
        hashes = self.hashes
        if hashes is None:
            return set()
        there = {entry.key for entry in entries(self.cache)}
        wanted = {piece: t for plan in plans for piece, t in kept_tensors(plan, self.source_types).items()}
        return {piece for piece, t in wanted.items() if hashes.keys([t])[t.name] in there}

    @property
    def file_bytes_at_once(self) -> int:
        """Disk that the quantized files will take at most at one time."""
        sizes = [case.plan.file_bytes for case in self.to_quantize]
        return sum(sizes) if self.keeps_variants else max(sizes, default=0)

    @property
    def new_tensor_bytes(self) -> int:
        """Disk that quantized tensors will take beside those that are kept already."""
        plans = [case.plan for case in self.to_quantize]
        held = self._held_tensors(plans)
        new = {piece: t for plan in plans for piece, t in kept_tensors(plan, self.source_types).items()}
        return self.tensor_cache.growth_bytes(t.n_bytes for piece, t in new.items() if piece not in held)

    def steps(self, case: Case) -> dict[str, float]:
        """Estimated seconds of what is left to do for a case."""
        steps: dict[str, float] = {}
        if self.twin(case):
            return steps
        if case.plan.file_type and not self.cache.holds(self.variant_path(case)):
            steps["quantizing"] = self.quantizing_s.get(case.key, 0.0)
        steps["scoring"] = self.score_s(case)
        return steps

    def score_s(self, case: Case) -> float:
        """Estimated seconds to score a case."""
        return cost.score_s(case.plan.n_weights, self.prompts.tokens.size, self.n_threads)

    def log_path(self, case: Case) -> Path:
        """What llama.cpp says while it works on a case."""
        label = mode_label(case.plan.mode, case.plan.policy)
        return self.cache.path("logs", f"{case.plan.quant}-{label}-{case.key[:12]}", ".log")

    @property
    def layers_s(self) -> float:
        """Estimated seconds of the pass over the layers."""
        if not self.layer_cases:
            return 0.0
        measure, n_weights = self.config.measure, self.reference.plan.n_weights
        n_tokens = measure.layer_windows * self.prompts.tokens.shape[1]
        return (len(self.layer_cases) + 1) * cost.score_s(n_weights, n_tokens, self.n_threads)

    @property
    def speed_s(self) -> float:
        """Estimated seconds of the pass that times."""
        if not self.speed_cases:
            return 0.0
        measure, n_tokens = self.config.measure, self.prompts.tokens.shape[1]
        plans = {case.key: case.plan for case in (self.reference_case, *self.speed_cases)}.values()
        return measure.speed_rounds * sum(
            cost.score_s(plan.n_weights, n_tokens, self.n_threads)
            + cost.generate_s(plan.file_bytes, measure.generate_tokens)
            for plan in plans
        )

    @property
    def needs_imatrix(self) -> bool:
        """Whether a variant is still to be quantized with one."""
        return self.calibration is not None and bool(self.to_quantize)

    @property
    def imatrix_s(self) -> float:
        """Estimated seconds to collect the imatrix; 0.0 when it is there or nobody needs it."""
        path = self.imatrix_path
        if self.calibration is None or self.calibration.windows is None or path is None or not self.needs_imatrix:
            return 0.0
        if self.cache.holds(path):
            return 0.0
        n_tokens = self.calibration.windows.tokens.size
        return cost.imatrix_s(self.reference.plan.n_weights, n_tokens, self.n_threads)

    @property
    def estimate_s(self) -> float:
        """Estimated seconds of everything that is left to do."""
        cases = sum(sum(self.steps(case).values()) for case in self.open_cases)
        again = sum(self.quantizing_s.get(case.key, 0.0) for case in self.to_quantize if case.done)
        return self.imatrix_s + cases + again + self.layers_s + self.speed_s


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
    cache = Cache(cache_dir(config))
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
        plans = _plans(configs, policies, reference, calibration, engine_version, cache)
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


def form_key(form: str) -> list[str]:
    """What of a key tells the form; nothing for probabilities, the only one that older keys know."""
    return [] if form == PROBABILITIES else [form]


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


def _plans(
    configs: Sequence[Config],
    policies: Sequence[tuple[str, tuple[Rule, ...]]],
    reference: Reference,
    calibration: Calibration | None,
    engine_version: str,
    cache: Cache,
) -> list[Plan]:
    """A plan for each configuration that quantizes."""
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
        raise UserError(
            f"{sweep.folder} holds results with another {name} ({_short(before)}, now {_short(now)}): "
            "give this sweep a folder of its own with results.name=NAME"
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
