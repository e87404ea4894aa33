"""Memory that this process may still take, whoever sets the limit."""

from contextlib import suppress
from pathlib import Path


def free_memory_bytes() -> int:
    """The least of what the machine has left, its control group (a container, a job of a queue), and its own limit."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_in_groups(), *_left_in_address_space()]))


def _left_in_groups() -> list[int]:
    """Of Linux' control groups, version 2: this process' group and those around it that have a limit."""
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        top = Path("/sys/fs/cgroup")
        for folder in (top / group, *(top / group).parents):
            with suppress(OSError, ValueError):  # "max": no limit
                limit_bytes = int((folder / "memory.max").read_text())
                found.append(limit_bytes - int((folder / "memory.current").read_text()))
            if folder == top:
                break
    return found


def _left_in_address_space() -> list[int]:
    """Of `ulimit -v`."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    import psutil

    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit_bytes == resource.RLIM_INFINITY else [limit_bytes - psutil.Process().memory_info().vms]
