"""Plots: their figures by hand, and that each is drawn without a warning for few and many variants and with gaps."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_report import BASE, MIB, put, put_real, put_real_reference, put_reference

from harness import shown
from harness.drawing import Picture
from harness.ggml_types import FILE_TYPES
from harness.page import page
from harness.passes import SpeedPass, Timing, write_layers, write_speed
from harness.pictures import pictures
from harness.plot_frames import (
    KLD_FLOOR,
    board_points,
    delta_frame,
    kld_points,
    kld_quantiles_frame,
    position_frame,
    ppl_points,
    series_of,
    speed_points,
    types_frame,
)
from harness.plots import new_figure, styles
from harness.record import Record, read_record, read_records
from harness.report import QUICK, write_full_report, write_report
from harness.results import Results, load_results

QUANTS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_s", "q4_k_m", "q8_0")
ALL = {"tradeoff", "kld", "delta", "speed", "types", "types_2", "layers", "kld_distribution", "position"}
RESULTS_README = Path(__file__).resolve().parent.parent / "results" / "README.md"


def tensors(*, gate: bool, n_layers: int = 4) -> dict[str, dict[str, str]]:
    """A model of attention and ffn_down, whose ends the policy raises and whose attention it lowers."""

    def entry(standard: str, changed: str) -> dict[str, str]:
        return {"type": changed if gate else standard, "standard": standard, "rule": "standard"}

    found = {"token_embd.weight": entry("q2_k", "q5_k"), "output_norm.weight": entry("f32", "f32")}
    for layer in range(n_layers):
        end = layer in (0, n_layers - 1)
        found[f"blk.{layer}.attn_norm.weight"] = entry("f32", "f32")
        found[f"blk.{layer}.attn_q.weight"] = entry("iq2_s", "iq2_xxs")
        found[f"blk.{layer}.ffn_down.weight"] = entry("q2_k", "q4_k" if end else "q2_k")
    return found


def set_tensors(path: Path, types: dict[str, dict[str, str]]) -> Record:
    """Put the types of tensors into a record."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["variant"]["tensors"] = types
    path.write_text(json.dumps(data), encoding="utf-8")
    return read_record(path)


def make_sweep(folder: Path, n_quants: int, *, n_layers: int = 4, gate: bool = True) -> Results:
    """A sweep with everything: both modes of so many quants, types, layers, speed."""
    paths = [put_real_reference(folder)]
    for i, quant in enumerate(QUANTS[:n_quants]):
        for mode in ("standard", "dynamicgate") if gate else ("standard",):
            other = mode != "standard"
            level = 2.0 / (i + 1) * (0.7 if other else 1.0)
            path = put_real(folder, quant, mode, mode if other else None, mib=50 + 9 * i + 4 * other, level=level)
            set_tensors(path, tensors(gate=other, n_layers=n_layers))
            errors = np.random.default_rng(i).gamma(4.0, level / 4, (n_layers, 2, 1023)).astype(np.float32)
            write_layers(path, read_record(path).data["key"], "settings", np.arange(n_layers, dtype=np.int32), errors)
            paths.append(path)
    keys = [read_record(path).data["key"] for path in paths]
    timings = {k: Timing("aa", 8, 4, (0.1, 0.1, 0.1), (1.0, 1.1, 1.2), (0.5, 0.6, 0.7 + i)) for i, k in enumerate(keys)}
    settings = {"rounds": 3, "prompt_tokens": 8, "generate_tokens": 4, "ubatch_tokens": 8, "threads": 2}
    environment = {"machine": "here", "cpu": "fast"}
    settings["flash_attention"] = True
    write_speed(folder, SpeedPass("aa", "2026-01-01", settings, environment, 0.0, timings, {}))
    return load_results([folder])


