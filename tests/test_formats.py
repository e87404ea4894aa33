"""Tables in every format, sentences, the page, and the verb `report`; published figures give the published cells."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import metrics
from harness.formats import html_table, latex, markdown
from harness.page import page
from harness.summary import key_improvements, tradeoffs
from harness.tables import Table, board_table, card_table, file_table, measured_rows, recommendation

Cli = Callable[..., tuple[int, str, str]]
GIB = 1 << 30

# The table "Quantization Performance Comparison (Llama-3-8B)" of the model cards that publish DynamicGate files
# (Mungert, Hugging Face): quant, both perplexities, sizes in G, seconds; and what is printed as its change.
PUBLISHED = [
    ("IQ2_XXS", 11.30, 9.84, 2.5, 2.6, 234, 246, "-12.9%", "+0.1G"),
    ("IQ2_XS", 11.72, 11.63, 2.7, 2.8, 242, 246, "-0.8%", "+0.1G"),
    ("IQ2_S", 14.31, 9.02, 2.7, 2.9, 238, 244, "-36.9%", "+0.2G"),
    ("IQ1_M", 27.46, 15.41, 2.2, 2.5, 206, 212, "-43.9%", "+0.3G"),
    ("IQ1_S", 53.07, 32.00, 2.1, 2.4, 184, 209, "-39.7%", "+0.3G"),
]


def comparison(**changes: object) -> pd.DataFrame:
    """The published figures as the frame that a sweep's comparison is."""
    rows = []
    for quant, std, dg, std_g, dg_g, std_s, dg_s, *_ in PUBLISHED:
        row: dict[str, object] = {"quant": quant.lower(), "policy": "dynamicgate", "mode": "dynamicgate"}
        row |= {"std_ppl": std, "std_ppl_se": None, "dg_ppl": dg, "dg_ppl_se": None, "dg_name": f"{quant.lower()}-dg"}
        row |= {"delta_ppl_pct": 100 * (dg / std - 1), "delta_ppl_pct_low": None, "delta_ppl_pct_high": None}
        row |= {"std_bytes": std_g * GIB, "dg_bytes": dg_g * GIB, "delta_bytes": (dg_g - std_g) * GIB}
        row |= {"std_speed_s": float(std_s), "dg_speed_s": float(dg_s), "p_holm": 0.001}
        rows.append({**row, **changes})
    return pd.DataFrame(rows)


def test_published_figures_give_the_published_cells() -> None:
    table = card_table(comparison())
    assert markdown(table).splitlines()[0].replace(" ", "") == (
        "|Quantization|StandardPPL|DynamicGatePPL|ΔPPL|StdSize|DGSize|ΔSize|StdSpeed|DGSpeed|"
    )
    for cells, (quant, std, dg, std_g, dg_g, std_s, dg_s, delta, delta_size) in zip(table.rows, PUBLISHED, strict=True):
        rounded = {"-36.9%": "-37.0%"}.get(delta, delta)  # the card cut -36.97 % instead of rounding it
        assert cells == (
            *(quant, f"{std:.2f}", f"{dg:.2f}", rounded, f"{std_g}G", f"{dg_g}G", delta_size, f"{std_s}s", f"{dg_s}s"),
        )


