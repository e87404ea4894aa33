"""Published comparison tables: read out of Markdown, tab- or space-separated text, or CSV. Pure, but for read_text."""

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from harness.errors import UserError
from harness.paths import read_small

MAX_BYTES = 16 << 20
MAX_LINES = 100_000
MAX_ROWS = 200
MAX_TABLES = 8
_MAX_LINE = 4000  # characters; longer lines are no rows of a table that a person reads
_MAX_COLUMNS = 60
_MAX_CELL = 200
_MOST_DIGITS = 6  # of a figure that is shown as it was printed

BASE, OTHER = "base", "other"  # the two sides of a comparison; a plain board has only the base

_SIDES = {
    BASE: {"standard", "std", "base", "baseline", "default", "vanilla", "original", "before", "old"},
    OTHER: {"dynamicgate", "dg", "dynamic", "new", "custom", "ours", "after", "tuned", "ud"},
}
_DELTA = {"delta", "change", "diff", "difference", "reduction", "improvement", "gain", "dppl", "dsize", "dspeed"}
_LOSSES = {"reduction", "improvement", "gain"}  # headers under which a fall is written without its sign
_MEASURES = {
    "ppl": {"ppl", "perplexity", "dppl"},
    "size": {"size", "bytes", "filesize", "dsize", "gb", "gib", "mb", "mib"},
    "speed": {"speed", "time", "seconds", "sec", "latency", "tps", "throughput", "dspeed"},
}
_ERROR = {"se", "error", "err", "stderr", "stddev", "sigma", "uncertainty", "plusminus", "errors"}
_SKIPPED = {"low", "high", "ln", "log", "ratio", "corr", "correlation", "kld", "kl", "min", "max", "rms", "p", "dp"}
_SKIPPED |= {"spread", "memory", "vram", "load", "id", "key", "n"}
_LABELS = (
    *("quantization", "quantisation", "quant", "quants", "type", "case", "file", "filename", "name", "format"),
    *("variant", "method", "model"),
)
_VARIANTS = ("imatrix", "mode", "policy", "calibration")  # columns that tell rows of one type apart
_UNIT_HINTS = {"gib": "GiB", "gb": "GB", "mib": "MiB", "mb": "MB", "g": "G", "m": "M", "bytes": "B", "pct": "%"}
_UNIT_HINTS |= {"percent": "%", "seconds": "s", "sec": "s", "s": "s", "tps": "/s"}

