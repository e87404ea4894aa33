"""A sweep: its inputs, its cases, and what is left to do. Made by `harness.prepare`."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import cost, metrics
from harness.calibration import Calibration
from harness.config import Config, parse_shard
from harness.cpu import ggml_base_path
from harness.kld_reference import PROBABILITIES, kept_form, probability_path, reference_bytes
from harness.measure import Scores, stored_scores, window_path
from harness.passes import SPEED_UBATCH_TOKENS, looked_at, read_layers, read_speed
from harness.plan import Plan
from harness.prompts import Windows
from harness.record import is_done, mode_label
from harness.reference import Reference
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

    @property
    def shard_windows(self) -> tuple[int, ...]:
        """Numbers of the windows that this sweep scores: all, or every n-th."""
        n_windows = len(self.prompts.tokens)
        if self.config.measure.shard is None:
            return tuple(range(n_windows))
        part, n_parts = parse_shard(self.config.measure.shard, n_windows)
        return tuple(range((part or 1) - 1, n_windows, n_parts))

    def stored_scores(self, case: Case) -> Scores | None:
        """The values of a case whose windows (of this shard) were all scored, here or elsewhere; None for others."""
        n_scored = self.prompts.tokens.shape[1] - self.first_scored
        return stored_scores(self.windows_folder(case), self.shard_windows, n_scored)

    def is_scored(self, case: Case) -> bool:
        """Whether files are there for all of these windows, whole or not."""
        return all(window_path(self.windows_folder(case), i).is_file() for i in self.shard_windows)

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
        missing = sum(not self.cache.holds(probability_path(self.probability_folder, i)) for i in self.shard_windows)
        n_rows = missing * (self.prompts.tokens.shape[1] - self.first_scored)
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
        if self.twin(case) or self.is_scored(case):
            return steps
        if case.plan.file_type and not self.cache.holds(self.variant_path(case)):
            steps["quantizing"] = self.quantizing_s.get(case.key, 0.0)
        steps["scoring"] = self.score_s(case)
        return steps

    def score_s(self, case: Case) -> float:
        """Estimated seconds to score a case."""
        n_tokens = len(self.shard_windows) * self.prompts.tokens.shape[1]
        return cost.score_s(case.plan.n_weights, n_tokens, self.n_threads)

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
        return cost.score_s(self.reference.plan.n_weights, n_tokens, self.n_threads)

    @property
    def estimate_s(self) -> float:
        """Estimated seconds of everything that is left to do."""
        cases = sum(sum(self.steps(case).values()) for case in self.open_cases)
        again = sum(self.quantizing_s.get(case.key, 0.0) for case in self.to_quantize if case.done)
        return self.imatrix_s + cases + again + self.layers_s + self.speed_s


def form_key(form: str) -> list[str]:
    """What of a key tells the form; nothing for probabilities, the only one that older keys know."""
    return [] if form == PROBABILITIES else [form]
