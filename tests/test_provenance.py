"""What a quantized file says of its origin, read by another reader, and its bytes, counted by llama.cpp itself."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from harness import __version__
from harness.compose import compose
from harness.engine.collect import Activations
from harness.engine.gguf_file import read_header
from harness.engine.quantize import quantize, standard_types
from harness.header import GgufInfo
from harness.imatrix import write_imatrix
from harness.plan import Plan, padded
from harness.prepare import prepare
from harness.provenance import KEYS, imatrix_metadata, kv_bytes, with_provenance
from harness.quantize import make_variant


def plan(quant: str = "q8_0", mode: str = "standard", policy: str | None = None) -> Plan:
    """A plan of no tensors."""
    return Plan(quant, mode, policy, "q8_0", 0, ())


def header(n_bytes: int, **provenance_bytes: int) -> GgufInfo:
    """A reference whose header has that many bytes before its padding."""
    return GgufInfo("llama", {}, (), "f16", n_bytes, provenance_bytes, 0)


def metadata(path: Path) -> dict[str, object]:
    """Every key of a file, as the gguf package reads it."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "GGUF." not in name}


def header_size(path: Path) -> int:
    """Bytes in front of the tensors, by the gguf package."""
    return int(gguf.GGUFReader(path).data_offset)


@pytest.mark.parametrize(
    ("key", "value", "n_bytes"),
    # length 8, key, type 4, then a uint32 of 4, or length 8 and text
    [
        ("a", 7, 8 + 1 + 4 + 4),
        ("harness.plan", "abc", 8 + 12 + 4 + 8 + 3),
        ("ä", "€", 8 + 2 + 4 + 8 + 3),
        ("k", "", 21),
    ],
)
def test_bytes_of_a_key_by_hand(key: str, value: str | int, n_bytes: int) -> None:
    assert kv_bytes(key, value) == n_bytes


@pytest.mark.parametrize("length", range(33))
def test_the_size_of_the_header_is_known_whatever_its_padding(tiny_gguf: Path, tmp_path: Path, length: int) -> None:
    bare = read_header(tiny_gguf).quantized_header_bytes
    target = tmp_path / "out.gguf"
    quantize(tiny_gguf, target, "f16", overrides={}, imatrix={}, n_threads=1, metadata={"harness.plan": "x" * length})
    assert header_size(target) == padded(bare + kv_bytes("harness.plan", "x" * length))
    info = read_header(target)
    assert info.provenance_bytes == {"harness.plan": kv_bytes("harness.plan", "x" * length)}
    assert info.quantized_header_bytes == bare + info.provenance_bytes["harness.plan"]


def test_what_a_plan_says_by_hand() -> None:
    made = with_provenance(plan("q4_k_m", "dynamicgate", "mine"), header(1000), {})
    assert dict(made.metadata) == {
        "harness.version": __version__,
        "harness.quant": "q4_k_m",
        "harness.mode": "dynamicgate",
        "harness.policy": "mine",
        "harness.plan": made.id,
    }
    texts = len(__version__) + len("q4_k_m" + "dynamicgate" + "mine") + 64
    keys = len("harness.version" + "harness.quant" + "harness.mode" + "harness.policy" + "harness.plan")
    assert made.header_bytes == padded(1000 + texts + keys + 5 * (8 + 4 + 8))
    assert made.id == plan("q4_k_m", "dynamicgate", "mine").id, "what a file says does not change what it is"


def test_keys_that_the_reference_brings_along_are_replaced_or_emptied() -> None:
    there = {"quantize.imatrix.file": 120, "quantize.imatrix.entries_count": 41, "harness.policy": 50}
    made = with_provenance(plan(), header(1000, **there), {})
    said = dict(made.metadata)
    assert (said["quantize.imatrix.file"], said["quantize.imatrix.entries_count"], said["harness.policy"]) == (
        "",
        0,
        "",
    )
    assert made.header_bytes == padded(1000 - 211 + sum(kv_bytes(key, value) for key, value in said.items()))


