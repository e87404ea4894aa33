"""The shipped policy against the published table, worked out by hand, and every way in which rules can be wrong."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import PolicyConfig
from harness.errors import UserError
from harness.ggml_types import FILE_TYPES
from harness.ladders import Bump, Ends
from harness.policy import Rule, Subject, choose, matching_rule, parse_rules
from harness.policy_file import load_policy

POLICY = Path(__file__).resolve().parent.parent / "conf" / "policy" / "dynamicgate.yaml"

# The published rules: layer i of n is in the first quarter when i < n / 4 and in the last when i >= 3 * n / 4, both
# divisions rounded down. 28: 7 and 21. 30: 7 and 22. 32: 8 and 24.
FIRST = {
    28: [0, 1, 2, 3, 4, 5, 6],
    30: [0, 1, 2, 3, 4, 5, 6],
    32: [0, 1, 2, 3, 4, 5, 6, 7],
}
MIDDLE = {
    28: [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    30: [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21],
    32: [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
}
LAST = {
    28: [21, 22, 23, 24, 25, 26, 27],
    30: [22, 23, 24, 25, 26, 27, 28, 29],
    32: [24, 25, 26, 27, 28, 29, 30, 31],
}
ENDS_TYPE = {
    "iq1_s": "iq3_s",
    "iq1_m": "iq3_s",
    "iq2_xxs": "iq3_s",
    "iq2_xs": "iq3_s",
    "iq2_s": "iq4_xs",
    "iq2_m": "iq4_xs",
}
MIDDLE_TYPE = {
    "iq1_s": "iq2_xxs",
    "iq1_m": "iq2_xxs",
    "iq2_xxs": "iq2_xxs",
    "iq2_xs": "iq2_xxs",
    "iq2_s": "iq3_s",
    "iq2_m": "iq3_s",
}
SIX = sorted(ENDS_TYPE)
OTHER_ROLES = [
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_output",
    "attn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_norm",
    "ffn_down.bias",
    "ffn_down_exps",
    "ffn_down_shexp",
    "output_norm",
    "rope_freqs",
    "per_layer_token_embd",
]


@pytest.fixture(scope="module")
def rules() -> tuple[Rule, ...]:
    """The rules of the shipped policy."""
    return parse_rules(yaml.safe_load(POLICY.read_text(encoding="utf-8"))["rules"], str(POLICY))


def chosen(rules: tuple[Rule, ...], file_type: str, role: str, i: int | None = None, n: int | None = None) -> str:
    """Type that the rules give to a tensor of a dense model without grouped queries; 'none' when no rule holds."""
    choice = choose(rules, Subject(file_type, role, i, n, 1.0, 0))
    return choice.type if choice else "none"


def subject(**changes: Any) -> Subject:
    """A tensor in the blocks of a dense model."""
    return Subject(
        **{"file_type": "iq1_m", "role": "x", "position": 0, "n_positions": 4, "gqa": 1.0, "n_experts": 0} | changes
    )


@pytest.mark.parametrize("n", [28, 30, 32])
@pytest.mark.parametrize("file_type", SIX)
def test_ffn_down_by_quarter_of_depth(rules: tuple[Rule, ...], file_type: str, n: int) -> None:
    assert FIRST[n] + MIDDLE[n] + LAST[n] == list(range(n)), "the table by hand is whole"
    expected = dict.fromkeys(FIRST[n] + LAST[n], ENDS_TYPE[file_type]) | dict.fromkeys(
        MIDDLE[n], MIDDLE_TYPE[file_type]
    )
    assert {i: chosen(rules, file_type, "ffn_down", i, n) for i in range(n)} == expected


@pytest.mark.parametrize("file_type", SIX)
@pytest.mark.parametrize("role", ["token_embd", "output"])
def test_embeddings_and_output_are_q5_k(rules: tuple[Rule, ...], file_type: str, role: str) -> None:
    assert chosen(rules, file_type, role) == "q5_k"


@pytest.mark.parametrize("file_type", SIX)
@pytest.mark.parametrize("role", OTHER_ROLES)
def test_no_rule_names_another_tensor(rules: tuple[Rule, ...], file_type: str, role: str) -> None:
    assert chosen(rules, file_type, role) == "none"
    assert {chosen(rules, file_type, role, i, 30) for i in range(30)} == {"none"}


@pytest.mark.parametrize("file_type", sorted(set(FILE_TYPES) - set(SIX)))
def test_no_rule_names_another_file_type(rules: tuple[Rule, ...], file_type: str) -> None:
    for role in ("token_embd", "output"):
        assert chosen(rules, file_type, role) == "none"
    for role in ("ffn_down", *OTHER_ROLES):
        assert {chosen(rules, file_type, role, i, 28) for i in range(28)} == {"none"}


def test_the_six_are_file_types_and_neighbours_are_not_among_them() -> None:
    assert set(SIX) <= set(FILE_TYPES)
    assert {"iq3_xxs", "iq3_xs", "q2_k", "q4_k_m"} <= set(FILE_TYPES) - set(SIX)


@pytest.mark.parametrize(("gqa", "n_experts"), [(4.0, 0), (8.0, 8), (1.0, 128)])
def test_heads_and_experts_do_not_matter_to_the_shipped_policy(
    rules: tuple[Rule, ...], gqa: float, n_experts: int
) -> None:
    rule = matching_rule(rules, Subject("iq2_m", "ffn_down", 0, 32, gqa, n_experts))
    assert rule is not None
    assert rule.type == "iq4_xs"


# --- the meaning of the conditions


def test_first_rule_that_holds_decides() -> None:
    rules = parse_rules(
        [
            {"name": "narrow", "type": "q6_k", "roles": ["attn_v"]},
            {"name": "wide", "type": "q4_k"},
            {"name": "never", "type": "q8_0", "roles": ["attn_q"]},
        ],
        "here",
    )
    assert matching_rule(rules, subject(role="attn_v")) is rules[0]
    assert matching_rule(rules, subject(role="attn_q")) is rules[1]
    assert matching_rule((), subject()) is None


def test_all_conditions_must_hold() -> None:
    rule = Rule("a", "q4_k", ("iq1_m",), ("ffn_up",), (((0, 1), (1, 2)),), 2.0, 4, 8)
    good = subject(role="ffn_up", gqa=2.0, n_experts=4)
    assert matching_rule([rule], good) is rule
    for change in (
        {"file_type": "iq1_s"},
        {"role": "ffn_gate"},
        {"position": 2},
        {"gqa": 1.9},
        {"n_experts": 3},
        {"n_experts": 9},
    ):
        other = subject(**{"role": "ffn_up", "gqa": 2.0, "n_experts": 4} | change)
        assert matching_rule([rule], other) is None, change


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        ({"min_gqa": 4}, {"gqa 4.0", "gqa 8.0"}),
        ({"min_gqa": 2.5}, {"gqa 4.0", "gqa 8.0"}),
        ({"min_experts": 8}, {"experts 8", "experts 9"}),
        ({"max_experts": 8}, {"gqa 1.0", "gqa 4.0", "gqa 8.0", "experts 0", "experts 8"}),
        ({"max_experts": 0}, {"gqa 1.0", "gqa 4.0", "gqa 8.0", "experts 0"}),
        ({"min_experts": 8, "max_experts": 8}, {"experts 8"}),
    ],
)
def test_limits_include_their_bounds(limits: dict[str, float], holds: set[str]) -> None:
    rules = parse_rules([{"name": "a", "type": "q4_k", **limits}], "here")
    subjects = {f"gqa {gqa}": subject(gqa=gqa) for gqa in (1.0, 4.0, 8.0)}
    subjects |= {f"experts {n}": subject(n_experts=n) for n in (0, 8, 9)}
    assert {name for name, one in subjects.items() if matching_rule(rules, one)} == holds


def test_a_rule_by_depth_never_names_a_tensor_outside_the_blocks() -> None:
    rules = parse_rules([{"name": "a", "type": "q4_k", "depth": ["0..1"]}], "here")
    assert matching_rule(rules, subject(position=None, n_positions=None)) is None
    assert matching_rule(rules, subject(position=0, n_positions=1)) is rules[0]
    anywhere = parse_rules([{"name": "a", "type": "q4_k"}], "here")
    assert matching_rule(anywhere, subject(position=None, n_positions=None)) is anywhere[0]


@pytest.mark.parametrize(
    ("depth", "n", "layers"),
    [
        (["0..1"], 3, [0, 1, 2]),
        (["0..1/2"], 5, [0, 1]),
        (["1/2..1"], 5, [2, 3, 4]),
        (["0..1/4"], 3, []),
        (["3/4..1"], 3, [2]),
        (["1/3..2/3"], 10, [3, 4, 5]),
        (["0..1/8", "7/8..1"], 16, [0, 1, 14, 15]),
        (["0 .. 1/8"], 16, [0, 1]),
        (["0/1..1/1"], 2, [0, 1]),
    ],
)
def test_depth_ranges_are_half_open_and_rounded_down(depth: list[str], n: int, layers: list[int]) -> None:
    rules = parse_rules([{"name": "a", "type": "q4_k", "depth": depth}], "here")
    assert [i for i in range(n) if matching_rule(rules, subject(position=i, n_positions=n))] == layers


@settings(deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(1, 15), min_size=1, max_size=5, unique=True).map(sorted))
def test_adjoining_ranges_cover_every_layer_once(n: int, cuts: list[int]) -> None:
    bounds = ["0", *(f"{cut}/16" for cut in cuts), "1"]
    rules = parse_rules(
        [
            {"name": f"r{i}", "type": "q4_k", "depth": [f"{low}..{high}"]}
            for i, (low, high) in enumerate(itertools.pairwise(bounds))
        ],
        "here",
    )
    for position in range(n):
        assert sum(bool(matching_rule([rule], subject(position=position, n_positions=n))) for rule in rules) == 1


# --- bumps on a ladder

LADDERS = [
    {"types": ["iq1_s", "iq2_xs", "iq3_s", "q4_k"], "base": {"iq1_m": "iq1_s", "iq2_xs": "iq2_xs"}},
    {"types": ["q2_k", "q4_k", "q8_0"], "base": {"q2_k": "q2_k"}},
]


def bumped(*raw: dict[str, Any], **changes: Any) -> tuple[str, str] | None:
    """Type and text that rules with these ladders give to a tensor."""
    choice = choose(parse_rules(raw, "here", LADDERS), subject(**changes))
    return (choice.type, choice.text) if choice else None


def test_bumps_of_all_rules_that_hold_add_up() -> None:
    rules = [
        {"name": "a", "bump": 1, "roles": ["x"]},
        {"name": "b", "bump": 2, "roles": ["y"]},
        {"name": "c", "bump": 1, "file_types": ["iq1_m"]},
    ]
    assert bumped(*rules) == ("iq3_s", "a +1, c +1")
    assert bumped(*rules, role="y") == ("q4_k", "b +2, c +1")
    assert bumped(*rules, role="z") == ("iq2_xs", "c +1")
    assert bumped(*rules, file_type="iq2_xs") == ("iq3_s", "a +1"), "a higher base"
    assert bumped(*rules, file_type="q2_k") == ("q4_k", "a +1"), "another ladder"
    assert bumped(*rules, file_type="iq1_s") is None, "no ladder has a base for it"
    assert bumped(*rules, role="z", file_type="q2_k") is None


def test_a_bump_stops_at_the_end_of_its_ladder() -> None:
    assert bumped({"name": "a", "bump": 3}) == ("q4_k", "a +3")
    assert bumped({"name": "a", "bump": 4}) == ("q4_k", "a +4")
    assert bumped({"name": "a", "bump": 99}, {"name": "b", "bump": 99}) == ("q4_k", "a +99, b +99")


def test_dense_models_and_mixtures_have_steps_of_their_own() -> None:
    rules = [{"name": "a", "bump": {"dense": 0, "experts": 2}}, {"name": "b", "bump": {"dense": 1, "experts": 0}}]
    assert bumped(*rules) == ("iq2_xs", "b +1")
    assert bumped(*rules, n_experts=1) == bumped(*rules, n_experts=64) == ("iq3_s", "a +2")
    assert bumped(rules[0]) is None, "no steps: the tensor keeps llama.cpp's type"


def test_a_type_wins_over_bumps_wherever_it_stands() -> None:
    bump, forced = {"name": "a", "bump": 3}, {"name": "b", "type": "f32", "roles": ["x"]}
    assert bumped(bump, forced) == bumped(forced, bump) == ("f32", "b")
    assert bumped(bump, forced, role="y") == ("q4_k", "a +3")


def test_ends_by_hand() -> None:
    """12 layers, the last is 11: layer 2 is at 1.82, 3 at 2.73, 8 at 7.27, 9 at 8.18."""

    def layers(ends: dict[str, float], n: int) -> list[int]:
        rules = parse_rules([{"name": "a", "type": "q4_k", "ends": ends}], "here")
        return [i for i in range(n) if choose(rules, subject(layer=i, last_layer=n - 1))]

    assert layers({"low": 2, "high": 8}, 12) == [0, 1, 2, 9, 10, 11]
    assert layers({"low": 2, "high": 8}, 11) == [0, 1, 2, 8, 9, 10], "2 and 8 themselves count"
    assert layers({"low": 0, "high": 10}, 12) == [0, 11]
    assert layers({"low": 2.5, "high": 7.5}, 12) == [0, 1, 2, 9, 10, 11]
    assert layers({"low": 3, "high": 7}, 12) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert layers({"low": 0, "high": 10}, 1) == [0]
    # 2 of 10 is exact in whole numbers, whatever a float makes of 7 / 35
    assert layers({"low": 2, "high": 8}, 36) == [*range(8), *range(28, 36)]
    outside = parse_rules([{"name": "a", "type": "q4_k", "ends": {"low": 2, "high": 8}}], "here")
    assert choose(outside, subject(position=None, n_positions=None, layer=None, last_layer=11)) is None


def test_a_rule_with_a_bump_is_read_as_it_stands() -> None:
    (rule,) = parse_rules([{"name": "a", "bump": 2, "ends": {"low": 1, "high": 9.5}}], "here", LADDERS[1:])
    assert rule == Rule("a", None, ends=Ends(1, 9.5), bump=Bump(2, 2), ladders={"q2_k": ("q2_k", "q4_k", "q8_0")})


# --- rules that cannot be used

GOOD = {"name": "first", "type": "q4_k"}
BUMP = {"name": "b", "bump": 1}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("ffn_down", ["mapping", "'ffn_down'"]),
        (None, ["mapping", "None"]),
        (["name", "type"], ["mapping"]),
        ({**GOOD, "name": "b", "typ": "q4_k"}, ["unknown key 'typ'", "type"]),
        ({**GOOD, "name": "b", "role": ["ffn_down"]}, ["unknown key 'role'", "roles"]),
        ({**GOOD, "name": "b", 3: 4}, ["unknown key 3"]),
        ({"type": "q4_k"}, ["name", "missing"]),
        ({"name": "", "type": "q4_k"}, ["name", "missing"]),
        ({"name": 7, "type": "q4_k"}, ["name", "no text"]),
        ({"name": "b"}, ["type", "missing"]),
        ({"name": "b", "type": None}, ["type", "missing"]),
        ({"name": "b", "type": ["q4_k"]}, ["type", "no text"]),
        ({"name": "b", "type": "q4_kk"}, ["(b)", "'q4_kk'", "no tensor type", "q4_k"]),
        ({"name": "b", "type": "q4_k_m"}, ["(b)", "'q4_k_m'", "no tensor type", "q4_k"]),
        ({**GOOD, "name": "b", "file_types": ["iq1_m", "iq1_x"]}, ["(b)", "'iq1_x'", "no file type", "iq1_"]),
        ({**GOOD, "name": "b", "file_types": "iq1_m"}, ["(b)", "file_types", "list", "'iq1_m'"]),
        ({**GOOD, "name": "b", "file_types": []}, ["(b)", "file_types", "list"]),
        ({**GOOD, "name": "b", "file_types": None}, ["(b)", "file_types", "list", "None"]),
        ({**GOOD, "name": "b", "roles": "ffn_down"}, ["(b)", "roles", "list", "'ffn_down'"]),
        ({**GOOD, "name": "b", "roles": [1]}, ["(b)", "roles", "list"]),
        ({**GOOD, "name": "b", "roles": {"ffn_down": 1}}, ["(b)", "roles", "list"]),
        ({**GOOD, "name": "b", "depth": "0..1/4"}, ["(b)", "depth", "list"]),
        ({**GOOD, "name": "b", "depth": [0.25]}, ["(b)", "depth", "list"]),
        ({**GOOD, "name": "b", "depth": []}, ["(b)", "depth", "list"]),
        ({**GOOD, "name": "b", "depth": ["first quarter"]}, ["(b)", "'first quarter'", "0..1/4"]),
        ({**GOOD, "name": "b", "depth": ["0..0.25"]}, ["(b)", "'0..0.25'", "0..1/4"]),
        ({**GOOD, "name": "b", "depth": ["1/4"]}, ["(b)", "'1/4'", "0..1/4"]),
        ({**GOOD, "name": "b", "depth": ["-1/4..1"]}, ["(b)", "'-1/4..1'", "0..1/4"]),
        ({**GOOD, "name": "b", "depth": ["0..1/4..1"]}, ["(b)", "'0..1/4..1'", "0..1/4"]),
        ({**GOOD, "name": "b", "depth": ["0..1/4", "1/2..1/4"]}, ["(b)", "'1/2..1/4'", "rise"]),
        ({**GOOD, "name": "b", "depth": ["1/4..1/4"]}, ["(b)", "'1/4..1/4'", "rise"]),
        ({**GOOD, "name": "b", "depth": ["1/2..5/4"]}, ["(b)", "'1/2..5/4'", "0..1"]),
        ({**GOOD, "name": "b", "depth": ["0..2"]}, ["(b)", "'0..2'", "0..1"]),
        ({**GOOD, "name": "b", "depth": ["0..1/0"]}, ["(b)", "'0..1/0'", "0..1"]),
        ({**GOOD, "name": "b", "depth": ["0/0..1"]}, ["(b)", "'0/0..1'", "0..1"]),
        ({**GOOD, "name": "b", "min_gqa": "4"}, ["(b)", "min_gqa", "number", "'4'"]),
        ({**GOOD, "name": "b", "min_gqa": True}, ["(b)", "min_gqa", "number", "True"]),
        ({**GOOD, "name": "b", "min_gqa": [4]}, ["(b)", "min_gqa", "number"]),
        ({**GOOD, "name": "b", "min_experts": 1.5}, ["(b)", "min_experts", "whole number", "1.5"]),
        ({**GOOD, "name": "b", "min_experts": False}, ["(b)", "min_experts", "whole number", "False"]),
        ({**GOOD, "name": "b", "max_experts": "many"}, ["(b)", "max_experts", "whole number", "'many'"]),
        ({**BUMP, "type": "q4_k"}, ["(b)", "type and bump", "two rules"]),
        ({**BUMP, "type": None}, ["(b)", "type and bump"]),
        ({"name": "b", "bumps": 1}, ["unknown key 'bumps'", "bump"]),
        ({"bump": 1}, ["name", "missing"]),
        ({**BUMP, "bump": None}, ["(b)", "bump", "None"]),
        ({**BUMP, "bump": "2"}, ["(b)", "bump", "'2'"]),
        ({**BUMP, "bump": 1.5}, ["(b)", "bump", "1.5"]),
        ({**BUMP, "bump": True}, ["(b)", "bump", "True"]),
        ({**BUMP, "bump": -1}, ["(b)", "bump", "0 to 99", "-1"]),
        ({**BUMP, "bump": 100}, ["(b)", "bump", "0 to 99", "100"]),
        ({**BUMP, "bump": 0}, ["(b)", "0 steps", "leave the rule out"]),
        ({**BUMP, "bump": {"dense": 0, "experts": 0}}, ["(b)", "0 steps"]),
        ({**BUMP, "bump": {"dense": 2}}, ["(b)", "bump", "experts: 4"]),
        ({**BUMP, "bump": {"dense": 2, "moe": 4}}, ["(b)", "bump", "experts: 4"]),
        ({**BUMP, "bump": {"dense": 2, "experts": "4"}}, ["(b)", "bump", "experts: 4"]),
        ({**BUMP, "file_types": ["q2_k", "q4_k_m"]}, ["(b)", "no ladder", "q4_k_m"]),
        ({**BUMP, "file_types": ["q2_kk"]}, ["(b)", "'q2_kk'", "no file type"]),
        ({**BUMP, "ends": 2}, ["(b)", "ends", "low: 2, high: 8"]),
        ({**BUMP, "ends": {"low": 2}}, ["(b)", "ends", "low: 2, high: 8"]),
        ({**BUMP, "ends": {"low": 2, "hihg": 8}}, ["(b)", "ends", "low: 2, high: 8"]),
        ({**BUMP, "ends": {"low": "2", "high": 8}}, ["(b)", "low", "number"]),
        ({**BUMP, "ends": {"low": None, "high": 8}}, ["(b)", "ends", "0..10"]),
        ({**BUMP, "ends": {"low": 8, "high": 2}}, ["(b)", "ends", "rise"]),
        ({**BUMP, "ends": {"low": 5, "high": 5}}, ["(b)", "ends", "rise"]),
        ({**BUMP, "ends": {"low": -1, "high": 8}}, ["(b)", "ends", "0..10"]),
        ({**BUMP, "ends": {"low": 2, "high": 11}}, ["(b)", "ends", "0..10"]),
        ({**GOOD, "name": "b", "ends": {"low": 2, "high": float("nan")}}, ["(b)", "high", "number"]),
        ({**GOOD, "name": "b", "min_gqa": 10**400}, ["(b)", "min_gqa", "number"]),
        ({**GOOD, "name": "b", "min_gqa": float("nan")}, ["(b)", "min_gqa", "number"]),
        ({**GOOD, "name": "b", "ends": {"low": 2, "high": 10**400}}, ["(b)", "high", "number"]),
    ],
)
def test_a_wrong_rule_is_refused_with_its_place_and_the_reason(rule: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_rules([GOOD, rule], "the/file.yaml", LADDERS)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("the/file.yaml, rule 2")
    for word in words:
        assert word in message


TYPES, BASE = ["q2_k", "q4_k"], {"q2_k": "q2_k"}


@pytest.mark.parametrize(
    ("ladder", "words"),
    [
        (["q2_k", "q4_k"], ["mapping", "['q2_k', 'q4_k']"]),
        ({"types": TYPES}, ["base", "None"]),
        ({"base": BASE}, ["types", "list", "None"]),
        ({"types": TYPES, "base": BASE, "step": 1}, ["unknown key 'step'"]),
        ({"type": TYPES, "base": BASE}, ["unknown key 'type'", "types"]),
        ({"types": "q2_k", "base": BASE}, ["types", "list"]),
        ({"types": ["q2_k"], "base": BASE}, ["two or more"]),
        ({"types": ["q2_k", "q4_k", "q2_k"], "base": BASE}, ["different"]),
        ({"types": ["q2_k", "q4_kk"], "base": BASE}, ["'q4_kk'", "no tensor type", "q4_k"]),
        ({"types": ["q2_k", "q4_k_m"], "base": BASE}, ["'q4_k_m'", "no tensor type", "q4_k"]),
        ({"types": ["q2_k", "i8"], "base": BASE}, ["'i8'", "no tensor type"]),
        ({"types": TYPES, "base": {}}, ["base", "{}"]),
        ({"types": TYPES, "base": ["q2_k"]}, ["base", "['q2_k']"]),
        ({"types": TYPES, "base": {"q2_x": "q2_k"}}, ["'q2_x'", "no file type", "q2_k"]),
        ({"types": TYPES, "base": {7: "q2_k"}}, ["7", "no file type"]),
        ({"types": TYPES, "base": {"q2_k": "q3_k"}}, ["q2_k", "'q3_k'", "not among"]),
        ({"types": TYPES, "base": {"q2_k": ["q2_k"]}}, ["q2_k", "not among"]),
        ({"types": TYPES, "base": {"iq1_m": "q2_k"}}, ["another ladder", "iq1_m"]),
    ],
)
def test_a_wrong_ladder_is_refused_with_its_place_and_the_reason(ladder: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_rules([GOOD], "the/file.yaml", [LADDERS[0], ladder])
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("the/file.yaml, ladder 2: ")
    for word in words:
        assert word in message


def test_a_bump_without_ladders_is_refused() -> None:
    with pytest.raises(UserError, match=r"the/file\.yaml, rule 1 \(b\): a bump needs `ladders`"):
        parse_rules([BUMP], "the/file.yaml")


def test_two_rules_of_one_name_are_refused() -> None:
    rules = [GOOD, {"name": "second", "type": "q4_k"}, {"name": "first", "type": "q6_k"}]
    with pytest.raises(UserError, match=r"the/file\.yaml.*'first'"):
        parse_rules(rules, "the/file.yaml")


def test_a_whole_rule_is_read_as_it_stands() -> None:
    raw = {
        "name": "a",
        "type": "iq3_s",
        "file_types": ["iq1_m", "q4_k_m"],
        "roles": ["ffn_down", "attn_v"],
        "depth": ["0..1/4", "7/8..1"],
        "min_gqa": 2,
        "min_experts": 1,
        "max_experts": 8,
    }
    ranges = (((0, 1), (1, 4)), ((7, 8), (1, 1)))
    expected = Rule("a", "iq3_s", ("iq1_m", "q4_k_m"), ("ffn_down", "attn_v"), ranges, 2, 1, 8)
    assert parse_rules([raw], "here") == (expected,)


# --- policies from the configuration and from files


def write(folder: Path, text: str, name: str = "mine.yaml") -> PolicyConfig:
    """A policy file and the configuration that names it."""
    path = folder / name
    path.write_bytes(text.encode())
    return PolicyConfig(file=str(path))


def refusal(settings: PolicyConfig) -> str:
    """The one line that load_policy refuses with."""
    with pytest.raises(UserError) as caught:
        load_policy(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rules_from_the_configuration() -> None:
    assert load_policy(PolicyConfig()) == ("none", ())
    name, rules = load_policy(PolicyConfig(name="p", rules=[GOOD]))
    assert (name, rules) == ("p", (Rule("first", "q4_k"),))
    assert refusal(PolicyConfig(name="p", rules=[GOOD, {"name": "x"}])).startswith("policy=p, rule 2")
    assert refusal(PolicyConfig(name="p", rules=[], ladders=["q2_k"])).startswith("policy=p, ladder 1")


def test_bump_rules_can_be_left_out() -> None:
    raw = [BUMP, {"name": "c", "bump": 1}]
    name, rules = load_policy(PolicyConfig(name="p", ladders=LADDERS, rules=raw, without=["b"]))
    choice = choose(rules, subject())
    assert choice is not None
    assert (name, choice.type, choice.text) == ("p_without_b", "iq2_xs", "c +1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: []\nladder: []", "unknown key 'ladder'. Did you mean ladders"),
        ("rules: []\nladders: {types: [q2_k]}", "ladders must be a list"),
        ("rules: []\nladders: [{types: [q2_k, q9_k], base: {q2_k: q2_k}}]", "mine.yaml, ladder 1: 'q9_k'"),
        ("rules: [{name: a, bump: 1}]", "mine.yaml, rule 1 (a): a bump needs `ladders`"),
    ],
)
def test_wrong_ladders_in_a_file_are_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(write(tmp_path, text))


def test_a_file_wins_over_the_rules_of_the_configuration(tmp_path: Path) -> None:
    settings = write(tmp_path, "name: mine\nrules: [{name: a, type: q6_k}]")
    settings.name, settings.rules = "other", ["rubbish that is not looked at"]
    assert load_policy(settings) == ("mine", (Rule("a", "q6_k"),))


def test_the_shipped_policy_as_a_file_is_the_shipped_policy(rules: tuple[Rule, ...]) -> None:
    assert load_policy(PolicyConfig(file=str(POLICY))) == ("dynamicgate", rules)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rules: []", "mine"),
        ("name: My Rules/2\nrules: []", "My_Rules_2"),
        ("name: ../../etc\nrules: []", "etc"),
        ("name: '7'\nrules: []", "7"),
        (f"name: {'x' * 500}\nrules: []", "x" * 80),
    ],
)
def test_the_name_of_a_policy_is_safe_for_a_file_name(tmp_path: Path, text: str, name: str) -> None:
    assert load_policy(write(tmp_path, text))[0] == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: 7\nrules: []", "name must be text"),
        ("name: null\nrules: []", "name must be text"),
        ("a: &a [1]\nrules: [*a]", "aliases"),
        ("x: " + "9" * 5000 + "\nrules: []", "no YAML"),
        ("rules: [" + "a," * 600_000 + "]", "bytes"),
        ("rules: [{name: a, type: q4_k, depth: ['0/" + "1" * 4000 + "..1']}]", "range of fractions"),
    ],
)
def test_odd_and_huge_files_are_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(write(tmp_path, text))
    assert said in message and len(message) < 700


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"rules: [{{name: {'x' * 300}, type: q8_0}}, {{name: b, type: q6_k}}]")
    with pytest.raises(UserError, match=r"policy\.without: mine_without_x+\.\.\. is too long"):
        load_policy(PolicyConfig(file=str(path), without=["x" * 300]))


def test_a_file_of_aliases_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "aliases" in refusal(write(tmp_path, "\n".join([*lines, "rules: *a11"])))


@pytest.mark.parametrize("text", ["", "null", "- name: a\n  type: q4_k", "name: x", "rules:", "rules: {a: 1}", "text"])
def test_a_file_without_a_list_of_rules_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(write(tmp_path, text))
    assert str(tmp_path / "mine.yaml") in message
    assert "rules" in message


@pytest.mark.parametrize(
    "text",
    [
        "rules: [",
        "rules:\n\t- a",
        "a: b: c",
        "rules: []\n---\nrules: []",
        "rules: [*nothing]",
        "rules: !mine []",
        "a\0b",
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(write(tmp_path, text))
    assert str(tmp_path / "mine.yaml") in message
    assert "YAML" in message


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\nrules: []")
    assert str(path) in refusal(PolicyConfig(file=str(path)))


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
def test_python_objects_in_yaml_are_refused_and_do_nothing(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    message = refusal(write(tmp_path, f"rules: !!python/{tag} ['{made}']"))
    assert "python/" in message
    assert not made.exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    message = refusal(PolicyConfig(file=str(tmp_path / "no.yaml")))
    assert str(tmp_path / "no.yaml") in message
    assert "No such file" in message
    assert str(tmp_path) in refusal(PolicyConfig(file=str(tmp_path)))


def test_a_wrong_rule_in_a_file_names_the_file_and_the_rule(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "rules:\n- {name: a, type: q4_k}\n- {name: b, type: q4_z}"))
    assert message.startswith(f"{tmp_path / 'mine.yaml'}, rule 2 (b)")


@pytest.mark.parametrize(
    "text", ["name: 2025-13-45\nrules: []", "name: !!int x\nrules: []", "name: !!bool x\nrules: []", "[" * 3000]
)
def test_yaml_values_that_cannot_be_made_are_refused(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "mine.yaml") in refusal(write(tmp_path, text))


@pytest.mark.parametrize("type_name", ["i8", "i32", "f64"])
def test_types_that_are_no_weights_are_refused(type_name: str) -> None:
    with pytest.raises(UserError, match=type_name):
        parse_rules([{"name": "a", "type": type_name}], "here")


# --- generation 1.5

ATTENTION = POLICY.with_name("dynamicgate_attention.yaml")
ULTRA_LOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
# By hand from the published rules: (gqa, experts) -> type of attn_v, attn_q and attn_k, attn_output; IQ1 and IQ2 files.
ATTENTION_BY_HAND = {
    (1.0, 0): (("iq3_xxs", None, "iq3_xxs"), ("iq3_s", None, "iq3_s")),
    (3.9, 3): (("iq3_xxs", None, "iq3_xxs"), ("iq3_s", None, "iq3_s")),
    (4.0, 0): (("iq4_xs", None, "iq3_xxs"), ("iq4_xs", None, "iq3_s")),
    (8.0, 0): (("iq4_xs", None, "iq3_xxs"), ("iq4_xs", None, "iq3_s")),
    (1.0, 8): (("iq4_xs", "iq4_xs", "iq4_xs"), ("iq4_xs", "iq4_xs", "iq4_xs")),
    (8.0, 64): (("iq4_xs", "iq4_xs", "iq4_xs"), ("iq4_xs", "iq4_xs", "iq4_xs")),
}


@pytest.mark.parametrize(("gqa", "experts"), ATTENTION_BY_HAND)
@pytest.mark.parametrize("file_type", ULTRA_LOW)
def test_generation_1_5_of_the_attention_tensors(gqa: float, experts: int, file_type: str) -> None:
    _, rules = load_policy(PolicyConfig(file=str(ATTENTION)))
    by_hand = ATTENTION_BY_HAND[gqa, experts][0 if file_type.startswith("iq1") else 1]
    for roles, expected in zip((("attn_v",), ("attn_q", "attn_k"), ("attn_output",)), by_hand, strict=True):
        for role in roles:
            rule = matching_rule(rules, subject(file_type=file_type, role=role, gqa=gqa, n_experts=experts))
            assert (rule.type if rule else None) == expected, role


@pytest.mark.parametrize("n_layers", [28, 32])
def test_generation_1_5_holds_generation_1(rules: tuple[Rule, ...], n_layers: int) -> None:
    _, attention = load_policy(PolicyConfig(file=str(ATTENTION)))
    for file_type in (*ULTRA_LOW, "iq3_xxs", "q4_k_m"):
        for role in ("ffn_down", "token_embd", "output", "ffn_up"):
            for position in range(n_layers):
                one = subject(file_type=file_type, role=role, position=position, n_positions=n_layers, gqa=8.0)
                assert matching_rule(attention, one) == matching_rule(rules, one)
