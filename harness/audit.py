"""The verb audit: what a published comparison table says against itself, its card, and published boards.

Pure, but for read_text and the boards in harness/data/.
"""

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

from harness.card import BASE, OTHER, Figure, Row, Side, Table, printable, read_tables, read_text, text_lines
from harness.checks import Finding
from harness.claims import Change, claim_findings, percent_change, size_change

WIDTH = 118
MAX_SHOWN = 12  # rows named in one finding
_MAX_SWAP_ROWS = 40  # exchanges are looked for in ladders up to this length
_FEW_DIGITS = 3
_UNEVEN = 1.25  # ratio to a board that changes by more than this from type to type is no mere change of text

BOARD, PUBLISHED_CARD = "llamacpp_llama3_8b.csv", "dynamicgate_card_llama3_8b.csv"
_BOARD_MODEL = re.compile(r"(?<![A-Za-z0-9.])llama[-_ ]?3[-_ ]?8b(?![a-z0-9]|\.\d)", re.IGNORECASE)
_INSTRUCT = re.compile(r"llama[-_ ]?3[-_ ]?8b[-_ ](?:instruct|it)\b", re.IGNORECASE)
_N_PARAMS = re.compile(r"(?<=[A-Za-z0-9][-_ ])(\d{1,4}(?:\.\d{1,2})?)b(?![a-z0-9])", re.IGNORECASE)
_CONTEXT_LINES = 40

_TEXT = re.compile(
    r"wiki[-_. ]?text|wiki\.|\bc4\b|\bptb\b|penn treebank|the pile|fineweb|redpajama|lambada"
    # or any text that has a name or a checksum: "measured on the text abc", "dataset: abc", "prompt set (sha256 ...)"
    r"|\b(?:on|over|of) the (?:text|corpus|data ?set|prompt set) [`'\"]?(?!and\b|that\b|in\b|is\b|was\b)\w"
    r"|\b(?:text|corpus|data ?set|prompt set)s?(?:\s?[:=]\s?\S| \(?sha256)"
    r"|\bon [\w.+\-]{1,80}(?:[:,] | \()\d[\d,]{0,12} (?:windows|chunks|tokens)\b",  # as `report` writes it
    re.IGNORECASE,
)
_SCORED = re.compile(
    r"\d[\d,.]{0,12}\s?[kM]?\s(?:scored\s+tokens|tokens\s+(?:were\s+|are\s+)?(?:scored|evaluated|measured)|chunks|windows)"
    r"|(?:--chunks|n_windows|n_scored|n_tokens)\W{0,3}\d|(?:full|whole|entire)\s(?:\S{1,30}\s){0,2}test",
    re.IGNORECASE,
)
_CALIBRATION = re.compile(r"calibrat|imatrix|importance matrix", re.IGNORECASE)


@dataclass(frozen=True)
class EqualSize:
    """A file against the card's own standard column at its size. word: wins, loses, or None outside the ladder;
    ladder_ppl: interpolated; holds: whatever the rounding of the sizes; better: a standard row no larger, with a lower
    perplexity."""

    word: str | None
    ladder_ppl: float | None
    between: tuple[str, ...]
    holds: bool
    better: Row | None


@dataclass(frozen=True)
class TableAudit:
    """A table with what follows from it."""

    table: Table
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def audit(path: Path) -> list[TableAudit]:
    """Every comparison in a file. Raises UserError when it cannot be read or has none."""
    return audit_text(read_text(path), path.name, is_csv=path.suffix.lower() in (".csv", ".tsv"))


