"""Presets: the published table, llama-quantize's own options through the C API, a sweep of some on the tiny model."""

import ctypes
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pandas as pd
import pytest
import yaml
from tiny_model import write_tiny_llama

from harness.card_blocks import BLOCKS, Offer
from harness.compose import compose
from harness.config import Config, QuantConfig, check
from harness.engine.gguf_file import read_header
from harness.engine.native import ggml
from harness.engine.quantize import _attach_imatrix, _run, standard_types
from harness.errors import UserError
from harness.ggml_types import ABORTS_WITHOUT_IMATRIX, FILE_TYPES, GGML_TYPES
from harness.header import TensorInfo
from harness.mixture import Mixture, plain_file_type, plain_overrides, standard_mixture, type_changes
from harness.record import Record, read_records
from harness.results import load_results

Cli = Callable[..., tuple[int, str, str]]
CONF = Path(__file__).parent.parent / "conf"
COMMITTED = Path(__file__).parent.parent / "results" / "qwen2_5_coder_1_5b-wiki_sample-8x2048"

LOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
IQ3 = ("iq3_xxs", "iq3_xs", "iq3_s", "iq3_m")
MEDIUM = ("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m")
OTHERS = ("q2_k_s", "q3_k_s", "iq4_xs", "iq4_nl", "tq1_0", "tq2_0", "mxfp4_moe", "q1_0")
# As published: file type (llama-quantize takes Q3_K, Q4_K and Q5_K for their _M), embedding type, output type, pure.
PUBLISHED: dict[str, tuple[str, str | None, str | None, bool]] = {
    "bf16": ("bf16", None, None, False),
    "f16": ("f16", None, None, False),
    "bf16-q8_0": ("q8_0", "bf16", "bf16", False),
    "f16-q8_0": ("q8_0", "f16", "f16", False),
    "bf16-q6_k": ("q6_k", "bf16", "bf16", False),
    "f16-q6_k": ("q6_k", "f16", "f16", False),
    "bf16-q4_k": ("q4_k_m", "bf16", "bf16", False),
    "f16-q4_k": ("q4_k_m", "f16", "f16", False),
    "q8_0": ("q8_0", None, None, False),
    "q6_k": ("q6_k", "q8_0", "q8_0", False),
    "q6_k_m": ("q6_k", None, None, False),
    "q4_k": ("q4_k_m", "q8_0", "q8_0", False),
    "q2_k_m": ("q2_k", "q6_k", "q6_k", False),
    "q2_k_l": ("q2_k", "q8_0", "q8_0", False),
    "q3_k_l": ("q3_k_m", "q8_0", "q8_0", False),
    "q4_k_l": ("q4_k_m", "q8_0", "q8_0", False),
    "q5_k_l": ("q5_k_m", "q8_0", "q8_0", False),
    "q6_k_l": ("q6_k", "q8_0", "q8_0", False),
    **{name: (name, None, None, True) for name in ("q4_0", "q4_1", "q5_0", "q5_1")},
    **{f"{name}_l": (name, "q8_0", "q8_0", True) for name in ("q4_0", "q4_1", "q5_0", "q5_1")},
    **{f"q5_k-{name}": (name, "q5_k", "q5_k", False) for name in (*LOW, *IQ3, "q2_k_s", "q3_k_s")},
    **{f"q6_k-{name}": (name, "q6_k", "q6_k", False) for name in MEDIUM},
    **{name: (name, None, None, False) for name in (*LOW, *IQ3, *MEDIUM, *OTHERS)},
}


# --- the names


def presets() -> dict[str, QuantConfig]:
    """Of the files in conf/quant; tests/test_cli.py composes each of them."""
    paths = [path for path in (CONF / "quant").glob("*.yaml") if path.stem != "reference"]
    return {path.stem: QuantConfig(**yaml.safe_load(path.read_text())) for path in paths}


