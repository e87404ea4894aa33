"""The verb `card`: blocks and metadata from made-up records; every other byte stays; what is refused and how."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import card_blocks, model_card
from harness.card import read_tables
from harness.card_blocks import BLOCKS, Offer, file_name, md, tensor_types
from harness.errors import UserError
from harness.model_card import Settings, find_blocks, new_card, update_card
from harness.passes import SpeedPass, Timing, write_speed
from harness.record import SCHEMA_VERSION, read_record, record_path, write_record
from harness.results import Results, load_results
from harness.tables import TABLE_COLUMNS

Cli = Callable[..., tuple[int, str, str]]
MIB = 1 << 20
NLL = np.random.default_rng(0).exponential(2.0, (6, 300))
NOISE = np.random.default_rng(1).exponential(1.0, (6, 300))
TENSORS = ["token_embd.weight", "output.weight", "output_norm.weight"]
TENSORS += [f"blk.{i}.{role}.weight" for i in range(12) for role in ("attn_v", "attn_norm", "ffn_down")]
OPEN, CLOSE = "<!-- harness:files -->", "<!-- /harness:files -->"
CARD = f"# Mine\n\n{OPEN}\n{CLOSE}\n\nend\n"


def put(folder: Path, quant: str, mode: str, n_bytes: int, loss: float, **changes: Any) -> Path:
    """A record of a case that loses `loss` nats a token, beyond noise when it is not small."""
    reference = mode == "reference"
    types = dict.fromkeys(TENSORS, "f16" if reference else "q2_k")
    if mode == "dynamicgate":
        types["token_embd.weight"] = "q5_k"
        types |= {f"blk.{i}.ffn_down.weight": "iq4_xs" for i in range(3)}
    types |= {name: "f32" for name in TENSORS if "norm" in name}
    tensors = {n: {"type": t, "standard": "f32" if "norm" in n else "q2_k", "rule": "x"} for n, t in types.items()}
    variant = {"plan_id": "p", "file_bytes": n_bytes, "n_params": 10**8, "bpw": 8 * n_bytes / 10**8, "n_fallback": 0}
    variant |= {"fallback_share": 0.0, "n_quantizable": 26, "n_raised": 4 if mode == "dynamicgate" else 0}
    variant |= {"n_lowered": 0, "embedding_type": types["token_embd.weight"], "output_type": types["output.weight"]}
    key = (quant + mode + (changes.get("policy") or "")).encode().hex().ljust(64, "0")[-64:]
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "quant": quant,
        "mode": mode,
        "policy": None if mode in ("standard", "reference") else "dynamicgate",
        "file_type": None if reference else quant,
        "created_utc": "2026-01-02T03:04:05.678901+00:00",
        "status": "ok",
        "reference": {"id": "r", "name": "tiny", "architecture": "llama", "file_type": "f16", "file_bytes": 200 * MIB},
        "prompt_set": {"id": "9a" * 32, "name": "wiki_sample", "n_windows": 6, "window_tokens": 602},
        "calibration": None if reference else {"id": "c", "name": "my text", "n_windows": 20, "window_tokens": 512},
        "variant": {**variant, "tensors": tensors},
        "settings": {"first_scored": 302, "ubatch_tokens": 128, "flash_attention": True, "threads": 2},
        "versions": {"metrics": 2, "llama_cpp_python": "0.3.36"},
        "environment": {"harness": "0.1.0", "commit": "c0ffee", "cpu": "A CPU", "cores_physical": 2, "dirty": False},
        "timings": {"pass_s": 10.0, "load_s": 1.0, "quantize_s": 1.0, "window_pass_s": [5.0, 5.0]},
        "findings": [],
        **changes,
    }
    data["reference"] |= {"source_sha256": "5a" * 32, "derived_from": None, "n_params": 10**8}
    data["prompt_set"] |= {"text_sha256": "7e" * 32, "bos": None}
    data["environment"] |= {"machine": "secret-host", "memory_bytes": 8 << 30, "platform": "Linux"}
    data["environment"] |= {"system_info": "CPU : AVX = 1 | AVX2 = 1 | FMA = 1 | ", "cpu_features": ["AVX2"]}
    path = record_path(folder, quant, mode, key)
    side = {"nll": NLL + loss * NOISE, "top": np.zeros(NLL.shape, np.int32)}
    write_record(path, data, side if reference else {**side, "kld": loss * NOISE})
    return path


def sweep(folder: Path) -> Path:
    """A reference, Q2_K in both modes and a placebo, and Q4_K_M."""
    put(folder, "reference", "reference", 200 * MIB, 0.0)
    put(folder, "q2_k", "standard", 40 * MIB, 0.5)
    put(folder, "q2_k", "dynamicgate", 50 * MIB, 0.3)
    put(folder, "q2_k", "placebo", 50 * MIB, 0.1)
    put(folder, "q4_k_m", "standard", 70 * MIB, 0.05)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sweep(tmp_path / "sweep")


@cache
def results() -> Results:
    """Of the made-up sweep, for tests that write nothing."""
    return load_results([sweep(Path(mkdtemp()))])


def updated(text: str, **changes: str) -> str:
    return update_card(text, results(), Settings(**changes), {}).text


# --- the whole card


def test_a_new_card_is_current_and_reads_back_from_the_hub_library(cli: Cli, folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    given_settings = ("base_model=owner/model", "quantized_by=me: 'x'", "name=Tiny")
    code, out, err = cli("card", "--new", str(card), f"results={folder}", *given_settings)
    assert (code, err) == (0, "") and "written" in out
    before = card.read_bytes()
    for flags in ([], ["--check"]):
        code, out, _ = cli("card", str(card), f"results={folder}", *flags)
        assert (code, out.strip()) == (0, f"{card}: current")
    assert card.read_bytes() == before
    data = ModelCard.load(card).data
    assert (data.base_model, data.quantized_by, data.base_model_relation) == ("owner/model", "me: 'x'", "quantized")
    assert {"gguf", "quantized"} <= set(data.tags)
    assert data.model_name == "Tiny"
    files = [result.metric_args["file"] for result in data.eval_results]
    assert files == [f"Tiny-{n}.gguf" for n in ("q2_k-standard", "q2_k-dynamicgate", "q4_k_m-standard") for _ in "ab"]
    perplexity, divergence = data.eval_results[:2]
    assert perplexity.metric_type == "perplexity"
    assert perplexity.metric_value == round(float(np.exp((NLL + 0.5 * NOISE).mean())), 4)
    assert divergence.metric_value == round(float(0.5 * NOISE.mean()), 6)
    assert [block.name for block in find_blocks(before.decode())] == list(model_card._HEADINGS)
    assert set(model_card._HEADINGS) == set(BLOCKS)
    assert "secret-host" not in before.decode() and str(tmp_path) not in before.decode()
    assert "Machine: A CPU; llama.cpp uses AVX2 (2 more in use); 2 cores, 2 threads" in before.decode()


def test_new_overwrites_nothing(cli: Cli, folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    card.write_text("mine")
    code, _, err = cli("card", "--new", str(card), f"results={folder}")
    assert code == 2 and "overwrites nothing" in err and card.read_text() == "mine"


def test_check_tells_what_is_stale_and_writes_nothing(cli: Cli, folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    assert cli("card", "--new", str(card), f"results={folder}")[0] == 0
    card.write_text(card.read_text().replace("q5_k'", "q6_k'").replace("PPL:", "Perplexity:", 1))
    before = card.read_bytes()
    code, out, _ = cli("card", "--check", str(card), f"results={folder}")
    assert (code, out) == (1, f"{card}: stale: comparison, recipes\n")
    assert card.read_bytes() == before
    code, out, _ = cli("card", str(card), f"results={folder}")
    assert code == 0 and "recipes" in out and "q6_k'" not in card.read_text()
    put(folder, "q8_0", "standard", 110 * MIB, 0.01)
    code, out, _ = cli("card", "--check", str(card), f"results={folder}")
    assert code == 1 and out.startswith(f"{card}: stale: front matter, files, formats")


def test_several_sweeps_make_one_card(cli: Cli, folder: Path, tmp_path: Path) -> None:
    other, card = tmp_path / "other", tmp_path / "CARD.md"
    put(other, "q8_0", "standard", 110 * MIB, 0.01)
    assert cli("card", "--new", str(card), f"results={folder}", f"results={other}")[0] == 0
    assert "tiny-q8_0-standard.gguf" in card.read_text() and "tiny-q4_k_m-standard.gguf" in card.read_text()


# --- bytes that are not ours

BODY = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="`~"), max_size=60)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=20)
@given(BODY, BODY, BODY, st.sampled_from(["\n", "\r\n"]))
def test_bytes_outside_of_blocks_stay(one: str, two: str, three: str, line_break: str) -> None:
    start = f"---{line_break}tags: [a]{line_break}other: 1 # mine{line_break}---{line_break}"
    parts = [one + line_break, OPEN, CLOSE, line_break + two + line_break, "<!--harness:comparison-->"]
    parts += ["<!-- /harness:comparison -->", line_break + three]
    body = parts[0] + OPEN + line_break + "old" + line_break + CLOSE + parts[3] + parts[4] + line_break + parts[5]
    text = updated(start + body + parts[6])
    assert text.startswith(f"---{line_break}tags:{line_break}- a{line_break}- gguf")
    assert f"{line_break}other: 1 # mine{line_break}" in text
    body_of = text[text.index(f"{line_break}---{line_break}") + 3 + 2 * len(line_break) :]
    assert body_of.startswith(one + line_break + OPEN + line_break * 2)
    assert body_of.endswith(line_break + parts[5] + line_break + three)
    assert CLOSE + parts[3] + parts[4] + line_break in body_of
    assert updated(text) == text
    if line_break == "\r\n":
        generated = text[text.index(OPEN) : text.index(CLOSE)]
        assert "\n" not in generated.replace("\r\n", "")


def test_a_byte_order_mark_and_an_end_without_line_break_stay(cli: Cli, folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    card.write_bytes(f"\ufeff{CARD.rstrip()}".replace("\n", "\r\n").encode())
    assert cli("card", str(card), f"results={folder}")[0] == 0
    content = card.read_bytes()
    assert content.startswith("\ufeff---\r\ntags:".encode()) and content.endswith(b"\r\n\r\nend")
    assert b"\n" not in content.replace(b"\r\n", b"")
    assert cli("card", "--check", str(card), f"results={folder}")[0] == 0


def test_a_symbolic_link_stays_one(cli: Cli, folder: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real.md", tmp_path / "link.md"
    real.write_text(CARD)
    link.symlink_to(real)
    assert cli("card", str(link), f"results={folder}")[0] == 0
    assert link.is_symlink() and "tiny-q2_k-standard.gguf" in real.read_text()


def test_markers_in_fenced_code_and_beside_text_are_none() -> None:
    text = f"```md\n{OPEN}\n```\nsee {OPEN} here\n~~~~\n~~~\n{CLOSE}\n~~~~\n{CARD}"
    assert updated(text).endswith(f"\n{CLOSE}\n\nend\n")
    assert f"```md\n{OPEN}\n```\nsee {OPEN} here\n~~~~\n~~~\n{CLOSE}\n~~~~\n" in updated(text)
    broken = f"{OPEN}\n```\nold\n{CLOSE}\n"
    assert "old" not in updated(broken), "inside a block everything is ours, an open fence too"


# --- front matter

OTHERS = """\
license: apache-2.0   # theirs
date: 2024-01-02
language:
- en
- 'no'
model-index:
- name: Theirs
  results:
  - task: {type: text-generation}
    dataset: {type: mmlu, name: MMLU, odd: kept}
    metrics:
    - {type: acc, value: 0.5}
