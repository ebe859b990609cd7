"""Progress goes to stderr: plain lines where it is no terminal, nothing when quiet."""

import io

import pytest

from protformer.cli import progress
from protformer.cli.progress import byte_progress, count_progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_away_from_a_terminal_there_is_one_plain_line_each_30_seconds(capsys, clock, tmp_path):
    file = tmp_path / "a.fa"
    file.write_bytes(b"x" * 1000)
    with byte_progress([str(file)], quiet=False) as advance:
        for _ in range(10):
            clock.now += 10
            advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading: 300 of 1,000 (30%)", "reading: 600 of 1,000 (60%)", "reading: 900 of 1,000 (90%)"]


def test_quiet_is_silent(capsys, clock):
    with count_progress("maps", quiet=True) as advance:
        clock.now += 100
        advance(1)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar(monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    file = tmp_path / "a.fa"
    file.write_bytes(b"x" * 1000)
    with byte_progress([str(file)], quiet=False) as advance:
        advance(1000)
    assert "reading" in terminal.getvalue()
