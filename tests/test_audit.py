"""The verb audit: what it reads, what it finds, and that no file makes it fall."""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.audit import _published, audit_json, audit_text, audit_text_view, equal_size
from harness.card import MAX_BYTES, MAX_ROWS, parse_figure, quant_type, read_tables
from harness.errors import UserError

Cli = Callable[..., tuple[int, str, str]]

HEADER = (
    "| Quantization | Standard PPL | DynamicGate PPL | Δ PPL | Std Size | DG Size | Δ Size | Std Speed | DG Speed |"
)
RULE = "|---|---|---|---|---|---|---|---|---|"

# The figures of harness/data/dynamicgate_card_llama3_8b.csv, as the cards print them.
PUBLISHED = f"""# Some-Model-49B files

Measured on Llama-3-8B-Instruct.

{HEADER}
{RULE}
| IQ2_XXS | 11.30 | 9.84 | -12.9% | 2.5G | 2.6G | +0.1G | 234s | 246s |
| IQ2_XS | 11.72 | 11.63 | -0.8% | 2.7G | 2.8G | +0.1G | 242s | 246s |
| IQ2_S | 14.31 | 9.02 | -36.9% | 2.7G | 2.9G | +0.2G | 238s | 244s |
| IQ1_M | 27.46 | 15.41 | -43.9% | 2.2G | 2.5G | +0.3G | 206s | 212s |
| IQ1_S | 53.07 | 32.00 | -39.7% | 2.1G | 2.4G | +0.3G | 184s | 209s |

- speed: <5% difference
"""

CLEAN = f"""# Other-Model-3B

Perplexity on the whole wikitext test, 564 chunks, Other-Model-3B.

{HEADER}
{RULE}
| IQ2_XXS | 20.00 ±0.10 | 16.00 ±0.08 | -20.0% | 1000.0M | 1100.0M | +100.0M | 100.0s | 102.0s |
| IQ2_M | 14.00 ±0.07 | 11.90 ±0.06 | -15.0% | 1300.0M | 1400.0M | +100.0M | 110.0s | 111.0s |
| IQ3_M | 10.00 ±0.05 | 9.50 ±0.05 | -5.0% | 1700.0M | 1700.0M | 0.0M | 120.0s | 121.0s |

IQ2_M has 15.0% lower perplexity. Files grow: sizes increase by 0 to 100 MB. Speed: less than 3% slower.
"""


def kinds(text: str, *, is_csv: bool = False) -> dict[str, str]:
    """Findings of the first table: kind -> what, of several of a kind all."""
    found: dict[str, str] = {}
    for finding in audit_text(text, "card.md", is_csv=is_csv)[0].findings:
        found[finding.kind] = f"{found.get(finding.kind, '')}\n{finding.what}".strip()
    return found


# --- figures


@pytest.mark.parametrize(
    ("cell", "value", "unit"),
    [
        ("2.5G", 2.5, "G"),
        ("2.5 GB", 2.5, "GB"),
        ("2.7 GiB", 2.7, "GiB"),
        ("940M", 940, "M"),
        ("234s", 234, "s"),
        ("250 ms", 0.25, "s"),
        ("12.3 t/s", 12.3, "/s"),
        ("8.1 tokens/s", 8.1, "/s"),
        ("1,234.5", 1234.5, ""),
        ("11,30", 11.30, ""),
        ("-12.9%", -12.9, "%"),
        ("−12.9 %", -12.9, "%"),
        ("+0.1G", 0.1, "G"),
        ("12.9% lower", -12.9, "%"),
        ("12.9 % higher", 12.9, "%"),
        ("-39.8% [-43.3, -36.1]", -39.8, "%"),
        ("~2.5G*", 2.5, "G"),
        ("1.5e1", 15, ""),
    ],
)
def test_figures_as_people_write_them(cell: str, value: float, unit: str) -> None:
    figure = parse_figure(cell)
    assert figure is not None
    assert (figure.value, figure.unit) == (pytest.approx(value), unit)


