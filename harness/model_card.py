"""The marked blocks and the front matter of a model card, regenerated from results. Every other byte stays. For `card`.

A block stands between two lines of their own, `<!-- harness:NAME -->` and `<!-- /harness:NAME -->`.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.card import MAX_BYTES
from harness.card_blocks import BLOCKS, Offer, figures, has_imatrix, md, offered
from harness.compose import sources
from harness.errors import UserError, nearest
from harness.paths import read_small
from harness.record import Record
from harness.results import Results
from harness.store import write_atomic

MAX_FRONT_MATTER = 1 << 20  # characters; PyYAML takes about a minute for a megabyte of it
FRONT_MATTER = "front matter"
TAGS = ("gguf", "quantized", "llama.cpp")

_MAX_DEPTH = 64

_MARKER = re.compile(r"[ \t]*<!--[ \t]*(/?)harness:([A-Za-z0-9_-]*)[ \t]*-->[ \t]*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^\r\n]*)")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r|\Z)")
_OPENING = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)")


@dataclass(frozen=True)
class Settings:
    """What the results do not know. None: what the card says already, and nothing when it says nothing."""

    base_model: str | None = None
    quantized_by: str | None = None
    name: str | None = None  # of the model; in front of the names of files


@dataclass(frozen=True)
class Update:
    """A card as it ought to be, and the names of the parts in which it differed."""

    text: str
    changed: tuple[str, ...]


def read_card(path: Path) -> str:
    """The card's text, line ends and byte order mark included. Raises UserError when it is no text of that size."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: there is no such file (card --new makes one)")
    content = read_small(path, MAX_BYTES)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save the card as UTF-8") from error


def write_card(path: Path, text: str) -> None:
    """Atomically, exactly these characters. A symbolic link stays one. Raises UserError when it cannot be written."""
    try:
        write_atomic(path.resolve(), lambda temporary: temporary.write_bytes(text.encode()))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({type(error).__name__})") from error


def new_card(results: Results, settings: Settings, shipped: Mapping[str, Collection[str]]) -> str:
    """A whole card with every block. Raises UserError as `update_card`."""
    name = settings.name or next((str(record.data["reference"]["name"]) for record in results.measured), "")
    parts = [f"# {md(name)} GGUF", _INTRODUCTION.format(name=md(name))]
    for block, heading in _HEADINGS.items():
        parts += [f"## {heading}", f"{_marker(block)}\n{_marker(block, end=True)}"]
    return update_card("\n\n".join(parts) + "\n", results, settings, shipped).text


def update_card(text: str, results: Results, settings: Settings, shipped: Mapping[str, Collection[str]]) -> Update:
    """The card with its marked blocks and our keys of the front matter made anew.

    shipped: names of the options of conf/ by group, for the commands that a card shows.
    Raises UserError when markers or front matter are broken, or nothing was measured.
    """
    mark, text = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    line_break = _line_break(text)
    front = _FrontMatter.read(text)
    known = {group: sources(group) for group in ("model", "prompts", "calibration") if group in shipped}
    offer = Offer(results, _model_name(front.data, offered(results), settings), shipped, known)
    changed = []
    head = front.updated(_own_fields(front.data, offer, settings), line_break)
    if head != text[: front.end]:
        changed.append(FRONT_MATTER)
    pieces, position = [mark, head], front.end
    for block in find_blocks(text, front.end):
        body = line_break.join(f"\n{BLOCKS[block.name](offer)}\n".split("\n")) + line_break
        pieces += [text[position : block.start], body]
        if text[block.start : block.end] != body:
            changed.append(block.name)
        position = block.end
    return Update("".join([*pieces, text[position:]]), tuple(changed))


@dataclass(frozen=True)
class Block:
    """A marked block: where the text between its two lines begins and ends."""

    name: str
    start: int
    end: int


def find_blocks(text: str, position: int = 0) -> list[Block]:
    """The marked blocks after `position`; lines inside fenced code are no markers.

    Raises UserError when there is none, or a marker is unknown, unclosed, nested or doubled.
    """
    blocks: list[Block] = []
    opened: _Marker | None = None
    for marker in _markers(text, position):
        where = f"line {marker.line}: {_marker(marker.name, end=marker.closes)}"
        if marker.name not in BLOCKS:
            raise UserError(f"{where} names no block.{nearest(marker.name, BLOCKS)}")
        if marker.closes:
            if opened is None or opened.name != marker.name:
                raise UserError(f"{where} closes a block that is not open")
            blocks.append(Block(opened.name, opened.end, marker.start))
            opened = None
        elif opened is not None:
            raise UserError(
                f"{where} stands inside the block {opened.name} of line {opened.line}: close that one first"
            )
        elif marker.name in [block.name for block in blocks]:
            raise UserError(f"{where} stands twice in this card: keep one of them")
        else:
            opened = marker
    if opened is not None:
        raise UserError(
            f"line {opened.line}: {_marker(opened.name)} is never closed: add a line {_marker(opened.name, end=True)}"
        )
    if not blocks:
        raise UserError(
            f"this card has no marked block: add two lines such as {_marker('files')} and {_marker('files', end=True)} "
            f"(blocks: {', '.join(BLOCKS)})"
        )
    return blocks


