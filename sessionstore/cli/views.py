"""What ``ls``, ``show``, ``metrics``, ``events``, ``reap`` and ``doctor`` look like on a terminal.

Every value passes through ``terminal.one_line`` on its way into a ``Text``, and a ``Text`` knows
no markup: ``[red]`` in an agent's line is just that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from sessionstore.cli import terminal
from sessionstore.models import AgentSession, Problem, Reaped, SessionEvent, SessionMetrics

STATUS_STYLES = {
    "starting": "cyan",
    "active": "green",
    "busy": "yellow",
    "error": "bold red",
    "terminated": "dim",
}
_GAP = 2  # between columns
_INDENT = "  "
_NARROWEST_LAST_LINE = 24  # a narrower one says nothing: then it gets a line of its own
_WIDE_LAST_LINE = 40  # before the type, which every id holds already, gets a column


def console() -> Console:
    """The terminal at stdout. With NO_COLOR it gets no escape sequence at all."""
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(file=sys.stdout, color_system=colours, highlight=False, markup=False)


def put(lines: Iterable[Text]) -> None:
    """Print lines as they are: what is too long for the terminal wraps there."""
    screen = console()
    for line in lines:
        screen.print(line, soft_wrap=True)


def width() -> int:
    """Columns of the terminal."""
    return console().width


# ---- ls ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    widest: int | None  # None: never cut
    keep_end: bool = False
    right: bool = False
    style: str = ""

    def cut(self, value: str) -> str:
        """The value, not wider than the column may be."""
        if self.widest is None or cell_len(value) <= self.widest:
            return value
        return _cut_start(value, self.widest) if self.keep_end else _cut(value, self.widest)


_COLUMNS = {
    "id": _Column("ID", None),
    "type": _Column("TYPE", None),
    "status": _Column("STATUS", None),
    "owner": _Column("OWNER", 24, keep_end=True),
    "lease": _Column("LEASE", None, right=True),
    "service": _Column("SERVICE", 18),
    "task": _Column("TASK", 16),
    "project": _Column("PROJECT", 24, keep_end=True),
    "age": _Column("AGE", None, right=True),
    "idle": _Column("IDLE", None, right=True),
    "lines": _Column("OUT/ERR", None, right=True),
    "last": _Column("LAST OUTPUT", None, style="dim"),
}
#: Columns in the order in which a wider terminal gets them.
_BY_IMPORTANCE = (
    *("id", "status", "idle", "lines", "lease", "age"),
    *("task", "owner", "project", "service", "type"),
)
#: Columns whose values, where there is no room for a column, come in the line below.
_BELOW = ("owner", "lease", "task", "service", "project")
#: Columns that there are only if some session has a value.
_OF_SOME = ("owner", "lease")
#: Columns that come as long as the last output still fits beside them.
_NAMES = ("task", "owner", "service", "project")


def session_lines(sessions: Sequence[AgentSession], width: int) -> Iterator[Text]:
    """The table of ``ls``: ids whole, the other columns as far as there is room.

    The last output gets what is left of the line, or a line below if that is too little.
    """
    if not sessions:
        yield Text("no sessions", style="dim")
        return
    rows = [_cells(session) for session in sessions]
    widths = {
        name: max(cell_len(column.header), *(cell_len(row[name]) for row in rows))
        for name, column in _COLUMNS.items()
        if name != "last" and (name not in _OF_SOME or any(row[name] for row in rows))
    }
    shown, left = _columns_that_fit(widths, width)
    beside = left >= _NARROWEST_LAST_LINE
    names = [name for name in _COLUMNS if name in shown]
    header = _row({name: column.header for name, column in _COLUMNS.items()}, names, widths)
    if beside:
        header.append(" " * _GAP + _COLUMNS["last"].header)
    header.stylize("bold")
    header.rstrip()
    yield header
    for session, row in zip(sessions, rows, strict=True):
        line = _row(row, names, widths, STATUS_STYLES[session.status])
        if beside:
            line.append(" " * _GAP + _cut(row["last"], left), style="dim")
        line.rstrip()
        yield line
        if not beside:
            below = [row[name] for name in _BELOW if name not in shown] + [row["last"]]
            text = " · ".join(filter(None, below))
            if text:
                yield Text(_INDENT + _cut(text, width - len(_INDENT)), style="dim")


def _cells(session: AgentSession) -> dict[str, str]:
    cells = {
        "id": session.id,
        "type": session.type,
        "status": session.status,
        "service": session.service_session_id,
        "task": session.task_id or "",
        "project": session.project_path,
        "age": duration((session.read_at - session.created_at).total_seconds()),
        "idle": duration(session.idle_for),
        "lines": f"{session.output_total:,}/{session.error_total:,}",
        "owner": session.owner or "",
        "lease": lease_left(session),
        "last": _last_line(session.output_buffer),
    }
    return {name: _COLUMNS[name].cut(terminal.one_line(value)) for name, value in cells.items()}


def _columns_that_fit(widths: dict[str, int], width: int) -> tuple[set[str], int]:
    """The columns that fit, and how much they leave for the last output.

    The important ones come first.
    """
    reserved: dict[str, int] = dict.fromkeys(_NAMES, _GAP + _NARROWEST_LAST_LINE)
    reserved["type"] = _GAP + _WIDE_LAST_LINE
    shown: set[str] = set()
    left = width
    for name in filter(widths.__contains__, _BY_IMPORTANCE):
        needed = widths[name] + (_GAP if shown else 0)
        if name in ("id", "status") or needed + reserved.get(name, 0) <= left:
            shown.add(name)
            left -= needed
    return shown, left - _GAP


def _row(
    cells: dict[str, str], names: Sequence[str], widths: dict[str, int], status_style: str = ""
) -> Text:
    line = Text()
    for name in names:
        if line:
            line.append(" " * _GAP)
        value = cells[name]
        padding = " " * (widths[name] - cell_len(value))
        style = status_style if name == "status" else ""
        if _COLUMNS[name].right:
            line.append(padding).append(value, style=style)
        else:
            line.append(value, style=style).append(padding)
    return line


def _last_line(buffer: Sequence[str]) -> str:
    """The last line with something on it, of the newest entry."""
    lines = terminal.lines(buffer[-1]).split("\n") if buffer else []
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)).rstrip() + "…" if width > 0 else ""


def _cut_start(text: str, width: int) -> str:
    while cell_len(text) > width - 1:
        text = text[1:]
    return "…" + text


def duration(seconds: float) -> str:
    """A time span at a glance: ``12s``, ``5m``, ``3h``, ``2d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def lease_left(session: AgentSession) -> str:
    """How long a lease runs unless it is renewed; ``expired`` until somebody has reaped it."""
    if session.owner is None or session.lease_expires_at is None:
        return ""
    seconds = (session.lease_expires_at - session.read_at).total_seconds()
    return duration(seconds) if seconds > 0 else "expired"


