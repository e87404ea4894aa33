"""Plan -> GGUF file, read back and compared with the plan. Runs in a child process."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import EngineError, UserError
from harness.imatrix import read_imatrix
from harness.plan import Plan
from harness.provenance import IMATRIX_ENTRIES


def make_variant(
    source: Path,
    target: Path,
    plan: Plan,
    imatrix: Path | None,
    *,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Quantize the reference as planned. Returns {"quantize_s": seconds}.

    Raises EngineError when llama.cpp fails or the file that it wrote is not the planned one, OSError when there is no
    room for it.
    """
    try:
        return _made_variant(source, target, plan, imatrix, n_threads=n_threads, on_progress=on_progress)
    except EngineError:
        _require_room(target, plan.file_bytes)  # llama.cpp does not tell a full disk from other failures
        raise


def _require_room(target: Path, n_bytes: int) -> None:
    """Raises OSError when the disk has no room for a file of that size."""
    if hasattr(os, "posix_fallocate"):
        with target.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)


def _made_variant(
    source: Path,
    target: Path,
    plan: Plan,
    imatrix: Path | None,
    *,
    n_threads: int,
    on_progress: Callable[[float], None] | None,
) -> dict[str, Any]:
    from harness.engine.gguf_file import read_header
    from harness.engine.quantize import quantize

    assert plan.file_type is not None
    try:
        weights = read_imatrix(imatrix).weights if imatrix else {}
    except UserError as error:  # it was checked before: somebody deleted or changed it since
        raise EngineError(f"the imatrix {imatrix} is gone or was changed") from error
    metadata = {key: len(weights) if key == IMATRIX_ENTRIES else value for key, value in plan.metadata}
    begin = time.perf_counter()
    quantize(
        source,
        target,
        plan.file_type,
        overrides=plan.overrides,
        imatrix=weights,
        metadata=metadata,
        n_threads=n_threads,
        on_progress=on_progress,
    )
    quantize_s = time.perf_counter() - begin
    try:
        written = read_header(target)
    except UserError as error:  # of a file that llama.cpp wrote, the user cannot mend it
        raise EngineError(f"the written file cannot be read back: {error}") from error
    types = {t.name: t.type for t in written.tensors}
    for tensor in plan.tensors:
        if types.get(tensor.name) != tensor.type:
            raise EngineError(f"{tensor.name} was written as {types.get(tensor.name)}, planned was {tensor.type}")
    if len(types) != len(plan.tensors) or written.file_bytes != plan.file_bytes:
        raise EngineError(
            f"the written file has {len(types)} tensors and {written.file_bytes} bytes, "
            f"planned were {len(plan.tensors)} and {plan.file_bytes}"
        )
    return {"quantize_s": quantize_s}


def derive_f16(source: Path, target: Path, *, n_threads: int) -> None:
    """Dequantize an already quantized model into an F16 one, for use as a reference."""
    from harness.engine.quantize import quantize

    quantize(source, target, "f16", overrides={}, imatrix={}, n_threads=n_threads, allow_requantize=True)