def test_every_published_name_is_a_quant() -> None:
    quants = {**{name: QuantConfig(name, name) for name in FILE_TYPES}, **presets()}
    for name, asked in PUBLISHED.items():
        quant = quants[name]
        check(Config(quant=quant))
        assert (quant.name, quant.file_type, quant.embedding_type, quant.output_type, quant.pure) == (name, *asked)
    plain = {name for name, asked in PUBLISHED.items() if asked == (name, None, None, False)}
    assert set(presets()) == set(PUBLISHED) - plain, "a file for each that llama.cpp does not have, and for no other"


def test_card_files_are_those_of_the_card_in_the_modes_it_has() -> None:
    lines = yaml.safe_load((CONF / "experiment" / "card_files.yaml").read_text())["sweep"]
    assert all(line.count("mode=") == 1 for line in lines)
    modes: dict[str, set[str]] = {}
    for quants, of_line in (line.removeprefix("quant=").split(" mode=") for line in lines):
        for name in quants.split(","):
            assert name not in modes
            modes[name] = set(of_line.split(","))
    assert {name for name, found in modes.items() if found == {"standard", "dynamicgate"}} == set(LOW)
    assert all(found == {"standard"} for name, found in modes.items() if name not in LOW)
    included = "bf16 f16 bf16-q8_0 f16-q8_0 q4_k q4_k_s q6_k q8_0 iq3_xs iq3_m q4_0"  # the section of the card itself
    assert set(included.split()) <= set(modes) <= set(PUBLISHED)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["quant=q8_0", "quant.embedding_type=q8"], "quant.embedding_type=q8 is no tensor type. Did you mean q8_"),
        (["quant=q8_0", "quant.output_type=q4_k_m"], "quant.output_type=q4_k_m is no tensor type"),
        (["quant=q8_0", "quant.output_type=i32"], "quant.output_type=i32"),
        (["quant=q8_0", "quant.embedding_type=iq2_xxs"], "needs imatrix data"),
        (["quant=f16", "quant.embedding_type=q8_0"], "quant.file_type=f16 keep one type"),
        (["quant=reference", "quant.output_type=q8_0"], "quant.file_type=reference keep one type"),
    ],
)
def test_types_that_cannot_be_had_are_refused(settings: list[str], said: str) -> None:
    (config,) = compose(settings)
    with pytest.raises(UserError) as caught:
        check(config)
    assert said in str(caught.value)


def test_types_that_ggml_cannot_make_without_imatrix() -> None:
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    found = {name for name, kind in GGML_TYPES.items() if ggml.ggml_quantize_requires_imatrix(ctypes.c_int(kind.id))}
    assert found == ABORTS_WITHOUT_IMATRIX


# --- types, by hand


def mixture(
    quant: QuantConfig, final: dict[str, str], asked: dict[str, str] | None = None, width: int = 256
) -> tuple[Mixture, dict[str, str], dict[str, str]]:
    run = {"final": final, "asked": asked or {}}
    return standard_mixture(quant, run, run, [TensorInfo(name, (width, 4), "f16", 8 * width) for name in final])


Q6_K = {"token_embd.weight": "q6_k", "output.weight": "q6_k", "blk.0.attn_v.weight": "q6_k"}


def test_embeddings_and_output_take_the_asked_type_and_fall_back_as_other_tensors() -> None:
    quant = QuantConfig("mine", "q6_k", embedding_type="q5_k", output_type="q4_k")
    found, final, asked = mixture(quant, Q6_K)
    assert final == {"token_embd.weight": "q5_k", "output.weight": "q4_k", "blk.0.attn_v.weight": "q6_k"}
    assert found.words == "Q6_K, embeddings Q5_K, output Q4_K" and found.plain_file_type == "q6_k"
    assert found.plain == (("token_embd.weight", "q6_k"), ("output.weight", "q6_k"))
    q8_0 = dict.fromkeys(Q6_K, "q8_0")
    _, final, asked = mixture(quant, q8_0, dict.fromkeys(Q6_K, "q6_k"), width=576)
    assert final == {"token_embd.weight": "q5_1", "output.weight": "q5_0", "blk.0.attn_v.weight": "q8_0"}
    assert asked == {"token_embd.weight": "q5_k", "output.weight": "q4_k", "blk.0.attn_v.weight": "q6_k"}
    with pytest.raises(UserError, match=r"quant=mine: output\.weight: rows of 576 weights do not fit q1_0"):
        mixture(QuantConfig("mine", "q6_k", output_type="q1_0"), q8_0, width=576)


