"""The commands that look at sessions, and ``rm``.

A listing is a table on a terminal and TSV in a pipe; ``--json`` is the same in both, with the wire
names of the TypeScript original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from sessionstore import (
    AgentSession,
    BufferPage,
    SessionBusyError,
)
from sessionstore.cli import failures, following, terminal
from sessionstore.cli.failures import note
from sessionstore.cli.options import (
    Json,
    Namespace,
    OfMcp,
    OfOwner,
    OfService,
    OfStatus,
    OfTask,
    OfType,
    SessionId,
    Timeout,
    Url,
    filters,
    named_url,
    on_terminal,
    opened_store,
    write,
)

_PAGE = 1000


class Order(StrEnum):
    """Orders of a listing."""

    CREATED = "created"
    LAST_ACTIVITY = "-last_activity"


_TSV_COLUMNS = (
    "id",
    "type",
    "status",
    "service_session_id",
    "task_id",
    "mcp_session_id",
    "project_path",
    "created_at",
    "last_activity",
    "output_total",
    "error_total",
    "owner",
    "lease_expires_at",
    "last_output",
)


def list_sessions(
    context: typer.Context,
    type: OfType = None,
    status: OfStatus = None,
    task: OfTask = None,
    service: OfService = None,
    mcp: OfMcp = None,
    owner: OfOwner = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=0, help="At most so many.")
    ] = None,
    order: Annotated[
        Order, typer.Option("--order", help="By creation, or the latest active first.")
    ] = Order.CREATED,
    json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> None:
    """List sessions; all filters given must match.

    --json prints an array, one session on a line, each with the newest entry of its buffers.
    """
    chosen = filters(type, status, task, service, mcp, owner)
    with opened_store(context, url, namespace, timeout) as store:
        found = store.find_sessions(
            **chosen,
            limit=limit,
            order=order.value,
            tail=1,
        )
    if json:
        for line in terminal.to_json_list(map(_wire, found)):
            write(line)
    elif on_terminal():
        from sessionstore.cli import views

        views.put(views.session_lines(found, views.width()))
    else:
        write(terminal.tsv(_TSV_COLUMNS))
        for session in found:
            values = {**_fields(session), "last_output": "".join(session.output_buffer)}
            write(terminal.tsv(values[name] for name in _TSV_COLUMNS))


def _wire(value: Any) -> Any:
    """A model under the original's names."""
    return value.model_dump(by_alias=True, mode="json")


def _fields(session: AgentSession) -> dict[str, Any]:
    """A session's fields under the names they have in Redis, times as ISO 8601."""
    return session.model_dump(mode="json")


def show(
    context: typer.Context,
    session_id: SessionId,
    tail: Annotated[
        int,
        typer.Option("--tail", "-n", metavar="N", min=0, help="Newest entries of each buffer."),
    ] = 10,
    json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> None:
    """Show one session: its fields, metadata and newest entries.

    In a pipe: TSV of field and value, metadata as meta:NAME, an entry a row.
    """
    with opened_store(context, url, namespace, timeout) as store:
        session = store.get_session(session_id, tail=tail)
    if json:
        write(terminal.to_json(_wire(session), indent=2))
    elif on_terminal():
        from sessionstore.cli import views

        views.put(views.detail_lines(session, views.width()))
    else:
        write(terminal.tsv(("field", "value")))
        for row in _rows_of(session):
            write(terminal.tsv(row))


def _rows_of(session: AgentSession) -> Iterator[tuple[str, Any]]:
    fields = _fields(session)
    output, errors = fields.pop("output_buffer"), fields.pop("error_buffer")
    metadata = fields.pop("metadata")
    yield from fields.items()
    yield from ((f"meta:{name}", value) for name, value in sorted(metadata.items()))
    yield from (("output", entry) for entry in output)
    yield from (("error", entry) for entry in errors)


def logs(
    context: typer.Context,
    session_id: SessionId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more until the session has ended.")
    ] = False,
    tail: Annotated[
        int | None,
        typer.Option("--tail", "-n", metavar="N", min=0, help="Only the newest N entries."),
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="The error buffer instead of the output.")
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help='An object a line: {"position": 0, "text": "…"}.'),
    ] = False,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="The agent's characters exactly, whatever they do to you."),
    ] = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> None:
    """Print what a session has written.

    How many lines were dropped to keep the buffer within its bounds is said on stderr.
    """
    if json and raw:
        raise typer.BadParameter("cannot be used together", param_hint="'--json' / '--raw'")
    with opened_store(context, url, namespace, timeout) as store:
        session = store.get_session(session_id, tail=0)
        total = session.error_total if errors else session.output_total
        cursor = 0 if tail is None else max(0, total - tail)
        if follow:
            following.end_with_the_reader()
            live = store.follow_errors if errors else store.follow_output
            pages = following.through_outages(
                lambda place: live(session_id, place),
                cursor,
                lambda page: page.cursor,
                named_url(context, url),
                store.settings.deadline,
            )
        else:
            pages = _stored(
                store.read_errors if errors else store.read_output, session_id, cursor, total
            )
        for page in pages:
            if page.dropped:
                note(f"… {_lines(page.dropped)} dropped …")
            if page.lost:
                note(f"… the server has lost {_lines(page.lost)} …")
            _write_entries(page.chunks, page.cursor - len(page.chunks), json=json, raw=raw)
            if page.deleted:
                note("… the session was deleted …")


