"""A bad network on purpose: a TCP proxy that breaks connections at planned moments.

It sits between a store and a real server and understands just enough of Redis's protocol to see
one command and one reply at a time. Each command that ``matches`` takes the next entry of the
plan: a fault, or None for a good connection. The proxy counts what it injected and keeps every
command that it harmed, so that a test can deliver it to the server once more, as late as it likes.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Self

import redis
import redis.asyncio
from conftest import Awaiting, World

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore._server import PrivateServer


class Fault(Enum):
    """What happens to one command."""

    LOSE_REQUEST = "the connection breaks before the command reaches the server"
    CUT_REQUEST = "the connection breaks in the middle of the command's bytes"
    LOSE_REPLY = "the server has run the command, the connection breaks before its reply"
    CUT_REPLY = "the connection breaks in the middle of the reply's bytes"
    DELAY_REPLY = "the reply comes after the client's timeout"
    NEVER_REPLY = "the server has run the command, no reply ever comes"


#: The server has carried out the command, only its answer is missing.
AFTER_THE_COMMAND = frozenset(
    {Fault.LOSE_REPLY, Fault.CUT_REPLY, Fault.DELAY_REPLY, Fault.NEVER_REPLY}
)
#: The connection breaks, which a client sees at once.
BREAKS = (Fault.LOSE_REQUEST, Fault.CUT_REQUEST, Fault.LOSE_REPLY, Fault.CUT_REPLY)
#: Only the client's timeout tells.
WAITS = (Fault.DELAY_REPLY, Fault.NEVER_REPLY)

#: What so many faults of a kind are called where they are counted.
COUNTED_AS = {
    Fault.LOSE_REQUEST: "requests_lost",
    Fault.CUT_REQUEST: "requests_cut",
    Fault.LOSE_REPLY: "replies_lost",
    Fault.CUT_REPLY: "replies_cut",
    Fault.DELAY_REPLY: "replies_too_late",
    Fault.NEVER_REPLY: "replies_that_never_came",
}


@dataclass(frozen=True, slots=True)
class Harmed:
    """A command that met a fault; ``reply`` is the server's, None if the command was lost."""

    fault: Fault
    request: bytes
    reply: bytes | None


def is_write(command: list[bytes]) -> bool:
    """Whether a command is a store's write: a script whose first key is a lane."""
    return command[0] in (b"EVALSHA", b"EVAL") and len(command) > 3 and b":lane:" in command[3]


def seeded() -> random.Random:
    """Random numbers that can be replayed: pytest shows the seed of a test that fails."""
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    print(f"replay with FAULT_SEED={seed}")
    return random.Random(seed)


def weather(rng: random.Random, faults: int, *, waits: float = 0.1) -> list[Fault]:
    """So many faults of all kinds; ``waits``: the share of those that cost a timeout."""
    waiting = round(faults * waits)
    kinds = rng.choices(WAITS, k=waiting) + rng.choices(BREAKS, k=faults - waiting)
    rng.shuffle(kinds)
    return kinds


def counted(injected: Mapping[Fault, int]) -> dict[str, int]:
    """Faults by kind, as an attack tells them."""
    return {COUNTED_AS[fault]: count for fault, count in injected.items()}


def astray(stored: Sequence[str], written: Sequence[str]) -> int:
    """How many of the different lines written are not stored, stored twice, or out of order."""
    held, known = Counter(stored), set(written)
    lost = sum(line not in held for line in written)
    too_many = held.total() - len(known & held.keys())
    place = {line: number for number, line in enumerate(written)}
    places = [place[line] for line in dict.fromkeys(stored) if line in place]
    displaced = sum(after < before for before, after in itertools.pairwise(places))
    if wrong := lost + too_many + displaced:
        print(f"{lost} lines lost, {too_many} too many, {displaced} out of order")
    return wrong


def shuffled(rng: random.Random, faults: Iterable[Fault], length: int) -> Iterator[Fault | None]:
    """A plan of so many commands with all of these faults among them, in random places."""
    planned: list[Fault | None] = list(faults)
    planned += [None] * (length - len(planned))
    rng.shuffle(planned)
    return iter(planned)