def test_one_tensor_for_embeddings_and_output() -> None:
    tied = {name: kind for name, kind in Q6_K.items() if name != "output.weight"}
    for quant, kind in [
        (QuantConfig("a", "q6_k", embedding_type="q5_k", output_type="q8_0"), "q5_k"),
        (QuantConfig("a", "q6_k", output_type="q8_0"), "q8_0"),
        (QuantConfig("a", "q6_k", output_type="q8_0", pure=True), "q6_k"),
        (QuantConfig("a", "q6_k"), "q6_k"),
    ]:
        assert mixture(quant, tied)[1] == {**tied, "token_embd.weight": kind}


def test_words_and_changes() -> None:
    assert Mixture("q4_0", pure=True, plain_file_type="q4_0").words == "Q4_0, pure"
    q8 = Mixture("q3_k_m", "q8_0", "q8_0", plain_file_type="q3_k_l")
    assert q8.words == "Q3_K_M, embeddings and output Q8_0" and q8.is_preset
    assert not Mixture("q6_k", plain_file_type="q6_k").is_preset
    assert plain_overrides(q8) == (
        "quant=q3_k_l quant.name=q3_k_l_plain quant.file_type=q3_k_l quant.embedding_type=null quant.output_type=null"
    )
    changes = [("attn_v", "q4_k", "q5_k"), ("token_embd", "q6_k", "q4_0"), ("attn_v", "q4_k", "q5_k")]
    assert type_changes(changes) == "token_embd Q6_K -> Q4_0; attn_v (2) Q4_K -> Q5_K"
    with_plain = Mixture("q4_0", None, "q8_0", True, "words", "q4_0", (("output.weight", "q6_k"),))
    assert Mixture.from_json(json.loads(json.dumps(with_plain.to_json()))).to_json() == with_plain.to_json()


# --- types, against llama-quantize's own options