def audit_text(text: str, name: str, *, is_csv: bool = False) -> list[TableAudit]:
    """Every comparison in a text. `name`: of the file; it may tell the model."""
    tables = read_tables(text, is_csv=is_csv)
    lines = text_lines(text)
    pairs = [table for table in tables if table.is_pair]
    audits = []
    for table in tables:
        findings = [*delta_findings(table), *order_findings(table), *equal_size_findings(table)]
        notes: list[str] = []
        if is_csv or table not in pairs:
            pass
        elif len(pairs) == 1:
            findings += claim_findings(lines, table)
        else:
            notes.append("claims in the text: not checked, as several tables compare two files a row")
        findings += model_findings(lines, table)
        findings += missing_findings(lines, table)
        board, note = board_findings(lines, name, table)
        audits.append(TableAudit(table, (*findings, *board), (*notes, *note)))
    return audits


def delta_findings(table: Table) -> list[Finding]:
    """Printed differences that the printed figures do not give: cut instead of rounded, wrong, or right only with
    digits that are not printed. A difference with an interval of its own was measured, not taken from two figures."""
    cut: list[str] = []
    wrong: list[str] = []
    unconfirmed: list[str] = []
    for row in table.rows:
        for measure, as_printed in row.deltas.items():
            change = _right_delta(row, measure, as_printed)
            if change is None:
                continue
            # A 'reduction' may be written with either sign.
            signless = math.copysign(as_printed.value, change.value)
            printed = replace(as_printed, value=signless) if measure in table.unsigned else as_printed
            slack = printed.half * 1e-6 + 1e-9 * abs(change.value)  # the last digits of a table written by a program
            reach = printed.half + slack  # a last 5 may go either way
            if abs(printed.value - change.value) <= reach:
                continue
            right = f"{change.value:+.{printed.decimals + 1}f}{printed.unit}"
            text = f"{row.label} {measure}: {_signed(printed.value, printed)} printed, {right} from the printed figures"
            rounded = f"{text}, which rounds to {change.value:+.{printed.decimals}f}{printed.unit}"
            is_cut = abs(_cut(change.value, printed) - printed.value) < 0.01 * 2 * printed.half
            is_fine = change.high - change.low <= 4 * printed.half  # else nearly every difference would be right
            if change.high < printed.value - reach or change.low > printed.value + reach:
                (cut if is_cut and is_fine else wrong).append(rounded if is_cut and is_fine else text)
            elif is_cut and is_fine and not printed.has_interval:
                unconfirmed.append(rounded)
    kinds = (
        (
            "cut_delta",
            cut,
            "a digit was cut off instead of rounded: no figures that round to the printed ones give this",
            "round, and look at the other differences of the column",
        ),
        (
            "wrong_delta",
            wrong,
            "no rounding of the printed figures gives this difference",
            "compute the column again, or correct the figures that it came from",
        ),
        (
            "unconfirmed_delta",
            unconfirmed,
            "a digit was cut off instead of rounded, or it came from digits that are not printed",
            "publish the figures with more digits",
        ),
    )
    return [Finding(kind, _listed(found), why, todo) for kind, found, why, todo in kinds if found]


def order_findings(table: Table) -> list[Finding]:
    """Rows that are larger and yet worse, within a side and a family of types; and exchanges that would mend it."""
    findings = []
    for side, name in table.names.items():
        for family in _families(table, side):
            chains = [
                f"{_point(best)} < " + " < ".join(_point(one) for one in sorted(worse, key=lambda one: one.ppl.value))
                for best, worse in _bigger_but_worse(family)
            ]
            if not chains:
                continue
            findings.append(
                Finding(
                    "bigger_but_worse",
                    f"{name}: {_listed(chains)}",
                    "a larger file of the same family with a worse perplexity: rows mixed up, another text or setting "
                    "for some rows, or noise",
                    "measure these rows again, on the same tokens",
                )
            )
            swaps = _mending_swaps(family)
            if swaps:
                findings.append(
                    Finding(
                        "looks_exchanged",
                        f"{name}: with the perplexities of "
                        + " or of ".join(f"{a.label} and {b.label}" for a, b in swaps[:3])
                        + " exchanged the column falls with size as it should",
                        "every difference computed from these rows would be wrong",
                        "look the two rows up in the log",
                    )
                )
    return findings


