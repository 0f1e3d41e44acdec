"""``sessionstore`` as a process: in a pipe, and on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import redis
from prestarted import Started

from sessionstore import SessionStore
from sessionstore._server import PrivateServer

#: What a user's environment, or a CI service's, could change about colours and settings.
_UNWANTED = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "COLUMNS", "LINES")


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str = ""


class CommandLine:
    """The command line, a store and a plain client on one fresh namespace."""

    def __init__(self, server: PrivateServer) -> None:
        self.url = server.url
        self.namespace = f"test-{uuid4().hex[:12]}"
        self.store = SessionStore.from_url(server.url, namespace=self.namespace)
        self.redis: Any = redis.Redis.from_url(server.url, decode_responses=True)
        self._watchdogs: list[threading.Timer] = []

    def environment(self, **changes: str | None) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _UNWANTED and not name.startswith(("SESSIONSTORE_", "TERM"))
        }
        set_here: dict[str, str | None] = {
            "SESSIONSTORE_URL": self.url,
            "SESSIONSTORE_NAMESPACE": self.namespace,
            "TERM": "xterm-256color",
            "PYTHONIOENCODING": "utf-8",
        }
        return kept | {name: v for name, v in (set_here | changes).items() if v is not None}

    def start(
        self, *arguments: str, env: dict[str, str | None] | None = None, **streams: int
    ) -> Started:
        """Start a command; it is killed if it takes a minute, so no test waits for ever."""
        process = Started(list(arguments), self.environment(**(env or {})), **streams)
        watchdog = threading.Timer(60, process.kill)
        watchdog.daemon = True
        watchdog.start()
        self._watchdogs.append(watchdog)
        return process

    def run(self, *arguments: str, env: dict[str, str | None] | None = None) -> Finished:
        """Run a command with its output in pipes."""
        process = self.start(*arguments, env=env)
        out, err = process.communicate()
        return Finished(process.wait(), out.decode(), err.decode())

    def on_terminal(
        self,
        *arguments: str,
        columns: int = 80,
        env: dict[str, str | None] | None = None,
        stop_at: str = "",
    ) -> Finished:
        """Run a command on a terminal of that width; ``out`` is all the terminal received.

        ``stop_at``: what the terminal has received when the command is ended with SIGTERM.
        """
        ours, theirs = pty.openpty()
        try:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
            modes = termios.tcgetattr(theirs)
            modes[1] &= ~termios.OPOST  # no CR before LF: what is received is what was sent
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
            process = self.start(*arguments, env=env, stdout=theirs, stderr=theirs)
        finally:
            os.close(theirs)
        received = b""
        try:
            while data := os.read(ours, 65536):
                received += data
                if stop_at and stop_at.encode() in received:
                    process.terminate()
        except OSError:  # EIO: Linux's way to say that the other side is closed
            pass
        finally:
            os.close(ours)
        return Finished(process.wait(), received.decode())

    def close(self) -> None:
        for watchdog in self._watchdogs:
            if watchdog.is_alive():
                watchdog.function()  # does nothing to a process that has ended
            watchdog.cancel()
        for key in self.redis.scan_iter(f"{{{self.namespace}}}:*", count=1000):
            self.redis.unlink(key)
        self.redis.close()
        self.store.close()


@contextmanager
def command_line(server: PrivateServer) -> Iterator[CommandLine]:
    opened = CommandLine(server)
    try:
        yield opened
    finally:
        opened.close()
