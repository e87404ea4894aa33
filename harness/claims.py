"""What the text of a card says about its table, where the two can be tied together, and what contradicts it. Pure."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from harness.card import Figure, Row, Table, parse_figure, printable, quant_type
from harness.checks import Finding

_MAX_LINE = 600  # characters: a sentence, not a page on one line
_MAX_SENTENCES = 2000
_MAX_FIGURES = 8  # in one sentence
_MAX_FINDINGS = 40
_NEAR = 80  # characters between a figure and the word that says what it measures

_NUMBER = r"[+\-−]?\s?\d{1,4}(?:\.\d{1,4})?"
_LESS = r"<|≤|under|below|less than|within|at most|no more than|up to|max(?:imum)?(?: of)?"
_PERCENT = re.compile(
    rf"(?P<bound>{_LESS})?\s{{0,2}}(?P<a>{_NUMBER})\s?%?(?:\s?(?:-|–|to)\s?(?P<b>{_NUMBER}))?\s?(?:%|percent\b)",
    re.IGNORECASE,
)
_UNIT = r"[KMGT](?:i?B)?(?![A-Za-z])"
_BYTES = re.compile(
    rf"(?P<bound>{_LESS})?\s{{0,2}}(?P<a>{_NUMBER})\s?(?:{_UNIT})?(?:\s?(?:-|–|to)\s?(?P<b>{_NUMBER}))?\s?(?P<unit>{_UNIT})",
    re.IGNORECASE,
)
_MEASURES = {
    "ppl": re.compile(r"perplexit\w+|\bppl\b", re.IGNORECASE),
    "size": re.compile(r"\bsizes?\b|\bsmaller\b|\blarger\b|\bbigger\b", re.IGNORECASE),
    "speed": re.compile(
        r"\bspeeds?\b|\bslower\b|\bfaster\b|\blatency\b|inference time|throughput|slow-?down", re.IGNORECASE
    ),
}
_DOWN = re.compile(
    r"\b(?:reduc\w+|lower\w*|cuts?|decreas\w+|drop\w*|falls?|improv\w+|better|less|smaller)\b", re.IGNORECASE
)
_UP = re.compile(r"\b(?:higher|increas\w+|larger|bigger|worse|rises?|more|adds?|adding|overhead)\b", re.IGNORECASE)
_SLOWER = re.compile(r"\bslower\b|slow-?down", re.IGNORECASE)
_FASTER = re.compile(r"\bfaster\b|speed-?up", re.IGNORECASE)
_GROWTH = re.compile(r"increas|overhead|larger|bigger|\badd|extra|additional|grow|size difference", re.IGNORECASE)
_OTHER_BASE = re.compile(r"\b(?:bf16|fp?16|fp?32|full.precision|unquantized|original|calibrat\w+)\b", re.IGNORECASE)
_CLAIM = re.compile(r"\b(?:reduc\w+|improv\w+|better|lower\w*|cuts?|higher|faster|boost\w*)\b", re.IGNORECASE)
# "11% of the weights": how much of something, not by how much it changed.
_SHARE = re.compile(r"\s+of\s+(?:(?:the|its|their|all)\s+)?(?:weights|parameters|tensors|layers|bytes|tokens)\b", re.I)
_WORD_OF_TYPE = re.compile(r"(?<![A-Za-z0-9])I?Q\d_[A-Za-z0-9_]{1,8}", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """other against base of one row: per cent, or a difference of sizes; low and high: what rounding leaves open."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Claim:
    """A figure in the text. bound: 'less', 'up to' or ''; high: end of a range."""

    text: str
    bound: str
    low: Figure
    high: Figure | None


def percent_change(base: Figure | None, other: Figure | None) -> Change | None:
    """100 * (other / base - 1), and its range over everything that rounds to the printed figures."""
    if base is None or other is None or (base.unit != other.unit and base.scale == other.scale == 1):
        return None
    a, b = base.scale, other.scale
    if base.value <= base.half:
        return None
    low = 100 * ((other.value - other.half) * b / ((base.value + base.half) * a) - 1)
    high = 100 * ((other.value + other.half) * b / ((base.value - base.half) * a) - 1)
    return Change(100 * (other.value * b / (base.value * a) - 1), low, high)