@pytest.mark.parametrize(
    "cell", ["", "-", "N/A", "3:54", "1,2,3", "1e99", "1.2.3", "2.5G or so", "nan", "inf", "9" * 150]
)
def test_what_is_no_figure(cell: str) -> None:
    assert parse_figure(cell) is None


def test_rounding_digits_and_errors() -> None:
    figure = parse_figure("26.90 ±1.4")
    assert figure is not None
    assert (figure.half, figure.digits, figure.se, figure.text) == (pytest.approx(0.005), 4, 1.4, "26.90")


def test_sizes_in_bytes() -> None:
    sizes = {text: parse_figure(text) for text in ("1G", "1GiB", "1GB", "1024M")}
    assert {text: one.scale * one.value for text, one in sizes.items() if one} == {
        "1G": 2**30,
        "1GiB": 2**30,
        "1GB": 10**9,
        "1024M": 2**30,
    }


@pytest.mark.parametrize(
    ("text", "quant"),
    [
        ("**iq2_xxs**", "IQ2_XXS"),
        ("m-Q4_K_M.gguf", "Q4_K_M"),
        ("fp16", "F16"),
        ("mxfp4_moe", "MXFP4_MOE"),
        ("12", None),
    ],
)
def test_quant_type(text: str, quant: str | None) -> None:
    assert quant_type(text) == quant


# --- tables

SIDED = [("IQ2_XXS", 11.30, 9.84), ("IQ2_XS", 10.72, 8.63)]


@pytest.mark.parametrize(
    ("header", "between", "is_csv"),
    [
        (("Quantization", "Standard PPL", "DynamicGate PPL"), " | ", False),
        (("Quant", "std ppl", "DG PPL"), "\t", False),
        (("Type", "Std PPL", "DG PPL"), "   ", False),
        (("file", "base", "new"), ",", True),
        (("quant", "std_ppl", "dg_ppl"), ";", True),
        (("quant type", "Perplexity before", "Perplexity after"), "|", False),
    ],
)
def test_variants_of_a_table(header: tuple[str, ...], between: str, is_csv: bool) -> None:
    lines = [between.join(header), *(between.join((name, f"{a:.2f}", f"{b:.2f}")) for name, a, b in SIDED)]
    (table,) = read_tables("\n".join(lines), is_csv=is_csv)
    figures = [
        (r.label, r.base.ppl.value, r.other.ppl.value) for r in table.rows if r.base.ppl and r.other and r.other.ppl
    ]
    assert figures == SIDED


def test_a_table_that_stands_twice_is_audited_once() -> None:
    (one,) = audit_text(PUBLISHED + "\n" + PUBLISHED, "card.md")
    assert one.table.repeated_at == (one.table.line + PUBLISHED.count("\n") + 1,)


def test_delta_read_in_the_wrong_encoding_and_other_tables_beside() -> None:
    other = "| Model Format | Precision | Memory Usage |\n|---|---|---|\n| BF16 | Highest | High |\n\n"
    text = other + PUBLISHED.replace("Δ", "Ξ")
    assert "unconfirmed_delta" in kinds(text)


def test_plain_board() -> None:
    (table,) = read_tables("quant,size_gib,ppl,ppl error\nq4_0,4.34,6.70,0.04\nq8_0,7.96,6.23,0.03\n", is_csv=True)
    assert not table.is_pair
    ppl, size = table.rows[0].base.ppl, table.rows[0].base.size
    assert ppl and size and (ppl.value, ppl.se, size.scale) == (6.7, 0.04, 2**30)


# --- findings on published figures


