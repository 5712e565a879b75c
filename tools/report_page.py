"""Makes the HTML of tools/report.py: tables, pictures, sounds, and the page around them.

All text from outside passes through `text`, which escapes it.
"""

import html
import math
from collections.abc import Iterable

from cli import shown

from tools.compare import as_cell

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc } nav a { margin-right: 1em }
table { border-collapse: collapse; margin: .6em 0; font-size: 14px }
table { display: block; overflow-x: auto }
td, th { padding: .15em .6em; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap }
img { max-width: 100%; display: block } audio { height: 2em; vertical-align: middle }
code { font-size: 13px; overflow-wrap: anywhere } .missing { color: #666; font-style: italic }
.pairs td { border: 0; padding: 0 .35em } .wrong { background: #fdd } .side { color: #888 }
.unsure { opacity: .5 } .bar { background: #4878b0; height: .8em; display: inline-block }
.tables { display: flex; flex-wrap: wrap; gap: 2.5em }
"""


def text(value) -> str:
    """Escapes text from outside for HTML."""
    return html.escape(shown(value, math.inf) if isinstance(value, str) else as_cell(value))


def table(header: Iterable, rows: Iterable[Iterable]) -> str:
    """Makes a table; cells that are no Html are escaped."""
    lines = [f"<tr>{''.join(f'<th>{text(name)}</th>' for name in header)}</tr>"]
    for row in rows:
        cells = (cell if isinstance(cell, Html) else text(cell) for cell in row)
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


class Html(str):
    """Marks a text as HTML, which is not escaped again."""


def bar(share: float) -> Html:
    """Draws a share, of which 1 and more fill 12 em."""
    return Html(f'<span class="bar" style="width:{12 * min(share, 1):.2f}em"></span>')


def image(source: str) -> str:
    return f'<img alt="" src="{source}">'


def player(source: str) -> Html:
    return Html(f'<audio controls preload="none" src="{source}"></audio>')


def missing(reason) -> str:
    return f'<p class="missing">Not here: {text(str(reason))}</p>'


def make_page(name: str, command: str | None, sections: dict[str, str]) -> str:
    """Joins the sections, by title, to a page that loads nothing from elsewhere.

    `name` is that of the run, `command` what began it.
    """
    title = f"Report of {text(name)}"
    links = "".join(
        f'<a href="#s{number}">{text(part)}</a>' for number, part in enumerate(sections)
    )
    bodies = "".join(
        f'<h2 id="s{number}">{text(part)}</h2>{body}'
        for number, (part, body) in enumerate(sections.items())
    )
    said = f"<p><code>{text(command)}</code></p>" if command else ""
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style>'
        f"</head><body><h1>{title}</h1>{said}<nav>{links}</nav>{bodies}</body></html>\n"
    )