def size_change(row: Row, unit: str) -> Change | None:
    """Difference of a row's sizes in `unit`. A letter alone means what it means in the sizes' own column."""
    if row.other is None or row.base.size is None or row.other.size is None:
        return None
    base, other = row.base.size, row.other.size
    same_letter = unit[:1].upper() == base.unit[:1].upper() == other.unit[:1].upper() and base.scale == other.scale
    scale = base.scale if same_letter else Figure(1, 1, 1, unit).scale
    value = (other.value * other.scale - base.value * base.scale) / scale
    half = (other.half * other.scale + base.half * base.scale) / scale
    return Change(value, value - half, value + half)


def claim_findings(lines: Sequence[str], table: Table) -> list[Finding]:
    """Every sentence with a figure that this table contradicts or cannot support; each sentence once."""
    if not table.is_pair:
        return []
    findings: list[Finding] = []
    sentences = dict.fromkeys(line.strip() for line in lines if len(line) <= _MAX_LINE and re.search(r"\d", line))
    for line in islice(sentences, _MAX_SENTENCES):
        if "|" in line:
            continue
        if len(findings) >= _MAX_FINDINGS:
            break
        rows = _rows_named(line, table)
        if rows is not None and not _OTHER_BASE.search(line):
            findings += _percent_findings(line, rows, table)
            findings += _size_findings(line, rows, table)
    return findings


def _rows_named(line: str, table: Table) -> list[Row] | None:
    """The rows that a line names; none when it names no type; None when it is about files that are not in the table."""
    types = {quant_type(word) or word.upper() for word in _WORD_OF_TYPE.findall(line)}
    known = {row.type for row in table.rows}
    return None if types - known else [row for row in table.rows if row.type in types]


def _claims(pattern: re.Pattern[str], line: str) -> Iterator[tuple[re.Match[str], _Claim]]:
    for match in islice(pattern.finditer(line), _MAX_FIGURES):
        unit = match.groupdict().get("unit") or "%"
        low, high = (parse_figure(f"{match[name].replace(' ', '')}{unit}") if match[name] else None for name in "ab")
        start = match.end("a") - len(match["a"].lstrip())
        before = line[max(0, start - 1) : start]
        if low is None or before.isalnum() or before in (".", "_"):
            continue
        word = (match["bound"] or "").lower()
        bound = "up to" if word.startswith(("up", "max")) else "less" if word else ""
        yield match, _Claim(printable(line, 100), bound, low, high)


def _percent_findings(line: str, rows: Sequence[Row], table: Table) -> Iterator[Finding]:
    for match, claim in _claims(_PERCENT, line):
        measure = _measure_near(line, match)
        if measure:
            wrong = _against_percent(claim, measure, _direction(line, match, measure, table), rows, table)
            if wrong:
                yield _contradicted(claim, wrong)
        elif (
            not _SHARE.match(line, match.end())
            and not any(word.search(line) for word in _MEASURES.values())
            and _CLAIM.search(line)
        ):
            yield _unsupported(claim, rows)


def _measure_near(line: str, match: re.Match[str]) -> str | None:
    """What a figure measures: the nearest word that says it. None when two are about as near, or none is."""
    near = []
    for name, pattern in _MEASURES.items():
        gaps = [max(match.start() - word.end(), word.start() - match.end()) for word in pattern.finditer(line)]
        if gaps and min(gaps) <= _NEAR:
            near.append((min(gaps), name))
    near.sort()
    return near[0][1] if near and (len(near) == 1 or near[1][0] - near[0][0] > 5) else None


def _direction(line: str, match: re.Match[str], measure: str, table: Table) -> int:
    """-1: a fall of the printed figure is claimed; +1: a rise; 0: either."""
    around = line[max(0, match.start() - 40) : match.end() + 40]
    if measure == "speed":
        is_rate = any(row.base.speed and row.base.speed.unit == "/s" for row in table.rows)
        slower = (_SLOWER.search(around) is not None) - (_FASTER.search(around) is not None)
        return -slower if is_rate else slower
    return (_UP.search(around) is not None) - (_DOWN.search(around) is not None)