@dataclass(frozen=True)
class _Marker:
    """One marker line: what it says, its number, and where it starts and ends in the text."""

    name: str
    closes: bool
    line: int
    start: int
    end: int


def _markers(text: str, position: int) -> Iterator[_Marker]:
    """Marker lines after `position`. Fenced code counts only outside of blocks, whose text is ours to replace."""
    number, fence, inside = len(_lines(text[:position])), "", False
    for line in _lines(text[position:]):
        number += 1
        start, position = position, position + len(line)
        if not inside:
            fence, is_code = _fence_after(line, fence)
            if is_code:
                continue
        found = _MARKER.fullmatch(line.rstrip("\r\n")) if "harness:" in line else None
        if found:
            inside = not found[1]
            yield _Marker(found[2], bool(found[1]), number, start, position)


@dataclass(frozen=True)
class _FrontMatter:
    """The YAML at the top of a card: the text around it, its own text, and what it says."""

    opening: str
    yaml_text: str
    closing: str
    data: dict[str, Any]
    keys: tuple[tuple[str, int, int], ...]  # name, where its line begins, where its value ends

    @property
    def end(self) -> int:
        """Where the card's body begins."""
        return len(self.opening) + len(self.yaml_text) + len(self.closing)

    @classmethod
    def read(cls, text: str) -> "_FrontMatter":
        """Raises UserError on what is no plain YAML mapping with one key a line."""
        from huggingface_hub.repocard import REGEX_YAML_BLOCK  # what the hub itself looks for

        if not _OPENING.match(text[:4096]):
            return cls("", "", "", {}, ())
        found = REGEX_YAML_BLOCK.search(text)
        if found is None:
            raise UserError(
                "the front matter is never closed: it begins and ends with a line that is --- and nothing else"
            )
        opening, yaml_text, closing = found[1], found[2], found[3]
        if len(yaml_text) > MAX_FRONT_MATTER:
            raise UserError(f"the front matter is larger than {MAX_FRONT_MATTER >> 20} MiB")
        data, keys = _parsed(yaml_text)
        return cls(opening, yaml_text, closing, data, keys)

    def updated(self, fields: Mapping[str, Any], line_break: str) -> str:
        """The front matter with these fields, as text; what has the right value already stays as it is written."""
        changed = {
            name: value
            for name, value in fields.items()
            if name not in self.data or repr(self.data[name]) != repr(value)
        }
        if not changed:
            return self.opening + self.yaml_text + self.closing
        pieces, position = [], 0
        for name, start, end in self.keys:
            if name in changed:
                pieces += [self.yaml_text[position:start], _dumped(name, changed[name], line_break)]
                position = end
        body = "".join([*pieces, self.yaml_text[position:]]).rstrip("\r\n")
        added = [_dumped(name, value, line_break) for name, value in changed.items() if name not in self.data]
        body = line_break.join([*([body] if body.strip() else []), *added])
        self._require_same(body, fields)
        if not self.opening:
            return f"---{line_break}{body}{line_break}---{line_break}{line_break}"
        return self.opening + body + self.closing

    def _require_same(self, body: str, fields: Mapping[str, Any]) -> None:
        """The text that was put together must say what was there and the new fields, and nothing else."""
        try:
            same = repr(yaml.safe_load(body)) == repr({**self.data, **fields})
        except (yaml.YAMLError, ValueError, RecursionError):
            same = False
        if not same:
            raise UserError("the front matter is written in a way that cannot be changed safely: one plain key a line")


def _parsed(yaml_text: str) -> tuple[dict[str, Any], tuple[tuple[str, int, int], ...]]:
    try:
        depth = 0
        for event in yaml.parse(yaml_text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:  # PyYAML takes time with the square of the depth
                raise UserError(f"the front matter is nested more than {_MAX_DEPTH} deep")
            if getattr(event, "anchor", None) is not None:
                raise UserError("the front matter has YAML anchors or aliases (& or *): write the values out")
        root = yaml.compose(yaml_text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(yaml_text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in its line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"the front matter is no YAML{where}: {' '.join(str(problem).split())}") from error
    if root is None or data is None:
        return {}, ()
    if not isinstance(data, dict) or not isinstance(root, yaml.MappingNode):
        raise UserError("the front matter is no mapping: write one `key: value` a line")
    keys = []
    starts = [key.start_mark.index for key, _ in root.value] + [len(yaml_text)]
    for (key, _), following in zip(root.value, starts[1:], strict=True):
        begin = key.start_mark
        if root.flow_style or begin.column or not isinstance(key, yaml.ScalarNode) or not isinstance(key.value, str):
            raise UserError("the front matter is no plain mapping: write one `key: value` a line, not indented")
        keys.append((key.value, begin.index, begin.index + _length(yaml_text[begin.index : following])))
    twice = [name for name, n in Counter(name for name, _, _ in keys).items() if n > 1]
    if twice or not all(isinstance(name, str) for name in data):
        raise UserError(f"the front matter has the key {md(twice[0])} twice" if twice else "its keys must be text")
    return data, tuple(keys)


def _length(entry: str) -> int:
    """Of an entry without the comments and empty lines at its end, which belong to what follows."""
    lines = _lines(entry)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].startswith("#")):
        lines.pop()
    return len("".join(lines).rstrip("\r\n"))


