"""Every family of tests/tiny_architectures.py the whole way, against llama.cpp, gguf's reader and numpy."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import yaml

from harness import measure, plan_checks
from harness.engine import hidden
from harness.engine import model as engine
from harness.engine.gguf_file import read_header
from harness.engine.load_check import check_load
from harness.engine.quantize import DryRun, quantize, standard_types
from harness.errors import EngineError
from harness.header import GgufInfo
from harness.imatrix import make_imatrix, read_imatrix
from harness.plan import Plan, make_plan, padded, placebo_plan
from harness.policy import Rule, parse_rules
from harness.quantize import make_variant
from harness.record import read_records
from harness.store import Cache
from tests.tiny_architectures import FAMILIES, Family, deepseek2, gemma2, gpt2, llama, qwen2moe, t5, write_family
from tests.tiny_model import N_VOCAB

Cli = Callable[..., tuple[int, str, str]]
POLICIES = Path(__file__).resolve().parent.parent / "conf" / "policy"
FIRST_SCORED = 65
WINDOWS = np.random.default_rng(1).integers(3, N_VOCAB, (2, 128)).astype(np.int32)
CALIBRATION = np.random.default_rng(2).integers(3, N_VOCAB, (2, 128)).astype(np.int32)


@dataclass(frozen=True)
class Expected:
    """By hand, for IQ1_M. ends, middle: blocks whose ffn_down gets IQ3_S and IQ2_XXS from dynamicgate. attention: types
    by role with dynamicgate_attention. embeddings: type with both. fits: the widths take the types asked for."""

    ends: set[int]
    middle: set[int]
    attention: dict[str, set[str]]
    embeddings: str = "q5_k"
    fits: bool = True


DENSE = {"attn_v": {"iq3_xxs"}, "attn_output": {"iq3_xxs"}}
MIXTURE = {role: {"iq4_xs"} for role in ("attn_q", "attn_k", "attn_v", "attn_output")}
EXPECTED = {
    "llama-gqa": Expected({0, 3}, {1, 2}, {"attn_v": {"iq4_xs"}, "attn_output": {"iq3_xxs"}}),
    "llama-tied": Expected({0, 3}, {1, 2}, DENSE),
    # Rows of 288 and 416 take blocks of 32, those of 272 and 400 take none.
    "llama-288": Expected(set(), set(), {"attn_v": {"iq4_nl"}, "attn_output": {"iq4_nl"}}, "q5_1", fits=False),
    "llama-272": Expected(set(), set(), {"attn_v": {"f16"}, "attn_output": {"f16"}}, "f16", fits=False),
    "qwen2moe": Expected(set(), set(), MIXTURE),  # ffn_down_exps and ffn_down_shexp are other roles than ffn_down
    "deepseek2": Expected({0}, set(), {"attn_output": {"iq4_xs"}}),  # one ffn_down: 3 * 1 // 4 = 0, the last quarter
    # Seven of eight blocks have an ffn_down: 7 // 4 = 1 and 21 // 4 = 5, so 1 + 4 + 2. Of eight, block 1 were an end.
    "deci": Expected({0, 6, 7}, {1, 2, 3, 5}, {"attn_v": {"iq4_xs"}, "attn_output": {"iq3_xxs"}}),
    "falcon-h1": Expected({0, 3}, {1, 2}, DENSE),
    "lfm2": Expected({0, 4, 5}, {1, 2, 3}, DENSE),  # 6 // 4 = 1 and 18 // 4 = 4
    "mamba": Expected(set(), set(), {}),
    "gpt2": Expected({0, 3}, {1, 2}, {"attn_output": {"iq3_xxs"}}),  # attn_qkv is no role of the policy
    "gemma2": Expected({0, 3}, {1, 2}, DENSE),
}


@dataclass(frozen=True)
class Made:
    """A family's file, what its header says, llama.cpp's types for IQ1_M, and an imatrix."""

    family: Family
    path: Path
    info: GgufInfo
    standard: DryRun
    imatrix: Path
    cache: Cache

    @property
    def expected(self) -> Expected:
        return EXPECTED[self.family.name]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp(request.param.name)
    path, imatrix = write_family(request.param, folder / "f16.gguf"), folder / "imatrix.gguf"
    make_imatrix(path, CALIBRATION, imatrix, dataset="random", flash_attention=True, n_threads=1)
    standard = standard_types(path, ["iq1_m"], has_imatrix=True)["iq1_m"]
    yield Made(request.param, path, read_header(path), standard, imatrix, Cache(folder / "cache"))


def plan_of(made: Made, policy: str | None) -> Plan:
    return make_plan(
        quant="iq1_m",
        mode="dynamicgate" if policy else "standard",
        policy=policy,
        file_type="iq1_m",
        tensors=made.info.tensors,
        header_bytes=padded(made.info.quantized_header_bytes),
        standard_final=made.standard.final,
        standard_asked=made.standard.asked,
        rules=rules_of(policy) if policy else (),
        metadata=made.info.metadata,
    )


@cache
def rules_of(policy: str) -> tuple[Rule, ...]:
    return parse_rules(yaml.safe_load((POLICIES / f"{policy}.yaml").read_text())["rules"], policy)


def nll_of(made: Made, path: Path, *, is_reference: bool = False) -> np.ndarray:
    """Per-token nll as the harness measures it: both windows in one context, 64 tokens at a time."""
    folder = made.cache.folder
    scores = measure.score(
        path,
        WINDOWS,
        folder / "scores" / path.stem,
        folder / "probabilities",
        made.cache,
        is_reference=is_reference,
        first_scored=FIRST_SCORED,
        ubatch_tokens=64,
        flash_attention=True,
        n_threads=1,
    )
    if not is_reference:
        # Where no type fits, all matrices fall back to F16: the same model but for rounding, which has either sign.
        rounding_alone = made.expected.embeddings == "f16"
        assert scores.kld is not None and scores.kld.mean() > (-1e-6 if rounding_alone else 1e-6)
    return scores.nll


def naive_nll(path: Path) -> np.ndarray:
    """The same by llama-cpp-python's own class, each window in a fresh one, and a float64 softmax."""
    rows = []
    for window in WINDOWS:
        n = len(window)
        llama = llama_cpp.Llama(
            str(path), n_ctx=n, n_batch=n, n_ubatch=64, n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=True
        )
        llama.eval(window.tolist())
        logits = np.array(llama.scores[:n], np.float64)
        llama.close()
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        rows.append([-log_p[i - 1, window[i]] for i in range(FIRST_SCORED, n)])
    return np.array(rows)


