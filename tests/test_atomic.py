"""Files are whole or absent: what a sweep asks of the system, in order, and writes that fail in the middle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.store import write_atomic

# Every Python process of a sweep imports this first: it writes down who opens, flushes and renames what.
WITNESS = """
import json, os, sys

def note(*event):
    with_no_hook = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(with_no_hook, (json.dumps(event) + "\\n").encode())
    os.close(with_no_hook)

def hook(event, args):
    if event == "open" and isinstance(args[0], str) and args[0] != os.environ["WITNESS"]:
        if args[2] & (os.O_WRONLY | os.O_RDWR):
            note("open", os.path.abspath(args[0]))
    elif event == "os.rename":
        note("rename", *(os.path.abspath(os.fspath(one)) for one in args[:2]))

fsync = os.fsync

def noted_fsync(descriptor):
    fsync(descriptor)
    note("fsync", os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}"))

os.fsync = noted_fsync
sys.addaudithook(hook)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_every_file_of_a_sweep_is_written_flushed_and_renamed(tmp_path: Path, tiny_overrides: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    log = tmp_path / "events.jsonl"
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "WITNESS": str(log)}
    command = [sys.executable, "-m", "harness", "sweep", "quant=iq2_xs", *tiny_overrides]
    command += ["measure.speed=true", "measure.generate_tokens=2", "measure.layers=true", "runtime.keep_variants=true"]
    subprocess.run(command, check=True, capture_output=True, env=environment)

    events = [json.loads(line) for line in log.read_text().splitlines()]
    flushed: set[str] = set()
    renamed: set[str] = set()
    for kind, *names in events:
        if kind == "fsync":
            flushed.add(names[0])
        elif kind == "rename" and Path(names[1]).is_relative_to(tmp_path):
            assert Path(names[0]).parent == Path(names[1]).parent, "a rename on one disk"
            torn_is_found = Path(names[1]).parent.name == "tensors"  # their checksum is compared when they are read
            assert names[0] in flushed or torn_is_found, f"{names[1]} was renamed before its content was flushed"
            renamed.add(names[1])
    folders = (tmp_path / "results", tmp_path / "cache")
    made = {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}
    loose = {name for name in made if Path(name).suffix in (".log", ".lock")}
    assert {Path(name).suffix for name in made - loose} >= {".json", ".npz", ".npy", ".gguf", ".csv", ".md", ".png"}
    assert made - loose == renamed & made, "files that were not renamed to their names"
    opened = {name for kind, name, *_ in events if kind == "open"}
    assert opened & made <= loose, "only logs and locks are opened for writing under their own names"


@pytest.mark.parametrize("step", ["write", "os.fsync", "pathlib.Path.chmod", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        if step == "write":
            fail()

    if step != "write":
        monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