@pytest.mark.parametrize(
    ("file", "dataset", "n_chunks", "expected"),
    [
        ("a.gguf", "words", 20, ("a.gguf", "words", 20)),
        ("/home/me/a b.gguf", "/home/me/my/calibration.txt", 1, ("a b.gguf", "calibration.txt", 1)),
        (r"C:\me\a.gguf", r"D:\texts\calibration.txt", 1, ("a.gguf", "calibration.txt", 1)),
        ("a.gguf", "texts/", 1, ("a.gguf", "texts", 1)),
        ("a.gguf", None, None, ("a.gguf", None, None)),
        ("a.gguf", "", 0, ("a.gguf", None, None)),
    ],
)
def test_no_folder_is_told(
    file: str, dataset: str | None, n_chunks: int | None, expected: tuple[str, str | None, int | None]
) -> None:
    found = imatrix_metadata(file, dataset, n_chunks)
    names = ("quantize.imatrix.file", "quantize.imatrix.dataset", "quantize.imatrix.chunks_count")
    assert tuple(found.get(name) for name in names) == expected


def test_long_texts_are_cut_between_characters() -> None:
    made = with_provenance(plan(policy="€" * 100), header(1000), imatrix_metadata("x" * 300, "\udcff" * 9, 1))
    said = dict(made.metadata)
    assert said["harness.policy"] == "€" * 42 and said["quantize.imatrix.file"] == "x" * 127
    assert said["quantize.imatrix.dataset"] == "?" * 9


@pytest.mark.parametrize("with_imatrix", [True, False])
def test_files_tell_their_origin_and_nothing_of_a_machine(
    tiny_overrides: list[str], tiny_gguf: Path, tmp_path: Path, with_imatrix: bool
) -> None:
    """The reference was quantized before, and the imatrix made elsewhere: both bring folders that must not stay."""
    reference, imatrix, rules = tmp_path / "tiny-f16.gguf", tmp_path / "matrix.gguf", tmp_path / "Mine.yaml"
    old: dict[str, str | int] = dict.fromkeys(KEYS, "/home/somebody/old") | {"quantize.imatrix.entries_count": 999}
    quantize(tiny_gguf, reference, "f16", overrides={}, imatrix={}, n_threads=1, metadata=old)
    seen = {f"blk.{i}.ffn_up.weight": Activations(np.ones((1, 256)), np.array([3.0])) for i in range(4)}
    write_imatrix(imatrix, seen, dataset="/home/somebody/words.txt", n_windows=7, window_tokens=64)
    rules.write_text("rules: [{name: a, type: q6_k, roles: [attn_v]}]")
    overrides = [one for one in tiny_overrides if not one.startswith(("model.", "calibration."))]
    overrides += [f"model.path={reference}", f"policy.file={rules}", "quant=q4_k_m", "mode=standard,dynamicgate"]
    overrides += [f"calibration.imatrix={imatrix}"] if with_imatrix else ["calibration=none"]
    sweep = prepare(compose(overrides), print, with_reference=False)
    for case in sweep.cases:
        target = tmp_path / "out.gguf"
        make_variant(sweep.reference.path, target, case.plan, sweep.imatrix_path, n_threads=1)
        assert target.stat().st_size == case.plan.file_bytes
        said = {key: value for key, value in metadata(target).items() if key in KEYS}
        expected = ("matrix.gguf", "words.txt", 4, 7) if with_imatrix else ("", "", 0, 0)
        assert said == {
            **dict(zip(list(KEYS)[:4], expected, strict=True)),
            "harness.version": __version__,
            "harness.quant": "q4_k_m",
            "harness.mode": case.plan.mode,
            "harness.policy": {"standard": "", "dynamicgate": "Mine"}[case.plan.mode],
            "harness.plan": case.plan.id,
        }
        head = target.read_bytes()[: header_size(target)]
        assert b"/home" not in head and str(tmp_path).encode() not in head


def test_the_origin_leaves_the_weights_alone(tiny_gguf: Path, tmp_path: Path) -> None:
    overrides = standard_types(tiny_gguf, ["q4_k_m"], has_imatrix=False)["q4_k_m"].final
    said = with_provenance(plan(), read_header(tiny_gguf), {}).metadata
    files = []
    for name, keys in (("plain", {}), ("named", dict(said))):
        files.append(tmp_path / f"{name}.gguf")
        quantize(tiny_gguf, files[-1], "q4_k_m", overrides=overrides, imatrix={}, n_threads=2, metadata=keys)
    plain, named = (gguf.GGUFReader(path) for path in files)
    assert [t.name for t in plain.tensors] == [t.name for t in named.tensors]
    for a, b in zip(plain.tensors, named.tensors, strict=True):
        assert a.tensor_type == b.tensor_type and np.array_equal(a.data, b.data)
    assert {**metadata(files[0]), **dict(said)} == metadata(files[1])
