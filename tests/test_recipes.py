"""Recipes and copied types, against llama.cpp: what it makes of a recipe, and which names its patterns find."""

import ctypes
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from tiny_model import write_tiny_llama

from harness.config import Config, PolicyConfig
from harness.engine.gguf_file import read_header
from harness.errors import UserError
from harness.ggml_types import GGML_TYPES, fit_type
from harness.header import TensorInfo
from harness.like import copied_types, with_copied_types
from harness.plan import Plan, make_plan
from harness.plan_checks import plan_findings
from harness.policy import Rule, Subject, matching_rule, parse_rules
from harness.policy_file import load_policy
from harness.recipes import (
    MAX_ENTRIES,
    MAX_PATTERN,
    MAX_PATTERNS,
    entry,
    exact_pattern,
    is_found,
    parse_recipe,
    recipe_text,
)
from harness.reference import Reference
from harness.store import Cache

Cli = Callable[..., tuple[int, str, str]]


def llama_quantize(source: Path, target: Path, file_type: int, overrides: list[tuple[str, str]], pure: bool) -> None:
    """What tools/quantize does with the pieces of a --tensor-type-file, by the C API and nothing of the harness."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = file_type, pure, 1
    array = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
    for item, (pattern, kind) in zip(array, overrides, strict=False):
        item.pattern, item.type = pattern.lower().encode(), gguf.GGMLQuantizationType[kind.upper()].value
    params.tt_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(target), params) == 0


def split_as_llama_quantize(text: str) -> list[tuple[str, str]]:
    """Pieces between white space, each cut at its first "="."""
    pieces = [piece.partition("=") for piece in text.split()]
    assert all(pattern and kind for pattern, _, kind in pieces)
    return [(pattern, kind) for pattern, _, kind in pieces]


def written_types(path: Path) -> dict[str, str]:
    """Type by tensor, as the gguf package reads it."""
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


def planned_types(out: str) -> dict[str, str]:
    """Type by tensor of `plan --json` with one case."""
    (plan,) = json.loads(out)
    return {t["name"]: t["type"] for t in plan["tensors"]}


def policy(path: Path, kind: str = "recipe") -> tuple[str, tuple[Rule, ...]]:
    """The policy of a file."""
    return load_policy(PolicyConfig(name=kind, kind=kind, file=str(path)))


# --- out and in again


def test_what_is_exported_makes_the_planned_file(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    """plan --tensor-type-file -> llama.cpp -> file; the same recipe as a policy -> the same plan."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "rules:\n- {name: ends, type: q6_k, roles: [ffn_down], depth: ['0..1/4', '3/4..1']}\n"
        "- {name: \"a\\nb=c # d\", type: q8_0, tensors: ['^blk\\.[12]\\.attn_(k|q)', token_embd]}\n"
    )
    ours = ["mode=dynamicgate", f"policy.file={rules}", *tiny_overrides]
    code, planned, err = cli("plan", "quant=q4_k_m", "--json", *ours)
    assert code == 0, err
    types = planned_types(planned)
    assert types["blk.1.attn_q.weight"] == types["token_embd.weight"] == "q8_0" != types["blk.0.attn_q.weight"]

    code, plain, err = cli("plan", "quant=q4_k_m", "--tensor-type-file", *ours)
    assert code == 0, err
    target = tmp_path / "out.gguf"
    llama_quantize(tiny_gguf, target, llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K_S, split_as_llama_quantize(plain), False)
    assert written_types(target) == types

    code, commented, err = cli("plan", "quant=q4_k_m", "--recipe", *ours)
    assert code == 0, err
    assert sorted(line for line in commented.splitlines() if line and line[0] != "#") == sorted(plain.splitlines())
    assert "# rule: ends\n" in commented and "# rule: a b=c # d\n" in commented
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(commented)
    ours = ["mode=dynamicgate", "policy=recipe", f"policy.file={recipe}", *tiny_overrides]
    code, out, err = cli("plan", "quant=q3_k_m", "--json", *ours)
    assert code == 0, err
    assert planned_types(out) == types
    assert json.loads(out)[0]["policy"] == "recipe_recipe"


