"""Text becomes entries, one a line, however it was cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessionstore.lines import LONGEST_ENTRY, LineSplitter


def split(*pieces: str, longest: int = LONGEST_ENTRY) -> list[str]:
    splitter = LineSplitter(longest)
    entries = [entry for piece in pieces for entry in splitter.feed(piece)]
    return entries + splitter.close()


@pytest.mark.parametrize(
    ("data", "entries"),
    [
        ("", []),
        ("a\nb\n", ["a", "b"]),
        ("a\n\n\nb", ["a", "", "", "b"]),
        ("\n", [""]),
        ("no end", ["no end"]),
        ("windows\r\n", ["windows\r"]),
        ("naïve\n", ["naïve"]),
        ("lone \ud800 and \udcff\n", ["lone \ufffd and \ufffd"]),
    ],
)
def test_an_entry_is_a_line_without_its_newline(data: str, entries: list[str]) -> None:
    assert split(data) == entries


def test_a_line_is_an_entry_as_soon_as_its_newline_is_there() -> None:
    splitter = LineSplitter()
    assert splitter.feed("first\nsec") == ["first"]
    assert splitter.feed("ond\n") == ["second"]


def test_an_endless_line_is_seen_while_it_grows() -> None:
    splitter = LineSplitter()
    pieces = [piece for _ in range(4) for piece in splitter.feed("x" * LONGEST_ENTRY)]
    assert pieces == ["x" * LONGEST_ENTRY] * 3
    assert splitter.close() == ["x" * LONGEST_ENTRY]


@pytest.mark.parametrize("shift", range(4))
def test_a_long_line_is_split_between_characters(shift: int) -> None:
    line = "x" * shift + "😀" * LONGEST_ENTRY
    entries = split(line + "\n")
    assert "".join(entries) == line
    assert max(len(entry.encode()) for entry in entries) <= LONGEST_ENTRY
    assert len(entries) == (5 if shift else 4)


@given(
    st.text(st.sampled_from("a\né😀\ud800"), max_size=60),
    st.lists(st.integers(0, 60), max_size=8),
    st.integers(1, 20),
)
def test_how_the_text_was_cut_does_not_matter(data: str, cuts: list[int], longest: int) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(places)]
    entries = split(*pieces, longest=longest)
    assert entries == split(data, longest=longest)
    assert all(len(entry.encode()) <= longest for entry in entries)


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=50)))
def test_lines_come_back_as_they_were(lines: list[str]) -> None:
    assert split("".join(line + "\n" for line in lines)) == lines


def test_a_character_longer_than_an_entry_may_be_is_replaced() -> None:
    assert split("a😀b", longest=2) == ["a?", "b"]


def test_a_line_of_exactly_the_longest_size_is_one_entry() -> None:
    assert split("é" * 5 + "\n" + "é" * 6, longest=10) == ["é" * 5, "é" * 5, "é"]