def test_every_family_has_an_expectation() -> None:
    assert [family.name for family in FAMILIES] == list(EXPECTED)


def test_llama_cpp_knows_every_tensor_and_scores_the_reference(made: Made) -> None:
    check = check_load(made.path, tuple(t.name for t in made.info.tensors))
    assert check.unknown == () and check.refusal is None
    nll = nll_of(made, made.path, is_reference=True)
    assert np.isfinite(np.exp(nll.mean()))
    np.testing.assert_allclose(nll, naive_nll(made.path), rtol=0, atol=2e-5)


@pytest.mark.parametrize("policy", [None, "dynamicgate", "dynamicgate_attention"])
def test_written_file_is_the_planned_one_and_scores(made: Made, tmp_path: Path, policy: str | None) -> None:
    plan = plan_of(made, policy)
    target = tmp_path / f"{policy}.gguf"
    make_variant(made.path, target, plan, made.imatrix, n_threads=1)
    written = {t.name: (t.tensor_type.name.lower(), int(t.n_bytes)) for t in gguf.GGUFReader(target).tensors}
    assert written == {t.name: (t.type, t.n_bytes) for t in plan.tensors}
    assert target.stat().st_size == plan.file_bytes
    truth, weights = tmp_path / "truth.gguf", read_imatrix(made.imatrix).weights
    quantize(made.path, truth, "iq1_m", overrides=plan.overrides, imatrix=weights, n_threads=2)
    assert target.read_bytes() == truth.read_bytes(), "llama_model_quantize makes the same file"
    nll_of(made, made.path, is_reference=True)
    nll = nll_of(made, target)
    assert np.isfinite(np.exp(nll.mean()))
    np.testing.assert_allclose(nll, naive_nll(target), rtol=0, atol=2e-5)


def test_quarters_count_real_layers(made: Made) -> None:
    plan = plan_of(made, "dynamicgate")
    types = {t.layer: t.type for t in plan.tensors if t.role == "ffn_down"}
    expected = made.expected
    assert plan.type_of("token_embd.weight") == expected.embeddings
    if expected.fits:
        assert {layer for layer, given in types.items() if given == "iq3_s"} == expected.ends
        assert {layer for layer, given in types.items() if given == "iq2_xxs"} == expected.middle
        assert len(types) == len(expected.ends | expected.middle)
    else:
        assert set(types.values()) == expected.attention["attn_v"]
    placebo = placebo_plan(plan, None)
    assert placebo.file_bytes == plan.file_bytes
    assert sorted(t.type for t in placebo.tensors) == sorted(t.type for t in plan.tensors)
    named = {"ffn_down", "token_embd", "output"}
    assert all(t.type == t.standard_type for t in plan.tensors if t.role not in named)


