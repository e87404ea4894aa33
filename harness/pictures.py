"""Which pictures a report has: each plot that applies, with its name and caption."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_all_start_methods, get_context, set_forkserver_preload
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.depth_plots import plot_kld_distribution, plot_layers, plot_position, plot_types
from harness.errors import EngineError
from harness.isolate import deaf_to_ctrl_c
from harness.pass_frames import layers_frame
from harness.plot_frames import (
    MOST_QUANTS,
    board_points,
    delta_frame,
    kld_points,
    kld_quantiles_frame,
    position_frame,
    ppl_points,
    speed_points,
    spread_out,
    types_frame,
)
from harness.plots import lay_out, plot_delta, plot_speed, plot_tradeoff
from harness.record import Record
from harness.store import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harness.report import Results

_TYPES_A_PICTURE = 6  # quants
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
    name = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"  # there is none on Windows
    if name == "forkserver":
        _start_server()
    try:
        with ProcessPoolExecutor(1, get_context(name), _leave_interrupts) as pool:
            begun: list[Future[None]] = []

            def draw(drawn: Iterable[Picture]) -> list[Picture]:
                handed = []
                for one in drawn:  # drawn may be a generator: the first is begun before the next has its figures
                    with deaf_to_ctrl_c():  # the first one starts the process
                        begun.append(pool.submit(save, one))
                    handed.append(one)
                return handed

            yield draw
            for one in begun:
                one.result()
    except BrokenProcessPool as error:
        raise EngineError("a process that draws died (the system may have run out of memory)") from error


def _start_server() -> None:
    """Start the process that others are forked from."""
    from multiprocessing.forkserver import ensure_running

    modules = ("figure", "backends.backend_agg", "backends.backend_svg")
    set_forkserver_preload([__name__, *(f"matplotlib.{module}" for module in modules)])
    with deaf_to_ctrl_c():
        ensure_running()


def _leave_interrupts() -> None:
    """Ctrl-C is for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pictures(results: Results, only: Collection[str] | None = None) -> list[Picture]:
    """Every picture that these results have figures for; `only` those of these names."""
    return [*pictures_of_files(results, only), *pictures_of_depth(results.measured, only)]


def pictures_of_files(results: Results, only: Collection[str] | None = None) -> Iterator[Picture]:
    """Those of whole files, each when its figures are made."""
    if not results.measured:
        return iter(())
    return _pictures({"tradeoff": _tradeoff, "kld": _kld, "delta": _delta, "speed": _speed}, results, only)


def pictures_of_depth(measured: Sequence[Record], only: Collection[str] | None = None) -> Iterator[Picture]:
    """Those of what is inside files and measurements; they need records alone."""
    makers = {"types": _types, "layers": _layers, "kld_distribution": _kld_distribution, "position": _position}
    return _pictures(makers, measured, only)


def _pictures(
    makers: Mapping[str, Callable[[Any], Iterator[Picture]]], figures: Any, only: Collection[str] | None
) -> Iterator[Picture]:
    return (one for name, make in makers.items() if only is None or name in only for one in make(figures))


def _title(measured: Sequence[Record]) -> str:
    data = measured[0].data
    return f"{data['reference']['name']} on {data['prompt_set']['name']}"


def _part(n_shown: int, n_all: int, what: str) -> str:
    """' 40 of 500 variants.' where a picture leaves some out."""
    return f" {n_shown} of {n_all} {what}, evenly chosen." if n_shown < n_all else ""


def _tradeoff(results: Results, *, kld: bool = False) -> Iterator[Picture]:
    # The parts of an attribution have a table of their own and would hide the rest.
    parts = set(results.attribution["name"]) if len(results.attribution) else set()
    runs = results.runs[~results.runs["name"].isin(parts)]
    points = kld_points(runs) if kld else ppl_points(runs)
    if not len(points):
        return
    found = runs[(runs["mode"] == "reference") & (runs.status == "ok")].to_dict("records")
    board = board_points(results.measured[0].data["reference"]["name"], points.size_mib.tolist())
    draw = partial(plot_tradeoff, points, _title(results.measured), found[0] if found else None, board, kld=kld)
    if kld:
        yield Picture("kld", "Mean KL divergence from the reference against file size.", draw)
    else:
        yield Picture("tradeoff", "Perplexity against file size; arrows lead from standard to the policy's file.", draw)


def _kld(results: Results) -> Iterator[Picture]:
    return _tradeoff(results, kld=True)


def _delta(results: Results) -> Iterator[Picture]:
    deltas = delta_frame(results.comparison)
    if len(deltas):
        part = _part(len(deltas), int(results.comparison.delta_ppl_pct.notna().sum()), "pairs")
        caption = f"Change of perplexity against the standard file of the same quant.{part}"
        yield Picture("delta", caption, partial(plot_delta, deltas, _title(results.measured)))


def _speed(results: Results) -> Iterator[Picture]:
    if len(results.speed):
        draw = partial(plot_speed, speed_points(results.speed, results.bench), _title(results.measured))
        yield Picture("speed", "Speed of the timing pass against file size.", draw)


def _types(measured: Sequence[Record]) -> Iterator[Picture]:
    types = types_frame(measured)
    quants = list(dict.fromkeys(types.quant))
    n_quants = len({record.data["quant"] for record in _variants(measured)})
    part = _part(len(quants), n_quants, "quants") if n_quants > MOST_QUANTS else ""
    for first in range(0, len(quants), _TYPES_A_PICTURE):
        rows = types[types.quant.isin(quants[first : first + _TYPES_A_PICTURE])]
        number = first // _TYPES_A_PICTURE + 1
        name = "types" if number == 1 else f"types_{number}"
        draw = partial(plot_types, rows, _title(measured))
        yield Picture(name, f"Bits per weight of every tensor: what the policy changed.{part}", draw)


def _layers(measured: Sequence[Record]) -> Iterator[Picture]:
    layers = layers_frame(measured)
    if len(layers):
        rows = layers[layers.layer != "mean"]
        quants = list(dict.fromkeys(rows.quant))
        shown = [quants[i] for i in spread_out(len(quants), MOST_QUANTS)]
        draw = partial(plot_layers, rows[rows.quant.isin(shown)], _title(measured))
        part = _part(len(shown), len(quants), "quants")
        yield Picture("layers", f"Error of the hidden state over the depth.{part}", draw)


def _kld_distribution(measured: Sequence[Record]) -> Iterator[Picture]:
    quantiles = kld_quantiles_frame(measured)
    if len(quantiles):
        draw = partial(plot_kld_distribution, quantiles, _title(measured))
        n_measured = sum("kld" in record.per_token() for record in _variants(measured))
        part = _part(len(quantiles), n_measured, "variants")
        yield Picture("kld_distribution", f"How the KL divergence of single tokens is spread.{part}", draw)


def _position(measured: Sequence[Record]) -> Iterator[Picture]:
    positions = position_frame(measured)
    if len(positions):
        draw = partial(plot_position, positions, len(_variants(measured)), _title(measured))
        yield Picture("position", "Loss against the reference by position in the window.", draw)


def _variants(measured: Sequence[Record]) -> list[Record]:
    return [record for record in measured if record.data["mode"] != "reference"]
