"""Pages of headings, paragraphs, tables and pictures, written as one HTML file or as Markdown beside its pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gatedadapters.reporting import html
from gatedadapters.reporting.tables import markdown_table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { border-bottom: 1px solid #e1e4e7; vertical-align: top }
pre { background: #f5f6f7; padding: .8rem; overflow-x: auto; font-size: 12px }
img { max-width: 100% }
"""


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str

    def as_html(self) -> str:
        """A heading of the second level."""
        return f"<h2>{escape(self.text)}</h2>"

    def as_markdown(self) -> str:
        """A heading of the second level."""
        return f"## {self.text}"


@dataclass(frozen=True)
class Text:
    """A paragraph; `verbatim` keeps its lines as they are."""

    text: str
    verbatim: bool = False

    def as_html(self) -> str:
        """A paragraph or preformatted text."""
        tag = "pre" if self.verbatim else "p"
        return f"<{tag}>{escape(self.text)}</{tag}>"

    def as_markdown(self) -> str:
        """A paragraph or a code block."""
        return f"```\n{self.text}\n```" if self.verbatim else self.text


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_html(self) -> str:
        """See `reporting.html.table`."""
        return html.table(self.header, self.rows)

    def as_markdown(self) -> str:
        """See `reporting.tables.markdown_table`."""
        return markdown_table(self.header, self.rows)


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        file: its name beside the Markdown.
        caption: what it shows, for readers who cannot see it.
        png: the bytes of the file.
    """

    file: str
    caption: str
    png: bytes

    def as_html(self) -> str:
        """The picture inside the page, so that no other file is needed."""
        data = base64.b64encode(self.png).decode()
        return f'<p><img alt="{escape(self.caption)}" src="data:image/png;base64,{data}"></p>'

    def as_markdown(self) -> str:
        """A reference to the file."""
        return f"![{self.caption}]({self.file})"


Part = Heading | Text | Table | Picture


def html_page(title: str, parts: Sequence[Part]) -> str:
    """A page that needs no other file."""
    body = "\n".join(part.as_html() for part in parts)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return (
        f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def markdown_page(title: str, parts: Sequence[Part]) -> str:
    """The same page as Markdown; its pictures are to be written beside it."""
    return "\n\n".join([f"# {title}", *(part.as_markdown() for part in parts)]) + "\n"
