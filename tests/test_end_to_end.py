"""The whole way on the tiny model: plan, sweep, resume, failure, from the command line."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from nbclient import NotebookClient

from harness.record import read_records

Cli = Callable[..., tuple[int, str, str]]


def naive_nll(model: Path, windows: np.ndarray, first_scored: int) -> np.ndarray:
    """Per-token nll by llama-cpp-python's own high-level class and a float64 softmax."""
    llama = llama_cpp.Llama(str(model), n_ctx=windows.shape[1], logits_all=True, flash_attn=True, verbose=False)
    rows = []
    for window in windows:
        llama.reset()
        llama.eval(window.tolist())
        logits = np.array(llama.scores[: windows.shape[1]], np.float64)
        log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log_p -= logits.max(1, keepdims=True)
        rows.append([-log_p[i - 1, window[i]] for i in range(first_scored, windows.shape[1])])
    llama.close()
    return np.array(rows)


def test_sweep_measures_every_case_once_and_resumes(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    code, out, err = cli("sweep", "quant=iq1_m,q4_0", *tiny_overrides)
    assert code == 0, err
    folder = tmp_path / "results" / "tiny"
    runs = pd.read_csv(folder / "runs.csv")
    assert list(zip(runs.quant, runs["mode"], strict=True)) == [
        ("reference", "reference"),
        ("iq1_m", "standard"),
        ("iq1_m", "dynamicgate"),
        ("q4_0", "standard"),
        ("q4_0", "dynamicgate"),
    ]
    assert (runs.status == "ok").all()
    assert (runs.n_scored == 2 * 63).all()
    for name in ("table.md", "table.csv", "tradeoff.png"):
        assert (folder / name).stat().st_size > 100
    assert "| IQ1_M" in out and "| Q4_0" in out and "±" in out
    assert "no_effect" in out, "the policy has no rule for q4_0: both its modes are one file, measured once"
    twins = runs[runs.quant == "q4_0"]
    assert twins.ppl.nunique() == twins.pass_s.nunique() == twins.file_bytes.nunique() == 1

    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    begin = time.monotonic()
    code, out, err = cli("sweep", "quant=iq1_m,q4_0", *tiny_overrides)
    assert code == 0
    assert "everything is there" in out
    assert time.monotonic() - begin < 5
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}


def test_reference_perplexity_equals_a_naive_loop(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    assert cli("sweep", "quant=q8_0", "mode=standard", *tiny_overrides)[0] == 0
    record = next(r for r in read_records(tmp_path / "results" / "tiny") if r.data["mode"] == "reference")
    (windows_path,) = (
        path
        for path in (tmp_path / "cache" / "windows").glob("*.npy")
        if np.load(path).shape == (2, 128) and record.data["prompt_set"]["id"] == _sha256_of_tokens(np.load(path))
    )
    windows = np.load(windows_path)
    assert (windows[:, 0] == 1).all(), "the model adds BOS, so every window starts with it"
    expected = naive_nll(tiny_gguf, windows, first_scored=65)
    np.testing.assert_allclose(record.per_token()["nll"], expected, atol=2e-4)
    ppl = pd.read_csv(tmp_path / "results" / "tiny" / "runs.csv").set_index("quant").ppl["reference"]
    assert ppl == pytest.approx(math.exp(expected.mean()), rel=1e-4)


def test_plan_predicts_the_written_file_exactly(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    code, out, _ = cli("plan", "quant=iq2_s,q4_k_m", "mode=standard,dynamicgate", "--json", *tiny_overrides)
    assert code == 0
    plans = json.loads(out)
    assert not (tmp_path / "cache" / "variants").exists(), "a plan does no work"
    assert cli("sweep", "quant=iq2_s,q4_k_m", "runtime.keep_variants=true", *tiny_overrides)[0] == 0
    written = sorted(path.stat().st_size for path in (tmp_path / "cache" / "variants").glob("*.gguf"))
    # q4_k_m has no rule in the policy: both its modes are one and the same file
    assert sorted({plan["file_bytes"] for plan in plans}) == sorted(set(written))
    assert len(written) == 3
    (imatrix,) = (tmp_path / "cache" / "imatrix").glob("*.gguf")
    told = []
    for path in (tmp_path / "cache" / "variants").glob("*.gguf"):
        fields = gguf.GGUFReader(path).fields
        told.append([fields[key].contents() for key in ("harness.quant", "harness.mode", "quantize.imatrix.file")])
        # 4 layers of 7 matrices, 2 windows of the text "calibration"
        keys = [f"quantize.imatrix.{name}" for name in ("entries_count", "chunks_count", "dataset")]
        assert [fields[key].contents() for key in keys] == [28, 2, "calibration"]
    names = [("iq2_s", "dynamicgate"), ("iq2_s", "standard"), ("q4_k_m", "standard")]
    assert sorted(told) == [[*name, imatrix.name] for name in names]


def test_a_later_sweep_leaves_the_files_that_an_earlier_one_kept(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path
) -> None:
    def sweep(quants: str, name: str, *more: str) -> set[str]:
        command = ["sweep", f"quant={quants}", "mode=standard", "calibration.enabled=false", *tiny_overrides]
        assert cli(*command, f"results.name={name}", *more)[0] == 0
        return {path.name for path in (tmp_path / "cache" / "variants").glob("*.gguf")}

    kept = sweep("q4_0", "first", "runtime.keep_variants=true")
    assert len(kept) == 1
    assert sweep("q4_0,q5_0", "second") == kept, "q5_0's went, q4_0's stayed"


def _heed_ctrl_c() -> None:
    """Shells start background jobs with SIGINT ignored, and so would be what the tests start from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_goes_on_where_it_was(tiny_overrides: list[str], tmp_path: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "harness", "sweep", "quant=iq2_xs,iq3_s", *tiny_overrides]
    records = tmp_path / "results" / "tiny" / "records"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_ctrl_c,  # noqa: PLW1509  # no threads are running here
    )
    deadline = time.monotonic() + 120
    while len(list(records.glob("*.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -9}[stop]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "children die with their parent"
    before = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert len(before) >= 2
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), "nothing is measured twice"
    runs = pd.read_csv(tmp_path / "results" / "tiny" / "runs.csv")
    assert len(runs) == 5 and (runs.status == "ok").all()
    assert not list((tmp_path / "results").rglob("*.tmp"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def _sha256_of_tokens(windows: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()


def test_the_notebook_runs_on_a_sweep(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("sweep", "quant=iq2_s", *tiny_overrides)[0] == 0
    root = Path(__file__).resolve().parent.parent
    notebook = nbformat.read(root / "notebooks" / "explore.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are stored without output"
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(root))  # the kernel is a process of its own
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "IQ2_S" in text and "PPL change (%)" in text and "ln PPL ratio" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert not [output for output in outputs if output.output_type == "stream"], "no warnings"
