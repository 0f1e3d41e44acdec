"""``sessionstore run``: one command as one session.

The command's stdout and stderr are pipes. A thread each passes the bytes through at once and
writes them to the session (``writer.py``), line by line as they appear. The command is the main
thing: an outage of the store holds its output up for a while, it does not end it.

The session is claimed for as long as the command runs. A lease that cannot be renewed in an outage
is this worker's still; one that others have ended is lost, and then the command is stopped: two
agents at work on one session do more harm than one that has to start again.
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
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from sessionstore import (
    AgentSessionStatus,
    InvalidArgumentError,
    Lease,
    LeaseLostError,
    OutcomeUnknownError,
    SessionBusyError,
    SessionNotFoundError,
    SessionStore,
    SessionStoreError,
    Writer,
    WritesLostError,
)
from sessionstore import arguments as check
from sessionstore.arguments import MAX_METADATA_BYTES, MAX_METADATA_NAMES
from sessionstore.cli.failures import LEASE_LOST
from sessionstore.errors import PASSING
from sessionstore.holding import LONGEST_TTL, SHORTEST_TTL
from sessionstore.lease import DEFAULT_TTL

PATIENCE = 60.0  # seconds that output waits for an unreachable store before it goes unrecorded
LINGER = 2.0  # seconds without output after which a background process's pipe is left behind
LONGEST_LINGER = 10.0  # seconds after the command's end, whatever the background process writes
STOPPED_AFTER = 5.0  # seconds that a command has to end by itself when its lease is lost
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
#: Of an earlier run, and not true of this one.
FORMER_METADATA = ("pid", "exit_code", "signal")
OWN_METADATA = ("command", "host", *FORMER_METADATA)
#: What a session may be to be continued.
CONTINUED: tuple[AgentSessionStatus, ...] = ("active", "error", "starting")
# The session is in other hands, or gone.
LOST = (LeaseLostError, SessionBusyError, SessionNotFoundError)


def run_command(
    store: SessionStore,
    command: Sequence[str],
    *,
    type: str | None = None,
    service_session_id: str | None = None,
    project_path: str | None = None,
    task_id: str | None = None,
    mcp_session_id: str | None = None,
    metadata: dict[str, str] | None = None,
    unique: bool = False,
    session_id: str | None = None,
    expected: AgentSessionStatus | Iterable[AgentSessionStatus] = CONTINUED,
    wait: float = 0.0,
    ttl: float = DEFAULT_TTL,
    on_created: Callable[[str], None] | None = None,
    on_data: Callable[[int, bytes], None] | None = None,
    stdin: int | None = None,
) -> int:
    """Run a command as a session that this worker holds, and wait for its end.

    Args:
        store: where the session is kept.
        command: the program and its arguments.
        type: the agent; a new session is created.
        service_session_id: None: one is made up from host, pid and chance.
        project_path: the directory that the session is said to work in; None: the current one.
        session_id: instead of ``type``: the session to continue.
        expected: the status, or statuses, that a session to be continued must have.
        wait: seconds to wait for a session to be continued, as for ``claim``.
        ttl: seconds after which others may take the session if this process dies.
        on_created: told the session's id when it is claimed, before the command starts.
        on_data: given every piece of output, with its file descriptor (1 or 2), instead of this
            process's own stdout and stderr.
        stdin: what the command reads, as for ``subprocess.Popen``; None: this process's stdin.

    Returns:
        The command's exit code; 128 + n if signal n ended it; 127 if there is no such command;
        5 if the lease was lost.

    Raises:
        SessionBusyError: another worker holds the session to be continued.
        SessionNotActiveError: its status is not among ``expected``.
    """
    if (type is None) == (session_id is None):
        raise InvalidArgumentError.of("type", "or session_id must be given, and not both")
    if len(metadata or {}) > MAX_METADATA_NAMES - len(OWN_METADATA):
        raise InvalidArgumentError.of(
            "metadata", f"has no room for the names of run itself: {', '.join(OWN_METADATA)}"
        )
    # Before a session is created that could not be claimed.
    check.seconds("ttl", ttl, SHORTEST_TTL, LONGEST_TTL)
    host = socket.gethostname()
    about = (metadata or {}) | {"command": _shortened(shlex.join(command)), "host": host}
    if type is not None:
        created = store.create_session(
            type,
            service_session_id or f"run-{host}-{os.getpid()}-{uuid4().hex[:8]}",
            project_path or _printable(os.getcwd()),
            task_id,
            mcp_session_id,
            status="starting",
            metadata=about,
            unique=unique,
        )
        lease = store.claim(created.id, ttl=ttl, expected="starting")
    else:
        assert session_id is not None
        lease = store.claim(session_id, ttl=ttl, wait=wait, expected=expected)
    recorder = _Recorder(store, lease)
    try:
        if type is None:
            store.update_metadata(lease.session_id, about | dict.fromkeys(FORMER_METADATA))
        if on_created is not None:
            on_created(lease.session_id)
        return _run(command, recorder, on_data or _pass_through, stdin)
    except BaseException:
        with suppress(Exception):  # what went wrong before matters more
            lease.release("active" if type is None else "error")
        raise
    finally:
        recorder.close()


def _run(
    command: Sequence[str],
    recorder: _Recorder,
    pass_on: Callable[[int, bytes], None],
    stdin: int | None,
) -> int:
    """Run a command under its lease; the exit code."""
    if recorder.loss.is_found:
        return LEASE_LOST
    with _forwarded_signals() as signals:
        try:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "SESSIONSTORE_SESSION_ID": recorder.session_id},
            )
        except (OSError, ValueError) as error:
            code = _not_started(command[0], error, recorder, pass_on)
        else:
            with process:
                signals.forward_to(process)
                recorder.loss.stops(process)
                code = _accompany(process, recorder, pass_on)
            recorder.finish(code)
    if recorder.loss.is_found:
        recorder.loss.is_told.wait(1)  # another thread is about to say it
        return LEASE_LOST
    return 128 - code if code < 0 else code


def _not_started(
    program: str, error: Exception, recorder: _Recorder, pass_on: Callable[[int, bytes], None]
) -> int:
    """Say in the session and on stderr why a command did not start; its exit code."""
    message = f"{program}: {getattr(error, 'strerror', None) or error}"
    code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    errors = recorder.writer(errors=True)
    recorder.write(errors.write, message)
    recorder.close_writer(errors)
    pass_on(STDERR, f"sessionstore: {message}\n".encode())
    recorder.finish(code)
    return code


def _accompany(
    process: subprocess.Popen[bytes], recorder: _Recorder, pass_on: Callable[[int, bytes], None]
) -> int:
    """Carry a command's output until it has ended; its return code."""
    pumps = [
        _Pump(process.stdout, STDOUT, recorder, pass_on),
        _Pump(process.stderr, STDERR, recorder, pass_on),
    ]
    pid = {"pid": str(process.pid)}
    recorder.call(recorder.store.update_metadata, recorder.session_id, pid)
    code = _wait_for(process)
    give_up_at = time.monotonic() + LONGEST_LINGER
    for pump in pumps:
        pump.wait(give_up_at)
    return code


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for a command's end; its return code.

    In short waits: Python hands a signal on between two of its own instructions, so that one which
    comes just before a wait without an end would reach the command only after its end.
    """
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(1.0)


class _Loss:
    """The end of a lease by others: the command is stopped, and nothing more is written.

    Whichever thread finds it out tells it here: the one that renews, or one that writes.
    """

    def __init__(self, lease: Lease) -> None:
        self.is_found = False
        self.is_told = threading.Event()
        self._session_id = lease.session_id
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ending = False
        lease.on_lost(self._told)

    def stops(self, process: subprocess.Popen[bytes]) -> None:
        """The command that is to be stopped."""
        with self._lock:
            self._process = process
        if self.is_found:
            self._stop(process)

    def is_ending(self) -> None:
        """From now on only writes can find it.

        A lease that this worker has ended itself looks lost to a renewal, as long as the answer to
        the write that ended it has not come.
        """
        with self._lock:
            self._is_ending = True

    def find(self, error: SessionStoreError) -> None:
        """A write, or a renewal, was refused with this."""
        with self._lock:
            if self.is_found:
                return
            self.is_found = True
            process, is_ending = self._process, self._is_ending
        if error.owner:
            now = f"held by {error.owner} now"
        else:
            now = f"{error.status} and held by nobody now" if error.status else "it was deleted"
        what = "how the command ended is not recorded" if is_ending else "stopping the command"
        if process is not None and not is_ending:
            self._stop(process)  # before a word: stderr may block
        _say(f"the lease on {self._session_id} was lost ({now}): {what}")
        self.is_told.set()

    def _told(self, lease: Lease) -> None:
        with self._lock:
            if self._is_ending:
                return
        try:
            lease.renew()
        except LeaseLostError as error:  # what is known of the loss; nothing was sent
            self.find(error)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            process.terminate()
        killing = threading.Timer(STOPPED_AFTER, process.kill)  # does nothing to one that has ended
        killing.daemon = True
        killing.start()


class _Recorder:
    """Writes to the session, through outages of the store, until the lease is over."""

    def __init__(self, store: SessionStore, lease: Lease) -> None:
        self.store = store
        self.session_id = lease.session_id
        self.loss = _Loss(lease)
        self._lease = lease
        self._given_up = False
        self._closed = False

    def writer(self, *, errors: bool) -> Writer:
        """A writer to the session's output or errors, to be written to by ``write``."""
        return self.store.writer(self.session_id, errors=errors, patience=PATIENCE)

    def write(self, operation: Callable[..., object], *arguments: Any) -> None:
        """Carry out an operation of a writer; not at all once the output was given up."""
        if self._given_up or self.loss.is_found or self._closed:
            return
        try:
            operation(*arguments)
        except WritesLostError as error:  # told once; what this write has was not taken
            self._tell_of_lost_writes(error)
            self.write(operation, *arguments)
        except LOST as error:
            if not self._closed:
                self.loss.find(error)
        except PASSING as error:
            self._give_up(_too_long(error))
        except Exception as error:
            self._give_up(f"the store refuses ({error})")

    def _tell_of_lost_writes(self, error: WritesLostError) -> None:
        entries = "entry" if error.lost == 1 else "entries"
        message = f"the server lost {error.lost:,} {entries} of this session in a failover"
        _say(f"{message}; the command goes on")
        self.call(self.store.add_error, self.session_id, message)

    def close_writer(self, writer: Writer) -> None:
        """Have everything stored."""
        self.write(writer.close)
        with suppress(Exception):  # told already; else it is closed
            writer.close()

    def call(self, operation: Callable[..., Any], *arguments: Any) -> None:
        """Carry out one write, patiently; not at all once the output was given up."""
        if not self._given_up:
            failure = self._try(PATIENCE, operation, *arguments)
            if failure is not None:
                self._give_up(failure)

    def _give_up(self, failure: str) -> None:
        if not self._given_up:
            self._given_up = True
            _say(f"{failure}: the command goes on, unrecorded")

    def finish(self, code: int) -> None:
        """Say how the command ended; the status ends the lease.

        What the metadata say comes before it, if the lease certainly lasts: whoever waits for the
        end finds them, and they do not come after those of the next worker. But a store that does
        not take them now, for its memory is full, still takes the status.
        """
        status = "terminated" if code == 0 else "error"
        facts = {
            "exit_code": str(128 - code if code < 0 else code),
            "signal": _signal_name(-code) if code < 0 else None,
        }
        tell = (self.store.update_metadata, self.session_id, facts)
        told = self._lease.expires_in > 0 and self._try(0, *tell) is None
        self.loss.is_ending()
        failure = self._try(PATIENCE, self.store.update_status, self.session_id, status)
        if failure is None and not told:
            failure = self._try(PATIENCE, *tell)
        if failure is not None:
            _say(f"{failure}: how the command ended is not recorded")

    def close(self) -> None:
        """Write nothing more. A lease that could not be given back is left to the reapers."""
        self._closed = True
        self._lease.abandon()

    def _try(self, patience: float, operation: Callable[..., Any], *arguments: Any) -> str | None:
        """Carry out one write, unless the lease is lost; what is wrong if it cannot be."""
        give_up_at = time.monotonic() + patience
        unknown: OutcomeUnknownError | None = None
        told = False
        while not (self.loss.is_found or self._closed):
            try:
                if unknown is None:
                    operation(*arguments)
                else:
                    self.store.repeat(unknown)
                return None
            except WritesLostError as error:
                unknown = None
                self._tell_of_lost_writes(error)
            except LOST as error:
                if not self._closed:
                    self.loss.find(error)
            except PASSING as error:
                if isinstance(error, OutcomeUnknownError):
                    unknown = error
                if time.monotonic() > give_up_at:
                    return _too_long(error)
                if not told:
                    told = True
                    _say(f"the store takes nothing now ({error}), the session waits for it")
                time.sleep(0.2)
            except Exception as error:
                return f"the store refuses ({error})"
        return None


