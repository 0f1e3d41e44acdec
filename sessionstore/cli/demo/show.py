"""What the demo prints: a live table on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sessionstore import AgentSession, SessionMetrics, SessionStore
from sessionstore._server import PrivateServer
from sessionstore.cli.demo.accident import Accident, Stage
from sessionstore.cli.demo.verify import Findings, plain_client
from sessionstore.cli.demo.worker import Job
from sessionstore.cli.failures import without_password
from sessionstore.cli.terminal import one_line
from sessionstore.cli.views import STATUS_STYLES

if TYPE_CHECKING:
    from sessionstore.cli.demo.main import Progress

LIVE_ROWS = 16


class Quiet:
    """What the demo has to say, in the order in which it says it; here it says nothing."""

    def began(
        self,
        own: PrivateServer | None,
        url: str,
        namespace: str,
        jobs: Sequence[Job],
        workers: int,
    ) -> None:
        """Tell where and what."""

    def reported(self, job: Job, worker: int, report: Mapping[str, Any]) -> None:
        """Tell what a worker has reported."""

    @contextmanager
    def live(
        self,
        store: SessionStore,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> Generator[Callable[[], None]]:
        """Show the sessions while the workers run; gives the function that brings it up to date."""
        yield lambda: None

    def happened(self, accident: Accident) -> None:
        """Tell how far the accident has come."""

    def verdict(self, progress: Progress, findings: Findings, seconds: float) -> None:
        """Tell whether all was right."""

    def redis_cli(self, url: str, namespace: str, session_id: str) -> None:
        """Show a few commands to type, with the replies that they get."""

    def farewell(self, own: PrivateServer | None, url: str, namespace: str, *, keep: bool) -> None:
        """Tell how to go on."""


def on_this_terminal() -> Quiet:
    """A live table if stdout is a terminal, plain lines if it is not."""
    console = Console(highlight=False)
    return OnTerminal(console) if console.is_terminal else Printed(console)


class Printed(Quiet):
    """Plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()

    def _line(self, text: str = "", style: str | None = None) -> None:
        self.console.print(Text(text, style=style or ""), soft_wrap=True)

    def began(
        self,
        own: PrivateServer | None,
        url: str,
        namespace: str,
        jobs: Sequence[Job],
        workers: int,
    ) -> None:
        where = f"{own.program}, started for this demo" if own else "a server that runs already"
        self._line(f"{where}: {without_password(url, url)}", "bold")
        self._line(f"{len(jobs)} commands, {workers} worker processes, namespace {{{namespace}}}")
        self._line()

    def reported(self, job: Job, worker: int, report: Mapping[str, Any]) -> None:
        if report["event"] == "created":
            begins = "claims " if "session_id" in job else "starts "
            what = f"{begins} {job['type']:<7} {job['title']}"
        elif report["event"] == "done":
            ended = "terminated" if report["code"] == 0 else f"error, exit code {report['code']}"
            what = f"ended   {job['type']:<7} {job['title']}: {ended}"
        else:
            what = f"FAILED  {job['type']:<7} {job['title']}: {report['error']}"
        self._told(worker, what)

    def happened(self, accident: Accident) -> None:
        assert accident.job is not None
        job = f"{accident.job['type']:<7} {accident.job['title']}"
        if accident.stage is Stage.KILLED:
            self._told(accident.killed, f"KILLED  {job}: SIGKILL, half way")
        else:
            self._told(accident.killed, f"lost    {job}: its lease ran out, the session is error")

    def _told(self, worker: int, what: str) -> None:
        clock = f"{time.monotonic() - self._started:5.1f} s"
        self._line(f"{clock}  worker {worker}  {one_line(what)}")

    def verdict(self, progress: Progress, findings: Findings, seconds: float) -> None:
        codes = Counter("terminated" if code == 0 else "error" for code in progress.codes.values())
        self._line()
        self._line(
            f"{len(progress.codes)} sessions in {seconds:.1f} s: "
            + ", ".join(f"{count} {status}" for status, count in sorted(codes.items()))
        )
        self._line(
            "Verified with plain redis-py against what the workers kept aside: "
            f"{findings.lines:,} lines in {findings.buffers} lists, {findings.indexes} index sets"
        )
        if findings.problems:
            for problem in findings.problems:
                self._line(f"  ✗ {one_line(problem)}", "red")
            self._line(f"{len(findings.problems)} problems", "bold red")
        else:
            self._line("  ✓ every line of every command is in its list, in order, once", "green")
            self._line("  ✓ every index set holds exactly the sessions it should", "green")
            accident = progress.accident
            if accident.stage is Stage.FINISHED and accident.job is not None:
                self._line(
                    f"  ✓ worker {accident.killed} was killed in {accident.job['title']!r}; its "
                    f"session fell to error {accident.seconds_to_error:.1f} s later, worker "
                    f"{accident.finished_by} claimed it and finished the job",
                    "green",
                )
            self._line(
                "  ✓ the doctor compared all sessions and indexes: nothing is wrong", "green"
            )

    def redis_cli(self, url: str, namespace: str, session_id: str) -> None:
        prefix = f"{{{namespace}}}:"
        commands: list[tuple[str, ...]] = [
            ("SCARD", f"{prefix}sessions:status:terminated"),
            ("SMEMBERS", f"{prefix}sessions:status:error"),
            ("HGETALL", f"{prefix}session:{session_id}"),
            ("LRANGE", f"{prefix}session:{session_id}:output", "-3", "-1"),
            ("ZREVRANGE", f"{prefix}sessions", "0", "1", "WITHSCORES"),
        ]
        self._line()
        self._line("The same sessions with plain redis-cli:", "bold")
        with plain_client(url) as client:
            raw = client.connection_pool.get_connection()
            try:
                for command in commands:
                    words = [command[0], *(f"'{w}'" if "{" in w else w for w in command[1:])]
                    self._line(f"$ {redis_cli(url)} {' '.join(words)}", "cyan")
                    raw.send_command(*command)
                    for line in _as_redis_cli(raw.read_response()):
                        self._line(one_line(line))
            finally:
                client.connection_pool.release(raw)

    def farewell(self, own: PrivateServer | None, url: str, namespace: str, *, keep: bool) -> None:
        self._line()
        if not keep:
            if own:
                self._line("The server is stopped now. To look around: sessionstore demo --keep")
            else:
                self._line("The demo's sessions are removed now. To keep them: --keep")
            return
        stop = f" (stop it with: kill {own.pid})" if own else ""
        self._line(f"The server runs on{stop}. To go on:", "bold")
        self._line(f"export SESSIONSTORE_URL={without_password(url, url)}")
        if namespace != "agents":
            self._line(f"export SESSIONSTORE_NAMESPACE={namespace}")
        if sys.prefix != sys.base_prefix:  # a virtual environment that may not be on PATH
            self._line(f'export PATH="{Path(sys.prefix) / "bin"}:$PATH"')
        self._line("sessionstore ls")
        self._line("sessionstore run --type claude -- ls -l")
        self._line("python3 - <<'PYTHON'")
        for line in NEXT_STEPS.strip().splitlines():
            self._line(line)
        self._line("PYTHON")


