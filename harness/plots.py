"""Plots of whole files: perplexity, KLD and speed against size, change of perplexity. They draw frames of
`harness.plot_frames` and compute nothing. A figure is 8 inches wide: readable where a model card shows it at 800 px.
matplotlib is loaded when the first one is drawn, which may be in another process.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness.drawing import lay_out
from harness.plot_frames import MIB
from harness.shown import MOST_ROWS, spread_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_INCHES = 8.0
_DPI = 120
FEW = 8  # up to so many points have large marks, and labels in panels of half the width
MANY = 40  # beyond so many pairs lines without heads lead from standard to the others
# Okabe and Ito's palette: told apart by colour-blind readers; markers differ as well.
OTHER_STYLES = (("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
_STYLES = {
    "standard": ("#0072B2", "o", "standard"),
    "dynamicgate": ("#D55E00", "^", "DynamicGate"),
    "placebo+dynamicgate": ("#009E73", "s", "placebo"),
}
_LABEL_POINTS = 8  # size of the labels beside points
# Where a label may stand, in points from the middle of its own box: beside the point first, then further away.
_PLACES = tuple((s * x, s * y) for s in (1, 1.7, 2.6) for x, y in ((1, 1), (-1, -1), (1, -1), (-1, 1), (0, 1), (0, -1)))


def styles(series: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and label of each series, the well-known ones first and always alike."""
    present = list(dict.fromkeys(series))
    found = {name: style for name, style in _STYLES.items() if name in present}
    for i, name in enumerate(one for one in present if one not in _STYLES):
        found[name] = (*OTHER_STYLES[i % len(OTHER_STYLES)], name)
    return found


def new_figure(height_inches: float) -> Figure:
    """An empty one. Without pyplot: no window system, no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DPI, layout="constrained")


def heading(title: str, *lines: str) -> str:
    """The title and what the marks mean, wrapped to the figure's width."""
    return "\n".join(part for line in (title, *lines) if line for part in textwrap.wrap(line, 88))


def plot_tradeoff(
    points: pd.DataFrame, title: str, reference: Mapping[Any, Any] | None, board: pd.DataFrame, *, kld: bool = False
) -> Figure:
    """Perplexity (or mean KLD, log axis) against file size, with bars; the Pareto front; arrows from standard to the
    other modes. reference: its row of the runs; board: published points, drawn faintly."""
    figure = new_figure(5.4)
    axes = figure.subplots()
    few = len(points) <= FEW
    if len(board):
        axes.plot(
            board.size_mib,
            board.kld if kld else board.ppl,
            "x",
            color="#BBBBBB",
            markersize=5,
            zorder=1,
            label="llama.cpp's board (Wikitext-2, 512-token windows)",
        )
    front = points[points.on_front].sort_values("size_mib")
    if len(front) > 1:
        axes.step(
            front.size_mib,
            front.value,
            where="post",
            color="#999999",
            linewidth=4,
            alpha=0.35,
            zorder=1,
            label="Pareto front",
        )
    paired = points[points.from_value.notna()]
    if len(paired) > MANY:
        ends = paired[["from_mib", "from_value", "size_mib", "value"]].to_numpy(float).reshape(-1, 2, 2)
        _lines(axes, ends, color="#AAAAAA", linewidth=0.5, zorder=2)
        paired = paired[:0]
    for row in paired.to_dict("records"):
        axes.annotate(
            "",
            (row["size_mib"], row["value"]),
            (row["from_mib"], row["from_value"]),
            arrowprops={
                "arrowstyle": "->",
                "color": "#777777" if few else "#AAAAAA",
                "linewidth": 1.2 if few else 0.7,
                "shrinkA": 5,
                "shrinkB": 5,
            },
            zorder=2,
        )
    for series, style in styles(points.series).items():
        _errorbars(axes, points[points.series == series], "value", style, 8 if few else 5)
    if reference is not None and not kld:
        label = f"reference: {reference['ppl']:.2f} at {reference['file_bytes'] / MIB:.0f} MiB"
        axes.axhline(reference["ppl"], color="#555555", linestyle="--", linewidth=1, label=label)
    values = [*points.value, *(board.kld if kld else board.ppl)]
    values += [reference["ppl"]] if reference is not None and not kld else []
    if kld or max(values) > 3 * min(values):
        log_axis(axes, values)
    axes.margins(x=0.1, y=0.12)
    axes.set_xlabel("file size (MiB)")
    axes.set_ylabel("mean KLD (nats, lower is better)" if kld else "perplexity (lower is better)")
    what = (
        "mean KL(reference || variant); bars are 95 % intervals" if kld else "perplexity; bars are one standard error"
    )
    if points.low.isna().all():
        what = "mean KL(reference || variant); too few tokens for intervals" if kld else "perplexity"
    axes.set_title(heading(title, what), fontsize=10)
    axes.grid(alpha=0.3, which="both" if kld else "major")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    _label(figure, axes, points, "value", MOST_ROWS)
    return figure


