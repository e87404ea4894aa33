"""Coverage-guided fuzzing of everything that reads files of strangers (the targets of tests/fuzz_targets.py).

    pip install atheris                                  # CPython 3.11 to 3.14 on Linux or macOS; nothing else needs it
    python benchmarks/fuzz.py TARGET|all [SECONDS]       # 60 for each target by default
    python benchmarks/fuzz.py TARGET FILE                # one input again, such as one that was found

Prints for each target the inputs tried, the edges of harness/ that they reached (as atheris counts them), and how many
inputs it keeps because they reached something new. These stay in the cache folder and are where the next run begins.
An input that breaks a promise or takes more than 20 seconds of CPU time or 2 GB stops the run: its file is named, and
the exit code is 1.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CPU_S, TIMEOUT_S, MEMORY_MB = 20, 300, 2048  # the machine may be busy, so a hang is told late
_STATUS = re.compile(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
_DONE = re.compile(r"^Done (\d+) runs in (\d+) second", re.MULTILINE)


def main(arguments: list[str]) -> int:
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("error: fuzzing needs atheris, which is not installed: pip install atheris", file=sys.stderr)
        return 2
    if len(arguments) == 3 and arguments[0] == "--child":
        return child(arguments[1], int(arguments[2]))
    from tests.fuzz_targets import TARGETS, run

    name, value = [*arguments, "all", "60"][:2] if arguments else ("all", "60")
    if name not in ("all", *TARGETS) or len(arguments) > 2:
        print(f"error: give a target: all, {', '.join(TARGETS)}; and seconds or a file", file=sys.stderr)
        return 2
    if not value.isdigit():
        TARGETS[name].seeds()  # makes what the target stands on
        with tempfile.TemporaryDirectory() as folder:
            run(TARGETS[name], Path(value).read_bytes(), Path(folder))
        return 0
    print("target       inputs  per s  edges  kept", flush=True)
    return max([fuzz(one, int(value)) for one in (TARGETS if name == "all" else [name])])


def fuzz(name: str, seconds: int) -> int:
    """One target in a process of its own, which libFuzzer ends."""
    log = home(name) / "log"
    command = [sys.executable, __file__, "--child", name, str(seconds)]
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    done, statuses = _DONE.search(text), _STATUS.findall(text)
    n, edges, _, kept = statuses[-1] if statuses else ("0", "0", "0", "0")
    n_inputs, duration_s = (int(done[1]), int(done[2])) if done else (int(n), seconds)
    print(f"{name:<11} {n_inputs:>7} {n_inputs / max(1, duration_s):>6.0f} {edges:>6} {kept:>5}", flush=True)
    if code == 0:
        return 0
    found = re.findall(r"Test unit written to (\S+)", text)
    lines = [line for line in text.splitlines() if line.strip()]
    print(*lines[-30:], sep="\n  | ")
    print(f"{name}: a defect, the input is {found[-1] if found else 'unknown'}; the whole log is {log}", flush=True)
    return 1


def child(name: str, seconds: int) -> int:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["harness"]):
        from tests.fuzz_targets import TARGETS, run
    warnings.simplefilter("error")
    target, here = TARGETS[name], home(name)
    folders = {kind: here / kind for kind in ("corpus", "seeds", "found")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (folders["seeds"] / str(i)).write_bytes(seed)
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    (here / "words").write_text("".join(f'"{word}"\n' for word in quoted))
    work = tempfile.TemporaryDirectory(prefix="fuzz-")

    def one_input(data: bytes) -> None:
        begin_s = time.process_time()
        with tempfile.TemporaryDirectory(dir=work.name) as folder:
            run(target, data, Path(folder))
        assert time.process_time() - begin_s < CPU_S, "too slow"

    options = [
        *(f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}", "-seed=1"),
        *(f"-max_len={target.max_bytes}", f"-artifact_prefix={folders['found']}/"),
        *([f"-dict={here / 'words'}"] if target.words else []),
        *("-print_final_stats=1", str(folders["corpus"]), str(folders["seeds"])),
    ]
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()
    return 0


def home(name: str) -> Path:
    """Where a target's inputs are kept."""
    from platformdirs import user_cache_path

    folder = Path(os.environ.get("GGUF_HARNESS_FUZZ_DIR") or user_cache_path("gguf-harness-fuzz")) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
