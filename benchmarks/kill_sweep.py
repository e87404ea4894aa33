"""Kills a sweep on a tiny model at random moments, over and over; see tests/killing.py for what is checked.

python benchmarks/kill_sweep.py [KILLS] [SEED]
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from killing import kill_sweeps  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kills", nargs="?", type=int, default=200, metavar="KILLS")
    parser.add_argument("seed", nargs="?", type=int, default=0, metavar="SEED")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as name:
        seen = kill_sweeps(Path(name), args.kills, args.seed, lambda text: print(text, flush=True))
    for what, times in sorted(seen.items()):
        print(f"{times:5} {what}")
    print("nothing lost, nothing left behind")
