"""What reports and cards need of a record, field by field. A record may be anybody's file. Pure."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from harness.ggml_types import FILE_TYPES, GGML_TYPES

_LARGEST = 1 << 60
_TYPES = itemgetter("type", "standard")

Check = Callable[[Any], bool]


def record_flaw(data: dict[str, Any]) -> str | None:
    """What a table cannot use about a record; None when it is sound."""
    for name, parts, check, words in _CHECKS:
        if not check(_field(data, parts)):
            return f"{name} is no {words}"
    if (data["mode"] == "reference") != (data["quant"] == "reference"):
        return "quant, mode and policy do not fit together"
    if not data["file_type"] and data["mode"] != "reference":
        return "file_type is no text"
    if not _is_mixture(data.get("mixture")):
        return "mixture is none that a quant can have"
    return None


def is_text(value: Any) -> bool:
    """Text on one line, and none of it a command for a terminal."""
    return isinstance(value, str) and value.isprintable()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def is_positive(value: Any) -> bool:
    """A whole number from 1 on."""
    return _is_count(value) and value > 0


def is_number(value: Any) -> bool:
    """A number from 0 on."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LARGEST


def is_plain(value: Any) -> bool:
    """Text, a number, true, false or null."""
    return value is None or isinstance(value, bool | int | float) or is_text(value)


def is_map(value: Any) -> bool:
    """Names with plain values, or lists of them (cpu_features)."""
    return isinstance(value, dict) and all(
        is_text(name) and all(map(is_plain, one if isinstance(one, list) else [one])) for name, one in value.items()
    )


def _is_environment(value: Any) -> bool:
    hashed = ("dirty", "machine", "cpu", "system_info")
    return (
        is_map(value)
        and {"dirty", "machine", "cpu"} <= value.keys()
        and all(is_plain(value.get(name)) for name in hashed)
        and _or_none(is_number)(value.get("memory_bytes"))
    )


def _is_tensors(value: Any) -> bool:
    # Reports ask it of hundreds of tensors in each of a thousand records: whole collections at once.
    if not isinstance(value, dict) or not is_text("".join(value)):
        return False
    try:
        types = {one for pair in set(map(_TYPES, value.values())) for one in pair}
    except (KeyError, TypeError):  # no types, no map, or types that are lists
        return False
    return set(map(type, types)) <= {str} and GGML_TYPES.keys() >= types


def _is_calibration(value: Any) -> bool:
    numbers = ("n_windows", "window_tokens")
    return (
        isinstance(value, dict)
        and is_text(value.get("name"))
        and all(name in value and _or_none(_is_count)(value[name]) for name in numbers)
    )


def _is_findings(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and all(is_text(one.get(part)) for part in ("kind", "what", "why", "todo"))
        for one in value
    )


def _is_mixture(value: Any) -> bool:
    """What `Mixture.to_json` writes, or None: the reference has none, nor had records before there were presets."""
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("plain"), dict):
        return False
    asked = [value.get(name, "") for name in ("embedding_type", "output_type")]
    types = [*value["plain"].values(), *(one for one in asked if one is not None)]
    file_types = [value.get("file_type"), value.get("plain_file_type")]
    return (
        isinstance(value.get("pure"), bool)
        and all(isinstance(one, str) and one in FILE_TYPES for one in file_types)
        and all(isinstance(one, str) and one in GGML_TYPES for one in types)
    )


class _Absent:
    """Stands for a field that is not there, which None does not."""


def _field(data: Any, parts: Sequence[str]) -> Any:
    for name in parts:
        data = data.get(name, _Absent) if isinstance(data, dict) else _Absent
    return data


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _or_absent(check: Check) -> Check:
    return lambda value: value is _Absent or value is None or check(value)


_FIELDS: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(
        ("key", "quant", "mode", "created_utc", "reference.id", "reference.name", "reference.architecture"),
        (is_text, "text"),
    ),
    **dict.fromkeys(
        ("prompt_set.id", "prompt_set.name", "prompt_set.text_sha256", "reference.source_sha256"), (is_text, "text")
    ),
    **dict.fromkeys(
        ("policy", "file_type", "reference.file_type", "variant.embedding_type", "variant.output_type"),
        (_or_none(is_text), "text"),
    ),
    "reference.derived_from": (_or_absent(is_text), "text"),
    **dict.fromkeys(
        ("variant.n_fallback", "variant.n_quantizable", "variant.n_lowered", "variant.n_raised"),
        (_is_count, "sensible number"),
    ),
    **dict.fromkeys(
        ("variant.file_bytes", "variant.n_params", "reference.file_bytes", "prompt_set.n_windows"),
        (is_positive, "sensible number"),
    ),
    **dict.fromkeys(("prompt_set.window_tokens", "settings.threads"), (is_positive, "sensible number")),
    **dict.fromkeys(("settings.first_scored", "settings.ubatch_tokens"), (is_positive, "sensible number")),
    **dict.fromkeys(("variant.bpw", "variant.fallback_share"), (is_number, "sensible number")),
    **dict.fromkeys(("timings.pass_s", "timings.load_s", "timings.quantize_s"), (_or_absent(is_number), "number")),
    "timings.windows_at_once": (_or_absent(is_positive), "sensible number"),
    "peak_rss_bytes": (_or_absent(_is_count), "sensible number"),
    "settings.flash_attention": (lambda value: value is _Absent or isinstance(value, bool), "true or false"),
    "variant.tensors": (_is_tensors, "list of types by tensor"),
    "settings": (is_map, "list of plain values"),
    "versions": (is_map, "list of plain values"),
    "versions.llama_cpp_python": (is_text, "text"),
    "environment": (_is_environment, "list of plain values with dirty, machine and cpu"),
    "calibration": (_or_absent(_is_calibration), "calibration"),
    "findings": (_is_findings, "list of whole findings"),
}
_CHECKS = [(name, name.split("."), *how) for name, how in _FIELDS.items()]
