"""Plan -> GGUF file, read back and compared with the plan. Runs in a child process."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.cost import tensor_s
from harness.errors import EngineError, UserError
from harness.ggml_types import GGUF_ALIGNMENT, requires_imatrix
from harness.imatrix import read_imatrix
from harness.plan import Plan, TensorPlan
from harness.provenance import IMATRIX_ENTRIES
from harness.store import sha256_file
from harness.tensor_cache import Hashes, TensorCache, sha256_of_weights

if TYPE_CHECKING:
    from harness.engine.gguf_file import SourceTensor
    from harness.engine.variant_file import Layout

_HELD_COST = 0.02  # of a tensor that is only read back, against making it


def make_variant(
    source: Path,
    target: Path,
    plan: Plan,
    imatrix: Path | None,
    *,
    n_threads: int,
    kept: TensorCache | None = None,
    hashes: Hashes | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Write the file that the plan describes: byte for byte what llama_model_quantize makes of the same types.

    hashes: what tensors are made of; those that are worth it are kept in `kept` under that. Returns {"quantize_s":
    seconds, and numbers of tensors: "n_tensors_quantized", "n_tensors_reused", "n_tensors_damaged": those whose entry
    was damaged}.

    Raises EngineError when ggml refuses the data, source or imatrix is not what the hashes tell, or the written file is
    not the planned one; OSError when there is no room for it.
    """
    from harness.engine.gguf_file import read_header
    from harness.engine.variant_file import plan_layout

    assert plan.file_type is not None
    try:
        weights = read_imatrix(imatrix).weights if imatrix else {}
    except UserError as error:  # it was checked before: somebody deleted or changed it since
        raise EngineError(f"the imatrix {imatrix} is gone or was changed") from error
    metadata = {key: len(weights) if key == IMATRIX_ENTRIES else value for key, value in plan.metadata}
    layout = plan_layout(source, {t.name: t.type for t in plan.tensors}, plan.file_type, metadata)
    begin = time.perf_counter()
    counts, waited_s = _write(target, plan, layout, weights, kept, hashes, n_threads, on_progress)
    quantize_s = time.perf_counter() - begin - waited_s
    try:
        written = read_header(target)
    except UserError as error:  # of a file that we wrote, the user cannot mend it
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
    return {"quantize_s": quantize_s, **counts}


def _write(
    target: Path,
    plan: Plan,
    layout: "Layout",
    weights: Mapping[str, np.ndarray],
    kept: TensorCache | None,
    hashes: Hashes | None,
    n_threads: int,
    on_progress: Callable[[float], None] | None,
) -> tuple[dict[str, int], float]:
    """Header and data of the file. Returns the numbers of `make_variant`, and the seconds of waiting for others."""
    from harness.engine.chunks import copied, quantized

    plans = {t.name: t for t in plan.tensors}
    keys = hashes.keys(plan.tensors) if kept and hashes else {}
    counts = {"n_tensors_quantized": 0, "n_tensors_reused": 0, "n_tensors_damaged": 0}
    held: set[str] = set()
    fitting: set[str] = set()
    if kept:
        held, fitting = kept.claim({key: plans[name].n_bytes for name, key in keys.items()})
    entries = {name: key for name, key in keys.items() if key in held | fitting}
    advance = _progress(plan, {name for name, key in keys.items() if key in held}, on_progress)
    waited_s = 0.0

    @contextmanager
    def lock(name: str, wait: bool) -> Iterator[bool]:
        nonlocal waited_s
        begin = time.perf_counter()
        with kept.lock(entries[name], wait=wait) if kept and name in entries else nullcontext(True) as free:
            waited_s += time.perf_counter() - begin
            yield free

    with ThreadPoolExecutor(n_threads) as threads, target.open("wb") as file:
        file.write(layout.head)
        last, offset = layout.tensors[-1]
        end = offset + plans[last.name].n_bytes
        file.truncate(end + -end % GGUF_ALIGNMENT)  # what lies between and behind the tensors is zero
        for tensor, offset in _in_turn(layout.tensors, lock):
            planned, key = plans[tensor.name], entries.get(tensor.name)
            file.seek(offset)
            found = kept.read(key, planned.n_bytes, file) if kept and key else None
            if found:
                counts["n_tensors_reused"] += 1
                advance(planned, planned.n_bytes)
                continue
            counts["n_tensors_damaged"] += found is False
            file.seek(offset)
            if tensor.type == planned.type:
                columns, blocks = None, copied(tensor)
            else:
                columns = _columns(planned, weights, plan)
                blocks = quantized(tensor, planned.type, columns, threads)
                counts["n_tensors_quantized"] += 1

            def emit(block: np.ndarray, planned: TensorPlan = planned) -> None:
                try:
                    file.write(block.data)
                except OSError as error:  # not of the entry that is written beside it
                    raise OSError(error.errno, error.strerror, str(target)) from error
                advance(planned, block.size)

            if kept and hashes and key:
                kept.keep(key, planned.n_bytes, _vouched(blocks, tensor, columns, hashes), emit)
            else:
                for block in blocks:
                    emit(block)
    return counts, waited_s


