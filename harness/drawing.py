"""Draws pictures: here, or in a process of its own while their figures are made."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import EngineError
from harness.isolate import deaf_to_ctrl_c
from harness.store import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MANY_RECORDS = 100  # of fewer, the start of another process takes longer than the drawing
_PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False}  # names may hold a $, which is no formula


@dataclass(frozen=True)
class Picture:
    """One plot: the name of its files, a sentence about it, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[], Figure]

    @cached_property
    def figure(self) -> Figure:
        """Drawn and laid out once, however many formats are written."""
        from matplotlib import rc_context

        with rc_context(_PLAIN_TEXT):
            figure = self.draw()
            lay_out(figure)
            return figure

    def save(self, path: Path, kind: str) -> None:
        """kind: png or svg. The same figure gives the same bytes; text in an SVG stays text."""
        from matplotlib import rc_context

        with rc_context({**_PLAIN_TEXT, "svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)


def lay_out(figure: Figure) -> None:
    """Give everything its final place, and let it stay there. Nothing to do for a figure that has been laid out."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _save(picture: Picture, folder: Path, formats: Sequence[str]) -> None:
    for kind in formats:
        write_atomic(folder / f"{picture.name}.{kind}", partial(picture.save, kind=kind))


Draw = Callable[[Iterable[Picture]], list[Picture]]


@contextmanager
def drawing(n_records: int, folder: Path, formats: Sequence[str]) -> Iterator[Draw]:
    """A function that writes pictures into `folder`, each in each format, atomically, and returns them. With many
    records it hands the pictures to a process that loads its libraries while the records are read, and draws about as
    long as the figures take to make; leaving the context waits for it.

    Raises EngineError when that process dies.
    """
    save = partial(_save, folder=folder, formats=formats)
    if n_records < _MANY_RECORDS:

        def draw_here(drawn: Iterable[Picture]) -> list[Picture]:
            handed = list(drawn)
            for one in handed:
                save(one)
            return handed

        yield draw_here
        return
    try:
        with ProcessPoolExecutor(1, get_context(_start_method()), _leave_interrupts) as pool:
            with deaf_to_ctrl_c():  # the first one starts the process
                begun = [pool.submit(_warm_up)]

            def draw(drawn: Iterable[Picture]) -> list[Picture]:
                handed = []
                for one in drawn:  # drawn may be a generator: the first is begun before the next has its figures
                    begun.append(pool.submit(save, one))
                    handed.append(one)
                return handed

            yield draw
            for one in begun:
                one.result()
    except BrokenProcessPool as error:
        raise EngineError("a process that draws died (the system may have run out of memory)") from error


def _start_method() -> str:
    """A copy of this process has half of its libraries already; only one with a single thread can be copied safely."""
    threads = Path("/proc/self/task")
    return "fork" if threads.is_dir() and len(list(threads.iterdir())) == 1 else "spawn"


def _warm_up() -> None:
    """Load libraries, fonts and whatever else the first picture needs, while the records are read."""
    from matplotlib.figure import Figure

    import harness.depth_plots  # noqa: F401

    figure = Figure()
    figure.subplots().set_yscale("log")
    for kind in ("png", "svg"):
        figure.savefig(BytesIO(), format=kind)


def _leave_interrupts() -> None:
    """Ctrl-C is for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