NEXT_STEPS = """
from sessionstore import SessionStore
with SessionStore() as store:
    for session in store.find_sessions(status="error", tail=1):
        print(session.id, session.metadata["exit_code"], session.error_buffer)
    print(store.get_metrics())
"""


class OnTerminal(Printed):
    """A table that lives while the workers run."""

    def reported(self, job: Job, worker: int, report: Mapping[str, Any]) -> None:
        pass  # the table shows it

    def happened(self, accident: Accident) -> None:
        pass  # so it does

    @contextmanager
    def live(self, store: SessionStore, progress: Progress) -> Generator[Callable[[], None]]:
        with Live(console=self.console, auto_refresh=False, transient=False) as live:
            yield lambda: live.update(self._table(store, progress), refresh=True)

    def _table(self, store: SessionStore, progress: Progress) -> Group:
        sessions = store.get_all_sessions(tail=1)
        rows = max(4, min(LIVE_ROWS, self.console.height - 8))
        # Those that run, and the latest of the others, in the order of their creation.
        running = [s for s in sessions if not s.ended]
        others = [s for s in sessions if s.ended]
        shown = {s.id for s in [*running, *reversed(others)][:rows]}
        table = Table(box=None, pad_edge=False, expand=True)
        for name in ("worker", "session", "job", "status"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for name in ("out", "err"):
            table.add_column(name, justify="right")
        table.add_column("last line", no_wrap=True, overflow="ellipsis", ratio=1)
        for session in sessions:
            if session.id in shown:
                table.add_row(*self._row(session))
        return Group(table, Text(), self._counts(store.get_metrics(), progress))

    def _row(self, session: AgentSession) -> tuple[str | Text, ...]:
        telling = session.error_buffer if session.status == "error" else session.output_buffer
        last = (telling or session.output_buffer or session.error_buffer or ("",))[-1]
        code = session.metadata.get("exit_code", "0")
        status = session.status if code == "0" else f"{session.status} {code}"
        return (
            escape(session.metadata.get("worker", "")),
            Text(session.id[: len("agent_") + len(session.type) + 9] + "…"),
            Text(one_line(session.metadata.get("job", ""))[:30]),
            Text(status, style=STATUS_STYLES[session.status]),
            str(session.output_total),
            str(session.error_total),
            Text(one_line(last)[:300], style="dim"),
        )

    def _counts(self, metrics: SessionMetrics, progress: Progress) -> Text:
        text = Text(f"{metrics.total_sessions} of {len(progress.jobs)} sessions", style="bold")
        for status, count in metrics.sessions_by_status.items():
            if count:
                text.append(f"   {count} {status}", style=STATUS_STYLES[status])
        for type, count in sorted(metrics.sessions_by_type.items()):
            text.append(f"   {type} {count}", style="dim")
        return text


def redis_cli(url: str) -> str:
    """How to call redis-cli for this URL, without its password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"redis-cli -s {parts.path}"
    return f"redis-cli -h {parts.hostname} -p {parts.port or 6379}"


def _as_redis_cli(reply: Any) -> Iterator[str]:
    """A reply as redis-cli prints it on a terminal."""
    if isinstance(reply, int):
        yield f"(integer) {reply}"
    elif isinstance(reply, str):
        quoted = reply.replace("\\", r"\\").replace('"', r"\"")
        yield f'"{quoted}"'
    elif not reply:
        yield "(empty array)" if isinstance(reply, (list, set)) else "(nil)"
    else:
        for number, item in enumerate(reply, 1):
            for line in _as_redis_cli(item):
                yield f"{number:>2}) {line}"
