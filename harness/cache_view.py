"""What the cache holds, for reading: by kind, the largest files, the least recently used tensors."""

import re
from datetime import datetime

from harness.cost import file_size
from harness.errors import UserError
from harness.store import Cache, free_bytes
from harness.tensor_cache import entries

_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SHOWN = 5


def cache_text(cache: Cache) -> str:
    """A line a kind, then the largest files and the oldest tensors."""
    files = cache.files()
    every = [one for kind in files.values() for one in kind]
    total = sum(size for _, size, _ in every)
    lines = [
        f"{cache.folder}: {file_size(total)} in {len(every):,} files, "
        f"{file_size(free_bytes(cache.folder))} free on its disk"
    ]
    if not every:
        return lines[0]
    lines += ["", f"  {'kind':<16} {'files':>7} {'size':>10}  oldest      newest"]
    for kind, found in files.items():
        times = sorted(when for _, _, when in found)
        n_bytes = file_size(sum(size for _, size, _ in found))
        lines.append(f"  {kind:<16} {len(found):>7,} {n_bytes:>10}  {_day(times[0])}  {_day(times[-1])}")
    lines += ["", "largest files"]
    for path, size, _ in sorted(every, key=lambda one: (-one[1], one[0]))[:_SHOWN]:
        lines.append(f"  {file_size(size):>10}  {path.relative_to(cache.folder).as_posix()}")
    tensors = entries(cache)
    if tensors:
        lines += ["", "quantized tensors, the least recently used first"]
        lines += [
            f"  {file_size(one.n_bytes):>10}  {_day(one.used_ns / 1e9)}  {one.path.name}" for one in tensors[:_SHOWN]
        ]
    return "\n".join(lines)


def parse_size(text: str) -> int:
    """Bytes that may stay: '5GB', '300 MB', '5GiB' (binary), '0'; 'all' leaves none. Raises UserError on anything
    else."""
    if text == "all":
        return 0
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([kmgt]?b?|[kmgt]ib)", text.lower())
    if not match or match[2] not in _UNITS:
        raise UserError(
            f"prune={text}: say how much may stay, such as 5GB, 5GiB, 300MB or 0, or all to remove everything"
        )
    return round(float(match[1]) * _UNITS[match[2]])


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d")
