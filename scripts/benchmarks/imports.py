"""How long it takes to import the library, beside what it needs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from measuring import ratio, table

OURS = "import sessionstore"
THEIRS = "import redis; from pydantic import BaseModel"


def _seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def measure(rounds: int) -> str:
    """The table of imports, each in an interpreter of its own."""
    for code in (OURS, THEIRS):
        _seconds(code)  # compiled and in the file cache
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_seconds(OURS))
        theirs.append(_seconds(THEIRS))
    row = (
        f"`{OURS}`",
        f"{statistics.median(ours) * 1000:.0f}",
        f"{statistics.median(theirs) * 1000:.0f}",
        f"{ratio(ours, theirs):.2f}",
        "1.4",
    )
    return table(("an interpreter that does", "ms", f"`{THEIRS}`: ms", "ratio", "at most"), [row])