@dataclass(frozen=True)
class _Point:
    """One file of a ladder."""

    label: str
    type: str
    ppl: Figure
    size: Figure

    @property
    def n_bytes(self) -> float:
        return self.size.value * self.size.scale


def _families(table: Table, side: str) -> Iterator[list[_Point]]:
    """The files of one side by family (IQ, K, others), imatrix and what else the label tells; smallest first."""
    families: dict[tuple[str, str, str], list[_Point]] = {}
    for row in table.rows:
        file = row.base if side == BASE else row.other
        if file and file.ppl and file.size and row.type:
            kind = "iq" if row.type.startswith("IQ") else "k" if "_K" in row.type else row.type.strip("0123456789")
            rest = re.sub(re.escape(row.type), "", row.label.upper().replace("FP16", "F16").replace("FP32", "F32"))
            point = _Point(row.label, row.type, file.ppl, file.size)
            families.setdefault((kind, row.variant, rest.strip(" *")), []).append(point)
    for points in families.values():
        yield sorted(points, key=_ladder_place)


# Nominal order of llama.cpp's file types by bits per weight, for files whose printed sizes are equal.
_ORDER = (
    *(
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ2_M",
        "IQ3_XXS",
        "IQ3_XS",
        "IQ3_S",
        "IQ3_M",
        "IQ4_XS",
        "IQ4_NL",
    ),
    *("Q2_K_S", "Q2_K", "Q2_K_L", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K", "Q4_K_M", "Q4_K_L", "Q5_K_S", "Q5_K"),
    *("Q5_K_M", "Q5_K_L", "Q6_K", "Q6_K_L", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
)


def _ladder_place(point: _Point) -> tuple[float, int]:
    return point.n_bytes, _ORDER.index(point.type) if point.type in _ORDER else -1


def _is_worse(larger: _Point, smaller: _Point) -> bool:
    """Whether the first has the higher perplexity, beyond two standard errors where they are printed."""
    noise = 2 * math.hypot(larger.ppl.se or 0.0, smaller.ppl.se or 0.0)
    return larger.ppl.value - smaller.ppl.value > noise


def _bigger_but_worse(points: Sequence[_Point]) -> Iterator[tuple[_Point, list[_Point]]]:
    """Each file that larger ones are worse than, with those; every worse one once, below the best smaller file."""
    worse: dict[_Point, list[_Point]] = {}
    for i, point in enumerate(points):
        smaller = [one for one in points[:i] if _ladder_place(one) < _ladder_place(point) and _is_worse(point, one)]
        if smaller:
            worse.setdefault(min(smaller, key=lambda one: one.ppl.value), []).append(point)
    yield from worse.items()


def _mending_swaps(points: Sequence[_Point]) -> list[tuple[_Point, _Point]]:
    """Pairs whose exchange makes the whole ladder fall with size; neighbours first."""
    if not 2 < len(points) <= _MAX_SWAP_ROWS:
        return []
    values = [point.ppl.value for point in points]
    found = []
    for i, j in combinations(range(len(points)), 2):
        tried = values.copy()
        tried[i], tried[j] = tried[j], tried[i]
        if all(tried[k] > tried[k + 1] for k in range(len(tried) - 1)):
            found.append((j - i, points[i], points[j]))
    return [(a, b) for _, a, b in sorted(found, key=lambda one: one[0])]


def equal_size(row: Row, table: Table) -> EqualSize | None:
    """A row's other file against the standard column, interpolated linearly in size on ln PPL. None without figures."""
    file = row.other
    rungs = [(one, one.base) for one in table.rows if one.base.ppl and one.base.size]
    if file is None or file.ppl is None or file.size is None or not rungs:
        return None
    n_bytes, half, ppl = file.size.value * file.size.scale, file.size.half * file.size.scale, file.ppl.value
    # The best rows of each size; half a step of rounding on either side of a comparison.
    steps = [half + side.size.half * side.size.scale for _, side in rungs if side.size]
    point, between = _interpolated(n_bytes, rungs)
    moved = [_interpolated(n_bytes + shift * max(steps), rungs)[0] for shift in (-1, 1)]
    word = None if point is None else "loses" if ppl > point else "wins"
    holds = point is not None and all(one is not None and (ppl > one) == (ppl > point) for one in moved)
    better = [one for one, side in rungs if _bytes(side) <= n_bytes and side.ppl and side.ppl.value < ppl]
    best = min(better, key=lambda one: one.base.ppl.value if one.base.ppl else math.inf, default=None)
    return EqualSize(word, point, between, holds, best)


def _interpolated(n_bytes: float, rungs: Sequence[tuple[Row, Side]]) -> tuple[float | None, tuple[str, ...]]:
    """Perplexity of the ladder at a size, and the rows it lies between; None outside. Of one size the best counts."""
    best: dict[float, tuple[float, str]] = {}
    for row, side in rungs:
        if side.ppl:
            here = (math.log(side.ppl.value), row.label)
            best[_bytes(side)] = min(here, best.get(_bytes(side), here))
    same = 1e-9 * n_bytes
    below = [size for size in best if size <= n_bytes + same]
    above = [size for size in best if size >= n_bytes - same]
    if not below or not above:
        return None, ()
    low, high = max(below), min(above)
    if low >= high:
        return math.exp(best[high][0]), (best[high][1],)
    weight = (n_bytes - low) / (high - low)
    return math.exp((1 - weight) * best[low][0] + weight * best[high][0]), (best[low][1], best[high][1])


def _bytes(side: Side) -> float:
    return side.size.value * side.size.scale if side.size else math.nan


def equal_size_findings(table: Table) -> list[Finding]:
    """Rows whose other file a standard file of the same size, or a smaller one, would beat."""
    if not table.is_pair:
        return []
    loses, beaten, outside, shares = [], [], [], []
    for row in table.rows:
        size = percent_change(row.base.size, row.other.size if row.other else None)
        if size is not None:
            shares.append((size.value, row.label))
        verdict = equal_size(row, table)
        if verdict is None or row.other is None or row.other.ppl is None or row.other.size is None:
            continue
        own = f"{row.label} {row.other.ppl.text} at {row.other.size.text}"
        if verdict.word == "loses":
            rounding = "" if verdict.holds else ", but the sizes are too coarse to be sure"
            between = " and ".join(verdict.between)
            loses.append(f"{own} against {verdict.ladder_ppl:.2f} ({between}){rounding}")
        elif verdict.better is not None:
            better = verdict.better.base
            if better.ppl and better.size:
                beaten.append(f"{own} against {verdict.better.label} {better.ppl.text} at {better.size.text}")
        if verdict.word is None:
            outside.append(row.label)
    other, base = table.names[OTHER], table.names[BASE]
    findings = []
    if loses:
        findings.append(
            Finding(
                "loses_at_equal_size",
                f"{other} against {base} interpolated to the same size: {_listed(loses)}",
                "the same bytes spent on a standard type give a lower perplexity, by the table's own figures",
                "compare files of one size",
            )
        )
    if beaten:
        findings.append(
            Finding(
                "beaten_by_smaller",
                f"{other} against a {base} file that is no larger: {_listed(beaten)}",
                "the smaller file is better, by the table's own figures",
                "compare files of one size",
            )
        )
    if outside:
        findings.append(
            Finding(
                "outside_ladder",
                f"{other} {', '.join(outside[:MAX_SHOWN])}: no {base} rows on both sides of its size",
                "whether it beats a standard file of its size cannot be told",
                f"add {base} rows of larger and smaller types",
            )
        )
    grown = [one for one in shares if abs(one[0]) >= 1]
    if grown:
        (least, _), (most, label) = min(grown, key=lambda one: abs(one[0])), max(grown, key=lambda one: abs(one[0]))
        findings.append(
            Finding(
                "unequal_sizes",
                f"in {len(grown)} of {len(shares)} rows the sizes differ, by {least:+.1f}% to {most:+.1f}% ({label})",
                "a row compares two files of one name, not of one size",
                "judge by equal size, not by the difference in the row",
            )
        )
    return findings


def model_findings(lines: Sequence[str], table: Table) -> list[Finding]:
    """Whether the card is about one model and its table about another, as far as their sizes tell."""
    title = next((line for line in _without_front_matter(lines) if line.strip()), "")
    caption = _model_line(lines, table)
    of_card, of_table = _N_PARAMS.findall(title), _N_PARAMS.findall(caption)
    if not of_card or not of_table or set(of_card) & set(of_table):
        return []
    return [
        Finding(
            "other_model",
            f"the card is about {printable(title)!r}, its table about {printable(caption)!r}",
            "what quantizing costs differs from model to model: the table says little about this one",
            "measure the model that the card is about",
        )
    ]


def missing_findings(lines: Sequence[str], table: Table) -> list[Finding]:
    """What the table would need to be judged: errors, the text, the number of scored tokens, digits."""
    sides = [side for row in table.rows for side in (row.base, row.other) if side]
    findings = []
    if not any(side.ppl and side.ppl.se is not None for side in sides):
        findings.append(
            Finding(
                "no_error_bars",
                "no perplexity has an error" + (", no speed a spread" if any(side.speed for side in sides) else ""),
                "differences cannot be told from noise",
                "publish the standard error, or better that of the paired difference",
            )
        )
    near = lines[max(0, table.line - _CONTEXT_LINES) : table.line + len(table.rows) + _CONTEXT_LINES]
    about_test = [line for line in near if not _CALIBRATION.search(line)]
    if not any(_TEXT.search(line) for line in about_test):
        findings.append(
            Finding(
                "text_unknown",
                "which text was scored is not said",
                "perplexities of different texts cannot be compared, and nobody can repeat this",
                "name the text, and its checksum",
            )
        )
    if not any(_SCORED.search(line) for line in about_test):
        findings.append(
            Finding(
                "tokens_unknown",
                "how many tokens were scored is not said",
                "the error depends on it: with a few hundred tokens a perplexity is uncertain by tens of per cent",
                "publish the number of windows and of scored tokens",
            )
        )
    few = [side.ppl for side in sides if side.ppl and side.ppl.digits < _FEW_DIGITS]
    if few:
        findings.append(
            Finding(
                "few_digits",
                f"{len(few)} perplexities have fewer than {_FEW_DIGITS} digits, such as {few[0].text}",
                "their rounding alone may make or hide a difference",
                f"print {_FEW_DIGITS + 1} digits",
            )
        )
    coarse = [row.label for row in table.rows if _is_coarse(row)]
    if coarse:
        findings.append(
            Finding(
                "coarse_sizes",
                f"the rounding of the sizes is half their difference or more: {', '.join(coarse[:MAX_SHOWN])}",
                "what the better perplexity costs is not known",
                "print sizes in bytes or MiB",
            )
        )
    if table.unreadable:
        shown = ", ".join(printable(cell, 20) for cell in table.unreadable[:5])
        findings.append(
            Finding(
                "unreadable_cells",
                f"{len(table.unreadable)} cells are no figure: {shown}",
                "they are missing from this audit",
                "write one number with its unit",
            )
        )
    return findings


def _is_coarse(row: Row) -> bool:
    unit = row.base.size.unit if row.base.size else ""
    change = size_change(row, unit)
    return change is not None and change.value != 0 and (change.high - change.low) / 2 >= 0.499 * abs(change.value)


@dataclass(frozen=True)
class _BoardEntry:
    """All rows of one type on a board: they differ by the imatrix."""

    low_ppl: float
    high_ppl: float
    n_bytes: float


@cache
def _published(name: str) -> Table:
    text = resources.files("harness").joinpath("data", name).read_text(encoding="utf-8")
    return read_tables(text, is_csv=True)[0]


def _board() -> dict[str, _BoardEntry]:
    entries: dict[str, _BoardEntry] = {}
    for row in _published(BOARD).rows:
        if row.type and row.base.ppl and row.base.size:
            ppl, known = row.base.ppl.value, entries.get(row.type)
            low, high = (min(ppl, known.low_ppl), max(ppl, known.high_ppl)) if known else (ppl, ppl)
            entries[row.type] = _BoardEntry(low, high, _bytes(row.base))
    return entries


def board_findings(lines: Sequence[str], name: str, table: Table) -> tuple[list[Finding], list[str]]:
    """Against the boards in harness/data/, when the table is about their model; else the reason why not, as a note."""
    caption = _model_line(lines, table) or printable(name)
    if not _BOARD_MODEL.search(caption):
        reason = (
            f"{printable(caption)!r} is another model" if _N_PARAMS.search(caption) else "no model is named near it"
        )
        return [], [f"published boards: not compared, they are of Llama 3 8B and for this table {reason}"]
    board = _board()
    rows = [(row, board[row.type]) for row in table.rows if row.type in board and row.base.ppl]
    if not rows:
        return [], ["published boards: not compared, they have none of these types"]
    before = lines[max(0, table.line - _CONTEXT_LINES) : table.line]
    is_instruct = any(_INSTRUCT.search(line) for line in before)
    level = (
        "the board is of the base model, on Wikitext-2 in windows of 512 tokens, so levels differ; the order should not"
    )
    if is_instruct:
        level = f"the table is of the Instruct model, {level}"
    findings = _board_order(rows, table, level)
    findings += _board_ratios(rows, table, level)
    findings += _board_sizes(rows, table)
    findings += _published_card_findings(table)
    return findings, [
        f"published boards: llama.cpp's of Llama 3 8B has {len(rows)} of the {len(table.rows)} rows' types"
    ]


def _board_order(rows: Sequence[tuple[Row, _BoardEntry]], table: Table, level: str) -> list[Finding]:
    contrary: dict[str, tuple[float, float]] = {}
    for (a, on_a), (b, on_b) in combinations(rows, 2):
        if a.base.ppl is None or b.base.ppl is None:
            continue
        noise = 2 * math.hypot(a.base.ppl.se or 0.0, b.base.ppl.se or 0.0)
        difference = a.base.ppl.value - b.base.ppl.value
        if (on_a.low_ppl > on_b.high_ppl and difference < -noise) or (
            on_a.high_ppl < on_b.low_ppl and difference > noise
        ):
            contrary[a.label] = (a.base.ppl.value, on_a.low_ppl)
            contrary[b.label] = (b.base.ppl.value, on_b.low_ppl)
    if not contrary:
        return []
    here = " < ".join(f"{one} {contrary[one][0]:.2f}" for one in sorted(contrary, key=lambda one: contrary[one][0]))
    there = " < ".join(f"{one} {contrary[one][1]:.2f}" for one in sorted(contrary, key=lambda one: contrary[one][1]))
    return [
        Finding(
            "board_order",
            f"{table.names[BASE]}: the table has {here}; llama.cpp's board {there}",
            level,
            "measure these rows again before building on their differences",
        )
    ]


def _board_ratios(rows: Sequence[tuple[Row, _BoardEntry]], table: Table, level: str) -> list[Finding]:
    ratios = []
    for row, entry in rows:
        if row.base.ppl:
            ratios.append((row.base.ppl.value / math.sqrt(entry.low_ppl * entry.high_ppl), row.label))
    (low, low_label), (high, high_label) = min(ratios), max(ratios)
    if high <= _UNEVEN * low:
        return []
    return [
        Finding(
            "board_ratio",
            f"{table.names[BASE]}: {low:.2f} ({low_label}) to {high:.2f} ({high_label}) times the board's perplexity",
            f"another text moves all rows of a ladder about alike; {level.partition(', so')[0]}",
            "say what was measured, or measure again on the same tokens",
        )
    ]


def _board_sizes(rows: Sequence[tuple[Row, _BoardEntry]], table: Table) -> list[Finding]:
    """Sizes that differ from the board's, whether G is taken as 10**9 or 2**30."""
    wrong = []
    for row, entry in rows:
        size = row.base.size
        if size is None or not size.unit.upper().startswith(("G", "M")):
            continue
        binary, decimal = (1 << 30, 10**9) if size.unit[0].upper() == "G" else (1 << 20, 10**6)
        likely = {"GIB": (binary,), "MIB": (binary,)}.get(size.unit.upper(), (binary, decimal))
        readings = [entry.n_bytes / scale for scale in likely]
        if all(abs(size.value - reading) > 1.1 * size.half + 0.01 * reading for reading in readings):
            there = " or ".join(f"{reading:.2f}" for reading in readings)
            wrong.append(f"{row.label} {size.text} (board: {there})")
    if not wrong:
        return []
    return [
        Finding(
            "board_size",
            f"{table.names[BASE]}: {_listed(wrong)}",
            "these may not be llama.cpp's own mixtures of that name (the board's G is read as 2^30 and as 10^9 bytes)",
            "say which types the embeddings, the output and the other tensors have",
        )
    ]


def _published_card_findings(table: Table) -> list[Finding]:
    """Whether the figures are those that many cards already carry."""
    if not table.is_pair:
        return []
    known = {row.type: row for row in _published(PUBLISHED_CARD).rows}
    common = [(row, known[row.type]) for row in table.rows if row.type in known]
    same = [row.label for row, one in common if _ppls(row) == _ppls(one)]
    if not same:
        return []
    return [
        Finding(
            "same_as_published",
            f"{len(same)} of {len(table.rows)} rows have the perplexities of the cards with IQ-DynamicGate files",
            "these are published figures of Llama-3-8B-Instruct, not a new measurement",
            "name the source beside the table",
        )
    ]


def _ppls(row: Row) -> tuple[float | None, ...]:
    return tuple(side.ppl.value if side and side.ppl else None for side in (row.base, row.other))


def _model_line(lines: Sequence[str], table: Table) -> str:
    """The nearest line above the table that names a model by its size, else ''."""
    before = lines[max(0, table.line - 1 - _CONTEXT_LINES) : table.line - 1]
    return next((line for line in reversed(before) if "|" not in line and _N_PARAMS.search(line)), "")


def _without_front_matter(lines: Sequence[str]) -> Sequence[str]:
    """Without the YAML between two lines of dashes that model cards begin with."""
    if lines and lines[0].strip() == "---":
        end = next((i for i, line in enumerate(lines[1:1000], 1) if line.strip() == "---"), 0)
        return lines[end + 1 :]
    return lines


def _right_delta(row: Row, measure: str, printed: Figure) -> Change | None:
    """What the printed figures give, in the unit of the printed difference."""
    if row.other is None:
        return None
    base, other = getattr(row.base, measure), getattr(row.other, measure)
    if base is None or other is None:
        return None
    if printed.unit == "%":
        return percent_change(base, other)
    if measure == "size":
        return size_change(row, printed.unit or base.unit)
    half = base.half + other.half
    difference = other.value - base.value
    percent = percent_change(base, other)
    if not printed.unit and percent and abs(difference - printed.value) > half + printed.half:
        # A bare number that is no difference may be per cent without its sign.
        return percent if percent.low - printed.half <= printed.value <= percent.high + printed.half else None
    return Change(difference, difference - half, difference + half)


def _cut(value: float, printed: Figure) -> float:
    step = 2 * printed.half
    return math.copysign(math.floor(abs(value) / step + 1e-9) * step, value)


def _signed(value: float, figure: Figure) -> str:
    return f"{value:+.{figure.decimals}f}{figure.unit}"


def _point(point: _Point) -> str:
    return f"{point.label} {point.ppl.text} ({point.size.text})"


def _listed(parts: Sequence[str]) -> str:
    more = f"; and {len(parts) - MAX_SHOWN} more" if len(parts) > MAX_SHOWN else ""
    return "; ".join(parts[:MAX_SHOWN]) + more


def audit_json(name: str, audits: Sequence[TableAudit]) -> dict[str, Any]:
    """For programs: by table its recomputed rows, findings and notes."""
    return {
        "file": name,
        "tables": [
            {
                "line": one.table.line,
                "repeated_at": list(one.table.repeated_at),
                "sides": list(one.table.names.values()),
                "rows": [_row_json(row, one.table) for row in one.table.rows],
                "findings": [finding.to_json() for finding in one.findings],
                "notes": list(one.notes),
            }
            for one in audits
        ],
    }


def _row_json(row: Row, table: Table) -> dict[str, Any]:
    def value(figure: Figure | None) -> float | None:
        return figure.value if figure else None

    result: dict[str, Any] = {"label": row.label, "type": row.type}
    for prefix, side in (("base", row.base), ("other", row.other or Side())):
        result |= {f"{prefix}_ppl": value(side.ppl), f"{prefix}_ppl_se": side.ppl.se if side.ppl else None}
        result |= {f"{prefix}_bytes": _bytes(side) if side.size and side.size.unit else None}
        result |= {
            f"{prefix}_speed": value(side.speed),
            f"{prefix}_speed_unit": side.speed.unit if side.speed else None,
        }
    for measure in ("ppl", "size", "speed"):
        change = percent_change(getattr(row.base, measure), getattr(row.other or Side(), measure))
        result[f"delta_{measure}_pct"] = change.value if change else None
    verdict = equal_size(row, table)
    result["at_equal_size"] = verdict.word if verdict else None
    result["equal_size_ppl"] = verdict.ladder_ppl if verdict else None
    return result


def audit_text_view(name: str, audits: Sequence[TableAudit]) -> str:
    """For reading: each table's rows as recomputed, then what was found."""
    lines: list[str] = []
    for one in audits:
        table = one.table
        again = f", again at line {', '.join(map(str, table.repeated_at[:5]))}" if table.repeated_at else ""
        against = " against ".join(reversed(table.names.values()))
        lines += [f"{printable(name)}, line {table.line}{again}: {len(table.rows)} rows, {against}"]
        if table.is_pair:
            lines += [f"  {_row_line(row, table)}" for row in table.rows[: 4 * MAX_SHOWN]]
        lines.append("")
        for finding in one.findings:
            text = f"! {finding.kind}: {finding.what}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
            lines += textwrap.wrap(
                f"{finding.why}; {finding.todo}.", WIDTH, initial_indent="    ", subsequent_indent="    "
            )
        lines += [f"{len(one.findings)} findings" if one.findings else "nothing found"]
        for note in one.notes:
            lines += textwrap.wrap(f"({note})", WIDTH)
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def _row_line(row: Row, table: Table) -> str:
    """'IQ1_M: PPL 27.46 -> 15.41 (-43.88%), size +13.6%, speed +2.9%, at equal size loses (15.41 against 11.30)'."""
    other = row.other or Side()
    parts = []
    ppl = percent_change(row.base.ppl, other.ppl)
    if ppl and row.base.ppl and other.ppl:
        parts.append(f"PPL {row.base.ppl.text} -> {other.ppl.text} ({ppl.value:+.2f}%)")
    for name, change in (
        ("size", percent_change(row.base.size, other.size)),
        (
            "seconds" if row.base.speed and row.base.speed.unit == "s" else "speed",
            percent_change(row.base.speed, other.speed),
        ),
    ):
        if change:
            parts.append(f"{name} {change.value:+.1f}%")
    verdict = equal_size(row, table)
    if verdict and verdict.word and other.ppl:
        parts.append(f"at equal size {verdict.word} ({other.ppl.text} against {verdict.ladder_ppl:.2f})")
    return f"{row.label}: " + (", ".join(parts) or "one side only")
