"""The pure parts of the benchmarks, on lines that llama.cpp's tools really printed and sums that were done by hand."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import beside_llama_cpp, common, llama_tools
from benchmarks.common import OUTSIDE, Usage

ALL = ("ppl", "kld", "tensors")
SYSTEM_INFO = (
    "0.01.178.546 I system_info: n_threads = 2 (n_threads_batch = 2) / 2 | CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | "
    "AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | AVX512 = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | \n"
)
PERPLEXITY = f"""{SYSTEM_INFO}0.01.178.614 I perplexity: saving all logits to base.bin
0.01.254.093 I perplexity: calculating perplexity over 2 chunks, n_ctx=512, batch_size=512, n_seq=1
0.07.526.592 I perplexity: 6.20 seconds per pass - ETA 0.20 minutes
[1]15.9621,[2]11.5081,
0.16.676.702 I Final estimate: PPL = 11.5081 +/- 1.46284

"""
DIVERGENCE = """
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      33.6202 ±    6.7033       0.74491 ±    0.09783       0.82173 ±    0.06607    22.782 ±  1.942 %    56.078 ±  3.114 %
   2      23.9671 ±    3.3979       0.73363 ±    0.06874       0.75820 ±    0.04413    24.497 ±  1.390 %    59.804 ±  2.173 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  23.967081 ±   3.397864
Mean PPL(base)                :  11.508058 ±   1.462841
Mean ln(PPL(Q)/PPL(base))     :   0.733634 ±   0.068735
Mean PPL(Q)/PPL(base)         :   2.082635 ±   0.143151
Mean PPL(Q)-PPL(base)         :  12.459023 ±   2.233419

====== KL divergence statistics ======
Mean    KLD:   0.758200 ±   0.044130
Maximum KLD:   8.765739
Median  KLD:   0.475246
"""  # noqa: E501
QUANTIZE = """[  39/  39] blk.3.ffn_up.weight                  - [   256,    512,      1,      1], type =    f16, \
converting to iq2_xs .. size =     0.25 MiB ->     0.04 MiB
llama_model_quantize_impl: quant size  =     0.91 MiB (3.03 BPW)