SMOLLM2 = {  # SmolLM2-135M: rows of 576 and 1536 weights, tied embeddings
    **{"token_embd.weight": (576, 49152), "output_norm.weight": (576,)},
    **{
        f"blk.{i}.{role}.weight": shape
        for i in range(30)
        for role, shape in (
            *(("attn_norm", (576,)), ("ffn_norm", (576,)), ("attn_q", (576, 576)), ("attn_k", (576, 192))),
            *(("attn_v", (576, 192)), ("attn_output", (576, 576))),
            *(("ffn_gate", (576, 1536)), ("ffn_up", (576, 1536)), ("ffn_down", (1536, 576))),
        )
    },
}


def plan(shapes: Mapping[str, tuple[int, ...]], rules: tuple[Rule, ...], standard: str = "iq1_m") -> Plan:
    """A plan in which llama.cpp wants one type for all matrices."""
    tensors = [TensorInfo(name, shape, "f16" if len(shape) > 1 else "f32", 0) for name, shape in shapes.items()]
    return make_plan(
        quant="iq1_m",
        mode="dynamicgate",
        policy="p",
        file_type="iq1_m",
        tensors=tensors,
        header_bytes=0,
        standard_final={t.name: fit_type(standard, t.shape[0]) for t in tensors if len(t.shape) > 1},
        standard_asked={},
        rules=rules,
        metadata={"general.architecture": "llama"},
    )


@pytest.mark.parametrize("comments", [True, False])
def test_a_recipe_of_smollm2_says_the_types_after_the_fallback(comments: bool) -> None:
    raw = [
        {"name": "ends", "type": "iq3_s", "roles": ["ffn_down"], "depth": ["0..1/4"]},
        {"name": "embeddings", "type": "q5_k", "roles": ["token_embd"]},
    ]
    made = plan(SMOLLM2, parse_rules(raw, "here"))
    text = recipe_text(made, comments=comments)
    pieces = split_as_llama_quantize("\n".join(line for line in text.split("\n") if not line.startswith("#")))
    found = {}
    for name, shape in SMOLLM2.items():
        if len(shape) > 1:
            asked = next(kind for pattern, kind in pieces if re.search(pattern.lower(), name))
            found[name] = fit_type(asked, shape[0])
    assert found == {t.name: t.type for t in made.quantizable} and len(found) == 211
    # 576 is no multiple of 256, 1536 is
    assert (found["token_embd.weight"], found["blk.0.ffn_down.weight"]) == ("q5_1", "iq3_s")
    again = plan(SMOLLM2, parse_rules(parse_recipe(text, "r"), "r"), standard="q8_0")
    assert [t.type for t in again.tensors] == [t.type for t in made.tensors] and not again.idle.rules


@pytest.mark.parametrize("name", ["blk.0.Attn.weight", "a b", "a=b", "a\nb", "a'b", "", "é"])
def test_names_that_llama_quantize_cannot_name_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="none that a recipe can hold"):
        entry(name, "q8_0")