def _in_turn(
    tensors: Iterable[tuple["SourceTensor", int]], lock: Callable[[str, bool], AbstractContextManager[bool]]
) -> Iterator[tuple["SourceTensor", int]]:
    """The tensors, each under its lock. One that another process is making comes later: until then there may be others
    to make, and then it is only read."""
    waiting, n_passed = deque(tensors), 0
    while waiting:
        tensor, offset = waiting.popleft()
        with lock(tensor.name, n_passed > len(waiting)) as free:
            if free:
                n_passed = 0
                yield tensor, offset
            else:
                n_passed += 1
                waiting.append((tensor, offset))


def _vouched(
    blocks: Iterable[np.ndarray], tensor: "SourceTensor", columns: np.ndarray | None, hashes: Hashes
) -> Iterator[np.ndarray]:
    """The blocks; after the last of them raises EngineError unless they were made of what the hashes tell."""
    yield from blocks
    hashes.require_unchanged(tensor.name, sha256_file(tensor.path, tensor.offset, tensor.n_bytes), columns)


def _columns(tensor: TensorPlan, weights: Mapping[str, np.ndarray], plan: Plan) -> np.ndarray | None:
    """The tensor's imatrix. Raises EngineError where it has none and llama.cpp refuses to do without."""
    found = weights.get(tensor.name)
    if found is None and requires_imatrix(tensor.name, tensor.type, plan.file_type or ""):
        raise EngineError(
            f"Missing importance matrix for tensor {tensor.name} in a very low-bit quantization "
            f"({tensor.type} requires an imatrix)"
        )
    return found


def _progress(
    plan: Plan, held: Collection[str], on_progress: Callable[[float], None] | None
) -> Callable[[TensorPlan, int], None]:
    """A function that is told of bytes written of a tensor, and tells the share of all work: bytes weighted by what
    their type costs, those that are `held` (names) by next to nothing."""
    cost = {
        t.name: tensor_s(t.type if t.quantizable else "f32", t.n_weights, 2) * (_HELD_COST if t.name in held else 1)
        for t in plan.tensors
    }
    total_s, done_s = sum(cost.values()), 0.0

    def advance(tensor: TensorPlan, n_bytes: int) -> None:
        nonlocal done_s
        done_s += cost[tensor.name] * n_bytes / max(1, tensor.n_bytes)
        if on_progress:
            on_progress(min(1.0, done_s / total_s))

    return advance


def derive_f16(source: Path, target: Path, *, n_threads: int) -> None:
    """Dequantize an already quantized model into an F16 one, for use as a reference."""
    from harness.engine.quantize import quantize

    quantize(source, target, "f16", overrides={}, imatrix={}, n_threads=n_threads, allow_requantize=True)


def tensor_sha256(source: Path, *, n_threads: int) -> dict[str, str]:
    """sha256 of the data of every tensor of a GGUF, by name."""
    from harness.engine.gguf_file import source_tensors

    tensors = source_tensors(source)
    with ThreadPoolExecutor(n_threads) as threads:
        found = threads.map(lambda tensor: sha256_file(tensor.path, tensor.offset, tensor.n_bytes), tensors)
        return {tensor.name: digest for tensor, digest in zip(tensors, found, strict=True)}


def weights_sha256(imatrix: Path) -> dict[str, str | None]:
    """sha256 of the float32 weights that an imatrix has for a tensor, by name. Raises UserError as `read_imatrix`."""
    return {name: sha256_of_weights(values) for name, values in read_imatrix(imatrix).weights.items()}
