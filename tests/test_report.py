"""Tables from made-up records: columns, rounding, absent numbers, refusals, the picture."""

import json
import math
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import checks
from harness.compare import Measured, dominators
from harness.compare_view import comparison_text
from harness.errors import UserError
from harness.passes import SpeedPass, Timing, write_speed
from harness.pictures import Picture
from harness.record import (
    COMPARABLE,
    SCHEMA_VERSION,
    Record,
    mode_label,
    read_record,
    read_records,
    record_path,
    write_record,
)
from harness.report import Report, write_full_report, write_report
from harness.results import load_results
from harness.stats import MIN_BLOCKS, holm, mean_interval
from harness.store import key_of
from harness.tables import percent, plus_minus, seconds, size

RESULTS_README = Path(__file__).resolve().parent.parent / "results" / "README.md"
HEADER = [
    "Quantization",
    "Standard PPL",
    "DynamicGate PPL",
    "Δ PPL",
    "Std Size",
    "DG Size",
    "Δ Size",
    "Std Speed",
    "DG Speed",
]
MIB = 1 << 20
# 4 windows of 32 tokens, of which 15 count: perplexities of some tens with errors of a few, too few for intervals.
BASE = np.random.default_rng(7).exponential(2.0, (4, 15)) + 1.0
# 4 windows of 2048 tokens, of which 1023 count, as a sweep has them: 44 blocks. What is hard for one case is for all.
COMMON = np.random.default_rng(11).gamma(2.0, 1.0, (4, 1023))
TOP = np.random.default_rng(12).integers(0, 1000, (4, 1023), dtype=np.int32)
FINDING = {"kind": "fell_back", "what": "some tensors fell back", "why": "it misleads", "todo": "measure another"}


def save_stub(picture: Picture, path: Path, kind: str) -> None:
    """Stands in for `Picture.save`."""
    path.write_bytes(b"stub")


@pytest.fixture(autouse=True)
def picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests need no picture: theirs is a stub. Tests that ask for `real_picture` draw it."""
    if "real_picture" in request.fixturenames:
        return

    monkeypatch.setattr(Picture, "save", save_stub)


@pytest.fixture
def real_picture() -> None:
    """Let the report draw."""


def put(
    folder: Path,
    quant: str,
    mode: str,
    policy: str | None = None,
    *,
    nll: np.ndarray | None = BASE,
    top: np.ndarray | None = None,
    kld: np.ndarray | None = None,
    file_bytes: int = 100 * MIB,
    pass_s: float = 13.3,
    findings: tuple[dict[str, str], ...] = (),
    **changes: Any,
) -> Path:
    """Write the whole record of a case; one that failed when `nll` is None."""
    is_reference = mode == "reference"
    key = key_of(quant, mode, policy)
    windows, scored = (BASE if nll is None else nll).shape
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "quant": quant,
        "mode": mode,
        "policy": policy,
        "file_type": None if is_reference else quant,
        "created_utc": "2026-01-02T03:04:05+00:00",
        "reference": {
            "id": "r" * 64,
            "name": "tiny",
            "architecture": "llama",
            "file_type": "f16",
            "file_bytes": 250 * MIB,
            "n_params": 1_000_000,
            "source_sha256": "s" * 64,
            "derived_from": None,
        },
        "prompt_set": {
            "id": "p" * 64,
            "name": "wiki",
            "n_windows": windows,
            "window_tokens": 2 * scored + 2,
            "bos": 1,
            "text_sha256": "t" * 64,
        },
        "calibration": None
        if is_reference
        else {
            "id": "c" * 64,
            "name": "c4",
            "windows_id": "w" * 64,
            "n_windows": 2,
            "window_tokens": 512,
            "overlap_share": 0.0,
        },
        "variant": {
            "plan_id": "i" * 64,
            "file_bytes": file_bytes,
            "n_params": 1_000_000,
            "bpw": 4.25,
            "n_quantizable": 0 if is_reference else 20,
            "n_fallback": 0 if is_reference else 3,
            "fallback_share": 0.0 if is_reference else 0.125,
            "n_raised": 2,
            "n_lowered": 1,
            "lowered": None,
            "embedding_type": "q8_0",
            "output_type": "q6_k",
            "tensors": {},
        },
        "settings": {"first_scored": scored + 2, "ubatch_tokens": 512, "threads": 2},
        "versions": {"metrics": 2, "llama_cpp_python": "0.3.36"},
        "environment": {"commit": "0" * 40, "dirty": False, "machine": "here", "cpu": "fast"},
        "findings": list(findings),
    }
    if nll is None:
        data |= {"status": "failed", "error": "boom", "log_tail": ["last words"]}
    else:
        data |= {
            "status": "ok",
            "timings": {
                "quantize_s": None if is_reference else 20.5,
                "load_s": 0.25,
                "pass_s": pass_s,
                "window_pass_s": [pass_s / windows] * windows,
                "window_decode_s": [pass_s / windows] * windows,
            },
            "peak_rss_bytes": 300 * MIB,
        }
    data |= changes
    path = record_path(folder, quant, mode_label(mode, policy), data["key"])
    side = {}
    if nll is not None:
        side = {"nll": nll, "top": np.zeros(nll.shape, np.int32) if top is None else top}
        if not is_reference:
            side["kld"] = nll / 100 if kld is None else kld
    write_record(path, data, side)
    return path


def put_real(
    folder: Path, quant: str, mode: str, policy: str | None = None, *, mib: float, level: float, **changes: Any
) -> Path:
    """A case of real size: its nll are COMMON's plus `level` on average, exactly; its mean KLD is half of `level`."""
    name = f"{quant}-{mode_label(mode, policy)}"
    own = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.05, COMMON.shape)
    own -= own.mean()
    top = np.where(np.abs(own) > 0.1, TOP + 1, TOP).astype(np.int32)
    values = {"nll": COMMON + level + own, "kld": level / 2 + own / 10, "top": top}
    return put(folder, quant, mode, policy, **{"file_bytes": round(mib * MIB), **values, **changes})


def put_real_reference(folder: Path, **changes: Any) -> Path:
    """The reference of those cases."""
    return put(folder, "reference", "reference", **{"nll": COMMON, "top": TOP, "file_bytes": 250 * MIB, **changes})


def put_reference(folder: Path, **changes: Any) -> None:
    """The record of the reference."""
    put(folder, "reference", "reference", **{"file_bytes": 250 * MIB, **changes})


def put_pair(folder: Path, quant: str = "iq1_m", *, standard: float = 0.5, gate: float = 0.1) -> None:
    """A quant in both modes whose nll lie that much above the reference's."""
    put(folder, quant, "standard", nll=BASE + standard)
    put(folder, quant, "dynamicgate", "dynamicgate", nll=BASE + gate, file_bytes=90 * MIB)


def runs_csv(folder: Path) -> pd.DataFrame:
    """The written file, every cell as the text that stands there."""
    return pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)


def tables(text: str) -> dict[str, list[list[str]]]:
    """The cells of each markdown table by its first header, header first, without the rule below it."""
    found = {}
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            assert re.fullmatch(r"\|( ?-+ ?\|)+", lines[1])
            assert len({len(line) for line in lines}) == 1, "columns stand below each other"
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
            found[rows[0][0]] = rows
    return found


def table_rows(text: str) -> list[list[str]]:
    """The rows of the model card's table; none when there is no such table."""
    return tables(text).get("Quantization", [])


def case_rows(text: str) -> dict[str, list[str]]:
    """The rows of the table of cases, by the case's name."""
    rows = tables(text)["Case"]
    assert rows[0] == ["Case", "Size", "bpw", "PPL", "Mean KLD", "Same top", "At equal size", "vs placebo"]
    return {row[0]: row[1:] for row in rows[1:]}


def findings_of(folder: Path) -> dict[str, list[str]]:
    """The kinds of findings that findings.json holds, by case."""
    written = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    return {name: [finding["kind"] for finding in findings] for name, findings in written.items()}


def unwrapped(text: str) -> str:
    """The text with its line breaks taken out."""
    return " ".join(text.split())


# --- runs.csv


def documented_columns() -> list[str]:
    """The first column of the table in results/README.md, with its ranges and endings written out."""
    section = RESULTS_README.read_text(encoding="utf-8").split("## runs.csv")[1].split("\n## ")[0]
    names: list[str] = []
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        cell = line.split("|")[1]
        cell = cell.replace("`kld_p90` .. `kld_p99_9`", "`kld_p90`, `kld_p95`, `kld_p99`, `kld_p99_9`")
        dp = ", ".join(f"`dp_p{percent}_pct`" for percent in (1, 5, 25, 50, 75, 95, 99))
        cell = cell.replace("`dp_p1_pct` .. `dp_p99_pct`", dp)
        assert ".." not in cell, "a range that this test does not know"
        own = re.findall(r"`(\w+)`", cell)
        endings = [name for name in own if name.startswith("_")]
        own = [name for name in own if name not in endings]
        names += own + [name + ending for name in own for ending in endings]
    return names


