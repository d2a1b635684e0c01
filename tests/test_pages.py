"""Pages: well-formed, self-contained, escaped."""

import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from hilum.pages import Page, figure_png

VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects text by tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def read(page: Page) -> Reader:
    reader = Reader()
    reader.feed(page.render())
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2, 3])
    return figure


def test_sections_tables_notes_and_code(figure):
    page = Page("Title", "What it is about")
    page.text("before any heading")
    page.section("First", "text with `code` in it")
    page.table(["name", "value"], [["a", 1], ["b", None]], best=[(0, 1)])
    page.note("a note")
    page.section("Second")
    page.code("hilum demo\n  --quiet")
    page.figure(figure, "a curve")
    found = read(page)
    assert found.text["h1"] == ["Title"]
    assert found.text["h2"] == ["First", "Second"]
    assert found.text["td"] == ["a", "1", "b", "None"]
    assert found.text["code"] == ["code", "hilum demo\n  --quiet"]
    assert found.text["a"] == ["First", "Second"]
    targets = {a["href"][1:] for t, a in found.attributes if t == "a"}
    assert targets <= {a.get("id") for t, a in found.attributes if t == "section"}
    assert [a.get("class") for t, a in found.attributes if t == "td"] == [None, "best", None, None]


def test_everything_given_is_escaped(figure):
    nasty = '<script>alert("x")</script> & \'"'
    page = Page(nasty, nasty)
    page.section(nasty, f"{nasty} `{nasty}`")
    page.table([nasty], [[nasty]])
    page.note(nasty)
    page.callout(nasty, nasty)
    page.numbers([(nasty, nasty)])
    page.code(nasty)
    page.figure(figure, nasty)
    found = read(page)
    assert not any(tag == "script" for tag, _ in found.attributes)
    assert "".join(found.text["h1"]) == nasty
    assert "".join(found.text["td"]) == nasty
    assert next(a["alt"] for t, a in found.attributes if t == "img") == nasty


def test_a_page_needs_nothing_else(figure):
    page = Page("T", "L")
    page.figure(figure, "c")
    text = page.render()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_figures_are_pngs_and_repeat_byte_for_byte(figure):
    page = Page("T")
    page.figure(figure, "c", alt="what one sees")
    source = re.search(r'src="data:image/png;base64,([^"]+)" alt="what one sees"', page.render())
    assert source is not None
    data = base64.b64decode(source.group(1))
    assert data.startswith(b"\x89PNG")
    assert data == figure_png(figure)


def test_a_page_is_written_whole(tmp_path):
    page = Page("Übersicht", "µ ≥ 3")
    page.write(tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == page.render()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_an_odd_backquote_does_not_break_the_page():
    page = Page("T")
    page.text("it's 5` long, and `this` is code")
    read(page)


def test_callouts_and_numbers():
    page = Page("T")
    page.callout("one\ntwo", "bad")
    page.numbers([("files", "4,829")])
    found = read(page)
    assert found.text["div"] == ["one\ntwo"]
    assert (found.text["dt"], found.text["dd"]) == (["files"], ["4,829"])
    assert ("div", {"class": "callout bad"}) in found.attributes
