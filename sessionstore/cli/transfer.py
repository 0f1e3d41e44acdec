"""``sessionstore export`` and ``import``: sessions to a file of JSON lines and back."""

from __future__ import annotations

import json as json_module
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from sessionstore import Imported, SessionExistsError
from sessionstore.cli import failures, terminal
from sessionstore.cli.failures import CommandError, note
from sessionstore.cli.options import (
    Json,
    Namespace,
    OfMcp,
    OfOwner,
    OfService,
    OfStatus,
    OfTask,
    OfType,
    Timeout,
    Url,
    duration,
    filters,
    opened_store,
    write,
)

_LONGEST_LINE = 512 * 1024 * 1024  # bytes: Redis takes no more in one entry
_END = '{"end"'  # what a session's last line begins with

#: What is called as work goes on: how much has been done since.
_Advance = Callable[[int], None]


class Existing(StrEnum):
    """What becomes of a session that is there already and differs."""

    ERROR = "error"
    SKIP = "skip"
    REPLACE = "replace"


def export_(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            dir_okay=False,
            help="Write to this file, which must be new, instead of stdout.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --output: replace a file that is there.")
    ] = False,
    type: OfType = None,
    status: OfStatus = None,
    task: OfTask = None,
    service: OfService = None,
    mcp: OfMcp = None,
    owner: OfOwner = None,
    idle_for: Annotated[
        float | None,
        typer.Option(
            "--idle-for",
            metavar="TIME",
            parser=duration,
            help="Without activity, or ended, for so long: 30, 15m, 12h, 7d.",
        ),
    ] = None,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> int:
    """Write sessions to a file of JSON lines, exactly as they are stored.

    All sessions, or those that match all filters given. Workers may go on meanwhile. A session that
    cannot be read is told of, and then the exit code is 1.
    """
    if output is not None and output.exists() and not force:
        raise CommandError(failures.FAILURE, f"{output} exists already; --force replaces it")
    chosen = filters(type, status, task, service, mcp, owner)
    chosen["idle_for"] = idle_for
    with opened_store(context, url, namespace, timeout, default_timeout=None) as store:
        is_all = not any(value is not None for value in chosen.values())
        total = store.get_metrics().total_sessions if is_all else None
        lines = store.export_sessions(**chosen)
        with _target(output) as stream, _progress("exporting", total, "sessions", output) as told:
            last = _copy(lines, stream, told)
    counted = json_module.loads(last)["total"]
    where = "" if output is None else f" to {output}"
    note(
        f"exported {_sessions(counted['sessions'])}{where}, with "
        f"{_number(counted['output'], 'entry', 'entries')} of output and {counted['errors']:,} of "
        f"errors{_left_out(counted['unreadable'])}"
    )
    return failures.FAILURE if counted["unreadable"] else 0


def _copy(lines: Iterable[str], stream: BinaryIO, advance: _Advance) -> str:
    """Write the lines; the last one."""
    line = ""
    for line in lines:
        stream.write(line.encode())
        if line.startswith(_END):
            advance(1)
    return line


@contextmanager
def _target(path: Path | None) -> Generator[BinaryIO, None, None]:
    """Where an export is written to: a file appears under its name when it is complete."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("xb") as stream:
            yield stream
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def import_(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="What export has written; - for stdin.")
    ],
    existing: Annotated[
        Existing,
        typer.Option(
            "--existing",
            help="What to do about a session that is there already and differs. One that is the "
            "same is left alone in any case.",
        ),
    ] = Existing.ERROR,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing, tell what would be done.")
    ] = False,
    json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
) -> int:
    """Make the sessions of an export, exactly as they were.

    Each appears in one step. An import that was interrupted goes on when it is run again. Sessions
    that were held by a worker can be claimed at once. If some of the file cannot be imported, the
    others are, and the exit code is 1.
    """
    with (
        _source(file) as (stream, size),
        opened_store(context, url, namespace, timeout, default_timeout=None) as store,
        _progress("importing", size, "bytes", None if file == "-" else Path(file)) as told,
    ):
        try:
            done = store.import_sessions(
                _lines(stream, told), existing=existing.value, dry_run=dry_run
            )
        except SessionExistsError as error:
            raise CommandError(
                failures.FAILURE,
                f"{error}; --existing skip leaves such sessions as they are, replace replaces them",
            ) from error
        except KeyboardInterrupt:
            note("interrupted; the same command goes on where this one stopped")
            raise
    if json:
        write(terminal.to_json(done.model_dump(mode="json"), indent=2))
    else:
        write(_summary(done, dry_run=dry_run))
    return failures.FAILURE if done.unreadable else 0


@contextmanager
def _source(file: str) -> Generator[tuple[BinaryIO, int | None], None, None]:
    """What is to be imported, and how many bytes that are, if it can be known."""
    if file == "-":
        yield sys.stdin.buffer, None
        return
    with open(file, "rb") as stream:
        yield stream, os.fstat(stream.fileno()).st_size or None


def _lines(stream: BinaryIO, advance: _Advance) -> Iterator[bytes]:
    while line := stream.readline(_LONGEST_LINE):
        yield line
        advance(len(line))


def _summary(done: Imported, *, dry_run: bool) -> str:
    parts = [f"{'would import' if dry_run else 'imported'} {_sessions(done.imported)}"]
    if done.replaced:
        parts.append(f"{'would replace' if dry_run else 'replaced'} {done.replaced:,}")
    if done.unchanged:
        parts.append(f"{done.unchanged:,} there already")
    if done.differing:
        parts.append(f"{done.differing:,} there already and different, left as they are")
    return ", ".join(parts) + _left_out(done.unreadable)


def _left_out(number: int) -> str:
    return f"; left out {_sessions(number)} that cannot be read" if number else ""


def _sessions(number: int) -> str:
    return _number(number, "session", "sessions")


def _number(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


@contextmanager
def _progress(
    what: str, total: int | None, unit: str, file: Path | None
) -> Generator[_Advance, None, None]:
    """A bar on stderr if that is a terminal, and what is written does not go there too."""
    if not sys.stderr.isatty() or (what == "exporting" and file is None and sys.stdout.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    colours: Any = None if os.environ.get("NO_COLOR") else "auto"
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr, color_system=colours, markup=False),
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.advance(task, number)