def plot_delta(deltas: pd.DataFrame, title: str) -> Figure:
    """Change of perplexity against the standard file, per cent, as bars with their 95 % intervals."""
    height = 1.5 + 0.27 * len(deltas)
    figure = new_figure(height)
    axes = figure.subplots()
    kinds = styles(deltas.series)
    labels = [
        row["quant"].upper() + ("" if len(kinds) == 1 else f" {kinds[row['series']][2]}")
        for row in deltas.to_dict("records")
    ]
    places = np.arange(len(deltas))
    axes.barh(places, deltas.delta_pct, height=0.7, color=[kinds[one][0] for one in deltas.series], alpha=0.8)
    errors = np.stack([deltas.delta_pct - deltas.low_pct, deltas.high_pct - deltas.delta_pct])
    axes.errorbar(deltas.delta_pct, places, xerr=errors, fmt="none", ecolor="#000000", capsize=3, elinewidth=1)
    for place, row in enumerate(deltas.to_dict("records")):
        delta, low, high = (row[name] for name in ("delta_pct", "low_pct", "high_pct"))
        known = pd.notna(low) and pd.notna(high)
        right = delta >= 0
        axes.annotate(
            f"{delta:+.1f} %" if delta or known else "identical: 0 %",
            ((max(delta, high) if right else min(delta, low)) if known else delta, place),
            xytext=(5 if right else -5, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
        )
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.16)
    # The axis begins at 0 on one side where all bars point the same way.
    low_x, high_x = axes.get_xlim()
    edges = deltas[["delta_pct", "low_pct", "high_pct"]].to_numpy(float)
    least, most = float(np.nanmin(edges)), float(np.nanmax(edges))
    if least == most == 0:
        low_x, high_x = -1.0, 1.0
    else:
        low_x, high_x = 0.0 if least >= 0 else low_x, 0.0 if most <= 0 else high_x
    axes.set_xlim(low_x, high_x)
    axes.set_xlabel("change of perplexity against the standard file (%, below 0 is better)")
    bars = "paired, with 95 % intervals" if deltas.low_pct.notna().any() else "paired; too few tokens for intervals"
    if (deltas.delta_pct == 0).all() and deltas.low_pct.isna().all():
        bars = "no difference at any token"
    only = "" if len(kinds) != 1 else f"{next(iter(kinds.values()))[2]} against standard; "
    axes.set_title(heading(title, f"change of perplexity; {only}{bars}"), fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    return figure


def plot_speed(points: pd.DataFrame, title: str) -> Figure:
    """Tokens/s of generation and of prompt processing against file size; bars from the slowest to the fastest round."""
    figure = new_figure(4.6)
    panels = figure.subplots(1, 2)
    for axes, (step, name) in zip(panels, (("generate", "generation"), ("prompt", "prompt processing")), strict=True):
        of_step = points[points.step == step]
        variants = of_step[of_step.series != "reference"]
        for series, style in styles(variants.series).items():
            rows = variants[variants.series == series]
            _errorbars(axes, rows, "tokens_per_s", style, 7 if len(variants) <= FEW else 5)
        for row in of_step[of_step.series == "reference"].to_dict("records"):
            label = f"reference, {row['size_mib']:.0f} MiB"
            axes.axhline(row["tokens_per_s"], color="#555555", linestyle="--", linewidth=1, label=label)
        axes.margins(x=0.14, y=0.14)
        axes.set_xlabel("file size (MiB)")
        axes.set_ylabel(f"{name} (tokens/s)")
        axes.grid(alpha=0.3)
    figure.suptitle(heading(title, "median of the timing pass; bars from slowest to fastest round"), fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    for axes, step in zip(panels, ("generate", "prompt"), strict=True):
        _label(figure, axes, points[(points.step == step) & (points.series != "reference")], "tokens_per_s", FEW)
    return figure


def log_axis(axes: Axes, values: Iterable[float]) -> None:
    """A log axis with plain numbers (0.1, 0.2, 0.5) that holds the values and at least a factor of two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [value for value in values if value > 0]
    axes.set_yscale("log")
    ratio = max(values) / min(values)
    margin = 1.6 if ratio < 3 else 1.25
    axes.set_ylim(min(values) / margin, max(values) * margin)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 30 else (1, 3), numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _errorbars(axes: Axes, rows: pd.DataFrame, column: str, style: tuple[str, str, str], marker_points: float) -> None:
    """One series of points with their bars, from `low` to `high`, where they are known."""
    colour, marker, label = style
    known = rows.low.notna() & rows.high.notna()
    axes.plot(
        rows.size_mib,
        rows[column],
        marker,
        color=colour,
        label=label,
        markersize=marker_points,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=4,
    )
    ends = rows.loc[known, ["size_mib", "low", "size_mib", "high"]].to_numpy(float).reshape(-1, 2, 2)
    _lines(axes, ends, color=colour, linewidth=1.2, zorder=3)


def _lines(axes: Axes, ends: np.ndarray, **style: Any) -> None:
    """Straight lines [n, 2, 2] as one path with gaps: a path each takes ten times as long to draw, and many bytes."""
    gaps = np.full((len(ends), 1, 2), np.nan)
    x, y = np.concatenate([ends, gaps], axis=1).reshape(-1, 2).T
    axes.plot(x, y, solid_capstyle="butt", **style)


def _label(figure: Figure, axes: Axes, rows: pd.DataFrame, column: str, most: int) -> None:
    """Name the quants beside their points, each where it covers least. More than `most` points: only the standard
    ladder and the quants that are not on it, and of these at most MOST_ROWS."""
    lay_out(figure)  # places the axes, so that points have their pixels
    pixels = figure.dpi / 72
    middle = [tuple(xy) for xy in axes.transData.transform(rows[["size_mib", column]].to_numpy(float))]
    taken = [_box(xy, 5 * pixels, 5 * pixels) for xy in middle]
    bars = rows[rows.low.notna() & rows.high.notna()]
    low, high = (axes.transData.transform(bars[["size_mib", end]].to_numpy(float)) for end in ("low", "high"))
    taken += [(x - 2, bottom, x + 2, top) for (x, bottom), (_, top) in zip(low.tolist(), high.tolist(), strict=True)]
    frame = axes.get_window_extent()
    ladder = set(rows.quant[rows.series == "standard"])
    colours = styles(rows.series)
    leaders: list[list[tuple[float, float]]] = []
    named = list(zip(rows.to_dict("records"), middle, strict=True))
    if len(rows) > most:
        named = [one for one in named if one[0]["series"] == "standard" or one[0]["quant"] not in ladder]
    for row, (x, y) in (named[i] for i in spread_out(len(named), MOST_ROWS)):
        text = row["quant"].upper()
        width, height = 0.66 * _LABEL_POINTS * len(text) * pixels, 1.15 * _LABEL_POINTS * pixels
        best, least, far = None, float("inf"), False
        others = np.array(taken)
        for i, (right, up) in enumerate(_PLACES):
            centre = (x + right * (width / 2 + 5 * pixels), y + up * (height / 2 + 5 * pixels))
            box = _box(centre, width / 2, height / 2)
            out = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
            cost = _overlap(box, others) + 1e6 * out + 0.5 * i
            if cost < least:
                best, least, far = (centre, box), cost, max(abs(right), abs(up)) > 1
        assert best is not None
        centre, box = best
        taken.append(box)
        axes.annotate(
            text,
            (row["size_mib"], row[column]),
            xytext=((centre[0] - x) / pixels, (centre[1] - y) / pixels),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_LABEL_POINTS,
            color=colours[row["series"]][0],
            zorder=5,
        )
        if far:  # from the point to the nearest edge of its label
            leaders.append([(x, y), (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))])
    if leaders:
        from matplotlib.collections import LineCollection

        ends = figure.transFigure.inverted().transform(np.reshape(leaders, (-1, 2))).reshape(-1, 2, 2)
        figure.add_artist(LineCollection(list(ends), colors="#888888", linewidths=0.5, transform=figure.transFigure))


def _box(centre: Sequence[float], half_width: float, half_height: float) -> tuple[float, float, float, float]:
    """Left, bottom, right and top, in pixels."""
    return centre[0] - half_width, centre[1] - half_height, centre[0] + half_width, centre[1] + half_height


def _overlap(box: Sequence[float], others: np.ndarray) -> float:
    """Square pixels that a box shares with others [n, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(sides.clip(0).prod(axis=1).sum())
