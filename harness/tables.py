"""Data frames -> the cells of the tables that people read. `harness.formats` writes them as Markdown, HTML, LaTeX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.frames import SCORED, TIMED, percent_change
from harness.record import mode_label

TABLE_COLUMNS = (
    "Quantization",
    "Standard PPL",
    "DynamicGate PPL",
    "Δ PPL",
    "Std Size",
    "DG Size",
    "Δ Size",
    "Std Speed",
    "DG Speed",
)
CASE_COLUMNS = ("Case", "Size", "bpw", "PPL", "Mean KLD", "Same top", "At equal size", "vs placebo")
ATTRIBUTION_COLUMNS = ("Rule left out", "It costs", "It saves, ln PPL", "It saves, KLD", "ln PPL per MiB")
SPEED_COLUMNS = ("Case", "Load", "Prompt, tokens/s", "Change", "Generation, tokens/s", "Change")
LAYER_COLUMNS = ("Case", "Last layer", "Change", "Mean over layers", "Change")
BOARD_COLUMNS = ("Quantization", "Size", "PPL", "ΔPPL", "KLD", "Mean Δp", "RMS Δp")
DIVERGENCE_COLUMNS = ("Case", "bpw", "KLD median", "KLD 99%", "Other top token", "ln(PPL/PPL of reference)")
FILE_COLUMNS = ("File", "Type", "Size", "bpw", "PPL", "Mean KLD", "Recommendation")
_ABSENT = "-"
_SPEED_NOTES = {
    TIMED: "Std and DG Speed: seconds to run the prompt set once, at the median speed of the timing pass.",
    SCORED: "Std and DG Speed: no speed measurement but the seconds that the scoring took on one machine, each file "
    "once and with other work beside it; there was no timing pass.",
    None: "Std and DG Speed: left out: there was no timing pass, and the files were scored on several machines, or "
    "with other numbers of windows at once.",
}


Row = Mapping[Any, Any]  # of a data frame


@dataclass(frozen=True)
class Table:
    """A table as text: a title, the header, rows of as many cells, and sentences that belong under it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def card_table(table: pd.DataFrame) -> Table:
    """The model card's table: standard beside the other mode. Cells are rounded, not cut."""
    rows: list[tuple[str, ...]] = [
        (
            _quant_label(row),
            plus_minus(row["std_ppl"], row["std_ppl_se"]),
            plus_minus(row["dg_ppl"], row["dg_ppl_se"]),
            percent(row["delta_ppl_pct"], row["delta_ppl_pct_low"], row["delta_ppl_pct_high"]),
            size(row["std_bytes"]),
            size(row["dg_bytes"]),
            size(row["delta_bytes"], signed=True, like=row["std_bytes"]),
            seconds(row["std_speed_s"]),
            seconds(row["dg_speed_s"]),
        )
        for row in table.to_dict("records")
    ]
    kinds = set(table["speed_from"]) if "speed_from" in table else {TIMED}
    notes = tuple(text for kind, text in _SPEED_NOTES.items() if kind in kinds)
    return Table("Standard and DynamicGate", TABLE_COLUMNS, rows, notes)


def pure_notes(runs: pd.DataFrame) -> tuple[str, ...]:
    """Which quants of these runs are presets made with --pure, in one sentence; none without."""
    quants = [str(quant).upper() for quant in dict.fromkeys(runs.quant[runs.pure.eq(True)])]
    if not quants:
        return ()
    words = "is a pure preset" if len(quants) == 1 else "are pure presets"
    return (
        f"{', '.join(quants)} {words} (llama-quantize --pure): one type for all tensors that nothing else names, "
        "unlike llama.cpp's own mixture of that name.",
    )


def measured_rows(runs: pd.DataFrame) -> list[Row]:
    """The rows of measured cases, absent numbers as None."""
    good = runs[runs.status == "ok"]
    return good.astype(object).where(good.notna(), None).to_dict("records")  # type: ignore[return-value]


def case_table(measured: Sequence[Row]) -> Table:
    """Every case by itself: size, perplexity, divergence, and how it stands at equal size."""
    rows: list[tuple[str, ...]] = [
        (
            row["name"] + ("" if row["on_front"] is not True else " *"),
            size(row["file_bytes"]),
            f"{row['bpw']:.2f}",
            plus_minus(row["ppl"], row["ppl_se"]),
            plus_minus(row["kld_mean"], row["kld_se"]),
            _ABSENT if _is_absent(row["same_top"]) else f"{100 * row['same_top']:.1f}%",
            _verdict_cell(row),
            row["vs_placebo"] or _ABSENT,
        )
        for row in measured
    ]
    return Table("Every file by itself", CASE_COLUMNS, rows)


