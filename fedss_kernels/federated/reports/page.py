"""An HTML page that needs no other file, and its sections on what else was measured in its folder."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_section(
    folder: Path,
    name: str,
    title: str,
    words: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    png: bytes | None = None,
) -> None:
    """To report.html, of a run or of other sections; it is made where there is none."""
    parts = [f"<h2>{escape(title)}</h2>", f"<p>{escape(words)}</p>", html_table(header, rows)]
    if png:
        image = f'<img alt="{escape(title)}" src="{data_uri(png)}">'
        parts.append(f'<figure class="plain">{image}</figure>')
    write_whole(folder / f"section-{name}.html", "\n".join(parts) + "\n")
    _put_in(folder)


def remove_section(folder: Path, name: str) -> None:
    """From report.html, if it is there."""
    section = folder / f"section-{name}.html"
    if section.exists():
        section.unlink()
        _put_in(folder)


def _put_in(folder: Path) -> None:
    """The sections that are in the folder, into report.html."""
    report = folder / "report.html"
    page = report.read_text(encoding="utf-8") if report.exists() else html_page(_MEASURED, [], folder)
    before, begun, rest = page.partition(_BESIDES)
    _, ended, after = rest.partition(_BESIDES_END)
    if not (begun and ended):  # a page without: at its end
        before, end, after = page.rpartition("</main>")
        before, after = before or after, end and end + after
    write_whole(report, before + _besides(folder) + after)


def write_sections(folder: Path) -> None:
    """report.html of what was measured in this folder, where there is no run."""
    write_whole(folder / "report.html", html_page(_MEASURED, [], folder))


def png_of(figure: "Figure", **options: Any) -> bytes:
    """options: savefig's"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def cards(figures: Sequence[tuple[str, str]]) -> str:
    cards = "".join(f"<div><strong>{escape(value)}</strong>{escape(text)}</div>" for value, text in figures)
    return f'<div class="cards">{cards}</div>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = "words" if words else "figures"
    head, body = f"<thead><tr>{head}</tr></thead>", f"<tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'


def _besides(folder: Path) -> str:
    """The sections of what else was measured in this folder, between marks that another is put in by."""
    found = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("section-*.html"))]
    return "\n".join([_BESIDES, *found, _BESIDES_END])


def html_page(title: str, sections: Sequence[str], folder: Path) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>\n"
        + "\n".join([*sections, _besides(folder)])
        + "\n</main></body></html>\n"
    )


_MEASURED = "What was measured"
_BESIDES = "<!-- what else was measured -->"
_BESIDES_END = "<!-- the end of what else was measured -->"
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1e21; --soft: #5b6270; --line: #d9dce1; --card:
#f4f5f7; } @media (prefers-color-scheme: dark) {
  :root { --paper: #1b1e24; --ink: #e6e8ec; --soft: #a4abb8; --line: #3a3f49; --card: #262a32; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
p, dd, figcaption { max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem; margin: 1.5rem
0; } .cards div { background: var(--card); border-radius: .6rem; padding: 1rem; color: var(--soft); font-size:
.9rem; } .cards strong { display: block; color: var(--ink); font-size: 1.6rem; } .failed { border-left: 4px
solid #D55E00; padding-left: .75rem; } figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
.plain img { background: #ffffff; }
figcaption { color: var(--soft); font-size: .9rem; } .wide { overflow-x: auto; } table { border-collapse:
collapse; font-size: .92rem; font-variant-numeric: tabular-nums; } th, td { padding: .4rem .65rem;
border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; } th { color: var(--soft);
font-weight: 600; vertical-align: bottom; } .figures td:not(:first-child), .figures th:not(:first-child) {
text-align: right; } .figures td:not(:first-child) { white-space: nowrap; } dt { font-weight: 600; margin-top:
.6rem; } dd { margin: 0 0 0 1rem; color: var(--soft); }
"""