# --- what is read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"^output\.weight$=q6_k", [("line 1", r"^output\.weight$", "q6_k")]),
        ("attn_v=Q8_0\r\nFFN_down=IQ4_XS\r\n", [("line 1", "attn_v", "q8_0"), ("line 2", "ffn_down", "iq4_xs")]),
        ("\ufeff# a=b\n\n  \tattn_v=q8_0 # c=d\n#e\n", [("line 3", "attn_v", "q8_0")]),
        ("a=q8_0 b=q6_k #", [("line 1 entry 1", "a", "q8_0"), ("line 1 entry 2", "b", "q6_k")]),
        ("a#b=f16", [("line 1", "a#b", "f16")]),
        ("a=bf16", [("line 1", "a", "bf16")]),
    ],
)
def test_recipes_by_hand(tmp_path: Path, text: str, expected: list[tuple[str, str, str]]) -> None:
    path = tmp_path / "my recipe.txt"
    path.write_bytes(text.encode())
    name, rules = policy(path)
    assert name == "recipe_my_recipe"
    assert [(rule.name, *rule.tensors, rule.type) for rule in rules] == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a=q8_0\n\nattn_v", ["line 3", "attn_v", "no PATTERN=TYPE"]),
        ("=q8_0", ["line 1", "no PATTERN=TYPE"]),
        ("attn_v=", ["line 1", "no PATTERN=TYPE"]),
        ("a=q8_0 b", ["line 1 entry 2", "no PATTERN=TYPE"]),
        ("a=q8_0\nb=iq2_ks", ["line 2", "'iq2_ks' is no tensor type", "Did you mean iq2_s"]),
        ("b=q4_k_m", ["line 1", "'q4_k_m' is no tensor type", "Did you mean q4_k"]),
        ("b=i32", ["line 1", "'i32' is no tensor type"]),
        ("blk.(0=q8_0", ["line 1", "blk.(0", "missing )"]),
        (r"(a)\1=q8_0", ["line 1", "no pattern"]),
        ("(?=a)b=q8_0", ["line 1", "'a)b=q8_0' is no tensor type"]),  # cut at the first "=", as llama-quantize does
        ("(?!a)b=q8_0", ["line 1", "no pattern"]),
        (r"blk\.\D=q8_0", ["line 1", "lower case"]),
        ("a{1001}=q8_0", ["line 1", "repetition"]),
        ("(((((a{9}){9}){9}){9}){9}){9}=q8_0", ["line 1", "no pattern"]),
        ("x" * (MAX_PATTERN + 1) + "=q8_0", ["line 1", str(MAX_PATTERN)]),
        ("a=f16\n" * (MAX_ENTRIES + 1), [f"line {MAX_ENTRIES + 1}", "more than"]),
        ("a=f16\n" * (MAX_PATTERNS + 1), [str(MAX_PATTERNS + 1), "patterns"]),
        ("# only a comment\n", ["no PATTERN=TYPE"]),
        ("", ["no PATTERN=TYPE"]),
        (b"GGUF\xff\xfe\x00", ["no text", "policy=like"]),
        ("a=f16 " * 200_000, ["bytes"]),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    path = tmp_path / "r.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        policy(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in [str(path), *words]:
        assert word in message


def test_a_recipe_for_every_tensor_of_a_large_mixture_is_no_error() -> None:
    names = [f"blk.{i}.ffn_{role}_exps.weight" for i in range(400) for role in ("up", "gate", "down")]
    rules = parse_rules(parse_recipe("\n".join(entry(name, "iq2_s") for name in names), "r"), "r")
    assert len(rules) == 1200
    assert matching_rule(rules, Subject("iq1_m", "x", 0, 1, 1.0, 8, name=names[-1])) is rules[-1]


def test_the_first_line_that_is_found_decides_and_the_others_are_told() -> None:
    text = r"""^blk\.0\.ffn_down=q6_k
ffn_down=q4_k
ffn_down\.weight=q8_0
output_norm=f32
blk\.1\.attn_norm=q8_0
blk\.99\.=q8_0
"""
    made = plan(SMOLLM2, parse_rules(parse_recipe(text, "r"), "r"))
    types = {t.name: t.type for t in made.tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.1.ffn_down.weight"]) == ("q6_k", "q4_k")
    # line 4 asks for what llama.cpp leaves alone anyway, line 5 for what it never does
    assert made.idle.rules == ("line 3", "line 5", "line 6")
    (finding,) = [f for f in plan_findings(made) if f.kind == "idle_rules"]
    assert finding.what.endswith("line 3, line 5, line 6")


def test_what_another_file_has_and_llama_cpp_cannot_give_is_told() -> None:
    """A tensor that llama.cpp leaves alone keeps its F32, whatever the copied file has."""
    shapes = {**SMOLLM2, "blk.0.ffn_gate_inp.weight": (576,)}
    raw = [{"name": "like_q8_0", "type": "q8_0", "tensors": [exact_pattern(name) for name in shapes]}]
    made = plan(shapes, parse_rules([{**raw[0], "tensors": raw[0]["tensors"][-2:]}], "r"))
    assert made.idle.rules == ("like_q8_0 for blk.0.ffn_gate_inp.weight",)
    (finding,) = [f for f in plan_findings(made) if f.kind == "idle_rules"]
    assert "blk.0.ffn_gate_inp.weight" in finding.what


def test_many_idle_lines_are_counted() -> None:
    made = plan(SMOLLM2, parse_rules(parse_recipe("\n".join(f"none{i}=q8_0" for i in range(100)), "r"), "r"))
    (finding,) = [f for f in plan_findings(made) if f.kind == "idle_rules"]
    assert finding.what.endswith("line 8 and 92 more")


# --- patterns


@pytest.mark.parametrize(
    "pattern",
    [
        *("attn_v", "^blk", "weight$", r"blk\.[0-2]\.", r"blk\.(0|3)\.ffn_(up|down)\.weight", "output", "^output"),
        *(
            r"^output\.weight$",
            r"blk\.\d+\.attn_[qk]\.",
            "[^.]+embd",
            "attn_.*put",
            r"(?:blk\.)?1",
            "ffn_(gate|up)?",
            "",
        ),
        *(
            r"\bffn",
            "a{2}",
            "t{2}",
            r"[[:digit:]]\.ffn_u",
            "x*",
            r"blk.0.attn.q",
            r"w.{4}t\b",
            "ATTN",
            r"^$",
            r"^blk\.1\-",
        ),
    ],
)
def test_patterns_find_what_they_find_in_llama_cpp(tiny_gguf: Path, tmp_path: Path, pattern: str) -> None:
    target = tmp_path / "out.gguf"
    llama_quantize(tiny_gguf, target, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, [(pattern, "q8_0")], True)
    types = {name: kind for name, kind in written_types(target).items() if kind != "f32"}
    assert set(types.values()) <= {"q8_0", "q4_0"} and len(types) == 30
    (rule,) = parse_rules([{"name": "r", "type": "q8_0", "tensors": [pattern.lower()]}], "here")
    chosen = {n: matching_rule([rule], Subject("q4_0", "x", None, None, 1.0, 0, name=n)) for n in types}
    assert {name for name, kind in types.items() if kind == "q8_0"} == {name for name, found in chosen.items() if found}


@pytest.mark.parametrize("pattern", ["(a+)+$", "^(a|a)*$", "(.*a){60}$", "(a*)*b"])
def test_a_hostile_pattern_does_not_hang(pattern: str) -> None:
    assert not is_found(pattern, "a" * 2000 + "!")


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "a-b/c.d", "a+b(c)[d]$^|*?{}\\"])
def test_an_exact_pattern_finds_its_name_alone(name: str) -> None:
    near = {f"x{name}", f"{name}x", name.replace(".", "x"), name.upper(), name[1:]} - {name}
    assert [one for one in [*near, name] if is_found(exact_pattern(name), one)] == [name]