def test_published_card() -> None:
    found = kinds(PUBLISHED)
    # 14.305 and 9.0249 would print as 14.31 and 9.02, and their difference as -36.9 %.
    unconfirmed = found["unconfirmed_delta"]
    assert "IQ2_S ppl: -36.9% printed, -36.97%" in unconfirmed and "-37.0%" in unconfirmed
    assert "IQ2_XXS 11.30 (2.5G) < IQ2_XS 11.72 (2.7G) < IQ2_S 14.31 (2.7G)" in found["bigger_but_worse"]
    assert "IQ2_XXS and IQ2_S exchanged" in found["looks_exchanged"]
    assert "IQ1_S +13.6%" in found["claim_contradicted"]
    assert "IQ1_M 15.41 at 2.5G against 11.30" in found["loses_at_equal_size"]
    assert "IQ1_S 32.00 at 2.4G against 15.19" in found["loses_at_equal_size"]
    assert "IQ2_XS 11.63 at 2.8G against IQ2_XXS 11.30 at 2.5G" in found["beaten_by_smaller"]
    assert "IQ2_XS, IQ2_S" in found["outside_ladder"]
    assert "IQ2_S 9.65 < IQ2_XS 10.76 < IQ2_XXS 14.09" in found["board_order"]
    assert {"no_error_bars", "text_unknown", "tokens_unknown", "coarse_sizes", "other_model", "unequal_sizes"} <= set(
        found
    )
    assert not {"cut_delta", "wrong_delta"} & set(found)
    assert "5 of 5" in found["same_as_published"]


def test_clean_card_has_no_such_findings() -> None:
    (one,) = audit_text(CLEAN, "card.md")
    assert [finding.kind for finding in one.findings] == ["unequal_sizes"]
    assert "another model" in one.notes[0]


def test_the_board_is_clean_against_itself() -> None:
    text = "Llama 3 8B\n\n| quant | size | ppl |\n|---|---|---|\n"
    rows = _published("llamacpp_llama3_8b.csv").rows
    assert len(rows) == 46
    for row in rows:
        if row.variant == "WT 10m" and row.base.ppl and row.base.size:
            text += f"| {row.type} | {row.base.size.value} GiB | {row.base.ppl.value} |\n"
    found = kinds(text)
    assert not {"bigger_but_worse", "board_order", "board_ratio", "board_size"} & set(found)


# --- deltas


def pair(*rows: str, header: str = HEADER, text: str = "") -> str:
    return "\n".join([header, RULE, *rows, "", text])


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ("20.00 | 16.00 | -20.0%", None),
        ("20.00 | 16.00 | −20 %", None),
        ("20.00 | 16.00 | 20.0% lower", None),
        ("20.00 | 16.00 | -4.00", None),  # a difference, not per cent
        ("20.00 | 16.01 | -19.9%", None),  # -19.95 may be rounded either way
        ("20.000 | 16.006 | -19.9%", "cut_delta"),  # -19.97
        ("20.00 | 16.00 | -21.0%", "wrong_delta"),
        ("20.00 | 16.00 | +20.0%", "wrong_delta"),
        ("16.00 | 20.00 | -20.0%", "wrong_delta"),
        ("20 | 16 | -19.0%", None),  # 20 may be 19.6
        ("13.44 | 11.75 | -12.5%", "unconfirmed_delta"),  # -12.574; 13.4365 and 11.7510 give -12.545
        ("13.44 ±0.45 | 11.75 ±0.39 | -12.5% [-14.5, -10.7]", None),  # with an interval of its own
        ("13.44 | 11.75 | -12.4%", "wrong_delta"),  # -12.644 to -12.505
    ],
)
def test_cut_and_wrong_deltas(cells: str, kind: str | None) -> None:
    row = f"| IQ2_S | {cells} | 2.5G | 2.6G | +0.1G | 1s | 1s |"
    assert DELTAS & set(kinds(pair(row))) == ({kind} if kind else set())


DELTAS = {"cut_delta", "wrong_delta", "unconfirmed_delta"}


