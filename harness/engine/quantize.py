"""llama_model_quantize: dry runs that tell what llama.cpp would choose, and real runs.

Real runs make F16 references, and in the tests the files that those of `harness.quantize` must equal.
"""

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import llama_cpp
import numpy as np

from harness.engine.native import log_lines
from harness.errors import EngineError
from harness.ggml_types import FILE_TYPES, GGML_TYPES
from harness.recipes import exact_pattern

_LINE = re.compile(r"^\[ *(?P<i>\d+)/ *(?P<n>\d+)\] +(?P<name>\S+) +- \[.*?\], type = +(?P<type>\S+),(?P<rest>.*)$")
_TO_TYPE = re.compile(r"MiB -> +[\d.]+ MiB \((?P<type>\w+)\)")
_MISFIT = re.compile(r"warning: (?P<name>\S+) +- ncols .*\(required for type +(?P<type>\w+)\)")


@dataclass(frozen=True)
class DryRun:
    """What llama_model_quantize would do. `final`: type of each tensor that it may quantize, by name, fallback
    applied. `asked`: the type before the fallback, for the tensors that fell back."""

    final: dict[str, str]
    asked: dict[str, str]


def dry_run(source: Path, file_type: str, *, has_imatrix: bool, pure: bool = False) -> DryRun:
    """Ask llama.cpp for the types of its own mixture of `file_type`, without quantizing.

    Raises EngineError when llama.cpp refuses the file or the type.
    """
    final: dict[str, str] = {}
    asked: dict[str, str] = {}

    def on_line(line: str) -> None:
        # A fallback warning and the line of the tensor may share one line of the log.
        for warning in _MISFIT.finditer(line):
            asked[warning["name"]] = warning["type"].lower()
        match = _LINE.search(line)
        if match:
            target = _TO_TYPE.search(match["rest"])
            final[match["name"]] = (target["type"] if target else match["type"]).lower()

    params = _params(file_type, n_threads=1)
    params.dry_run, params.pure = True, pure
    # An imatrix changes the mixture (Q4_0, IQ4_XS ...), whatever it holds: one entry stands for the real one.
    keep_alive = _attach_imatrix(params, {"present": np.ones(1, np.float32)} if has_imatrix else {})
    _run(source, source.with_suffix(".never-written"), params, on_line)
    del keep_alive
    return DryRun(final, asked)


def standard_types(
    source: Path, file_types: Sequence[str], *, has_imatrix: bool, pure: bool = False
) -> dict[str, DryRun]:
    """`dry_run` for each file type, reduced to the tensors that llama.cpp is willing to quantize.

    Those are the tensors that two pure runs would bring to their type (or to its fallback): a tensor that is left
    alone keeps the type it has, which cannot be both.
    """
    probes = {probe: dry_run(source, probe, has_imatrix=False, pure=True) for probe in ("q8_0", "q4_0")}
    quantizable = set.intersection(
        *(
            set(run.asked) | {name for name, final in run.final.items() if final == probe}
            for probe, run in probes.items()
        )
    )
    runs = {name: dry_run(source, name, has_imatrix=has_imatrix, pure=pure) for name in file_types}
    return {
        name: DryRun({t: final for t, final in run.final.items() if t in quantizable}, run.asked)
        for name, run in runs.items()
    }


def quantize(
    source: Path,
    target: Path,
    file_type: str,
    *,
    overrides: Mapping[str, str],
    imatrix: Mapping[str, np.ndarray],
    n_threads: int,
    metadata: Mapping[str, str | int] = MappingProxyType({}),
    allow_requantize: bool = False,
) -> None:
    """Write `target` with the type that `overrides` gives to each tensor (name -> lower-case type).

    `imatrix`: float32 weights by tensor name, one a column (times the number of experts). `metadata`: keys for the
    header beside those of the source, texts of at most 127 bytes and numbers below 2^32. Raises EngineError when
    llama.cpp fails.
    """
    params = _params(file_type, n_threads)
    params.allow_requantize = allow_requantize
    keep_alive = [
        _attach_overrides(params, overrides),
        _attach_imatrix(params, imatrix),
        _attach_metadata(params, metadata),
    ]

    _run(source, target, params, lambda line: None)
    keep_alive.clear()


def _params(file_type: str, n_threads: int) -> llama_cpp.llama_model_quantize_params:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[file_type], n_threads
    return params


def _attach_overrides(params: llama_cpp.llama_model_quantize_params, overrides: Mapping[str, str]) -> object:
    array = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()  # a zero entry ends it
    for entry, (name, type_name) in zip(array, overrides.items(), strict=False):
        entry.pattern = exact_pattern(name).encode()
        entry.type = GGML_TYPES[type_name].id
    if overrides:
        params.tt_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    return array


def _attach_imatrix(params: llama_cpp.llama_model_quantize_params, imatrix: Mapping[str, np.ndarray]) -> object:
    array = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    kept: list[object] = [array]
    for entry, (name, values) in zip(array, imatrix.items(), strict=False):
        data = np.ascontiguousarray(values, np.float32)
        entry.name = name.encode()
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = data.size
        kept.append(data)
    if imatrix:
        params.imatrix = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return kept


def _attach_metadata(params: llama_cpp.llama_model_quantize_params, metadata: Mapping[str, str | int]) -> object:
    array = (llama_cpp.llama_model_kv_override * (len(metadata) + 1))()  # an empty key ends it
    for entry, (key, value) in zip(array, metadata.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    if metadata:
        params.kv_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_kv_override))
    return array


def _run(
    source: Path, target: Path, params: llama_cpp.llama_model_quantize_params, on_line: Callable[[str], None]
) -> None:
    tail: list[str] = []

    def keep(line: str) -> None:
        if line.strip():
            tail.append(line.rstrip())
            del tail[:-8]
        on_line(line)

    with log_lines(keep):
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failed:
        reason = next((line for line in reversed(tail) if "failed to quantize" in line), "no reason was logged")
        raise EngineError(f"llama_model_quantize: {reason.split('failed to quantize: ')[-1]}", tail)
