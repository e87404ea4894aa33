"""The fault table: something goes wrong beside a finished sweep, and what the harness has to say and to keep.

Each row of a table is a `Fault`; `pytest tests/test_faults*.py -v` prints its id.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest

from harness.record import read_records

ROOT = Path(__file__).resolve().parent.parent
_TABLE = re.compile(r"\| fault \| what the harness says \| exit code \|\n(?:\|.*\n)+")

Cli = Callable[..., tuple[int, str, str]]

# What may stand in a line for text that differs from run to run, or that another program words.
_PLACEHOLDERS = {"{words}": ".+", "{number}": "[0-9,.]+", "{hex}": "[0-9a-f]+"}


@dataclass(frozen=True)
class World:
    """A test's own copy of a finished sweep: the reference and q8_0, measured on the tiny model."""

    folder: Path  # the test's own; cache/ and results/tiny/ are in it
    settings: list[str]
    model: Path
    texts: tuple[Path, Path]  # of the prompts, of the calibration
    cli: Cli
    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack  # of what ends with the test: servers, mounts

    @property
    def results(self) -> Path:
        """The sweep's folder."""
        return self.folder / "results" / "tiny"

    @property
    def cache(self) -> Path:
        """The harness' cache."""
        return self.folder / "cache"

    def sweep(self, *settings: str) -> tuple[int, str, str]:
        """Ask for one case more than there is. Settings given here win over the world's own."""
        given = {one.partition("=")[0] for one in settings}
        default = ["quant=q8_0,q4_0", "mode=standard", *self.settings]
        return self.cli("sweep", *(one for one in default if one.partition("=")[0] not in given), *settings)

    def write(self, name: str, content: bytes | str) -> Path:
        """A file of the test's own."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@dataclass(frozen=True)
class Fault:
    """One row. make: brings the trouble about and returns the settings to sweep with. says: the whole line on stderr
    after "error: ", with {folder} for the test's own folder; '' where the harness mends it by itself."""

    id: str
    make: Callable[[World], Sequence[str]]
    says: str = ""
    code: int = 2
    marks: Sequence[pytest.MarkDecorator] = field(default=(), compare=False)


def table(faults: Sequence[Fault]) -> Callable[..., pytest.MarkDecorator]:
    """Runs a test once for each row."""
    assert len({fault.id for fault in faults}) == len(faults)
    return pytest.mark.parametrize("fault", [pytest.param(one, id=one.id, marks=one.marks) for one in faults])


def _mounts() -> bool:
    """Whether this process may mount a file system, as root of a machine or container can."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return mounted.returncode == 0


can_mount = pytest.mark.skipif(not (shutil.which("mount") and _mounts()), reason="may not mount a small disk")
not_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")


def mounted(world: World, name: str, options: str) -> Path:
    """A file system in memory, for as long as the test lives."""
    folder = world.folder / name
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    world.stack.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_said(fault: Fault, world: World, result: tuple[int, str, str]) -> None:
    """The exit code and the whole line are those of the row; nothing but progress stands beside the line."""
    code, _, err = result
    lines = [line for line in err.splitlines() if not line.startswith(("fetching ", "deriving "))]
    assert code == fault.code, err
    paths = {"{folder}": world.folder, "{model}": world.model, "{texts}": world.texts[0].parent}
    known = {**_PLACEHOLDERS, **{name: re.escape(str(path)) for name, path in paths.items()}}
    pattern = "error: " + "".join(known.get(part) or re.escape(part) for part in re.split(r"(\{\w+\})", fault.says))
    assert len(lines) == bool(fault.says), err
    assert not lines or re.fullmatch(pattern, lines[0]), f"\n{lines[0]}\n{fault.says}"


def require_refused(fault: Fault, world: World) -> None:
    """One line and exit code 2 before any work; not one byte of the results differs."""
    settings = [one.replace("{folder}", str(world.folder)) for one in fault.make(world)]
    before = contents(world.results.parent)
    made = {kind: set((world.cache / kind).glob("*.gguf")) for kind in ("imatrix", "variants", "references")}
    require_said(fault, world, world.sweep(*settings))
    assert contents(world.results.parent) == before
    for kind, files in made.items():
        assert set((world.cache / kind).glob("*.gguf")) == files, f"{kind}: work was done before the check"


def require_table(world: World, *quants: str) -> None:
    """The written table lists these as measured, each from a whole record."""
    runs = pd.read_csv(world.results / "runs.csv")
    assert set(runs.quant[runs.status == "ok"]) == set(quants)
    assert {record.data["quant"] for record in read_records(world.results) if record.ok} == set(quants)


def docs_tables() -> list[str]:
    """The tables of docs/reliability.md, in their order."""
    import test_faults
    import test_faults_gguf
    import test_faults_run

    tables = []
    for module in (test_faults_gguf, test_faults, test_faults_run):
        lines = ["| fault | what the harness says | exit code |", "|---|---|---|"]
        for fault in module.FAULTS:
            said = f"``{fault.says}``" if fault.says else "nothing: it measures or makes the thing again"
            lines.append(f"| `{fault.id}` | {said.replace('|', chr(92) + '|')} | {fault.code} |")
        tables.append("\n".join(lines) + "\n")
    return tables


if __name__ == "__main__":
    docs, tables = ROOT / "docs" / "reliability.md", iter(docs_tables())
    docs.write_text(_TABLE.sub(lambda _: next(tables), docs.read_text(encoding="utf-8")), encoding="utf-8")