def llama_quantize_types(source: Path, quant: QuantConfig) -> dict[str, str]:
    """What llama_model_quantize itself makes of --token-embedding-type, --output-tensor-type and --pure (a dry run)."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.pure = FILE_TYPES[quant.file_type or ""], True, quant.pure
    if quant.embedding_type:
        params.token_embedding_type = GGML_TYPES[quant.embedding_type].id
    if quant.output_type:
        params.output_tensor_type = GGML_TYPES[quant.output_type].id
    keep_alive = _attach_imatrix(params, {"present": np.ones(1, np.float32)})
    types = {}

    def on_line(line: str) -> None:  # "[ 1/ 75] output.weight - [...], type = f16, size = 0.16 MiB -> 0.08 MiB (q8_0)"
        found = re.search(r"\] +(\S+) +- \[.*type = +(\w+),(?:.*-> +[\d.]+ MiB \((\w+)\))?", line)
        if found:
            types[found[1]] = (found[3] or found[2]).lower()

    _run(source, source.with_suffix(".none"), params, on_line)
    del keep_alive
    return types


@pytest.mark.parametrize("tied", [False, True])
def test_the_types_are_those_that_llama_quantize_gives(tmp_path: Path, tied: bool) -> None:
    """Every preset, on a model whose widths fit all types; and what differs from the plain type of the name."""
    model = write_tiny_llama(tmp_path / "m.gguf", n_layers=8, tied=tied)
    tensors = read_header(model).tensors
    file_types = sorted({quant.file_type or "" for quant in presets().values()} | {"q3_k_l"})
    plain, pure = (standard_types(model, file_types, has_imatrix=True, pure=pure) for pure in (False, True))
    for name, quant in presets().items():
        run = (pure if quant.pure else plain)[quant.file_type or ""]
        plain_run = plain[plain_file_type(quant)]
        found, final, _ = standard_mixture(quant, asdict(run), asdict(plain_run), tensors)
        wanted = llama_quantize_types(model, quant)
        assert len(wanted) == len(tensors)
        assert {**{t.name: t.type for t in tensors}, **final} == wanted, name
        own = llama_quantize_types(model, QuantConfig(name, plain_file_type(quant)))
        assert dict(found.plain) == {t: kind for t, kind in own.items() if wanted[t] != kind}
        assert bool(found.plain) == (name not in ("q6_k_m", *_SAME[tied])), name


# Presets that are llama.cpp's own types on that model: what they ask for is what it has chosen.
_SAME: dict[bool, tuple[str, ...]] = {False: (), True: tuple(f"q5_k-{one}" for one in (*LOW, "iq3_xxs"))}
_SAME[True] += ("q2_k_m", *(f"q6_k-{name}" for name in MEDIUM))


def test_the_plan_tells_what_a_preset_is_and_how_to_have_the_plain_type(cli: Cli, tiny_overrides: list[str]) -> None:
    code, out, err = cli("plan", "quant=q6_k,q6_k_m,bf16-q8_0,q5_k_m", "mode=standard", *tiny_overrides)
    assert code == 0, err
    q6_k, same, bf16, plain = (f"{part}\n" for part in out.split("\n\n  tensor ")[:4])
    q6_k_table = same.split("q6_k_m standard")[0]
    assert "\n  preset: Q6_K, embeddings and output Q8_0 (as on Mungert's cards of 2025-03)\n" in q6_k
    overrides = "quant=q6_k quant.name=q6_k_plain quant.embedding_type=null quant.output_type=null"
    assert f"  unlike llama.cpp's Q6_K: token_embd Q6_K -> Q8_0; output Q6_K -> Q8_0; for that one: {overrides}" in q6_k
    assert "same types as llama.cpp's Q6_K" in same
    assert "  unlike llama.cpp's Q8_0: token_embd Q8_0 -> BF16; output Q8_0 -> BF16\n" in bf16
    assert "for that one" not in bf16 and "preset:" not in plain.split("q5_k_m standard")[1]
    rows = {
        line.split()[0]: line.split()[4] for line in out.split("bf16-q8_0 standard")[0].splitlines() if " 256x" in line
    }
    assert rows["token_embd"] in ("preset", "llama.cpp")
    shown = [line.split() for line in q6_k_table.splitlines() if "256x" in line]
    assert {row[0] for row in shown if "preset" in row} == {"token_embd", "output"} and len(shown) == 8
    code, out, err = cli("plan", *overrides.split(), "mode=standard", *tiny_overrides)
    assert code == 0 and "q6_k_plain standard" in out and "same types as llama.cpp's Q6_K" in out
    assert "unlike" not in out and "Mungert" not in out


def test_an_experiment_can_be_planned(cli: Cli, tiny_overrides: list[str]) -> None:
    code, out, err = cli("plan", "+experiment=attribution", "quant=iq1_m", "--json", *tiny_overrides)
    assert code == 0, err
    policies = [(plan["mode"], plan["policy"]) for plan in json.loads(out)]
    assert policies[:2] == [("standard", None), ("dynamicgate", "dynamicgate")] and len(policies) == 7


# --- a sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path, texts: tuple[Path, Path]) -> Path:
    """Folder of a sweep of some presets on the tiny model."""
    from harness.cli import main

    folder = tmp_path_factory.mktemp("presets")
    overrides = [f"model.path={tiny_gguf}", f"prompts.path={texts[0]}", f"calibration.path={texts[1]}"]
    overrides += ["prompts.n_windows=2", "prompts.window_tokens=128", "calibration.n_windows=2"]
    overrides += ["calibration.window_tokens=128", "runtime.threads=2", "measure.speed=false"]
    overrides += [f"runtime.cache_dir={folder / 'cache'}", f"results.dir={folder / 'results'}", "results.name=tiny"]
    assert main(["sweep", "quant=f16,bf16-q8_0,q4_k,q4_k_l,q4_0", "mode=standard", *overrides]) == 0
    plain = ["quant=q4_0", "quant.name=q4_0_plain", "quant.pure=false", "mode=standard"]
    assert main(["sweep", *plain, *overrides]) == 0
    return folder / "results" / "tiny"


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {record.data["quant"]: record.data for record in read_records(folder)}


def test_records_hold_file_type_embedding_type_output_type_and_pure(swept: Path) -> None:
    found = {
        name: (
            *(data["mixture"][key] for key in ("file_type", "embedding_type", "output_type", "pure")),
            *(data["variant"][key] for key in ("embedding_type", "output_type")),
        )
        for name, data in records(swept).items()
        if name != "reference"
    }
    assert found == {
        "f16": ("f16", None, None, False, "f16", "f16"),
        "bf16-q8_0": ("q8_0", "bf16", "bf16", False, "bf16", "bf16"),
        "q4_k": ("q4_k_m", "q8_0", "q8_0", False, "q8_0", "q8_0"),
        "q4_k_l": ("q4_k_m", "q8_0", "q8_0", False, "q8_0", "q8_0"),
        "q4_0": ("q4_0", None, None, True, "q4_0", "q4_0"),
        "q4_0_plain": ("q4_0", None, None, False, "q4_0", "q6_k"),
    }
    assert records(swept)["reference"]["mixture"] is None
    assert records(swept)["q4_0"]["mixture"]["plain"] == {"output.weight": "q6_k"}
    kinds = {name: [one["kind"] for one in data["findings"]] for name, data in records(swept).items()}
    assert [name for name, found in kinds.items() if "preset" in found] == ["q4_0"]


def test_two_names_of_one_content_are_measured_once(swept: Path) -> None:
    one, other = (records(swept)[name] for name in ("q4_k", "q4_k_l"))
    assert one["key"] == other["key"] and (one.get("same_as"), other.get("same_as")) == (None, "q4_k standard")
    runs = pd.read_csv(swept / "runs.csv").set_index("quant")
    assert len(runs) == 7 and runs.ppl["q4_k"] == runs.ppl["q4_k_l"]
    assert runs.ppl["f16"] == runs.ppl["reference"] and runs.kld_mean["f16"] == pytest.approx(0, abs=1e-6)
    assert runs.mixture["q4_k"] == "Q4_K_M, embeddings and output Q8_0" and runs.mixture["q4_0"] == "Q4_0, pure"
    assert runs.pure.map(str).to_dict() | {"reference": ""} == {
        name: "" if name == "reference" else str(name == "q4_0") for name in runs.index
    }
    findings = json.loads((swept / "findings.json").read_text())
    assert not any(one["kind"] == "nothing_quantized" for of_case in findings.values() for one in of_case)


def test_a_card_of_presets(cli: Cli, swept: Path, tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    assert cli("card", "--new", str(card), f"results={swept}", "name=Tiny")[0] == 0
    text = card.read_text()
    files = text.split("## Included Files")[1].split("## ")[0]
    lines = {line.split("`")[1]: line for line in files.splitlines() if line.startswith("- `")}
    assert set(lines) == {f"Tiny-{name}-standard.gguf" for name in records(swept) if name != "reference"}
    q4_k = lines["Tiny-q4_k-standard.gguf"]
    assert ": Q4_K_M, embeddings and output Q8_0; unlike llama.cpp's Q4_K_M: " in q4_k
    assert "output Q6_K -&gt; Q8_0" in q4_k and "token\\_embd" not in q4_k
    assert "token_embd Q4_K -&gt; Q8_0" in q4_k and ". Embeddings Q8_0, output Q8_0." in q4_k
    pure = lines["Tiny-q4_0-standard.gguf"]
    unlike = "unlike llama.cpp's Q4_0: output Q6_K -&gt; Q4_0."
    assert f": Q4_0, pure; {unlike} Embeddings Q4_0, output Q4_0." in pure
    assert ": Embeddings Q4_0, output Q6_K." in lines["Tiny-q4_0_plain-standard.gguf"]
    rows = [line.split("|") for line in text.split("## Which Format")[1].split("## ")[0].splitlines() if "|" in line]
    hardware = {row[1].strip(): row[-3].strip() for row in rows[2:]}
    labels = ["Q4_K (Q4_K_M, embeddings and output Q8_0)", "Q4_K_L (Q4_K_M, embeddings and output Q8_0)"]
    labels += ["Q4_0 (pure)", "Q4_0_PLAIN (Q4_0)", "BF16-Q8_0 (Q8_0, embeddings and output BF16)", "F16"]
    assert set(labels) <= set(hardware)
    assert "for the output: Processors that compute in BF16" in hardware[labels[4]]
    commands = text.split("To repeat it:")[1].split("```")[1]
    assert "quant=q4_0,q4_k,q4_k_l,bf16-q8_0,f16 mode=standard" in commands
    plain = [line for line in commands.splitlines() if "quant.name=" in line]
    assert len(plain) == 1 and "quant=q4_0 quant.name=q4_0_plain quant.file_type=q4_0" in plain[0]
    for line in (line for line in commands.splitlines() if line.startswith("python -m harness sweep ")):
        for config in compose([one for one in line.split()[4:] if one != "\\"]):
            check(config)
            recorded = records(swept)[config.quant.name]["mixture"]
            asked = (config.quant.file_type, config.quant.embedding_type, config.quant.output_type, config.quant.pure)
            assert asked == tuple(recorded[key] for key in ("file_type", "embedding_type", "output_type", "pure"))


# --- records of before, and of others


def test_records_without_a_mixture_are_plain_types() -> None:
    results = load_results([COMMITTED])
    runs = results.runs.set_index("name")
    assert runs.mixture["iq1_m-standard"] == "IQ1_M" and runs.pure["iq1_m-standard"] is None
    offer = Offer(results, "Qwen", {"quant": ["iq1_s"]})
    assert "IQ1_M DynamicGate" in BLOCKS["formats"](offer)
    assert "Unlike" not in BLOCKS["files"](offer)
    # a preset that has taken a name since then is not what these were
    assert "quant=iq1_s quant.name=iq1_s quant.file_type=iq1_s quant.embedding_type=null" in BLOCKS["method"](offer)


@pytest.mark.parametrize(
    "mixture",
    [
        5,
        {},
        {"file_type": "q4_0", "embedding_type": None, "output_type": None, "pure": 1, "plain_file_type": "q4_0"},
        {"file_type": "<b>", "embedding_type": None, "output_type": None, "pure": True, "plain": {}},
        {"file_type": "q4_0", "embedding_type": [], "pure": True, "plain": {}, "plain_file_type": "q4_0"},
        {"file_type": "q4_0", "embedding_type": None, "output_type": None, "pure": True, "plain": {"a": {}}},
        {**Mixture("q4_0", plain_file_type="q4_0").to_json(), "plain": {"output.weight": "q4_k_m"}},
        {**Mixture("q4_0", plain_file_type="q4_0").to_json(), "output_type": "q4_k_m"},
        {**Mixture("q4_0", plain_file_type="q4_0").to_json(), "pure": None},
    ],
)
def test_a_strange_mixture_is_a_flaw(mixture: object) -> None:
    good = read_records(COMMITTED)[-1]
    sound = Mixture("q4_0", "q8_0", pure=True, plain=(("output.weight", "q6_k"),), plain_file_type="q4_0").to_json()
    assert good.flaw is None and Record({**good.data, "mixture": sound}, good.path).flaw is None
    assert Record({**good.data, "mixture": mixture}, good.path).flaw == "mixture is none that a quant can have"
