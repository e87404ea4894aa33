"""The engine against independent truths: ggml's own tables, llama.cpp's own choices, numpy, a published figure."""

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from tiny_model import close, random_text, write_tiny_llama

from harness.engine import model as engine
from harness.engine.collect import collect_activations
from harness.engine.gguf_file import broken_tensor, read_header
from harness.engine.native import ggml
from harness.engine.quantize import dry_run, quantize, standard_types
from harness.errors import EngineError
from harness.ggml_types import FILE_TYPES, GGML_TYPES, fit_type, tensor_bytes
from harness.imatrix import read_imatrix, write_imatrix


def test_tensor_types_are_ggmls() -> None:
    in_ggml = {}
    for number in range(llama_cpp.GGML_TYPE_COUNT):
        name = ggml.ggml_type_name(number)
        if name and ggml.ggml_blck_size(number) > 0:
            in_ggml[name.decode().lower()] = (number, ggml.ggml_blck_size(number), ggml.ggml_type_size(number))
    # q8_1 and q8_k exist only while ggml multiplies; no file holds them.
    assert {name: tuple(known) for name, known in GGML_TYPES.items()} == {
        name: found for name, found in in_ggml.items() if name not in ("q8_1", "q8_k")
    }


def test_file_types_are_all_that_llama_model_quantize_accepts(tiny_gguf: Path) -> None:
    named = {
        name.removeprefix("LLAMA_FTYPE_MOSTLY_").removeprefix("LLAMA_FTYPE_ALL_").lower(): value
        for name, value in vars(llama_cpp).items()
        if name.startswith(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")) and isinstance(value, int)
    }
    accepted = {}
    for number in range(64):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.dry_run = number, True
        if llama_cpp.llama_model_quantize(bytes(tiny_gguf), b"/nowhere.gguf", params) == 0:
            accepted[number] = next((name for name, value in named.items() if value == number), None)
    assert {number: name for name, number in FILE_TYPES.items()} == accepted


@pytest.mark.parametrize("width", [192, 256, 288])
def test_fallbacks_are_llama_cpps(tmp_path: Path, width: int) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", n_layers=1, n_embd=width, n_ff=256, n_heads=3 if width == 192 else 4)
    for file_type in ("iq1_m", "iq2_xs", "iq3_s", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "tq1_0", "iq4_nl"):
        run = standard_types(path, [file_type], has_imatrix=True)[file_type]
        shapes = {t.name: t.shape for t in read_header(path).tensors}
        for name, asked in run.asked.items():
            assert fit_type(asked, shapes[name][0]) == run.final[name], (file_type, name)
        assert bool(run.asked) == (width != 256)


def test_dry_run_knows_what_is_never_quantized(tiny_gguf: Path) -> None:
    final = standard_types(tiny_gguf, ["iq2_s", "f16"], has_imatrix=True)
    matrices = {t.name for t in read_header(tiny_gguf).tensors if len(t.shape) == 2}
    assert set(final["iq2_s"].final) == set(final["f16"].final) == matrices
    assert set(final["f16"].final.values()) == {"f16"}


def test_an_imatrix_changes_the_mixture(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", n_layers=8)
    name = "blk.0.ffn_down.weight"
    assert dry_run(path, "q4_0", has_imatrix=False).final[name] == "q4_0"
    assert dry_run(path, "q4_0", has_imatrix=True).final[name] == "q4_1"


@pytest.mark.parametrize("type_name", ["f32", "q8_0", "q4_k", "iq4_xs", "iq3_s", "tq2_0", "mxfp4"])
def test_overrides_reach_every_tensor(tiny_gguf: Path, tmp_path: Path, type_name: str) -> None:
    final = standard_types(tiny_gguf, ["q4_0"], has_imatrix=False)["q4_0"].final
    target = tmp_path / "out.gguf"
    quantize(
        tiny_gguf,
        target,
        "q4_0",
        overrides=dict.fromkeys(final, type_name),
        imatrix={},
        n_threads=2,
    )
    written = {t.name: t for t in read_header(target).tensors}
    assert {written[name].type for name in final} == {type_name}
    assert all(t.n_bytes == tensor_bytes(t.type, t.shape) for t in written.values())
    # ... and another reader, the gguf package, sees the same types
    other = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(target).tensors}
    assert other == {name: t.type for name, t in written.items()}


def test_a_low_bit_type_without_imatrix_is_an_error_with_llama_cpps_reason(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="requires an imatrix"):
        quantize(tiny_gguf, tmp_path / "out.gguf", "iq2_xs", overrides={}, imatrix={}, n_threads=1)


def test_activations_of_the_first_layer_equal_numpy(tiny_gguf: Path) -> None:
    tokens, bos = engine.tokenize(tiny_gguf, random_text(200, seed=5))
    assert bos == 1 and tokens[0] == 1
    windows = tokens[:128].reshape(2, 64)
    found = collect_activations(tiny_gguf, windows, flash_attention=True, n_threads=2)
    stored = {t.name: np.array(t.data, np.float64) for t in gguf.GGUFReader(tiny_gguf).tensors}
    x = stored["token_embd.weight"][windows.ravel()]
    normed = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * stored["blk.0.attn_norm.weight"]
    for role in ("attn_q", "attn_k", "attn_v"):
        entry = found[f"blk.0.{role}.weight"]
        assert entry.counts.tolist() == [128]
        np.testing.assert_allclose(entry.sums[0], (normed**2).sum(0), rtol=2e-3)
    matrices = {t.name for t in read_header(tiny_gguf).tensors if len(t.shape) == 2 and t.name.startswith("blk.")}
    assert set(found) == matrices
    # The last layer sees every position too: llama.cpp would drop rows that nobody asked the logits of.
    assert found["blk.3.ffn_down.weight"].counts.tolist() == [128]


def test_activations_of_experts_are_those_of_the_router(tmp_path: Path) -> None:
    """Every token goes to n_used experts, and they see what the router sees: the experts' sums add up to it."""
    path = write_tiny_llama(tmp_path / "moe.gguf", n_layers=2, n_experts=4, n_experts_used=2)
    windows = engine.tokenize(path, random_text(200, seed=5))[0][:128].reshape(2, 64)
    found = collect_activations(path, windows, flash_attention=True, n_threads=2)
    for layer in range(2):
        router = found[f"blk.{layer}.ffn_gate_inp.weight"]
        for role in ("ffn_gate_exps", "ffn_up_exps"):
            experts = found[f"blk.{layer}.{role}.weight"]
            assert experts.sums.shape == (4, 256) and experts.counts.sum() == 2 * 128
            np.testing.assert_allclose(experts.sums.sum(0), 2 * router.sums[0], rtol=1e-4)
        down = found[f"blk.{layer}.ffn_down_exps.weight"]
        assert down.sums.shape == (4, 512) and down.counts.tolist() == experts.counts.tolist()
    target = tmp_path / "moe-iq2_xs.gguf"
    write_imatrix(tmp_path / "imatrix.gguf", found, dataset="words", n_windows=2, window_tokens=64)
    weights = read_imatrix(tmp_path / "imatrix.gguf").weights
    final = standard_types(path, ["iq2_xs"], has_imatrix=True)["iq2_xs"].final
    quantize(path, target, "iq2_xs", overrides=final, imatrix=weights, n_threads=2)
    assert {t.name: t.type for t in read_header(target).tensors if t.name in final} == final


def test_imatrix_survives_writing_and_reading(tiny_gguf: Path, tmp_path: Path) -> None:
    windows = engine.tokenize(tiny_gguf, random_text(200, seed=5))[0][:128].reshape(2, 64)
    found = collect_activations(tiny_gguf, windows, flash_attention=True, n_threads=2)
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, found, dataset="words", n_windows=2, window_tokens=64)
    weights = read_imatrix(path).weights
    for name, entry in found.items():
        np.testing.assert_allclose(weights[name], entry.sums[0] / 128, rtol=1e-6)
    fields = gguf.GGUFReader(path).fields
    assert fields["general.type"].contents() == "imatrix"
    assert (fields["imatrix.chunk_count"].contents(), fields["imatrix.chunk_size"].contents()) == (2, 64)


