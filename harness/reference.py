"""The reference that every variant is compared with: resolved, inspected, derived where it must be."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from harness import sources
from harness.config import ModelConfig, model_label
from harness.cost import file_size
from harness.errors import UserError, some
from harness.ggml_types import GGUF_ALIGNMENT
from harness.header import GgufInfo, split_parts
from harness.isolate import run_in_child
from harness.plan import Plan, reference_plan
from harness.quantize import derive_f16
from harness.store import Cache, free_bytes, key_of


@dataclass(frozen=True)
class Reference:
    """An unquantized GGUF. `id` tells its content: the file's sha256, or what it was derived from and how."""

    name: str
    path: Path
    id: str
    info: GgufInfo
    source_sha256: str
    derived_from: str | None  # type of most weights of the source, when the source was quantized

    @property
    def plan(self) -> Plan:
        """The reference as a case of its own."""
        return reference_plan(self.info.tensors, self.info.file_bytes)

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary: rows of the embeddings."""
        return next((t.shape[1] for t in self.info.tensors if t.name == "token_embd.weight"), 0)

    @property
    def n_embd(self) -> int:
        """Numbers that the output projection takes for a token: the width of its rows."""
        rows = {t.name: t.shape[0] for t in self.info.tensors if t.name in ("output.weight", "token_embd.weight")}
        return rows.get("output.weight", rows.get("token_embd.weight", 0))

    def is_unchanged(self, cache: Cache) -> bool:
        """Whether the file is still the one that was resolved. Quick when nobody touched it."""
        try:
            same = source_sha256(self.path, cache) == self.id if self.derived_from is None else cache.holds(self.path)
        except (OSError, UserError):
            return False
        return same

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return {
            "id": self.id,
            "name": self.name,
            "architecture": self.info.architecture,
            "file_type": self.info.file_type,
            "file_bytes": self.info.file_bytes,
            "n_params": self.plan.n_weights,
            "source_sha256": self.source_sha256,
            "derived_from": self.derived_from,
        }


def resolve_reference(
    model: ModelConfig, cache: Cache, *, n_threads: int, engine_version: str, say: sources.Say, must_score: bool = True
) -> Reference:
    """Fetch, verify and inspect the model; derive an F16 reference when it is quantized and that is allowed.

    Raises UserError on a model that cannot be had, read, or used as a reference; with `must_score`, also on one that
    llama.cpp cannot score.
    """
    source = sources.model_file(model, cache, say)
    sha256 = source_sha256(source, cache)
    info = inspect(source, sha256, engine_version, cache)
    name = model_label(model)
    if must_score and info.refusal:
        raise UserError(f"{name} cannot be scored: {info.refusal}{_unknown(info)}: give another model")
    alignment = info.metadata.get("general.alignment", GGUF_ALIGNMENT)
    if alignment != GGUF_ALIGNMENT:
        raise UserError(
            f"{source.name} has general.alignment={alignment}: llama_model_quantize pads by {GGUF_ALIGNMENT} whatever "
            "that says, so its files could not be loaded; convert the model again without it"
        )
    if not info.quantized_types:
        return Reference(name, source, sha256, info, sha256, None)
    quantized = info.quantized_types[0]
    if not allows_quantized(model):
        raise UserError(
            f"{source.name} is already quantized (mostly {quantized.upper()}): give an F16, BF16 or F32 file, "
            "or say model.allow_quantized=true to measure against its dequantized weights"
        )
    needed = 2 * sum(t.n_weights for t in info.tensors)
    key = key_of("f16", sha256, engine_version)
    if not cache.holds(cache.path("references", key, ".gguf")):
        require_disk(cache.folder, needed, "the F16 reference")
        say(f"deriving the F16 reference from {quantized.upper()} ({needed / 1e9:.1f} GB)")
    path = cache.make(
        "references",
        key,
        ".gguf",
        lambda target: run_in_child(
            derive_f16, source, target, n_threads=n_threads, log_path=cache.path("logs", "reference", ".log")
        ),
    )
    return Reference(name, path, key, inspect(path, key, engine_version, cache), sha256, quantized)


def allows_quantized(model: ModelConfig) -> bool:
    """Whether an already quantized source may be used; a group's wheel may say so for its own file only."""
    from_wheel = model.wheel is not None and not model.path and not model.hub.repo_id
    return model.allow_quantized or (from_wheel and model.wheel is not None and model.wheel.allow_quantized)


def source_sha256(path: Path, cache: Cache) -> str:
    """sha256 of the file; of a split model, the sha256 over those of its parts."""
    parts = split_parts(path)
    hashes = [cache.sha256(part) for part in parts]
    return hashes[0] if len(hashes) == 1 else key_of("split", hashes)


def inspect(path: Path, content_id: str, engine_version: str, cache: Cache) -> GgufInfo:
    """The header of a model and whether it can be scored, read in a child and cached by the content's id."""

    def make() -> dict[str, Any]:
        return run_in_child(inspected, path, log_path=cache.path("logs", "inspect", ".log"))

    names = [field.name for field in fields(GgufInfo)]  # what an older release kept may lack some
    return GgufInfo.from_json(cache.json("headers", key_of(content_id, engine_version, names), make))


def require_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises UserError when the disk of `folder` has not that much room."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {file_size(free)} free, and {file_size(needed_bytes)} are needed for {what}: "
            "make room or set runtime.cache_dir to a larger disk"
        )


def read_header_json(path: Path) -> dict[str, Any]:
    """Runs in a child: the header as JSON types."""
    from harness.engine.gguf_file import read_header
    from harness.engine.load_check import check_load

    info = read_header(path)
    check = check_load(path, tuple(t.name for t in info.tensors))
    return replace(info, unknown_tensors=check.unknown, idle_tensors=check.idle, refusal=check.refusal).to_json()


def inspected(path: Path) -> dict[str, Any]:
    """Runs in a child: the header as JSON types, after a look at every weight."""
    from harness.engine.gguf_file import broken_tensor

    header = read_header_json(path)
    if header["refusal"] is None and (name := broken_tensor(path)):
        header["refusal"] = f"{some([name])} holds NaN or infinite weights"
    return header


def _unknown(info: GgufInfo) -> str:
    names = info.unknown_tensors
    if not names:
        return ""
    return f"; it does not know {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