class _Pump:
    """A thread that carries one stream of the command to the terminal and into the session."""

    def __init__(
        self,
        source: Any,
        descriptor: int,
        recorder: _Recorder,
        pass_on: Callable[[int, bytes], None],
    ) -> None:
        self._source = source
        self._descriptor = descriptor
        self._recorder = recorder
        self._writer = recorder.writer(errors=descriptor == STDERR)
        self._pass_on = pass_on
        self._last_data = time.monotonic()
        self._busy = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        while (data := os.read(self._source.fileno(), READ_SIZE)) and not self._abandoned:
            self._busy = True
            reader_left = False
            try:
                self._pass_on(self._descriptor, data)
            except OSError:
                reader_left = True
            self._recorder.write(self._write, data)
            if reader_left:
                break  # and close the pipe: the command learns of it as in any pipeline
            self._last_data = time.monotonic()
            self._busy = False
        self._busy = True
        if not self._abandoned:
            self._recorder.close_writer(self._writer)
            self._source.close()

    def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
        except ValueError:
            if not self._abandoned:  # else it was closed
                raise

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
                self._recorder.close_writer(self._writer)
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


def _too_long(error: Exception) -> str:
    return f"the store took nothing for {PATIENCE:.0f} s ({error})"


def _say(message: str) -> None:
    with suppress(OSError):
        print(f"sessionstore: {message}", file=sys.stderr, flush=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return str(number)


def _printable(value: str) -> str:
    """A text from the operating system; a byte that is not UTF-8 becomes '?'."""
    return value.encode(errors="replace").decode()


def _shortened(value: str) -> str:
    """As much of a text as a metadata value may hold."""
    data = _printable(value).encode()
    if len(data) <= MAX_METADATA_BYTES:
        return data.decode()
    return data[: MAX_METADATA_BYTES - 3].decode(errors="ignore") + "…"
