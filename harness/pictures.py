"""Which pictures a report has: each plot that applies, with its name and caption."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from harness.depth_plots import plot_kld_distribution, plot_layers, plot_position, plot_types
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
from harness.plots import plot_delta, plot_speed, plot_tradeoff

if TYPE_CHECKING:
    from harness.report import Results

_TYPES_A_PICTURE = 6  # quants
_PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False}  # names may hold a $, which is no formula


@dataclass(frozen=True)
class Picture:
    """One plot: the name of its files, a sentence about it, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[], Figure]

    @cached_property
    def figure(self) -> Figure:
        """Drawn once, however many formats are written."""
        with rc_context(_PLAIN_TEXT):
            return self.draw()

    def save(self, path: Path, kind: str) -> None:
        """kind: png or svg. The same figure gives the same bytes; text in an SVG stays text."""
        with rc_context({**_PLAIN_TEXT, "svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)
        self.figure.set_layout_engine("none")  # laid out once: the next format needs no second time


def pictures(results: Results, only: Collection[str] | None = None) -> list[Picture]:
    """Every picture that these results have figures for; `only` those of these names."""
    if not results.measured:
        return []
    makers = {
        "tradeoff": _tradeoff,
        "kld": _kld,
        "delta": _delta,
        "speed": _speed,
        "types": _types,
        "layers": _layers,
        "kld_distribution": _kld_distribution,
        "position": _position,
    }
    return [one for name, make in makers.items() if only is None or name in only for one in make(results)]


def _title(results: Results) -> str:
    return results.title.split(":")[0]


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
    draw = partial(plot_tradeoff, points, _title(results), found[0] if found else None, board, kld=kld)
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
        yield Picture("delta", caption, partial(plot_delta, deltas, _title(results)))


def _speed(results: Results) -> Iterator[Picture]:
    if len(results.speed):
        draw = partial(plot_speed, speed_points(results.speed, results.bench), _title(results))
        yield Picture("speed", "Speed of the timing pass against file size.", draw)


def _types(results: Results) -> Iterator[Picture]:
    types = types_frame(results.measured)
    quants = list(dict.fromkeys(types.quant))
    n_quants = results.comparison.quant.nunique()
    part = _part(len(quants), n_quants, "quants") if n_quants > MOST_QUANTS else ""
    for first in range(0, len(quants), _TYPES_A_PICTURE):
        rows = types[types.quant.isin(quants[first : first + _TYPES_A_PICTURE])]
        number = first // _TYPES_A_PICTURE + 1
        name = "types" if number == 1 else f"types_{number}"
        draw = partial(plot_types, rows, _title(results))
        yield Picture(name, f"Bits per weight of every tensor: what the policy changed.{part}", draw)


def _layers(results: Results) -> Iterator[Picture]:
    if len(results.layers):
        rows = results.layers[results.layers.layer != "mean"]
        quants = list(dict.fromkeys(rows.quant))
        shown = [quants[i] for i in spread_out(len(quants), MOST_QUANTS)]
        draw = partial(plot_layers, rows[rows.quant.isin(shown)], _title(results))
        part = _part(len(shown), len(quants), "quants")
        yield Picture("layers", f"Error of the hidden state over the depth.{part}", draw)


def _kld_distribution(results: Results) -> Iterator[Picture]:
    quantiles = kld_quantiles_frame(results.measured)
    if len(quantiles):
        draw = partial(plot_kld_distribution, quantiles, _title(results))
        part = _part(len(quantiles), int(results.runs.kld_mean.notna().sum()), "variants")
        yield Picture("kld_distribution", f"How the KL divergence of single tokens is spread.{part}", draw)


def _position(results: Results) -> Iterator[Picture]:
    positions = position_frame(results.measured)
    if len(positions):
        n_variants = sum(record.data["mode"] != "reference" for record in results.measured)
        draw = partial(plot_position, positions, n_variants, _title(results))
        yield Picture("position", "Loss against the reference by position in the window.", draw)
