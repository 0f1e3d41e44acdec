"""``sessionstore run``: one command as one session.

The command's stdout and stderr are pipes. A thread each passes the bytes through at once and
stores them as entries, line by line as they appear. The command is the main thing: an outage of
the store holds its output up for a while, it does not end it.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from redis.exceptions import OutOfMemoryError

from sessionstore import (
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionNotFoundError,
    SessionStore,
)
from sessionstore.arguments import MAX_CHUNKS, MAX_METADATA_BYTES, MAX_METADATA_NAMES
from sessionstore.errors import TRANSIENT
from sessionstore.lines import LineSplitter

PATIENCE = 60.0  # seconds that output waits for an unreachable store before it goes unrecorded
LINGER = 2.0  # seconds without output after which a background process's pipe is left behind
LONGEST_LINGER = 10.0  # seconds after the command's end, whatever the background process writes
READ_SIZE = 64 * 1024
FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # exit codes, as a shell gives them

STDOUT, STDERR = 1, 2
OWN_METADATA = ("command", "host", "pid", "exit_code", "signal")
# An outage, and a server whose memory is full for a while.
PASSING: tuple[type[Exception], ...] = (OutcomeUnknownError, OutOfMemoryError, *TRANSIENT)


def run_command(
    store: SessionStore,
    command: Sequence[str],
    *,
    type: str,
    service_session_id: str | None = None,
    project_path: str | None = None,
    task_id: str | None = None,
    mcp_session_id: str | None = None,
    metadata: dict[str, str] | None = None,
    unique: bool = False,
    on_created: Callable[[str], None] | None = None,
    on_data: Callable[[int, bytes], None] | None = None,
    stdin: int | None = None,
) -> int:
    """Run a command as a session and wait for its end.

    Args:
        store: where the session is kept.
        command: the program and its arguments.
        service_session_id: None: one is made up from host, pid and chance.
        project_path: the directory that the session is said to work in; None: the current one.
        on_created: told the session's id before the command starts.
        on_data: given every piece of output, with its file descriptor (1 or 2), instead of this
            process's own stdout and stderr.
        stdin: what the command reads, as for ``subprocess.Popen``; None: this process's stdin.

    Returns:
        The command's exit code; 128 + n if signal n ended it; 127 if there is no such command.
    """
    if len(metadata or {}) > MAX_METADATA_NAMES - len(OWN_METADATA):
        raise InvalidArgumentError.of(
            "metadata", f"has no room for the names of run itself: {', '.join(OWN_METADATA)}"
        )
    host = socket.gethostname()
    session = store.create_session(
        type,
        service_session_id or f"run-{host}-{os.getpid()}-{uuid4().hex[:8]}",
        project_path or _printable(os.getcwd()),
        task_id,
        mcp_session_id,
        status="starting",
        metadata=(metadata or {}) | {"command": _shortened(shlex.join(command)), "host": host},
        unique=unique,
    )
    if on_created is not None:
        on_created(session.id)
    recorder = _Recorder(store, session.id)
    with _forwarded_signals() as signals:
        try:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "SESSIONSTORE_SESSION_ID": session.id},
            )
        except (OSError, ValueError) as error:
            return _not_started(command[0], error, recorder, on_data or _pass_through)
        with process:
            signals.forward_to(process)
            code = _accompany(process, recorder, on_data or _pass_through)
        recorder.finish(code)
        return 128 - code if code < 0 else code


def _not_started(
    program: str, error: Exception, recorder: _Recorder, pass_on: Callable[[int, bytes], None]
) -> int:
    """Say in the session and on stderr why a command did not start; its exit code."""
    message = f"{program}: {getattr(error, 'strerror', None) or error}"
    code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    recorder.add(recorder.store.add_error, [message])
    pass_on(STDERR, f"sessionstore: {message}\n".encode())
    recorder.finish(code)
    return code


def _accompany(
    process: subprocess.Popen[bytes], recorder: _Recorder, pass_on: Callable[[int, bytes], None]
) -> int:
    """Carry a command's output until it has ended; its return code."""
    store = recorder.store
    pumps = [
        _Pump(process.stdout, STDOUT, recorder, store.add_output, pass_on),
        _Pump(process.stderr, STDERR, recorder, store.add_error, pass_on),
    ]
    recorder.call(store.update_metadata, recorder.session_id, {"pid": str(process.pid)})
    recorder.call(store.update_status, recorder.session_id, "busy")
    code = process.wait()
    give_up_at = time.monotonic() + LONGEST_LINGER
    for pump in pumps:
        pump.wait(give_up_at)
    return code