def test_no_correct_difference_is_called_cut_or_wrong_and_no_impossible_one_is_missed() -> None:
    """Against a search of all figures that round to the printed ones."""
    random = np.random.default_rng(0)
    base = random.uniform(5, 60, 300)
    other = base * random.uniform(0.5, 1.2, 300)
    seen: Counter[str] = Counter()
    for a, b in zip(base.tolist(), other.tolist(), strict=True):
        right, first, second = 100 * (b / a - 1), f"{a:.2f}", f"{b:.2f}"
        grid = np.linspace(-0.005, 0.005, 101)
        possible = 100 * ((float(second) + grid[:, None]) / (float(first) + grid) - 1)
        for cut in (False, True):
            printed = math.trunc(10 * right) / 10 if cut else round(right, 1)
            row = f"| IQ2_S | {first} | {second} | {printed:+.1f}% | 2.5G | 2.6G | +0.1G | 1s | 1s |"
            found = DELTAS & set(kinds(pair(row)))
            is_possible = bool((abs(possible - printed) < 0.05).any())
            if is_possible:
                assert not found & {"cut_delta", "wrong_delta"}, row
            elif (abs(possible - printed) > 0.051).all():
                assert cut and found & {"cut_delta", "wrong_delta"}, row
            seen.update(found)
    assert seen["cut_delta"] > 30 and seen["unconfirmed_delta"] > 10


@pytest.mark.parametrize(("sizes", "is_wrong"), [("2.50G | 2.60G | +0.1G", False), ("2.50G | 2.60G | +0.3G", True)])
def test_deltas_of_sizes(sizes: str, is_wrong: bool) -> None:
    assert ("wrong_delta" in kinds(pair(f"| IQ2_S | 20.0 | 16.0 | -20.0% | {sizes} | 1s | 1s |"))) is is_wrong


def test_a_reduction_needs_no_sign() -> None:
    header = "| quant | std ppl | dg ppl | reduction |"
    assert not {"cut_delta", "wrong_delta"} & set(
        kinds(f"{header}\n|---|---|---|---|\n| IQ2_S | 20.00 | 16.00 | 20.0% |\n")
    )


# --- order and equal size


def board(*rows: tuple[str, float, float]) -> str:
    return "| quant | size | ppl |\n|---|---|---|\n" + "".join(f"| {q} | {s} GiB | {p} |\n" for q, s, p in rows)


def test_exchanged_neighbours() -> None:
    found = kinds(board(("IQ2_XXS", 2.0, 14.1), ("IQ2_XS", 2.2, 9.65), ("IQ2_S", 2.4, 10.7), ("IQ3_S", 3.1, 7.0)))
    assert "IQ2_XS 9.65 (2.2GiB) < IQ2_S 10.7 (2.4GiB)" in found["bigger_but_worse"]
    assert "IQ2_XS and IQ2_S exchanged" in found["looks_exchanged"]


def test_families_and_errors_are_told_apart() -> None:
    assert "bigger_but_worse" not in kinds(board(("IQ2_M", 2.74, 8.60), ("Q2_K", 2.96, 8.65)))
    noisy = "| quant | size | ppl |\n|---|---|---|\n| IQ2_XS | 2.2G | 9.65 ±0.5 |\n| IQ2_S | 2.4G | 9.90 ±0.5 |\n"
    assert "bigger_but_worse" not in kinds(noisy)
    assert "bigger_but_worse" in kinds(noisy.replace(" ±0.5", " ±0.05"))


def test_interpolation_by_hand() -> None:
    """Between 16 at 2.0G and 4 at 3.0G the ladder has 8 at 2.5G and 16 / 4**0.25 at 2.25G."""
    rows = [
        "| IQ2_XXS | 16.00 | 9.00 | -43.8% | 2.00G | 2.50G | +0.50G | 1s | 1s |",
        "| IQ2_S | 4.00 | 3.90 | -2.5% | 3.00G | 3.10G | +0.10G | 1s | 1s |",
        "| IQ2_XS | 16.00 | 11.20 | -30.0% | 2.00G | 2.25G | +0.25G | 1s | 1s |",
    ]
    (table,) = read_tables(pair(*rows))
    verdicts = [equal_size(row, table) for row in table.rows]
    assert [one.word for one in verdicts if one] == ["loses", None, "wins"]
    first, outside, last = verdicts
    assert first and outside and last and first.ladder_ppl and last.ladder_ppl
    assert first.ladder_ppl == pytest.approx(8)
    assert first.holds
    assert last.ladder_ppl == pytest.approx(16 / math.sqrt(2))
    assert not last.holds, "with 0.01G of rounding it may lose"
    assert outside.better is None


