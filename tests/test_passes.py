"""Speed and layers: the passes after the scoring, from hand-computed values to the whole way on the tiny model."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pandas as pd
import pytest

from harness import checks
from harness.engine import model as engine
from harness.engine.hidden import hidden_states
from harness.layers import relative_error
from harness.pass_frames import ratio_change, speed_ratio, spread
from harness.passes import SpeedPass, Timing, looked_at, read_layers, read_speed, write_layers, write_speed
from harness.stats import small_sample_interval
from tests.tiny_model import random_text

Cli = Callable[..., tuple[int, str, str]]


# --- values by hand


def test_relative_error_of_vectors_by_hand() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    states = np.array([[3.0, 1.0], [0.0, 2.0]], np.float32)
    np.testing.assert_allclose(relative_error(states, expected), [3 / 5, 0.0])


def test_student_interval_by_hand() -> None:
    # mean 2, standard deviation 1, n = 3: half width 4.303 / sqrt(3)
    interval = small_sample_interval(np.array([1.0, 2.0, 3.0]))
    assert interval.mean == 2.0
    assert interval.high == pytest.approx(2 + 4.303 / math.sqrt(3))
    assert interval.low == pytest.approx(2 - 4.303 / math.sqrt(3))
    assert small_sample_interval(np.array([1.0])).low is None


@pytest.mark.parametrize("n", [2, 3, 5, 10, 31])
def test_student_interval_covers_95_percent(n: int) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for values in rng.normal(0.3, 1.0, (4000, n)):
        interval = small_sample_interval(values)
        assert interval.low is not None and interval.high is not None
        hits += interval.low <= 0.3 <= interval.high
    assert 0.935 < hits / 4000 < 0.965


def test_speed_ratio_is_paired_by_round() -> None:
    # Rounds get slower, both alike: the ratio has no spread, 1.25 times the tokens/s.
    ratio = speed_ratio([0.8, 1.6, 2.4], [1.0, 2.0, 3.0])
    assert math.exp(ratio.mean) == pytest.approx(1.25)
    assert ratio.low == pytest.approx(ratio.mean) == pytest.approx(ratio.high)
    assert spread([1.0, 2.0, 3.0]) == 1.0


def test_the_change_of_a_ratio_covers_the_truth() -> None:
    hits, n = 0, 300
    for seed in range(n):
        rng = np.random.default_rng(seed)
        common = np.repeat(rng.gamma(4.0, 0.25, (4, 110)), 10, axis=1)  # correlated neighbours, shared by both
        base = common * rng.gamma(9.0, 1 / 9, common.shape)
        values = 0.6 * common * rng.gamma(9.0, 1 / 9, common.shape)
        _, low, high = ratio_change(values, base)
        assert low is not None and high is not None
        hits += low <= -40.0 <= high
    assert 0.92 < hits / n < 0.98


# --- files


def speed_pass(pass_id: str, when: str, cases: dict[str, Timing], *, share: float = 0.0) -> SpeedPass:
    settings = {"rounds": 3, "prompt_tokens": 8, "generate_tokens": 4, "ubatch_tokens": 8, "threads": 2}
    return SpeedPass(pass_id, when, {**settings, "flash_attention": True}, {"machine": "m"}, share, cases, {})


def timing(pass_id: str, *prompt_s: float) -> Timing:
    return Timing(pass_id, 8, 4, (0.1, 0.1, 0.1), prompt_s, (1.0, 1.0, 1.0))


def test_timing_passes_survive_in_the_order_of_time(tmp_path: Path) -> None:
    old = speed_pass("aa", "2026-01-01", {"k": timing("aa", 1.0, 1.0, 1.0), "l": timing("aa", 2.0, 2.0, 2.0)})
    new = speed_pass("bb", "2026-01-02", {"k": timing("bb", 3.0, 3.0, 3.0)})
    for one in (new, old):
        write_speed(tmp_path, one)
    assert read_speed(tmp_path) == [old, new]
    passes = [old, replace(new, cases={}, skipped={"m": "too large"})]
    assert looked_at(passes, old.settings) == {"k", "l", "m"}
    assert looked_at(passes, {**old.settings, "rounds": 5}) == set(), "timed again with other settings"


GOOD: dict[str, Any] = {
    "schema_version": 1,
    "created_utc": "2026-01-01",
    "settings": {
        **{"prompt_tokens": 8, "generate_tokens": 4, "ubatch_tokens": 8, "threads": 2},
        **{"flash_attention": True, "rounds": 3},
    },
    "environment": {},
    "other_cpu_share": 0.0,
    "cases": {"k": {"load_s": [1, 1], "prompt_s": [1, 1], "generate_s": [1, 1]}},
    "skipped": {},
}


def test_a_sound_timing_pass_is_read(tmp_path: Path) -> None:
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "x.json").write_text(json.dumps(GOOD))
    assert len(read_speed(tmp_path)) == 1


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", '{"schema_version": 2}', '{"schema_version": 1}', "[" * 100_000),
        *(
            json.dumps(GOOD | {"cases": {"k": {"load_s": [1, 1], "prompt_s": prompt_s, "generate_s": [1, 1]}}})
            for prompt_s in ([], [1], [0, 0], [1, math.nan], ["x", "y"], None, [1, 1, 1], [1e-300, 1e-300], [1e300, 1])
        ),
        *(json.dumps(GOOD | {"settings": GOOD["settings"] | {"threads": one}}) for one in (0, "2", None, 1 << 70)),
        *(json.dumps(GOOD | {"environment": one}) for one in ([], {"machine": ["a"]}, {"cpu": "\x1b[2J"})),
        *(json.dumps(GOOD | {"other_cpu_share": one}) for one in (-1, math.inf, "much")),
        *(json.dumps(GOOD | {"skipped": one}) for one in ([], {"k": 1}, {"k": "a\nb"})),
        json.dumps(GOOD | {"created_utc": "\udcff"}),
    ],
)
def test_a_damaged_timing_pass_counts_as_absent(tmp_path: Path, content: str) -> None:
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "x.json").write_text(content)
    assert read_speed(tmp_path) == []


def test_findings_of_a_busy_machine_and_of_wide_spread() -> None:
    passes = [speed_pass("aa", "2026-01-01", {"k": timing("aa", 1.0)}, share=0.3)]
    rows = pd.DataFrame(
        {"name": ["iq1_m-standard", "calm"], "prompt_spread": [0.2, 0.01], "generate_spread": [0.0, 0.02]}
    )
    found = {finding.kind: finding.what for finding in checks.speed_findings(passes, rows)}
    assert "30%" in found["busy_machine"]
    assert "iq1_m-standard (20%)" in found["wide_spread"] and "calm" not in found["wide_spread"]
    calm = [speed_pass("aa", "2026-01-01", {"k": timing("aa", 1.0)})]
    assert checks.speed_findings(calm, rows[rows.name == "calm"]) == []


def test_layers_of_another_case_or_damaged_ones_count_as_absent(tmp_path: Path) -> None:
    record = tmp_path / "records" / "x.json"
    write_layers(record, "case", "settings", np.arange(2, dtype=np.int32), np.ones((2, 1, 3), np.float32))
    found = read_layers(record, "case")
    assert found is not None and found[0] == "settings" and found[2].shape == (2, 1, 3)
    assert read_layers(record, "other") is None
    path = tmp_path / "layers" / "x.npz"
    content = path.read_bytes()
    for damaged in (content[:-10], b"", b"PK"):
        path.write_bytes(damaged)
        assert read_layers(record, "case") is None


# --- the engine


@pytest.mark.parametrize("ubatch_tokens", [128, 48])
def test_the_last_hidden_state_gives_the_models_logits(tiny_gguf: Path, ubatch_tokens: int) -> None:
    """Norm and output projection in numpy on the tapped state equal llama.cpp's own logits."""
    window = engine.tokenize(tiny_gguf, random_text(300, seed=5))[0][:128]
    settings = {"ubatch_tokens": ubatch_tokens, "flash_attention": True, "n_threads": 2}
    states = hidden_states(tiny_gguf, window, first_scored=65, **settings)
    assert list(states) == [0, 1, 2, 3]
    assert all(rows.shape == (63, 256) and rows.dtype == np.float32 for rows in states.values())
    stored = {t.name: np.array(t.data, np.float64) for t in gguf.GGUFReader(tiny_gguf).tensors}
    last = states[3].astype(np.float64)
    normed = last / np.sqrt((last**2).mean(1, keepdims=True) + 1e-5) * stored["output_norm.weight"]
    expected = normed @ stored["output.weight"].T
    wanted = np.zeros(128, bool)
    wanted[64:127] = True
    with (
        engine.open_model(tiny_gguf) as model,
        engine.open_context(model, n_ctx=128, **settings) as context,
    ):
        steps = engine.decode_window(context, window, wanted, engine.n_vocab(model), ubatch_tokens)
        found = np.concatenate([logits.copy() for _, logits, _ in steps])
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_layers_and_speed_of_a_sweep(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    on = ["measure.layers=true", "measure.speed=true", "measure.generate_tokens=4"]
    sweep = ["sweep", "quant=f16,q8_0,iq1_m", "mode=standard", *tiny_overrides]
    code, out, err = cli(*sweep, *on)
    assert code == 0, err
    assert "layers (" in out and "speed: every variant in turn" in out
    folder = tmp_path / "results" / "tiny"
    layers = pd.read_csv(folder / "layers.csv").set_index(["name", "layer"]).error
    assert (layers["f16-standard"] == 0).all(), "the same weights give the same states"
    assert (layers["iq1_m-standard"] > 5 * layers["q8_0-standard"]).all()
    assert (layers["q8_0-standard"] > 0).all()
    assert layers["q8_0-standard", "mean"] == pytest.approx(layers["q8_0-standard"].iloc[:4].mean(), rel=1e-6)
    assert (folder / "layers.png").stat().st_size > 1000
    bench = json.loads((folder / "llama_bench.json").read_text())
    assert [(row["n_prompt"], row["n_gen"], len(row["samples_ts"])) for row in bench] == [(128, 0, 3), (0, 4, 3)] * 4
    assert all(row["avg_ts"] > 0 for row in bench)
    assert "| pp128" in (folder / "llama_bench.md").read_text()
    (made,) = (folder / "speed").iterdir()
    assert not list((tmp_path / "cache" / "variants").glob("*.gguf")), "gone after they were timed"

    code, out, _ = cli(*sweep, *on)
    assert code == 0 and "everything is there" in out
    # A new quant is timed beside the reference, the others keep their timing; its layers alone are compared.
    code, out, _ = cli("sweep", "quant=q4_0,q8_0", "mode=standard", *tiny_overrides, *on)
    assert code == 0 and "1 case to measure, 1 to compare layer by layer, 1 to time" in out
    (new,) = set((folder / "speed").iterdir()) - {made}
    assert len(json.loads(new.read_text())["cases"]) == 2
    # Over other windows the layers are compared anew, and nothing else is done again.
    code, out, _ = cli(*sweep, *on, "measure.layer_windows=2")
    assert code == 0 and "4 to compare layer by layer" not in out and "3 to compare layer by layer" in out
    # When the timing is thrown away, the files are made again for it and nothing is scored again.
    shutil.rmtree(folder / "speed")
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    code, out, _ = cli(*sweep, *on, "measure.layer_windows=2")
    assert code == 0 and "quantizing" in out and "scoring" not in out and "layers (" not in out
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