def _stored(
    read: Callable[[str, int, int], BufferPage], session_id: str, cursor: int, total: int
) -> Iterator[BufferPage]:
    """What is there already, a page at a time."""
    while cursor < total:
        page = read(session_id, cursor, min(_PAGE, total - cursor))
        yield page
        if page.ended or not page.chunks:
            return
        cursor = page.cursor


def _lines(number: int) -> str:
    return f"{number:,} line{'' if number == 1 else 's'}"


def _write_entries(entries: Sequence[str], position: int, *, json: bool, raw: bool) -> None:
    """Write entries to stdout, each ending with a newline, and let them be seen at once."""
    if json:
        for number, entry in enumerate(entries, position):
            write(terminal.to_json({"position": number, "text": entry}))
    elif raw:
        for entry in entries:
            sys.stdout.buffer.write(entry.removesuffix("\n").encode() + b"\n")
    else:
        for entry in entries:
            write(terminal.lines(entry).removesuffix("\n"))
    sys.stdout.flush()


def metrics(
    context: typer.Context,
    json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> None:
    """Count the sessions, by status and by type.

    In a pipe: TSV of kind (total, status, type), name and count.
    """
    with opened_store(context, url, namespace, timeout) as store:
        counted = store.get_metrics()
    if json:
        write(terminal.to_json(_wire(counted), indent=2))
    elif on_terminal():
        from sessionstore.cli import views

        views.put(views.metrics_lines(counted))
    else:
        write(terminal.tsv(("kind", "name", "count")))
        write(terminal.tsv(("total", "", counted.total_sessions)))
        for status, number in counted.sessions_by_status.items():
            write(terminal.tsv(("status", status, number)))
        for type, number in sorted(counted.sessions_by_type.items()):
            write(terminal.tsv(("type", type, number)))


def remove(
    context: typer.Context,
    session_ids: Annotated[list[str], typer.Argument(metavar="ID", help="The sessions' ids.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also sessions that a worker holds; it loses them.")
    ] = False,
    json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> int:
    """Delete sessions with their output.

    Those that can be are deleted even if others are not there (then the exit code is 3) or are held
    by a worker (1).
    """
    deleted: dict[str, bool] = {}
    held: dict[str, SessionBusyError] = {}
    with opened_store(context, url, namespace, timeout) as store:
        try:
            for session_id in dict.fromkeys(session_ids):
                try:
                    deleted[session_id] = store.delete_session(session_id, force=force)
                except SessionBusyError as error:
                    deleted[session_id], held[session_id] = False, error
        finally:  # what was deleted is said even if the next one fails
            _show_deleted(deleted, held, json=json)
    if held:
        return failures.FAILURE
    return 0 if all(deleted.values()) else failures.NO_SESSION


def _show_deleted(
    deleted: dict[str, bool], held: dict[str, SessionBusyError], *, json: bool
) -> None:
    if json:
        answers = ({"id": id, "deleted": done} for id, done in deleted.items())
        for line in terminal.to_json_list(answers):
            write(line)
    elif on_terminal():
        for session_id, done in deleted.items():
            if done:
                write(f"deleted {terminal.one_line(session_id)}")
    else:
        write(terminal.tsv(("id", "deleted")))
        for session_id, done in deleted.items():
            write(terminal.tsv((session_id, str(done).lower())))
    for session_id, done in deleted.items():
        if session_id in held:
            note(f"error: {terminal.one_line(str(held[session_id]))}; --force deletes it")
        elif not done:
            note(f"error: no session {session_id!r}")
