"""Policies: rules, written as data, that give tensors other types than llama.cpp's own mixture. Pure functions.

A rule is a mapping: `name`, `type`, and any of the conditions `file_types`, `roles`, `depth`, `min_gqa`,
`min_experts`, `max_experts`. All conditions must hold; the first rule that holds decides. docs/policies.md explains.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import yaml

from harness.config import PolicyConfig, folder_name
from harness.errors import UserError, nearest
from harness.ggml_types import FILE_TYPES, WEIGHT_TYPES

_KEYS = ("name", "type", "file_types", "roles", "depth", "min_gqa", "min_experts", "max_experts")
_DEPTH = re.compile(r"(\d{1,6})(?:/(\d{1,6}))?\.\.(\d{1,6})(?:/(\d{1,6}))?")
_MAX_FILE_BYTES = 1 << 20

Fraction = tuple[int, int]  # numerator, denominator


@dataclass(frozen=True)
class Rule:
    """One rule. Empty tuples and None mean "any". depth: half-open ranges of fractions of the model's depth."""

    name: str
    type: str
    file_types: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    depth: tuple[tuple[Fraction, Fraction], ...] = ()
    min_gqa: float | None = None
    min_experts: int | None = None
    max_experts: int | None = None


@dataclass(frozen=True)
class Subject:
    """A tensor as the rules see it.

    `position` counts the tensors of the same role in layer order, `n_positions` is how many there are: a model that
    skips blocks counts only the real ones. Both are None for tensors outside the blocks. `gqa`: query heads per
    key-value head. `n_experts`: 0 for a dense model.
    """

    file_type: str
    role: str
    position: int | None
    n_positions: int | None
    gqa: float
    n_experts: int


def matching_rule(rules: Iterable[Rule], subject: Subject) -> Rule | None:
    """The first rule whose conditions all hold."""
    return next((rule for rule in rules if _holds(rule, subject)), None)


def parse_rules(raw: Sequence[Any], where: str) -> tuple[Rule, ...]:
    """Rules from plain YAML data. Raises UserError that names `where`, the rule and the reason."""
    rules = tuple(_parse_rule(item, f"{where}, rule {i + 1}") for i, item in enumerate(raw))
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two rules are called {name!r}: give each its own name")
    return rules


def load_policy(settings: PolicyConfig) -> tuple[str, tuple[Rule, ...]]:
    """Name and rules of the policy that the configuration chooses. Raises UserError on rules that cannot be used."""
    name, rules = _read_policy(settings)
    for left_out in settings.without:
        if left_out not in [rule.name for rule in rules]:
            known = nearest(left_out, [rule.name for rule in rules])
            raise UserError(f"policy.without={left_out}: the policy {name} has no such rule.{known}")
    kept = tuple(rule for rule in rules if rule.name not in settings.without)
    return folder_name("_".join([name, *(f"without_{rule}" for rule in settings.without)])), kept


def _read_policy(settings: PolicyConfig) -> tuple[str, tuple[Rule, ...]]:
    if not settings.file:
        return settings.name, parse_rules(settings.rules, f"policy={settings.name}")
    path = Path(settings.file).expanduser()
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise UserError(f"policy.file={path} has more than {_MAX_FILE_BYTES:,} bytes: that is no policy")
        data = yaml.load(text.decode(), _PlainLoader)  # noqa: S506  # a SafeLoader that takes even less
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"policy.file={path} cannot be read ({error.strerror}): check the path") from error
    except Exception as error:  # YAML's constructors raise ValueError, KeyError, RecursionError ... on odd values
        raise UserError(
            f"policy.file={path} is no YAML ({' '.join(str(error).split())[:300]}): mend the file"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("rules"), list):
        raise UserError(f"policy.file={path} must be a mapping with a list `rules`, as in conf/policy/dynamicgate.yaml")
    name = data.get("name", path.stem)
    if not isinstance(name, str):
        raise UserError(f"policy.file={path}: name must be text, not {shown(name)}")
    return folder_name(name)[:80], parse_rules(data["rules"], str(path))


class _PlainLoader(yaml.SafeLoader):
    """Plain data without aliases: a few of them can stand for billions of items."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


def _holds(rule: Rule, subject: Subject) -> bool:
    if rule.file_types and subject.file_type not in rule.file_types:
        return False
    if rule.roles and subject.role not in rule.roles:
        return False
    if rule.min_gqa is not None and subject.gqa < rule.min_gqa:
        return False
    if rule.min_experts is not None and subject.n_experts < rule.min_experts:
        return False
    if rule.max_experts is not None and subject.n_experts > rule.max_experts:
        return False
    if not rule.depth:
        return True
    if subject.position is None or subject.n_positions is None:
        return False
    n = subject.n_positions
    # Integer division, as the published rules have it: with 30 layers the first quarter is layers 0 to 6.
    return any(n * low[0] // low[1] <= subject.position < n * high[0] // high[1] for low, high in rule.depth)


def _parse_rule(raw: Any, where: str) -> Rule:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a rule is a mapping with name, type and conditions, not {shown(raw)}")
    for key in raw:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {shown(key)}.{nearest(str(key), _KEYS)}")
    for key in ("name", "type"):
        if not isinstance(raw.get(key), str) or not raw[key]:
            raise UserError(f"{where}: {key} is missing or no text")
    where = f"{where} ({raw['name']})"
    if raw["type"] not in WEIGHT_TYPES:
        raise UserError(f"{where}: {raw['type']!r} is no tensor type.{nearest(raw['type'], WEIGHT_TYPES)}")
    file_types = _names(raw, "file_types", where)
    for name in file_types:
        if name not in FILE_TYPES:
            raise UserError(f"{where}: {name!r} is no file type.{nearest(name, FILE_TYPES)}")
    return Rule(
        name=raw["name"],
        type=raw["type"],
        file_types=file_types,
        roles=_names(raw, "roles", where),
        depth=tuple(_parse_depth(item, where) for item in _names(raw, "depth", where)),
        min_gqa=_number(raw, "min_gqa", where),
        min_experts=_integer(raw, "min_experts", where),
        max_experts=_integer(raw, "max_experts", where),
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
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
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