# ---- show -------------------------------------------------------------------------------------


def detail_lines(session: AgentSession, width: int) -> Iterator[Text]:
    """Everything about one session, and the newest lines of its buffers."""
    now = session.read_at
    yield Text(terminal.one_line(session.id), style="bold")
    yield _field("status", session.status, STATUS_STYLES[session.status])
    yield _field("type", session.type)
    yield _field("service", session.service_session_id)
    yield _field("task", session.task_id)
    yield _field("mcp", session.mcp_session_id)
    yield _field("project", session.project_path)
    yield _field("created", _moment(session.created_at, now))
    yield _field("active", _moment(session.last_activity, now))
    if session.owner is not None:
        yield _field("owner", f"{session.owner}{_lease(session.lease_expires_at, now)}")
    for number, (name, value) in enumerate(sorted(session.metadata.items())):
        yield _field("metadata" if number == 0 else "", f"{name} = {value}")
    yield from _buffer("output", session.output_buffer, session.output_total, width)
    yield from _buffer("errors", session.error_buffer, session.error_total, width)


def _field(name: str, value: str | None, style: str = "") -> Text:
    line = Text(f"{_INDENT}{name:<8}  ", style="dim")
    shown = Text("–", style="dim") if value is None else Text(terminal.one_line(value), style)
    return Text.assemble(line, shown)


def _lease(expires_at: datetime | None, now: datetime) -> str:
    if expires_at is None:
        return ""
    seconds = (expires_at - now).total_seconds()
    if seconds > 0:
        return f", lease ends in {duration(seconds)}"
    return f", lease expired {duration(-seconds)} ago"


def _moment(moment: datetime, now: datetime) -> str:
    passed = duration((now - moment).total_seconds())
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC ({passed} ago)"


def _buffer(name: str, entries: Sequence[str], total: int, width: int) -> Iterator[Text]:
    if total == 0:
        yield _field(name, "none")
        return
    what = f"{total:,} {'entry' if total == 1 else 'entries'}"
    if 0 < len(entries) < total:
        what += f", the newest {len(entries):,}:"
    yield _field(name, what)
    for entry in entries:
        for line in terminal.lines(entry).removesuffix("\n").split("\n"):
            cut = _cut(line.expandtabs(4), width - 2 * len(_INDENT) - 2)
            yield Text.assemble((f"{_INDENT * 2}│ ", "dim"), cut)


