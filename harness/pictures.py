"""Which pictures a report has: each plot that applies, with its name and caption."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from harness import shown
from harness.drawing import Picture
from harness.passes import layers_path
from harness.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harness.results import Results

_TYPES_A_PICTURE = 6  # quants


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
    from harness.plot_frames import board_points, kld_points, ppl_points
    from harness.plots import plot_tradeoff

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
    from harness.plot_frames import delta_frame
    from harness.plots import plot_delta

    deltas = delta_frame(results.comparison)
    if len(deltas):
        part = _part(len(deltas), int(results.comparison.delta_ppl_pct.notna().sum()), "pairs")
        caption = f"Change of perplexity against the standard file of the same quant.{part}"
        yield Picture("delta", caption, partial(plot_delta, deltas, _title(results.measured)))


def _speed(results: Results) -> Iterator[Picture]:
    if len(results.speed):
        from harness.plot_frames import speed_points
        from harness.plots import plot_speed

        draw = partial(plot_speed, speed_points(results.speed, results.bench), _title(results.measured))
        yield Picture("speed", "Speed of the timing pass against file size.", draw)


def _types(measured: Sequence[Record]) -> Iterator[Picture]:
    records = shown.of_types(measured)
    n_quants = len({record.data["quant"] for record in shown.variants(measured)})
    part = _part(len(records), n_quants, "quants") if n_quants > shown.MOST_QUANTS else ""
    for first in range(0, len(records), _TYPES_A_PICTURE):
        number = first // _TYPES_A_PICTURE + 1
        name = "types" if number == 1 else f"types_{number}"
        draw = partial(_draw_types, records[first : first + _TYPES_A_PICTURE], _title(measured))
        yield Picture(name, f"Bits per weight of every tensor: what the policy changed.{part}", draw)


def _draw_types(records: Sequence[Record], title: str) -> Figure:
    from harness.depth_plots import plot_types
    from harness.plot_frames import types_frame

    return plot_types(types_frame(records), title)


def _layers(measured: Sequence[Record]) -> Iterator[Picture]:
    if not any(layers_path(record.path).is_file() for record in measured):
        return
    from harness.depth_plots import plot_layers
    from harness.pass_frames import layers_frame

    layers = layers_frame(measured)
    if len(layers):
        rows = layers[layers.layer != "mean"]
        quants = list(dict.fromkeys(rows.quant))
        drawn = [quants[i] for i in shown.spread_out(len(quants), shown.MOST_QUANTS)]
        draw = partial(plot_layers, rows[rows.quant.isin(drawn)], _title(measured))
        part = _part(len(drawn), len(quants), "quants")
        yield Picture("layers", f"Error of the hidden state over the depth.{part}", draw)


def _kld_distribution(measured: Sequence[Record]) -> Iterator[Picture]:
    records = shown.of_kld(measured)
    if records:
        draw = partial(_draw_kld_distribution, records, _title(measured))
        n_measured = sum("kld" in record.per_token() for record in shown.variants(measured))
        part = _part(len(records), n_measured, "variants")
        yield Picture("kld_distribution", f"How the KL divergence of single tokens is spread.{part}", draw)


def _draw_kld_distribution(records: Sequence[Record], title: str) -> Figure:
    from harness.depth_plots import plot_kld_distribution
    from harness.plot_frames import kld_quantiles_frame

    return plot_kld_distribution(kld_quantiles_frame(records), title)


def _position(measured: Sequence[Record]) -> Iterator[Picture]:
    records = shown.of_positions(measured)
    if len(records) > 1:
        n_variants = len(shown.variants(measured))
        draw = partial(_draw_position, records, n_variants, _title(measured))
        yield Picture("position", "Loss against the reference by position in the window.", draw)


def _draw_position(records: Sequence[Record], n_variants: int, title: str) -> Figure:
    from harness.depth_plots import plot_position
    from harness.plot_frames import position_frame

    return plot_position(position_frame(records), n_variants, title)
