"""The command line without the time that Python needs to start and to import.

A process that has imported the command line forks itself for each command that a test starts.
The command is a process with its own arguments, environment and streams, and it ends as any
Python does. What is saved is 0.4 s of a core, several hundred times. The program's real start is
in the tests of the demo, of the README, of pipes and of all that a shell starts.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

PROGRAM = str(Path(sys.executable).with_name("sessionstore"))
_LONGEST_REQUEST = 1 << 17


class Started:
    """A command that was started: as much of ``subprocess.Popen`` as the tests need."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        changed: str = "",
    ) -> None:
        """``changed``: code that first changes the program."""
        self.returncode: int | None = None
        self._telling = threading.Lock()
        theirs: list[int] = []
        self.stdin = self._stream(stdin, "wb", theirs)
        self.stdout = self._stream(stdout, "rb", theirs)
        self.stderr = self._stream(stderr, "rb", theirs)
        self._report, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps([arguments, environment, changed]).encode()
        with report:
            socket.send_fds(_requests(), [request], [report.fileno(), *theirs])
        for given, descriptor in zip((stdin, stdout, stderr), theirs, strict=True):
            if given < 0:
                os.close(descriptor)
        self.pid = int(self._report.recv(16))

    @staticmethod
    def _stream(given: int, mode: str, theirs: list[int]) -> IO[bytes] | None:
        """Our end, if it is a pipe; the command's end goes to ``theirs``."""
        if given == subprocess.DEVNULL:
            theirs.append(os.open(os.devnull, os.O_RDWR))
        elif given == subprocess.PIPE:
            reads, writes = os.pipe()
            ours, other = (writes, reads) if mode == "wb" else (reads, writes)
            theirs.append(other)
            return open(ours, mode)
        else:
            theirs.append(given)
        return None

    def poll(self) -> int | None:
        """The exit code, as ``Popen.returncode`` tells it; None while the command runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._report], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(PROGRAM, timeout or 0)
        with self._telling:  # a watchdog may ask beside the test
            if self.returncode is None:
                with self._report:
                    self.returncode = int(self._report.recv(16))
        return self.returncode

    def communicate(
        self, given: bytes | None = None, timeout: float | None = None
    ) -> tuple[bytes, bytes]:
        """Write ``given`` to the command, read all that it writes, wait for its end."""
        give_up = None if timeout is None else time.monotonic() + timeout
        read: dict[IO[bytes], bytes] = {}
        readers = [
            threading.Thread(target=lambda s=stream: read.update({s: s.read()}), daemon=True)
            for stream in (self.stdout, self.stderr)
            if stream and not stream.closed
        ]
        for reader in readers:
            reader.start()
        if self.stdin and not self.stdin.closed:
            with suppress(BrokenPipeError), self.stdin:
                self.stdin.write(given or b"")
        for reader in readers:
            reader.join(None if give_up is None else give_up - time.monotonic())
            if reader.is_alive():
                raise subprocess.TimeoutExpired(PROGRAM, timeout or 0)
        self.wait(None if give_up is None else max(0.0, give_up - time.monotonic()))
        for stream in read:
            stream.close()
        return tuple(read.get(s, b"") for s in (self.stdout, self.stderr))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _requests() -> socket.socket:
    """The connection to the process that forks; that ends when the connection does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # first
    return ours


# ---- The process that forks -------------------------------------------------------------------


def _fork_for_each(requests: socket.socket) -> bool:
    """Fork for each request, and report the ends; True in a process that is to be a command."""
    reports: dict[int, int] = {}
    ended, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([requests, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _report_ends(reports)
        if requests not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(requests, _LONGEST_REQUEST, 4)
        if not request:
            return False
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.detach()
            _become(*json.loads(request), streams=descriptors[1:])
            return True
        reports[pid] = descriptors[0]
        os.write(descriptors[0], b"%d" % pid)
        for descriptor in descriptors[1:]:
            os.close(descriptor)


def _report_ends(reports: dict[int, int]) -> None:
    while reports:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        report = reports.pop(pid)
        with suppress(BrokenPipeError):  # nobody waits for it
            os.write(report, b"%d" % os.waitstatus_to_exitcode(status))
        os.close(report)


def _become(
    arguments: list[str], environment: dict[str, str], changed: str, *, streams: list[int]
) -> None:
    sys.argv = [PROGRAM, *arguments]
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    encoding = environment.get("PYTHONIOENCODING")
    at_once = 1 if os.isatty(1) else -1
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115  open to the end
    sys.stdout = open(1, "w", at_once, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    exec(changed)


if __name__ == "__main__":
    import sessionstore.cli.app
    import sessionstore.cli.run
    import sessionstore.cli.views  # noqa: F401

    with socket.socket(fileno=int(sys.argv[1])) as requests:
        if not _fork_for_each(requests):
            sys.exit()
    from sessionstore.cli import main

    sys.exit(main())
