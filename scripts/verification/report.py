"""The figures as the README quotes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rows import ROWS

FIGURES = Path(__file__).parent / "figures.json"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- begin: scripts/verify -->", "<!-- end: scripts/verify -->"


def table(figures: dict[str, Any]) -> str:
    """The section between the marks in the README."""
    lines = [
        f"{figures['on']}.",
        "",
        "| attack | faults | promises broken | seen meanwhile | control, and its harm |",
        "|---|--:|--:|---|---|",
    ]
    for row in ROWS:
        found = figures["attacks"].get(row.name)
        if found is None:
            lines.append(f"| {row.name}: {row.faults} | not run | | | |")
            continue
        seen = ", ".join(
            f"{count:,} {name.replace('_', ' ')}" for name, count in found["seen"].items()
        )
        control = ""
        if "control" in found:
            harm = found["control"]
            control = f"{row.control}: {harm['wrong']:,} wrong, {harm['injected']:,} faults"
        cells = (f"{found['injected']:,}", f"{found['wrong']}", seen, control)
        lines.append(f"| {row.name}: {row.faults} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quoted(readme: str, figures: dict[str, Any]) -> str:
    """The README with these figures in it."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{after}"


def write_readme() -> None:
    figures = json.loads(FIGURES.read_text("utf-8"))
    README.write_text(quoted(README.read_text("utf-8"), figures), "utf-8")