def drawn(results: Results, folder: Path) -> dict[str, str]:
    """Every picture written in both formats and read back: the text of the SVG by name."""
    texts = {}
    for picture in pictures(results):
        for kind in ("png", "svg"):
            picture.save(folder / f"{picture.name}.{kind}", kind)
        content = (folder / f"{picture.name}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
        tree = ElementTree.parse(folder / f"{picture.name}.svg")  # noqa: S314  # just written
        assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
        texts[picture.name] = "\n".join(
            "".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")
        )
        assert picture.caption.endswith(".")
    return texts


# --- drawn


@pytest.mark.parametrize("n_quants", [1, 10])
def test_every_plot_of_few_and_of_many_variants(tmp_path: Path, n_quants: int) -> None:
    texts = drawn(make_sweep(tmp_path, n_quants), tmp_path)
    assert set(texts) == (ALL if n_quants > 6 else ALL - {"types_2"})
    for name, text in texts.items():
        assert "tiny on wiki" in text, name
    for name in ("tradeoff", "kld", "speed", "layers", "kld_distribution", "delta"):
        for quant in QUANTS[:n_quants]:
            assert quant.upper() in text_of(texts, name), (name, quant)
    for name in ("tradeoff", "kld", "speed", "layers", "position", "kld_distribution", "types"):
        assert "standard" in texts[name] and "DynamicGate" in texts[name], name
    assert "one standard error" in texts["tradeoff"] and "95 % intervals" in texts["kld"]
    assert "Pareto front" in texts["tradeoff"] and "reference: " in texts["tradeoff"]
    assert "IQ1_S DynamicGate" in texts["types"] and "token_embd q5_k" in texts["types"]
    if n_quants == 10:
        assert "Q8_0 DynamicGate" in texts["types_2"] and "Q8_0" not in texts["types"]
        assert "4 best and 4 worst of 20" in " ".join(texts["position"].split())
        assert "above the worse half" in " ".join(texts["position"].split())
        assert texts["tradeoff"].count("Q8_0") == texts["kld"].count("Q8_0") == 2, "both modes have their labels"
        assert texts["speed"].count("Q8_0") == 2, "once in each of the two narrow panels"
    else:
        assert texts["tradeoff"].count("IQ1_S") == 2


def text_of(texts: dict[str, str], name: str) -> str:
    """The text of a picture, and of the one that goes on with it."""
    return texts[name] + texts.get(f"{name}_2", "")


def test_one_variant_and_one_layer(tmp_path: Path) -> None:
    texts = drawn(make_sweep(tmp_path, 1, n_layers=1, gate=False), tmp_path)
    assert set(texts) == {"tradeoff", "kld", "speed", "layers", "kld_distribution", "position"}
    assert "Pareto" not in texts["tradeoff"]


def test_gaps(tmp_path: Path) -> None:
    """No reference, a failed case, too few tokens for intervals, no types, one window."""
    nll = np.array([[1.0, 2.0, 3.0]])
    put(tmp_path, "iq1_m", "standard", nll=nll + 0.5)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=nll + 0.4)
    put(tmp_path, "iq2_s", "standard", nll=None)
    put(tmp_path, "iq3_s", "dynamicgate", "mine", nll=nll + 0.1, file_bytes=120 * MIB)
    texts = drawn(load_results([tmp_path]), tmp_path)
    assert set(texts) == {"tradeoff", "delta", "kld_distribution"}
    assert "IQ2_S" not in texts["tradeoff"] and "dynamicgate+mine" in texts["tradeoff"]
    assert "too few tokens" in texts["delta"]
    put_reference(tmp_path, nll=nll)
    texts = drawn(load_results([tmp_path]), tmp_path)
    assert set(texts) == {"tradeoff", "kld", "delta", "kld_distribution", "position"}
    assert "too few tokens for intervals" in texts["kld"] and "one window" in texts["position"]


def test_equal_files_and_no_loss_at_all(tmp_path: Path) -> None:
    put_reference(tmp_path)
    zero = np.zeros((4, 15))
    put(tmp_path, "q8_0", "standard", kld=zero)
    put(tmp_path, "q8_0", "dynamicgate", "dynamicgate", kld=zero)
    texts = drawn(load_results([tmp_path]), tmp_path)
    assert "identical: 0 %" in texts["delta"] and "no difference at any token" in texts["delta"]
    assert "too few" not in texts["delta"]
    put(tmp_path, "iq1_m", "standard", nll=BASE + 0.5)
    put(tmp_path, "iq1_m", "dynamicgate", "dynamicgate", nll=BASE + 0.4)
    texts = drawn(load_results([tmp_path]), tmp_path)
    assert texts["delta"].count("identical") == 1 and "too few tokens for intervals" in texts["delta"]


def test_of_more_points_than_rows_the_ladder_is_labelled_once(tmp_path: Path) -> None:
    put_real_reference(tmp_path)
    for i, quant in enumerate(list(FILE_TYPES)[:13]):  # 26 points
        for mode in ("standard", "dynamicgate"):
            policy = mode if mode != "standard" else None
            put_real(tmp_path, quant, mode, policy, mib=50 + 9 * i + 4 * len(mode), level=2.0 / (i + 1))
    (picture,) = pictures(load_results([tmp_path]), ["tradeoff"])
    labels = [text.get_text() for text in picture.figure.axes[0].texts]
    assert sorted(filter(None, labels)) == sorted(quant.upper() for quant in list(FILE_TYPES)[:13])


