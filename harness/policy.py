"""Policies: rules, written as data, that give tensors other types than llama.cpp's own mixture. Pure functions.

A rule is a mapping: `name`, `type` or `bump`, and any of the conditions `file_types`, `roles`, `tensors`, `depth`,
`ends`, `min_gqa`, `min_experts`, `max_experts`. All conditions must hold. The first rule with a type that holds
decides; where none does, the steps of all bump rules that hold add up on a ladder of types. docs/policies.md explains.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from harness.errors import UserError, nearest
from harness.ladders import (
    Bump,
    Ends,
    Ladders,
    parse_bump,
    parse_ends,
    parse_ladders,
    require_file_type,
    require_weight_type,
)
from harness.recipes import MAX_PATTERNS, check_pattern, is_found, is_whole_name

_CONDITIONS = ("file_types", "roles", "tensors", "depth", "ends", "min_gqa", "min_experts", "max_experts")
_KEYS = ("name", "type", "bump", *_CONDITIONS)
_LARGEST = 1e9  # of a number in a condition
_DEPTH = re.compile(r"(\d{1,6})(?:/(\d{1,6}))?\.\.(\d{1,6})(?:/(\d{1,6}))?")

Fraction = tuple[int, int]  # numerator, denominator


@dataclass(frozen=True)
class Rule:
    """One rule: a type, or a bump on the ladders. Empty tuples and None mean "any".

    depth: half-open ranges of fractions of the model's depth.
    """

    name: str
    type: str | None
    file_types: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    depth: tuple[tuple[Fraction, Fraction], ...] = ()
    min_gqa: float | None = None
    min_experts: int | None = None
    max_experts: int | None = None
    ends: Ends | None = None
    bump: Bump | None = None
    ladders: Ladders | None = None  # of a bump rule
    tensors: tuple[str, ...] = ()  # patterns; one of them must be found in the tensor's whole name


@dataclass(frozen=True)
class Subject:
    """A tensor as the rules see it.

    `position` counts the tensors of the same role in layer order, `n_positions` is how many there are: a model that
    skips blocks counts only the real ones. Both are None for tensors outside the blocks. `gqa`: query heads per
    key-value head. `n_experts`: 0 for a dense model. `layer`: the block's own number, None outside the blocks;
    `last_layer`: the highest of the model.
    """

    file_type: str
    role: str
    position: int | None
    n_positions: int | None
    gqa: float
    n_experts: int
    layer: int | None = None
    last_layer: int = 0
    name: str = ""


@dataclass(frozen=True)
class Choice:
    """The type that the rules give a tensor, the names of the rules that gave it, and the same as text for a plan."""

    type: str
    rules: tuple[str, ...]
    text: str


def choose(rules: Sequence[Rule], subject: Subject) -> Choice | None:
    """What the rules make of a tensor; None when it keeps llama.cpp's type, as where all bumps are 0.

    Bumps start at the base type of the file type, whatever llama.cpp's mixture gives the tensor, and stop at the
    ladder's end.
    """
    rule = matching_rule(rules, subject)
    if rule and rule.type:
        return Choice(rule.type, (rule.name,), rule.name)
    steps = {r.name: _steps(r, subject.n_experts) for r in rules if r.bump and _holds(r, subject)}
    if not steps:
        return None
    ladder = next(r.ladders[subject.file_type] for r in rules if r.name in steps and r.ladders)
    chosen = ladder[min(sum(steps.values()), len(ladder) - 1)]
    return Choice(chosen, tuple(steps), ", ".join(f"{name} +{n}" for name, n in steps.items()))


def matching_rule(rules: Iterable[Rule], subject: Subject) -> Rule | None:
    """The first rule with a type whose conditions all hold."""
    return next((rule for rule in rules if rule.type and _holds(rule, subject)), None)


def concerns_file_type(rule: Rule, file_type: str) -> bool:
    """Whether the rule is for this file type. A bump rule needs a ladder with a base type for it."""
    return (not rule.file_types or file_type in rule.file_types) and (rule.ladders is None or file_type in rule.ladders)


def concerns_model(rule: Rule, gqa: float, n_experts: int) -> bool:
    """Whether the rule is for a model of so many query heads per key-value head and experts."""
    return (
        (rule.min_gqa is None or gqa >= rule.min_gqa)
        and (rule.min_experts is None or n_experts >= rule.min_experts)
        and (rule.max_experts is None or n_experts <= rule.max_experts)
        and (rule.bump is None or _steps(rule, n_experts) > 0)
    )


def names_tensor(rule: Rule, tensor_name: str) -> bool:
    """Whether one of the rule's patterns is found in the name."""
    return any(is_found(pattern, tensor_name) for pattern in rule.tensors)


