"""A page says the same as HTML and as Markdown, and its HTML needs no other file."""

from __future__ import annotations

import base64
import re

from gatedadapters.reporting.pages import Heading, Picture, Table, Text, html_page, markdown_page

PARTS = [
    Heading("What & why"),
    Text("1 < 2"),
    Text("a: 1\nb: <x>", verbatim=True),
    Table(["factor", "points"], [["a|b", "1.5"]]),
    Picture("p.png", 'A "curve"', b"\x89PNG"),
]


def test_html_escapes_every_text_and_holds_its_pictures() -> None:
    page = html_page("T & U", PARTS)
    assert "<title>T &amp; U</title>" in page
    assert "<h2>What &amp; why</h2>" in page
    assert "<p>1 &lt; 2</p>" in page
    assert "<pre>a: 1\nb: &lt;x&gt;</pre>" in page
    assert re.search(r"<td[^>]*>a\|b</td><td[^>]*>1.5</td>", page)
    data = base64.b64encode(b"\x89PNG").decode()
    assert f'<img alt="A &quot;curve&quot;" src="data:image/png;base64,{data}">' in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_markdown_has_the_same_parts_beside_the_picture_files() -> None:
    assert markdown_page("T & U", PARTS) == (
        "# T & U\n\n## What & why\n\n1 < 2\n\n```\na: 1\nb: <x>\n```\n\n"
        '| factor | points |\n| --- | --- |\n| a\\|b | 1.5 |\n\n![A "curve"](p.png)\n'
    )
