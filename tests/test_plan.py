"""Plans of models that are lists in this file: types, fallbacks and bytes worked out by hand."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from harness import plan_checks
from harness.errors import UserError
from harness.ggml_types import GGML_TYPES, fit_type, tensor_bytes
from harness.header import TensorInfo
from harness.idle_rules import Idle
from harness.ladders import Bump, Ends
from harness.plan import (
    STANDARD_RULE,
    Plan,
    TensorPlan,
    expert_count,
    gqa_factor,
    make_plan,
    padded,
    reference_plan,
    role_and_layer,
)
from harness.policy import Rule

LLAMA = {"general.architecture": "llama"}
ENDS_AND_MIDDLE = (
    Rule("ends", "iq3_s", roles=("ffn_down",), depth=(((0, 1), (1, 4)), ((3, 4), (1, 1)))),
    Rule("middle", "iq2_xxs", roles=("ffn_down",), depth=(((1, 4), (3, 4)),)),
)


def tensor(name: str, *shape: int, type_name: str = "f16") -> TensorInfo:
    """A tensor of the reference; `shape` has the row width first."""
    return TensorInfo(name, shape, type_name, tensor_bytes(type_name, shape))


def norm(name: str, width: int) -> TensorInfo:
    """A tensor that llama.cpp never quantizes."""
    return tensor(name, width, type_name="f32")


def plan(
    tensors: list[TensorInfo],
    *rules: Rule,
    standard: str | dict[str, str] = "iq1_m",
    asked: dict[str, str] | None = None,
    file_type: str = "iq1_m",
    metadata: dict[str, Any] | None = None,
    header_bytes: int = 1000,
) -> Plan:
    """A plan in which llama.cpp is willing to quantize whatever has two dimensions."""
    if isinstance(standard, str):
        standard = {t.name: standard for t in tensors if len(t.shape) > 1}
    return make_plan(
        quant=file_type,
        mode="dynamicgate",
        policy="p",
        file_type=file_type,
        tensors=tensors,
        header_bytes=header_bytes,
        standard_final=standard,
        standard_asked=asked or {},
        rules=rules,
        metadata=metadata or LLAMA,
    )


def everything(type_name: str) -> Rule:
    """A rule that gives all tensors one type."""
    return Rule("everything", type_name)


# --- fallback of widths that do not fit


@pytest.mark.parametrize(
    ("wanted", "width", "given"),
    [
        # 576 = 18 * 32 = 2.25 * 256: no type with blocks of 256 fits (SmolLM2-135M)
        ("iq1_s", 576, "iq4_nl"),
        ("iq1_m", 576, "iq4_nl"),
        ("iq2_xxs", 576, "iq4_nl"),
        ("iq2_xs", 576, "iq4_nl"),
        ("iq2_s", 576, "iq4_nl"),
        ("iq3_xxs", 576, "iq4_nl"),
        ("iq3_s", 576, "iq4_nl"),
        ("iq4_xs", 576, "iq4_nl"),
        ("q2_k", 576, "q4_0"),
        ("q3_k", 576, "q4_0"),
        ("tq1_0", 576, "q4_0"),
        ("tq2_0", 576, "q4_0"),
        ("q4_k", 576, "q5_0"),
        ("q5_k", 576, "q5_1"),
        ("q6_k", 576, "q8_0"),
        # blocks of 32 and 64 fit
        ("q4_0", 576, "q4_0"),
        ("q8_0", 576, "q8_0"),
        ("iq4_nl", 576, "iq4_nl"),
        ("q2_0", 576, "q2_0"),
        ("q2_0", 96, "q4_0"),
        # not even 32 fits
        ("q5_k", 80, "f16"),
        ("iq1_m", 80, "f16"),
        ("q2_0", 80, "f16"),
        ("q8_0", 80, "f16"),
        ("q4_0", 100, "f16"),
        ("iq4_nl", 1, "f16"),
        # one block, and several
        ("q5_k", 256, "q5_k"),
        ("iq1_m", 1536, "iq1_m"),
        ("q1_0", 384, "q1_0"),
        ("f16", 577, "f16"),
        ("bf16", 1, "bf16"),
        ("f32", 3, "f32"),
    ],
)
def test_type_that_a_width_gets(wanted: str, width: int, given: str) -> None:
    assert fit_type(wanted, width) == given
    (planned,) = plan([tensor("blk.0.ffn_up.weight", width, 4)], everything(wanted)).tensors
    assert (planned.asked, planned.type) == (wanted, given)
    assert planned.fell_back == (wanted != given)


@pytest.mark.parametrize(("wanted", "width"), [("q1_0", 576), ("nvfp4", 96), ("q1_0", 80)])
def test_a_rule_whose_type_cannot_be_had_is_refused(wanted: str, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width}.*{wanted}"):
        fit_type(wanted, width)
    fits, misfit = tensor("blk.0.ffn_up.weight", 768, 4), tensor("blk.0.ffn_down.weight", width, 4)
    with pytest.raises(UserError) as caught:
        plan([fits, misfit], Rule("my_rule", wanted))
    for word in ("policy p", "my_rule", "blk.0.ffn_down.weight", str(width), wanted):
        assert word in str(caught.value)


def test_a_rule_that_names_no_misfit_is_no_error() -> None:
    tensors = [tensor("blk.0.ffn_up.weight", 576, 4), tensor("blk.0.ffn_down.weight", 768, 4)]
    made = plan(tensors, Rule("a", "q1_0", roles=("ffn_down",)))
    assert [t.type for t in made.tensors] == ["iq1_m", "q1_0"]


def test_standard_types_come_from_llama_cpp_and_are_not_fitted_again() -> None:
    tensors = [tensor("token_embd.weight", 576, 10), tensor("blk.0.ffn_up.weight", 576, 10), norm("output_norm", 576)]
    made = plan(
        tensors,
        standard={"token_embd.weight": "q8_0", "blk.0.ffn_up.weight": "iq4_nl"},
        asked={"blk.0.ffn_up.weight": "iq1_m"},
    )
    embedding, up, kept = made.tensors
    assert (embedding.asked, embedding.type, embedding.rule, embedding.fell_back) == ("q8_0", "q8_0", "standard", False)
    assert (up.asked, up.type, up.standard_type, up.fell_back) == ("iq1_m", "iq4_nl", "iq4_nl", True)
    assert (kept.asked, kept.type, kept.quantizable, kept.fell_back) == ("f32", "f32", False, False)
    assert made.fell_back == (up,)
    assert made.share_of_weights(made.fell_back) == 5760 / (5760 + 5760 + 576)
    assert made.overrides == {"token_embd.weight": "q8_0", "blk.0.ffn_up.weight": "iq4_nl"}


def test_a_rule_replaces_what_the_standard_asked_for() -> None:
    up = tensor("blk.0.ffn_up.weight", 576, 10)
    (planned,) = plan([up], everything("q8_0"), standard={up.name: "iq4_nl"}, asked={up.name: "iq1_m"}).tensors
    assert (planned.asked, planned.type, planned.standard_type) == ("q8_0", "q8_0", "iq4_nl")
    assert not planned.fell_back
    assert planned.raised


def test_a_rule_never_names_a_tensor_that_llama_cpp_leaves_alone() -> None:
    made = plan([norm("blk.0.attn_norm.weight", 576), tensor("blk.0.ffn_up.weight", 256, 4)], everything("q4_k"))
    kept, quantized = made.tensors
    assert (kept.type, kept.rule, kept.quantizable) == ("f32", STANDARD_RULE, False)
    assert (quantized.type, quantized.rule, quantized.quantizable) == ("q4_k", "everything", True)
    assert made.quantizable == (quantized,)
    assert made.overrides == {"blk.0.ffn_up.weight": "q4_k"}


# --- lowered and raised


@pytest.mark.parametrize(
    ("standard", "given", "lowered", "raised"),
    [
        ("q8_0", "q5_k", True, False),  # 8.5 and 5.5 bits
        ("q5_k", "q8_0", False, True),
        ("q5_k", "q5_k", False, False),
        ("iq3_s", "q3_k", False, False),  # both 3.4375 bits: another type of the same size
        ("iq2_xxs", "tq2_0", False, False),  # both 2.0625
        ("iq2_xs", "iq2_xxs", True, False),
        ("iq1_s", "iq1_m", False, True),
        ("q4_k", "iq4_nl", False, False),  # both 4.5
        ("q4_1", "q4_k", True, False),
        ("f16", "bf16", False, False),
    ],
)
def test_lowered_and_raised_compare_bits(standard: str, given: str, lowered: bool, raised: bool) -> None:
    made = plan([tensor("blk.0.ffn_up.weight", 256, 2)], everything(given), standard=standard)
    assert (len(made.lowered), len(made.raised)) == (lowered, raised)


def test_lowered_is_told_by_the_type_after_the_fallback() -> None:
    """Q5_K asked for a width of 576 becomes Q5_1, 6 bits: below Q8_0, above Q5_0."""
    wide = tensor("token_embd.weight", 576, 2)
    assert plan([wide], everything("q5_k"), standard="q8_0").lowered[0].type == "q5_1"
    assert plan([wide], everything("q5_k"), standard="q5_0").raised[0].type == "q5_1"
    # iq2_xxs asked, iq4_nl given: more bits than q4_0's? both have 4.5
    same = plan([wide], everything("iq2_xxs"), standard="q4_0")
    assert not same.lowered
    assert not same.raised


# --- bytes


def test_bytes_by_hand() -> None:
    tensors = [
        tensor("token_embd.weight", 256, 100),  # q5_k: 100 blocks of 176 bytes = 17600 = 550 * 32
        tensor("blk.0.ffn_down.weight", 512, 3),  # iq1_m: 6 blocks of 56 bytes = 336, padded to 352
        tensor("blk.0.ffn_up_exps.weight", 256, 5, 3),  # iq2_xxs: 15 blocks of 66 bytes = 990, padded to 992
        norm("output_norm.weight", 9),  # 36 bytes, padded to 64
    ]
    made = plan(
        tensors,
        Rule("e", "q5_k", roles=("token_embd",)),
        Rule("x", "iq2_xxs", roles=("ffn_up_exps",)),
        header_bytes=4096,
    )
    assert [t.type for t in made.tensors] == ["q5_k", "iq1_m", "iq2_xxs", "f32"]
    assert [t.n_bytes for t in made.tensors] == [17600, 336, 990, 36]
    assert [t.n_weights for t in made.tensors] == [25600, 1536, 3840, 9]
    assert made.n_weights == 30985
    assert made.tensor_bytes == 18962
    assert made.file_bytes == 4096 + 17600 + 352 + 992 + 64
    assert made.bpw == 8 * 18962 / 30985


@pytest.mark.parametrize(("n_bytes", "room"), [(0, 0), (1, 32), (31, 32), (32, 32), (33, 64), (17600, 17600)])
def test_padding_to_thirty_two(n_bytes: int, room: int) -> None:
    assert padded(n_bytes) == room


@pytest.mark.parametrize(
    ("type_name", "bpw"),
    [("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5), ("iq1_s", 1.5625), ("iq1_m", 1.75), ("q6_k", 6.5625), ("q5_1", 6)],
)
def test_bits_per_weight(type_name: str, bpw: float) -> None:
    assert GGML_TYPES[type_name].bpw == bpw
    made = plan([tensor("blk.0.ffn_up.weight", 512, 7)], everything(type_name))
    assert made.bpw == bpw


def test_the_reference_as_a_plan() -> None:
    tensors = [tensor("token_embd.weight", 100, 3), norm("blk.1.attn_norm.weight", 10)]  # 600 and 40 bytes
    made = reference_plan(tensors, file_bytes=2000)
    assert made.file_bytes == 2000
    assert made.header_bytes == 2000 - 608 - 64
    assert made.file_type is None
    assert made.overrides == {}
    assert made.needs_imatrix == made.fell_back == made.lowered == made.raised == ()
    assert [(t.role, t.layer, t.type) for t in made.tensors] == [("token_embd", None, "f16"), ("attn_norm", 1, "f32")]
    assert made.type_of("token_embd.weight") == "f16"
    assert made.type_of("output.weight") is None
    assert made.bpw == 8 * 640 / 310


# --- positions


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("blk.3.ffn_down.weight", "ffn_down", 3),
        ("blk.12.ffn_down.bias", "ffn_down.bias", 12),
        ("blk.0.ffn_down_exps.weight", "ffn_down_exps", 0),
        ("token_embd.weight", "token_embd", None),
        ("output.weight", "output", None),
        ("rope_freqs.weight", "rope_freqs", None),
        ("enc.blk.0.ffn_down.weight", "enc.blk.0.ffn_down", None),
        ("blk.x.ffn_down.weight", "blk.x.ffn_down", None),
    ],
)
def test_role_and_layer(name: str, role: str, layer: int | None) -> None:
    assert role_and_layer(name) == (role, layer)


def down(*layers: int, width: int = 256) -> list[TensorInfo]:
    """ffn_down of these layers."""
    return [tensor(f"blk.{i}.ffn_down.weight", width, 4) for i in layers]


def types(made: Plan, role: str = "ffn_down") -> dict[int | None, str]:
    """Type by layer."""
    return {t.layer: t.type for t in made.tensors if t.role == role}


def test_positions_of_a_whole_model() -> None:
    made = plan(down(*range(8)), *ENDS_AND_MIDDLE)
    assert types(made) == {
        0: "iq3_s",
        1: "iq3_s",
        2: "iq2_xxs",
        3: "iq2_xxs",
        4: "iq2_xxs",
        5: "iq2_xxs",
        6: "iq3_s",
        7: "iq3_s",
    }


def test_positions_count_only_layers_that_have_the_tensor() -> None:
    """10 blocks, of which 0, 1, 4 and 5 lack ffn_down: six are left, 6 / 4 = 1 and 18 / 4 = 4, so 1 + 3 + 2."""
    tensors = [tensor(f"blk.{i}.attn_q.weight", 256, 4) for i in range(10)] + down(2, 3, 6, 7, 8, 9)
    made = plan(tensors, *ENDS_AND_MIDDLE)
    assert types(made) == {2: "iq3_s", 3: "iq2_xxs", 6: "iq2_xxs", 7: "iq2_xxs", 8: "iq3_s", 9: "iq3_s"}
    assert set(types(made, "attn_q").values()) == {"iq1_m"}


def test_positions_follow_the_layers_and_not_the_order_in_the_file() -> None:
    """As names sort: 0, 1, 10, 11, 2 ..."""
    layers = sorted(range(12), key=str)
    assert layers[2] == 10
    made = plan(down(*layers), *ENDS_AND_MIDDLE)
    assert {layer for layer, given in types(made).items() if given == "iq3_s"} == {0, 1, 2, 9, 10, 11}
    assert [t.layer for t in made.tensors] == layers, "the file's own order is kept"


def test_every_role_is_counted_by_itself() -> None:
    """Layers 0 to 3 are dense, 4 to 7 have experts: each kind has quarters of its own."""
    experts = [tensor(f"blk.{i}.ffn_down_exps.weight", 256, 4, 2) for i in range(4, 8)]
    rule = Rule("first", "q8_0", depth=(((0, 1), (1, 4)),))
    made = plan(down(0, 1, 2, 3) + experts, rule)
    assert [t.name for t in made.tensors if t.type == "q8_0"] == ["blk.0.ffn_down.weight", "blk.4.ffn_down_exps.weight"]


def test_a_bias_does_not_count_as_a_layer() -> None:
    biases = [norm(f"blk.{i}.ffn_down.bias", 256) for i in range(4)]
    rule = Rule("last", "q8_0", roles=("ffn_down",), depth=(((3, 4), (1, 1)),))
    made = plan(biases + down(0, 1, 2, 3), rule)
    assert [t.name for t in made.tensors if t.type == "q8_0"] == ["blk.3.ffn_down.weight"]


def test_rules_see_the_file_type_the_heads_and_the_experts() -> None:
    tensors = [tensor("blk.0.attn_v.weight", 256, 4)]
    metadata = {
        **LLAMA,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.expert_count": 8,
    }
    for rule, holds in [
        (Rule("a", "q8_0", min_gqa=4), True),
        (Rule("a", "q8_0", min_gqa=4.1), False),
        (Rule("a", "q8_0", min_experts=8, max_experts=8), True),
        (Rule("a", "q8_0", max_experts=7), False),
        (Rule("a", "q8_0", file_types=("iq1_m",)), True),
        (Rule("a", "q8_0", file_types=("iq1_s",)), False),
        (Rule("a", "q8_0", roles=("attn_v",)), True),
        (Rule("a", "q8_0", roles=("attn_v.weight",)), False),
    ]:
        assert (plan(tensors, rule, metadata=metadata).tensors[0].rule == "a") == holds, rule


def test_ends_go_by_the_block_s_own_number_and_the_model_s_last_block() -> None:
    """ffn_down in blocks 1, 3, 7 and 9 of 11: block 10 is at 10, so 3 and 7 lie between 2 and 8."""
    tensors = [tensor(f"blk.{i}.attn_q.weight", 256, 4) for i in range(11)] + down(1, 3, 7, 9)
    made = plan(tensors, Rule("ends", "q8_0", roles=("ffn_down",), ends=Ends(2, 8)))
    assert types(made) == {1: "q8_0", 3: "iq1_m", 7: "iq1_m", 9: "q8_0"}


# --- bumps

LADDERS = {"iq1_m": ("iq1_m", "iq2_s", "iq4_xs"), "q4_k_m": ("q4_k", "q5_k")}


def bump(name: str, steps: int, **conditions: Any) -> Rule:
    """A rule for dense models and mixtures alike."""
    return Rule(name, None, bump=Bump(steps, steps), ladders=LADDERS, **conditions)


def test_a_plan_shows_the_steps_of_every_rule() -> None:
    made = plan(down(0, 1, 2), bump("all", 1), bump("first", 1, ends=Ends(0, 10)))
    assert types(made) == {0: "iq4_xs", 1: "iq2_s", 2: "iq4_xs"}
    assert [t.rule for t in made.tensors] == ["all +1, first +1", "all +1", "all +1, first +1"]
    assert made.idle == Idle()


def test_a_bump_that_ends_below_llama_cpp_s_type_is_shown_as_lowered() -> None:
    """The ladder begins at the file type's base, here IQ1_M: +1 gives IQ2_S, 2.5625 bits, below Q4_K's 4.5."""
    made = plan(down(0), bump("all", 1), standard="q4_k")
    assert [t.type for t in made.lowered] == ["iq2_s"]
    (finding,) = (f for f in plan_checks.plan_findings(made) if f.kind == "lowered")
    assert finding.what.endswith("ffn_down Q4_K -> IQ2_S")


def test_a_bumped_type_falls_back_as_any_other() -> None:
    (planned,) = plan(down(0, width=576), bump("all", 1)).tensors
    assert (planned.asked, planned.type) == ("iq2_s", "iq4_nl")


def test_a_tensor_forced_to_f32() -> None:
    """Four bytes a weight, no imatrix needed, not lowered."""
    tensors = [tensor("blk.0.ssm_alpha.weight", 100, 2), tensor("blk.0.ssm_out.weight", 256, 2)]
    made = plan(tensors, bump("all", 1), Rule("forced", "f32", roles=("ssm_alpha",)))
    alpha, out = made.tensors
    assert (alpha.type, alpha.n_bytes, alpha.rule, alpha.fell_back) == ("f32", 800, "forced", False)
    assert (out.type, out.rule) == ("iq2_s", "all +1")
    assert made.needs_imatrix == ("blk.0.ssm_out.weight",)
    assert not made.lowered


# --- rules that decide nothing


def test_rules_that_decide_nothing_are_told_apart() -> None:
    tensors = [*down(0, 1), tensor("blk.0.attn_v.weight", 256, 4), norm("blk.0.attn_norm.weight", 256)]
    made = plan(
        tensors,
        Rule("used", "q8_0", roles=("ffn_down", "ffn_down_exps")),
        Rule("taken", "q4_k", roles=("ffn_down",)),
        Rule("no_layer", "q4_k", roles=("attn_v",), depth=(((1, 4), (1, 2)),)),
        Rule("never_quantized", "q4_k", roles=("attn_norm",)),
        Rule("misspelt", "q4_k", roles=("fnn_down",)),
        Rule("half_misspelt", "q5_k", roles=("attn_v", "atn_k")),
        Rule("heads", "q4_k", min_gqa=4),
        Rule("experts", "q4_k", roles=("attn_v",), min_experts=8),
        Rule("dense_only", "q4_k", roles=("attn_v",), max_experts=0),
        Rule("ssm", "f32", roles=("ssm_alpha", "ssm_beta", "attn_k.bias")),
        Rule("no_steps", None, bump=Bump(0, 4), ladders=LADDERS),
        bump("other_ladder", 1, file_types=("q4_k_m",)),
        Rule("other_file", "q4_k", ("iq1_s",)),
    )
    assert made.idle.rules == ("taken", "no_layer", "never_quantized", "misspelt", "dense_only")
    assert made.idle.other_models == ("heads", "experts", "ssm", "no_steps")
    assert made.idle.misspelt == (("misspelt", "fnn_down"), ("half_misspelt", "atn_k"))
    said = {f.kind: f.what for f in plan_checks.plan_findings(made)}
    assert "'fnn_down' in misspelt (did you mean ffn_down?)" in said["misspelt_roles"]
    assert "'atn_k' in half_misspelt" in said["misspelt_roles"]
    assert "taken, no_layer, never_quantized, misspelt, dense_only" in said["idle_rules"]
    assert said["rules_for_other_models"].endswith("this model: heads, experts, ssm and 1 more")


def test_a_bump_below_a_type_for_the_same_tensors_decides_nothing() -> None:
    made = plan(down(0), Rule("forced", "q8_0", roles=("ffn_down",)), bump("shadowed", 1))
    assert made.idle == Idle(rules=("shadowed",))
    assert [t.rule for t in made.tensors] == ["forced"]


def test_no_finding_when_every_rule_decides_something() -> None:
    assert plan_checks.plan_findings(plan(down(0, 1, 2, 3), *ENDS_AND_MIDDLE)) == []


# --- metadata


@pytest.mark.parametrize(
    ("heads", "kv_heads", "factor"),
    [
        (32, 8, 4.0),
        (9, 3, 3.0),
        (32, 32, 1.0),
        (14, 2, 7.0),
        (32, None, 1.0),
        (None, 8, 1.0),
        (None, None, 1.0),
        (32, 0, 1.0),
        (32, [8, 8, 8], 4.0),
        (32, [0, 8, 4, 0], 8.0),
        (32, [0, 0], 1.0),
        ([32, 16], [8, 8], 4.0),
        ([0, 16, 24], [0, 8, 4], 6.0),
        ([32, 32], 16, 2.0),
        ("<array of 9000>", 8, 1.0),
        (12, 8, 1.5),
    ],
)
def test_gqa_factor(heads: Any, kv_heads: Any, factor: float) -> None:
    metadata: dict[str, Any] = dict(LLAMA)
    if heads is not None:
        metadata["llama.attention.head_count"] = heads
    if kv_heads is not None:
        metadata["llama.attention.head_count_kv"] = kv_heads
    assert gqa_factor(metadata) == factor


def test_gqa_factor_reads_the_model_s_own_architecture() -> None:
    metadata = {"general.architecture": "qwen2", "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8}
    assert gqa_factor(metadata) == 1.0
    assert gqa_factor({}) == 1.0


@pytest.mark.parametrize(("value", "count"), [(None, 0), (0, 0), (8, 8), (128, 128), ("<array of 60>", 0)])
def test_expert_count(value: Any, count: int) -> None:
    metadata = dict(LLAMA) if value is None else {**LLAMA, "llama.expert_count": value}
    assert expert_count(metadata) == count
    assert expert_count({"general.architecture": "qwen2", "llama.expert_count": 8}) == 0


# --- identity


def test_id_does_not_depend_on_names_of_mode_quant_and_policy() -> None:
    made = plan(down(0, 1, 2, 3), *ENDS_AND_MIDDLE)
    assert replace(made, mode="standard").id == made.id
    assert replace(made, policy=None).id == made.id
    assert replace(made, quant="mine").id == made.id
    renamed = [replace(rule, name=f"x_{rule.name}") for rule in ENDS_AND_MIDDLE]
    assert plan(down(0, 1, 2, 3), *renamed).id == made.id
    assert len(made.id) == 64


def test_id_does_not_depend_on_how_a_type_came_about() -> None:
    """A rule that gives what llama.cpp gives anyway makes the same file."""
    assert plan(down(0, 1), everything("iq1_m")).id == plan(down(0, 1)).id
    wide = down(0, 1, width=576)
    assert plan(wide, everything("q5_k")).id == plan(wide, everything("q5_1")).id


def test_id_changes_with_the_type_of_any_tensor_and_with_the_file_type() -> None:
    made = plan([*down(0, 1), norm("output_norm.weight", 256)])
    ids = {made.id, replace(made, file_type="iq1_s").id}
    for i, one in enumerate(made.tensors):
        changed = list(made.tensors)
        changed[i] = replace(one, type="bf16")
        ids.add(replace(made, tensors=tuple(changed)).id)
    assert len(ids) == 2 + len(made.tensors)


def test_id_of_the_reference_is_not_that_of_an_f16_variant() -> None:
    tensors = [tensor("token_embd.weight", 256, 4)]
    assert reference_plan(tensors, 3000).id != plan(tensors, standard="f16", file_type="f16").id


# --- imatrix


@pytest.mark.parametrize("type_name", ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"])
def test_types_that_need_an_imatrix(type_name: str) -> None:
    assert plan(down(0), everything(type_name)).needs_imatrix == ("blk.0.ffn_down.weight",)


@pytest.mark.parametrize("type_name", ["iq3_s", "iq4_xs", "iq4_nl", "q2_k", "q3_k", "q4_0", "q8_0", "f16", "tq1_0"])
def test_types_that_do_not(type_name: str) -> None:
    assert plan(down(0), everything(type_name)).needs_imatrix == ()


def test_embeddings_and_output_never_need_an_imatrix() -> None:
    names = ["token_embd.weight", "output.weight", "per_layer_token_embd.weight", "blk.0.attn_q.weight"]
    made = plan([tensor(name, 256, 4) for name in names])
    assert made.needs_imatrix == ("blk.0.attn_q.weight",)


def test_q2_k_needs_an_imatrix_in_a_q2_k_s_file_only() -> None:
    tensors = [*down(0, 1), tensor("token_embd.weight", 256, 4)]
    standard = {"blk.0.ffn_down.weight": "q2_k", "blk.1.ffn_down.weight": "q4_k", "token_embd.weight": "q2_k"}
    assert plan(tensors, standard=standard, file_type="q2_k_s").needs_imatrix == ("blk.0.ffn_down.weight",)
    assert plan(tensors, standard=standard, file_type="q2_k").needs_imatrix == ()


def test_what_fell_back_needs_no_imatrix() -> None:
    """IQ1_M on a width of 576 becomes IQ4_NL, which does without."""
    assert plan(down(0, width=576), everything("iq1_m")).needs_imatrix == ()


def test_a_kept_tensor_needs_no_imatrix() -> None:
    kept = TensorPlan("blk.0.x.weight", "x", 0, (256, 4), False, "iq1_m", "iq1_m", "iq1_m", STANDARD_RULE)
    assert replace(plan(down(0), everything("q4_0")), tensors=(kept,)).needs_imatrix == ()


def test_a_plan_is_plain_data() -> None:
    """It goes to a child process and into records."""
    import pickle

    made = plan(down(0, 1), *ENDS_AND_MIDDLE)
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301
    json.dumps(made.overrides)
    assert math.isclose(made.share_of_weights(made.tensors), 1.0)