class _Recorder:
    """Writes to the session, through outages of the store."""

    def __init__(self, store: SessionStore, session_id: str) -> None:
        self.store = store
        self.session_id = session_id
        self._longest = store.settings.chunk_limit
        self._given_up = False

    def add(self, append: Callable[..., int], entries: Sequence[str]) -> None:
        """Store entries; ``append`` is ``add_output`` or ``add_error``."""
        fitting = [piece for entry in entries for piece in _pieces(entry, self._longest)]
        for first in range(0, len(fitting), MAX_CHUNKS):
            self.call(append, self.session_id, *fitting[first : first + MAX_CHUNKS])

    def call(self, operation: Callable[..., Any], *arguments: Any) -> None:
        """Carry out one write, patiently; not at all once the output was given up."""
        if not self._given_up:
            failure = self._try(operation, *arguments)
            if failure is not None:
                self._given_up = True
                _say(f"{failure}: the command goes on, unrecorded")

    def finish(self, code: int) -> None:
        """Say how the command ended; the status first, it is what others wait for."""
        status = "terminated" if code == 0 else "error"
        facts = {"exit_code": str(128 - code if code < 0 else code)}
        if code < 0:
            facts["signal"] = signal.Signals(-code).name
        for operation, value in (
            (self.store.update_status, status),
            (self.store.update_metadata, facts),
        ):
            failure = self._try(operation, self.session_id, value)
            if failure is not None:
                _say(f"{failure}: how the command ended is not recorded")
                return

    def _try(self, operation: Callable[..., Any], *arguments: Any) -> str | None:
        """Carry out one write; what is wrong if it cannot be."""
        give_up_at = time.monotonic() + PATIENCE
        unknown: OutcomeUnknownError | None = None
        told = False
        while True:
            try:
                if unknown is None:
                    operation(*arguments)
                else:
                    self.store.repeat(unknown)
                return None
            except SessionNotFoundError:
                return f"session {self.session_id} was deleted"
            except PASSING as error:
                if isinstance(error, OutcomeUnknownError):
                    unknown = error
                if time.monotonic() > give_up_at:
                    return f"the store took nothing for {PATIENCE:.0f} s ({error})"
                if not told:
                    told = True
                    _say(f"the store takes nothing now ({error}), output waits for it")
                time.sleep(0.2)
            except Exception as error:
                return f"the store refuses ({error})"


class _Pump:
    """A thread that carries one stream of the command to the terminal and into the session."""

    def __init__(
        self,
        source: Any,
        descriptor: int,
        recorder: _Recorder,
        append: Callable[..., int],
        pass_on: Callable[[int, bytes], None],
    ) -> None:
        self._source = source
        self._descriptor = descriptor
        self._recorder = recorder
        self._append = append
        self._pass_on = pass_on
        self._last_data = time.monotonic()
        self._busy = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        splitter = LineSplitter()
        while (data := os.read(self._source.fileno(), READ_SIZE)) and not self._abandoned:
            self._busy = True
            reader_left = False
            try:
                self._pass_on(self._descriptor, data)
            except OSError:
                reader_left = True
            self._recorder.add(self._append, splitter.feed(data))
            if reader_left:
                break  # and close the pipe: the command learns of it as in any pipeline
            self._last_data = time.monotonic()
            self._busy = False
        self._busy = True
        if not self._abandoned:
            self._recorder.add(self._append, splitter.close())
            self._source.close()

    def wait(self, give_up_at: float) -> None:
        """Wait for the end of the stream, once the command has ended.

        A process that the command left in the background may hold the pipe open for ever, and
        write to it.
        """
        while self._thread.is_alive():
            self._thread.join(0.05)
            now = time.monotonic()
            if now > give_up_at + PATIENCE or (
                not self._busy and (now > give_up_at or now - self._last_data > LINGER)
            ):
                self._abandoned = True
                _say("a background process of the command keeps its output open; not waiting")
                return


@dataclass(slots=True)
class _Signals:
    """Signals to this process, for the command."""

    process: subprocess.Popen[bytes] | None = None
    early: list[int] = field(default_factory=list[int])

    def handle(self, number: int, _frame: object) -> None:
        if self.process is None:
            self.early.append(number)
        elif not (number in FROM_TERMINAL and _from_terminal(self.process.pid)):
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def forward_to(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        while self.early:
            self.handle(self.early.pop(0), None)


@contextmanager
def _forwarded_signals() -> Generator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals.handle) for number in FORWARDED}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _from_terminal(command: int) -> bool:
    """Whether a Ctrl-C that reaches this process has reached the command as well.

    So it is if both are in the foreground process group of the terminal. A ``kill -INT`` of this
    process alone cannot be told from it, and is not handed on then; ``kill -TERM`` is.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp() == os.getpgid(command)
    except OSError:
        return False
    finally:
        os.close(terminal)


def _pass_through(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _say(message: str) -> None:
    with suppress(OSError):
        print(f"sessionstore: {message}", file=sys.stderr, flush=True)


def _pieces(entry: str, longest: int) -> list[str]:
    """An entry in pieces that a store with a small chunk limit takes."""
    data = entry.encode()
    if len(data) <= longest:
        return [entry]
    size = max(longest // 4, 1)  # characters: of four bytes at most
    return [entry[first : first + size] for first in range(0, len(entry), size)]


def _printable(value: str) -> str:
    """A text from the operating system; a byte that is not UTF-8 becomes '?'."""
    return value.encode(errors="replace").decode()


def _shortened(value: str) -> str:
    """As much of a text as a metadata value may hold."""
    data = _printable(value).encode()
    if len(data) <= MAX_METADATA_BYTES:
        return data.decode()
    return data[: MAX_METADATA_BYTES - 3].decode(errors="ignore") + "…"