def test_of_one_size_the_best_standard_row_counts() -> None:
    rows = [
        "| IQ2_XS | 12.00 | 11.00 | -8.3% | 2.7G | 2.7G | 0.0G | 1s | 1s |",
        "| IQ2_S | 10.00 | 9.00 | -10.0% | 2.7G | 2.7G | 0.0G | 1s | 1s |",
    ]
    (table,) = read_tables(pair(*rows))
    verdicts = [equal_size(row, table) for row in table.rows]
    assert [(one.word, one.ladder_ppl) for one in verdicts if one and one.ladder_ppl] == [
        ("loses", pytest.approx(10)),
        ("wins", pytest.approx(10)),
    ]


# --- claims

ROWS = (
    "| IQ2_XXS | 20.00 | 16.00 | -20.0% | 1.00G | 1.10G | +0.10G | 100.0s | 103.0s |",
    "| IQ2_S | 10.00 | 9.50 | -5.0% | 1.50G | 1.70G | +0.20G | 110.0s | 121.0s |",
)


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [
        ("Speed: under 5 % difference", "IQ2_S +10.0%"),
        ("Speed: under 12 % difference", None),
        ("it is 2-4% slower", "IQ2_S +10.0%"),
        ("it is 3-10% slower", None),
        ("up to 10% slower", None),
        ("up to 25% lower perplexity", "no row gets there"),
        ("up to 20% lower perplexity", None),
        ("up to 15% lower perplexity", "IQ2_XXS -20.0%"),
        ("IQ2_S: 12% lower perplexity", "IQ2_S -5.0%"),
        ("IQ2_S: 5% lower perplexity", None),
        ("a 12% perplexity reduction", None),  # may be a mean
        ("a 30% perplexity reduction", "IQ2_XXS -20.0%"),
        ("sizes increase by +0.1 to +0.2GB", None),
        ("sizes increase by 0.1-0.15GB", "IQ2_S +0.20GB"),
        ("IQ2_S: larger by only 0.1GB", "IQ2_S +0.20GB"),
        ("Q4_K_M: under 1% perplexity difference", None),  # not in the table
        ("under 1% perplexity difference to F16", None),  # another base
        ("First 25% of layers", None),
        ("a 4096-token context, 7B parameters, 2.5 GB of memory", None),
    ],
)
def test_claims(sentence: str, wrong: str | None) -> None:
    found = kinds(pair(*ROWS, text=sentence))
    assert wrong in found["claim_contradicted"] if wrong else "claim_contradicted" not in found


def test_claims_about_tokens_per_second_turn_round() -> None:
    rows = [
        row.replace("100.0s | 103.0s", "10.0 t/s | 9.0 t/s").replace("110.0s | 121.0s", "8.0 t/s | 7.9 t/s")
        for row in ROWS
    ]
    assert "IQ2_XXS -10.0%" in kinds(pair(*rows, text="at most 5% slower"))["claim_contradicted"]
    assert "claim_contradicted" not in kinds(pair(*rows, text="at most 5% faster"))


def test_claims_that_nothing_measures() -> None:
    found = kinds(pair(*ROWS, text="IQ2_XXS has 20.0% better accuracy"))
    assert "change of perplexity of IQ2_XXS" in found["claim_without_figures"]


@pytest.mark.parametrize(
    "warning",
    [
        "- iq2_s-dynamicgate: the policy LOWERS 14 tensors (11% of the weights) below the standard file: ffn_down (14)",
        "20 of 210 tensors (38% of the weights) cannot take the type asked for; the file is larger and no better",
        "- all: rounds of the timing pass differ by more than 5%: reference (11%), iq2_s-standard (15%)",
    ],
)
def test_shares_and_warnings_are_no_claims(warning: str) -> None:
    assert not {"claim_without_figures", "claim_contradicted"} & set(kinds(pair(*ROWS, text=warning)))


# --- what the harness writes itself

