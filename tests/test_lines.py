"""Bytes from a pipe become entries, one a line, however the bytes were cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessionstore.lines import LONGEST_ENTRY, LineSplitter


def split(*pieces: bytes) -> list[str]:
    splitter = LineSplitter()
    entries = [entry for piece in pieces for entry in splitter.feed(piece)]
    return entries + splitter.close()


@pytest.mark.parametrize(
    ("data", "entries"),
    [
        (b"", []),
        (b"a\nb\n", ["a", "b"]),
        (b"a\n\n\nb", ["a", "", "", "b"]),
        (b"\n", [""]),
        (b"no end", ["no end"]),
        (b"windows\r\n", ["windows\r"]),
        (b"caf\xe9\n", ["caf\ufffd"]),
        ("naïve\n".encode(), ["naïve"]),
    ],
)
def test_an_entry_is_a_line_without_its_newline(data: bytes, entries: list[str]) -> None:
    assert split(data) == entries


def test_a_line_is_an_entry_as_soon_as_its_newline_is_there() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"first\nsec") == ["first"]
    assert splitter.feed(b"ond\n") == ["second"]


def test_an_endless_line_is_seen_while_it_grows() -> None:
    splitter = LineSplitter()
    pieces = [piece for _ in range(4) for piece in splitter.feed(b"x" * LONGEST_ENTRY)]
    assert pieces == ["x" * LONGEST_ENTRY] * 3
    assert splitter.close() == ["x" * LONGEST_ENTRY]


@pytest.mark.parametrize("shift", range(4))
def test_a_long_line_is_split_between_characters(shift: int) -> None:
    line = "x" * shift + "😀" * LONGEST_ENTRY
    entries = split(line.encode() + b"\n")
    assert "".join(entries) == line
    assert max(len(entry.encode()) for entry in entries) <= LONGEST_ENTRY
    assert len(entries) == (5 if shift else 4)


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=8))
def test_how_the_bytes_were_cut_does_not_matter(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(places)]
    assert split(*pieces) == split(data)


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=50)))
def test_lines_come_back_as_they_were(lines: list[str]) -> None:
    assert split("".join(line + "\n" for line in lines).encode()) == lines
