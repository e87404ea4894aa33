"""Safetensors to GGUF: what is refused, what the converter may see, and the converter itself on a tiny model.

The last needs the extra `convert` and the package index; everything else runs without either.
"""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_checkpoint import (
    E4M3,
    N_HEADS,
    N_KV_HEADS,
    bf16_tensors,
    fp8_by_block,
    fp8_by_row,
    from_bf16,
    from_fp8,
    is_linear,
    llama_weights,
    to_bf16,
    to_fp8,
    write_checkpoint,
    write_safetensors,
)
from tiny_model import random_text

from harness import convert as module
from harness import sources
from harness.convert import convert, converter_members, link_data, read_checkpoint
from harness.engine.native import PINNED_VERSION
from harness.errors import EngineError, UserError
from harness.record import read_records
from harness.store import Cache

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent


def silent(_: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache of the test's own."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny BF16 model without a tokenizer."""
    return write_checkpoint(tmp_path / "tiny", bf16_tensors(llama_weights(8)), n_vocab=8)


# -- the arithmetic of the tests


def test_fp8_of_the_tests_is_e4m3fn() -> None:
    """Figures of the format's description (OCP, 8-bit floating point): 448 largest, 2^-9 smallest."""
    assert E4M3.max() == 448 and E4M3[1] == 2.0**-9 and E4M3[8] == 2.0**-6 and E4M3[56] == 1.0
    assert to_fp8(np.array([0.0, 1.0, -1.0, 448.0, 500.0, 1.0624])).tolist() == [0, 56, 184, 126, 126, 56]
    codes = np.setdiff1d(np.arange(256), [127, 128, 255]).astype(np.uint8)  # without NaN and -0
    np.testing.assert_array_equal(to_fp8(from_fp8(codes)), codes)


def test_bf16_of_the_tests_rounds_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5], np.float32)  # 1 + 2^-8, 1 + 3 * 2^-8: in the middle
    assert from_bf16(to_bf16(values)).tolist() == [1.0, 1.0, 1.015625, -2.5]


# -- what is refused


def test_checkpoint_is_read(checkpoint: Path) -> None:
    found = read_checkpoint(checkpoint)
    assert (found.architecture, found.is_fp8) == ("LlamaForCausalLM", False)
    assert found.n_weights == {"BF16": sum(weight.size for weight in llama_weights(8).values())}
    write_safetensors(checkpoint / "model.safetensors", {"a": ("F8_E4M3", np.zeros(4, np.uint8))})
    assert read_checkpoint(checkpoint).is_fp8