def board_table(measured: Sequence[Row]) -> Table:
    """The columns of the board in llama-perplexity's documentation, sorted by KLD; ± one standard error."""
    rows: list[tuple[str, ...]] = []
    for row in sorted(_variants(measured), key=lambda row: math.inf if row["kld_mean"] is None else row["kld_mean"]):
        rows.append(
            (
                row["name"],
                f"{row['file_bytes'] / (1 << 30):.3f} GiB",
                _signed_error(row["ppl"], row["ppl_se"], "", sign=False),
                _signed_error(row["delta_ppl"], row["delta_ppl_se"], ""),
                _signed_error(row["kld_mean"], row["kld_se"], "", sign=False),
                _signed_error(row["dp_mean_pct"], row["dp_mean_se_pct"], " %"),
                _signed_error(row["dp_rms_pct"], row["dp_rms_se_pct"], " %", sign=False),
            )
        )
    return Table("Sorted by KL divergence", BOARD_COLUMNS, rows)


def divergence_table(measured: Sequence[Row]) -> Table:
    """Medians and tails of the KL divergence, the columns that Artefact2's comparisons use."""
    rows: list[tuple[str, ...]] = []
    for row in _variants(measured):
        values = (row["kld_median"], row["kld_p99"], row["ln_ppl_ratio_vs_reference"])
        median, tail, ratio = (_ABSENT if _is_absent(value) else f"{value:.4f}" for value in values)
        other = _ABSENT if _is_absent(row["same_top"]) else f"{100 * (1 - row['same_top']):.1f}%"
        rows.append((row["name"], f"{row['bpw']:.2f}", median, tail, other, ratio))
    return Table("Tails of the KL divergence", DIVERGENCE_COLUMNS, rows)


def file_table(measured: Sequence[Row]) -> Table:
    """Which file to take, the largest first."""
    rows: list[tuple[str, ...]] = []
    for row in sorted(_variants(measured), key=lambda row: row["file_bytes"], reverse=True):
        mode = mode_label(row["mode"], row["policy"])
        rows.append(
            (
                f"{row['name']}.gguf",
                f"{row['mixture'] or _ABSENT}{'' if mode == 'standard' else f' + {mode}'}",
                size(row["file_bytes"]),
                f"{row['bpw']:.2f}",
                plus_minus(row["ppl"], row["ppl_se"]),
                plus_minus(row["kld_mean"], row["kld_se"]),
                recommendation(row),
            )
        )
    return Table("Files", FILE_COLUMNS, rows)


# Mean KLD in nats up to which a file is called so. A convention of this harness, with the figures beside it.
_LEVELS = ((0.01, "hard to tell from the reference"), (0.05, "small loss"), (0.2, "loss that shows"))


def recommendation(row: Row) -> str:
    """What the measured figures say for a file: another one to take instead, or how much it loses."""
    if isinstance(row["dominated_by"], str):
        return f"take {row['dominated_by']}: no larger, and better"
    if _is_absent(row["kld_mean"]):
        return "not compared with the reference"
    return next(
        (word for limit, word in _LEVELS if row["kld_mean"] <= limit), "large loss: only when no larger file fits"
    )


def _variants(measured: Sequence[Row]) -> list[Row]:
    return [row for row in measured if row["mode"] != "reference"]


def _signed_error(value: float | None, se: float | None, unit: str, *, sign: bool = True) -> str:
    if value is None or _is_absent(value):
        return _ABSENT
    return f"{value:{'+' if sign else ''}.6f}" + ("" if se is None or _is_absent(se) else f" ± {se:.6f}") + unit


def _between(value: float, low: float | None, high: float | None) -> str:
    return f"{value:+.4f}" + ("" if _is_absent(low) or _is_absent(high) else f" [{low:+.4f}, {high:+.4f}]")


def _verdict_cell(row: Row) -> str:
    if row["verdict"]:
        change = percent_change(row["equal_size_ln_ppl"])
        return f"{row['verdict']} ({change:+.1f}%)"
    return "no neighbours" if row["verdict_reason"] and not row["verdict_between"] else _ABSENT


def plus_minus(value: float | None, se: float | None) -> str:
    """'28.41 ±1.32': the value with as many decimals as its error has up to two figures."""
    if _is_absent(value):
        return _ABSENT
    if _is_absent(se):
        return f"{value:.2f}"
    decimals = max(0, min(4, 1 - math.floor(math.log10(se)))) if se else 4
    return f"{value:.{decimals}f} ±{se:.{decimals}f}"


