"""Safetensors -> GGUF, with the converter of the llama.cpp that the harness measures with.

The converter (Python) is in the source archive of llama-cpp-python, not in what pip installs of it. It is fetched,
verified and kept in the cache. It sees a folder of links to the model's data files and nothing else: no code of the
model's own is there to be run.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import sources
from harness.errors import EngineError, UserError, some
from harness.header import GgufInfo
from harness.isolate import log_tail, run_in_child
from harness.store import Cache, free_bytes

PACKAGE = "llama-cpp-python==0.3.36"  # the release that pyproject.toml pins
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TYPES = {"bf16": 2, "f16": 2, "f32": 4}  # bytes a weight

_EXTRA = ("torch", "transformers", "sentencepiece", "google.protobuf")
_SCRIPT = "convert_hf_to_gguf.py"
_MEMBER = re.compile(
    rf"[^/]+/vendor/llama\.cpp/({re.escape(_SCRIPT)}|conversion/\w+\.py|gguf-py/gguf/(?:\w+/)*\w+\.py)", re.ASCII
)
_LARGEST_MEMBER_BYTES, _LARGEST_N_MEMBERS = 4 << 20, 1000
_DATA_FILES = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE")
_WITH_AUTO_MAP = ("config.json", "tokenizer_config.json")  # what transformers reads names of classes from
_LARGEST_JSON_BYTES = 64 << 20
_LARGEST_HEADER_BYTES = 100_000_000  # the bound of the safetensors library


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors. `n_weights` by type of safetensors (BF16, F8_E4M3, ...), scales of weights included."""

    folder: Path
    architecture: str
    n_weights: dict[str, int]

    @property
    def is_fp8(self) -> bool:
        """Whether weights are stored in 8-bit floating point, with scales beside them."""
        return any(name.startswith("F8_") for name in self.n_weights)


def convert(folder: Path, out: Path, file_type: str, cache: Cache, say: sources.Say) -> GgufInfo:
    """Write the model in `folder` to `out` as GGUF and return its header. FP8 weights are multiplied by their scales.

    Raises UserError on what cannot be converted, before anything slow where it can be seen, and EngineError when
    llama.cpp's converter refuses the model.
    """
    if file_type not in TYPES:
        raise UserError(f"type={file_type}: give {', '.join(TYPES)}; quantizing is for `sweep`")
    if out.suffix != ".gguf" or not out.parent.is_dir():
        raise UserError(f"out={out}: give a name that ends in .gguf, in a folder that is there")
    if os.path.lexists(out):
        raise UserError(f"out={out} is there already: convert overwrites nothing, delete it or give another name")
    checkpoint = read_checkpoint(folder)
    needed, free = TYPES[file_type] * sum(checkpoint.n_weights.values()), free_bytes(out.parent)
    if free < needed:
        raise UserError(f"out={out} needs {needed / 1e9:.1f} GB, {out.parent} has {free / 1e9:.1f} GB free")
    require_extra()
    converter = converter_archive(cache, say)
    fp8 = ", FP8" if checkpoint.is_fp8 else ""
    say(f"converting {folder} ({some([checkpoint.architecture])}{fp8}) to {file_type.upper()}")
    log = cache.path("logs", "convert", ".log")
    with tempfile.TemporaryDirectory(prefix=".gguf-harness-", dir=out.parent.absolute()) as temporary:
        made = Path(temporary, "model.gguf")
        _run(checkpoint, converter, made, file_type, Path(temporary), log)
        info = GgufInfo.from_json(run_in_child(_read_header, made, log_path=cache.path("logs", "inspect", ".log")))
        made.replace(out)
    return info


def read_checkpoint(folder: Path) -> Checkpoint:
    """What config.json and the headers of the safetensors say. Raises UserError unless all are there and whole."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one with config.json and *.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no {'config.json' if files else '*.safetensors'}: give a model's whole folder")
    architectures = _json(folder / "config.json").get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UserError(f"{folder / 'config.json'} names no architecture: give a model's whole folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        wanted = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if absent := sorted(wanted - {path.name for path in files}):
            raise UserError(f"{folder} lacks {some(absent)}, which {index.name} names: fetch the model again")
    n_weights: Counter[str] = Counter()
    for path in files:
        n_weights.update(_n_weights(path))
    return Checkpoint(folder, architectures[0], dict(n_weights))


def require_extra() -> None:
    """Raises UserError when packages that the converter imports are not installed."""
    missing = [name for name in _EXTRA if not _installed(name)]
    if missing:
        raise UserError(f"convert needs {', '.join(missing)}: pip install -e '.[convert]' (see docs/converting.md)")


def converter_archive(cache: Cache, say: sources.Say) -> Path:
    """A zip file with the converter's modules, out of the pinned sources. Raises UserError if it is not to be had."""

    def make(target: Path) -> None:
        say(f"fetching the converter out of the sources of {PACKAGE}")
        with sources.fetched_sdist(PACKAGE, SDIST_SHA256) as sdist, zipfile.ZipFile(target, "w") as archive:
            for name, content in converter_members(sdist):
                archive.writestr(name, content)

    return cache.make("converter", SDIST_SHA256, ".zip", make)