def spoil(folder: Path, how: str) -> None:
    """Make a folder that is no whole checkpoint."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    header = {"a": {"dtype": "BF16", "shape": [1 << 62], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    changes: dict[str, Callable[[], object]] = {
        "no config": config.unlink,
        "no weights": weights.unlink,
        "config is no JSON": lambda: config.write_text("{"),
        "config is a list": lambda: config.write_text("[]"),
        "config nests": lambda: config.write_text("[" * 100_000),
        "no architecture": lambda: config.write_text('{"architectures": []}'),
        "weights are a page": lambda: weights.write_bytes(b"<!doctype html><title>Sign in</title>" * 9),
        "weights are empty": lambda: weights.write_bytes(b""),
        "weights are cut": lambda: weights.write_bytes(weights.read_bytes()[:-1]),
        "header of 2^60 bytes": lambda: weights.write_bytes(struct.pack("<Q", 1 << 60)),
        "header is no object": lambda: weights.write_bytes(struct.pack("<Q", 2) + b"[]"),
        "shape of 2^62": lambda: weights.write_bytes(struct.pack("<Q", len(text)) + text + b"ab"),
        "a file is missing": lambda: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model.safetensors"}})
        ),
    }
    changes[how]()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no config", ["config.json"]),
        ("no weights", ["*.safetensors"]),
        ("config is no JSON", ["config.json", "JSON"]),
        ("config is a list", ["config.json", "object"]),
        ("config nests", ["config.json", "JSON"]),
        ("no architecture", ["config.json", "architecture"]),
        ("weights are a page", ["model.safetensors"]),
        ("weights are empty", ["model.safetensors"]),
        ("weights are cut", ["model.safetensors", "truncated"]),
        ("header of 2^60 bytes", ["model.safetensors"]),
        ("header is no object", ["model.safetensors"]),
        ("shape of 2^62", ["model.safetensors", "shape"]),
        ("a file is missing", ["model-00002-of-00002.safetensors"]),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(checkpoint: Path, how: str, words: list[str]) -> None:
    spoil(checkpoint, how)
    with pytest.raises(UserError) as error:
        read_checkpoint(checkpoint)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_cannot_be_are_refused(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.gguf"
    there.write_bytes(b"mine")
    folder = [str(checkpoint), f"runtime.cache_dir={tmp_path / 'cache'}"]
    for arguments, word in (
        ([], "one folder"),
        ([*folder, "b"], "one folder"),
        ([*folder, "type=q8_0"], "type=q8_0"),
        ([*folder, f"out={there}"], "already"),
        ([*folder, "out=model.bin"], ".gguf"),
        ([*folder, f"out={tmp_path / 'nowhere' / 'a.gguf'}"], "folder"),
        ([*folder, "outtype=bf16"], "outtype"),
        ([*folder, "type=f16", "type=f32"], "once"),
        ([str(tmp_path / "nothing")], "no folder"),
    ):
        code, out, err = cli("convert", *arguments)
        assert (code, out) == (2, "") and word in err, arguments
        assert len(err.splitlines()) == 1
    assert there.read_bytes() == b"mine"


def test_missing_extra_is_told_before_anything_is_fetched(
    checkpoint: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(UserError, match=r"convert needs torch: pip install .*\[convert\]"):
        convert(checkpoint, tmp_path / "out.gguf", "bf16", cache, silent)


def test_full_disk_is_told(checkpoint: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match="GB free"):
        convert(checkpoint, tmp_path / "out.gguf", "bf16", cache, silent)


def test_safetensors_as_the_model_name_the_command(
    cli: Cli, checkpoint: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    command = f"python -m harness convert {checkpoint} out=tiny-bf16.gguf"
    for path in (checkpoint, checkpoint / "model.safetensors"):
        code, _, err = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, f"model.path={path}")
        assert code == 2 and command in err.splitlines()[-1], err
    (checkpoint / "a.gguf").touch()
    code, _, err = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, f"model.path={checkpoint}")
    assert code == 2 and "a.gguf" in err
    code, _, err = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, f"model.path={tmp_path}")
    assert code == 2 and "folder without a model" in err


# -- the converter: fetched, unpacked, and what it may see


def test_pins_are_one() -> None:
    assert f"llama-cpp-python=={PINNED_VERSION}" == module.PACKAGE
    assert f'"{module.PACKAGE}",' in (ROOT / "pyproject.toml").read_text()


def tar_gz(path: Path, members: dict[str, bytes], *, links: dict[str, str] | None = None) -> Path:
    """A source archive."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return path


def test_only_the_converters_modules_are_taken(tmp_path: Path) -> None:
    inside = "x-1/vendor/llama.cpp/"
    wanted = {
        "convert_hf_to_gguf.py": b"1",
        "conversion/__init__.py": b"2",
        "conversion/llama.py": b"3",
        "gguf-py/gguf/__init__.py": b"4",
        "gguf-py/gguf/scripts/gguf_dump.py": b"5",
    }
    others = [f"{inside}convert_lora_to_gguf.py", f"{inside}conversion/data.bin", f"{inside}conversion/../../up.py"]
    others += [f"/{inside}conversion/a.py", "../conversion/a.py", f"{inside}gguf-py/gguf/../../a.py", "conversion/a.py"]
    others += [f"{inside}conversion/a.py\n", f"{inside}conversion/sub/a.py"]
    path = tar_gz(
        tmp_path / "x.tar.gz",
        {f"{inside}{name}": content for name, content in wanted.items()} | dict.fromkeys(others, b"no"),
        links={f"{inside}conversion/link.py": "/etc/passwd"},
    )
    assert dict(converter_members(path)) == wanted