SWEEP = Path(__file__).parents[1] / "results" / "qwen2_5_coder_1_5b-wiki_sample-8x2048"
# Of these the tables are guilty: the sizes differ, llama.cpp's own files are better, the ladder ends.
TRUE_KINDS = {"loses_at_equal_size", "beaten_by_smaller", "outside_ladder", "unequal_sizes"}


def test_a_generated_card_is_not_accused(cli: Cli, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    assert cli("card", str(card), "--new", f"results={SWEEP}")[0] == 0
    text = card.read_text(encoding="utf-8")
    # The full figures are 13.436527 and 11.750968: -12.545 %.
    assert "|13.44 ±0.45 |11.75 ±0.39    |-12.5% [-14.5, -10.7]|" in text
    assert {finding.kind for one in audit_text(text, card.name) for finding in one.findings} == TRUE_KINDS
    shown = audit_text(text.replace("-12.5% [-14.5", "-13.5% [-14.5"), card.name)
    assert "wrong_delta" in {finding.kind for one in shown for finding in one.findings}


def test_the_tables_of_a_report() -> None:
    text = (SWEEP / "table.md").read_text(encoding="utf-8")
    first, second = audit_text(text, "table.md")
    assert ({one.kind for one in first.findings}, second.findings) == (TRUE_KINDS, ())
    view = audit_text_view("table.csv", audit_text((SWEEP / "table.csv").read_text(), "table.csv", is_csv=True))
    assert "PPL 105.58 -> 34.33 (-67.49%)" in view and "34.33 at 618.6M against" in " ".join(view.split())
    assert not re.search(r"\d\.\d{5}|\d{7}", view)


@pytest.mark.parametrize(
    ("line", "is_said"),
    [
        ("m on wiki_sample: 8 windows of 2048 tokens", True),
        ("m on mine.txt (12,000 tokens)", True),
        ("measured on 8 windows of 2048 tokens", False),
        ("measured on a CPU with 8 windows", False),
    ],
)
def test_where_the_text_is_said(line: str, is_said: bool) -> None:
    assert ("text_unknown" not in kinds(f"{line}\n\n{pair(*ROWS)}")) is is_said


# --- models and boards


@pytest.mark.parametrize(
    ("caption", "compared"),
    [
        ("Results of Llama-3-8B", True),
        ("Llama 3 8B Instruct", True),
        ("meta-llama/Meta-Llama-3-8B", True),
        ("Llama-3.1-8B", False),
        ("Llama-3_3-Nemotron-49B", False),
        ("Qwen-3-8B", False),
        ("nothing", False),
    ],
)
def test_boards_only_for_their_model(caption: str, compared: bool) -> None:
    (one,) = audit_text(f"{caption}\n\n{pair(*ROWS)}", "card.md")
    assert any(finding.kind.startswith("board") for finding in one.findings) is compared
    assert ("not compared" in one.notes[0]) is not compared


# --- the command line


def test_verb(cli: Cli, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text(PUBLISHED, encoding="utf-8")
    code, out, err = cli("audit", str(card))
    assert (code, err) == (0, "")
    assert "! bigger_but_worse" in out and "at equal size loses" in out
    assert max(map(len, out.splitlines())) <= 120
    code, out, err = cli("audit", "--json", str(card))
    assert (code, err) == (0, "")
    (table,) = json.loads(out)["tables"]
    assert table["rows"][0]["delta_ppl_pct"] == pytest.approx(100 * (9.84 / 11.30 - 1))
    assert {"kind", "what", "why", "todo"} == set(table["findings"][0])
    assert cli("audit", "--help")[0] == 0


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"", "a.md", "no table"),
        (b"some words\n", "a.md", "no table at all"),
        (b"quant\nIQ2_S\n", "a.csv", "only one column"),
        (b"quant,colour\nIQ2_S,red\n", "a.csv", "columns of the first table: quant, colour"),
        (b"quant,ppl\n", "a.csv", "no table"),
        (b"\x7fELF\0\0\0\1\2\3", "a.md", "binary"),
        (bytes(range(1, 32)) * 50, "a.md", "binary"),
        ("quant,ppl\nIQ2_S,9\n".encode("utf-16"), "a.csv", "binary"),
        (b"quant,ppl\n" + b"IQ2_S,9\n" * (MAX_ROWS + 1), "a.csv", "rows"),
        (b"\n" * 200_000, "a.md", "lines"),
        (b"quant,ppl\n" + b"x" * 200_000, "a.csv", "no table"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli: Cli, tmp_path: Path, content: bytes, name: str, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    code, out, err = cli("audit", str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_files_that_are_none(cli: Cli, tmp_path: Path) -> None:
    large = tmp_path / "large.md"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for arguments in (
        [],
        ["a", "b"],
        ["--nope"],
        [str(tmp_path)],
        [str(tmp_path / "none.md")],
        [str(large)],
        ["/dev/zero"],
    ):
        code, out, err = cli("audit", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments


def test_a_strangers_control_characters_do_not_reach_the_terminal() -> None:
    text = pair(*ROWS, text="Speed: under 5% difference \x1b[31m\x07").replace("IQ2_S ", "IQ2_S\x1b]0;x\x07 ")
    view = audit_text_view("card\x1b[2J.md", audit_text(text, "card.md"))
    assert "\x1b" not in view and "\x07" not in view


@pytest.mark.parametrize(
    "hostile",
    [
        *("|" * 60_000, "-|" * 30_000 + "x", "1" * 60_000, "1 " * 30_000, "<" * 60_000, "[" * 60_000, "\t" * 60_000),
        *("full " * 12_000, "| " + "-" * 4000 + "x |\n" * 50, "1-1%" * 15_000, "**__" * 15_000),
    ],
)
def test_hostile_lines_take_no_time(hostile: str) -> None:
    for text in (f"{PUBLISHED}\n{hostile}", hostile, PUBLISHED.replace("11.30", hostile[:4000])):
        with contextlib.suppress(UserError):
            audit_text_view("card.md", audit_text(text, "card.md"))


# --- fuzzing

CELL = st.one_of(
    st.sampled_from(
        ["IQ2_S", "Q4_K_M", "9.84", "-12.9%", "2.5G", "0", "0.0s", "1e9", "±", "−", "", "F16", "3.1 t/s", "1G"]
    ),
    st.floats(allow_nan=True).map(str),
    st.text(max_size=8),
)
NAMES = st.sampled_from(
    [*HEADER.strip("| ").split(" | "), "quant", "ppl", "ppl_se", "size", "imatrix", "reduction", "", "x"]
)


def is_survived(text: str, *, is_csv: bool) -> None:
    """No exception but UserError, and the result can be shown and written."""
    try:
        audits = audit_text(text, "card.md", is_csv=is_csv)
    except UserError as error:
        assert "\n" not in str(error)
        return
    audit_text_view("card.md", audits)
    json.dumps(audit_json("card.md", audits), allow_nan=False)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=400), st.booleans())
@settings(max_examples=150)
def test_any_text(text: str, is_csv: bool) -> None:
    is_survived(text, is_csv=is_csv)


@given(
    st.lists(NAMES, min_size=1, max_size=10),
    st.lists(st.lists(CELL, max_size=11), max_size=8),
    st.sampled_from(["|", "\t", "  ", ",", ";"]),
    st.text(max_size=60),
    st.booleans(),
)
@settings(max_examples=200)
def test_any_table(header: list[str], rows: list[list[str]], between: str, tail: str, is_csv: bool) -> None:
    is_survived("\n".join([between.join(header), *map(between.join, rows), "", f"Llama-3-8B {tail} 5%"]), is_csv=is_csv)


@given(
    st.lists(st.tuples(*[CELL] * 9), max_size=6), st.text(alphabet="IQ2_S 0123456789.%<-toperlxysizGBwadm", max_size=80)
)
@settings(max_examples=200)
def test_any_cells_in_a_good_table(rows: list[tuple[str, ...]], sentence: str) -> None:
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    is_survived("Llama-3-8B\n" + pair(*ROWS, *lines, text=sentence), is_csv=False)