def test_attention_rules_see_heads_and_experts(made: Made) -> None:
    plan = plan_of(made, "dynamicgate_attention")
    for role, types in made.expected.attention.items():
        assert {t.type for t in plan.tensors if t.role == role} == types, role
    ruled = {t.role for t in plan.tensors if t.rule.startswith("attn") or t.rule == "attention_of_mixtures"}
    assert ruled == set(made.expected.attention)


def test_imatrix_has_every_matrix_of_the_blocks(made: Made) -> None:
    imatrix = read_imatrix(made.imatrix)
    quantized = {name for name in made.standard.final if name.startswith("blk.")}
    assert quantized <= set(imatrix.weights)
    counts = {t.name: t.data.ravel() for t in gguf.GGUFReader(made.imatrix).tensors if t.name.endswith(".counts")}
    used = made.info.metadata.get(f"{made.family.architecture}.expert_used_count", 1)
    for name in quantized:
        n = counts[f"{name}.counts"].sum()
        assert n == (used * CALIBRATION.size if "_exps" in name else CALIBRATION.size), name
    for name, experts in imatrix.idle.items():  # 1.0, as llama-quantize has it
        assert (imatrix.weights[name].reshape(8, -1)[list(experts)] == 1.0).all()
    shunned = {f"blk.1.ffn_{x}_exps.weight": (7,) for x in ("gate", "up", "down")}
    assert imatrix.idle == (shunned if made.family.name == "qwen2moe" else {})


def test_layers_that_can_be_compared(made: Made) -> None:
    states = hidden.hidden_states(
        made.path, WINDOWS[0], first_scored=FIRST_SCORED, ubatch_tokens=64, flash_attention=True, n_threads=1
    )
    nothing = {4} if made.family.name == "deci" else set()  # the block of nothing has no output
    assert set(states) == set(range(made.family.keys["block_count"])) - nothing
    assert {rows.shape for rows in states.values()} == {(128 - FIRST_SCORED, made.family.keys["embedding_length"])}


def test_layers_without_a_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "_LAYER_OUTPUT", re.compile("as in deepseek4"))
    path = write_family(llama("m", tied=True), tmp_path / "m.gguf")
    with pytest.raises(EngineError, match=r"no layer outputs .* measure.layers=false"):
        hidden.hidden_states(
            path, WINDOWS[0], first_scored=FIRST_SCORED, ubatch_tokens=64, flash_attention=True, n_threads=1
        )


@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_flash_attention_keeps_soft_caps(tmp_path: Path, cap: float) -> None:
    family = gemma2()
    path = write_family(replace(family, keys={**family.keys, "attn_logit_softcapping": cap}), tmp_path / "m.gguf")
    without = write_family(replace(family, keys={**family.keys, "attn_logit_softcapping": 1e4}), tmp_path / "n.gguf")
    plain = _logits(path, flash_attention=False)
    assert abs(plain).max() < 2.0, "the final cap"
    assert abs(_logits(path, flash_attention=True) - plain).max() < 0.05
    moved = abs(_logits(without, flash_attention=False) - plain).max()
    assert moved > 0.2 if cap < 1 else moved < 0.05


def _logits(path: Path, *, flash_attention: bool) -> np.ndarray:
    n = WINDOWS.shape[1]
    with (
        engine.open_model(path) as model,
        engine.open_context(model, n_ctx=n, ubatch_tokens=n, flash_attention=flash_attention, n_threads=1) as context,
    ):
        ((_, logits, _),) = engine.decode_window(context, WINDOWS[0], np.ones(n, bool), N_VOCAB, n)
        return logits.copy()


# --- what cannot be scored


ODD = "blk.1.ffn_odd.weight"


def with_odd_tensor(tmp_path: Path) -> Path:
    family = llama("odd", tied=False)
    return write_family(replace(family, shapes={**family.shapes, ODD: (256, 256)}), tmp_path / "odd.gguf")