def test_archives_without_a_converter_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "x-1/vendor/llama.cpp/convert_hf_to_gguf.py"
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(tar_gz(tmp_path / "a.tar.gz", {script: os.urandom(50_000)}).read_bytes()[:20_000])
    page = tmp_path / "page.tar.gz"
    page.write_bytes(b"<html>")
    for path in (broken, page, tar_gz(tmp_path / "other.tar.gz", {"x-1/README.md": b"hello"})):
        with pytest.raises(UserError, match="not used"):
            converter_members(path)
    monkeypatch.setattr(module, "_LARGEST_MEMBER_BYTES", 10)
    with pytest.raises(UserError, match="too much"):
        converter_members(tar_gz(tmp_path / "big.tar.gz", {script: b"x" * 11}))


def test_sources_are_fetched_with_pip_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the test's own, from a folder in place of the index; its metadata need no other package."""
    backend = b"""
import pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    path = pathlib.Path(folder, "tinysrc-1.0.dist-info")
    path.mkdir()
    (path / "METADATA").write_text("Metadata-Version: 2.1\\nName: tinysrc\\nVersion: 1.0\\n")
    return path.name
def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise SystemExit("nothing is built")
"""
    build = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    info = b"Metadata-Version: 2.1\nName: tinysrc\nVersion: 1.0\n"
    members = {"pyproject.toml": build, "backend.py": backend, "PKG-INFO": info}
    folder = tmp_path / "index"
    folder.mkdir()
    path = tar_gz(folder / "tinysrc-1.0.tar.gz", {f"tinysrc-1.0/{name}": content for name, content in members.items()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = sources.sha256_file(path)
    with sources.fetched_sdist("tinysrc==1.0", sha256) as found:
        assert found.read_bytes() == path.read_bytes()
    assert not found.exists()
    with pytest.raises(UserError, match=r"tinysrc==1\.0"), sources.fetched_sdist("tinysrc==1.0", "0" * 64):
        pass


def test_links_show_data_and_no_code(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("modeling_tiny.py", "pytorch_model.bin", "setup.sh", "tokenizer.model", "merges.txt", "README.md"):
        (checkpoint / name).write_text(name)
    config = json.loads((checkpoint / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_tiny.Config"}
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "auto_map": auto_map, "text_config": [{"auto_map": 1, "n": 2}]}).replace(
            '"auto_map"', '"auto\\u005fmap"', 1
        )
    )
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "add_bos_token": True}))
    target = tmp_path / "links"
    link_data(checkpoint, target)
    data = {"model.safetensors", "tokenizer.model", "merges.txt", "README.md", "config.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == data
    assert json.loads((target / "config.json").read_text()) == {**config, "text_config": [{"n": 2}]}
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"add_bos_token": True}
    assert (target / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


@pytest.fixture
def stand_in(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script of the test's own in place of llama.cpp's converter."""

    def put(script: str) -> None:
        def make(target: Path) -> None:
            with zipfile.ZipFile(target, "w") as archive:
                archive.writestr("convert_hf_to_gguf.py", script)

        path = cache.make("stand_in", "0" * 64, ".zip", make)
        monkeypatch.setattr(module, "converter_archive", lambda cache, say: path)
        monkeypatch.setattr(module, "require_extra", lambda: None)

    return put


def test_converter_runs_offline_on_the_links(
    checkpoint: Path,
    tmp_path: Path,
    tiny_gguf: Path,
    cache: Cache,
    stand_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(f"""
import os, pathlib, shutil, sys
folder, _, out, flag, kind = sys.argv[1:]
print(pathlib.Path(folder).name, flag, kind, os.environ["HF_HUB_OFFLINE"], "HF_TOKEN" in os.environ)
print(sorted(os.listdir(folder)), os.path.realpath(folder) == {str(checkpoint)!r})
shutil.copy({str(tiny_gguf)!r}, out)
""")
    out = Path("{ftype} of mine.gguf")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    info = convert(Path("tiny"), out, "f16", cache, silent)
    assert out.read_bytes() == tiny_gguf.read_bytes()
    assert (info.architecture, info.file_bytes) == ("llama", out.stat().st_size)
    log = (cache.folder / "logs" / "convert.log").read_text().splitlines()
    assert log == ["tiny --outtype f16 1 False", "['config.json', 'model.safetensors'] False"]
    assert not list(tmp_path.glob(".gguf-harness-*"))


@pytest.mark.parametrize("script", ["raise NotImplementedError('no such thing')", "print('ERROR:no such thing')"])
def test_converter_that_fails_leaves_nothing(
    checkpoint: Path, tmp_path: Path, cache: Cache, stand_in: Callable[[str], None], script: str
) -> None:
    stand_in(script)
    with pytest.raises(EngineError) as error:
        convert(checkpoint, tmp_path / "out.gguf", "bf16", cache, silent)
    assert "no such thing" in error.value.with_log and "convert.log" in error.value.with_log
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".gguf-harness-*"))


def test_what_the_converter_writes_is_read_back(
    checkpoint: Path, tmp_path: Path, cache: Cache, stand_in: Callable[[str], None]
) -> None:
    stand_in("import pathlib, sys; pathlib.Path(sys.argv[3]).write_bytes(b'GGUF, or not')")
    with pytest.raises((UserError, EngineError)):
        convert(checkpoint, tmp_path / "out.gguf", "bf16", cache, silent)
    assert not list(tmp_path.glob("*.gguf"))


# -- llama.cpp's converter


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in BF16, in FP8 with a scale a block of 128 x 128, and in FP8 with a scale a row."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs pip install -e '.[convert]'")
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(random_text(40, seed=i) for i in range(100)),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    n_vocab = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.getvalue()).vocab_size()
    weights = llama_weights(n_vocab)
    block, row = bf16_tensors(weights), bf16_tensors(weights)
    for name in filter(is_linear, weights):
        codes, scale = fp8_by_block(weights[name])
        block |= {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", scale)}
        codes, scale = fp8_by_row(weights[name])
        row |= {name: ("F8_E4M3", codes), f"{name}_scale": ("F32", scale)}
    by_row = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    quantizations: dict[str, dict | None] = {
        "bf16": None,
        "block": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
        "row": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": by_row}},
            "ignore": ["lm_head"],
        },
    }
    folders = {}
    for name, tensors in (("bf16", bf16_tensors(weights)), ("block", block), ("row", row)):
        folder = write_checkpoint(root / name, tensors, n_vocab=n_vocab, quantization=quantizations[name])
        (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        folders[name] = folder
    return folders


def gguf_weights(path: Path) -> dict[str, np.ndarray]:
    """float32 tensors of a BF16 GGUF, [rows, columns]."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = tensor.tensor_type
        assert kind in (gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32), (tensor.name, kind)
        raw = np.asarray(tensor.data)
        values = from_bf16(raw.view(np.uint16)) if kind == gguf.GGMLQuantizationType.BF16 else raw.view(np.float32)
        found[tensor.name] = values.reshape(shape)
    return found


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_gguf(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and order of rows in a GGUF: transformers rotate halves of a head, llama.cpp neighbours."""
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    known = NAMES.get(part) if name.startswith("model.layers.") else None
    if known in ("attn_q", "attn_k"):
        heads = N_HEADS if known == "attn_q" else N_KV_HEADS
        half = weight.shape[0] // heads // 2
        rows = [head * 2 * half + (j % 2) * half + j // 2 for head in range(heads) for j in range(2 * half)]
        weight = weight[rows]
    return f"blk.{layer}.{known}.weight" if known else f"{NAMES[name.removesuffix('.weight')]}.weight", weight


@pytest.mark.convert
def test_bf16_and_fp8_checkpoints_are_converted_and_scored(
    checkpoints: dict[str, Path], cli: Cli, tiny_overrides: list[str], tmp_path: Path
) -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="needs pip install -e '.[convert]'")
    found: dict[str, dict[str, np.ndarray]] = {}
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gguf-harness"  # 77 MB are fetched once
    for name, folder in checkpoints.items():
        out = tmp_path / f"{name}.gguf"
        code, text, err = cli("convert", str(folder), f"out={out}", f"runtime.cache_dir={cache}")
        assert code == 0, err
        assert ("FP8" in err) == (name != "bf16")
        found[name] = gguf_weights(out)
        assert f"llama, {len(found[name])} tensors, {out.stat().st_size:,} bytes" in text

    n_vocab = json.loads((checkpoints["bf16"] / "config.json").read_text())["vocab_size"]
    weights = llama_weights(n_vocab)
    assert len(found["bf16"]) == len(found["block"]) == len(found["row"]) == len(weights)
    for name, weight in weights.items():
        gguf_name, expected = as_gguf(name, weight)
        np.testing.assert_array_equal(found["bf16"][gguf_name], expected, err_msg=name)
        if not is_linear(name):
            np.testing.assert_array_equal(found["block"][gguf_name], expected, err_msg=name)
            np.testing.assert_array_equal(found["row"][gguf_name], expected, err_msg=name)
            continue
        codes, scale = fp8_by_block(weight)
        of_each = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
        by_block = from_bf16(to_bf16(from_fp8(codes) * of_each))
        np.testing.assert_array_equal(found["block"][gguf_name], as_gguf(name, by_block)[1], err_msg=name)
        codes, by_row = fp8_by_row(weight)
        np.testing.assert_array_equal(
            found["row"][gguf_name], as_gguf(name, from_bf16(to_bf16(from_fp8(codes) * by_row)))[1], err_msg=name
        )
        # Rounding to 3 bits of mantissa moves a weight by 1/16 of itself at most, or by half of the smallest value's
        # step; to the 7 bits of BF16 by 1/256 of itself.
        for kind, scales in (("block", of_each), ("row", np.broadcast_to(by_row, weight.shape))):
            error = np.abs(found[kind][gguf_name] - expected)
            bound = np.maximum(np.abs(weight) / 16, scales * 2.0**-10) + np.abs(weight) / 200
            assert (error <= as_gguf(name, bound)[1]).all(), name
            assert error.max() > 0, "FP8 does lose something"

    for name in ("bf16", "block"):
        local = [f"model.path={tmp_path / f'{name}.gguf'}", f"results.name={name}", "calibration=none"]
        code, _, err = cli("sweep", "quant=reference", "mode=standard", *tiny_overrides, *local)
        assert code == 0, err
        (record,) = read_records(tmp_path / "results" / name)
        assert record.ok and record.data["reference"]["file_type"] == "bf16"


@pytest.mark.convert
def test_model_with_code_of_its_own_runs_none_of_it(checkpoints: dict[str, Path], cache: Cache, tmp_path: Path) -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="needs pip install -e '.[convert]'")
    folder, trap = tmp_path / "trap", tmp_path / "ran"
    folder.mkdir()
    for path in checkpoints["bf16"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, "model_type": "evil", "auto_map": auto_map}))
    (folder / "tokenizer.model").unlink()  # so that the converter asks transformers for a tokenizer
    shared = Cache(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gguf-harness")
    with pytest.raises(EngineError):
        convert(folder, tmp_path / "out.gguf", "bf16", shared, silent)
    assert not trap.exists()
    # The trap does spring where code is allowed, so that the line above means something.
    code = "import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, check=False)
    assert trap.exists()
