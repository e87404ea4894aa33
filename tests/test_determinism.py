"""The same sweep gives the same bytes and the same per-token values; so do other numbers of threads, on this model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from harness.record import read_records

Cli = Callable[..., tuple[int, str, str]]


def variants_and_values(
    cli: Cli, overrides: list[str], folder: Path, n_threads: int
) -> tuple[dict[str, bytes], dict[str, dict[str, np.ndarray]]]:
    """A sweep in folders of its own: bytes of each GGUF that it made, per-token values of each case."""
    own = [f"runtime.cache_dir={folder / 'cache'}", f"results.dir={folder}", f"runtime.threads={n_threads}"]
    code, _, err = cli("sweep", "quant=iq2_xs", *overrides, *own, "runtime.keep_variants=true")
    assert code == 0, err
    made = {path.name: path.read_bytes() for path in folder.rglob("*.gguf")}
    return made, {record.name: record.per_token() for record in read_records(folder / "tiny")}


def test_a_sweep_can_be_repeated(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    files, values = variants_and_values(cli, tiny_overrides, tmp_path / "first", 1)
    assert len(files) == 3, "the imatrix and two variants"
    for name, n_threads in (("again", 1), ("threads", 3)):
        again_files, again_values = variants_and_values(cli, tiny_overrides, tmp_path / name, n_threads)
        assert files == again_files
        assert values.keys() == again_values.keys()
        for case, arrays in values.items():
            for kind, array in arrays.items():
                assert np.array_equal(array, again_values[case][kind]), (case, kind, name)
