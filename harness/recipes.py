"""Recipes: a type for every tensor as text, `PATTERN=TYPE`, as llama.cpp's tools read and write it. Pure functions.

llama-quantize (--tensor-type-file, tools/quantize of llama.cpp) splits the file at white space and each piece at its
first "=", makes the pattern lower case, and gives a tensor the type of the first pattern that is found in its name. It
knows no comments; other tools do, so a recipe comes with and without them. Names and paths of this machine are in
neither.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

from harness import __version__
from harness.errors import UserError

if TYPE_CHECKING:
    from harness.plan import Plan

MAX_ENTRIES = 4096  # of a recipe; large mixtures of experts have about 1,200 tensors
MAX_PATTERNS = 300  # of a policy, whole names not counted
MAX_PATTERN = 512  # characters
_MAX_MEMORY = 1 << 20  # bytes of one compiled pattern
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")  # layer, and the name within it
_PLAIN_TENSOR = re.compile(r"[a-z0-9._/-]+")
_WHOLE_NAME = re.compile(r"\^((?:[A-Za-z0-9_/]|\\[^A-Za-z0-9])+)\$")


def exact_pattern(tensor_name: str) -> str:
    """The pattern that is found in this name and no other."""
    return f"^{re.escape(tensor_name)}$"


def entry(tensor_name: str, type_name: str) -> str:
    """`PATTERN=TYPE` for one tensor. Raises UserError on a name that a recipe or a shell would not take as it is."""
    if not _PLAIN_TENSOR.fullmatch(tensor_name):
        raise UserError(
            f"the tensor name {tensor_name!r} is none that a recipe can hold: llama-quantize cannot name it"
        )
    return f"{exact_pattern(tensor_name)}={type_name}"


def short_entries(types: Mapping[str, str]) -> list[str]:
    """The same for many tensors (name -> type), with one pattern for all layers where a role has one type, as
    `^blk\\.(0|1|5)\\.ffn_down\\.weight$=iq3_s`. Raises UserError as `entry`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, type_name in types.items():
        entry(name, type_name)
        block = BLOCK.fullmatch(name)
        groups.setdefault((block[2] if block else name, type_name), []).append(block[1] if block else "")
    found = []
    for (rest, type_name), layers in groups.items():
        if layers == [""]:
            found.append(entry(rest, type_name))
        else:
            which = layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"
            found.append(f"^blk\\.{which}\\.{re.escape(rest)}$={type_name}")
    return found


def recipe_text(plan: "Plan", *, comments: bool) -> str:
    """The plan as a recipe, an entry for each tensor that llama.cpp quantizes. Without comments it is a file for
    `llama-quantize --tensor-type-file`. Raises UserError as `entry`, and when the plan quantizes nothing."""
    if not plan.quantizable:
        raise UserError(f"quant={plan.quant}: nothing is quantized, so there is no recipe")
    if not comments:
        return "".join(f"{entry(t.name, t.type)}\n" for t in plan.quantizable)
    policy = f", policy {plan.policy}" if plan.policy else ""
    lines = [
        f"{plan.quant} {plan.mode}{policy}: {plan.bpw:.4f} bits per weight, gguf-harness {__version__}",
        f"to be put on llama.cpp's {(plan.file_type or '').upper()}; every tensor that it quantizes is named",
    ]
    text = "".join(f"# {_one_line(line)}\n" for line in lines)
    rules = list(dict.fromkeys(t.rule for t in plan.quantizable))
    ordered = sorted(plan.quantizable, key=lambda t: rules.index(t.rule))
    for rule, tensors in groupby(ordered, key=lambda t: t.rule):
        text += f"\n# rule: {_one_line(rule)}\n" + "".join(f"{entry(t.name, t.type)}\n" for t in tensors)
    return text


def parse_recipe(text: str, where: str) -> list[dict[str, Any]]:
    """A recipe as rules for `harness.policy.parse_rules`, each named after its line. From a "#" that begins a word to
    the end of its line everything is a comment. Raises UserError that names `where` and the line."""
    rules = list(_rules_of(text, where))
    if not rules:
        raise UserError(f"{where} holds no PATTERN=TYPE: that is no recipe")
    return rules


def check_pattern(pattern: str, where: str) -> None:
    """Raises UserError when the pattern cannot be searched for."""
    if len(pattern) > MAX_PATTERN:
        raise UserError(f"{where}: a pattern of {len(pattern)} characters: give at most {MAX_PATTERN}")
    try:
        _compiled(pattern)
    except ValueError as error:
        raise UserError(f"{where}: {shown(pattern)} is no pattern that can be searched for ({error})") from error


def is_whole_name(pattern: str) -> bool:
    """Whether the pattern is one tensor's name and nothing else: such are compared, not searched for."""
    return _WHOLE_NAME.fullmatch(pattern) is not None


def is_found(pattern: str, tensor_name: str) -> bool:
    """Whether the pattern is found anywhere in the name, as std::regex_search does. The pattern was checked."""
    compiled = _compiled(pattern)
    return tensor_name == compiled if isinstance(compiled, str) else compiled.search(tensor_name) is not None


@cache
def _compiled(pattern: str) -> Any:
    """The name itself for a pattern that is a whole name, else a compiled one. Raises ValueError with RE2's reason.

    Patterns may be anybody's. RE2 takes time linear in the name's length and bounded memory; the engine of Python's re
    (and std::regex in llama.cpp) can be made to hang with a few characters. What RE2 lacks (lookaround,
    backreferences) no recipe needs.
    """
    whole = _WHOLE_NAME.fullmatch(pattern)
    if whole:
        return re.sub(r"\\(.)", r"\1", whole[1])
    import re2

    options = re2.Options()
    options.max_mem, options.never_capture, options.log_errors = _MAX_MEMORY, True, False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else ""
        raise ValueError(reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)) from error


def _rules_of(text: str, where: str) -> Iterator[dict[str, Any]]:
    n_entries = 0
    for number, line in enumerate(text.split("\n"), start=1):
        words = re.split(r"[ \t\r\v\f]+", line.strip(" \t\r\v\f"))
        comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
        entries = [word for word in words[:comment] if word]
        for i, word in enumerate(entries, start=1):
            name = f"line {number}" if len(entries) == 1 else f"line {number} entry {i}"
            n_entries += 1
            if n_entries > MAX_ENTRIES:
                raise UserError(f"{where}, {name}: more than {MAX_ENTRIES} entries: that is no recipe")
            pattern, equals, type_name = word.partition("=")
            if not (pattern and equals and type_name):
                raise UserError(f"{where}, {name}: {shown(word)} is no PATTERN=TYPE, as ^output\\.weight$=q6_k")
            if re.search(r"\\[A-Z]", pattern):
                raise UserError(f"{where}, {name}: {shown(pattern)}: llama-quantize would make the escape lower case")
            yield {"name": name, "type": type_name.lower(), "tensors": [pattern.lower()]}


def _one_line(text: str) -> str:
    """Printable and on one line: a comment must not become an entry."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