llama_quantize: quantize time =  7549.77 ms
llama_quantize:    total time =  7551.02 ms
"""


def test_what_the_tools_print() -> None:
    assert llama_tools.printed("ppl", PERPLEXITY) == 11.5081
    assert llama_tools.printed("ppl", DIVERGENCE) == 23.967081
    assert llama_tools.printed("kld", DIVERGENCE) == 0.7582
    assert llama_tools.printed("quantize_s", QUANTIZE) == pytest.approx(7.54977)
    for name, output in (("ppl", PERPLEXITY.partition("Final")[0]), ("kld", PERPLEXITY), ("quantize_s", DIVERGENCE)):
        with pytest.raises(llama_tools.NotPrintedError):
            llama_tools.printed(name, output)


def test_features_are_those_that_are_on() -> None:
    expected = ["SSE3", "SSSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2", "AVX512", "LLAMAFILE", "OPENMP", "REPACK"]
    assert llama_tools.printed_features(PERPLEXITY) == expected


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("imatrix: running the calibration text (about 12 s left)\n", "imatrix"),
        ("reference: scoring (about 2.4 min left)\n", "reference"),
        ("iq1_m dynamicgate: quantizing (about 39 s left)\n", "quantize"),
        ("iq1_m dynamicgate+mine: scoring (about 31 s left)\n", "score"),
        ("Reference F16: PPL 513 ±43, 4.8M, scored in 1.5s\n", None),
        ("  reference                      4.8 MiB  16.015 bpw  about 1 s\n", None),
    ],
)
def test_steps_of_a_sweep(line: str, step: str | None) -> None:
    assert common.step_of_sweep(line) == step


def test_seconds_by_step() -> None:
    """Two CPUs are busy from second 2 to 8, one from 8 to 10; the look at second 7 missed a child."""
    samples = [(0.0, 0.0, 5), (2.0, 0.0, 7), (6.0, 8.0, 90), (7.0, 1.0, 8), (8.0, 12.0, 20), (10.0, 14.0, 0)]
    marks = [(0.0, OUTSIDE), (2.0, "quantize"), (4.0, "score"), (9.0, OUTSIDE)]
    found = common.by_step(marks, samples, 10.0)
    assert found["quantize"] == Usage(2.0, 4.0, 7)
    assert found["score"].wall_s == 5.0
    assert found["score"].cpu_s == pytest.approx(9.0)
    assert found["score"].peak_bytes == 90
    assert found[OUTSIDE].wall_s == 3.0
    assert sum(one.cpu_s for one in found.values()) == pytest.approx(14.0)


def test_table_has_medians_and_ranges() -> None:
    def side(*wall: float) -> list[dict[str, Usage]]:
        return [{"whole": Usage(one, 2 * one, 300_000_000 + i)} for i, one in enumerate(wall)]

    rounds = [
        {"harness": ours, "llama.cpp": theirs} for ours, theirs in zip(side(10, 30, 20), side(20, 40, 80), strict=True)
    ]
    line = beside_llama_cpp.table(rounds, ["whole"]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["whole", "20.0", "40.0", "0.50 (0.25 to 0.75)"]
    assert cells[4:] == ["40.0", "80.0", "0.50 (0.25 to 0.75)", "300", "300"]
    one_sided = beside_llama_cpp.table([{"harness": ours, "llama.cpp": {}} for ours in side(1, 2)], ["whole"])
    assert [cell.strip() for cell in one_sided.splitlines()[-1].split("|")][3:5] == ["-", "-"]


def test_differences_are_told() -> None:
    ours = {"reference": {"ppl": 12.5}, "q": {"ppl": 20.0, "kld": 0.5, "tensors": {"a": "q8_0 1", "b": "q8_0 2"}}}
    same = {"reference": {"ppl": 12.5}, "q": {"ppl": 20.0001, "kld": 0.5001, "tensors": dict(ours["q"]["tensors"])}}
    assert beside_llama_cpp.differences(ours, same, ALL) == []
    assert beside_llama_cpp.differences(ours, {"q": {"tensors": same["q"]["tensors"]}}, ["tensors"]) == []
    for change in ({"ppl": 20.1}, {"kld": 0.51}, {"tensors": {"a": "q8_0 1", "b": "q8_0 3"}}, {"tensors": {}}):
        off = beside_llama_cpp.differences(ours, {**same, "q": {**same["q"], **change}}, ALL)
        assert len(off) == 1, change
        assert off[0].startswith("q: ")
    assert len(beside_llama_cpp.differences(ours, {"q": same["q"]}, ALL)) == 1, "a case that one side lacks"


@pytest.mark.parametrize("name", ["p/vendor/llama.cpp/../../../x", "p/vendor/llama.cpp/a/../../../../x"])
def test_archives_write_nothing_outside(tmp_path: Path, name: str) -> None:
    sdist = tmp_path / "s.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for path in ("p/vendor/llama.cpp/CMakeLists.txt", "p/setup.py", name):
            entry = tarfile.TarInfo(path)
            entry.size = 2
            archive.addfile(entry, io.BytesIO(b"ok"))
        link = tarfile.TarInfo("p/vendor/llama.cpp/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    with pytest.raises(SystemExit, match="names a place outside"):
        llama_tools.unpack_llama_cpp(sdist, tmp_path / "deep" / "er" / "target")
    assert not list(tmp_path.rglob("x"))
    assert {path.name for path in (tmp_path / "deep").rglob("*") if path.is_file()} == {"CMakeLists.txt"}


FOLDER = Path(common.__file__).parent
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "ArgumentParser" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_takes(script: Path) -> None:
    told = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith(f"usage: {script.name}")
    assert not told.stderr