_NUMBER = re.compile(
    r"(?P<lead>[~≈]?\s*)(?P<sign>[+\-−–]?)\s*(?P<digits>(?:\d[\d,]{0,30})(?:\.\d{0,20})?|\.\d{1,20})"
    r"(?P<exponent>[eE][+\-]?\d{1,2})?\s*(?P<rest>.*)",
    re.DOTALL,
)
_UNIT = re.compile(
    r"(?:(?P<percent>%|percent\b|per cent\b)|(?P<rate>(?:t|tok|toks|tokens?)\s?(?:/|per )\s?s(?:ec)?(?:ond)?\b|tps\b)"
    r"|(?P<size>(?:[KMGT]i?B|[KMGT]i?|bytes|B)(?![A-Za-z/]))"
    r"|(?P<seconds>(?:ms|min|minutes?|seconds?|secs?|s)\b))\s*",
    re.IGNORECASE,
)
_SE = re.compile(r"(?:±|\+/-|\+-)\s*(\d{1,15}(?:\.\d{1,20})?|\.\d{1,20})\s*")
_INTERVAL = re.compile(r"[\[(]\s*[+\-−–]?\s*\d[^\](,;]{0,30}[,;]\s*[+\-−–]?\s*\d[^\](]{0,30}[\])]")
_LOWER = re.compile(r"lower|less|smaller|reduction|better|decrease|faster|fewer|down", re.IGNORECASE)
_HIGHER = re.compile(r"higher|more|larger|bigger|worse|increase|slower|up\b", re.IGNORECASE)
_TRAILER = re.compile(r"[\s*†‡¹²³⁴✓✅❌⬇⬆↓↑️.]*")  # footnote marks and arrows after a figure
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])(IQ[1-4]_(?:XXS|XS|NL|S|M)|Q[2-8]_K(?:_(?:XL|[SML]))?|Q[1-8]_[01]|BF16|FP?16|FP?32|TQ[12]_0"
    r"|MXFP4(?:_MOE)?)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_DELTA_SIGNS = re.compile("Î”|Ξ\x94|[Δ∆δΞ▲]")  # Ξ: what a Δ becomes when its UTF-8 is read as ISO 8859-7
_RATE = re.compile(r"\b(?:tokens?|toks?|t)[\s_]?(?:/|per)[\s_]?s(?:ec)?(?:ond)?(?![a-z])")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Figure:
    """One printed number. half: half a unit of its last digit; digits: significant ones; unit: '%', 's', '/s', '',
    or one of a size, such as 'G' or 'MiB'; signed: a sign was printed; has_interval: [a, b] stands behind it."""

    value: float
    half: float
    digits: int
    unit: str = ""
    signed: bool = False
    se: float | None = None
    has_interval: bool = False

    @property
    def decimals(self) -> int:
        """Printed digits after the point."""
        return max(0, round(-math.log10(2 * self.half)))

    @property
    def scale(self) -> float:
        """Bytes of one unit of a size; 1 without one. G is 2**30 as in `ls -lh`, GB is 10**9."""
        letter = self.unit[:1].upper()
        if letter not in _BINARY:
            return 1.0
        return float((_DECIMAL if self.unit[1:2].upper() == "B" else _BINARY)[letter])

    @property
    def text(self) -> str:
        """As printed, but for its sign; what a program wrote in full as a person would."""
        if self.digits > _MOST_DIGITS and self.unit == "B":
            unit, scale = next((one for one in reversed(_BINARY.items()) if one[1] <= self.value), ("B", 1))
            return f"{self.value / scale:.{1 if scale > 1 else 0}f}{unit}"
        if max(self.digits, self.decimals) > _MOST_DIGITS:
            return f"{self.value:.{min(2, self.decimals)}f}{'' if self.unit == '/s' else self.unit}"
        return f"{self.value:.{self.decimals}f}{'' if self.unit == '/s' else self.unit}"


@dataclass(frozen=True)
class Side:
    """The figures of one file: perplexity, size, and seconds or tokens/s."""

    ppl: Figure | None = None
    size: Figure | None = None
    speed: Figure | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table. type: llama.cpp's file type in the label, upper case; variant: imatrix, mode and such."""

    label: str
    type: str | None
    variant: str
    base: Side
    other: Side | None = None
    deltas: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A comparison as it was published. names: how the header calls the sides; unsigned: measures whose column is a
    'reduction'; line: of the header, from 1; unreadable: cells that hold digits and are no figure."""

    rows: tuple[Row, ...]
    names: dict[str, str]
    unsigned: frozenset[str]
    line: int
    unreadable: tuple[str, ...] = ()
    repeated_at: tuple[int, ...] = ()

    @property
    def is_pair(self) -> bool:
        """Whether two files stand in a row."""
        return OTHER in self.names


@dataclass(frozen=True)
class _Column:
    measure: str
    side: str  # BASE, OTHER, "delta" or ""
    is_error: bool
    unit: str
    is_loss: bool


@dataclass(frozen=True)
class _Grid:
    """Cells of something that looks like a table; those of the rows are not cleaned yet."""

    line: int
    header: list[str]
    rows: list[list[str]]
    is_csv: bool = False


def read_text(path: Path) -> str:
    """The whole file as text. Raises UserError when it is missing, too large or no text."""
    content = read_small(path, MAX_BYTES)
    text = content.decode("utf-8-sig", errors="replace")
    if "\0" in text or len(_CONTROL.findall(text[:100_000])) > 0.01 * len(text[:100_000]):
        raise UserError(f"{path}: this is no text but a binary file (or UTF-16); give a model card or a CSV in UTF-8")
    return text


def read_tables(text: str, *, is_csv: bool = False) -> list[Table]:
    """The first MAX_TABLES comparisons in a text, each once. Raises UserError when there is none."""
    lines = text_lines(text)
    grids = _csv_grids(lines) if is_csv else chain(_pipe_grids(lines), _blank_grids(lines), _csv_grids(lines))
    tables: list[Table] = []
    seen: list[_Grid] = []
    for grid in grids:
        if not seen or len(seen[0].header) < 2:
            seen = [grid]
        table = _table(grid)
        if table is None or any(table.line in (one.line, *one.repeated_at) for one in tables):
            continue
        same = next((i for i, one in enumerate(tables) if one.rows == table.rows and one.names == table.names), None)
        if same is None:
            tables.append(table)
        else:
            tables[same] = replace(tables[same], repeated_at=(*tables[same].repeated_at, table.line))
        if sum(1 + len(one.repeated_at) for one in tables) >= MAX_TABLES:
            break
    if not tables:
        raise UserError(f"no table with a column of types and one of perplexities ({_seen(seen)})")
    return tables


def text_lines(text: str) -> list[str]:
    """Lines without their ends; long ones are cut. Raises UserError when there are too many."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.count("\n") > MAX_LINES:
        raise UserError(f"more than {MAX_LINES} lines; give the model card or the table alone")
    return [line[:_MAX_LINE] for line in text.split("\n")]


def quant_type(text: str) -> str | None:
    """'IQ2_XXS' out of 'iq2_xxs', 'model-IQ2_XXS.gguf', '**IQ2_XXS**'; None without one."""
    found = _QUANT.search(text[:_MAX_CELL])
    return re.sub(r"^FP", "F", found[1].upper()) if found else None


def parse_figure(cell: str, unit_hint: str = "") -> Figure | None:
    """A figure as people write them: 2.5G, 234s, -12.9%, 1,234.5, 26.9 ±1.4, '12.9% lower'. None when it is none."""
    match = _NUMBER.fullmatch(cell.strip()[:_MAX_CELL])
    if match is None:
        return None
    number = _plain_number(match["digits"])
    if number is None:
        return None
    exponent = int((match["exponent"] or "e0")[1:])
    rest, se, unit = match["rest"], None, ""
    for _ in range(2):  # a unit may stand before or after the error
        found = _UNIT.match(rest)
        if found and not unit:
            unit, rest = _unit_name(found), rest[found.end() :]
        error = _SE.match(rest)
        if error and se is None:
            se, rest = float(error[1]), rest[error.end() :]
    has_interval = _INTERVAL.match(rest.strip()) is not None
    rest = re.sub(r"^[\[(][^\])]*[\])]", "", rest.strip())  # an interval or a remark in brackets
    sign = -1.0 if match["sign"] in ("-", "−", "–") else 1.0
    signed = bool(match["sign"])
    if not signed and (_LOWER.match(rest) or _HIGHER.match(rest)):
        sign, signed = (-1.0 if _LOWER.match(rest) else 1.0), True
    elif not _TRAILER.fullmatch(rest):
        return None
    value = float(number) * 10.0**exponent
    decimals = len(number.partition(".")[2]) - exponent
    if not (value == 0 or 1e-9 <= value <= 1e15) or abs(decimals) > 20:
        return None
    half, factor = 0.5 * 10.0**-decimals, {"ms": 1e-3, "min": 60.0}.get(unit, 1.0)
    digits = len(number.replace(".", "").lstrip("0"))
    unit = "s" if unit in ("ms", "min") else unit or unit_hint
    return Figure(
        sign * value * factor, half * factor, digits, unit, signed, None if se is None else se * factor, has_interval
    )


def printable(text: str, limit: int = 60) -> str:
    """Text of a stranger's file for a terminal: one line, no control characters, not too long."""
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _plain_number(digits: str) -> str | None:
    """'1,234.5' -> '1234.5'; '11,30' -> '11.30'; None for '1,2,3'."""
    if "," not in digits:
        return digits
    if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+(\.\d*)?", digits):
        return digits.replace(",", "")
    return digits.replace(",", ".") if re.fullmatch(r"\d+,\d+", digits) else None


def _unit_name(found: re.Match[str]) -> str:
    if found["percent"]:
        return "%"
    if found["rate"]:
        return "/s"
    if found["size"]:
        return "B" if found["size"].lower() in ("b", "bytes") else found["size"][:1].upper() + found["size"][1:]
    name = found["seconds"].lower()
    return "ms" if name == "ms" else "min" if name.startswith("min") else "s"


def _clean(cell: str) -> str:
    """A cell's text without Markdown and HTML around it."""
    cell = re.sub(r"<[^<>]{0,100}>", " ", cell[: 4 * _MAX_CELL])
    cell = re.sub(r"!?\[([^\[\]]{0,200})\]\([^()]{0,400}\)", r"\1", cell)
    return " ".join(re.sub(r"\*\*|__(?=\w)|(?<=\w)__|`|~~", "", cell).split())[:_MAX_CELL]


def _pipe_grids(lines: Sequence[str]) -> Iterator[_Grid]:
    """Blocks of lines with bars. A line of dashes below the header is usual and not required."""
    for start, block in _blocks(lines, lambda line: "|" in line):
        rules = [i for i, line in enumerate(block) if set(line) <= set("|-: \t") and "-" in line]
        rule_lines = set(rules)
        heads = [i - 1 for i in rules if i > 0 and i - 1 not in rule_lines] or [0]
        for head, end in zip(heads, [*heads[1:], len(block)], strict=True):
            rows = [_pipe_cells(block[i]) for i in range(head, end) if i not in rule_lines]
            if len(rows) > 1:
                yield _Grid(start + head + 1, [_clean(cell) for cell in rows[0]], rows[1:])


def _pipe_cells(line: str) -> list[str]:
    line = line.strip().replace("\\|", "/").removeprefix("|").removesuffix("|")
    return line.split("|")[:_MAX_COLUMNS]


def _blank_grids(lines: Sequence[str]) -> Iterator[_Grid]:
    """Blocks of lines with columns set apart by tabs, or by two blanks or more."""
    for pattern in (re.compile(r"\t"), re.compile(r"\s{2,}")):
        for start, block in _blocks(lines, partial(_has_gap, pattern)):
            rows = [pattern.split(line.strip())[:_MAX_COLUMNS] for line in block if re.search(r"\w", line)]
            if len(rows) > 1:
                yield _Grid(start + 1, [_clean(cell) for cell in rows[0]], rows[1:])


def _has_gap(pattern: re.Pattern[str], line: str) -> bool:
    return "|" not in line and pattern.search(line.strip()) is not None


def _blocks(lines: Sequence[str], belongs: Callable[[str], bool]) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines that belong to a table: index of the first, and the lines."""
    start = 0
    block: list[str] = []
    for i, line in enumerate([*lines, ""]):
        if belongs(line):
            start = start if block else i
            if len(block) <= MAX_ROWS + 2:
                block.append(line)
        elif block:
            yield start, block
            block = []


def _csv_grids(lines: Sequence[str]) -> Iterator[_Grid]:
    """The whole file, with commas, semicolons or tabs, whichever the header has most of; # starts a comment."""
    kept = [(i, line) for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
    if not kept:
        return
    first, header = kept[0]
    delimiter = max(",;\t", key=header.count)
    try:
        rows = list(csv.reader((line for _, line in kept[: MAX_ROWS + 2]), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"this is no readable CSV: {error}") from error
    if len(rows) > 1:
        cells = [row[:_MAX_COLUMNS] for row in rows]
        yield _Grid(first + 1, [_clean(cell) for cell in cells[0]], cells[1:], is_csv=True)


def _seen(grids: Sequence[_Grid]) -> str:
    """What there was instead, for the message."""
    if not grids:
        return "there is no table at all"
    headers = ", ".join(printable(cell, 30) for cell in grids[0].header[:10])
    if len(grids[0].header) < 2:
        return f"there is only one column: {headers}"
    return f"columns of the first table: {headers}"


def _table(grid: _Grid) -> Table | None:
    """The comparison in a grid, or None when it is a table about something else."""
    columns = _columns(grid.header)
    label = _label_column(grid, columns)
    sides = {one.side for one in columns.values() if one.measure == "ppl" and not one.is_error} & {"", BASE, OTHER}
    if label is None or not sides:
        return None
    if len(grid.rows) > MAX_ROWS:
        raise UserError(f"the table at line {grid.line} has more than {MAX_ROWS} rows")
    is_pair = {BASE, OTHER} <= sides
    if not is_pair:  # a plain board, whatever its one column of perplexities is called
        only = BASE if BASE in sides else OTHER if OTHER in sides else ""
        columns = {
            i: replace(one, side=BASE) for i, one in columns.items() if one.side in ("", only) and one.side != "delta"
        }
    variants = [i for i, name in enumerate(grid.header) if i != label and name.strip().lower() in _VARIANTS]
    rows, unreadable = [], []
    for raw in grid.rows:
        cells = [_clean(cell) for cell in raw]
        row = _row(cells, columns, label, variants, is_pair)
        if row is not None:
            rows.append(row)
            unreadable += [cells[i] for i in columns if _is_unreadable(cells, i, columns[i])]
    if not rows:
        return None
    names = {side: _side_name(grid.header, columns, side) for side in ((BASE, OTHER) if is_pair else (BASE,))}
    unsigned = frozenset(one.measure for one in columns.values() if one.is_loss)
    rows = _same_decimals(rows) if grid.is_csv else rows
    return Table(tuple(_one_kind_of_size(rows)), names, unsigned, grid.line, tuple(unreadable[:20]))


def _columns(header: Sequence[str]) -> dict[int, _Column]:
    """What each column holds, by its name. The first of several alike counts."""
    columns: dict[int, _Column] = {}
    for i, name in enumerate(header):
        column = _column(name)
        if column and not any(
            (column.measure, column.side, column.is_error) == (one.measure, one.side, one.is_error)
            for one in columns.values()
        ):
            columns[i] = column
    return columns


def _column(name: str) -> _Column | None:
    name = _DELTA_SIGNS.sub(" delta ", name).replace("±", " plusminus ").replace("+/-", " plusminus ")
    name = re.sub(r"[^\x00-\x7f]+", " ", name).lower()
    name = _RATE.sub("tps", name)
    words = re.findall(r"[a-z]+", name)
    found = set(words)
    measure = next((kind for kind, known in _MEASURES.items() if found & known), None)
    side = "delta" if found & _DELTA else next((one for one, known in _SIDES.items() if found & known), "")
    if found & _SKIPPED or (measure is None and not side):
        return None
    if measure is None and not all(word in _DELTA | _SIDES[BASE] | _SIDES[OTHER] for word in words):
        return None
    words += ["percent"] if "%" in name else []
    unit = next((_UNIT_HINTS[word] for word in reversed(words) if word in _UNIT_HINTS), "")
    return _Column(measure or "ppl", side, bool(found & _ERROR), unit, bool(found & _LOSSES))


def _label_column(grid: _Grid, columns: dict[int, _Column]) -> int | None:
    """The column of types or files: by its name, else the first whose cells mostly are types."""
    names = [re.findall(r"[a-z]+", cell.lower()) for cell in grid.header]
    for label in _LABELS:
        for i, words in enumerate(names):
            if label in words and i not in columns:
                return i
    for i in range(len(grid.header)):
        cells = [_clean(row[i]) for row in grid.rows[:50] if i < len(row)]
        if i not in columns and cells and sum(quant_type(cell) is not None for cell in cells) > len(cells) / 2:
            return i
    return None


def _side_name(header: Sequence[str], columns: dict[int, _Column], side: str) -> str:
    """'Standard' out of 'Standard PPL'."""
    for i, one in columns.items():
        if one.side == side and one.measure == "ppl" and not one.is_error:
            name = re.sub(r"(?i)[\s_]*\b(ppl|perplexity)\b|_ppl\b", "", header[i])
            return printable(re.sub(r"\([^()]*\)|[^\w\s\-.]", "", name), 30) or "PPL"
    return side


def _row(
    cells: Sequence[str], columns: dict[int, _Column], label: int, variants: Sequence[int], is_pair: bool
) -> Row | None:
    """One row's figures; None when it has no perplexity."""
    figures: dict[tuple[str, str], Figure] = {}
    errors: dict[tuple[str, str], float] = {}
    for i, column in columns.items():
        figure = parse_figure(cells[i], column.unit) if i < len(cells) else None
        if figure is None:
            continue
        if column.is_error:
            errors[column.measure, column.side] = abs(figure.value)
        elif column.side == "delta" or figure.value > 0:
            figures[column.measure, column.side] = figure
    for place, se in errors.items():
        if place in figures and figures[place].se is None:
            figures[place] = replace(figures[place], se=se)
    name = printable(cells[label]) if label < len(cells) else ""
    sides = [
        Side(figures.get(("ppl", side)), figures.get(("size", side)), figures.get(("speed", side)))
        for side in (BASE, OTHER)
    ]
    if not name or all(side.ppl is None for side in sides):
        return None
    variant = " ".join(printable(cells[i], 20) for i in variants if i < len(cells) and cells[i])
    deltas = {measure: figure for (measure, side), figure in figures.items() if side == "delta"}
    full = f"{name} ({variant})" if variant and variant.lower() not in name.lower() else name
    return Row(full, quant_type(name), variant, sides[0], sides[1] if is_pair else None, deltas)


def _is_unreadable(cells: Sequence[str], i: int, column: _Column) -> bool:
    return i < len(cells) and any(char.isdigit() for char in cells[i]) and parse_figure(cells[i], column.unit) is None


def _one_kind_of_size(rows: Sequence[Row]) -> list[Row]:
    """Sizes can be compared only when all have a unit or none has; the fewer of the two kinds are left out."""
    sizes = [side.size for row in rows for side in (row.base, row.other) if side and side.size]
    with_unit = sum(bool(size.unit) for size in sizes)
    if with_unit in (0, len(sizes)):
        return list(rows)
    keep_unit = 2 * with_unit >= len(sizes)

    def kept(side: Side) -> Side:
        return side if side.size is None or bool(side.size.unit) == keep_unit else replace(side, size=None)

    return [replace(row, base=kept(row.base), other=kept(row.other) if row.other else None) for row in rows]


def _same_decimals(rows: Sequence[Row]) -> list[Row]:
    """Programs that write CSV drop zeros at the end: each column gets the decimals of its longest number."""
    halves: dict[tuple[str, str], float] = {}

    def figures(side: Side | None) -> list[tuple[str, Figure]]:
        named = [("ppl", side.ppl), ("size", side.size), ("speed", side.speed)] if side else []
        return [(measure, figure) for measure, figure in named if figure]

    for row in rows:
        for name, side in ((BASE, row.base), (OTHER, row.other)):
            for measure, figure in figures(side):
                halves[name, measure] = min(figure.half, halves.get((name, measure), figure.half))

    def finer(name: str, side: Side) -> Side:
        return replace(side, **{m: replace(figure, half=halves[name, m]) for m, figure in figures(side)})

    return [
        replace(row, base=finer(BASE, row.base), other=finer(OTHER, row.other) if row.other else None) for row in rows
    ]
