"""Kills a sweep on a tiny model at random moments, over and over; see tests/killing.py for what is checked.

python benchmarks/kill_sweep.py [KILLS] [SEED]
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from killing import kill_sweeps  # noqa: E402

if __name__ == "__main__":
    kills, seed = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 200), (2, 0)))
    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as name:
        seen = kill_sweeps(Path(name), kills, seed, lambda text: print(text, flush=True))
    for what, times in sorted(seen.items()):
        print(f"{times:5} {what}")
    print("nothing lost, nothing left behind")
