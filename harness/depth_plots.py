"""Plots of what is inside a file or a measurement: types and errors by layer, KLD by token, loss by position. They
draw frames of `harness.plot_frames` and `harness.pass_frames` and compute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness.plot_frames import series_of
from harness.plots import heading, log_axis, new_figure, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ONE_PANEL = 4  # up to so many lines by position stand in one panel
_BARS_WIDTH = 0.6  # of the distance of two positions: what the bars side by side take
_DASHES: tuple[Any, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (5, 1)),
    (0, (1, 3)),
    (0, (3, 1, 1, 1)),
    (0, (8, 3)),
)  # a quant each


def plot_types(types: pd.DataFrame, title: str) -> Figure:
    """Bits per weight by layer and role, the standard file beside the policy's; one row of two panels a quant.
    Triangles mark what the policy raised and lowered; what is outside the blocks stands below as text."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    quants = list(dict.fromkeys(types.quant))
    levels = sorted({*types.bpw, *types.standard_bpw})
    names = [_types_of(types, level) for level in levels]
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 1, len(levels))))
    n_roles = max(_grid(types[types.quant == quant], "bpw").shape[0] for quant in quants)
    height = 1.0 + len(quants) * (0.75 + 0.16 * n_roles)
    figure = new_figure(height)
    panels = figure.subplots(len(quants), 2, squeeze=False, sharey="row")
    norm = BoundaryNorm(np.arange(len(levels) + 1) - 0.5, len(levels))
    for (left, right), quant in zip(panels, quants, strict=True):
        rows = types[types.quant == quant]
        label = styles(rows.series)[rows.series.iloc[0]][2]
        for axes, column, name in ((left, "standard", "standard"), (right, "", label)):
            bpw = _grid(rows, f"{column}_bpw".lstrip("_"))
            ranks = bpw.map(levels.index, na_action="ignore").to_numpy(float)
            image = axes.pcolormesh(
                bpw.columns.to_numpy(float),
                np.arange(len(bpw)),
                np.ma.masked_invalid(ranks),
                cmap=colours,
                norm=norm,
                edgecolors="white",
                linewidth=0.2,
            )
            axes.set_facecolor("#EEEEEE")
            axes.set_yticks(range(len(bpw)), list(bpw.index), fontsize=7)
            axes.set_title(f"{quant.upper()} {name}", fontsize=9)
            below = _outside(rows, f"{column}_type".lstrip("_"))
            axes.set_xlabel("\n".join(filter(None, (below, "layer" if quant == quants[-1] else ""))), fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(axis="x", labelsize=8)
        left.invert_yaxis()  # both panels: they share it
        _mark_changes(right, rows, list(_grid(rows, "bpw").index))
    bar = figure.colorbar(image, ax=panels, ticks=range(len(levels)), aspect=20 * len(quants), fraction=0.05)
    bar.ax.set_yticklabels(names, fontsize=7)
    bar.set_label("bits per weight", fontsize=8)
    figure.suptitle(heading(title, "tensor types; ▲ more and ▼ fewer bits than standard"), fontsize=10)
    return figure


def _grid(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Roles in the order of the file down, layers across."""
    inside = rows[rows.layer.notna()]
    roles = list(dict.fromkeys(inside.role))
    return inside.pivot(index="role", columns="layer", values=column).reindex(roles)


def _outside(rows: pd.DataFrame, column: str) -> str:
    """'token_embd q2_k, output q5_k'."""
    return ", ".join(f"{role} {kind}" for role, kind in rows[rows.layer.isna()][["role", column]].to_numpy())


def _types_of(types: pd.DataFrame, level: float) -> str:
    """'3.44 iq3_s, q3_k': the types of so many bits."""
    names = {*types.type[types.bpw == level], *types.standard_type[types.standard_bpw == level]}
    return f"{level:.2f} {', '.join(sorted(names))}"


def _mark_changes(axes: Axes, rows: pd.DataFrame, roles: Sequence[str]) -> None:
    inside = rows[rows.layer.notna()]
    for marker, changed in (
        ("^", inside[inside.bpw > inside.standard_bpw]),
        ("v", inside[inside.bpw < inside.standard_bpw]),
    ):
        places = [roles.index(role) for role in changed.role]
        n_layers = inside.layer.nunique()
        area = max(3.0, min(16.0, 400 / n_layers))
        axes.scatter(changed.layer, places, area, color="white", marker=marker, edgecolors="#000000", linewidths=0.5)


def plot_layers(layers: pd.DataFrame, title: str) -> Figure:
    """Relative error of the hidden state after each layer, with its interval; one panel a quant, one line a mode."""
    from matplotlib.ticker import MaxNLocator

    quants = list(dict.fromkeys(layers.quant))
    n_columns = min(2, len(quants))
    n_rows = -(-len(quants) // n_columns)
    figure = new_figure(1.5 + 2.1 * n_rows)
    panels = figure.subplots(n_rows, n_columns, sharey=True, sharex=True, squeeze=False).ravel()
    series = [series_of(name, quant) for name, quant in zip(layers["name"], layers.quant, strict=True)]
    kinds = styles(series)
    handles = {}
    for axes, quant in zip(panels, quants, strict=False):
        of_quant = layers[layers.quant == quant]
        for name in dict.fromkeys(of_quant["name"]):
            rows = of_quant[of_quant["name"] == name]
            colour, marker, label = kinds[series_of(name, quant)]
            x = rows.layer.astype(int)
            (handles[label],) = axes.plot(x, rows.error, marker=marker, markersize=3.5, color=colour, label=label)
            axes.fill_between(x, rows.error_low.astype(float), rows.error_high.astype(float), color=colour, alpha=0.2)
        axes.set_title(str(quant).upper(), fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if layers.error.min() > 0 and layers.error.max() > 30 * layers.error.min():
        log_axis(panels[0], layers.error)
    for axes in panels[len(quants) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(quants) - n_columns) : len(quants)]:
        axes.set_xlabel("layer", fontsize=9)
        axes.tick_params(labelbottom=True)
    figure.supylabel("relative error", fontsize=9)
    what = "error of the hidden state, |variant - reference| / |reference|; bands are 95 % intervals"
    figure.suptitle(heading(title, what), fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def plot_kld_distribution(quantiles: pd.DataFrame, title: str) -> Figure:
    """How the KLD of single tokens is spread: a line with its quantiles for each variant, log axis."""
    from matplotlib.ticker import LogFormatter

    figure = new_figure(1.9 + 0.25 * len(quantiles))
    axes = figure.subplots()
    kinds = styles(quantiles.series)
    for series, (colour, _, _) in kinds.items():
        places = np.flatnonzero(quantiles.series == series)
        rows = quantiles.iloc[places]
        axes.hlines(places, rows["q0.05"], rows["q0.95"], color=colour, linewidth=1.2)
        axes.hlines(places, rows["q0.25"], rows["q0.75"], color=colour, linewidth=5, alpha=0.6)
        axes.plot(rows["q0.5"], places, "o", color="white", markeredgecolor=colour, markersize=5)
        axes.plot(rows["mean"], places, "D", color=colour, markersize=4.5)
        for tail in ("q0.99", "q0.999"):
            axes.plot(rows[tail], places, "|", color=colour, markersize=8)
    labels = [f"{row['quant'].upper()} {kinds[row['series']][2]}" for row in quantiles.to_dict("records")]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())  # plain: formulas are off, see `harness.pictures`
    axes.xaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel("KLD of a token (nats)")
    axes.grid(alpha=0.3, axis="x")
    what = "line: 5 to 95 % of the tokens, thick: 25 to 75 %, ticks: 99 and 99.9 %"
    axes.set_title(heading(title, "KLD of single tokens; circle: median, diamond: mean", what), fontsize=10)
    return figure


def plot_position(positions: pd.DataFrame, n_variants: int, title: str) -> Figure:
    """Mean nll above the reference's over the position in the window, with bars side by side. Of many variants the
    worse half stands in a panel above the better one, each with a scale of its own. n_variants: measured in all."""
    names = list(dict.fromkeys(positions["name"]))[::-1]  # the worst first: the order of the lines
    half = len(names) // 2
    groups = [names] if len(names) <= _ONE_PANEL else [names[: len(names) - half], names[len(names) - half :]]
    figure = new_figure(2.4 + 2.6 * len(groups))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False).ravel()
    kinds = styles(positions.series)
    quants = list(dict.fromkeys(positions.quant[::-1]))  # colour and marker a mode as everywhere, dashes a quant
    blocks = np.unique(positions.position)
    step = float(np.diff(blocks).min()) if len(blocks) > 1 else 1.0
    for axes, group in zip(panels, groups, strict=True):
        for i, name in enumerate(group):
            rows = positions[positions["name"] == name]
            quant, (colour, marker, label) = rows.quant.iloc[0], kinds[rows.series.iloc[0]]
            places = rows.position + step * _BARS_WIDTH * ((i + 0.5) / len(group) - 0.5)
            axes.plot(
                places,
                rows.delta_nll,
                label=f"{quant.upper()} {label}",
                color=colour,
                marker=marker,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                linewidth=1.2,
                linestyle=_DASHES[quants.index(quant) % len(_DASHES)],
                zorder=3,
            )
            axes.vlines(places, rows.low, rows.high, color=colour, linewidth=1.2, alpha=0.6)
        of_group = positions[positions["name"].isin(group)].delta_nll
        if of_group.min() > 0 and of_group.max() > 10 * of_group.min():
            log_axis(axes, of_group)
        elif of_group.min() < 0.25 * of_group.max():  # else 0 would flatten the lines
            axes.axhline(0, color="#000000", linewidth=0.8)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("position of the token in its window")
    figure.supylabel("mean nll above the reference's (nats)", fontsize=10)
    few = "" if len(names) == n_variants else f"the {half} best and {len(names) - half} worst of {n_variants} variants"
    few += ("; " if few else "") + "above the worse half, below the better one" if len(groups) > 1 else ""
    bars = "bars are 95 % intervals over the windows" if positions.low.notna().any() else "one window: no intervals"
    figure.suptitle(heading(title, f"loss by position, in blocks of tokens; {bars}", few), fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, handlelength=5)
    return figure
