"""Comparisons at equal size, placebo plans, domination: cases made by hand, with the answer known."""

import zlib
from dataclasses import replace

import numpy as np
import pytest

from harness.compare import Measured, difference, dominators, equal_size_verdict, pareto_front, standard_ladder
from harness.header import TensorInfo
from harness.plan import Plan, make_plan, placebo_plan
from harness.policy import parse_rules

RNG = np.random.default_rng(11)
COMMON = RNG.gamma(2.0, 1.0, (4, 1023))  # what is hard for one variant is hard for all


def case(name: str, n_bytes: int, level: float, mode: str = "standard", noise: float = 0.05) -> Measured:
    """A case whose mean nll is COMMON's plus `level`, with a little noise of its own."""
    own = np.random.default_rng(zlib.crc32(name.encode())).normal(0, noise, COMMON.shape)
    return Measured(name, name, mode, n_bytes, COMMON + level + own - own.mean(), np.abs(level + own))


LADDER = [case("small", 100, 0.8), case("middle", 200, 0.4), case("large", 300, 0.2)]


@pytest.mark.parametrize(
    ("n_bytes", "level", "word"),
    [
        (150, 0.5, "wins"),  # the ladder at 150 bytes is at (0.8 + 0.4) / 2 = 0.6
        (150, 0.6, "ties"),
        (150, 0.7, "loses"),
        (275, 0.27, "loses"),  # 0.4 + 3/4 * (0.2 - 0.4) = 0.25
        (200, 0.3, "wins"),  # exactly as large as a rung
    ],
)
def test_verdict_at_equal_size(n_bytes: int, level: float, word: str) -> None:
    verdict = equal_size_verdict(case("gate", n_bytes, level, "dynamicgate"), LADDER)
    assert verdict.word == word
    assert verdict.ln_ppl is not None
    expected = level - np.interp(n_bytes, [100, 200, 300], [0.8, 0.4, 0.2])
    assert verdict.ln_ppl.mean == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n_bytes", "side"), [(99, "smaller"), (301, "larger")])
def test_no_verdict_outside_the_ladder(n_bytes: int, side: str) -> None:
    verdict = equal_size_verdict(case("gate", n_bytes, 0.1, "dynamicgate"), LADDER)
    assert verdict.word is None and verdict.ln_ppl is None
    assert f"add a {side} standard quant" in (verdict.reason or "")


@pytest.mark.parametrize(("n_bytes", "added"), [(99, "iq1_m"), (301, "iq2_s")])
def test_outside_the_ladder_the_next_quant_is_named(n_bytes: int, added: str) -> None:
    quants = ("iq2_xxs", "iq2_xs", "iq2_xs")
    ladder = [replace(rung, quant=quant) for rung, quant in zip(LADDER, quants, strict=True)]
    verdict = equal_size_verdict(case("gate", n_bytes, 0.1, "dynamicgate"), ladder)
    assert verdict.reason == (
        f"no standard case is {'smaller' if n_bytes < 100 else 'larger'} than gate: "
        f"add a {'smaller' if n_bytes < 100 else 'larger'} standard quant to the sweep, such as {added}"
    )


def test_other_modes_are_no_rungs() -> None:
    gate = case("gate", 150, 0.5, "dynamicgate")
    ladder = standard_ladder([case("other", 150, 0.1, "dynamicgate"), *LADDER[::-1]])
    assert ladder == LADDER
    assert equal_size_verdict(gate, ladder).word == "wins"


def test_paired_difference_sees_what_unpaired_errors_hide() -> None:
    a, b = case("a", 1, 0.010), case("b", 1, 0.0)
    assert difference(a, b).ln_ppl.sign == 1
    assert COMMON.std() / np.sqrt(COMMON.size) > 0.010
    with pytest.raises(ValueError, match="different prompt sets"):
        difference(a, Measured("c", "c", "standard", 1, COMMON[:2], None))


def test_domination_and_front() -> None:
    bad = case("bad", 250, 0.6)
    tie = case("tie", 210, 0.4, noise=0.8)
    assert dominators([*LADDER, bad, tie])["bad"] == "middle"
    assert "tie" not in dominators([*LADDER, bad, tie]), "within noise of the smaller file"
    assert pareto_front([*LADDER, bad]) == {"small", "middle", "large"}


def plan_of_layers(n_layers: int) -> Plan:
    """IQ1_M with DynamicGate's ffn_down rules on `n_layers` layers, all else standard."""
    tensors = [TensorInfo("token_embd.weight", (256, 1000), "f16", 512000)]
    tensors += [TensorInfo(f"blk.{i}.ffn_down.weight", (512, 256), "f16", 262144) for i in range(n_layers)]
    rules = [
        {"name": "ends", "roles": ["ffn_down"], "depth": ["0..1/4", "3/4..1"], "type": "iq3_s"},
        {"name": "middle", "roles": ["ffn_down"], "depth": ["1/4..3/4"], "type": "iq2_xxs"},
        {"name": "embeddings", "roles": ["token_embd"], "type": "q5_k"},
    ]
    return make_plan(
        quant="iq1_m",
        mode="placebo",
        policy="p",
        file_type="iq1_m",
        tensors=tensors,
        header_bytes=64,
        standard_final={t.name: "iq1_m" for t in tensors},
        standard_asked={},
        rules=parse_rules(rules, "test"),
        metadata={},
    )


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("n_layers", [8, 9, 30])
def test_placebo_moves_types_and_keeps_bytes(n_layers: int, seed: int | None) -> None:
    plan = plan_of_layers(n_layers)
    placebo = placebo_plan(plan, seed)
    assert placebo.file_bytes == plan.file_bytes
    assert sorted(placebo.overrides.values()) == sorted(plan.overrides.values())
    assert placebo.type_of("token_embd.weight") == "q5_k", "alone of its shape: it cannot move"
    assert placebo.id != plan.id


def test_placebo_without_seed_turns_ends_into_middle() -> None:
    placebo = placebo_plan(plan_of_layers(8), None)
    types = [placebo.type_of(f"blk.{i}.ffn_down.weight") for i in range(8)]
    assert types == ["iq2_xxs"] * 2 + ["iq3_s"] * 4 + ["iq2_xxs"] * 2