@pytest.mark.parametrize("value", ["attn_v", [1], [], ["("], [""] * (MAX_PATTERNS + 1)])
def test_patterns_of_rules_that_are_none(value: Any) -> None:
    with pytest.raises(UserError, match="here"):
        parse_rules([{"name": "r", "type": "q8_0", "tensors": value}], "here")


# --- the types of another file


@pytest.fixture(scope="module")
def published(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that somebody made of the tiny model with types of their own."""
    path = tmp_path_factory.mktemp("published") / "tiny-Q4_K_M.gguf"
    overrides = [(r"blk\.[02]\.attn_v", "q8_0"), ("ffn_down", "iq4_xs"), ("token_embd", "f16"), ("^output", "q5_1")]
    llama_quantize(tiny_gguf, path, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, overrides, False)
    return path


def split(source: Path, folder: Path) -> Path:
    """The file in parts of 10 tensors. Returns the first."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(folder / "split.gguf", "llama", split_max_tensors=10)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "split-00001-of-00004.gguf"


def copied(tiny_gguf: Path, other: Path, folder: Path) -> tuple[Rule, ...]:
    """The rules of policy=like for the tiny model."""
    reference = Reference("tiny", tiny_gguf, "id", read_header(tiny_gguf), "id", None)
    config = Config(policy=PolicyConfig(kind="like", file=str(other)))
    ((_, rules),) = with_copied_types([config], [("like", ())], reference, Cache(folder / "cache"))
    return rules


def test_copied_types_are_the_other_files(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, published: Path, tmp_path: Path
) -> None:
    like = ["mode=dynamicgate", "policy=like", f"policy.file={published}", *tiny_overrides]
    code, out, err = cli("plan", "quant=q8_0", "--json", *like)
    assert code == 0, err
    assert planned_types(out) == written_types(published)
    assert json.loads(out)[0]["policy"] == "like_tiny-Q4_K_M"
    assert not [f for f in json.loads(out)[0]["findings"] if f["kind"] == "idle_rules"]
    in_parts = copied(tiny_gguf, split(published, tmp_path), tmp_path)
    assert in_parts == copied(tiny_gguf, published, tmp_path) and len(in_parts) == 5


def infos(**shapes: tuple[int, ...]) -> list[TensorInfo]:
    """Tensors of one type."""
    return [TensorInfo(name, shape, "q4_k", 0) for name, shape in shapes.items()]


HERE = infos(a=(256, 4), b=(512, 4), norm=(256,))


def test_small_tensors_may_differ() -> None:
    rules = copied_types([*infos(b=(512, 4), a=(256, 4), bias=(7,)), TensorInfo("norm", (9,), "f32", 0)], HERE, "there")
    assert [(rule.name, rule.type, rule.tensors) for rule in rules] == [("like_q4_k", "q4_k", ("^b$", "^a$"))]


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (infos(a=(256, 4)), ["b is missing there and 512x4"]),
        (infos(a=(256, 4), b=(512, 4), c=(1, 2)), ["c is 1x2 there and missing in the reference"]),
        (infos(a=(256, 5), b=(512, 5)), ["a is 256x5 there and 256x4", "1 more differ"]),
        ([], ["a is missing", "1 more"]),
    ],
)
def test_a_file_of_another_model_is_refused(there: list[TensorInfo], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        copied_types(there, HERE, "policy.file=x")
    for word in ["policy.file=x is of another model", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["i32", "f64"])
def test_types_that_no_matrix_is_written_in_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"'{kind}' is no tensor type"):
        copied_types([TensorInfo("a", (256, 4), kind, 0), *HERE[1:]], HERE, "x")


