"""The importance matrix: llama.cpp's GGUF format in and out, and the weights that the quantizer wants.

Format (tools/imatrix of llama.cpp): `general.type` = "imatrix", and for each weight tensor NAME two float32 tensors,
NAME.in_sum2 [n_matrices, columns] (sums of squared activations) and NAME.counts [n_matrices, 1] (rows added).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import EngineError, UserError
from harness.isolate import run_in_child

if TYPE_CHECKING:
    from harness.engine.collect import Activations

COLLECTOR_VERSION = 1  # of the values; part of the key of every imatrix that the harness makes


@dataclass(frozen=True)
class Imatrix:
    """weights: mean squared activations by weight tensor, float32 [n_matrices * columns], as llama_model_quantize takes
    them. idle: by tensor, the experts that no calibration token reached; their weights are 1.0, as in llama-quantize.
    """

    weights: dict[str, np.ndarray]
    idle: dict[str, tuple[int, ...]]


def make_imatrix(
    model_path: Path,
    windows: np.ndarray,
    target: Path,
    *,
    dataset: str,
    flash_attention: bool,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Run the calibration windows (int32 [n, n_ctx]) through the model and write the imatrix. Runs in a child."""
    from harness.engine.collect import collect_activations

    activations = collect_activations(
        model_path, windows, flash_attention=flash_attention, n_threads=n_threads, on_progress=on_progress
    )
    write_imatrix(target, activations, dataset=dataset, n_windows=len(windows), window_tokens=windows.shape[1])


def write_imatrix(
    path: Path, activations: Mapping[str, "Activations"], *, dataset: str, n_windows: int, window_tokens: int
) -> None:
    """Write llama.cpp's GGUF imatrix. `dataset` is a name, never a path of this machine."""
    import gguf

    writer = gguf.GGUFWriter(path, arch="", endianess=gguf.GGUFEndian.LITTLE)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", n_windows)
    writer.add_uint32("imatrix.chunk_size", window_tokens)
    for name in sorted(activations):
        entry = activations[name]
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(entry.sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.ascontiguousarray(entry.counts.reshape(-1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_imatrix(path: Path, log_path: Path) -> Imatrix:
    """`read_imatrix` in a child: the file may be anybody's."""
    imatrix: Imatrix = _in_child(read_imatrix, path, log_path)
    return imatrix


def load_origin(path: Path, log_path: Path) -> tuple[str | None, int | None]:
    """Name of the (first) text that an imatrix was made from and number of its windows, None where the file does not
    say. Raises UserError as `read_imatrix` does."""
    dataset, n_chunks = _in_child(_read_origin, path, log_path)
    return dataset, n_chunks


def _in_child(read: Callable[[Path], Any], path: Path, log_path: Path) -> Any:
    try:
        return run_in_child(read, path, log_path=log_path)
    except (EngineError, OSError) as error:
        raise UserError(f"{path} cannot be read as a GGUF imatrix ({error}): make it again") from error


def _read_origin(path: Path) -> tuple[str | None, int | None]:
    from harness.engine.gguf_file import read_metadata

    read_imatrix(path)
    metadata = read_metadata(path)
    datasets, n_chunks = metadata.get("imatrix.datasets"), metadata.get("imatrix.chunk_count")
    dataset = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], str) else None
    return dataset, n_chunks if isinstance(n_chunks, int) and 0 < n_chunks < 1 << 32 else None


def read_imatrix(path: Path) -> Imatrix:
    """The imatrix of a file. Raises UserError when it is no GGUF imatrix or holds values that are not finite."""
    from harness.engine.gguf_file import read_float_tensors

    if not path.is_file():
        raise UserError(f"no imatrix at {path}: check calibration.imatrix")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                f"{path} is no GGUF imatrix: give one that llama-imatrix wrote; it also turns its old format into one, "
                "with llama-imatrix -m MODEL.gguf --in-file OLD.dat -o NEW.gguf"
            )
    try:
        tensors = read_float_tensors(path)
    except UserError as error:
        raise UserError(f"{error} (it should be a GGUF imatrix, as llama-imatrix writes)") from error
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    if not names:
        raise UserError(f"{path} holds no imatrix (no tensor ends with .in_sum2): give one that llama-imatrix wrote")
    found = Imatrix({}, {})
    for name in names:
        sums, counts = np.atleast_2d(tensors[f"{name}.in_sum2"]), tensors.get(f"{name}.counts")
        if counts is None or counts.size not in (1, len(sums)):
            raise UserError(f"{path}: the counts of {name} are missing or of another shape: make the imatrix again")
        counts = counts.reshape(-1, 1)
        mean = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        if not np.isfinite(mean).all():
            raise UserError(f"{path}: the values of {name} are not finite: make the imatrix again")
        found.weights[name] = mean.ravel()
        if not (counts > 0).all():
            found.idle[name] = tuple(np.flatnonzero(~(counts > 0)).tolist())
    return found