@pytest.mark.skipif(not RESULTS_README.is_file(), reason="needs the checkout")
def test_every_column_is_documented_and_no_other(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    put(tmp_path, "iq2_s", "standard", nll=None)
    write_report(tmp_path)
    documented = documented_columns()
    assert len(set(documented)) == len(documented)
    assert sorted(runs_csv(tmp_path).columns) == sorted(documented)


@pytest.mark.skipif(not RESULTS_README.is_file(), reason="needs the checkout")
def test_every_written_file_is_documented(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    text = RESULTS_README.read_text(encoding="utf-8")
    for path in write_report(tmp_path).paths:
        assert f"| `{path.name}` |" in text


def test_numbers_of_runs_csv_by_hand(tmp_path: Path) -> None:
    # nll 1, 2, 3, 6: see tests/test_metrics.py
    reference, variant = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[1.5, 2.0], [4.0, 6.5]])
    put_reference(tmp_path, nll=reference)
    put(tmp_path, "iq1_m", "standard", nll=variant, pass_s=4.0)
    write_report(tmp_path)
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("quant")
    assert runs.ppl["reference"] == pytest.approx(20.085536923187668, rel=1e-12)
    assert runs.ppl_se["reference"] == pytest.approx(20.085536923187668 * 1.0801234497346435, rel=1e-12)
    assert runs.ln_ppl_ratio_vs_reference["reference"] == 0
    assert runs.ln_ppl_ratio_vs_reference["iq1_m"] == pytest.approx(0.5, rel=1e-12)
    assert runs.ln_ppl_ratio_se["iq1_m"] == pytest.approx(0.20412414523193154, rel=1e-12)
    assert runs.n_windows.tolist() == [2, 2]
    assert runs.n_scored.tolist() == [4, 4]
    assert runs.tokens_per_s["iq1_m"] == 2 * 6 / 4.0
    expected = {
        "file_bytes": 100 * MIB,
        "bpw": 4.25,
        "n_fallback": 3,
        "fallback_share": 0.125,
        "n_quantizable": 20,
        "n_lowered": 1,
        "embedding_type": "q8_0",
        "output_type": "q6_k",
        "pass_s": 4.0,
        "load_s": 0.25,
        "quantize_s": 20.5,
        "peak_rss_bytes": 300 * MIB,
        "status": "ok",
        "key": key_of("iq1_m", "standard", None),
    }
    assert {name: runs.loc["iq1_m", name] for name in expected} == expected


