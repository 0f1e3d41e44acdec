"""Bytes as they come from a pipe, to entries of a buffer: one line, one entry.

An entry is a line without its newline, decoded as UTF-8 with replacement. A line over 64 KiB is
split, between characters, so that an endless line is seen while it grows; what follows the last
newline is the last entry.
"""

from __future__ import annotations

LONGEST_ENTRY = 64 * 1024  # bytes


class LineSplitter:
    """Cuts a stream of bytes into entries, however the stream was cut before."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The entries that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        entries: list[str] = []
        for line in lines:
            pieces, rest = _cut(line)
            entries += pieces
            entries.append(rest.decode(errors="replace"))
        pieces, self._rest = _cut(self._rest)
        return entries + pieces

    def close(self) -> list[str]:
        """The last entry, if the stream did not end with a newline."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="replace")] if rest else []


def _cut(line: bytes) -> tuple[list[str], bytes]:
    """Pieces of exactly the longest size, less a character that would be cut; and the rest."""
    pieces: list[str] = []
    while len(line) > LONGEST_ENTRY:
        end = LONGEST_ENTRY
        while end > LONGEST_ENTRY - 3 and line[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        pieces.append(line[:end].decode(errors="replace"))
        line = line[end:]
    return pieces, line