def test_nan_weights_are_an_error_not_a_number(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", poison="blk.1.ffn_up.weight")
    windows = np.arange(3, 131, dtype=np.int32).reshape(2, 64)
    with pytest.raises(EngineError, match="not finite"):
        collect_activations(path, windows, flash_attention=True, n_threads=1)


@pytest.mark.parametrize(
    ("kind", "word", "finite"),
    [
        *(("F16", 0x7BFF, True), ("F16", 0x0001, True), ("F16", 0x7C00, False), ("F16", 0xFE01, False)),
        *(("BF16", 0x7F7F, True), ("BF16", 0xFF80, False), ("BF16", 0x7FC0, False)),
        *(("F32", 0x7F7FFFFF, True), ("F32", 0xFF800000, False), ("F32", 0x7F800001, False)),
    ],
)
def test_a_broken_tensor_is_found(tmp_path: Path, kind: str, word: int, finite: bool) -> None:
    """The largest and smallest numbers, infinities and NaN of each type, as the last weight of the last tensor."""
    width = np.uint32 if kind == "F32" else np.uint16
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in ("sound", "broken"):
        words = np.zeros((2, 32), width)
        words[-1, -1] = word if name == "broken" else 0
        writer.add_tensor(name, words.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind])
    close(writer)
    assert broken_tensor(tmp_path / "m.gguf") == (None if finite else "broken")


def test_decoding_by_micro_batches_gives_the_logits_of_one_batch(tiny_gguf: Path) -> None:
    window = np.arange(3, 131, dtype=np.int32)
    wanted = np.zeros(128, bool)
    wanted[60:127] = True
    results = []
    for ubatch_tokens in (32, 128):
        with (
            engine.open_model(tiny_gguf) as model,
            engine.open_context(
                model, n_ctx=128, ubatch_tokens=ubatch_tokens, flash_attention=True, n_threads=2
            ) as context,
        ):
            size = engine.n_vocab(model)
            steps = engine.decode_window(context, window, wanted, size, ubatch_tokens)
            pieces = [(first, logits.copy()) for first, logits, _ in steps]
            results.append(np.concatenate([logits for _, logits in pieces]))
            starts = [first for first, logits in pieces if len(logits)]
            assert starts == ([60, 64, 96] if ubatch_tokens == 32 else [60])
    assert results[0].shape == (67, size)
    np.testing.assert_allclose(results[0], results[1], atol=2e-2, rtol=1e-2)
