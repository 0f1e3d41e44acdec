"""``sessionstore doctor``: what is wrong in the store, and mending it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated

import typer

from sessionstore import Problem
from sessionstore.cli import failures, terminal
from sessionstore.cli.failures import note
from sessionstore.cli.options import (
    Json,
    Namespace,
    Timeout,
    Url,
    on_terminal,
    opened_store,
    write,
)

_COLUMNS = ("kind", "state", "key", "session_id", "message", "mending")


def doctor(
    context: typer.Context,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is found. Workers may go on meanwhile.")
    ] = False,
    json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> int:
    """Compare every session with every index; without --repair nothing is changed.

    A session's own hash is the truth, and indexes are made to follow it. What belongs to no session
    is set aside under a name with quarantine in it; nothing is deleted.

    Exit codes: 0 if nothing is wrong, or with --repair all of it was mended; 1 if something is left
    that is wrong. Warnings, of the server's settings for instance, do not count.
    """
    counts: Counter[str] = Counter()
    with opened_store(context, url, namespace, timeout) as store:
        _show(_counted(store.repair() if repair else store.check(), counts), json=json)
        sessions = store.drift().sessions
    note(_summary(counts, sessions, repair=repair))
    return failures.FAILURE if counts["found"] or counts["left"] else 0


def _state(problem: Problem) -> str:
    if problem.repaired:
        return "mended"
    if problem.warning:
        return "warning"
    return "found" if problem.mendable else "left"


def _counted(problems: Iterable[Problem], counts: Counter[str]) -> Iterator[Problem]:
    for problem in problems:
        counts[_state(problem)] += 1
        yield problem


def _show(problems: Iterable[Problem], *, json: bool) -> None:
    """Write the problems as they are found."""
    if json:
        for line in terminal.to_json_list(map(_row, problems)):
            write(line)
    elif on_terminal():
        from sessionstore.cli import views

        for problem in problems:
            views.put(views.problem_lines(problem))
    else:
        write(terminal.tsv(_COLUMNS))
        for problem in problems:
            write(terminal.tsv(_row(problem).values()))
    sys.stdout.flush()


def _row(problem: Problem) -> dict[str, str | None]:
    values = problem.model_dump() | {"state": _state(problem)}
    return {name: values[name] for name in _COLUMNS}


def _summary(counts: Counter[str], sessions: int, *, repair: bool) -> str:
    looked_at = f"{sessions:,} session{'' if sessions == 1 else 's'}"
    warnings = counts["warning"]
    said = f", {warnings:,} warning{'' if warnings == 1 else 's'}" if warnings else ""
    if repair and (counts["mended"] or counts["left"]):
        return f"{looked_at}: {counts['mended']:,} mended, {counts['left']:,} left{said}"
    wrong = counts["found"] + counts["left"]
    if not wrong:
        return f"{looked_at}: nothing is wrong{said}"
    mends = f"; --repair mends {counts['found']:,} of them" if counts["found"] else ""
    return f"{looked_at}: {wrong:,} problem{'' if wrong == 1 else 's'}{said}{mends}"
