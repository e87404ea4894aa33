"""`policy=like`: the types of another GGUF of the same model, say a published one, as rules."""

from collections.abc import Sequence
from pathlib import Path

from harness.config import Config
from harness.errors import EngineError, UserError
from harness.header import GgufInfo, TensorInfo
from harness.isolate import run_in_child
from harness.paths import user_path
from harness.policy import Rule, parse_rules
from harness.recipes import exact_pattern
from harness.reference import Reference, read_header_json
from harness.store import Cache

NamedRules = tuple[str, tuple[Rule, ...]]


def with_copied_types(
    configs: Sequence[Config], policies: Sequence[NamedRules], reference: Reference, cache: Cache
) -> list[NamedRules]:
    """The policies, those that copy types with the rules for it. One of `policies` for each of `configs`.

    Raises UserError on a file that cannot be read, is of another model, or has types that cannot be written.
    """
    files = {one.policy.file for one in configs if one.policy.kind == "like" and one.policy.file}
    rules = {file: _rules(user_path(file), reference, cache) for file in files}
    return [
        (name, rules[one.policy.file]) if one.policy.kind == "like" and one.policy.file else (name, own)
        for one, (name, own) in zip(configs, policies, strict=True)
    ]


def copied_types(tensors: Sequence[TensorInfo], reference: Sequence[TensorInfo], where: str) -> tuple[Rule, ...]:
    """A rule for each type among the matrices of `tensors`. Pure.

    Raises UserError when the matrices (tensors of two dimensions and more) are not those of the reference.
    """
    here, there = _matrices(reference), _matrices(tensors)
    differs = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differs:
        name, n_more = differs[0], len(differs) - 1
        raise UserError(
            f"{where} is of another model: {name} is {_extents(there.get(name))} there and {_extents(here.get(name))} "
            f"in the reference{f', {n_more} more differ' if n_more else ''}; give a GGUF of the same model"
        )
    names: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.name in there:
            names.setdefault(tensor.type, []).append(exact_pattern(tensor.name))
    raw = [{"name": f"like_{kind}", "type": kind, "tensors": patterns} for kind, patterns in names.items()]
    return parse_rules(raw, where)


def _rules(path: Path, reference: Reference, cache: Cache) -> tuple[Rule, ...]:
    where = f"policy.file={path}"
    try:
        header = run_in_child(read_header_json, path, log_path=cache.path("logs", "like", ".log"))
    except (EngineError, OSError) as error:
        raise UserError(f"{where} cannot be read as a GGUF ({error}): fetch it again") from error
    info = GgufInfo.from_json(header)
    if info.architecture != reference.info.architecture:
        raise UserError(
            f"{where} is of another model: its architecture is {info.architecture!r}, the reference's "
            f"{reference.info.architecture!r}; give a GGUF of the same model"
        )
    return copied_types(info.tensors, reference.info.tensors, where)


def _matrices(tensors: Sequence[TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {t.name: t.shape for t in tensors if len(t.shape) > 1}


def _extents(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
