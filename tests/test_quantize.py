"""Files made tensor by tensor, against those that llama_model_quantize makes of the same types: byte for byte."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_architectures import qwen2moe, write_family
from tiny_model import write_tiny_llama

from harness.engine import chunks
from harness.engine.collect import Activations
from harness.engine.gguf_file import read_header
from harness.engine.quantize import quantize
from harness.errors import EngineError
from harness.ggml_types import ABORTS_WITHOUT_IMATRIX, NEEDS_IMATRIX, WEIGHT_TYPES
from harness.imatrix import read_imatrix, write_imatrix
from harness.plan import Plan, make_plan
from harness.provenance import IMATRIX_ENTRIES, with_provenance
from harness.quantize import make_variant

WITHOUT_DATA = ("token_embd.weight", "output.weight")  # no imatrix has any for them


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of widths that take every type."""
    return write_tiny_llama(tmp_path_factory.mktemp("dense") / "f16.gguf", n_layers=1)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of 8 experts, and shared ones."""
    return write_family(qwen2moe(), tmp_path_factory.mktemp("mixture") / "f16.gguf")


def imatrix_of(model: Path, target: Path, idle: Mapping[str, tuple[int, ...]] | None = None) -> Path:
    """Random importances for every matrix of the blocks; experts that are `idle` have none."""
    rng = np.random.default_rng(3)
    seen = {}
    for tensor in read_header(model).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            n = tensor.shape[2] if len(tensor.shape) > 2 else 1
            counts = np.full(n, 9.0)
            counts[list((idle or {}).get(tensor.name, ()))] = 0
            seen[tensor.name] = Activations(rng.gamma(1.0, 1.0, (n, tensor.shape[0])) * counts[:, None], counts)
    write_imatrix(target, seen, dataset="random", n_windows=1, window_tokens=16)
    return target


def plan_of(model: Path, types: Mapping[str, str], file_type: str = "q8_0", *, imatrix: Path | None = None) -> Plan:
    """A plan with these types, by name, and what a sweep would say of its origin."""
    info = read_header(model)
    made = make_plan(
        quant="mine",
        mode="standard",
        policy=None,
        file_type=file_type,
        tensors=info.tensors,
        header_bytes=info.quantized_header_bytes,
        standard_final=types,
        standard_asked={},
        rules=(),
        metadata=info.metadata,
    )
    return with_provenance(made, info, {IMATRIX_ENTRIES: 0} if imatrix else {})


def llama_cpps(model: Path, target: Path, plan: Plan, imatrix: Path | None) -> bytes:
    """The file that llama_model_quantize makes of the plan."""
    assert plan.file_type is not None
    weights = read_imatrix(imatrix).weights if imatrix else {}
    metadata = {key: len(weights) if key == IMATRIX_ENTRIES else value for key, value in plan.metadata}
    quantize(model, target, plan.file_type, overrides=plan.overrides, imatrix=weights, n_threads=2, metadata=metadata)
    return target.read_bytes()


def matrices(model: Path) -> list[str]:
    """What llama.cpp is willing to quantize of these models."""
    named = [t.name for t in read_header(model).tensors if len(t.shape) > 1 and "ffn_gate_inp" not in t.name]
    assert named
    return named


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
@pytest.mark.parametrize("with_imatrix", [True, False])
def test_every_type_equals_llama_cpps(dense: Path, tmp_path: Path, type_name: str, with_imatrix: bool) -> None:
    if not with_imatrix and type_name in NEEDS_IMATRIX:
        pytest.skip("needs an imatrix")
    imatrix = imatrix_of(dense, tmp_path / "imatrix.gguf") if with_imatrix else None
    types = dict.fromkeys(matrices(dense), type_name)
    if type_name in ABORTS_WITHOUT_IMATRIX:
        types |= dict.fromkeys(WITHOUT_DATA, "q8_0")
    plan = plan_of(dense, types, imatrix=imatrix)
    truth = llama_cpps(dense, tmp_path / "truth.gguf", plan, imatrix)
    counts = make_variant(dense, tmp_path / "ours.gguf", plan, imatrix, n_threads=3)
    assert (tmp_path / "ours.gguf").read_bytes() == truth
    assert counts["n_tensors_quantized"] == (0 if type_name == "f16" else len(types))


@pytest.mark.parametrize("type_name", [name for name in WEIGHT_TYPES if name not in ("f16", "f32")])
def test_each_row_is_quantized_by_itself(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_name: str
) -> None:
    """However a tensor is cut: pieces that end within an expert, calls of one row and of all. One expert is idle."""
    name = "blk.1.ffn_down_exps.weight"
    imatrix = imatrix_of(mixture, tmp_path / "imatrix.gguf", idle={name: (7,)})
    plan = plan_of(mixture, {**dict.fromkeys(matrices(mixture), "f16"), name: type_name}, imatrix=imatrix)
    truth = llama_cpps(mixture, tmp_path / "truth.gguf", plan, imatrix)
    for i, (slab_rows, chunk_rows) in enumerate([(1 << 20, 1 << 20), (300, 100), (7, 1)]):
        if slab_rows == 7 and type_name.startswith("iq"):
            continue  # slow, and no other code than that of 100 rows
        monkeypatch.setattr(chunks, "_SLAB_WEIGHTS", 256 * slab_rows)
        monkeypatch.setattr(chunks, "_CHUNK_WEIGHTS", (256 * chunk_rows, 256 * chunk_rows))
        make_variant(mixture, tmp_path / f"{i}.gguf", plan, imatrix, n_threads=2)
        assert (tmp_path / f"{i}.gguf").read_bytes() == truth, (slab_rows, chunk_rows)


@pytest.mark.parametrize("type_name", ["bf16", "f32"])
def test_other_references_equal_llama_cpps(dense: Path, tmp_path: Path, type_name: str) -> None:
    source = tmp_path / "source.gguf"
    quantize(dense, source, type_name, overrides={}, imatrix={}, n_threads=1)
    for target in ("f16", "f32", "bf16", "q4_k", "iq4_xs", "q2_0"):
        plan = plan_of(source, dict.fromkeys(matrices(source), target), "q4_k_m")
        truth = llama_cpps(source, tmp_path / "truth.gguf", plan, None)
        make_variant(source, tmp_path / "ours.gguf", plan, None, n_threads=2)
        assert (tmp_path / "ours.gguf").read_bytes() == truth, target


def test_parts_become_one_file_in_llama_cpps_order(tmp_path: Path) -> None:
    """Twelve blocks, so that blk.10 is not in front of blk.2, and keys that belong to the parts."""
    whole = gguf.GGUFReader(write_tiny_llama(tmp_path / "whole.gguf", n_layers=12, n_ff=256))
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama", split_max_tensors=40)
    for field in whole.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reversed(whole.tensors):
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) == 3
    plan = plan_of(parts[0], dict.fromkeys(matrices(parts[0]), "q4_0"), "q4_0")
    truth = llama_cpps(parts[0], tmp_path / "truth.gguf", plan, None)
    make_variant(parts[0], tmp_path / "ours.gguf", plan, None, n_threads=2)
    assert (tmp_path / "ours.gguf").read_bytes() == truth
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors]
    assert names.index("blk.2.ffn_up.weight") < names.index("blk.10.ffn_up.weight")


def test_progress_goes_from_0_to_1_by_what_types_cost(dense: Path, tmp_path: Path) -> None:
    told: list[float] = []
    types = {**dict.fromkeys(matrices(dense), "q8_0"), "output.weight": "iq4_xs"}
    plan = plan_of(dense, types)
    make_variant(dense, tmp_path / "ours.gguf", plan, None, n_threads=1, on_progress=told.append)
    assert told == sorted(told) and told[0] > 0 and told[-1] == pytest.approx(1)
    # output.weight: 310 of 2,924 rows of 256 weights, at 11 instead of 400 million weights a second
    rows = {t.name: t.n_weights / 256 for t in plan.tensors if t.quantizable}
    slow, fast = rows["output.weight"] / 11, (sum(rows.values()) - rows["output.weight"]) / 400
    share = slow / (slow + fast)
    assert max(b - a for a, b in zip([0.0, *told], told, strict=False)) == pytest.approx(share, rel=0.02)


def test_data_that_are_no_numbers_are_llama_cpps_error(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", n_layers=1, poison="blk.0.ffn_up.weight")
    plan = plan_of(model, dict.fromkeys(matrices(model), "q4_0"))
    with pytest.raises(EngineError, match=r"tensor 'blk\.0\.ffn_up\.weight' has invalid data"):
        llama_cpps(model, tmp_path / "truth.gguf", plan, None)
    with pytest.raises(EngineError, match=r"tensor 'blk\.0\.ffn_up\.weight' has invalid data"):
        make_variant(model, tmp_path / "ours.gguf", plan, None, n_threads=2)
    kept = plan_of(model, {})  # a tensor that is only copied is looked at too
    with pytest.raises(EngineError, match="has invalid data"):
        make_variant(model, tmp_path / "ours.gguf", kept, None, n_threads=2)


def test_an_imatrix_that_is_missing_or_of_another_width_is_an_error(dense: Path, tmp_path: Path) -> None:
    plan = plan_of(dense, {"blk.0.ffn_down.weight": "iq2_xs"})
    with pytest.raises(EngineError, match=r"blk\.0\.ffn_down\.weight .*requires an imatrix"):
        make_variant(dense, tmp_path / "ours.gguf", plan, None, n_threads=1)
    wrong = {"blk.0.ffn_down.weight": Activations(np.ones((1, 256), np.float32), np.ones(1, np.float32))}
    write_imatrix(tmp_path / "wrong.gguf", wrong, dataset="x", n_windows=1, window_tokens=16)
    with pytest.raises(EngineError, match="imatrix size 256 is different from tensor size"):
        make_variant(dense, tmp_path / "ours.gguf", plan, tmp_path / "wrong.gguf", n_threads=1)
    plan = plan_of(dense, {"output.weight": "iq2_xs"})  # llama.cpp lets it pass, and ggml aborts the process
    with pytest.raises(EngineError, match=r"output\.weight"):
        make_variant(dense, tmp_path / "ours.gguf", plan, None, n_threads=1)


def test_a_source_that_was_cut_meanwhile_is_an_error(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(dense.read_bytes())
    plan = plan_of(model, dict.fromkeys(matrices(model), "q4_0"))
    real = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args, **kwargs: real(*args, **kwargs)[:-1])
    with pytest.raises(EngineError, match="changed while it was read"):
        make_variant(model, tmp_path / "ours.gguf", plan, None, n_threads=2)