def test_unknown_tensors_keep_the_standard_type(tmp_path: Path) -> None:
    path = with_odd_tensor(tmp_path)
    info = read_header(path)
    check = check_load(path, tuple(t.name for t in info.tensors))
    assert check.unknown == (ODD,) and "wrong number of tensors" in str(check.refusal)
    standard = standard_types(path, ["q4_0"], has_imatrix=False)["q4_0"]
    made = make_plan(
        quant="q4_0",
        mode="dynamicgate",
        policy="all",
        file_type="q4_0",
        tensors=info.tensors,
        header_bytes=padded(info.quantized_header_bytes),
        standard_final=standard.final,
        standard_asked=standard.asked,
        rules=(Rule("all", "q8_0"),),
        metadata=info.metadata,
        unknown=check.unknown,
    )
    assert {t.name for t in made.quantizable if t.type != "q8_0"} == {ODD}
    assert made.type_of(ODD) == "q4_0"
    assert ODD in next(f.what for f in plan_checks.plan_findings(made) if f.kind == "unknown_tensors")
    make_variant(path, tmp_path / "out.gguf", made, None, n_threads=1)  # llama.cpp quantizes what it cannot load


def test_unknown_tensors_are_shown_by_plan_and_refused_by_sweep(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path
) -> None:
    path = with_odd_tensor(tmp_path)
    overrides = [one for one in tiny_overrides if not one.startswith("model.path")] + [f"model.path={path}"]
    code, out, err = cli("plan", "quant=q4_0", *overrides)
    assert code == 0 and f"this llama.cpp does not know 1 tensor of the model ({ODD} ...)" in out, err
    code, _, err = cli("sweep", "quant=q4_0", *overrides)
    assert code == 2 and "wrong number of tensors" in err and ODD in err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (replace(llama("a", tied=True), architecture="frobnicate"), "unknown model architecture: 'frobnicate'"),
        (replace(gemma2(), keys={**gemma2().keys, "attention.causal": False}), "not causal"),
        (t5(), "an encoder"),
        (replace(gpt2(), shapes={k: v for k, v in gpt2().shapes.items() if k != "position_embd.weight"}), "not found"),
    ],
    ids=["unknown", "not causal", "encoder", "missing tensor"],
)
def test_models_that_cannot_be_scored(tmp_path: Path, family: Family, reason: str) -> None:
    path = write_family(family, tmp_path / "m.gguf")
    check = check_load(path, tuple(family.shapes))
    assert reason in str(check.refusal) and check.unknown == ()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "a causal attn = 0 model, causal attn = 1",
        "x\nprint_info: causal attn           = 0\nprint_info: causal attn           = 1",
        "model has unused tensor blk.0.attn_q.weight (size = 1 bytes) -- ignoring",
    ],
    ids=["causal", "causal on a line", "unused"],
)
def test_a_name_that_reads_like_the_log(tmp_path: Path, name: str, causal: bool) -> None:
    family = replace(gemma2(), keys={**gemma2().keys, "attention.causal": causal})
    check = check_load(write_family(family, tmp_path / "m.gguf", name), tuple(family.shapes))
    assert (check.refusal is None) == causal
    assert check.idle == ()


def test_blocks_for_multi_token_prediction(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    """llama.cpp quantizes them and does not run them: no imatrix data, so no type that needs some."""
    path = write_family(deepseek2(mtp=True), tmp_path / "mtp.gguf")
    check = check_load(path, tuple(t.name for t in read_header(path).tensors))
    assert check.refusal is None and check.unknown == ()
    assert set(check.idle) == {t.name for t in read_header(path).tensors if t.name.startswith("blk.2.")}
    overrides = [one for one in tiny_overrides if not one.startswith("model.path")] + [f"model.path={path}"]
    code, _, err = cli("sweep", "quant=iq1_m", *overrides)
    assert code == 2 and "needs imatrix data for blk.2." in err


def test_idle_experts_are_reported(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    path = write_family(qwen2moe(), tmp_path / "moe.gguf")
    overrides = [one for one in tiny_overrides if not one.startswith("model.path")] + [f"model.path={path}"]
    code, out, err = cli("sweep", "quant=q4_0", "mode=standard", *overrides)
    assert code == 0, err
    records = read_records(tmp_path / "results" / "tiny")
    (finding,) = (f for r in records for f in r.data["findings"] if f["kind"] == "idle_experts")
    assert "of 48 matrices of experts" in finding["what"] and "blk." in finding["what"]
    assert "idle_experts" in out
