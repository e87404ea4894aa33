"""Every generation of DynamicGate, as plans of whole models, against tables by hand from the published rules.

None below means: no rule, the tensor keeps llama.cpp's type.
"""

from functools import cache
from pathlib import Path

import pytest

from harness.config import PolicyConfig
from harness.header import TensorInfo
from harness.plan import STANDARD_RULE, Plan, make_plan
from harness.policy import Rule
from harness.policy_file import load_policy

POLICIES = Path(__file__).resolve().parent.parent / "conf" / "policy"
STANDARD = "q4_0"  # llama.cpp's type in these plans: no rule gives it

# Generations 1 and 1.5: layer i of n is in the first quarter when i < n/4, in the last when i >= 3n/4.
# 28: 7 and 21. 32: 8 and 24.
QUARTERS = {28: {*range(7), *range(21, 28)}, 32: {*range(8), *range(24, 32)}}
# Generation 2: layer i of n is at i * 10 / (n - 1).
# low 2, high 8: 28 layers: i <= 5.4 or i >= 21.6; 32 layers: i <= 6.2 or i >= 24.8.
TWO_EIGHT = {28: {*range(6), *range(22, 28)}, 32: {*range(7), *range(25, 32)}}
# low 1, high 9: 28 layers: i <= 2.7 or i >= 24.3; 32 layers: i <= 3.1 or i >= 27.9.
ONE_NINE = {28: {0, 1, 2, 25, 26, 27}, 32: {0, 1, 2, 3, 28, 29, 30, 31}}
# low 0, high 10: the first and the last.
FIRST_LAST = {28: {0, 27}, 32: {0, 31}}

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
DENSE_FFN = ("ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


@cache
def rules_of(policy: str) -> tuple[Rule, ...]:
    """The rules of a shipped policy."""
    return load_policy(PolicyConfig(file=str(POLICIES / f"{policy}.yaml")))[1]


def plan_of(policy: str, file_type: str, n_layers: int, *, gqa: int = 1, n_experts: int = 0) -> Plan:
    """The policy's plan of a model with these layers; a mixture has shared experts, and a dense ffn_down everywhere."""
    roles = (*ATTENTION, *DENSE_FFN, *(EXPERTS if n_experts else ()))
    names = ["token_embd.weight", "output.weight"]
    names += [f"blk.{i}.{role}.weight" for i in range(n_layers) for role in roles]
    metadata = {
        "general.architecture": "llama",
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 32 // gqa,
        "llama.expert_count": n_experts,
    }
    return make_plan(
        quant=file_type,
        mode="dynamicgate",
        policy=policy,
        file_type=file_type,
        tensors=[TensorInfo(name, (256, 4), "f16", 2048) for name in names],
        header_bytes=0,
        standard_final=dict.fromkeys(names, STANDARD),
        standard_asked={},
        rules=rules_of(policy),
        metadata=metadata,
    )


def given(plan: Plan, role: str) -> dict[int | None, str | None]:
    """Type by layer; None where no rule holds."""
    assert all((t.rule == STANDARD_RULE) == (t.type == STANDARD) for t in plan.tensors)
    return {t.layer: None if t.rule == STANDARD_RULE else t.type for t in plan.tensors if t.role == role}


def by_layer(n_layers: int, middle: str | None, *ends: tuple[set[int], str | None]) -> dict[int | None, str | None]:
    """`middle` everywhere, then each of `ends` on its layers."""
    table: dict[int | None, str | None] = dict.fromkeys(range(n_layers), middle)
    for layers, type_name in ends:
        table |= dict.fromkeys(layers, type_name)
    return table


# --- generations 1 and 1.5: types of ffn_down in the outer quarters and in the middle half

FFN_DOWN = {
    "iq1_s": ("iq3_s", "iq2_xxs"),
    "iq1_m": ("iq3_s", "iq2_xxs"),
    "iq2_xxs": ("iq3_s", "iq2_xxs"),
    "iq2_xs": ("iq3_s", "iq2_xxs"),
    "iq2_s": ("iq4_xs", "iq3_s"),
    "iq2_m": ("iq4_xs", "iq3_s"),
}
# Generation 1.5, (gqa, experts) -> attn_q and attn_k, attn_v, attn_output; "low" is IQ3_XXS in the IQ1 files and IQ3_S
# in the IQ2 files.
ATTENTION_1_5 = {
    (1, 0): (None, "low", "low"),
    (4, 0): (None, "iq4_xs", "low"),
    (8, 0): (None, "iq4_xs", "low"),
    (1, 8): ("iq4_xs", "iq4_xs", "iq4_xs"),
    (4, 8): ("iq4_xs", "iq4_xs", "iq4_xs"),
    (8, 64): ("iq4_xs", "iq4_xs", "iq4_xs"),
}


@pytest.mark.parametrize("n", [28, 32])
@pytest.mark.parametrize(("gqa", "n_experts"), ATTENTION_1_5)
@pytest.mark.parametrize("file_type", FFN_DOWN)
def test_generations_1_and_1_5(file_type: str, gqa: int, n_experts: int, n: int) -> None:
    outer, middle = FFN_DOWN[file_type]
    low = "iq3_xxs" if file_type.startswith("iq1") else "iq3_s"
    query_key, value, output = (low if name == "low" else name for name in ATTENTION_1_5[gqa, n_experts])
    first = plan_of("dynamicgate", file_type, n, gqa=gqa, n_experts=n_experts)
    later = plan_of("dynamicgate_attention", file_type, n, gqa=gqa, n_experts=n_experts)
    for plan in (first, later):
        assert given(plan, "ffn_down") == by_layer(n, middle, (QUARTERS[n], outer))
        assert given(plan, "token_embd") == given(plan, "output") == {None: "q5_k"}
        for role in ("ffn_gate", "ffn_up", *(EXPERTS if n_experts else ())):
            assert given(plan, role) == by_layer(n, None), role
    expected = {"attn_q": query_key, "attn_k": query_key, "attn_v": value, "attn_output": output}
    for role in ATTENTION:
        assert given(first, role) == by_layer(n, None)
        assert given(later, role) == by_layer(n, expected[role]), role


# --- generation 2, dense: 0 IQ1_S, 1 IQ1_M, 2 IQ2_XXS, 3 IQ2_XS, 4 IQ2_S, 5 IQ3_XXS, 6 IQ3_S, 7 IQ4_NL, 8 IQ4_XS, then
# 9 Q4_K, 10 Q5_K, 11 Q6_K, 12 Q8_0. IQ2_M starts at IQ2_S, IQ3_XS at IQ3_XXS, IQ3_M at IQ3_S.

# IQ1 and IQ2, (middle, ends 2..8, first and last layer).
# attn_q, attn_k: IQ1 +2 and +1 at the ends; IQ2 nothing and +1 at the ends.
# attn_v, ffn_*: IQ1 +2+2, and +2 at the ends; IQ2 +2, and +2 at the ends.
# attn_output: as ffn, and +1 in the first and the last layer.
DENSE_LOW = {
    # start          0+2, 0+3                 0+4, 0+6                 0+4, 0+6, 0+7
    "iq1_s": (("iq2_xxs", "iq2_xs"), ("iq2_s", "iq3_s"), ("iq2_s", "iq3_s", "iq4_nl")),
    # start          1+2, 1+3                 1+4, 1+6                 1+4, 1+6, 1+7
    "iq1_m": (("iq2_xs", "iq2_s"), ("iq3_xxs", "iq4_nl"), ("iq3_xxs", "iq4_nl", "iq4_xs")),
    # start          -, 2+1                   2+2, 2+4                 2+2, 2+4, 2+5
    "iq2_xxs": ((None, "iq2_xs"), ("iq2_s", "iq3_s"), ("iq2_s", "iq3_s", "iq4_nl")),
    # start          -, 3+1                   3+2, 3+4                 3+2, 3+4, 3+5
    "iq2_xs": ((None, "iq2_s"), ("iq3_xxs", "iq4_nl"), ("iq3_xxs", "iq4_nl", "iq4_xs")),
    # start          -, 4+1                   4+2, 4+4                 4+2, 4+4, 4+5: past IQ4_XS
    "iq2_s": ((None, "iq3_xxs"), ("iq3_s", "iq4_xs"), ("iq3_s", "iq4_xs", "q4_k")),
    "iq2_m": ((None, "iq3_xxs"), ("iq3_s", "iq4_xs"), ("iq3_s", "iq4_xs", "q4_k")),
}


@pytest.mark.parametrize("n", [28, 32])
@pytest.mark.parametrize("gqa", [1, 4, 8])
@pytest.mark.parametrize("file_type", DENSE_LOW)
def test_generation_2_dense_1_and_2_bits(file_type: str, gqa: int, n: int) -> None:
    query_key, value_ffn, output = DENSE_LOW[file_type]
    plan = plan_of("dynamicgate_ladder", file_type, n, gqa=gqa)
    for role in ("attn_q", "attn_k"):
        assert given(plan, role) == by_layer(n, query_key[0], (TWO_EIGHT[n], query_key[1])), role
    for role in ("attn_v", *DENSE_FFN):
        assert given(plan, role) == by_layer(n, value_ffn[0], (TWO_EIGHT[n], value_ffn[1])), role
    ends = ((TWO_EIGHT[n], output[1]), (FIRST_LAST[n], output[2]))
    assert given(plan, "attn_output") == by_layer(n, output[0], *ends)
    assert given(plan, "token_embd") == given(plan, "output") == {None: "q5_k"}


# IQ3, (middle, ends 1..9): attn_v, ffn_down +1+1, and +1 at the ends; attn_output +1, and +1 at the ends.
DENSE_IQ3 = {
    # start           5+2, 5+3            5+1, 5+2
    "iq3_xxs": (("iq4_nl", "iq4_xs"), ("iq3_s", "iq4_nl")),
    "iq3_xs": (("iq4_nl", "iq4_xs"), ("iq3_s", "iq4_nl")),
    # start           6+2, 6+3: past IQ4_XS   6+1, 6+2
    "iq3_s": (("iq4_xs", "q4_k"), ("iq4_nl", "iq4_xs")),
    "iq3_m": (("iq4_xs", "q4_k"), ("iq4_nl", "iq4_xs")),
}


@pytest.mark.parametrize("n", [28, 32])
@pytest.mark.parametrize("gqa", [1, 4, 8])
@pytest.mark.parametrize("file_type", DENSE_IQ3)
def test_generation_2_dense_3_bits(file_type: str, gqa: int, n: int) -> None:
    value_down, output = DENSE_IQ3[file_type]
    plan = plan_of("dynamicgate_ladder", file_type, n, gqa=gqa)
    for role in ("attn_v", "ffn_down"):
        assert given(plan, role) == by_layer(n, value_down[0], (ONE_NINE[n], value_down[1])), role
    assert given(plan, "attn_output") == by_layer(n, output[0], (ONE_NINE[n], output[1]))
    for role in ("attn_q", "attn_k", "ffn_gate", "ffn_up"):
        assert given(plan, role) == by_layer(n, None), role
    assert given(plan, "token_embd") == given(plan, "output") == {None: "q5_k"}


# K files, ladder Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0; (middle, ends 1..9) of attn_v and ffn_down (+1 in Q2_K and Q3_K
# files, and +1 at the ends), of attn_output, ffn_gate and ffn_up (+1 at the ends only), then embeddings and output.
DENSE_K = {
    "q2_k": (("q3_k", "q4_k"), (None, "q3_k"), "q6_k"),
    "q2_k_s": (("q3_k", "q4_k"), (None, "q3_k"), "q5_k"),
    "q3_k_s": (("q4_k", "q5_k"), (None, "q4_k"), "q5_k"),
    "q3_k_m": (("q4_k", "q5_k"), (None, "q4_k"), "q6_k"),
    "q4_k_s": ((None, "q5_k"), (None, "q5_k"), "q6_k"),
    "q4_k_m": ((None, "q5_k"), (None, "q5_k"), "q6_k"),
    "q5_k_s": ((None, "q6_k"), (None, "q6_k"), "q6_k"),
    "q5_k_m": ((None, "q6_k"), (None, "q6_k"), "q6_k"),
}


@pytest.mark.parametrize("n_experts", [0, 8])
@pytest.mark.parametrize("n", [28, 32])
@pytest.mark.parametrize("file_type", DENSE_K)
def test_generation_2_k_types(file_type: str, n: int, n_experts: int) -> None:
    value_down, others, embeddings = DENSE_K[file_type]
    plan = plan_of("dynamicgate_ladder", file_type, n, n_experts=n_experts)
    for role in ("attn_v", "ffn_down"):
        assert given(plan, role) == by_layer(n, value_down[0], (ONE_NINE[n], value_down[1])), role
    for role in ("attn_output", "ffn_gate", "ffn_up", *(EXPERTS if n_experts else ())):
        assert given(plan, role) == by_layer(n, others[0], (ONE_NINE[n], others[1])), role
    for role in ("attn_q", "attn_k"):
        assert given(plan, role) == by_layer(n, None), role
    assert given(plan, "token_embd") == given(plan, "output") == {None: embeddings}


# --- generation 2, mixtures of experts

# IQ1 and IQ2, (middle, ends 2..8): attn_q, attn_k, attn_v: IQ1 +2+3, IQ2 +3, and +3 at the ends. ffn_gate, ffn_up,
# ffn_down of dense layers: IQ1 +2+4, IQ2 +4, and +3 at the ends. attn_output: the same, and +2 in the first and the
# last layer. ffn_down_exps: IQ1 +4, and +4 at the ends. ffn_gate_exps, ffn_up_exps: +4 at the ends only.
# Shared experts: IQ1 +2, and +4 at the ends.
MOE_LOW = {
    "iq1_s": {
        "attention": ("iq3_xxs", "iq4_xs"),  # 0+5, 0+8
        "ffn": ("iq3_s", "q4_k"),  # 0+6, 0+9
        "first_last": "q6_k",  # 0+11
        "down_exps": ("iq2_s", "iq4_xs"),  # 0+4, 0+8
        "other_exps": (None, "iq2_s"),  # -, 0+4
        "shared": ("iq2_xxs", "iq3_s"),  # 0+2, 0+6
    },
    "iq1_m": {
        "attention": ("iq3_s", "q4_k"),  # 1+5, 1+8
        "ffn": ("iq4_nl", "q5_k"),  # 1+6, 1+9
        "first_last": "q8_0",  # 1+11
        "down_exps": ("iq3_xxs", "q4_k"),  # 1+4, 1+8
        "other_exps": (None, "iq3_xxs"),  # -, 1+4
        "shared": ("iq2_xs", "iq4_nl"),  # 1+2, 1+6
    },
    "iq2_xxs": {
        "attention": ("iq3_xxs", "iq4_xs"),  # 2+3, 2+6
        "ffn": ("iq3_s", "q4_k"),  # 2+4, 2+7
        "first_last": "q6_k",  # 2+9
        "down_exps": (None, "iq3_s"),  # -, 2+4
        "other_exps": (None, "iq3_s"),
        "shared": (None, "iq3_s"),
    },
    "iq2_xs": {
        "attention": ("iq3_s", "q4_k"),  # 3+3, 3+6
        "ffn": ("iq4_nl", "q5_k"),  # 3+4, 3+7
        "first_last": "q8_0",  # 3+9
        "down_exps": (None, "iq4_nl"),  # -, 3+4
        "other_exps": (None, "iq4_nl"),
        "shared": (None, "iq4_nl"),
    },
    "iq2_m": {
        "attention": ("iq4_nl", "q5_k"),  # 4+3, 4+6
        "ffn": ("iq4_xs", "q6_k"),  # 4+4, 4+7
        "first_last": "q8_0",  # 4+9 = 13: the ladder ends at 12
        "down_exps": (None, "iq4_xs"),  # -, 4+4
        "other_exps": (None, "iq4_xs"),
        "shared": (None, "iq4_xs"),
    },
}


@pytest.mark.parametrize("n", [28, 32])
@pytest.mark.parametrize(("gqa", "n_experts"), [(1, 8), (4, 64), (8, 8)])
@pytest.mark.parametrize("file_type", [*MOE_LOW, "iq2_s"])
def test_generation_2_mixtures_1_and_2_bits(file_type: str, gqa: int, n_experts: int, n: int) -> None:
    table = MOE_LOW["iq2_m" if file_type == "iq2_s" else file_type]
    plan = plan_of("dynamicgate_ladder", file_type, n, gqa=gqa, n_experts=n_experts)
    groups = {
        "attention": ("attn_q", "attn_k", "attn_v"),
        "ffn": DENSE_FFN,
        "down_exps": ("ffn_down_exps",),
        "other_exps": ("ffn_gate_exps", "ffn_up_exps"),
        "shared": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    }
    for group, roles in groups.items():
        for role in roles:
            assert given(plan, role) == by_layer(n, table[group][0], (TWO_EIGHT[n], table[group][1])), role
    middle, ends = table["ffn"]
    first_last = (FIRST_LAST[n], str(table["first_last"]))
    assert given(plan, "attn_output") == by_layer(n, middle, (TWO_EIGHT[n], ends), first_last)


# IQ3, (middle, ends 1..9): attn_q, attn_k +1. attn_v, ffn_down +1+1, and +1 at the ends. attn_output +1, and +1.
# ffn_down_exps, ffn_down_shexp +3, and +2. ffn_gate_exps, ffn_up_exps +2 at the ends only. The other shared +2, and +2.
MOE_IQ3 = {
    "iq3_xxs": {  # starts at 5
        ("attn_q", "attn_k"): ("iq3_s", "iq3_s"),
        ("attn_v", "ffn_down"): ("iq4_nl", "iq4_xs"),
        ("attn_output",): ("iq3_s", "iq4_nl"),
        ("ffn_down_exps", "ffn_down_shexp"): ("iq4_xs", "q5_k"),
        ("ffn_gate_exps", "ffn_up_exps"): (None, "iq4_nl"),
        ("ffn_gate_shexp", "ffn_up_shexp"): ("iq4_nl", "q4_k"),
        ("ffn_gate", "ffn_up"): (None, None),
    },
    "iq3_s": {  # starts at 6
        ("attn_q", "attn_k"): ("iq4_nl", "iq4_nl"),
        ("attn_v", "ffn_down"): ("iq4_xs", "q4_k"),
        ("attn_output",): ("iq4_nl", "iq4_xs"),
        ("ffn_down_exps", "ffn_down_shexp"): ("q4_k", "q6_k"),
        ("ffn_gate_exps", "ffn_up_exps"): (None, "iq4_xs"),
        ("ffn_gate_shexp", "ffn_up_shexp"): ("iq4_xs", "q5_k"),
        ("ffn_gate", "ffn_up"): (None, None),
    },
}


@pytest.mark.parametrize("n", [28, 32])
@pytest.mark.parametrize("n_experts", [8, 64])
@pytest.mark.parametrize(
    ("file_type", "start"), [("iq3_xxs", "iq3_xxs"), ("iq3_xs", "iq3_xxs"), ("iq3_s", "iq3_s"), ("iq3_m", "iq3_s")]
)
def test_generation_2_mixtures_3_bits(file_type: str, start: str, n_experts: int, n: int) -> None:
    plan = plan_of("dynamicgate_ladder", file_type, n, gqa=4, n_experts=n_experts)
    for roles, (middle, ends) in MOE_IQ3[start].items():
        for role in roles:
            assert given(plan, role) == by_layer(n, middle, (ONE_NINE[n], ends)), role


@pytest.mark.parametrize("file_type", ["iq4_xs", "iq4_nl", "q6_k", "q8_0", "q4_0", "q3_k_l", "tq1_0"])
@pytest.mark.parametrize("n_experts", [0, 8])
def test_generation_2_has_no_rules_for_other_file_types(file_type: str, n_experts: int) -> None:
    plan = plan_of("dynamicgate_ladder", file_type, 28, n_experts=n_experts)
    assert {t.rule for t in plan.tensors} == {STANDARD_RULE}


def test_the_plan_names_the_rules_of_a_bump_and_their_steps() -> None:
    rules = {t.name: t.rule for t in plan_of("dynamicgate_ladder", "iq1_s", 32).tensors}
    assert rules["blk.6.attn_q.weight"] == "iq1_query_key +2, iq12_query_key_ends +1"
    assert rules["blk.7.attn_q.weight"] == "iq1_query_key +2"
    assert rules["output.weight"] == "embeddings_and_output_iq"


@pytest.mark.parametrize("policy", ["dynamicgate", "dynamicgate_attention", "dynamicgate_ladder"])
@pytest.mark.parametrize("n_experts", [0, 8])
def test_shipped_policies_name_no_role_that_gguf_does_not_know(policy: str, n_experts: int) -> None:
    for file_type in ("iq1_m", "iq2_m", "iq3_m", "q2_k", "q5_k_m"):
        idle = plan_of(policy, file_type, 28, gqa=4, n_experts=n_experts).idle
        assert idle.misspelt == ()
        if policy == "dynamicgate_ladder":
            assert idle.rules == (), "every rule for this kind of model decides something"
            assert "ssm_alpha_beta" in idle.other_models