class FaultProxy:
    """A proxy to the server on a local port; see the module.

    Args:
        server_port: the real server.
        matches: which commands take an entry of the plan.
        delay: seconds by which DELAY_REPLY delays.
    """

    def __init__(
        self,
        server_port: int,
        *,
        matches: Callable[[list[bytes]], bool] = is_write,
        delay: float = 1.0,
    ) -> None:
        self.matches = matches
        self.delay = delay
        self.injected: Counter[Fault] = Counter()
        self.harmed: list[Harmed] = []
        #: Called when the fault has happened and the client does not know it yet.
        self.on_fault: Callable[[], None] | None = None
        self._server_port = server_port
        self._plan: Iterator[Fault | None] = iter(())
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []
        self.port = 0
        self.up()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def plan(self, faults: Iterable[Fault | None]) -> None:
        """What happens to the next commands; after the plan's end the network is good."""
        with self._lock:
            self._plan = iter(faults)

    def deliver(self, request: bytes) -> bytes:
        """Send the bytes of a command to the server, as a late copy of it; its reply."""
        with socket.create_connection(("127.0.0.1", self._server_port), 10) as server:
            server.sendall(request)
            frame = _Frames(server).next()
        assert frame is not None
        return frame

    def up(self) -> None:
        """Accept connections; again, after ``down``, on the same port."""
        self._stopping.clear()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port = int(listener.getsockname()[1])
        self._start(self._accept, listener)

    def down(self) -> None:
        """Break all connections and refuse new ones."""
        self._stopping.set()
        with suppress(OSError):  # wakes the thread that accepts
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        with self._lock:
            for connection in self._sockets:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def close(self) -> None:
        """End everything; raises what went wrong in ``on_fault``."""
        self.down()
        if self._failures:
            raise self._failures[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, target: Callable[[socket.socket], None], argument: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(argument,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = listener.accept()
                with self._lock:
                    if self._stopping.is_set():
                        client.close()
                        return
                    self._sockets.add(client)
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """One connection, command by command, until either side ends it."""
        try:
            with (
                client,
                suppress(OSError),
                socket.create_connection(("127.0.0.1", self._server_port), 10) as server,
            ):
                # Not create_connection's timeout: a stopped server is silent for long.
                server.settimeout(None)
                for side in (client, server):  # or small frames wait 40 ms for each other
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._sockets.add(server)
                requests, replies = _Frames(client), _Frames(server)
                while (request := requests.next()) is not None:
                    if not self._pass_on(request, client, server, replies):
                        return
        except BaseException as error:
            self._failures.append(error)
        finally:
            with self._lock:
                self._sockets = {one for one in self._sockets if one.fileno() >= 0}

    def _pass_on(
        self, request: bytes, client: socket.socket, server: socket.socket, replies: _Frames
    ) -> bool:
        """One command and its reply; False if the connection ends."""
        fault = self._next_fault() if self.matches(_words(request)) else None
        if fault is Fault.LOSE_REQUEST:
            self._note(Harmed(fault, request, None))
            return False
        if fault is Fault.CUT_REQUEST:
            server.sendall(request[: len(request) // 2])
            self._note(Harmed(fault, request, None))
            return False
        server.sendall(request)
        reply = replies.next()
        if reply is None:
            return False
        if fault is None or reply.startswith(b"-NOSCRIPT"):
            if fault is not None:  # the server has run nothing yet
                self._put_back(fault)
            client.sendall(reply)
            return True
        self._note(Harmed(fault, request, reply))
        if fault is Fault.CUT_REPLY:
            client.sendall(reply[: len(reply) // 2])
        elif fault is Fault.DELAY_REPLY:
            self._stopping.wait(self.delay)
            client.sendall(reply)
            return True
        elif fault is Fault.NEVER_REPLY:
            while client.recv(65536):
                pass
        return False

    def _next_fault(self) -> Fault | None:
        with self._lock:
            return next(self._plan, None)

    def _put_back(self, fault: Fault) -> None:
        with self._lock:
            rest = self._plan
            self._plan = (one for part in ((fault,), rest) for one in part)

    def _note(self, harmed: Harmed) -> None:
        with self._lock:
            self.injected[harmed.fault] += 1
            self.harmed.append(harmed)
        if self.on_fault is not None:
            self.on_fault()


class _Frames:
    """The commands or replies that arrive on a socket, each as its bytes."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._buffer = b""

    def next(self) -> bytes | None:
        """The next one; None if the connection ends first."""
        while (end := _end_of_frame(self._buffer, 0)) is None:
            received = self._source.recv(1 << 20)
            if not received:
                return None
            self._buffer += received
        frame, self._buffer = self._buffer[:end], self._buffer[end:]
        return frame


def _end_of_frame(buffer: bytes, at: int) -> int | None:
    """Where the value of RESP 2 or 3 that begins at ``at`` ends; None if it is not whole yet."""
    line_end = buffer.find(b"\r\n", at)
    if line_end < 0:
        return None
    kind, head = buffer[at : at + 1], buffer[at + 1 : line_end]
    after = line_end + 2
    if kind in b"$!=" and int(head) >= 0:
        after += int(head) + 2
        return after if after <= len(buffer) else None
    if kind in b"*~>%":
        for _ in range(int(head) * (2 if kind == b"%" else 1)):
            following = _end_of_frame(buffer, after)
            if following is None:
                return None
            after = following
    return after


def _words(request: bytes) -> list[bytes]:
    """The words of a command, an array of bulk strings."""
    words: list[bytes] = []
    at = request.index(b"\r\n") + 2
    while at < len(request):
        start = request.index(b"\r\n", at) + 2
        at = start + int(request[at + 1 : start - 2])
        words.append(request[start:at])
        at += 2
    return words


class FaultyWorld(World):
    """A world whose stores go through a proxy, with a store and clients that do not."""

    def __init__(self, style: str, server: PrivateServer, *, delay: float = 1.0) -> None:
        super().__init__(style, server.program.name.lower(), server.url)
        self.raw = self.client()
        #: A blocking store on a good network.
        self.direct = SessionStore(self.client(), namespace=self.namespace)
        self.proxy = FaultProxy(server.port, delay=delay)
        self.url = self.proxy.url

    def store_on_client(self, **options: Any) -> Any:
        """A store on a client that was handed in, with that client's own hidden retries."""
        if self.style == "sync":
            client = redis.Redis("127.0.0.1", self.proxy.port, **options)
            self._opened.append(client)
            return SessionStore(client, namespace=self.namespace)
        assert self.runner is not None
        async_client = redis.asyncio.Redis(host="127.0.0.1", port=self.proxy.port, **options)
        self._opened.append(Awaiting(async_client, self.runner))  # type: ignore[arg-type]
        return Awaiting(AsyncSessionStore(async_client, namespace=self.namespace), self.runner)

    def contents(self) -> dict[bytes, bytes]:
        """Every key of the namespace with what it holds, apart from lanes."""
        return contents(self.raw, self.prefix)

    def lanes(self) -> dict[str, str]:
        """The lanes of the namespace with what they hold."""
        keys = sorted(self.redis.scan_iter(f"{self.prefix}lane:*", count=1000))
        return {key: str(self.redis.get(key)) for key in keys}

    def close(self) -> None:
        super().close()
        self.proxy.close()


def contents(client: redis.Redis, prefix: str) -> dict[bytes, bytes]:
    """Every key under a prefix with what it holds (its DUMP), apart from lanes.

    Args:
        client: a client that answers in bytes.
        prefix: of the keys.
    """
    keys = [key for key in client.scan_iter(f"{prefix}*", count=1000) if b":lane:" not in key]
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.dump(key)
        held = zip(keys, pipe.execute(), strict=True)
    return {key: value for key, value in held if value is not None}
