"""A sweep that is killed again and again loses nothing. `benchmarks/kill_sweep.py` is the longer form."""

from pathlib import Path

import pytest
from killing import kill_sweeps


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    seen = kill_sweeps(tmp_path, 20, seed=1, say=print)
    assert seen["finished"] >= 1
    assert sum(seen.values()) - seen["finished"] >= 20
