"""``sessionstore events``: what has happened to sessions, and what happens."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from sessionstore import SessionEvent, SessionStore
from sessionstore.cli import terminal
from sessionstore.cli.failures import note
from sessionstore.cli.following import end_with_the_reader, through_outages
from sessionstore.cli.options import (
    Namespace,
    Timeout,
    Url,
    named_url,
    on_terminal,
    opened_store,
    write,
)
from sessionstore.following import OLDEST
from sessionstore.following import events as events_feed

_COLUMNS = (
    "at",
    "event",
    "session_id",
    "type",
    "old_status",
    "status",
    "owner",
    "actor",
    "cursor",
)


def events(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more, until Ctrl-C.")
    ] = False,
    tail: Annotated[
        int | None,
        typer.Option(
            "--tail",
            "-n",
            metavar="N",
            min=0,
            help="Only the newest N of those that are kept. Default: all; with -f none.",
        ),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            "--after", metavar="CURSOR", help="Go on after the event that has this cursor."
        ),
    ] = None,
    session: Annotated[
        str | None, typer.Option("--session", metavar="ID", help="Only events of this session.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, an object a line.")] = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> None:
    """Print what has happened to sessions: created, claimed, released, deleted …, and who did it.

    About the newest 10,000 events are kept. In a pipe: TSV.
    """
    with opened_store(context, url, namespace, timeout) as store:
        telling = _Telling(session, json=json)
        cursor = after
        if after is not None or tail is not None or not follow:
            kept = deque(_kept(store, after or OLDEST), maxlen=tail)
            for event in kept:
                telling.tell(event)
            cursor = kept[-1].cursor if kept else after or OLDEST
        else:
            store.ping()  # not to be reached from the beginning is an error
        if follow:
            end_with_the_reader()
            live = through_outages(
                store.watch,
                cursor,
                lambda event: event.cursor,
                named_url(context, url),
                store.settings.deadline,
            )
            for event in live:
                telling.tell(event)


def _kept(store: SessionStore, after: str) -> Iterator[SessionEvent]:
    """The events that there are now."""
    feed = events_feed(store.keyspace.all, after)
    page = store.execute(feed.page(feed.first))
    while page.items:
        yield from page.items
        page = store.execute(feed.page(page.cursor))


class _Telling:
    """What is written of events: lines on a terminal, TSV in a pipe, or JSON."""

    def __init__(self, session_id: str | None, *, json: bool) -> None:
        self._session_id, self._json = session_id, json
        self._is_on_terminal = on_terminal() and not json
        if not (json or self._is_on_terminal):
            write(terminal.tsv(_COLUMNS))
            sys.stdout.flush()

    def tell(self, event: SessionEvent) -> None:
        """Write an event, and let it be seen at once."""
        if event.gap:
            note("… events before this one are not kept any more …")
        if self._session_id not in (None, event.session_id):
            return
        if self._is_on_terminal:
            from sessionstore.cli import views

            views.put([views.event_line(event)])
        else:
            values = event.model_dump(mode="json")
            row: dict[str, Any] = {name: values[name] for name in _COLUMNS}
            write(terminal.to_json(row) if self._json else terminal.tsv(row.values()))
        sys.stdout.flush()
