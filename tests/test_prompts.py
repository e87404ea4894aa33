"""Texts become windows: formats, cutting, identity, caching, what is refused, and the calibration beside them."""

import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import random_text, write_tiny_llama

import harness.prompts
from harness.config import TextConfig
from harness.engine.model import tokenize
from harness.errors import EngineError, UserError
from harness.prompts import Windows, cut_windows, load_windows, read_text
from harness.record import read_records
from harness.store import Cache

Cli = Callable[..., tuple[int, str, str]]
Cut = Callable[..., Windows]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache of the test's own."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def cut(tiny_gguf: Path, cache: Cache) -> Cut:
    """Windows of a file with the tiny model: 2 of 64 tokens unless told otherwise."""

    def run(file: Path, **settings: object) -> Windows:
        text = TextConfig(**{"path": str(file), "n_windows": 2, "window_tokens": 64, **settings})  # type: ignore[arg-type]
        return load_windows(text, "prompts", file, tiny_gguf, "model-id", "0.3.36", cache)

    return run


def refused_in(results: Path, result: tuple[int, str, str]) -> str:
    """The one error line of a command that wrote no results."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2, err
    assert len(lines) == 1 and "Traceback" not in err, err
    assert not list(results.rglob("*.json"))
    return lines[0]


def refused(result: tuple[int, str, str], tmp_path: Path, *parts: str) -> str:
    """The same, of one that did no other work either. `parts`: what the line must say."""
    line = refused_in(tmp_path / "results", result)
    for part in parts:
        assert part in line
    for made in ("imatrix", "variants", "scores"):
        assert not list((tmp_path / "cache").glob(f"{made}/*.gguf")), f"{made}: work was done before the check"
    return line


# -- formats


def write_rows(folder: Path, rows: list[str | None], column: str = "text") -> dict[str, Path]:
    """The same rows as jsonl, json and parquet, and their join as plain text."""
    paths = {name: folder / f"rows.{name}" for name in ("jsonl", "json", "parquet", "txt")}
    objects = [{"id": i, column: row} for i, row in enumerate(rows)]
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in objects))
    paths["json"].write_text(json.dumps(objects))
    pq.write_table(pa.Table.from_pylist(objects), paths["parquet"])
    paths["txt"].write_text("\n\n".join(row or "" for row in rows))
    return paths


def test_all_formats_give_the_same_windows(cut: Cut, tmp_path: Path) -> None:
    paths = write_rows(tmp_path, [random_text(50, seed=i) for i in range(5)])
    windows = {name: cut(path) for name, path in paths.items()}
    assert len({w.id for w in windows.values()}) == 1
    assert len({w.text_sha256 for w in windows.values()}) == 1
    assert windows["txt"].text_sha256 == hashlib.sha256(paths["txt"].read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["jsonl", "json", "parquet"])
def test_rows_of_a_column_are_joined(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path, ["the of", None, "", "in to"], column="body")[name]
    text = TextConfig(path=str(path), column="body", join=" | ")
    assert read_text(text, "prompts", path) == "the of |  |  | in to"
    text.join = ""
    assert read_text(text, "prompts", path) == "the ofin to"


@pytest.mark.parametrize("name", ["jsonl", "json", "parquet"])
def test_format_overrules_the_ending_of_the_file(tmp_path: Path, name: str) -> None:
    rows = write_rows(tmp_path, ["the of", "in to"])
    disguised = rows[name].rename(tmp_path / "rows.data")
    kind = "json" if name == "jsonl" else name
    assert read_text(TextConfig(format=kind), "prompts", disguised) == "the of\n\nin to"
    if name != "parquet":
        assert read_text(TextConfig(format="text"), "prompts", disguised) == disguised.read_text()


def test_upper_case_ending_counts(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ["the of"])["jsonl"].rename(tmp_path / "ROWS.JSONL")
    assert read_text(TextConfig(), "prompts", path) == "the of"


def test_name_of_a_file_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "a[1] *?"
    folder.mkdir()
    assert read_text(TextConfig(), "prompts", write_rows(folder, ["the of"])["jsonl"]) == "the of"


def test_a_local_file_is_read_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def no_network(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    read_text(TextConfig(), "prompts", write_rows(tmp_path, ["the of"])["parquet"])
    assert not asked


@pytest.mark.parametrize("name", ["jsonl", "json", "parquet"])
def test_missing_column_names_those_that_are_there(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path, ["the of"])[name]
    with pytest.raises(UserError, match=r"no column 'body'.*id, text.*prompts\.column"):
        read_text(TextConfig(column="body"), "prompts", path)


def test_column_without_text_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ["the of"])["jsonl"]
    with pytest.raises(UserError, match=r"column 'id' holds int, not text.*prompts\.column"):
        read_text(TextConfig(column="id"), "prompts", path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin1.txt", "caf\xe9 ".encode("latin-1") * 200),
        ("binary.txt", bytes(range(256)) * 20),
        ("utf16.txt", "the of and".encode("utf-16")),
        ("cut.jsonl", b'{"text": "the of"}\n{"te'),
        ("no_rows.json", b'"the of and"'),
        # pyarrow 26.0.1 ends the process at the first three
        ("null.json", b"null"),
        ("null_row.jsonl", b'null{"text": "the of"}'),
        ("null_in_list.json", b'[{"text": "the of"}, null]'),
        ("number.jsonl", b'{"text": "the of"}\n7\n'),
        ("lists.json", b'[["the of"]]'),
        ("two_lists.jsonl", b'["the of"]["and"]'),
        ("deep.json", b'{"text": ' + b"[" * 100_000),
        ("text.parquet", b"the of and"),
        ("gzip.txt", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"),
    ],
)
def test_unreadable_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*cannot be read as text") as caught:
        read_text(TextConfig(), "prompts", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b'["the of", "and"]', b'\xef\xbb\xbf{"text": "the of"}{"text": "and"} ', b'\n{"text": "the of\\n\\nand"}\n\n'],
)
def test_rows_of_json_may_be_written_in_several_ways(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    assert read_text(TextConfig(), "prompts", path) == "the of\n\nand"


def test_a_process_that_dies_of_a_text_is_one_line_about_the_text(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise EngineError("the engine's process died of SIGSEGV")

    monkeypatch.setattr(harness.prompts, "run_in_child", dies)
    code, _, err = cli("plan", "quant=q8_0", *tiny_overrides)
    assert code == 2 and "the text of prompts (prompts)" in err and "SIGSEGV" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"the of\r\nand in\r\n\r\nto a\r\n",
        b"the of\nand in",
        b"  \n the of\rand \t in\n\n\n",
        "\ufeffthe caf\u00e9 \U0001f600 of </s> <s> \u2028 \x0c \x00 in".encode(),
    ],
    ids=["crlf", "no-final-newline", "spaces", "unicode"],
)
def test_plain_text_is_tokenized_as_it_is_but_for_the_ends_of_lines(
    cut: Cut, tiny_gguf: Path, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes(content)
    text = content.decode().replace("\r\n", "\n").replace("\r", "\n")
    tokens, bos = tokenize(tiny_gguf, text)[:2]
    windows = cut(path, n_windows=1, window_tokens=len(tokens))
    assert windows.text_tokens == len(tokens)
    np.testing.assert_array_equal(windows.tokens, cut_windows(tokens, 1, len(tokens), bos))
    # each byte is a token, in the order of the text: nothing else was translated on the way
    assert int((windows.tokens == 3 + ord("\n")).sum()) == text.count("\n")
    assert windows.text_sha256 == hashlib.sha256(text.encode()).hexdigest()


# -- cutting and identity


def test_windows_are_consecutive_and_bos_replaces_the_first_token() -> None:
    tokens = np.arange(100, 120, dtype=np.int32)
    with_bos = cut_windows(tokens, 3, 6, bos=1)
    assert with_bos.tolist() == [
        [1, 101, 102, 103, 104, 105],
        [1, 107, 108, 109, 110, 111],
        [1, 113, 114, 115, 116, 117],
    ]
    assert cut_windows(tokens, 3, 6, bos=None).ravel().tolist() == list(range(100, 118))
    assert tokens[0] == 100 and tokens[6] == 106, "the tokens of the text are left alone"
    assert with_bos.dtype == np.int32


@given(n=st.integers(1, 5), width=st.integers(1, 9), spare=st.integers(0, 10), bos=st.none() | st.integers(0, 3))
def test_every_token_but_the_first_of_a_window_is_the_text(n: int, width: int, spare: int, bos: int | None) -> None:
    tokens = np.random.default_rng(n * width + spare).integers(4, 1000, n * width + spare).astype(np.int32)
    windows = cut_windows(tokens, n, width, bos)
    for i in range(n):
        for j in range(width):
            expected = bos if bos is not None and j == 0 else tokens[i * width + j]
            assert windows[i, j] == expected


@given(n=st.integers(1, 5), width=st.integers(1, 9), lacking=st.integers(1, 4))
def test_too_few_tokens_are_refused(n: int, width: int, lacking: int) -> None:
    with pytest.raises(ValueError, match="not enough"):
        cut_windows(np.zeros(max(0, n * width - lacking), np.int32), n, width, None)


def test_windows_of_a_file_are_those_cut_by_hand(cut: Cut, texts: tuple[Path, Path], tiny_gguf: Path) -> None:
    windows = cut(texts[0], n_windows=3, window_tokens=50)
    tokens, bos = tokenize(tiny_gguf, texts[0].read_text())[:2]
    assert bos == windows.bos == 1
    assert windows.text_tokens == len(tokens)
    by_hand = [tokens[:50].tolist(), tokens[50:100].tolist(), tokens[100:150].tolist()]
    for row in by_hand:
        row[0] = 1
    assert windows.tokens.tolist() == by_hand
    packed = b"".join(token.to_bytes(4, "little") for row in by_hand for token in row)
    assert windows.id == hashlib.sha256(packed).hexdigest()


def test_model_without_bos_keeps_the_first_token(cache: Cache, texts: tuple[Path, Path], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "no-bos.gguf", n_layers=1, add_bos=False)
    text = TextConfig(path=str(texts[0]), n_windows=2, window_tokens=32)
    windows = load_windows(text, "prompts", texts[0], model, "no-bos", "0.3.36", cache)
    assert windows.bos is None
    assert (windows.tokens[:, 0] != 1).all()
    np.testing.assert_array_equal(windows.tokens.ravel(), tokenize(model, texts[0].read_text())[0][:64])


def test_same_text_under_another_name_is_not_tokenized_again(
    cut: Cut, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cut(texts[0])
    copy = tmp_path / "another name.md"
    copy.write_bytes(texts[0].read_bytes())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("harness.prompts.run_in_child", never)
    second = cut(copy)
    assert second.id == first.id
    assert (first.name, second.name) == ("prompts", "another_name")
    with pytest.raises(AssertionError, match="tokenized again"):
        cut(texts[1])
    with pytest.raises(AssertionError, match="tokenized again"):
        cut(texts[0], window_tokens=65)


def test_same_bytes_in_another_format_are_another_text(cut: Cut, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"text": "{random_text(300, seed=3)}"}}\n')
    as_text = tmp_path / "rows.txt"
    as_text.write_bytes(rows.read_bytes())
    assert cut(rows).id != cut(as_text).id
    assert cut(rows).id == cut(as_text, format="json").id


def test_a_changed_text_is_read_again(cut: Cut, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(random_text(300, seed=4))
    first = cut(path)
    path.write_text(random_text(300, seed=5))
    assert cut(path).id != first.id


# -- what the command line refuses


def test_too_short_for_the_windows_says_how_many_fit(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    fit = len(tokenize(tiny_gguf, texts[0].read_text())[0]) // 128
    overrides = ["quant=q8_0", "mode=standard", *tiny_overrides]
    line = refused(cli("sweep", *overrides, f"prompts.n_windows={fit + 1}"), tmp_path, "too short")
    assert "prompts (prompts)" in line and f"{fit + 1} windows of 128" in line
    assert f"prompts.n_windows={fit}" in line
    code, _, err = cli("plan", *overrides, f"prompts.n_windows={fit}")
    assert code == 0, err


def test_too_short_for_one_window_says_which_windows_fit(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the of and in to a was is")
    overrides = ["quant=q8_0", "mode=standard", *tiny_overrides, f"prompts.path={path}"]
    fits = len(tokenize(tiny_gguf, path.read_text())[0]) // 2
    line = refused(cli("sweep", *overrides), tmp_path, "prompts (short)", "too short", "longer text")
    assert f"prompts.window_tokens={fits} or less" in line, "of 2 windows each"
    code, _, err = cli("plan", *overrides, f"prompts.window_tokens={fits}")
    assert code == 0, err


def test_rows_beside_the_default_group_are_read_as_rows(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    """`prompts.path=FILE.jsonl` alone must do, whatever the default group says of its own file."""
    rows = write_rows(tmp_path, ["the of and in", "to a was is"] * 40)
    overrides = ["quant=q8_0", "mode=standard", *tiny_overrides, "calibration=none"]
    code, _, err = cli("plan", *overrides, f"prompts.path={rows['jsonl']}")
    assert code == 0, err
    (windows,) = (tmp_path / "cache" / "windows").glob("*.npy")
    tokens, bos = tokenize(tiny_gguf, rows["txt"].read_text())[:2]
    np.testing.assert_array_equal(np.load(windows), cut_windows(tokens, 2, 128, bos))


def test_windows_beyond_the_context_of_the_model_are_refused(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path
) -> None:
    one = ["prompts.n_windows=1"]
    result = cli("sweep", "quant=q8_0", *tiny_overrides, *one, "prompts.window_tokens=513")
    refused(result, tmp_path, "prompts.window_tokens=513", "512")
    result = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, *one, "prompts.window_tokens=512")
    assert result[0] == 0, result[2]


# -- calibration beside the prompts


def test_overlap_is_refused_then_recorded_and_its_imatrix_used(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """An imatrix made by a first sweep, used by a second, refused for models of other widths or with more layers."""
    seen, text = tmp_path / "seen.txt", texts[0].read_text()
    # Prompts are 2 windows of 128 tokens of the text. This one begins about where the second of them does.
    start = next(i for i in range(100, len(text)) if len(tokenize(tiny_gguf, text[:i])[0]) > 128 and text[i] == " ")
    seen.write_text(text[start + 1 :])
    overrides = ["mode=standard", *tiny_overrides, "runtime.threads=1", f"calibration.path={seen}"]
    refused(cli("sweep", "quant=q4_0", *overrides), tmp_path, "13-grams", "seen", "calibration.allow_overlap=true")
    code, _, err = cli("sweep", "quant=q4_0", *overrides, "calibration.allow_overlap=true")
    assert code == 0, err
    results = tmp_path / "results"
    first = {r.data["quant"]: r for r in read_records(results / "tiny")}
    assert 0.35 < first["q4_0"].data["calibration"]["overlap_share"] < 0.55
    assert "overlap" in {finding["kind"] for finding in first["q4_0"].data["findings"]}
    assert first["reference"].data["calibration"] is None, "the reference has seen no imatrix"

    (made,) = (tmp_path / "cache" / "imatrix").glob("*.gguf")
    overrides += [f"calibration.imatrix={made.rename(tmp_path / 'mine.gguf')}"]
    code, _, err = cli("sweep", "quant=q4_0", *overrides, "results.name=ready")
    assert code == 0, err
    second = {r.data["quant"]: r for r in read_records(results / "ready")}
    assert second["q4_0"].data["calibration"]["name"] == "mine.gguf"
    assert second["q4_0"].data["calibration"]["overlap_share"] is None
    values = [records["q4_0"].per_token()["nll"].tolist() for records in (first, second)]
    assert values[0] == values[1], "the same imatrix, the same file"
    assert not made.exists(), "it was not collected again"

    wide = write_tiny_llama(tmp_path / "wide.gguf", n_ff=768)
    result = cli("sweep", "quant=q4_0", *overrides, f"model.path={wide}", "results.name=wide")
    line = refused_in(results / "wide", result)
    assert "ffn_down" in line and "512" in line and "768" in line and "another model" in line
    deep = write_tiny_llama(tmp_path / "deep.gguf", n_layers=5)
    result = cli("sweep", "quant=iq2_xs", *overrides, f"model.path={deep}", "results.name=deep")
    assert "no data for blk.4." in refused_in(results / "deep", result)


def test_texts_that_share_nothing_may_be_used(cli: Cli, tiny_overrides: list[str]) -> None:
    code, _, err = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, "calibration.max_overlap=0.0")
    assert code == 0, err


def test_quantizing_without_imatrix(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = ["mode=standard", *tiny_overrides, "runtime.threads=1", "calibration=none"]
    refused(cli("sweep", "quant=iq2_xs", *overrides), tmp_path, "quant=iq2_xs needs an imatrix", "calibration=none")
    # Nothing is done for the type that could be made, either.
    refused(cli("sweep", "quant=q4_0,iq2_xs", *overrides), tmp_path, "quant=iq2_xs needs an imatrix")
    code, _, err = cli("sweep", "quant=q4_0", *overrides)
    assert code == 0, err
    records = {r.data["quant"]: r.data for r in read_records(tmp_path / "results" / "tiny")}
    assert records["q4_0"]["status"] == "ok"
    assert records["q4_0"]["calibration"] is None
    assert not (tmp_path / "cache" / "imatrix").exists()