def percent(value: float | None, low: float | None, high: float | None) -> str:
    """'-43.9% [-46.2, -41.5]': with its 95 % interval."""
    if _is_absent(value):
        return _ABSENT
    return f"{value:+.1f}%" + ("" if _is_absent(low) or _is_absent(high) else f" [{low:+.1f}, {high:+.1f}]")


def size(n_bytes: float | None, *, signed: bool = False, like: float | None = None) -> str:
    """'2.5G' or '93.6M': binary units, as `ls -lh` has them. `like`: in the unit that this many bytes would have."""
    if _is_absent(n_bytes):
        return _ABSENT
    assert n_bytes is not None
    extent = abs(n_bytes) if like is None or _is_absent(like) else like
    unit, scale = ("G", 1 << 30) if round(extent / (1 << 20), 1) >= 1024 else ("M", 1 << 20)
    return f"{n_bytes / scale:{'+' if signed else ''}.1f}{unit}"


def seconds(value: float | None) -> str:
    """'13.3s'; whole seconds from 100 on."""
    if _is_absent(value):
        return _ABSENT
    return f"{value:.0f}s" if value is not None and value >= 100 else f"{value:.1f}s"


def attribution_table(rows: pd.DataFrame) -> Table:
    """What each rule of a policy saves, and for how many bytes."""
    cells: list[tuple[str, ...]] = []
    for row in rows.to_dict("records"):
        mib = row["cost_bytes"] / (1 << 20)
        per_mib = row["saved_ln_ppl"] / mib if mib > 0 else None
        cells.append(
            (
                f"{row['quant'].upper()} {row['rules']}",
                size(row["cost_bytes"], signed=True),
                _between(row["saved_ln_ppl"], row["saved_ln_ppl_low"], row["saved_ln_ppl_high"]),
                _between(row["saved_kld"], row["saved_kld_low"], row["saved_kld_high"]),
                _ABSENT if per_mib is None else f"{per_mib:+.4f}",
            )
        )
    return Table("What each rule saves", ATTRIBUTION_COLUMNS, cells)


def speed_table(rows: pd.DataFrame) -> Table:
    """Speeds of the timing pass: medians with their spread, change against standard with its interval."""
    cells: list[tuple[str, ...]] = []
    for row in rows.to_dict("records"):
        line = [row["name"], seconds(row["warm_load_s"])]
        for step in ("prompt", "generate"):
            names = [f"delta_{step}_pct", f"delta_{step}_pct_low", f"delta_{step}_pct_high"]
            line.append(f"{row[f'{step}_tokens_per_s']:.1f} (spread {100 * row[f'{step}_spread']:.1f}%)")
            line.append(percent(*(row[name] for name in names)))
        cells.append(tuple(line))
    return Table("Speed", SPEED_COLUMNS, cells)


def layer_table(rows: pd.DataFrame) -> Table:
    """Relative error of the hidden state after the last layer and averaged over the depth."""
    cells: list[tuple[str, ...]] = []
    for name, of_case in rows.groupby("name", sort=False):
        line = [str(name)]
        for row in (of_case.iloc[-2], of_case.iloc[-1]):
            line.append(f"{row['error']:.4f}")
            line.append(percent(row["delta_pct"], row["delta_pct_low"], row["delta_pct_high"]))
        cells.append(tuple(line))
    return Table("Error of the hidden state", LAYER_COLUMNS, cells)


def llama_bench_table(tests: Sequence[Mapping[str, Any]]) -> Table:
    """The columns of `llama-bench -o md`, from its JSON fields."""
    header = ("model", "size", "params", "backend", "threads", "test", "t/s")
    rows: list[tuple[str, ...]] = []
    for test in tests:
        kind = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        n_bytes, params = f"{test['model_size'] / (1 << 20):.2f} MiB", f"{test['model_n_params'] / 1e6:.2f} M"
        speed = f"{test['avg_ts']:.2f} ± {test['stddev_ts']:.2f}"
        rows.append((test["model_type"], n_bytes, params, test["backends"], str(test["n_threads"]), kind, speed))
    return Table("llama-bench", header, rows)


def _quant_label(row: Row) -> str:
    label = row["quant"].upper()
    plain = not isinstance(row["policy"], str) or row["policy"] == row["mode"] == "dynamicgate"
    return label if plain else f"{label} ({row['policy'] if row['mode'] == 'dynamicgate' else row['mode']})"


def _is_absent(value: float | None) -> bool:
    return value is None or math.isnan(value)