def converter_members(sdist: Path) -> Iterable[tuple[str, bytes]]:
    """Path and content of each module of the converter in a source archive. Raises UserError when it has none."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                match = _MEMBER.fullmatch(member.name)
                if match is None or not member.isfile():
                    continue
                file = archive.extractfile(member)
                if file is None or member.size > _LARGEST_MEMBER_BYTES or len(found) >= _LARGEST_N_MEMBERS:
                    raise UserError(f"{sdist.name}: {some([member.name])} is too much for a converter: not used")
                found[match[1]] = file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{sdist.name} is no source archive ({error}): not used") from error
    if _SCRIPT not in found:
        raise UserError(f"{sdist.name} has no {_SCRIPT}: not used")
    return sorted(found.items())


def link_data(folder: Path, target: Path) -> None:
    """Make `target`: links to the data files of a model, without code, and without the names of classes in its
    configuration that transformers would look for code by."""
    target.mkdir()
    for path in {path for pattern in _DATA_FILES for path in folder.glob(pattern) if path.is_file()}:
        if path.name in _WITH_AUTO_MAP:
            (target / path.name).write_text(json.dumps(_without_auto_map(_json(path))), encoding="utf-8")
        else:
            (target / path.name).symlink_to(path.resolve())


def _run(checkpoint: Checkpoint, converter: Path, out: Path, file_type: str, folder: Path, log: Path) -> None:
    """The converter in a process of its own, offline, with caches of its own."""
    with zipfile.ZipFile(converter) as archive:
        archive.extractall(folder / "converter")  # noqa: S202  # we wrote it, under names that were checked
    name = Path(os.path.realpath(checkpoint.folder)).name  # the converter takes the model's name from its folder
    model = folder / "links" / name
    model.parent.mkdir()
    link_data(checkpoint.folder, model)
    command = [sys.executable, str(folder / "converter" / _SCRIPT), str(model)]
    command += ["--outfile", str(out), "--outtype", file_type]
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "NO_LOCAL_GGUF")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own = {"HF_HOME": str(folder / "hub"), "HF_MODULES_CACHE": str(folder / "modules")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        code = subprocess.run(
            command, stdout=output, stderr=output, cwd=folder, env={**inherited, **offline, **own}, check=False
        ).returncode
    if code != 0 or not out.is_file():
        lines = log_tail(log)
        raise EngineError(f"llama.cpp's converter cannot convert {checkpoint.folder}, see {log}", lines)


def _n_weights(path: Path) -> Counter[str]:
    """Elements by type, of a safetensors file's header. Raises UserError when it is none, or truncated."""
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _LARGEST_HEADER_BYTES:
                raise ValueError("its header is too large")
            header = json.loads(file.read(size))
        found: Counter[str] = Counter()
        end = 0
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            n = 1
            for length in tensor["shape"]:
                n *= int(length)
            if not 0 <= n <= n_bytes:
                raise ValueError("a shape is larger than the file")
            found[str(tensor["dtype"])] += n
            end = max(end, int(tensor["data_offsets"][1]))
    except (
        OSError,
        struct.error,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): fetch it again") from error
    if n_bytes != 8 + size + end:
        raise UserError(f"{path} is truncated: it should have {8 + size + end:,} bytes; fetch it again")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise ValueError("it is too large")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): fetch the model again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is no JSON object: fetch the model again")
    return data


def _without_auto_map(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_auto_map(one) for name, one in value.items() if name != "auto_map"}
    return [_without_auto_map(one) for one in value] if isinstance(value, list) else value


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the parent of a submodule
        return False


def _read_header(path: Path) -> dict[str, Any]:
    """In a child: llama.cpp's own reading of the file."""
    from harness.engine.gguf_file import read_header

    return read_header(path).to_json()
