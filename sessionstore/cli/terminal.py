"""Text of agents, made harmless for a terminal, for TSV and for JSON.

An agent's line may move the cursor, clear the screen, set the clipboard, or turn the direction of
writing so that something else is read than is there. Characters that could do so are shown
instead of sent: ``\\x1b``, ``\\u202e``. Nothing here touches what is stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_NOT_SPACING = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\u2028\u2029"  # line and paragraph separators
    "\ud800-\udfff"  # lone surrogates: UTF-8 cannot carry them
)
_UNSAFE = re.compile(f"[\t\n{_NOT_SPACING}]")
_UNSAFE_IN_LINES = re.compile(f"[{_NOT_SPACING}]")
_UNSAFE_IN_TSV = re.compile(f"[\\\\\t\n{_NOT_SPACING}]")
_LINE_END = re.compile(r"\r(?=\n|\Z)")
_SHORT = {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\\": r"\\"}


def _shown(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def one_line(text: str) -> str:
    """Text for one line: tabs and newlines are shown too."""
    return _UNSAFE.sub(_shown, text)


def lines(text: str) -> str:
    """Text that keeps its tabs and newlines; the CR of a CRLF, which hides nothing, goes."""
    return _UNSAFE_IN_LINES.sub(_shown, _LINE_END.sub("", text))


def tsv(cells: Iterable[object]) -> str:
    """A row of TSV; None is empty, a backslash is doubled, so that all can be read back."""
    fields = ("" if cell is None else str(cell) for cell in cells)
    return "\t".join(_UNSAFE_IN_TSV.sub(_shown, field) for field in fields)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON in UTF-8 with the unsafe characters as escapes: the same value for its reader."""
    written = json.dumps(value, ensure_ascii=False, indent=indent)
    # Outside its strings JSON has none of these but the newlines of its indentation.
    return _UNSAFE_IN_LINES.sub(lambda match: f"\\u{ord(match[0]):04x}", written)


def to_json_list(values: Iterable[Any]) -> Iterator[str]:
    """A JSON array, in lines: one value on each."""
    before = "["
    for value in values:
        yield before
        before = to_json(value) + ","
    yield "[]" if before == "[" else before[:-1] + "\n]"
