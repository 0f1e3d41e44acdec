"""``sessionstore reap``: end what is dead, once or again and again.

A lease that has expired is only marked at first: its worker may still renew it when the grace
period is over. So a single run that has marked something looks once more, and then it is ended.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from sessionstore import Reaped, SessionStore
from sessionstore.cli import failures, terminal
from sessionstore.cli.failures import note
from sessionstore.cli.options import (
    Namespace,
    Timeout,
    Url,
    duration,
    named_url,
    on_terminal,
    opened_store,
    write,
)
from sessionstore.operations import MOST_REAPED
from sessionstore.reaper import LOOK_AGAIN

_COLUMNS = ("action", "id", "status", "owner", "reason")


def reap(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing, tell what would be done.")
    ] = False,
    every: Annotated[
        float | None,
        typer.Option(
            "--every",
            metavar="SECONDS",
            parser=duration,
            help="Do so again and again, until Ctrl-C or SIGTERM.",
        ),
    ] = None,
    idle_for: Annotated[
        float | None,
        typer.Option(
            "--idle-for",
            metavar="SECONDS",
            parser=duration,
            help="Also terminate sessions that nobody holds, without activity for so long.",
        ),
    ] = None,
    ended_for: Annotated[
        float | None,
        typer.Option(
            "--ended-for",
            metavar="SECONDS",
            parser=duration,
            help="Also delete sessions that ended so long ago. Default: $SESSIONSTORE_RETENTION.",
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", metavar="N", min=1, max=MOST_REAPED, help="At most so many of each kind."
        ),
    ] = 100,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON; with --every, an object a line.")
    ] = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> None:
    """End sessions whose worker is lost, and with the options idle and old ones.

    A session whose lease has expired is marked, and becomes error if its worker has not renewed the
    lease when the grace period is over ($SESSIONSTORE_REAP_GRACE, 10 s). This command waits for it.

    Durations are seconds, or such as 90s, 15m, 12h and 7d.
    """
    if every is not None and every <= 0:
        raise typer.BadParameter("must be above 0", param_hint="'--every'")
    arguments: dict[str, Any] = {
        "idle_for": idle_for,
        "ended_for": ended_for,
        "limit": limit,
        "dry_run": dry_run,
    }
    with opened_store(context, url, namespace, timeout) as store:
        told = _Told(json=json, dry_run=dry_run, as_they_come=every is not None)
        if every is None:
            _once(store, arguments, told)
        else:
            _again_and_again(store, arguments, told, every, named_url(context, url))


def _once(store: SessionStore, arguments: dict[str, Any], told: _Told) -> None:
    """One pass, and another when what it has marked can be ended."""
    try:
        reaped = store.reap(**arguments)
        told.tell(reaped)
        _tell_of_limit(reaped, arguments["limit"])
        marked = {one.session_id for one in reaped if one.action == "marked"}
        if marked and not arguments["dry_run"]:
            pause = LOOK_AGAIN * store.settings.reap_grace
            note(
                f"{_leases(len(marked))} expired: looking again in {pause:.3g} s, so that a worker "
                "that lives can renew"
            )
            time.sleep(pause)
            reaped = store.reap(**arguments)
            told.tell(reaped)
            living = len(marked - {one.session_id for one in reaped})
            if living:
                note(f"{living:,} left alone: renewed, or in other hands meanwhile")
    finally:  # what was done is said even if the second pass is interrupted
        told.end()


def _again_and_again(
    store: SessionStore, arguments: dict[str, Any], told: _Told, every: float, url: str
) -> None:
    """Pass after pass, through outages, until a signal ends it."""
    if on_terminal():
        note(f"reaping every {every:g} s; Ctrl-C ends it")
    in_outage = False
    with _sigterm() as stopping:
        while not stopping.is_set():
            # Not all workers at the same time.
            pause = every * random.uniform(0.9, 1.1)
            try:
                with failures.naming_the_server(url, store.settings.deadline):
                    reaped = store.reap(**arguments)
            except Exception as error:
                if not failures.passes(error):
                    raise
                if not in_outage:
                    note(f"{error}; going on")
                in_outage = True
            else:
                if in_outage:
                    note("the store answers again")
                in_outage = False
                told.tell(reaped)
                if not arguments["dry_run"] and reaped:
                    pause = min(pause, LOOK_AGAIN * store.settings.reap_grace)
            stopping.wait(pause)


@contextmanager
def _sigterm() -> Generator[threading.Event]:
    """Set by SIGTERM: the pass that is on its way is the last."""
    asked = threading.Event()

    def handle(_number: int, _frame: object) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_of_limit(reaped: Sequence[Reaped], limit: int) -> None:
    actions = [one.action for one in reaped]
    if any(actions.count(action) >= limit for action in set(actions)):
        note(f"there may be more: a pass does {limit:,} of each kind (--limit)")


def _leases(number: int) -> str:
    return "1 lease has" if number == 1 else f"{number:,} leases have"


class _Told:
    """What is written of the passes: a table on a terminal, TSV in a pipe, or JSON.

    Args:
        json: write JSON: one array at the end.
        dry_run: nothing was done, it only would be.
        as_they_come: JSON is an object a line, and TSV has its header before the first pass.
    """

    def __init__(self, *, json: bool, dry_run: bool, as_they_come: bool) -> None:
        self._json = json
        self._dry_run = dry_run
        self._as_they_come = as_they_come
        self._is_table = on_terminal() and not json
        self._has_passed = self._has_rows = False
        self._kept: list[Reaped] = []  # for the array
        if as_they_come and not (json or self._is_table):
            self._write_header()

    def tell(self, reaped: Sequence[Reaped]) -> None:
        """Write what a pass did, and let it be seen at once."""
        if self._is_table and reaped:
            from sessionstore.cli import views

            header = not self._has_rows
            views.put(
                views.reaped_lines(reaped, views.width(), header=header, dry_run=self._dry_run)
            )
        elif self._json and self._as_they_come:
            for one in reaped:
                write(terminal.to_json(_row(one)))
        elif self._json:
            self._kept += reaped
        elif not self._is_table:
            if not (self._has_passed or self._as_they_come):
                self._write_header()
            for one in reaped:
                write(terminal.tsv(_row(one).values()))
        sys.stdout.flush()
        self._has_passed = True
        self._has_rows = self._has_rows or bool(reaped)

    def end(self) -> None:
        """Write what can only be said when all is done, unless nothing could be done."""
        if not self._has_passed:
            return
        if self._json:
            for line in terminal.to_json_list(map(_row, self._kept)):
                write(line)
        elif self._is_table and not self._has_rows:
            write("nothing to reap")

    def _write_header(self) -> None:
        write(terminal.tsv(_COLUMNS))
        sys.stdout.flush()


def _row(one: Reaped) -> dict[str, str | None]:
    values = (one.action, one.session_id, one.status, one.owner, one.reason)
    return dict(zip(_COLUMNS, values, strict=True))