def _own_fields(data: Mapping[str, Any], offer: Offer, settings: Settings) -> dict[str, Any]:
    """The keys of the front matter that are ours, checked as far as that goes without the network."""
    from huggingface_hub import ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    fields: dict[str, Any] = {}
    if settings.base_model is not None:
        try:
            validate_repo_id(settings.base_model)
        except HFValidationError as error:
            raise UserError(f"base_model={settings.base_model}: give the id of a model, OWNER/NAME") from error
        fields["base_model"] = settings.base_model
    if fields.get("base_model") or data.get("base_model"):
        fields["base_model_relation"] = "quantized"
    if settings.quantized_by is not None:
        fields["quantized_by"] = settings.quantized_by
    fields["tags"] = _tags(data.get("tags"), [*TAGS, *(["imatrix"] if has_imatrix(offer) else [])])
    fields["model-index"] = _model_index(data.get("model-index"), offer)
    try:
        ModelCardData(**{**data, **fields})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the front matter is no valid metadata of a model card ({' '.join(str(error).split())})"
        ) from error
    return fields


def _tags(given: Any, ours: list[str]) -> list[Any]:
    """What is there, in its order, then what is missing."""
    tags = [given] if isinstance(given, str) else given or []
    if not isinstance(tags, list) or not all(isinstance(tag, str | int | float) for tag in tags):
        raise UserError("tags in the front matter is no list of words")
    return list(dict.fromkeys([*tags, *ours]))


def _model_index(given: Any, offer: Offer) -> list[dict[str, Any]]:
    """Our figures in the first model of the index, after those of others, which stay as they are."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    index = _checked_index(given)
    ours = eval_results_to_model_index(offer.name, [EvalResult(**one) for one in figures(offer)])[0]
    first = index[0] if index else {"name": offer.name, "results": []}
    kept = [{**one, "results": [r for r in one["results"] if not _is_ours(r)]} for one in [first, *index[1:]]]
    kept[0] = {**kept[0], "name": offer.name, "results": [*kept[0]["results"], *ours["results"]]}
    return [kept[0], *(one for one in kept[1:] if one["results"])]


def _checked_index(given: Any) -> list[dict[str, Any]]:
    index = given or []
    good = isinstance(index, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("results"), list)
        and all(isinstance(result, dict) for result in one["results"])
        for one in index
    )
    if not good:
        raise UserError("model-index in the front matter is no list of models with name and results")
    return list(index)


def _is_ours(result: Any) -> bool:
    dataset = result["dataset"] if isinstance(result, dict) and "dataset" in result else None
    arguments = dataset.get("args") if isinstance(dataset, dict) else None
    return isinstance(arguments, dict) and "prompt_set_id" in arguments


def _model_name(data: Mapping[str, Any], measured: Sequence[Record], settings: Settings) -> str:
    """As given, else as the card's model-index says, else the reference's."""
    index = _checked_index(data.get("model-index"))
    return settings.name or (index[0]["name"] if index else str(measured[0].data["reference"]["name"]))


def _dumped(name: str, value: Any, line_break: str) -> str:
    from huggingface_hub.utils import yaml_dump

    text: str = yaml_dump({name: value}, sort_keys=False).rstrip("\n")
    return text.replace("\n", line_break)


def _fence_after(line: str, fence: str) -> tuple[str, bool]:
    """The fence that is open after a line ('' for none), and whether the line is code or a fence itself."""
    found = _FENCE.match(line)
    if not fence:
        opens = found is not None and not (found[1][0] == "`" and "`" in found[2])
        return (found[1], True) if found is not None and opens else ("", False)
    closes = found is not None and found[1].startswith(fence) and not found[2].strip()
    return ("" if closes else fence), True


def _marker(name: str, *, end: bool = False) -> str:
    return f"<!-- {'/' if end else ''}harness:{name} -->"


def _lines(text: str) -> list[str]:
    """With their ends. Only CR and LF end a line here, whatever else Unicode has."""
    return [line for line in _LINE.findall(text) if line]


def _line_break(text: str) -> str:
    """The first one of the text."""
    found = re.search(r"\r\n|\n", text)
    return found[0] if found else "\n"


_INTRODUCTION = (
    "Quantized files of {name} for llama.cpp, with the measured cost of each: perplexity, KL divergence from the "
    "reference, and size, all on the same text."
)
_HEADINGS = {
    "files": "Included Files",
    "formats": "Which Format to Take",
    "comparison": "Standard and DynamicGate Compared",
    "method": "How It Was Measured",
    "recipes": "Recipes",
}