def _against_percent(claim: _Claim, measure: str, direction: int, rows: Sequence[Row], table: Table) -> str | None:
    """What the table has instead; None when it agrees or cannot tell."""
    changes = []
    for row in rows or table.rows:
        other = row.other
        change = percent_change(getattr(row.base, measure), getattr(other, measure)) if other else None
        if change is not None:
            changes.append((row, change))
    if not changes:
        return None
    sized = [(row, change, *_size_of(change, direction)) for row, change in changes]
    limit = claim.high or claim.low
    top = abs(limit.value) + (limit.half if claim.bound != "less" or claim.high else 0)
    if claim.bound or claim.high:
        beyond = [f"{row.label} {change.value:+.1f}%" for row, change, low, _ in sized if low >= top]
        rounding = [
            f"{row.label} {c.value:+.1f}%" for row, c, low, _ in sized if low < top <= abs(c.value) and direction == 0
        ]
        if beyond:
            return ", ".join(beyond) + (f"; {', '.join(rounding)} within rounding" if rounding else "")
        if claim.high:
            bottom = abs(claim.low.value) - claim.low.half
            under = [f"{row.label} {change.value:+.1f}%" for row, change, _, high in sized if high < bottom]
            return ", ".join(under) or None
        if claim.bound == "up to" and all(high < abs(limit.value) - limit.half for *_, high in sized):
            return f"no row gets there: {_most(changes, direction)}"
        return None
    if direction == 0 or (not rows and measure == "size"):
        return None
    if any(low - limit.half <= abs(limit.value) <= high + limit.half for *_, low, high in sized):
        return None
    if not rows and min(low for *_, low, _ in sized) <= abs(limit.value) <= max(high for *_, high in sized):
        return None  # it may be a mean over rows
    return ", ".join(f"{row.label} {change.value:+.1f}%" for row, change in changes)


def _size_of(change: Change, direction: int) -> tuple[float, float]:
    """Least and greatest size of a change in the claimed direction, per cent; below 0 when it goes the other way."""
    if direction:
        return min(direction * change.low, direction * change.high), max(
            direction * change.low, direction * change.high
        )
    least = 0.0 if change.low <= 0 <= change.high else min(abs(change.low), abs(change.high))
    return least, max(abs(change.low), abs(change.high))


def _most(changes: Sequence[tuple[Row, Change]], direction: int) -> str:
    row, change = max(changes, key=lambda one: direction * one[1].value if direction else abs(one[1].value))
    return f"at most {row.label} {change.value:+.1f}%"


def _size_findings(line: str, rows: Sequence[Row], table: Table) -> Iterator[Finding]:
    if not _GROWTH.search(line):
        return
    for _, claim in _claims(_BYTES, line):
        unit = claim.low.unit if claim.high is None else claim.high.unit
        if not (rows or claim.high or claim.bound):
            continue  # the size of anything
        wrong = []
        for row in rows or table.rows:
            change = size_change(row, unit)
            top, bottom = claim.high or claim.low, claim.low
            slack = 0.08 * abs(top.value) if row.base.size and row.base.size.unit != unit else 0.0  # GB or GiB
            if change is None or not (row.base.size and row.base.size.unit):
                continue
            too_much = change.low > abs(top.value) + top.half + slack
            too_little = not claim.bound and change.high < abs(bottom.value) - bottom.half - slack
            if too_much or too_little:
                wrong.append(f"{row.label} {change.value:+.2f}{unit}")
        if wrong:
            yield _contradicted(claim, ", ".join(wrong))


def _contradicted(claim: _Claim, instead: str) -> Finding:
    return Finding(
        "claim_contradicted",
        f"the text says {claim.text!r}; the table has {instead}",
        "the sentence is what readers remember",
        "correct the sentence, or name the rows that it holds for",
    )


def _unsupported(claim: _Claim, rows: Sequence[Row]) -> Finding:
    same = []
    for row in rows:
        change = percent_change(row.base.ppl, row.other.ppl if row.other else None)
        if change and abs(abs(claim.low.value) - abs(change.value)) <= 2 * claim.low.half:
            same.append(row.label)
    instead = f" ({claim.low.text} is the change of perplexity of {', '.join(same)})" if same else ""
    return Finding(
        "claim_without_figures",
        f"the text says {claim.text!r}; no column of the table measures that{instead}",
        "a reader cannot check it",
        "publish the figures behind it, or name what was measured",
    )