# about the thumbnail
thumbnail: "x: y"
base_model: a/b
"""


def test_keys_of_others_stay_as_they_are() -> None:
    text = updated(f"---\n{OTHERS}---\n{CARD}")
    before, after = OTHERS.split("model-index:")
    assert text.startswith(f"---\n{before}model-index:\n- name: Theirs\n")
    assert '\n# about the thumbnail\nthumbnail: "x: y"\nbase_model: a/b\nbase_model_relation: quantized\n' in text
    data = yaml.safe_load(text.split("---\n")[1])
    theirs, ours = data["model-index"][0]["results"]
    assert theirs == yaml.safe_load(OTHERS)["model-index"][0]["results"][0] and after
    assert len(ours["metrics"]) == 6
    assert "Theirs-q2_k-standard.gguf" in text
    assert updated(text) == text
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and len(card.data.eval_results) == 7


@pytest.mark.parametrize("start", ["", "---\n\n---\n", "---\n# only this\n---\n", "---\r\na: 1\r\n---\r\n"])
def test_front_matter_is_made_or_added_to(start: str) -> None:
    text = updated(start + CARD)
    assert "base_model" not in text and "quantized_by" not in text
    assert ModelCard(text).data.tags[:2] == ["gguf", "quantized"]
    assert "# only this" not in start or "# only this" in text
    assert updated(text) == text


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("a: [1", "no YAML"),
        ("a: 2024-13-45", "no YAML"),
        ("- a\n- b", "no mapping"),
        ("just words", "no mapping"),
        ("a: &x 1\nb: *x", "anchors or aliases"),
        ("a: &x [1]", "anchors or aliases"),
        ("a: 1\na: 2", "twice"),
        ("{a: 1}", "one `key: value` a line"),
        ("  a: 1", "not indented"),
        ("? [a, b]\n: 1", "no YAML"),
        ("1: a", "must be text"),
        pytest.param("a: " + "[" * 100_000, "64 deep", id="deep"),
        ("a: !!python/object:os.system x", "no YAML"),
        ("tags: {a: b}", "no list of words"),
        ("model-index: 5", "model-index"),
        ("model-index:\n- name: x\n  results:\n  - task: 5", "no valid metadata"),
        ("model-index:\n- name: x\n  results:\n  - {task: {type: t}, dataset: 5, metrics: []}", "no valid metadata"),
        ("a: 1\n...", "cannot be changed safely"),
        pytest.param("a: '" + "x" * (1 << 20) + "'", "larger than", id="large"),
    ],
)
def test_broken_front_matter_is_refused(cli: Cli, folder: Path, tmp_path: Path, front: str, said: str) -> None:
    refused(cli, folder, tmp_path, f"---\n{front}\n---\n{CARD}".encode(), said)


def refused(cli: Cli, folder: Path, tmp_path: Path, content: bytes, *said: str) -> None:
    card = tmp_path / "CARD.md"
    card.write_bytes(content)
    for flags in ([], ["--check"]):
        code, out, err = cli("card", str(card), f"results={folder}", *flags)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert all(one in err for one in said), err
        assert "Traceback" not in err
    assert card.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


# --- what is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# no markers\n", "no marked block"),
        (f"{OPEN}\n", "line 1: <!-- harness:files --> is never closed"),
        (OPEN, "never closed"),
        (f"x\n{CLOSE}\n", "line 2: <!-- /harness:files --> closes a block that is not open"),
        (f"{OPEN}\n<!-- harness:method -->\n{CLOSE}\n", "inside the block files of line 1"),
        (f"{OPEN}\n{OPEN}\n{CLOSE}\n", "inside the block files"),
        (f"{OPEN}\n<!-- /harness:method -->\n", "not open"),
        (f"{CARD}{OPEN}\n{CLOSE}\n", "twice"),
        ("<!-- harness:fils -->\n<!-- /harness:fils -->\n", "Did you mean files"),
        ("<!-- harness: -->\n", "names no block"),
        ("---\na: 1\n", "never closed"),
        (b"\xff\xfe" + CARD.encode(), "no UTF-8"),
        pytest.param(b"x" * ((16 << 20) + 1), "larger than 16 MiB", id="large"),
        (b"", "no marked block"),
    ],
)
def test_bad_cards_are_refused(cli: Cli, folder: Path, tmp_path: Path, content: str | bytes, said: str) -> None:
    refused(cli, folder, tmp_path, content if isinstance(content, bytes) else content.encode(), said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one file and one sweep"),
        (["CARD.md"], "one file and one sweep"),
        (["CARD.md", "B.md", "results={}"], "one file"),
        (["CARD.md", "results={}", "--check", "--new"], "one file"),
        (["CARD.md", "results={}", "nonsense=1"], "'nonsense=1'"),
        (["CARD.md", "results={}", "--force"], "'--force'"),
        (["CARD.md", "results={}", "base_model="], "'base_model='"),
        (["CARD.md", "results={}", "name=a", "name=b"], "twice"),
        (["CARD.md", "results={}", "allow_different=prompt_set.id"], "another thing"),
        (["CARD.md", "results=/nowhere/at/all"], "no folder of a sweep"),
        (["/nowhere/CARD.md", "results={}"], "no such file"),
        (["/", "results={}"], "no such file"),
        (["CARD.md", "results={}", "base_model=not a model"], "OWNER/NAME"),
    ],
)
def test_bad_arguments(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("CARD.md").write_text(CARD)
    code, out, err = cli("card", *(one.format(folder) for one in arguments))
    assert (code, out, len(err.splitlines())) == (2, "", 1) and said in err, err
    assert Path("CARD.md").read_text() == CARD


def test_results_that_make_no_card(cli: Cli, tmp_path: Path) -> None:
    card, empty, old, bare = (tmp_path / name for name in ("CARD.md", "empty", "old", "bare"))
    card.write_text(CARD)
    (empty / "records").mkdir(parents=True)
    put(old, "q2_k", "standard", MIB, 0.5, schema_version=99)
    put(bare, "reference", "reference", MIB, 0.0)
    for folder, said in ((empty, "no records"), (old, "record version 99"), (bare, "no measured file")):
        for arguments in ([str(card)], ["--new", str(tmp_path / "NEW.md")]):
            code, _, err = cli("card", *arguments, f"results={folder}")
            assert (code, len(err.splitlines())) == (2, 1) and said in err
    assert card.read_text() == CARD and not (tmp_path / "NEW.md").exists()


def test_a_failed_write_leaves_the_card(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "CARD.md"
    card.write_text(CARD)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("harness.store.os.fsync", full)
    code, _, err = cli("card", str(card), f"results={folder}")
    assert code == 2 and "cannot be written" in err and card.read_text() == CARD
    assert {path.name for path in tmp_path.iterdir()} == {"CARD.md", "sweep"}


# --- what the blocks say


def block(name: str, of: Results | None = None) -> str:
    return BLOCKS[name](Offer(of or results(), "tiny", {"prompts": ["wiki_sample"]}))


def cells(text: str) -> list[list[str]]:
    """Of all rows of tables but those under the headers."""
    rows = [[one.strip() for one in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


def test_the_comparison_has_the_columns_of_published_cards_and_only_what_was_measured() -> None:
    text = block("comparison")
    header, *rows = cells(text)
    assert header == list(TABLE_COLUMNS)
    assert {row[0]: row[-2:] for row in rows} == {"Q2_K": ["-", "-"], "Q4_K_M": ["-", "-"]}
    assert "placebo)" in text and "(placebo)" not in text.split("Key:")[0]
    improvements = text.split("Key Improvements:")[1].split("Tradeoffs:")[0]
    assert improvements.strip().startswith("- Q2_K: perplexity") and "Q4_K_M" not in improvements
    assert "Speed: not measured" in text
    published = read_tables(text)
    assert len(published) == 1 and published[0].rows[0].type == "Q2_K"


def test_within_noise_is_no_improvement(tmp_path: Path) -> None:
    put(tmp_path, "q2_k", "standard", 40 * MIB, 0.5)
    path = put(tmp_path, "q2_k", "dynamicgate", 50 * MIB, 0.5)
    record = read_record(path)
    shifted = NLL + 0.5 * NOISE + np.random.default_rng(5).normal(0.0, 1.0, NLL.shape)
    write_record(path, record.data, {"nll": shifted, "top": np.zeros(NLL.shape, np.int32), "kld": 0.5 * NOISE})
    text = block("comparison", load_results([tmp_path]))
    assert "- No perplexity is lower beyond noise" in text and "Within noise: Q2_K" in text


def test_speed_is_told_where_it_was_timed(tmp_path: Path) -> None:
    folder = sweep(tmp_path)
    cases = {}
    for path in (folder / "records").glob("q2_k-*.json"):
        cases[json.loads(path.read_text())["key"]] = Timing("p", 602, 64, (0.1,) * 3, (2.0, 2.1, 2.2), (8.0,) * 3)
    environment = json.loads(next((folder / "records").glob("*.json")).read_text())["environment"]
    timing = {"prompt_tokens": 602, "generate_tokens": 64, "rounds": 3, "threads": 2, "ubatch_tokens": 512}
    write_speed(
        folder,
        SpeedPass("p", "2026-01-02T03:04:05+00:00", {**timing, "flash_attention": True}, environment, 0.0, cases, {}),
    )
    timed = load_results([folder])
    assert {row[0]: row[-2:] for row in cells(block("comparison", timed))[1:]} == {
        "Q2_K": ["12.6s", "12.6s"],
        "Q4_K_M": ["-", "-"],
    }
    formats = block("formats", timed)
    assert "286.7 and 8.0 tokens/s" in formats
    row = next(line for line in formats.splitlines() if "Q4_K (Q4_K_M)" in line)
    assert "not measured" in row and "PPL" in row


def test_every_format_of_published_cards_has_a_row() -> None:
    text = block("formats")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for name in ("BF16", "Q6_K", "Q8_0", "IQ3_XS", "Q4_0"):
        assert rows[name].count("not measured") == 3, name
    assert "PPL" in rows["F16"] and "the reference" in rows["F16"]
    assert "70.0M" in rows["Q4_K (Q4_K_M)"] and "50.0M" in rows["Q2_K DynamicGate"] and "40.0M" in rows["Q2_K"]
    assert "placebo" not in text


def test_files_say_which_types_they_hold() -> None:
    text = block("files")
    line = next(line for line in text.splitlines() if line.startswith("- `tiny-q2_k-dynamicgate.gguf`"))
    assert "Embeddings Q5_K, output Q2_K." in line
    assert "attn_v 12 × Q2_K; ffn_down 9 × Q2_K and 3 × IQ4_XS." in line
    assert "4 tensors with more bits than in the standard file, 0 with fewer." in line
    assert "placebo" not in text, "nobody is told to take a file that is not offered"
    types = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|tiny-")]
    assert sorted(types) == ["Q2_K", "Q2_K + dynamicgate", "Q4_K_M"]


def test_recipes_match_exactly_their_tensor() -> None:
    text = block("recipes")
    assert text.count("<details>") == text.count("</details>") == 3
    part = text.split("<summary>tiny-q2_k-dynamicgate.gguf</summary>")[1].split("</details>")[0]
    found = re.findall(r"--tensor-type '(\^.*\$)=(\w+)' \\\n", part)
    quantized = [name for name in TENSORS if "norm" not in name]
    assert len(found) < len(quantized) / 4, "one pattern for many layers"
    near = [*TENSORS, *(name.replace(".", "_") for name in TENSORS), *(f"x{name}" for name in TENSORS)]
    near += [f"{name}_exps" for name in TENSORS]
    for name in near:
        kinds = [kind for pattern, kind in found if re.search(pattern, name)]
        assert len(kinds) == (name in quantized)
        if not kinds:
            continue
        (kind,) = kinds
        expected = "iq4_xs" if re.fullmatch(r"blk\.[012]\.ffn_down\.weight", name) else "q2_k"
        assert kind == ("q5_k" if name == "token_embd.weight" else expected)
    assert part.rstrip().endswith("tiny-f16.gguf tiny-q2_k-dynamicgate.gguf Q2_K\n```") and "--imatrix" in part


@pytest.mark.parametrize("name", ["a b", "a'b", "a\nb", "```", "<b>", ""])
def test_tensor_names_that_a_shell_would_read_are_refused(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, "q2_k", "standard", MIB, 0.5)
    record = read_record(path)
    record.data["variant"]["tensors"] = {name: {"type": "q2_k", "standard": "q2_k", "rule": "x"}}
    with pytest.raises(UserError, match="none that a recipe can hold"):
        tensor_types(record)


def test_the_method_can_be_repeated() -> None:
    text = block("method")
    assert "9a" * 32 in text and "7e" * 32 in text and "5a" * 32 in text and "c0ffee" in text
    head = "python -m harness sweep quant=q2_k mode=dynamicgate,placebo"
    assert f"{head} \\\n  model.path=tiny.gguf \\\n  prompts=wiki_sample" in text
    assert "quant=q2_k,q4_k_m mode=standard" in text and "calibration.path=my_text.txt" in text
    assert "llama-perplexity" in text and "last 300 tokens" in text
    assert "Speed: not measured" in text


def test_placebos_are_repeated_too() -> None:
    """As controls of the quants that have one."""
    commands = [one.split(" \\\n")[0] for one in block("method").split("python -m harness sweep ")[1:]]
    assert sorted(commands) == ["quant=q2_k mode=dynamicgate,placebo", "quant=q2_k,q4_k_m mode=standard"]


def test_what_text_and_imatrix_are_made_of_is_named(tmp_path: Path) -> None:
    """Where conf/ says it, and only if the bytes are those."""
    wiki = yaml.safe_load((Path(__file__).parents[1] / "conf" / "prompts" / "wiki_sample.yaml").read_text())["wheel"]
    c4 = {"id": "c", "name": "c4_sample", "n_windows": 20, "window_tokens": 512}
    prompts = {"id": "9a" * 32, "name": "wiki_sample", "n_windows": 6, "window_tokens": 602}
    put(tmp_path, "reference", "reference", 200 * MIB, 0.0, prompt_set=dict(prompts))
    put(tmp_path, "q2_k", "standard", 40 * MIB, 0.5, calibration=c4, prompt_set=dict(prompts))
    shipped = {"prompts": ["wiki_sample"], "calibration": ["c4_sample"], "model": []}
    text = new_card(load_results([tmp_path]), Settings(), shipped)
    assert "; from exllamav2/conversion/standard_cal_data/c4.utf8 of the Python package exllamav2==0.3.2" in text
    assert "calibration=c4_sample" in text
    assert "wiki.utf8" not in text, "the records have another sha256"
    for one in tmp_path.glob("records/*.json"):
        one.write_text(one.read_text().replace("7e" * 32, wiki["sha256"]))
    assert f"; from {wiki['member']} of the Python package" in new_card(load_results([tmp_path]), Settings(), shipped)


def test_a_ready_imatrix_is_named_with_its_checksum(tmp_path: Path) -> None:
    ready = {"id": "ab" * 32, "name": "mine.gguf", "windows_id": None, "n_windows": None, "window_tokens": None}
    put(tmp_path, "reference", "reference", 200 * MIB, 0.0)
    put(tmp_path, "q2_k", "standard", 40 * MIB, 0.5, calibration=ready)
    text = block("method", load_results([tmp_path]))
    assert f"imatrix: the ready file mine.gguf, sha256 {'ab' * 32}" in text and "None" not in text
    assert "calibration.imatrix=mine.gguf" in text and "calibration.path" not in text


def test_another_form_of_the_reference_is_part_of_the_command(tmp_path: Path) -> None:
    settings = {"first_scored": 302, "ubatch_tokens": 128, "flash_attention": True, "threads": 2}
    for quant, mode in (("reference", "reference"), ("q2_k", "standard")):
        put(tmp_path, quant, mode, 40 * MIB, 0.0, settings={**settings, "kld_reference": "hidden"})
    assert "measure.kld_reference=hidden" in block("method", load_results([tmp_path]))
    assert "kld_reference" not in block("method")


@pytest.mark.parametrize(
    ("policy", "setting"),
    [
        ("recipe_mine", "policy=recipe policy.file=mine.txt"),
        ("like_tiny-Q4_K_M", "policy=like policy.file=tiny-Q4_K_M.gguf"),
        ("likely", "policy.file=likely.yaml"),
    ],
)
def test_the_command_names_the_kind_of_policy(tmp_path: Path, policy: str, setting: str) -> None:
    put(tmp_path, "reference", "reference", 200 * MIB, 0.0)
    put(tmp_path, "q2_k", "dynamicgate", 50 * MIB, 0.3, policy=policy)
    assert f"sweep quant=q2_k mode=dynamicgate {setting} " in block("method", load_results([tmp_path]))


EVIL = "<script>x</script> [a](http://b) `c` *d* _e_ | <!-- /harness:files -->"


def test_names_cannot_break_out(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    evil = {"id": "9a" * 32, "name": EVIL, "n_windows": 6, "window_tokens": 602}
    reference = {"id": "r", "name": EVIL, "architecture": EVIL, "file_type": "f16", "file_bytes": MIB}
    finding = {"kind": "derived_reference", "what": EVIL, "why": EVIL, "todo": EVIL}
    for quant, mode, n_bytes, loss in (("reference", "reference", 9, 0.0), ("q2_k", "standard", 4, 0.5)):
        changes = {"reference": dict(reference), "prompt_set": dict(evil), "findings": [finding]}
        put(folder, quant, mode, n_bytes * MIB, loss, **changes)
    put(folder, "q2_k", "dynamicgate", 5 * MIB, 0.6, policy=EVIL, reference=dict(reference), prompt_set=dict(evil))
    text = new_card(load_results([folder]), Settings(), {})
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body and "](http" not in body and "`c`" not in body and "*d*" not in body.replace("\\*", "")
    assert [one.name for one in find_blocks(text)] == list(model_card._HEADINGS)
    assert update_card(text, load_results([folder]), Settings(), {}).changed == ()
    assert ModelCard(text).data.model_name == EVIL


@given(st.text(max_size=40))
def test_escapes(text: str) -> None:
    assert not set("<>\n\r") & set(md(text))
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", file_name(text))
    assert md("iq1_m-dynamicgate 1.5 ±0.1 [-3.0, +4.0]") == "iq1_m-dynamicgate 1.5 ±0.1 [-3.0, +4.0]"


def test_a_real_sweep_makes_a_card(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    assert cli("sweep", "quant=iq2_s", *tiny_overrides)[0] == 0
    card = tmp_path / "CARD.md"
    code, _, err = cli("card", "--new", str(card), f"results={tmp_path / 'results' / 'tiny'}")
    assert code == 0, err
    assert cli("card", "--check", str(card), f"results={tmp_path / 'results' / 'tiny'}")[0] == 0
    assert len(ModelCard.load(card).data.eval_results) == 4
    assert 2 * 8 <= card.read_text().count("--tensor-type") <= 2 * 12
    assert card_blocks.BLOCKS.keys() == {"comparison", "files", "formats", "method", "recipes"}


def test_help_of_card(cli: Cli) -> None:
    code, out, _ = cli("card", "--help")
    assert code == 0 and all(one in out for one in ("--check", "--new", "base_model=", *BLOCKS))