def test_absent_numbers_are_empty_and_never_zero(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put(tmp_path, "iq1_m", "standard", nll=None)
    write_report(tmp_path)
    runs = runs_csv(tmp_path).set_index("quant")
    assert runs.policy.tolist() == ["", ""]
    assert (runs.file_type["reference"], runs.quantize_s["reference"]) == ("", "")
    measured = ["ppl", "ppl_se", "ln_ppl_ratio_vs_reference", "ln_ppl_ratio_se", "n_windows", "n_scored"]
    measured += ["pass_s", "tokens_per_s", "load_s", "quantize_s", "peak_rss_bytes", "kld_mean", "kld_p99_9"]
    measured += ["same_top", "dp_p1_pct", "verdict", "equal_size_ln_ppl", "vs_placebo", "dominated_by", "on_front"]
    assert runs.loc["iq1_m", measured].tolist() == [""] * len(measured)
    assert runs.status.tolist() == ["ok", "failed"]
    assert runs.file_bytes["iq1_m"] == str(100 * MIB), "the plan is known all the same"


def test_whole_numbers_stay_whole_beside_a_failed_case(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put(tmp_path, "iq1_m", "standard", nll=None)
    write_report(tmp_path)
    runs = runs_csv(tmp_path).set_index("quant")
    assert (runs.n_windows["reference"], runs.n_scored["reference"]) == ("4", "60")
    assert runs.peak_rss_bytes["reference"] == str(300 * MIB)


def test_without_a_reference_there_is_no_ratio_to_it(tmp_path: Path) -> None:
    put_pair(tmp_path)
    write_report(tmp_path)
    runs = runs_csv(tmp_path)
    assert runs.ln_ppl_ratio_vs_reference.tolist() == ["", ""]
    assert "" not in runs.ppl.tolist()


def test_a_failed_reference_is_no_reference(tmp_path: Path) -> None:
    put_reference(tmp_path, nll=None)
    put_pair(tmp_path)
    text = write_report(tmp_path).text
    assert set(runs_csv(tmp_path).ln_ppl_ratio_vs_reference) == {""}
    assert "FAILED: reference" in text
    assert len(table_rows(text)) == 2


def test_order_of_rows(tmp_path: Path) -> None:
    """The reference, then quants by the size of their standard file, standard first; whatever was written when."""
    put(tmp_path, "q8_0", "dynamicgate", "dynamicgate", file_bytes=10 * MIB, created_utc="2026-01-01T00:00:00+00:00")
    put(tmp_path, "q8_0", "standard", file_bytes=130 * MIB)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", file_bytes=200 * MIB)
    put(tmp_path, "iq1_m", "standard", file_bytes=40 * MIB)
    put(tmp_path, "q4_0", "standard", nll=None, file_bytes=80 * MIB)
    put_reference(tmp_path, file_bytes=250 * MIB)
    text = write_report(tmp_path).text
    runs = runs_csv(tmp_path)
    assert list(zip(runs.quant, runs["mode"], strict=True)) == [
        ("reference", "reference"),
        ("iq1_m", "standard"),
        ("iq1_m", "dynamicgate"),
        ("q4_0", "standard"),
        ("q8_0", "standard"),
        ("q8_0", "dynamicgate"),
    ]
    assert [row[0] for row in table_rows(text)[1:]] == ["IQ1_M", "Q8_0"]


# --- the table


def test_the_table_has_the_cells_of_the_model_card(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put(tmp_path, "iq2_s", "standard", nll=BASE + 0.5, file_bytes=2684354560, pass_s=120.4)
    put(tmp_path, "iq2_s", "dynamicgate", "dynamicgate", nll=BASE + 0.5, file_bytes=2576980378, pass_s=9.96)
    report = write_report(tmp_path)
    rows = table_rows(report.text)
    assert rows[0] == HEADER
    ppl, se = math.exp((BASE + 0.5).mean()), math.exp((BASE + 0.5).mean()) * BASE.std() / math.sqrt(59)
    cell = f"{ppl:.1f} ±{se:.1f}"
    assert 1 < se < 10, "so one decimal shows two figures"
    assert rows[1:] == [["IQ2_S", cell, cell, "+0.0%", "2.5G", "2.4G", "-0.1G", "120s", "10.0s"]]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == report.text


@pytest.mark.parametrize(
    ("delta", "cell"),
    [
        (-0.3697, "-37.0%"),
        (-0.3694, "-36.9%"),
        (-0.00051, "-0.1%"),
        (0.1236, "+12.4%"),
        (0.1234, "+12.3%"),
        (0.0996, "+10.0%"),
        (1.9999, "+200.0%"),
        (0.0, "+0.0%"),
    ],
)
def test_deltas_are_rounded_and_not_cut(tmp_path: Path, delta: float, cell: str) -> None:
    put(tmp_path, "iq1_m", "standard", nll=BASE)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=BASE + math.log1p(delta))
    assert table_rows(write_report(tmp_path).text)[1][3] == cell


@pytest.mark.parametrize(
    ("n_bytes", "cell"),
    [(math.floor(99.96 * MIB), "100.0M"), (math.floor(99.94 * MIB), "99.9M"), (math.floor(2.46 * 1024 * MIB), "2.5G")],
)
def test_sizes_are_rounded_and_not_cut(tmp_path: Path, n_bytes: int, cell: str) -> None:
    put(tmp_path, "iq1_m", "standard", file_bytes=n_bytes)
    assert table_rows(write_report(tmp_path).text)[1][4] == cell


def test_few_tokens_have_a_paired_delta_without_interval(tmp_path: Path) -> None:
    # differences dynamicgate - standard: -0.5, 0, -1, -0.5: mean -0.5, in 2 blocks
    put(tmp_path, "iq1_m", "standard", nll=np.array([[1.5, 2.0], [4.0, 6.5]]))
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=np.array([[1.0, 2.0], [3.0, 6.0]]))
    text = write_report(tmp_path).text
    assert table_rows(text)[1][3] == "-39.3%"
    row = pd.read_csv(tmp_path / "table.csv").iloc[0]
    assert row.delta_ppl_pct == pytest.approx(-39.34693402873666, rel=1e-12)
    assert row[["delta_ppl_pct_low", "delta_ppl_pct_high", "p", "p_holm", "resolvable_pct"]].isna().all()


def test_numbers_of_table_csv(tmp_path: Path) -> None:
    put_pair(tmp_path)
    write_report(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 1
    row = table.iloc[0]
    assert (row.quant, row.policy, row["mode"]) == ("iq1_m", "dynamicgate", "dynamicgate")
    assert row.std_ppl == pytest.approx(math.exp(BASE.mean() + 0.5), rel=1e-12)
    assert row.dg_ppl == pytest.approx(math.exp(BASE.mean() + 0.1), rel=1e-12)
    assert row.delta_ppl_pct == pytest.approx(100 * (math.exp(-0.4) - 1), rel=1e-12)
    assert (row.std_bytes, row.dg_bytes, row.delta_bytes) == (100 * MIB, 90 * MIB, -10 * MIB)
    assert (row.std_speed_s, row.dg_speed_s) == (13.3, 13.3)


def test_a_quant_in_one_mode_only_has_no_delta(tmp_path: Path) -> None:
    put_pair(tmp_path, "iq1_m")
    put(tmp_path, "iq2_xs", "standard", file_bytes=110 * MIB)
    put(tmp_path, "iq2_s", "dynamicgate", "dynamicgate", file_bytes=120 * MIB)
    rows = table_rows(write_report(tmp_path).text)
    assert rows[2][2:4] == ["-", "-"]
    assert rows[2][4:] == ["110.0M", "-", "-", "13.3s", "-"]
    assert rows[3][:2] == ["IQ2_S", "-"]
    assert rows[3][3:] == ["-", "-", "120.0M", "-", "-", "13.3s"]
    assert "nan" not in "".join(map("".join, (row[1:] for row in rows)))
    assert pd.read_csv(tmp_path / "table.csv").delta_ppl_pct.isna().tolist() == [False, True, True]


def test_a_quant_in_standard_mode_only_is_called_by_its_name(tmp_path: Path) -> None:
    put_pair(tmp_path, "iq1_m")
    put(tmp_path, "iq2_xs", "standard", file_bytes=110 * MIB)
    assert [row[0] for row in table_rows(write_report(tmp_path).text)[1:]] == ["IQ1_M", "IQ2_XS"]


def test_standard_mode_alone(tmp_path: Path) -> None:
    put(tmp_path, "iq2_xs", "standard")
    (row,) = table_rows(write_report(tmp_path).text)[1:]
    assert row[0] == "IQ2_XS"
    assert row[2] == row[3] == row[5] == row[6] == row[8] == "-"


def test_other_policies_have_rows_of_their_own(tmp_path: Path) -> None:
    put_pair(tmp_path)
    put(tmp_path, "iq1_m", "dynamicgate", "mine", nll=BASE + 0.2)
    rows = table_rows(write_report(tmp_path).text)[1:]
    assert [row[0] for row in rows] == ["IQ1_M", "IQ1_M (mine)"]
    assert rows[0][1] == rows[1][1], "both beside the one standard file"
    assert rows[0][2] != rows[1][2]
    assert rows[1][3] == "-25.9%"


def test_the_reference_is_no_row_but_a_line(tmp_path: Path) -> None:
    put_reference(tmp_path, pass_s=15.04)
    put_pair(tmp_path)
    text = write_report(tmp_path).text
    assert len(table_rows(text)) == 2
    assert case_rows(text)["reference"][-2:] == ["-", "-"]
    (line,) = (line for line in text.splitlines() if line.startswith("Reference"))
    assert "F16" in line
    assert f"PPL {math.exp(BASE.mean()):.1f} ±" in line
    assert "250.0M, scored in 15.0s" in line
    first = text.splitlines()[0]
    for word in ("tiny", "wiki", "4 windows of 32 tokens", "2 threads"):
        assert word in first


def test_the_newest_record_of_a_case_is_the_one_shown(tmp_path: Path) -> None:
    put(tmp_path, "iq1_m", "standard", nll=BASE + 2, key="a" * 64, created_utc="2026-01-01T00:00:00+00:00")
    put(tmp_path, "iq1_m", "standard", nll=BASE + 1, key="b" * 64, created_utc="2026-01-01T00:00:01+00:00")
    write_report(tmp_path)
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert runs.ppl.tolist() == [pytest.approx(math.exp(BASE.mean() + 1))]


# --- failed cases


@pytest.mark.parametrize("failed", ["standard", "dynamicgate"])
def test_a_failed_case_is_named_and_the_other_mode_still_shown(tmp_path: Path, failed: str) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    policy = None if failed == "standard" else failed
    put(tmp_path, "iq1_m", failed, policy, nll=None, key="f" * 64, created_utc="2027-01-01T00:00:00+00:00")
    report = write_report(tmp_path)
    assert f"FAILED: iq1_m {failed}" in report.text
    (row,) = table_rows(report.text)[1:]
    assert row[3] == "-"
    assert (row[1] == "-", row[2] == "-") == (failed == "standard", failed == "dynamicgate")
    assert list(case_rows(report.text)) == [
        "reference",
        f"iq1_m-{'dynamicgate' if failed == 'standard' else 'standard'} *",
    ]
    assert len(report.paths) == 6


def test_when_every_case_failed_there_is_a_report_without_picture(tmp_path: Path) -> None:
    put(tmp_path, "iq1_m", "standard", nll=None)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=None)
    report = write_report(tmp_path)
    assert table_rows(report.text) == []
    assert report.text.count("FAILED") == 2
    assert {path.name for path in report.paths} == {
        "runs.csv",
        "table.csv",
        "table.md",
        "findings.json",
        "machine.json",
    }
    assert json.loads((tmp_path / "findings.json").read_text()) == {"all": []}
    assert runs_csv(tmp_path).status.tolist() == ["failed", "failed"]
    assert not (tmp_path / "tradeoff.png").exists()


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    put(tmp_path, "iq1_m", "standard", nll=None)
    write_report(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 0
    assert "delta_ppl_pct" in table.columns


def test_only_the_reference(tmp_path: Path, real_picture: None) -> None:
    put_reference(tmp_path)
    report = write_report(tmp_path)
    assert tables(report.text) == {}
    assert "Reference F16" in report.text and ", scored in 13.3s" in report.text
    assert runs_csv(tmp_path).quant.tolist() == ["reference"]


def test_one_token_has_a_value_and_no_error(tmp_path: Path, real_picture: None) -> None:
    put_reference(tmp_path, nll=np.array([[2.0]]))
    put(tmp_path, "iq1_m", "standard", nll=np.array([[3.0]]))
    assert table_rows(write_report(tmp_path).text)[1][1] == f"{math.e**3:.2f}"


# --- refusals


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMPARABLE)
def test_unlike_records_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    path = put(tmp_path, "iq2_s", "standard")
    data = json.loads(path.read_text())
    group, field = name.split(".")
    another = {str: "another", int: 987, bool: False}[type(data[group].get(field, True))]
    data[group][field] = another
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        write_report(tmp_path)
    for word in (name, str(another), str(tmp_path)):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


HOSTILE: dict[str, Any] = {
    "variant": None,
    "variant.bpw": 1e300,
    "variant.n_lowered": -1,
    "findings": [{"kind": "x"}],
    "environment": {},
    "quant": ["iq2_s"],
    "created_utc": 7,
    "mode": "reference",
    "reference.name": None,
    "reference.file_type": 1,
    "reference.architecture": "a\x1b[2Jb",
    "file_type": None,
    "variant.file_bytes": 0,
    "variant.n_params": 1.5,
    "variant.embedding_type": ["q4_k"],
    "variant.tensors": {"a": {"type": "q4_k", "standard": "no type"}},
    "settings.threads": "2; x",
    "settings.flash_attention": None,
    "settings": None,
    "versions": {"llama_cpp_python": None},
    "environment.machine": ["one"],
    "environment.memory_bytes": "much",
    "timings": {"pass_s": "long"},
    "timings.load_s": -1,
    "peak_rss_bytes": 0.5,
    "calibration": {"name": "x"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_left_out_with_a_finding(tmp_path: Path, name: str) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    path = put(tmp_path, "iq2_s", "standard")
    data = json.loads(path.read_text())
    *groups, field = name.split(".")
    place = data[groups[0]] if groups else data
    place[field] = HOSTILE[name]
    path.write_text(json.dumps(data))
    report = write_report(tmp_path)
    assert "unreadable_record" in report.text and path.name in report.text.replace("\n    ", "")
    assert "iq2_s" not in runs_csv(tmp_path).quant.tolist()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"schema_version": 1, "bpw": NaN}'])
def test_json_that_python_alone_would_read_is_left_out(tmp_path: Path, content: str) -> None:
    put_reference(tmp_path)
    put(tmp_path, "iq2_s", "standard").write_text(content)
    assert "unreadable_record" in write_report(tmp_path).text


EVIL = "<script>x</script>\"' onload=x $\\frac{$ & ~"


class Tags(HTMLParser):
    """Start tags with the names of their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, frozenset[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, frozenset(name for name, _ in attrs)))


def put_hostile(folder: Path, text: str) -> Path:
    """Records in which every text that a report shows is `text`; that of a quant, mode or policy is a folder's too."""
    reference: dict[str, Any] = dict.fromkeys(("id", "name", "architecture", "file_type", "source_sha256"), text)
    prompts: dict[str, Any] = dict.fromkeys(("id", "name", "text_sha256"), text)
    sizes = {"n_windows": BASE.shape[0], "window_tokens": 2 * BASE.shape[1] + 2}
    environment = dict.fromkeys(("commit", "machine", "cpu", "platform", "system_info", "python", "harness"), text)
    changes: dict[str, Any] = {
        "reference": {**reference, "file_bytes": 250 * MIB, "n_params": 10**6, "derived_from": text},
        "prompt_set": {**prompts, **sizes},
        "environment": {**environment, "dirty": True, "cpu_features": [text]},
        "findings": [dict.fromkeys(("kind", "what", "why", "todo"), text)],
        "settings": {"first_scored": BASE.shape[1] + 2, "ubatch_tokens": 512, "threads": 2, text: text},
        "versions": {"metrics": 2, "llama_cpp_python": text, text: text},
    }
    put(folder, "reference", "reference", **changes)
    name = text.replace("/", "")
    put(folder, name, "standard", **changes)
    put(folder, name, "dynamicgate", name, nll=BASE * 1.01, **changes)
    return folder


def test_no_text_of_a_record_becomes_markup(tmp_path: Path) -> None:
    """The same tags, with the same attributes, as for harmless names; in Markdown and SVG none."""
    found = {}
    for kind, text in (("evil", EVIL), ("harmless", "x")):
        write_full_report([put_hostile(tmp_path / kind, text)], tmp_path / kind / "report")
        tags = Tags()
        tags.feed((tmp_path / kind / "report" / "report.html").read_text(encoding="utf-8"))
        found[kind] = tags.found
    assert found["evil"] == found["harmless"] and [tag for tag, _ in found["evil"]].count("script") == 1
    markdown = list((tmp_path / "evil" / "report").glob("*.md"))
    assert markdown and not any("<" in path.read_text(encoding="utf-8") for path in markdown)


def test_a_name_with_dollars_is_no_formula(tmp_path: Path, real_picture: None) -> None:
    write_full_report([put_hostile(tmp_path, EVIL)], tmp_path / "report")
    pictures = list((tmp_path / "report").glob("*.svg"))
    assert pictures and not any("<script" in path.read_text(encoding="utf-8") for path in pictures)
    assert "frac{$" in (tmp_path / "report" / "tradeoff.svg").read_text(encoding="utf-8").lower()


def test_a_mode_without_a_policy_may_stand_beside_one_with(tmp_path: Path) -> None:
    """pandas makes NaN of the policy that is not there."""
    put_reference(tmp_path)
    put_pair(tmp_path)
    put(tmp_path, "iq1_m", "plain", nll=BASE + 0.3)
    assert load_results([tmp_path]).comparison.dg_name.tolist() == ["iq1_m-dynamicgate", "iq1_m-plain"]


def test_speeds_of_a_row_are_of_one_kind(tmp_path: Path) -> None:
    """Both sides timed in one pass, or none; both as their scoring took where nothing was timed."""
    put_reference(tmp_path)
    put_pair(tmp_path)
    keys = {record.data["mode"]: record.data["key"] for record in read_records(tmp_path)}

    def timed(pass_id: str, *modes: str) -> None:
        cases = {keys[mode]: Timing(pass_id, 32, 4, (0.1, 0.1), (2.0, 2.0), (1.0, 1.0)) for mode in modes}
        settings = {"prompt_tokens": 32, "generate_tokens": 4, "ubatch_tokens": 32, "threads": 2}
        write_speed(
            tmp_path,
            SpeedPass(pass_id, f"2026-{pass_id}", {**settings, "flash_attention": True}, {}, 0.0, cases, {}),
        )

    def speeds() -> tuple[float, float]:
        write_report(tmp_path)
        row = pd.read_csv(tmp_path / "table.csv").iloc[0]
        return row.std_speed_s, row.dg_speed_s

    scored = speeds()
    assert scored == (13.3, 13.3)
    timed("01", "standard")
    assert np.isnan(speeds()).all()
    timed("02", "dynamicgate")
    assert np.isnan(speeds()).all(), "each in a pass of its own"
    timed("03", "standard", "dynamicgate")
    assert speeds() == (8.0, 8.0), "4 windows of 32 tokens, 16 tokens a second"


HERE, THERE = {"machine": "here", "cpu": "fast"}, {"machine": "there", "cpu": "slow"}


def put_timing(folder: Path, pass_id: str, environment: dict[str, str], **prompt_s: float) -> None:
    """A timing pass: seconds for 32 tokens, by mode."""
    keys = {record.data["mode"]: record.data["key"] for record in read_records(folder)}
    cases = {
        keys[mode]: Timing(pass_id, 32, 4, (0.1, 0.1), (seconds, seconds), (seconds, seconds))
        for mode, seconds in prompt_s.items()
    }
    settings = {"prompt_tokens": 32, "generate_tokens": 4, "ubatch_tokens": 32, "threads": 2, "flash_attention": True}
    write_speed(folder, SpeedPass(pass_id, f"2026-{pass_id}", settings, environment, 0.0, cases, {}))


@pytest.mark.parametrize(
    ("passes", "speeds", "n_alone"),
    [
        # 32 tokens a second here, 8 there; the machine with more timed files is shown, else the newest.
        (({**HERE}, ("reference", "standard", "dynamicgate"), {**THERE}, ("standard", "dynamicgate")), (32,) * 3, 0),
        (({**HERE}, ("reference", "standard"), {**THERE}, ("standard", "dynamicgate")), (None, 8, 8), 1),
        (({**HERE}, ("reference", "standard"), {**THERE}, ("dynamicgate",)), (32, 32, None), 1),
        (({**HERE}, ("reference",), {**HERE, "cpu": "slow"}, ("dynamicgate",)), (None, None, 8), 1),
        (({**HERE}, ("reference",), {**HERE}, ("dynamicgate",)), (32, None, 8), None),
    ],
)
def test_tokens_a_second_of_two_machines_stand_in_no_column(
    tmp_path: Path, passes: tuple[Any, ...], speeds: tuple[float | None, ...], n_alone: int | None
) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    here, modes_here, there, modes_there = passes
    put_timing(tmp_path, "01", here, **dict.fromkeys(modes_here, 1.0))
    put_timing(tmp_path, "02", there, **dict.fromkeys(modes_there, 4.0))
    report = write_report(tmp_path)
    runs = runs_csv(tmp_path).set_index("mode").prompt_tokens_per_s
    modes = ("reference", "standard", "dynamicgate")
    shown = [None if not (cell := str(runs[mode])) else float(cell) for mode in modes]
    assert shown == list(speeds)
    timed = [mode for mode, value in zip(modes, speeds, strict=True) if value]
    assert pd.read_csv(tmp_path / "speed.csv")["mode"].tolist() == timed
    assert len(json.loads((tmp_path / "llama_bench.json").read_text())) == 2 * len(timed)
    text = unwrapped(report.text)
    if n_alone is None:
        assert "timing_machines_differ" not in text
    else:
        place = "here fast" if 32 in speeds else " ".join(there.values())
        left = "1 file timed elsewhere only has none" if n_alone == 1 else "0 timed elsewhere only have none"
        assert f"files were timed on 2 machines: the speeds here are those of {place}; {left}" in text


def test_seconds_of_the_scoring_are_called_so_and_are_of_one_machine(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    alone = write_report(tmp_path)
    assert table_rows(alone.text)[1][-2:] == ["13.3s", "13.3s"]
    assert "Std and DG Speed: no speed measurement but the seconds that the scoring took" in unwrapped(alone.text)
    full = write_full_report([tmp_path], tmp_path / "report")
    for name in ("card.md", "card.tex", "card.html", "report.html"):
        assert "no speed measurement" in unwrapped((tmp_path / "report" / name).read_text(encoding="utf-8")), name
    assert "prompt set change" not in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert full.text.count("no speed measurement") == 1
    environment = {"commit": "0" * 40, "dirty": False, **THERE}
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=BASE + 0.1, environment=environment)
    mixed = write_report(tmp_path)
    assert table_rows(mixed.text)[1][-2:] == ["-", "-"]
    assert (
        "Std and DG Speed: left out: there was no timing pass, and the files were scored on several machines"
        in unwrapped(mixed.text)
    )
    assert "no speed measurement" not in unwrapped(mixed.text)
    assert runs_csv(tmp_path).machine.tolist() == ["here fast", "here fast", "there slow"]
    put_timing(tmp_path, "01", HERE, standard=2.0, dynamicgate=2.0)
    timed = write_report(tmp_path)
    assert table_rows(timed.text)[1][-2:] == ["8.0s", "8.0s"]
    assert "at the median speed of the timing pass." in unwrapped(timed.text)


def test_seconds_of_other_numbers_of_windows_at_once_stand_in_no_column(tmp_path: Path) -> None:
    def speeds(at_once: int) -> list[str]:
        timings = {"pass_s": 10.0, "load_s": 1.0, "quantize_s": 1.0}
        put_reference(tmp_path, timings={**timings, "windows_at_once": 2})
        put(tmp_path, "iq1_m", "standard", timings={**timings, "windows_at_once": 2})
        put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", timings={**timings, "windows_at_once": at_once})
        return table_rows(write_report(tmp_path).text)[1][-2:]

    assert speeds(2) == ["10.0s", "10.0s"]
    assert speeds(1) == ["-", "-"]


def test_a_pure_preset_is_told_under_every_table_that_names_it(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    assert "pure" not in write_report(tmp_path).text
    mixture = {"file_type": "q4_0", "embedding_type": None, "output_type": None, "pure": True}
    put(
        tmp_path, "q4_0", "standard", mixture={**mixture, "plain_file_type": "q4_0", "plain": {"output.weight": "q6_k"}}
    )
    put_timing(tmp_path, "01", HERE, reference=1.0)
    said = "Q4_0 is a pure preset (llama-quantize --pure)"
    text = unwrapped(write_full_report([tmp_path], tmp_path / "report").text)
    assert text.count(said) == 1, "once below all tables"
    for name in ("card", "cases", "board", "divergence", "files"):
        for kind in ("md", "html", "tex"):
            written = unwrapped((tmp_path / "report" / f"{name}.{kind}").read_text(encoding="utf-8"))
            assert said.replace("_", r"\_") in written if kind == "tex" else said in written, (name, kind)
    assert said not in (tmp_path / "report" / "speed.md").read_text(encoding="utf-8"), "it was not timed"


def test_a_failed_record_may_be_unlike(tmp_path: Path) -> None:
    """Its numbers stand nowhere."""
    put_pair(tmp_path)
    put(tmp_path, "iq2_s", "standard", nll=None, settings={"first_scored": 1, "ubatch_tokens": 64, "threads": 8})
    assert "FAILED: iq2_s standard" in write_report(tmp_path).text


def test_a_changed_side_file_is_refused(tmp_path: Path) -> None:
    put_pair(tmp_path)
    path = put(tmp_path, "iq2_s", "standard").with_suffix(".npz")
    path.write_bytes(path.read_bytes()[:-1])
    report = write_report(tmp_path)
    assert "iq2_s" not in report.text.split("unreadable_record")[0], "what cannot be read is absent"
    assert path.name in report.text.replace("\n    ", "")


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "iq2_s", "standard")
    path.write_text("{")
    with pytest.raises(UserError, match=re.escape(str(path))):
        write_report(tmp_path)


# --- findings


def test_a_finding_of_all_cases_is_printed_once(tmp_path: Path) -> None:
    put_reference(tmp_path, findings=(FINDING,))
    for mode, policy in (("standard", None), ("dynamicgate", "dynamicgate")):
        put(tmp_path, "iq1_m", mode, policy, findings=(FINDING,))
    text = unwrapped(write_report(tmp_path).text)
    for part in ("what", "why", "todo"):
        assert text.count(FINDING[part]) == 1
    assert "all: some tensors fell back" in text
    assert "iq1_m-standard:" not in text


def test_findings_name_their_cases(tmp_path: Path) -> None:
    other = {**FINDING, "what": "many tensors fell back"}
    put_reference(tmp_path)
    put(tmp_path, "iq1_m", "standard", findings=(FINDING,))
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", findings=(FINDING,))
    put(tmp_path, "iq2_s", "standard", findings=(other,))
    text = unwrapped(write_report(tmp_path).text)
    assert "iq1_m-standard, iq1_m-dynamicgate: some tensors fell back" in text
    assert "iq2_s-standard: many tensors fell back" in text
    assert text.count("it misleads") == 1, "the same reason is not told twice"


def test_findings_of_failed_cases_are_not_printed(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put(tmp_path, "iq1_m", "standard", nll=None, findings=(FINDING,))
    assert FINDING["what"] not in unwrapped(write_report(tmp_path).text)


# --- what a folder of a real sweep says: levels of ln PPL above the reference and sizes chosen, answers known


@dataclass(frozen=True)
class Sweep:
    """A folder, its report, and what was written."""

    folder: Path
    report: Report
    records: dict[str, Record]
    runs: pd.DataFrame
    table: pd.DataFrame


def read_sweep(folder: Path) -> Sweep:
    """Make the report of a folder and read everything back."""
    report = write_report(folder)
    records = [read_record(path) for path in (folder / "records").glob("*.json")]
    runs, table = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "table.csv")
    by_name = {record.name: record for record in records}
    return Sweep(folder, report, by_name, runs.set_index("name"), table.set_index("dg_name"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Three rungs of a ladder at 0.8, 0.4 and 0.2 nats; DynamicGate that wins, loses, and has no neighbour; a placebo;
    and parts of the policy."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Picture, "save", save_stub)
        put_real_reference(folder)
        for quant, mib, level in (("iq1_s", 60, 0.8), ("iq1_m", 80, 0.4), ("iq2_xs", 100, 0.2)):
            put_real(folder, quant, "standard", mib=mib, level=level)
        for quant, mib, level in (("iq1_s", 90, 0.5), ("iq1_m", 70, 0.4), ("iq2_xs", 120, 0.2)):
            put_real(folder, quant, "dynamicgate", "dynamicgate", mib=mib, level=level)
        put_real(folder, "iq1_m", "placebo", "dynamicgate", mib=70, level=0.5)
        put_real(folder, "iq1_m", "dynamicgate", "dynamicgate_without_ends", mib=68, level=0.45)
        put_real(folder, "iq1_m", "dynamicgate", "dynamicgate_without_ends_without_middle", mib=70, level=0.7)
        return read_sweep(folder)


def test_verdicts_at_equal_size(real: Sweep) -> None:
    """DynamicGate of iq1_m: at 70 MiB the ladder is at 0.6. Of iq1_s: at 90 MiB it is at 0.3."""
    runs = real.runs
    expected = {"iq1_m": ("wins", -0.2), "iq1_s": ("loses", 0.2)}
    for quant, (word, change) in expected.items():
        row = runs.loc[f"{quant}-dynamicgate"]
        assert (row.verdict, row.verdict_kld) == (word, word)
        assert row.equal_size_ln_ppl == pytest.approx(change, abs=1e-6)
        assert row.equal_size_kld == pytest.approx(change / 2, abs=1e-6)
        assert row.equal_size_ln_ppl_low < change < row.equal_size_ln_ppl_high
        assert row.equal_size_kld_low < change / 2 < row.equal_size_kld_high
        assert pd.isna(row.verdict_reason)
    assert runs.verdict_between["iq1_m-dynamicgate"] == "iq1_s-standard and iq1_m-standard"
    assert runs.verdict_between["iq1_s-dynamicgate"] == "iq1_m-standard and iq2_xs-standard"
    outside = runs.loc["iq2_xs-dynamicgate"]
    assert outside[["verdict", "verdict_kld", "verdict_between", "equal_size_ln_ppl"]].isna().all()
    assert "add a larger standard quant to the sweep, such as q2_k" in outside.verdict_reason
    for name in ("reference", "iq1_s-standard", "iq1_m-standard", "iq2_xs-standard"):
        assert runs.loc[name, ["verdict", "verdict_kld", "verdict_reason", "equal_size_ln_ppl"]].isna().all()


def test_versus_placebo(real: Sweep) -> None:
    """Only the policy whose types the placebo has is compared with it."""
    assert real.runs.vs_placebo.dropna().to_dict() == {"iq1_m-dynamicgate": "wins"}


def test_dominated_by_and_on_front(real: Sweep) -> None:
    """By size: 60 MiB at 0.8, 68 at 0.45, 70 at 0.4 and worse, 80 at 0.4, 90 at 0.5, 100 and 120 at 0.2."""
    assert real.runs.dominated_by.dropna().to_dict() == {
        "iq1_m-placebo+dynamicgate": "iq1_m-dynamicgate",
        "iq1_m-dynamicgate+dynamicgate_without_ends_without_middle": "iq1_m-dynamicgate",
        "iq1_s-dynamicgate": real.runs.dominated_by["iq1_s-dynamicgate"],
    }
    assert real.runs.dominated_by["iq1_s-dynamicgate"] in ("iq1_m-dynamicgate", "iq1_m-standard"), "both are at 0.4"
    front = real.runs.on_front
    assert front.isna().tolist() == [True] + [False] * (len(front) - 1), "the reference is no choice"
    sure = {"iq1_s-standard", "iq1_m-dynamicgate+dynamicgate_without_ends", "iq1_m-dynamicgate", "iq2_xs-standard"}
    on_front = {name for name, yes in front.items() if yes in (True, "True")}
    assert sure <= on_front
    # Equal levels differ in their last digits: either may count as the better one.
    assert on_front - sure <= {"iq1_m-standard", "iq2_xs-dynamicgate"}


def test_columns_against_the_reference(real: Sweep) -> None:
    row, values = real.runs.loc["iq1_m-dynamicgate"], real.records["iq1_m-dynamicgate"].per_token()
    assert row.ln_ppl_ratio_vs_reference == pytest.approx(0.4, abs=1e-9)
    interval = mean_interval(values["nll"] - COMMON)
    assert (row.ln_ppl_ratio_low, row.ln_ppl_ratio_high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert row.ln_ppl_ratio_low < 0.4 < row.ln_ppl_ratio_high
    assert row.ln_ppl_correlation == pytest.approx(np.corrcoef(values["nll"].ravel(), COMMON.ravel())[0, 1], rel=1e-9)
    assert row.kld_mean == pytest.approx(0.2, abs=1e-9)
    assert row.kld_low < 0.2 < row.kld_high
    assert row.kld_median <= row.kld_p90 <= row.kld_p95 <= row.kld_p99 <= row.kld_p99_9 <= row.kld_max
    assert row.kld_max == pytest.approx(values["kld"].max(), rel=1e-12)
    same = float((values["top"] == TOP).mean())
    assert 0.9 < same < 1
    assert row.same_top == pytest.approx(same, rel=1e-12)
    change = 100 * (np.exp(-values["nll"]) - np.exp(-COMMON))
    assert row.dp_mean_pct == pytest.approx(change.mean(), rel=1e-9)
    assert row.dp_p50_pct == pytest.approx(np.median(change), rel=1e-9)
    assert (row.n_windows, row.n_scored) == (4, 4092)


def test_the_reference_is_not_compared_with_itself(real: Sweep) -> None:
    row = real.runs.loc["reference"]
    assert row.ln_ppl_ratio_vs_reference == 0
    assert (
        row[["kld_mean", "kld_low", "same_top", "dp_mean_pct", "ln_ppl_ratio_low", "ln_ppl_correlation"]].isna().all()
    )


def test_deltas_have_the_block_bootstrap_interval_of_the_pairs(real: Sweep) -> None:
    row = real.table.loc["iq1_s-dynamicgate"]
    nll = [real.records[f"iq1_s-{mode}"].per_token()["nll"] for mode in ("dynamicgate", "standard")]
    interval = mean_interval(nll[0] - nll[1])
    assert interval.low is not None and interval.high is not None
    expected = [100 * math.expm1(x) for x in (interval.mean, interval.low, interval.high)]
    assert row[["delta_ppl_pct", "delta_ppl_pct_low", "delta_ppl_pct_high"]].tolist() == pytest.approx(expected)
    assert expected[0] == pytest.approx(100 * math.expm1(-0.3))
    assert (row.delta_kld, row.delta_bytes) == (pytest.approx(-0.15), 30 * MIB)
    assert row.delta_kld_low < row.delta_kld < row.delta_kld_high < 0
    (cells,) = (cells for cells in table_rows(real.report.text) if cells[0] == "IQ1_S")
    assert cells[3] == f"{expected[0]:+.1f}% [{expected[1]:+.1f}, {expected[2]:+.1f}]"
    assert interval.resolvable is not None
    assert row.resolvable_pct == pytest.approx(100 * math.expm1(interval.resolvable))
    assert row.windows_to_resolve == interval.windows_to_resolve(4)


def test_p_values_are_adjusted_for_the_rows_of_the_table(real: Sweep) -> None:
    table = real.table
    assert table.p.notna().all()
    parts = table.index.str.contains("_without_")
    for family in (table[parts], table[~parts]):  # what an attribution leaves out is adjusted by itself
        assert len(family) > 1
        assert family.p_holm.tolist() == pytest.approx(holm(family.p.tolist()))
    assert (table.p_holm >= table.p).all()
    # 4000 resamples, both sides: the smallest p there is, times the number of rows
    assert table.p.min() == pytest.approx(2 / 4001)
    assert table[~parts].p_holm.min() == pytest.approx(2 * (~parts).sum() / 4001)
    assert table.p_holm["iq2_xs-dynamicgate"] > 0.05, "the same level"


def test_case_table(real: Sweep) -> None:
    rows = case_rows(real.report.text)
    names = [name.removesuffix(" *") for name in rows]
    assert names == [name for name in real.runs.index if "_without_" not in name]
    stars = {name.removesuffix(" *") for name in rows if name.endswith(" *")}
    assert {"iq1_s-standard", "iq1_m-dynamicgate", "iq2_xs-standard"} <= stars
    assert not stars & {"reference", "iq1_s-dynamicgate", "iq1_m-placebo+dynamicgate"}
    gate = rows["iq1_m-dynamicgate *"]
    assert gate[:2] == ["70.0M", "4.25"]
    assert gate[2].startswith(f"{math.exp(COMMON.mean() + 0.4):.2f} ±")
    assert gate[3].startswith("0.2")
    assert gate[4:] == [f"{100 * real.runs.same_top['iq1_m-dynamicgate']:.1f}%", "wins (-18.1%)", "wins"]
    assert rows["iq1_s-dynamicgate"][5:] == ["loses (+22.1%)", "-"]
    assert rows["iq1_s-standard *"][5:] == ["-", "-"]
    assert next(row for name, row in rows.items() if name.startswith("iq2_xs-dynamicgate"))[5] == "no neighbours"
    assert rows["reference"][3:] == ["-", "-", "-", "-"]


def test_attribution_table(real: Sweep) -> None:
    """Without `ends`: 2 MiB smaller and 0.05 nats worse. Without both rules: as large and 0.3 nats worse."""
    header, one, both = tables(real.report.text)["Rule left out"]
    assert header == ["Rule left out", "It costs", "It saves, ln PPL", "It saves, KLD", "ln PPL per MiB"]
    assert (one[0], one[1], one[4]) == ("IQ1_M ends", "+2.0M", "+0.0250")
    assert (both[0], both[1], both[4]) == ("IQ1_M ends, middle", "+0.0M", "-")
    for row, saved in ((one, 0.05), (both, 0.3)):
        for cell, mean in ((row[2], saved), (row[3], saved / 2)):
            match = re.fullmatch(r"([+-]\d\.\d{4}) \[([+-]\d\.\d{4}), ([+-]\d\.\d{4})\]", cell)
            assert match
            value, low, high = map(float, match.groups())
            assert value == pytest.approx(mean, abs=6e-5)
            assert low < mean < high
    assert not any("without" in row[0] for row in table_rows(real.report.text)), "they have this table of their own"
    assert max(map(len, real.report.text.splitlines())) <= 120


def test_parts_of_a_policy_without_the_whole_one_stand_in_the_other_tables(tmp_path: Path) -> None:
    put(tmp_path, "iq1_m", "standard", nll=BASE + 0.5)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate_without_ends", nll=BASE + 0.1)
    text = write_report(tmp_path).text
    assert "Rule left out" not in tables(text)
    assert table_rows(text)[1][0] == "IQ1_M (dynamicgate_without_ends)"


def test_a_rule_that_does_not_concern_a_quant_saves_nothing(tmp_path: Path) -> None:
    put(tmp_path, "iq1_m", "standard", nll=BASE + 0.5)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=BASE)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate_without_ends", nll=BASE, same_as="iq1_m dynamicgate")
    assert tables(write_report(tmp_path).text)["Rule left out"][1] == ["IQ1_M ends", "+0.0M", "+0.0000", "+0.0000", "-"]


def test_a_policy_without_effect_ties_with_its_own_standard_file(tmp_path: Path) -> None:
    """Two cases, one file: no ZeroDivisionError, no verdict, and neighbours there are."""
    put_real(tmp_path, "q4_0", "standard", mib=80, level=0.2)
    nll = COMMON + 0.2
    put(tmp_path, "iq4_nl", "standard", nll=nll, file_bytes=80 * MIB)
    put(tmp_path, "iq4_nl", "dynamicgate", "dynamicgate", nll=nll, file_bytes=80 * MIB, same_as="iq4_nl standard")
    text = write_report(tmp_path).text
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("name")
    row = runs.loc["iq4_nl-dynamicgate"]
    assert "iq4_nl-standard" in row.verdict_between or "q4_0-standard" in row.verdict_between
    cell = next(cells for name, cells in case_rows(text).items() if name.startswith("iq4_nl-dynamicgate"))[5]
    assert cell != "no neighbours"
    assert "within_noise" not in findings_of(tmp_path)["iq4_nl-dynamicgate"]


def test_of_rungs_of_one_size_the_best_is_the_neighbour(tmp_path: Path) -> None:
    for quant, level in (("iq4_nl", 0.2), ("q4_0", 0.3), ("q4_1", 0.4)):
        put_real(tmp_path, quant, "standard", mib=80, level=level)
    put_real(tmp_path, "q4_0", "dynamicgate", "mine", mib=80, level=0.25)
    write_report(tmp_path)
    row = pd.read_csv(tmp_path / "runs.csv").set_index("name").loc["q4_0-dynamicgate+mine"]
    assert (row.verdict, row.verdict_between) == ("loses", "iq4_nl-standard and iq4_nl-standard")
    assert row.equal_size_ln_ppl == pytest.approx(0.05, abs=1e-9)


# --- findings: one that must appear, one that must not


def case(name: str, mib: float, level: float, *, mode: str = "standard", noise: float = 0.05) -> Measured:
    """COMMON's nll plus `level` exactly on average, with a noise of the case's own; mean KLD: half of `level`."""
    own = np.random.default_rng(zlib.crc32(name.encode())).normal(0, noise, COMMON.shape)
    own -= own.mean()
    return Measured(name, name, mode, round(mib * MIB), COMMON + level + own, np.full(COMMON.shape, level / 2))


REFERENCE = Measured("reference", "reference", "reference", 250 * MIB, COMMON, None)


def kinds(findings: Sequence[checks.Finding]) -> list[str]:
    """What the findings are about."""
    return [finding.kind for finding in findings]


def findings_among(
    cases: Sequence[Measured], name: str, reference: Measured | None = REFERENCE
) -> list[checks.Finding]:
    """Of the case `name` beside the others."""
    return checks.case_findings(cases, reference, dominators(cases), {})[name]


def found(cases: Sequence[Measured], name: str) -> list[str]:
    """Their kinds."""
    return kinds(findings_among(cases, name))


def test_within_noise() -> None:
    standard, tie = case("standard", 80, 0.4), case("tie", 80, 0.40001, noise=1.0)
    (finding,) = checks.pair_findings(tie, standard, 0.9)
    assert (finding.kind, "standard" in finding.what) == ("within_noise", True)
    assert "windows would show it" not in finding.what, "nobody measures that many"
    (finding,) = checks.pair_findings(case("near", 80, 0.41, noise=1.0), standard, 0.3)
    match = re.search(r"about (\d+) windows would show it", finding.what)
    assert match and 4 < int(match[1]) < 1000
    assert checks.pair_findings(case("better", 80, 0.3), standard, 0.001) == []
    assert checks.pair_findings(standard, standard, None) == [], "one file"
    assert kinds(checks.pair_findings(case("better", 80, 0.3), standard, 0.06)) == ["within_noise"], "Holm decides"


def test_too_few_tokens_are_within_noise() -> None:
    few = [Measured(name, name, "standard", 1, BASE + level, None) for name, level in (("a", 0.5), ("b", 0.1))]
    (finding,) = checks.pair_findings(few[0], few[1], None)
    assert finding.kind == "too_little_text"
    assert finding.what.startswith("whether it differs from b cannot be told: 4 blocks")


def test_dominated() -> None:
    good, bad, tie = case("good", 80, 0.4), case("bad", 90, 0.6), case("tie", 90, 0.4001, noise=1.0)
    (finding,) = findings_among([good, bad], "bad")[:1]
    assert finding.kind == "dominated"
    assert f"good is better beyond noise and {10 * MIB:,} bytes smaller" in finding.what
    assert found([good, bad], "good") == []
    assert "dominated" not in found([good, tie], "tie"), "within noise"
    assert "dominated" not in found([good, case("small", 70, 0.6)], "small"), "smaller"
    (finding,) = findings_among([good, case("bad", 80, 0.6)], "bad")
    assert finding.kind == "dominated", "of one size, there is no order"
    assert "of the same size" in finding.what


def test_out_of_order() -> None:
    small, large = case("small", 80, 0.4), case("large", 90, 0.6)
    (finding,) = (one for one in findings_among([large, small], "large") if one.kind != "dominated")
    assert finding.kind == "out_of_order"
    assert "small" in finding.what
    assert "out_of_order" not in found([small, case("large", 90, 0.3)], "large")
    assert "out_of_order" not in found([small, case("large", 90, 0.4001, noise=1.0)], "large"), "within noise"
    assert "out_of_order" not in found([small, case("gate", 90, 0.6, mode="dynamicgate")], "gate"), "not of the ladder"


def test_better_than_reference() -> None:
    assert found([case("better", 80, -0.1)], "better")[0] == "better_than_reference"
    assert found([case("worse", 80, 0.1)], "worse") == []
    assert "better_than_reference" not in found([case("tie", 80, -0.0001, noise=1.0)], "tie"), "within noise"
    assert findings_among([case("better", 80, 0.1)], "better", None) == [], "no reference, no such finding"


def test_nothing_quantized() -> None:
    same = Measured("same", "q6_k", "standard", 250 * MIB, COMMON, np.full(COMMON.shape, 2e-7))
    (finding,) = findings_among([same], "same")
    f16 = Measured("f16", "f16", "standard", 250 * MIB, COMMON, np.full(COMMON.shape, 2e-7))
    assert found([f16], "f16") == [], "16-bit files are not quantized"
    assert (finding.kind, "2.0e-07" in finding.what) == ("nothing_quantized", True)
    real = Measured("q8_0", "q8_0", "standard", 130 * MIB, COMMON, np.full(COMMON.shape, 4e-4))
    assert found([real], "q8_0") == []
    assert found([Measured("old", "old", "standard", 1, COMMON, None)], "old") == [], "no KLD is not a KLD of 0"


def test_types_differ() -> None:
    standard = {"embedding_type": "q8_0", "output_type": "q6_k"}
    (finding,) = checks.type_findings({"embedding_type": "q5_1", "output_type": "q6_k"}, standard)
    assert (finding.kind, finding.what) == (
        "types_differ",
        "standard and policy differ in their embedding Q8_0 and Q5_1",
    )
    (finding,) = checks.type_findings({"embedding_type": "q5_1", "output_type": "q5_k"}, standard)
    assert finding.what.endswith("embedding Q8_0 and Q5_1 and in their output Q6_K and Q5_K")
    assert checks.type_findings(dict(standard), standard) == []


def test_dirty() -> None:
    clean = {"dirty": False, "machine": "here", "cpu": "fast"}
    assert kinds(checks.environment_findings([clean, {**clean, "dirty": True}])) == ["dirty"]
    assert checks.environment_findings([clean, clean]) == []
    assert checks.environment_findings([{**clean, "dirty": None}]) == [], "an installed wheel has no checkout"
    assert checks.environment_findings([]) == []


def test_machines_differ() -> None:
    here = {"dirty": False, "machine": "here", "cpu": "fast"}
    for other in ({"machine": "there"}, {"cpu": "slow"}):
        assert kinds(checks.environment_findings([here, {**here, **other}, here])) == ["machines_differ"]
    assert checks.environment_findings([here, dict(here)]) == []


def test_findings_json_of_the_real_sweep(real: Sweep) -> None:
    """Everything that is true of that folder, and nothing else."""
    expected = {
        "reference": [],
        "iq1_s-standard": [],
        "iq1_m-standard": [],
        "iq2_xs-standard": [],
        "iq1_s-dynamicgate": ["dominated"],
        "iq1_m-dynamicgate": ["within_noise"],
        "iq2_xs-dynamicgate": ["no_neighbours", "within_noise"],
        "iq1_m-placebo+dynamicgate": ["dominated"],
        "iq1_m-dynamicgate+dynamicgate_without_ends": [],
        "iq1_m-dynamicgate+dynamicgate_without_ends_without_middle": ["dominated"],
        "all": [],
    }
    assert findings_of(real.folder) == expected
    for findings in json.loads((real.folder / "findings.json").read_text()).values():
        for finding in findings:
            assert set(finding) == {"kind", "what", "why", "todo"}
            assert all(finding.values())
    text = unwrapped(real.report.text)
    for kind in ("dominated", "within_noise"):
        assert text.count(f"! {kind}: ") == 1
    assert "iq1_s-dynamicgate: iq1_m-" in text


def test_findings_of_the_folder_reach_file_and_text(tmp_path: Path) -> None:
    """Those in the records, those of pairs, those of cases and those of all together."""
    put_reference(tmp_path)
    put(tmp_path, "iq1_m", "standard", nll=BASE + 0.5, findings=(FINDING,))
    environment = {"commit": None, "dirty": True, "machine": "there", "cpu": "fast"}
    path = put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", kld=np.zeros(BASE.shape), environment=environment)
    data = json.loads(path.read_text())
    data["variant"]["embedding_type"] = "q5_1"
    path.write_text(json.dumps(data))
    text = unwrapped(write_report(tmp_path).text)
    assert findings_of(tmp_path) == {
        "reference": [],
        "iq1_m-standard": ["fell_back"],
        "iq1_m-dynamicgate": ["nothing_quantized", "too_little_text", "types_differ"],
        "all": ["dirty", "machines_differ"],
    }
    for kind in ("fell_back", "nothing_quantized", "too_little_text", "types_differ", "dirty", "machines_differ"):
        assert text.count(f"! {kind}: ") == 1
    assert "all: the working tree had uncommitted changes" in text


def test_a_case_that_failed_has_no_part_in_the_findings(tmp_path: Path) -> None:
    put(tmp_path, "iq1_m", "standard")
    environment = {"commit": None, "dirty": True, "machine": "there", "cpu": "slow"}
    put(tmp_path, "iq2_s", "standard", nll=None, environment=environment)
    write_report(tmp_path)
    assert findings_of(tmp_path) == {"iq1_m-standard": [], "all": []}


# --- two records compared


def test_comparison_text(real: Sweep) -> None:
    a, b = real.records["iq1_m-placebo+dynamicgate"], real.records["iq1_m-dynamicgate"]
    text = comparison_text(a, b)
    lines = text.splitlines()
    assert lines[0] == "iq1_m-placebo+dynamicgate against iq1_m-dynamicgate"
    assert lines[1] == "wiki, 4 windows of 2048 tokens, 4092 scored, 44 blocks"
    ppl = [math.exp(COMMON.mean() + level) for level in (0.5, 0.4)]
    assert f"PPL      {ppl[0]:.4f} and {ppl[1]:.4f}: +10.5% [+10." in text
    number = r"[+-]\d\.\d{6}"
    assert re.search(rf"ln PPL   \+0\.100000 \[{number}, {number}\], p < 0\.0005\n", text)
    assert re.search(rf"KLD      \+0\.050000 \[{number}, {number}\], p < 0\.0005 nats\n", text)
    assert "size     70.0M and 70.0M" in text
    assert "This shows a difference. 4 windows resolve a change of " in text
    assert "windows would show it" not in text
    assert max(map(len, lines)) <= 120


def test_comparison_is_antisymmetric(real: Sweep) -> None:
    a, b = real.records["iq1_m-standard"], real.records["iq1_s-standard"]
    numbers = [re.search(r"ln PPL +(\S+) \[(\S+), (\S+)\]", comparison_text(*pair)) for pair in ((a, b), (b, a))]
    assert numbers[0] and numbers[1]
    mean, low, high = map(float, numbers[0].groups())
    assert [-high, -low] == pytest.approx([float(numbers[1][2]), float(numbers[1][3])], abs=2e-6)
    assert mean == -float(numbers[1][1])


def test_comparison_within_noise_says_how_much_text_would_help(tmp_path: Path) -> None:
    noise = np.random.default_rng(5).normal(0, 1, COMMON.shape)
    a = put(tmp_path, "iq1_m", "standard", nll=COMMON + noise - noise.mean() + 0.01)
    b = put(tmp_path, "iq2_s", "standard", nll=COMMON)
    text = comparison_text(read_record(a), read_record(b))
    assert "This shows no difference beyond noise." in text
    assert re.search(r"If the true change is the one seen here, about \d+ windows would show it\.", text)


def test_comparison_with_the_reference_has_no_kld(real: Sweep) -> None:
    text = comparison_text(real.records["iq1_m-standard"], real.records["reference"])
    assert "KLD" not in text
    assert "ln PPL   +0.400000 [" in text


def test_comparison_of_few_tokens_has_no_interval(tmp_path: Path) -> None:
    put_pair(tmp_path)
    a, b = (read_record(path) for path in sorted((tmp_path / "records").glob("*.json")))
    text = comparison_text(a, b)
    assert f"4 blocks of tokens are too few, {MIN_BLOCKS} are needed" in text
    assert "This prompt set resolves nothing" in text
    assert "prompts.n_windows" in text
    assert ": -33.0%\n" in text, "no interval"


def test_comparison_of_a_case_with_itself(real: Sweep) -> None:
    text = comparison_text(real.records["iq1_m-standard"], real.records["iq1_m-standard"])
    assert "No difference to resolve: all blocks are equal" in text
    assert "prompts.n_windows" not in text, "more text would not help"


@pytest.mark.parametrize("name", COMPARABLE)
def test_comparison_of_unlike_records_is_refused(tmp_path: Path, name: str) -> None:
    """Same tokens, same metrics, same engine: as in one table."""
    a = read_record(put(tmp_path, "iq1_m", "standard"))
    b = read_record(put(tmp_path, "iq2_s", "standard"))
    group, field = name.split(".")
    b.data[group][field] = "another"
    with pytest.raises(UserError) as caught:
        comparison_text(a, b)
    for word in (name, "another", a.name, b.name):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_comparison_with_a_failed_record_is_refused(tmp_path: Path) -> None:
    """By the path of its file a failed record can be named."""
    a = read_record(put(tmp_path, "iq1_m", "standard"))
    b = read_record(put(tmp_path, "iq2_s", "standard", nll=None))
    for pair in ((a, b), (b, a)):
        with pytest.raises(UserError, match="iq2_s-standard failed"):
            comparison_text(*pair)


# --- width


@pytest.mark.parametrize(
    ("quant", "level", "mib", "pass_s"),
    [
        ("iq2_xxs", 0.0, 93, 13.3),
        ("mxfp4_moe", 0.3, 1000, 99.94),
        ("iq2_xxs", 3.0, 1010, 1234.5),
        ("q4_k_m", 6.0, 123_000, 86_400.0),
    ],
)
def test_rows_fit_a_terminal_of_120_columns(
    tmp_path: Path, quant: str, level: float, mib: float, pass_s: float
) -> None:
    """With intervals, a placebo and a policy of one's own: the longest names that a person is likely to give."""
    noisy = COMMON + level + np.random.default_rng(1).normal(0, 2.0, COMMON.shape)
    put_real_reference(tmp_path, file_bytes=round(9 * mib * MIB), pass_s=pass_s)
    story = {**FINDING, "what": "a long story " * 30}
    put_real(tmp_path, quant, "standard", mib=mib, level=level, pass_s=pass_s, findings=(story,))
    put_real(tmp_path, quant, "dynamicgate", "dynamicgate", mib=mib / 9, level=level - 0.4, pass_s=pass_s)
    put_real(tmp_path, quant, "dynamicgate", "my_rules", mib=mib, level=0, nll=noisy, pass_s=pass_s)
    put_real(tmp_path, quant, "placebo", "dynamicgate", mib=mib / 9, level=level, pass_s=pass_s)
    text = write_report(tmp_path).text
    assert len(table_rows(text)) == 4
    assert table_rows(text)[2][0] == f"{quant.upper()} (my_rules)"
    assert set(tables(text)) == {"Quantization", "Case"}
    assert "[" in text.split("Case")[0], "the intervals are there"
    assert max(map(len, text.splitlines())) <= 120


# --- files


def test_the_picture_is_drawn(tmp_path: Path, real_picture: None) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    put_pair(tmp_path, "iq2_xxs", standard=3.0, gate=2.0)
    put(tmp_path, "iq2_s", "dynamicgate", "mine", nll=BASE + 0.2)
    put(tmp_path, "q8_0", "standard", nll=None)
    report = write_report(tmp_path)
    content = (tmp_path / "tradeoff.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 5000
    written = ("runs.csv", "table.csv", "table.md", "findings.json", "machine.json", "tradeoff.png", "delta.png")
    assert report.paths == tuple(tmp_path / name for name in written)


def test_a_report_leaves_nothing_else_and_can_be_made_again(tmp_path: Path) -> None:
    put_reference(tmp_path)
    put_pair(tmp_path)
    first = write_report(tmp_path)
    contents = {path: path.read_bytes() for path in first.paths}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in first.paths} | {"records"}
    assert write_report(tmp_path) == first
    assert {path: path.read_bytes() for path in first.paths} == contents


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("harness.report, harness.report_tables, harness.depth_plots", ("llama_cpp", "hydra")),
        ("harness.report", ("pandas", "matplotlib")),  # while they are loaded, another process draws already
    ],
)
def test_a_report_needs_no_engine_and_reads_records_before_it_loads_pandas(
    modules: str, absent: tuple[str, ...]
) -> None:
    code = f"import sys, {modules}; sys.exit(any(one.split('.')[0] in {absent} for one in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- cells


@pytest.mark.parametrize(
    ("value", "se", "cell"),
    [
        (28.412, 1.324, "28.4 ±1.3"),
        (28.412, 0.1324, "28.41 ±0.13"),
        (28.412, 13.24, "28 ±13"),
        (2841.2, 132.4, "2841 ±132"),
        (12.5674, 0.58006, "12.57 ±0.58"),
        (12.5674, 0.05, "12.567 ±0.050"),
        (12.56746, 1e-7, "12.5675 ±0.0000"),
        (12.5674, 0.0, "12.5674 ±0.0000"),
        (12.567, None, "12.57"),
        (12.567, math.nan, "12.57"),
        (None, 1.0, "-"),
        (math.nan, None, "-"),
    ],
)
def test_plus_minus(value: float | None, se: float | None, cell: str) -> None:
    assert plus_minus(value, se) == cell


@pytest.mark.parametrize(
    ("value", "low", "high", "cell"),
    [
        (-36.97, -38.14, -35.86, "-37.0% [-38.1, -35.9]"),
        (0.04, -12.36, 12.44, "+0.0% [-12.4, +12.4]"),
        (200.0, 99.96, 300.04, "+200.0% [+100.0, +300.0]"),
        (12.0, None, None, "+12.0%"),
        (12.0, math.nan, math.nan, "+12.0%"),
        (12.0, 11.0, None, "+12.0%"),
        (None, None, None, "-"),
        (math.nan, 1.0, 2.0, "-"),
    ],
)
def test_percent(value: float | None, low: float | None, high: float | None, cell: str) -> None:
    assert percent(value, low, high) == cell


@pytest.mark.parametrize(
    ("n_bytes", "signed", "cell"),
    [
        (98_146_714, False, "93.6M"),
        (1 << 30, False, "1.0G"),
        (2_684_354_560, False, "2.5G"),
        (1 << 40, False, "1024.0G"),
        (0, False, "0.0M"),
        (-10 * MIB, True, "-10.0M"),
        (10 * MIB, True, "+10.0M"),
        (-(3 << 30), True, "-3.0G"),
        (0, True, "+0.0M"),
        (None, True, "-"),
        (math.nan, False, "-"),
    ],
)
def test_size(n_bytes: float | None, signed: bool, cell: str) -> None:
    assert size(n_bytes, signed=signed) == cell


def test_size_just_below_a_gigabyte() -> None:
    assert size((1 << 30) - 1) == "1.0G"


@pytest.mark.parametrize(
    ("value", "cell"),
    [(0.04, "0.0s"), (13.34, "13.3s"), (99.9, "99.9s"), (100.4, "100s"), (None, "-"), (math.nan, "-")],
)
def test_seconds(value: float | None, cell: str) -> None:
    assert seconds(value) == cell


POSITIVE = st.floats(1e-9, 1e9)


@given(POSITIVE, st.one_of(st.just(0.0), POSITIVE))
def test_plus_minus_says_the_value_within_its_last_decimal(value: float, se: float) -> None:
    match = re.fullmatch(r"(\d+(?:\.(\d+))?) ±(\d+(?:\.(\d+))?)", plus_minus(value, se))
    assert match
    decimals = len(match[2] or "")
    assert decimals == len(match[4] or "") <= 4
    for said, meant in ((match[1], value), (match[3], se)):
        assert abs(float(said) - meant) <= 0.5 * 10**-decimals + 1e-9 * abs(meant)
    if se >= 1e-3:
        assert float(match[3]) == pytest.approx(se, rel=0.06), "two figures of the error"


PER_CENT = st.floats(-100, 1e7)


@given(PER_CENT, st.one_of(st.none(), st.tuples(PER_CENT, PER_CENT)))
def test_percent_says_the_values_within_a_tenth(value: float, interval: tuple[float, float] | None) -> None:
    match = re.fullmatch(
        r"([+-]\d+\.\d)%(?: \[([+-]\d+\.\d), ([+-]\d+\.\d)\])?", percent(value, *(interval or (None, None)))
    )
    assert match
    assert (match[2] is None) == (interval is None)
    for said, meant in zip(match.groups(), (value, *(interval or ())), strict=False):
        assert abs(float(said) - meant) <= 0.05 + 1e-9 * abs(meant)


@given(st.integers(-(1 << 50), 1 << 50), st.booleans())
def test_size_says_the_bytes_within_a_tenth_of_its_unit(n_bytes: int, signed: bool) -> None:
    match = re.fullmatch(r"([+-]?)(\d+\.\d)([MG])", size(n_bytes, signed=signed))
    assert match
    unit = {"M": 1 << 20, "G": 1 << 30}[match[3]]
    assert abs(float(match[2]) * unit - abs(n_bytes)) <= 0.0501 * unit
    assert match[1] == ("-" if n_bytes < 0 else "+" if signed else "")
    assert match[3] == "M" or abs(n_bytes) >= (1 << 30) - 0.0501 * (1 << 20), "1024.0M is 1.0G"


@given(st.floats(0, 1e7))
def test_seconds_are_short(value: float) -> None:
    cell = seconds(value)
    assert re.fullmatch(r"\d{1,3}\.\ds|\d{3,8}s", cell)
    assert abs(float(cell[:-1]) - value) <= 0.5


ONLY_PANDAS = """
import sys
from importlib.machinery import PathFinder

ALLOWED = {
    "pandas", "matplotlib", "harness",  # and what these two need
    "numpy", "dateutil", "six", "pytz", "tzdata", "PIL", "contourpy", "cycler", "fontTools", "kiwisolver", "packaging",
    "pyparsing", "mpl_toolkits",
}
find = PathFinder.find_spec

def find_allowed(name, path=None, target=None):
    top = name.partition(".")[0]
    known = top in ALLOWED or top in sys.stdlib_module_names or top.startswith("_")
    return find(name, path, target) if known else None

PathFinder.find_spec = staticmethod(find_allowed)
from harness.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("blocked", [False, True])
def test_report_needs_no_more_than_pandas_and_matplotlib(tmp_path: Path, blocked: bool) -> None:
    put(tmp_path, "reference", "reference", nll=COMMON, top=TOP)
    put(tmp_path, "iq1_m", "standard", nll=COMMON + 0.5, top=TOP, kld=np.full(COMMON.shape, 0.2))
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=COMMON + 0.3, top=TOP, kld=np.full(COMMON.shape, 0.1))
    script = ONLY_PANDAS if blocked else ONLY_PANDAS.replace("PathFinder.find_spec = ", "")
    command = [sys.executable, "-c", script, "report", f"results={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    made = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.html", "cases.tex", "tradeoff.svg", "runs.csv"} <= made
    assert ("runs.parquet" in made, "No Parquet files: they need the package pyarrow." in done.stdout) == (
        not blocked,
        blocked,
    )


def test_a_case_is_compared_with_the_placebo_of_its_own_policy(tmp_path: Path) -> None:
    put(tmp_path, "reference", "reference", nll=COMMON, top=TOP)
    rng = np.random.default_rng(3)
    for mode, policy, loss in (
        ("dynamicgate", "dynamicgate", 0.5),
        ("placebo", "dynamicgate", 0.6),
        ("dynamicgate", "mine", 0.5),
        ("placebo", "mine", 0.1),
    ):
        nll = COMMON + loss + rng.normal(0, 0.05, COMMON.shape)
        put(tmp_path, "iq1_m", mode, policy, nll=nll, top=TOP, kld=np.full(COMMON.shape, 0.2))
    told = load_results([tmp_path]).runs.set_index("name").vs_placebo.dropna().to_dict()
    assert told == {"iq1_m-dynamicgate": "wins", "iq1_m-dynamicgate+mine": "loses"}
