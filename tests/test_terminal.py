"""Progress where nobody looks at a terminal, and tables that fit."""

import io

import pytest

from hilum import terminal
from hilum.terminal import Reporter, format_table, wrap_row


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_five_seconds(capsys, clock):
    with Reporter() as progress:
        for done in range(1, 1204):
            clock[0] += 0.015625  # a power of two, so that sums are exact
            progress(done, 1203, f"pre-training, loss {done / 100:.1f}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "pre-training, loss 3.2: 321/1,203 after 5 s",
        "pre-training, loss 6.4: 641/1,203 after 10 s",
        "pre-training, loss 9.6: 961/1,203 after 15 s",
        "pre-training, loss 12.0: 1,203/1,203 after 19 s",
    ]


def test_short_work_and_quiet_work_say_nothing(capsys, clock):
    with Reporter() as progress:
        for done in range(1, 4):
            clock[0] += 1
            progress(done, 3, "scan")
    with Reporter(quiet=True) as progress:
        for done in range(1, 100):
            clock[0] += 1
            progress(done, None, "scan")
    assert capsys.readouterr().err == ""


def test_each_topic_has_its_own_clock(capsys, clock):
    with Reporter() as progress:
        progress(1, None, "reading")
        clock[0] += 6
        progress(2, None, "reading")
        progress(1, 2, "writing")
        clock[0] += 4
        progress(2, 2, "writing")
    assert capsys.readouterr().err == "reading: 2 after 6 s\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(terminal.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Reporter() as progress:
        for done in range(1, 6):
            progress(done, 5, f"pre-training, loss {done}")
    text = screen.getvalue()
    assert "pre-training, loss 5" in text
    assert "5/5" in text


def test_tables():
    text = format_table(["reason", "files", "share"], [["localizer", 1200, 0.5], ["broken", 3, 0.25]])
    assert text.splitlines() == [
        "reason     files  share",
        "─────────  ─────  ─────",
        "localizer  1,200  0.500",
        "broken         3  0.250",
    ]


def test_wide_tables_are_cut_to_fit():
    text = format_table(["a", "b"], [["x" * 50, "word " * 40], ["y", "z"]], width=60)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[2].endswith("…")
    assert format_table(["only", "head"], []).splitlines()[0] == "only  head"


def test_some_columns_are_cut_last():
    rows = [["a" * 30, "-0.116 to +0.229", "b" * 20]]
    assert "-0.116 to +0.229" in format_table(["x", "interval", "y"], rows, 50, whole=("interval", "y")).splitlines()[2]
    for width in (50, 30, 20):
        table = format_table(["x", "interval", "y"], rows, width, whole=("interval",))
        assert max(map(len, table.splitlines())) <= width
        assert ("-0.116 to +0.229" in table) == (width >= 32)


def test_truth_values_and_text_are_left_alone():
    assert format_table(["flag", "n"], [[True, "7"]]).splitlines()[2].split() == ["True", "7"]


def test_rows_wrap_their_text_and_keep_their_cells():
    text = "the quick brown fox jumps over the lazy dog"
    assert wrap_row(["ab", "c"], [3, 2], text, 30).splitlines() == [
        "ab   c   the quick brown fox",
        "         jumps over the lazy",
        "         dog",
    ]
    assert wrap_row(["ab", "too long"], [3, 2], "the quick", 20).splitlines() == ["ab   too long", "         the quick"]
    assert wrap_row(["ab", "c"], [3, 2], "") == "ab   c"