def parse_rules(raw: Sequence[Any], where: str, ladders: Sequence[Any] = ()) -> tuple[Rule, ...]:
    """Rules from plain YAML data. Raises UserError that names `where`, the rule and the reason."""
    parsed = parse_ladders(ladders, where)
    rules = tuple(_parse_rule(item, f"{where}, rule {i + 1}", parsed) for i, item in enumerate(raw))
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two rules are called {name!r}: give each its own name")
    searched = [pattern for rule in rules for pattern in rule.tensors if not is_whole_name(pattern)]
    if len(searched) > MAX_PATTERNS:
        raise UserError(f"{where}: {len(searched)} patterns beside whole names: give at most {MAX_PATTERNS}")
    return rules


def _holds(rule: Rule, subject: Subject) -> bool:
    if not concerns_file_type(rule, subject.file_type) or not concerns_model(rule, subject.gqa, subject.n_experts):
        return False
    if rule.roles and subject.role not in rule.roles:
        return False
    if rule.tensors and not names_tensor(rule, subject.name):
        return False
    if rule.ends and (subject.layer is None or not rule.ends.hold(subject.layer, subject.last_layer)):
        return False
    if not rule.depth:
        return True
    if subject.position is None or subject.n_positions is None:
        return False
    n = subject.n_positions
    # Integer division, as the published rules have it: with 30 layers the first quarter is layers 0 to 6.
    return any(n * low[0] // low[1] <= subject.position < n * high[0] // high[1] for low, high in rule.depth)


def _steps(rule: Rule, n_experts: int) -> int:
    if rule.bump is None:
        return 0
    return rule.bump.experts if n_experts > 0 else rule.bump.dense


def _parse_rule(raw: Any, where: str, ladders: Ladders) -> Rule:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a rule is a mapping with name, type or bump, and conditions, not {shown(raw)}")
    for key in raw:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {shown(key)}.{nearest(str(key), _KEYS)}")
    if not isinstance(raw.get("name"), str) or not raw["name"]:
        raise UserError(f"{where}: name is missing or no text")
    where = f"{where} ({raw['name']})"
    if "type" in raw and "bump" in raw:
        raise UserError(f"{where}: type and bump exclude each other: make two rules of it")
    if "bump" not in raw and (not isinstance(raw.get("type"), str) or not raw["type"]):
        raise UserError(f"{where}: type is missing or no text (a rule has a type or a bump)")
    if "type" in raw:
        require_weight_type(raw["type"], where)
    file_types = _names(raw, "file_types", where)
    for name in file_types:
        require_file_type(name, where)
    tensors = _names(raw, "tensors", where)
    for pattern in tensors:
        check_pattern(pattern, where)
    bump = parse_bump(raw["bump"], where) if "bump" in raw else None
    if bump and not ladders:
        raise UserError(f"{where}: a bump needs `ladders` beside the policy's `rules`")
    for name in file_types if bump else ():
        if name not in ladders:
            raise UserError(f"{where}: no ladder has a base type for {name}: name it in the policy's `ladders`")
    return Rule(
        name=raw["name"],
        type=raw.get("type"),
        file_types=file_types,
        roles=_names(raw, "roles", where),
        depth=tuple(_parse_depth(item, where) for item in _names(raw, "depth", where)),
        min_gqa=_number(raw, "min_gqa", where),
        min_experts=_integer(raw, "min_experts", where),
        max_experts=_integer(raw, "max_experts", where),
        ends=parse_ends(raw["ends"], where) if "ends" in raw else None,
        bump=bump,
        ladders=ladders if bump else None,
        tensors=tensors,
    )


def _names(raw: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    if key not in raw:
        return ()
    value = raw[key]
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {key} must be a list of names, not {shown(value)}")
    return tuple(value)


def _number(raw: dict[str, Any], key: str, where: str) -> float | None:
    value = raw.get(key)
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST
    ):
        raise UserError(f"{where}: {key} must be a number, not {shown(value)}")
    return value


def _integer(raw: dict[str, Any], key: str, where: str) -> int | None:
    value = raw.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{where}: {key} must be a whole number, not {shown(value)}")
    return value


def _parse_depth(text: str, where: str) -> tuple[Fraction, Fraction]:
    match = _DEPTH.fullmatch(text.replace(" ", ""))
    if not match:
        raise UserError(f'{where}: depth {shown(text)} is no range of fractions such as "0..1/4"')
    a, b, c, d = (int(group or 1) for group in match.groups())
    if b == 0 or d == 0 or not a * d < c * b <= d * b:
        raise UserError(f"{where}: depth {shown(text)} must rise and stay within 0..1")
    return (a, b), (c, d)