def damaged(source: Path, target: Path, type_number: int) -> Path:
    """The file with another number for the type of one tensor: behind its name, uint32 and two uint64 extents."""
    data = bytearray(source.read_bytes())
    at = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16
    assert int.from_bytes(data[at : at + 4], "little") in {kind.id for kind in GGML_TYPES.values()}
    data[at : at + 4] = type_number.to_bytes(4, "little")
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("make", "words"),
    [
        # 137 and 31: IQ2_K of a fork, and Q4_0_4_4, which llama.cpp no longer has
        (lambda made, path: damaged(made, path, 137), ["blk.1.ffn_up.weight", "tensor type 137", "fork"]),
        (lambda made, path: damaged(made, path, 31), ["x.gguf"]),
        (lambda made, path: write_tiny_llama(path, n_layers=3), ["another model", "blk.3.", "missing there"]),
        (lambda made, path: write_tiny_llama(path, n_ff=768), ["another model", "256x768 there and 256x512"]),
        (lambda made, path: path.write_bytes(made.read_bytes()[:5000]), ["x.gguf", "damaged"]),
        (lambda made, path: path.write_bytes(b"rules: []"), ["x.gguf", "no GGUF"]),
    ],
)
def test_files_that_cannot_be_copied(
    tiny_gguf: Path, published: Path, tmp_path: Path, make: Callable[..., Any], words: list[str]
) -> None:
    path = tmp_path / "x.gguf"
    make(published, path)
    with pytest.raises(UserError) as caught:
        copied(tiny_gguf, path, tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_another_architecture_is_another_model(tiny_gguf: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_tensor("a", np.zeros((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture is 'qwen2', the reference's 'llama'"):
        copied(tiny_gguf, tmp_path / "x.gguf", tmp_path)


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quant=q8_0", "policy=recipe"], ["policy.file=RECIPE.txt"]),
        (["quant=q8_0", "policy=like"], ["policy.file=OTHER.gguf"]),
        (["quant=q8_0", "policy=like", "policy.file=no.gguf"], ["policy.file=no.gguf is no file"]),
        (["quant=reference", "--recipe"], ["one quantized file", "quant=reference"]),
        (["quant=q8_0", "policy.kind=recipes"], ["policy.kind=recipes", "Did you mean recipe"]),
        (["quant=q8_0", "--recipe", "--json"], ["--recipe, --json"]),
        (["quant=q8_0,q6_k", "--recipe"], ["one quant", "quant=q8_0,q6_k"]),
        (
            ["quant=q8_0", "mode=standard,dynamicgate", "policy=dynamicgate_attention", "--tensor-type-file"],
            ["one mode"],
        ),
    ],
)
def test_refused_in_one_line(cli: Cli, tiny_overrides: list[str], arguments: list[str], words: list[str]) -> None:
    code, out, err = cli("plan", *arguments, *tiny_overrides)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err.splitlines()[-1]