# ---- reap -------------------------------------------------------------------------------------

_ACTION_STYLES = {"marked": "yellow", "lost": "bold red"}


def reaped_lines(
    reaped: Sequence[Reaped], width: int, *, header: bool, dry_run: bool
) -> Iterator[Text]:
    """What a pass of the reaper did, or would do; why stands beside or, without room, below.

    The lost worker has no column: the reason names it.
    """
    names = ("action", "id", "status")
    rows = [
        {
            "action": one.action,
            "id": terminal.one_line(one.session_id),
            "status": one.status,
            "reason": terminal.one_line(one.reason),
        }
        for one in reaped
    ]
    titles = {"action": "WOULD BE" if dry_run else "ACTION", "id": "ID", "status": "STATUS"}
    least = {"action": len("terminated"), "id": 0, "status": len("terminated")}
    widths = {
        name: max(least[name], len(titles[name]), *(cell_len(row[name]) for row in rows))
        for name in names
    }
    left = width - sum(widths.values()) - _GAP * len(names)
    beside = all(cell_len(row["reason"]) <= left for row in rows)
    if header:
        cells = [titles[name].ljust(widths[name]) for name in names]
        yield Text((" " * _GAP).join([*cells, "REASON"] if beside else cells).rstrip(), "bold")
    for row in rows:
        line = Text()
        for name in names:
            style = _ACTION_STYLES.get(row[name], "dim") if name == "action" else ""
            style = STATUS_STYLES[row[name]] if name == "status" else style
            line.append(row[name], style=style)
            line.append(" " * (widths[name] - cell_len(row[name]) + _GAP))
        if beside:
            line.append(row["reason"], style="dim")
        line.rstrip()
        yield line
        if not beside:
            yield Text(_INDENT + row["reason"], style="dim")


# ---- doctor -----------------------------------------------------------------------------------


def problem_lines(problem: Problem) -> Iterator[Text]:
    """One problem: its kind and where; below what is wrong, and what is done about it."""
    style = "green" if problem.repaired else "yellow" if problem.warning else "bold red"
    key = terminal.one_line(problem.key)
    yield Text.assemble((problem.kind, style), " " * _GAP, (key, "bold"))
    yield Text(_INDENT + terminal.one_line(problem.message))
    done = "mended" if problem.repaired else "mending" if problem.mendable else "left"
    yield Text(f"{_INDENT}{done}: {terminal.one_line(problem.mending)}", style="dim")


# ---- metrics ----------------------------------------------------------------------------------


def metrics_lines(metrics: SessionMetrics) -> Iterator[Text]:
    """The counts, by status and by type."""
    number = len(f"{metrics.total_sessions:,}")
    types = sorted(metrics.sessions_by_type.items())
    name = max(map(len, (*metrics.sessions_by_status, *metrics.sessions_by_type)))

    def count(label: str, value: int, style: str = "") -> Text:
        text = f"{terminal.one_line(label):<{name}}{' ' * _GAP}{value:>{number},}"
        return Text(_INDENT + text, style=style if value else "dim")

    yield Text(f"{metrics.total_sessions:,} session{'' if metrics.total_sessions == 1 else 's'}",
               style="bold")  # fmt: skip
    yield Text()
    yield Text("by status", style="bold")
    for status, value in metrics.sessions_by_status.items():
        yield count(status, value, STATUS_STYLES[status])
    if types:
        yield Text()
        yield Text("by type", style="bold")
    for type, value in types:
        yield count(type, value)


# ---- events -----------------------------------------------------------------------------------

_WIDEST_EVENT = len("status_changed")


def event_line(event: SessionEvent) -> Text:
    """What happened to a session and when, by UTC; where it stands now, and who did it."""
    line = Text(f"{event.at:%Y-%m-%d %H:%M:%S}  ", style="dim")
    line.append(f"{terminal.one_line(event.event):{_WIDEST_EVENT}}  ", "bold")
    line.append(terminal.one_line(event.session_id), "default")
    if event.status is not None:
        status = terminal.one_line(event.status)
        if event.old_status not in (None, event.status):
            line.append(f"  {terminal.one_line(event.old_status or '')} →", "dim")
        line.append(
            f"  {status}" if event.old_status is None else f" {status}",
            STATUS_STYLES.get(status, ""),
        )
    if event.actor is not None:
        line.append(f"  by {terminal.one_line(event.actor)}", "dim")
    if event.owner not in (None, event.actor):
        line.append(f", of {terminal.one_line(event.owner or '')}", "dim")
    return line
