"""Tables as Markdown, HTML and LaTeX. Text in, text out; every cell is escaped."""

import html
from itertools import count

from harness.tables import Table

WIDTH = 118  # of a terminal that has 120 columns


def markdown(table: Table) -> str:
    """Padded so that it reads in a terminal as well, and without spaces at the bars where it would be too wide. Notes
    follow as paragraphs."""
    rows = [[_plain(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    space = " " if sum(widths) + 3 * len(widths) + 1 <= WIDTH + 2 else ""
    bar = f"{space}|{space}"
    lines = [f"|{space}{bar.join(map(str.ljust, cells, widths))}{space}|" for cells in rows]
    return "\n".join([*lines, *(f"\n{_plain(note)}" for note in table.notes)])


def _plain(cell: str) -> str:
    """Without what Markdown would take for a bar, a tag or a new line."""
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("\r", " ")


def html_table(table: Table) -> str:
    """A table that the script of `harness.page` sorts by a click on its header, and its notes."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    notes = "".join(f"\n<p>{html.escape(note)}</p>" for note in table.notes)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>{notes}"


_LATEX = str.maketrans(
    {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "Δ": r"$\Delta$",
        "≥": r"$\ge$",
        "<": r"$<$",
        ">": r"$>$",
    }
)


def latex(table: Table) -> str:
    """A booktabs tabular inside a table, and its notes; wants \\usepackage{booktabs}."""

    def escaped(text: str) -> str:
        return text.translate(_LATEX)

    def line(cells: tuple[str, ...]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    columns = "".join("l" if i == 0 else "r" for i, _ in zip(count(), table.header, strict=False))
    rows = "\n".join(line(row) for row in table.rows)
    return "\n".join(
        (
            r"\begin{table}",
            rf"\caption{{{escaped(table.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(table.header),
            r"\midrule",
            rows,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par {escaped(note)}" for note in table.notes),
            r"\end{table}",
        )
    )
