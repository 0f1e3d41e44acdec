"""The Lua scripts by name, each with the includes it asks for.

A script names its includes in one comment line, ``--- @include once, clock``, which is replaced
by the text of ``lua/include/once.lua`` and so on. Includes include nothing themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files

_INCLUDE = re.compile(r"^--- @include (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text, and the digest by which EVALSHA calls it."""

    text: str
    sha: str


@cache
def load(name: str) -> Script:
    """The script of an operation, ready to be sent."""
    folder = files("sessionstore") / "lua"

    def included(match: re.Match[str]) -> str:
        names = match.group(1).split(", ")
        return "\n".join((folder / "include" / f"{n}.lua").read_text("utf-8") for n in names)

    text = _INCLUDE.sub(included, (folder / f"{name}.lua").read_text("utf-8"))
    return _script(text)


@cache
def variant(script: Script, number: int) -> Script:
    """The same script under another digest."""
    return _script(f"{script.text}\n-- variant {number}\n")


@cache
def guarded(script: Script) -> Script:
    """The same script for one more key, the last: that of ``Keys.guard_of``."""
    return _script(f"table.remove(KEYS) -- the guard\n{script.text}")


def _script(text: str) -> Script:
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())
