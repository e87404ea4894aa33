"""Records -> tables, plots and a page. Reads records only; runs without llama.cpp."""

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.drawing import drawing
from harness.merge import merge_sweeps
from harness.pictures import pictures, pictures_of_depth, pictures_of_files
from harness.record import record_paths

QUICK = ("tradeoff", "delta", "layers")  # the pictures that every sweep draws


@dataclass(frozen=True)
class Report:
    """What was written, and the text for the terminal."""

    text: str
    paths: tuple[Path, ...]


def write_report(folder: Path, wanted: Collection[str] = (), allow_different: Collection[str] = ()) -> Report:
    """Tables and plots of all records in a sweep's folder, written beside them. Raises UserError as `merge_sweeps`."""
    from harness.report_tables import Written, write_main_tables
    from harness.results import load_results

    results = load_results([folder], wanted, allow_different)
    written = Written(folder)
    text = write_main_tables(results, written)
    for picture in pictures(results, QUICK):
        written.file(f"{picture.name}.png", partial(picture.save, kind="png"))
    return Report(text, tuple(written.paths))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python would look for garbage among a million small things of the records, again and again, and find none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def write_full_report(folders: Sequence[Path], out: Path, allow_different: Collection[str] = ()) -> Report:
    """Every table in every format, the plots, and one page with all of it. For `python -m harness report`.

    Without pyarrow there are no Parquet files, and the text says so. Raises UserError as `merge_sweeps`, EngineError
    when a process that draws dies.
    """
    n_records = sum(len(record_paths(folder)) for folder in folders)
    formats = ("png", "svg")
    with _no_collector(), drawing(n_records, out, formats) as draw:  # draws while figures and tables are made here
        merged = merge_sweeps(folders, allow_different=allow_different)
        of_depth = draw(pictures_of_depth(merged.measured))
        from harness.report_tables import Written, write_page, write_tables  # pandas: half a second, so not before
        from harness.results import Results

        results = Results(**vars(merged))
        drawn = draw(pictures_of_files(results)) + of_depth
        written = Written(out)
        text = write_tables(results, written)
    written.paths += [out / f"{picture.name}.{kind}" for picture in drawn for kind in formats]
    write_page(results, written, {out / f"{picture.name}.png": picture.caption for picture in drawn})
    return Report(text, tuple(written.paths))