def test_sentences_say_only_what_is_beyond_noise() -> None:
    table = comparison()
    sentences = key_improvements(table)
    assert sentences[0] == "IQ1_M: perplexity 27.46 → 15.41, -43.9%, for +307.2M"
    assert [sentence.split(":")[0] for sentence in sentences] == ["IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XXS", "IQ2_XS"]
    runs = pd.DataFrame(
        {
            "name": ["x", "y", "p"],
            "mode": ["dynamicgate", "standard", "placebo"],
            "status": ["ok"] * 3,
            "verdict": ["loses", None, "loses"],
            "dominated_by": [None, "z", "z"],
        }
    )
    text = tradeoffs(table, runs, pd.DataFrame())
    assert text[0] == "Sizes change by +102.4M to +307.2M (+4% to +14%)"
    assert text[-1] == "At equal size worse than the standard ladder: x"
    beaten = tradeoffs(table, runs.assign(dominated_by=["z", "z", "z"]), pd.DataFrame())
    assert beaten[-1] == "No larger and better beyond noise: z than x"
    noise = comparison(p_holm=0.2)
    assert key_improvements(noise) == []
    assert any(line.startswith("Within noise: IQ2_XXS, IQ2_XS") for line in tradeoffs(noise, runs, pd.DataFrame()))
    worse = comparison(delta_ppl_pct=4.0, delta_ppl_pct_low=1.0, delta_ppl_pct_high=7.0)
    assert key_improvements(worse) == []
    assert "IQ1_M: perplexity rises, +4.0% [+1.0, +7.0]" in tradeoffs(worse, runs, pd.DataFrame())
    assert "Seconds for the prompt set change by +1.7% to +13.6%" in text, "209 s after 184 s, 246 s after 242 s"
    speed = pd.DataFrame({"delta_generate_pct": [None, -4.9, -13.6], "generate_spread": [0.02, 0.123, 0.01]})
    spoken = tradeoffs(table, runs, speed.assign(prompt_spread=0.04))
    assert "Generated tokens/s change by -13.6% to -4.9% (rounds of one file differ by up to 12.3%)" in spoken
    assert "Seconds for the prompt set change by +1.7% to +13.6% (rounds of one file differ by up to 4.0%)" in spoken


def test_errors_of_delta_p_and_of_the_ppl_difference_by_simulation() -> None:
    """Standard errors equal the spread over repeated samples of independent tokens."""
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"mean": [], "mean_se": [], "rms": [], "rms_se": [], "ppl": [], "ppl_se": []}
    for _ in range(600):
        reference = rng.gamma(1.0, 1.5, 800)
        nll = reference + rng.normal(0.1, 0.2, 800)
        dp = metrics.probability_change(nll, reference)
        difference = metrics.perplexity_difference(nll, reference)
        values = (dp["dp_mean_pct"], dp["dp_mean_se_pct"], dp["dp_rms_pct"], dp["dp_rms_se_pct"], *difference)
        for name, value in zip(found, values, strict=True):
            assert value is not None
            found[name].append(value)
    for name in ("mean", "rms", "ppl"):
        assert np.mean(found[f"{name}_se"]) == pytest.approx(np.std(found[name]), rel=0.12)


def run_row(**changes: object) -> dict[str, object]:
    row: dict[str, object] = {"name": "iq1_m-standard", "mode": "standard", "status": "ok", "file_type": "iq1_m"}
    row |= {"policy": None, "mixture": "IQ1_M"}
    row |= {"file_bytes": 5 * GIB, "bpw": 2.0, "ppl": 8.0, "ppl_se": 0.1, "delta_ppl": 1.0, "delta_ppl_se": 0.01}
    row |= {"kld_mean": 0.03, "kld_se": 0.001, "dp_mean_pct": -0.5, "dp_mean_se_pct": 0.01, "dp_rms_pct": 5.0}
    return {**row, "dp_rms_se_pct": 0.05, "dominated_by": None, **changes}


def test_the_board_is_sorted_by_kld_and_the_files_by_size() -> None:
    rows = [
        run_row(name="a", mode="dynamicgate", policy="mine", kld_mean=0.3),
        run_row(name="b-standard", file_bytes=GIB),
        run_row(name="reference", mode="reference"),
    ]
    board = board_table(measured_rows(pd.DataFrame(rows)))
    assert [row[0] for row in board.rows] == ["b-standard", "a"]
    assert board.rows[0] == (
        *("b-standard", "1.000 GiB", "8.000000 ± 0.100000", "+1.000000 ± 0.010000", "0.030000 ± 0.001000"),
        *("-0.500000 ± 0.010000 %", "5.000000 ± 0.050000 %"),
    )
    files = file_table(measured_rows(pd.DataFrame(rows))).rows
    assert [row[:2] for row in files] == [("a.gguf", "IQ1_M + dynamicgate+mine"), ("b-standard.gguf", "IQ1_M")]


def test_recommendations_follow_the_figures() -> None:
    words = [recommendation(run_row(kld_mean=kld)) for kld in (0.005, 0.03, 0.1, 0.5)]
    assert len(set(words)) == 4
    assert recommendation(run_row(dominated_by="better")) == "take better: no larger, and better"
    assert "not compared" in recommendation(run_row(kld_mean=None))


