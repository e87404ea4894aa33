"""The policy that the configuration chooses: rules from conf/policy/, from a YAML file, or from a recipe."""

from pathlib import Path
from reprlib import repr as shown
from typing import Any

import yaml

from harness.config import PolicyConfig, folder_name
from harness.errors import UserError, nearest
from harness.paths import user_path
from harness.policy import Rule, parse_rules
from harness.recipes import parse_recipe

_POLICY_KEYS = ("name", "description", "ladders", "rules")
_MAX_FILE_BYTES = 1 << 20
_LONGEST_NAME = 180  # with quant, mode, key and the ending it stays below the 255 bytes of file systems


def load_policy(settings: PolicyConfig) -> tuple[str, tuple[Rule, ...]]:
    """Name and rules of the policy that the configuration chooses. Raises UserError on rules that cannot be used."""
    name, rules = _read_policy(settings)
    for left_out in settings.without:
        if left_out not in [rule.name for rule in rules]:
            known = nearest(left_out, [rule.name for rule in rules])
            raise UserError(f"policy.without={left_out}: the policy {name} has no such rule.{known}")
    kept = tuple(rule for rule in rules if rule.name not in settings.without)
    name = folder_name("_".join([name, *(f"without_{rule}" for rule in settings.without)]))
    if len(name) > _LONGEST_NAME:
        raise UserError(
            f"policy.without: {name[:40]}... is too long for the name of a file: give the rules short names"
        )
    return name, kept


def _read_policy(settings: PolicyConfig) -> tuple[str, tuple[Rule, ...]]:
    if not settings.file:
        return settings.name, parse_rules(settings.rules, f"policy={settings.name}", settings.ladders)
    path = user_path(settings.file)
    if settings.kind == "like":  # its rules are made when the reference is known, see harness.like
        if not path.is_file():
            raise UserError(f"policy.file={path} is no file: check the path")
        return folder_name(f"like_{path.stem}")[:80], ()
    content = _read_bytes(path)
    if settings.kind == "recipe":
        return _read_recipe(path, content)
    try:
        data = yaml.load(content.decode(), _PlainLoader)  # noqa: S506  # a SafeLoader that takes even less
    except Exception as error:  # YAML's constructors raise ValueError, KeyError, RecursionError ... on odd values
        raise UserError(
            f"policy.file={path} is no YAML ({' '.join(str(error).split())[:300]}): mend the file"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("rules"), list):
        raise UserError(f"policy.file={path} must be a mapping with a list `rules`, as in conf/policy/dynamicgate.yaml")
    for key in data:
        if key not in _POLICY_KEYS:
            raise UserError(f"policy.file={path}: unknown key {shown(key)}.{nearest(str(key), _POLICY_KEYS)}")
    name, ladders = data.get("name", path.stem), data.get("ladders", [])
    if not isinstance(name, str):
        raise UserError(f"policy.file={path}: name must be text, not {shown(name)}")
    if not isinstance(ladders, list):
        raise UserError(f"policy.file={path}: ladders must be a list, not {shown(ladders)}")
    return folder_name(name)[:80], parse_rules(data["rules"], str(path), ladders)


def _read_recipe(path: Path, content: bytes) -> tuple[str, tuple[Rule, ...]]:
    try:
        text = content.decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"policy.file={path} is no text: give a recipe, or policy=like for a GGUF") from error
    rules = parse_rules(parse_recipe(text, str(path)), str(path))
    return folder_name(f"recipe_{path.stem}")[:80], rules


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"policy.file={path} cannot be read ({error.strerror}): check the path") from error
    if len(content) > _MAX_FILE_BYTES:
        raise UserError(f"policy.file={path} has more than {_MAX_FILE_BYTES:,} bytes: that is no policy")
    return content


class _PlainLoader(yaml.SafeLoader):
    """Plain data without aliases: a few of them can stand for billions of items."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]
