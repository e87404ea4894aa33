"""Ladders of types, the steps that rules take on them, and where: read from plain YAML data. Pure functions."""

from collections.abc import Mapping, Sequence
from reprlib import repr as shown
from typing import Any, NamedTuple

from harness.errors import UserError, nearest
from harness.ggml_types import FILE_TYPES, WEIGHT_TYPES

_KEYS = ("types", "base")
_MAX_STEPS = 99

Ladders = Mapping[str, tuple[str, ...]]  # file type -> its base type and the types above it, step by step


class Bump(NamedTuple):
    """Steps up the ladder in dense models and in mixtures of experts."""

    dense: int
    experts: int


class Ends(NamedTuple):
    """Layers whose number, scaled to 0 .. 10 over the last layer, is at most `low` or at least `high`."""

    low: float
    high: float

    def hold(self, layer: int, last_layer: int) -> bool:
        """Without a division: exact, and a model of one layer is at both ends."""
        return 10 * layer <= self.low * last_layer or 10 * layer >= self.high * last_layer


def parse_ladders(raw: Sequence[Any], where: str) -> Ladders:
    """Ladders from a policy's `ladders`. Raises UserError that names `where`, the ladder and the reason."""
    above: dict[str, tuple[str, ...]] = {}
    for i, item in enumerate(raw):
        here = f"{where}, ladder {i + 1}"
        if not isinstance(item, dict):
            raise UserError(f"{here}: a ladder is a mapping with types and base, not {shown(item)}")
        for key in item:
            if key not in _KEYS:
                raise UserError(f"{here}: unknown key {shown(key)}.{nearest(str(key), _KEYS)}")
        types, base = item.get("types"), item.get("base")
        if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
            raise UserError(f"{here}: types must be a list of tensor types, not {shown(types)}")
        for name in types:
            require_weight_type(name, here)
        if len(types) < 2 or len(set(types)) < len(types):
            raise UserError(f"{here}: types must be two or more different types, lowest first")
        if not isinstance(base, dict) or not base:
            raise UserError(f"{here}: base must map file types to types of the ladder, not {shown(base)}")
        for file_type, start in base.items():
            require_file_type(file_type, here)
            if file_type in above:
                raise UserError(f"{here}: another ladder has a base type for {file_type} already")
            if start not in types:
                raise UserError(f"{here}: the base type of {file_type}, {shown(start)}, is not among its types")
            above[file_type] = tuple(types[types.index(start) :])
    return above


def parse_bump(raw: Any, where: str) -> Bump:
    """Steps from 2 or {dense: 2, experts: 4}. Raises UserError that begins with `where`."""
    counts = [raw, raw]
    if isinstance(raw, dict) and set(raw) == {"dense", "experts"}:
        counts = [raw["dense"], raw["experts"]]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_STEPS for n in counts):
        raise UserError(
            f"{where}: bump must be steps from 0 to {_MAX_STEPS}, as 2 or {{dense: 2, experts: 4}}, not {shown(raw)}"
        )
    if not any(counts):
        raise UserError(f"{where}: a bump of 0 steps does nothing: leave the rule out")
    return Bump(*counts)


def parse_ends(raw: Any, where: str) -> Ends:
    """Ends from {low: 2, high: 8}. Raises UserError that begins with `where`."""
    if isinstance(raw, dict) and set(raw) == {"low", "high"}:
        low, high = raw["low"], raw["high"]
        numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (low, high))
        if numbers and 0 <= low < high <= 10:
            return Ends(low, high)
    raise UserError(
        f"{where}: ends must be two numbers that rise within 0..10, such as {{low: 2, high: 8}}, not {shown(raw)}"
    )


def require_weight_type(name: str, where: str) -> None:
    """Raise UserError unless weights can have this tensor type."""
    if name not in WEIGHT_TYPES:
        raise UserError(f"{where}: {shown(name)} is no tensor type.{nearest(name, WEIGHT_TYPES)}")


def require_file_type(name: Any, where: str) -> None:
    """Raise UserError unless llama.cpp has this file type."""
    if name not in FILE_TYPES:
        raise UserError(f"{where}: {shown(name)} is no file type.{nearest(str(name), FILE_TYPES)}")