CELLS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(CELLS, CELLS), max_size=4))
def test_cells_cannot_break_out_of_a_table(rows: list[tuple[str, str]]) -> None:
    table = Table("t", ("a", "b"), rows)
    lines = markdown(table).split("\n")
    assert len(lines) == len(rows) + 2
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}
    assert "<" not in markdown(table)
    parser = Tags()
    parser.feed(html_table(table))
    assert parser.tags == ["table", "thead", "tr", "th", "th", "tbody", *(["tr", "td", "td"] * len(rows))]


def test_latex_escapes() -> None:
    text = latex(Table("100 % & more", ("a_b", "Δ"), [("x\\y", "1.0 ±0.1"), ("#1 {z}", "<$5")]))
    assert r"\caption{100 \% \& more}" in text
    assert r"a\_b & $\Delta$ \\" in text
    assert r"x\textbackslash{}y & 1.0 $\pm$0.1 \\" in text
    assert r"\#1 \{z\} & $<$\$5 \\" in text


class Tags(HTMLParser):
    """Start tags and links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_escapes_everything_and_asks_for_nothing_else(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    evil = "<script>alert(1)</script>"
    finding = dict.fromkeys(("kind", "what", "why", "todo", "cases"), evil)
    text = page(evil, [evil], [Table(evil, (evil,), [(evil,)])], {picture: evil}, [finding], {evil: {evil: evil}})
    parser = Tags()
    parser.feed(text)
    assert parser.tags.count("script") == 1, "its own"
    assert all(link.startswith("data:image/png;base64,") for link in parser.links) and len(parser.links) == 1
    assert "http" not in text


def test_report_of_one_and_of_several_sweeps(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    shared = [one for one in tiny_overrides if not one.startswith("results.name")]
    for name, quant in (("one", "iq2_s"), ("two", "q4_0")):
        assert cli("sweep", f"quant={quant}", *shared, f"results.name={name}")[0] == 0
    one, two = (tmp_path / "results" / name for name in ("one", "two"))
    code, out, err = cli("report", f"results={one}")
    assert code == 0, err
    made = {path.name for path in (one / "report").iterdir()}
    assert {"report.html", "card.md", "card.tex", "card.html", "runs.parquet", "tradeoff.svg", "board.md"} <= made
    assert all(str(path) in out for path in (one / "report").iterdir())
    frame = pd.read_parquet(one / "report" / "runs.parquet")
    assert frame.ppl.tolist() == pytest.approx(pd.read_csv(one / "runs.csv").ppl.tolist(), rel=1e-12)
    code, out, err = cli("report", f"results={one}", f"results={two}", f"out={tmp_path / 'both'}")
    assert code == 0, err
    runs = pd.read_csv(tmp_path / "both" / "runs.csv")
    assert set(runs.quant) == {"reference", "iq2_s", "q4_0"}
    assert len(runs) == 5
    parser = Tags()
    parser.feed((tmp_path / "both" / "report.html").read_text())
    assert all(link.startswith("data:") for link in parser.links)
    # another prompt set: refused, naming the field
    assert cli("sweep", "quant=q4_0", *shared, "prompts.n_windows=1", "results.name=three")[0] == 0
    code, _, err = cli("report", f"results={one}", f"results={tmp_path / 'results' / 'three'}", f"out={tmp_path / 'x'}")
    assert code == 2 and "prompt_set" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "results=DIR"),
        (["result=x"], "results=DIR"),
        (["results=/nowhere/at/all"], "no folder of a sweep"),
        (["results=a", "results=b"], "out=DIR"),
        (["allow_different=prompt_set.id"], "another thing"),
        (["out=a", "out=b", "results=a"], "twice"),
    ],
)
def test_bad_arguments_of_report(cli: Cli, arguments: list[str], said: str) -> None:
    code, _, err = cli("report", *arguments)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_report_needs_neither_llama_cpp_nor_hydra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = sys.modules['hydra'] = sys.modules['datasets'] = None\n"
        "from harness.cli import main; sys.exit(main(['report', 'results=/nowhere']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "no folder of a sweep" in result.stderr
    assert json.dumps(result.stdout) == '""'
