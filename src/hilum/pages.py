"""Self-contained HTML pages: headings, paragraphs, tables, figures. Knows nothing of what it shows."""

import html
import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hilum.records import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e9; --paper: #fff; --ground: #f4f6f9; --accent: #0b6e8a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9f0; --soft: #9aa6b5; --line: #2d3642; --paper: #161c24; --ground: #0f141a; --accent: #56b8d4; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
.lead { color: var(--soft); margin: 0 0 2rem; max-width: 46rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 1.4rem 1.6rem; margin: 0 0 1.3rem; }
section p { max-width: 46rem; margin: .3rem 0 1rem; }
nav { margin: 0 0 1.6rem; font-size: .92rem; } nav a { display: inline-block; margin-right: 1.1rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0 0 1rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { white-space: pre-line; }
th { color: var(--soft); font-weight: 600; } td.best { font-weight: 700; color: var(--accent); }
figure { margin: .8rem 0 1.4rem; } figure img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
figcaption, .note { color: var(--soft); font-size: .88rem; margin-top: .45rem; max-width: 52rem; }
code { font: .9em ui-monospace, monospace; background: var(--ground); padding: .1em .35em; border-radius: 4px; }
td code { white-space: nowrap; }
pre { background: var(--ground); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; } pre code { padding: 0; }
.callout { border-left: 4px solid var(--soft); background: var(--ground); padding: .7rem 1rem; border-radius: 0 6px 6px 0; }
.callout { white-space: pre-line; margin: 0 0 1.1rem; } .good { border-color: #2c9f5c; } .bad { border-color: #d9483d; }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 0 0 1rem; }
dt { color: var(--soft); font-size: .82rem; } dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  main { padding: 1.2rem .6rem 2rem; } section { padding: 1rem .9rem; }
  figure { overflow-x: auto; } figure img { max-width: none; min-width: 36rem; width: 100%; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --ground: #fff; --accent: #000; }
  main { max-width: none; padding: 0; } nav { display: none; } section { border: 0; padding: 0; }
  figure, tr, .callout { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


@dataclass
class Page:
    """A page under construction; `write` makes one file that needs nothing else."""

    title: str
    lead: str = ""
    _sections: list[tuple[str, list[str]]] = field(default_factory=list)

    def section(self, heading: str, text: str = "") -> None:
        """Begin a section. Text given to a page is escaped; `code` in backquotes is set as code."""
        self._sections.append((heading, []))
        if text:
            self.text(text)

    def _add(self, fragment: str) -> None:
        if not self._sections:
            self._sections.append(("", []))
        self._sections[-1][1].append(fragment)

    def text(self, text: str) -> None:
        self._add(f"<p>{_inline(text)}</p>")

    def note(self, text: str) -> None:
        self._add(f'<p class="note">{_inline(text)}</p>')

    def callout(self, text: str, tone: str = "") -> None:
        """A paragraph set apart, its lines kept; tone "good", "bad" or "" gives the colour of its edge."""
        self._add(f'<div class="callout {html.escape(tone)}">{_inline(text)}</div>')

    def numbers(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Headline numbers: (name, number), the number large."""
        items = "".join(f"<div><dt>{_inline(name)}</dt><dd>{_inline(number)}</dd></div>" for name, number in pairs)
        self._add(f"<dl>{items}</dl>")

    def code(self, text: str) -> None:
        self._add(f"<pre><code>{html.escape(text)}</code></pre>")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Any]], best: Sequence[tuple[int, int]] = ()
    ) -> None:
        """A table; `best` names (row, column) cells to set apart."""
        marked = set(best)
        head = "".join(f"<th>{_inline(c)}</th>" for c in columns)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{' class=best' if (r, c) in marked else ''}>{_inline(str(cell))}</td>"
                for c, cell in enumerate(row)
            )
            + "</tr>"
            for r, row in enumerate(rows)
        )
        self._add(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def figure(self, figure: "Figure", caption: str, *, alt: str = "") -> None:
        """Embed a matplotlib figure as PNG."""
        data = b64encode(figure_png(figure)).decode()
        self._add(
            f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt or caption)}">'
            f"<figcaption>{_inline(caption)}</figcaption></figure>"
        )

    def render(self) -> str:
        named = [(f"s{n}", heading, parts) for n, (heading, parts) in enumerate(self._sections)]
        links = "".join(f'<a href="#{anchor}">{html.escape(heading)}</a>' for anchor, heading, _ in named if heading)
        body = "".join(
            f'<section id="{anchor}">'
            + (f"<h2>{html.escape(heading)}</h2>" if heading else "")
            + "".join(parts)
            + "</section>"
            for anchor, heading, parts in named
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body><main>"
            f'<h1>{html.escape(self.title)}</h1><p class="lead">{_inline(self.lead)}</p><nav>{links}</nav>{body}'
            "</main></body></html>\n"
        )

    def write(self, path: Path) -> None:
        write_text(path, self.render())


def figure_png(figure: "Figure", dpi: int = 110) -> bytes:
    """A figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _inline(text: str) -> str:
    """Escape, and set `code` in backquotes."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if n % 2 else part for n, part in enumerate(parts))
