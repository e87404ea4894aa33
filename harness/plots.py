"""Pictures from the tables of `harness.report`. Reads no records and no models."""

from pathlib import Path

import pandas as pd

# Okabe and Ito's palette: told apart by colour-blind readers; markers differ as well.
_STYLES = {
    "standard": ("#0072B2", "o", "standard"),
    "dynamicgate": ("#D55E00", "^", "DynamicGate"),
}
_OTHER_STYLES = (("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v"))
_MIB = 1 << 20


def plot_tradeoff(runs: pd.DataFrame, title: str, path: Path, kind: str = "png") -> None:
    """Perplexity against file size, with one standard error; an arrow leads from standard to the other mode."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    variants = runs[runs["mode"] != "reference"]
    styles = dict(_STYLES)
    for mode in [m for m in dict.fromkeys(variants["mode"]) if m not in styles]:
        styles[mode] = (*_OTHER_STYLES[(len(styles) - 2) % len(_OTHER_STYLES)], mode)
    for mode, (colour, marker, label) in styles.items():
        rows = variants[variants["mode"] == mode]
        if len(rows):
            axes.errorbar(
                rows.file_bytes / _MIB,
                rows.ppl,
                yerr=rows.ppl_se.astype(float),
                fmt=marker,
                color=colour,
                label=label,
                markersize=8,
                capsize=3,
                linestyle="none",
                zorder=3,
            )
    for quant in dict.fromkeys(variants.quant):
        rows = variants[variants.quant == quant]
        start = rows[rows["mode"] == "standard"]
        for row in rows.itertuples():
            above = row.mode == "standard" or not len(start)
            axes.annotate(
                str(quant).upper(),
                (row.file_bytes / _MIB, row.ppl),
                xytext=(8, 8 if above else -14),
                textcoords="offset points",
                fontsize=9,
                color=styles[str(row.mode)][0],
            )
            if len(start) and row.mode != "standard":
                axes.annotate(
                    "",
                    (row.file_bytes / _MIB, row.ppl),
                    (start.file_bytes.iloc[0] / _MIB, start.ppl.iloc[0]),
                    arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkA": 7, "shrinkB": 7},
                )
    for row in runs[runs["mode"] == "reference"].to_dict("records"):
        label = f"reference: {row['ppl']:.2f} at {row['file_bytes'] / _MIB:.0f} MiB"
        axes.axhline(row["ppl"], color="#555555", linestyle="--", linewidth=1, label=label)
    if len(variants) and runs.ppl.max() > 3 * runs.ppl.min():
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("file size (MiB)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format=kind)


def plot_layers(layers: pd.DataFrame, title: str, path: Path, kind: str = "png") -> None:
    """Relative error of the hidden state after each layer, with its interval; one panel a quant, one line a mode."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    quants = list(dict.fromkeys(layers.quant))
    n_columns = min(3, len(quants))
    n_rows = -(-len(quants) // n_columns)
    figure = Figure(figsize=(max(6, 4 * n_columns), 3.6 * n_rows), dpi=120, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False).ravel()
    for axes, quant in zip(panels, quants, strict=False):
        of_quant = layers[layers.quant == quant]
        others = iter(_OTHER_STYLES * len(of_quant))
        for name in dict.fromkeys(of_quant["name"]):
            rows = of_quant[of_quant["name"] == name]
            mode = str(rows["mode"].iloc[0])
            plain = name == f"{quant}-{mode}"  # a policy under another name gets a colour of its own
            colour, marker, label = _STYLES[mode] if plain and mode in _STYLES else (*next(others), name)
            x = rows.layer.astype(int)
            axes.plot(x, rows.error, marker=marker, markersize=3, color=colour, label=label)
            axes.fill_between(x, rows.error_low.astype(float), rows.error_high.astype(float), color=colour, alpha=0.2)
        axes.set_title(str(quant).upper(), fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in panels[len(quants) :]:
        axes.set_visible(False)
    figure.supylabel("relative error, |variant - reference| / |reference|", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format=kind)


def _plain_log_ticks(axes: object) -> None:
    """10, 20, 50 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis = axes.yaxis  # type: ignore[attr-defined]
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
