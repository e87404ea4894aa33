"""One self-contained HTML page of a sweep: it opens offline, with no script or font from elsewhere."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.formats import html_table
from harness.tables import Table

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { cursor: pointer; background: #f6f6f6; } th:hover { background: #e8e8e8; }
tr:hover td { background: #fafafa; }
figure { margin: 1.5em 0; } img { max-width: min(100%, 800px); height: auto; }
figcaption { color: #555; font-size: 13px; }
.finding { border-left: 4px solid #E69F00; padding-left: .8em; margin: .8em 0; }
.finding b { font-family: monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em; } dt { color: #666; }
dd { margin: 0; overflow-wrap: anywhere; }
"""
# Sorts by the number a cell begins with, else by its text; a second click turns the order.
_SCRIPT = """
for (const th of document.querySelectorAll('th')) th.onclick = () => {
  const body = th.closest('table').tBodies[0], i = th.cellIndex, down = th.dataset.down !== '1';
  const value = row => { const text = row.cells[i].textContent.trim(), n = parseFloat(text.replace(/^[^0-9+-]*/, ''));
    return isNaN(n) ? text : n * (/^[^ ]*G/.test(text) ? 1024 : 1); };
  const rows = [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    return typeof x === typeof y ? (x > y) - (x < y) : typeof x === 'number' ? -1 : 1; });
  th.dataset.down = down ? '1' : '0';
  body.append(...(down ? rows : rows.reverse()));
};
"""


def page(
    title: str,
    summary: Sequence[str],
    tables: Sequence[Table],
    pictures: Mapping[Path, str],
    findings: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
) -> str:
    """The whole page. pictures: PNG -> caption; findings: kind, what, why, todo, cases; facts: by section."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += ["<h2>Summary</h2>", "<ul>", *(f"<li>{html.escape(line)}</li>" for line in summary), "</ul>"]
    for table in tables:
        parts += [f"<h2>{html.escape(table.title)}</h2>", f'<div class="scroll">{html_table(table)}</div>']
    if pictures:
        parts.append("<h2>Plots</h2>")
    for path, caption in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        text = html.escape(caption)
        parts.append(f'<figure><img alt="{text}" src="data:image/png;base64,{data}">')
        parts.append(f"<figcaption>{text}</figcaption></figure>")
    parts.append("<h2>Findings</h2>")
    for finding in findings:
        said = {name: html.escape(str(finding[name])) for name in ("kind", "what", "why", "todo", "cases")}
        parts.append(
            f'<div class="finding"><b>{said["kind"]}</b> {said["cases"]}: {said["what"]}.<br>'
            f"{said['why']}; {said['todo']}.</div>"
        )
    for section, values in facts.items():
        parts += [f"<h2>{html.escape(section)}</h2>", "<dl>"]
        parts += [f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in values.items()]
        parts.append("</dl>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_CSS}</style></head>\n<body>\n{body}\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )
