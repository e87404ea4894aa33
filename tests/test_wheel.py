"""A wheel built from the project works from any folder: conf/ travels inside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_plans_from_another_folder(tiny_overrides: list[str], tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    assert (unpacked / "harness" / "conf" / "policy" / "dynamicgate.yaml").is_file()
    assert len(list((unpacked / "harness" / "data").glob("*.csv"))) == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "harness", "plan", "quant=iq1_m", *tiny_overrides],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "ffn_down_ends" in result.stdout
    assert not list(elsewhere.iterdir()), "a plan leaves nothing behind"
