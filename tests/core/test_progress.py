from __future__ import annotations

import sys
import time

import pytest

from nh2st_pipe.core.progress import PlainProgress, RichProgress, progress_for_terminal


def test_a_log_gets_a_line_every_fifteen_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with PlainProgress() as progress:
        progress.start("embedding", 1000, "tiles")
        for second in range(1, 32):
            clock[0] += 1
            progress.advance(10 * second, 1000, "s1")
        progress.say("s1: 1,000 tiles done")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "embedding s1: 150 of 1,000 tiles, 10.0 tiles/s, 85 s left",
        "embedding s1: 300 of 1,000 tiles, 10.0 tiles/s, 70 s left",
        "s1: 1,000 tiles done",
    ]


def test_a_bar_takes_any_name_and_is_gone_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RichProgress()
    with progress:
        progress.say("before anything has begun [/x]")
        progress.start("embedding", 0, "tiles")
        progress.advance(5, 10, "a slide [bold] of [/] Müller")
        progress.say("s1: [red]done[/red]")
        progress.start("training", 3, "fits")
        progress.advance(1, 3, "ridge, s2")
        (bar,) = progress._bars.tasks
        assert (bar.completed, bar.total, bar.description) == (1, 3, "training ridge, s2")
        assert str(bar.fields["rate"]).endswith("/s")
        progress.advance(2, 5, "ridge, s3")
        assert (bar.completed, bar.total, bar.description) == (2, 5, "training ridge, s3")
    said = capsys.readouterr().err
    assert "s1: [red]done[/red]" in said
    assert "before anything has begun [/x]" in said


def test_what_is_no_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminals in ((True, True), (True, False), (False, True)):
        for stream, is_one in zip(("stdout", "stderr"), terminals, strict=True):
            monkeypatch.setattr(getattr(sys, stream), "isatty", lambda is_one=is_one: is_one)
        made = progress_for_terminal()
        made.close()
        assert type(made) is (RichProgress if all(terminals) else PlainProgress)