@pytest.mark.parametrize("n_quants", [1, 2, 4])
def test_bars_by_position_stand_beside_each_other(tmp_path: Path, n_quants: int) -> None:
    """Up to four lines in one panel, else the worse half above; no two bars of a panel share a place."""
    (picture,) = pictures(make_sweep(tmp_path, n_quants), ["position"])
    panels = picture.figure.axes
    assert len(panels) == (1 if n_quants < 3 else 2)
    lines = [line for axes in panels for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(lines) == 2 * n_quants
    means = [float(np.mean(line.get_ydata())) for line in lines]
    assert means == sorted(means, reverse=True), "the worst first"
    for axes in panels:
        places = np.concatenate([line.get_xdata() for line in axes.lines if len(line.get_xdata()) > 2])
        assert np.diff(np.sort(places)).min() > 5  # positions, of 93 between two blocks


@pytest.mark.parametrize("failed", [True, False])
def test_without_a_measured_variant_there_is_no_picture(tmp_path: Path, failed: bool) -> None:
    if failed:
        put(tmp_path, "iq1_m", "standard", nll=None)
    else:
        put_reference(tmp_path)
    assert pictures(load_results([tmp_path])) == []


def test_a_sweep_draws_the_quick_ones(tmp_path: Path) -> None:
    make_sweep(tmp_path, 1)
    made = {path.name for path in write_report(tmp_path).paths if path.suffix in (".png", ".svg")}
    assert made == {f"{name}.png" for name in QUICK}


def test_other_processes_draw_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sweep(tmp_path, 1)
    alone = write_full_report([tmp_path], tmp_path / "alone")
    monkeypatch.setattr("harness.drawing._MANY_RECORDS", 1)
    together = write_full_report([tmp_path], tmp_path / "together")
    assert [path.name for path in together.paths] == [path.name for path in alone.paths]
    for one, other in zip(alone.paths, together.paths, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_the_same_records_give_the_same_svg(tmp_path: Path) -> None:
    results = make_sweep(tmp_path, 1)
    for name in ("a.svg", "b.svg"):
        (picture,) = pictures(results, ["delta"])
        picture.save(tmp_path / name, "svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_captions_are_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"png")
    text = page("t", [], [], {tmp_path / "p.png": "What <it> shows."}, [], {})
    assert text.count("What &lt;it&gt; shows.") == 2, "below the picture, and instead of it"


@pytest.mark.skipif(not RESULTS_README.is_file(), reason="needs the checkout")
def test_every_picture_is_documented() -> None:
    text = RESULTS_README.read_text(encoding="utf-8")
    assert all(f"`{name}.png`" in text for name in ALL)


# --- figures by hand


def run(quant: str, mode: str, mib: float, ppl: float, **changes: Any) -> dict[str, Any]:
    """A row of the runs."""
    row: dict[str, Any] = {"name": f"{quant}-{mode}", "quant": quant, "mode": mode, "status": "ok", "ppl": ppl}
    row |= {"file_bytes": mib * MIB, "ppl_se": 0.5, "kld_mean": ppl / 100, "kld_low": None, "kld_high": None}
    return row | changes


def test_points_by_hand() -> None:
    runs = pd.DataFrame(
        [
            run("reference", "reference", 900, 5.0),
            run("a", "standard", 10, 30.0),
            run("a", "dynamicgate", 12, 20.0),
            run("b", "standard", 14, 25.0),
            run("b", "dynamicgate", 12, 20.0),
            run("c", "standard", 20, 8.0, kld_mean=-1e-9, kld_low=-2e-9, kld_high=1e-3),
            run("d", "dynamicgate", 30, 9.0),
            run("e", "standard", 1, math.nan, status="failed"),
        ]
    )
    points = ppl_points(runs).set_index("name")
    assert list(points.index) == [
        "a-standard",
        "a-dynamicgate",
        "b-standard",
        "b-dynamicgate",
        "c-standard",
        "d-dynamicgate",
    ]
    assert points.on_front.tolist() == [True, True, False, False, True, False], "of two equal ones the first"
    assert points.loc["a-standard", ["size_mib", "value", "low", "high"]].tolist() == [10, 30, 29.5, 30.5]
    assert points.loc["b-dynamicgate", ["from_mib", "from_value"]].tolist() == [14, 25]
    assert points.loc[["a-standard", "d-dynamicgate"], "from_mib"].isna().all(), "no standard file to come from"
    klds = kld_points(runs).set_index("name")
    assert klds.value["a-standard"] == pytest.approx(0.3)
    assert np.isnan(klds.low["a-standard"])
    assert klds.loc["c-standard", ["value", "low", "high"]].tolist() == [KLD_FLOOR, KLD_FLOOR, 1e-3]


def test_deltas_are_those_of_the_table(tmp_path: Path) -> None:
    results = make_sweep(tmp_path, 2)
    put_real(tmp_path, "q8_0", "standard", mib=300, level=0.01)
    deltas = delta_frame(load_results([tmp_path]).comparison).set_index("name")
    assert list(deltas.index) == ["iq1_s-dynamicgate", "iq1_m-dynamicgate"], "a quant without a pair has no bar"
    assert deltas.delta_pct.tolist() == pytest.approx([100 * math.expm1(-0.6), 100 * math.expm1(-0.3)])
    assert (deltas.low_pct < deltas.delta_pct).all() and (deltas.delta_pct < deltas.high_pct).all()
    assert deltas.high_pct.tolist() == results.comparison.delta_ppl_pct_high.tolist()


def test_speed_by_hand(tmp_path: Path) -> None:
    results = make_sweep(tmp_path, 1)
    points = speed_points(results.speed, results.bench).set_index(["name", "step"])
    row = points.loc["reference", "prompt"]
    assert (row.size_mib, row.tokens_per_s) == (250, pytest.approx(8 / 1.1))
    assert (row.low, row.high) == (pytest.approx(8 / 1.2), 8)
    assert points.loc[("iq1_s-standard", "generate"), "low"] == pytest.approx(4 / 1.7)


def test_types_by_hand(tmp_path: Path) -> None:
    standard = set_tensors(put(tmp_path, "iq2_s", "standard"), tensors(gate=False))
    placebo = set_tensors(put(tmp_path, "iq2_s", "placebo", "dynamicgate"), tensors(gate=True))
    gate = set_tensors(put(tmp_path, "iq2_s", "dynamicgate", "dynamicgate"), tensors(gate=True))
    same = set_tensors(put(tmp_path, "q4_0", "dynamicgate", "dynamicgate"), tensors(gate=False))
    types = types_frame([standard, placebo, gate, same])
    assert set(types.name) == {"iq2_s-dynamicgate"}, "one policy a quant, and nothing where nothing changes"
    assert set(types.role) == {"token_embd", "attn_q", "ffn_down"}, "norms stay f32"
    rows = types.set_index(["role", "layer"])
    assert rows.loc[("ffn_down", 0.0), ["bpw", "standard_bpw"]].tolist() == [4.5, 2.625]
    assert rows.loc[("ffn_down", 1.0), ["bpw", "standard_bpw"]].tolist() == [2.625, 2.625]
    assert rows.loc[("attn_q", 3.0), ["bpw", "standard_bpw"]].tolist() == [2.0625, 2.5625]
    assert types[types.role == "token_embd"].layer.isna().all()
    assert set(types_frame([standard, placebo]).name) == {"iq2_s-placebo+dynamicgate"}
    assert types_frame([standard, same]).empty
    assert shown.of_types([standard, placebo, gate, same]) == [gate], "what was chosen goes to another process"
    assert types_frame([gate]).equals(types)


def test_quantiles_by_hand(tmp_path: Path) -> None:
    put_reference(tmp_path, nll=np.ones((1, 101)))
    put(tmp_path, "iq1_m", "standard", nll=np.ones((1, 101)), kld=np.arange(101.0)[None, ::-1] / 100)
    rows = kld_quantiles_frame(read_records(tmp_path))
    assert rows.name.tolist() == ["iq1_m-standard"]
    row = rows.iloc[0]
    found = row[["mean", "q0.05", "q0.25", "q0.5", "q0.75", "q0.95", "q0.99", "q0.999"]].tolist()
    assert found == pytest.approx([0.5, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999])
    put(tmp_path, "iq1_m", "standard", nll=np.ones((1, 101)), kld=np.full((1, 101), -1e-8))
    assert kld_quantiles_frame(read_records(tmp_path)).iloc[0][["mean", "q0.5"]].tolist() == [KLD_FLOOR, KLD_FLOOR]


def test_positions_by_hand(tmp_path: Path) -> None:
    """Two blocks of 100 positions in three windows: differences 1, 2, 3 and 0, 0, 0; Student's interval."""
    base = np.random.default_rng(5).normal(2.0, 1.0, (3, 200))
    added = np.zeros((3, 200))
    added[:, :100] = np.array([[1.0], [2.0], [3.0]])
    put_reference(tmp_path, nll=base)
    put(tmp_path, "iq1_m", "standard", nll=base + added)
    rows = position_frame(read_records(tmp_path))
    assert rows.position.tolist() == [202 + 49.5, 202 + 149.5]
    assert rows.delta_nll.tolist() == pytest.approx([2.0, 0.0])
    half = 4.303 / math.sqrt(3)
    assert rows.low.iloc[0] == pytest.approx(2 - half) and rows.high.iloc[0] == pytest.approx(2 + half)


def test_positions_of_many_windows_and_variants(tmp_path: Path) -> None:
    base = np.random.default_rng(5).normal(2.0, 1.0, (40, 20))
    put_reference(tmp_path, nll=base)
    for i, quant in enumerate(QUANTS):
        own = np.random.default_rng(i).normal(0, 0.1, base.shape)
        put(tmp_path, quant, "standard", nll=base + i + own - own.mean())
    chosen = shown.of_positions(read_records(tmp_path), most=4)
    assert len(chosen) == 5 and shown.of_positions(chosen, most=4) == chosen
    assert position_frame(chosen).equals(position_frame(read_records(tmp_path), most=4))
    rows = position_frame(read_records(tmp_path), most=4)
    assert rows["quant"].tolist() == ["iq1_s", "iq1_m", "q4_k_m", "q8_0"], "the two best and the two worst, best first"
    assert rows.delta_nll.tolist() == pytest.approx([0.0, 1.0, 8.0, 9.0], abs=1e-12)
    assert (rows.low < rows.delta_nll).all() and (rows.delta_nll < rows.high).all()


@pytest.mark.parametrize("name", ["Llama-3-8B", "meta-llama-3-8b-instruct", "llama3_8b"])
def test_the_board_of_llama_3_8b(name: str) -> None:
    board = board_points(name, [5000.0, 8000.0])
    assert board.size_mib.between(4500, 8800).all()
    row = board[board["quant"] == "q8_0"].iloc[0]
    assert (row.size_mib, row.ppl, row.kld) == (7.96 * 1024, 6.234284, 0.001355)
    assert "f16" not in set(board["quant"])


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3-70B", "tiny", "qwen2_5_coder_1_5b"])
def test_no_board_for_another_model(name: str) -> None:
    assert board_points(name, [5000.0]).empty


def test_the_board_is_drawn_for_its_model_only(tmp_path: Path) -> None:
    for name in ("Llama-3-8B", "tiny"):
        folder = tmp_path / name
        for path in (
            put_real_reference(folder),
            put_real(folder, "q4_k_m", "standard", mib=4690, level=0.1),
            put_real(folder, "q8_0", "standard", mib=8150, level=0.01),
        ):
            data = json.loads(path.read_text(encoding="utf-8"))
            data["reference"]["name"] = name
            path.write_text(json.dumps(data), encoding="utf-8")
        texts = drawn(load_results([folder]), folder)
        assert ("llama.cpp's board" in texts["tradeoff"]) is ("llama.cpp's board" in texts["kld"]) is (name != "tiny")


def test_series_have_styles_of_their_own() -> None:
    assert series_of("iq1_m-dynamicgate+mine", "iq1_m") == "dynamicgate+mine"
    found = styles(["mine", "dynamicgate", "standard", "mine", "placebo+dynamicgate", "other"])
    assert list(found)[:2] == ["standard", "dynamicgate"]
    assert len({colour for colour, _, _ in found.values()}) == len({marker for _, marker, _ in found.values()}) == 5
    assert found["dynamicgate"] == styles(["dynamicgate"])["dynamicgate"], "alike in every plot"


def test_a_figure_is_drawn_and_laid_out_once() -> None:
    calls: list[int] = []

    def draw() -> Figure:
        calls.append(1)
        figure = new_figure(1)
        figure.subplots()
        return figure

    picture = Picture("p", "A picture.", draw)
    assert picture.figure is picture.figure
    assert calls == [1]
    assert picture.figure.get_layout_engine() is None, "a format that is saved needs no layout"
