"""What bounds the ratios: each slow operation, layer by layer, all layers in the same rounds."""

from __future__ import annotations

import gc
import statistics
from itertools import count
from typing import Any

from measuring import Work, bare_client, in_turn, ratio, table
from operations import CHUNK

from sessionstore import SessionStore
from sessionstore._server import PrivateServer
from sessionstore.scripts import load

#: A script that does nothing but answer as a write does.
NOTHING = "return 'ok 1'"


def measure(server: PrivateServer, rounds: int, calls: int) -> str:
    """The table of layers; the times of a listing are for 1,000 sessions."""
    bare = bare_client(server.url)
    with SessionStore.from_url(server.url) as store:
        rows = [
            *_rows(_append(store, bare), rounds, calls),
            *_rows(_create(store, bare), rounds, calls),
            *_rows(_listing(store, bare), rounds, 1),
        ]
    bare.close()
    return table(("layer by layer", "µs", "ratio"), rows)


def _rows(layers: dict[str, Work], rounds: int, calls: int) -> list[tuple[str, str, str]]:
    times = in_turn(list(layers.values()), rounds, calls)
    return [
        (name, f"{statistics.median(taken):.0f}", f"{ratio(taken, times[0]):.2f}")
        for name, taken in zip(layers, times, strict=True)
    ]


def _sent_bare(bare: Any, call: Any, *, nothing: bool = False) -> Work:
    """A write of ours sent by bare redis-py, without the library: its keys, its arguments."""
    sha = bare.script_load(NOTHING if nothing else load(call.script).text)
    keys = (call.lane("bench"), *call.keys)
    sequence = count(1)

    def send() -> None:
        bare.execute_command("EVALSHA", sha, len(keys), *keys, next(sequence), *call.args)

    return send


def _append(store: SessionStore, bare: Any) -> dict[str, Work]:
    session = store.create_session("claude", "bounds", "/src/project")
    call = SessionStore.add_output.__wrapped__(store, session.id, CHUNK)
    return {
        "`RPUSH` of one chunk": lambda: bare.rpush("bench:bounds", CHUNK),
        "a script that does nothing, with the keys and arguments of an append": _sent_bare(
            bare, call, nothing=True
        ),
        "the script of `add_output`, without the library": _sent_bare(bare, call),
        "`add_output`": lambda: store.add_output(session.id, CHUNK),
    }


def _create(store: SessionStore, bare: Any) -> dict[str, Work]:
    numbers = count()

    def arguments() -> tuple[str, ...]:
        n = next(numbers)
        return "claude", f"bounds-{n}", "/src/project", f"task-{n % 50}", "mcp-1"

    def call() -> Any:
        return SessionStore.create_session.__wrapped__(store, *arguments())

    stored = bare.hgetall(f"{{agents}}:session:{store.create_session(*arguments()).id}")
    return {
        "`HSET` of a session's fields": lambda: bare.hset(
            f"bench:hash:{next(numbers)}", mapping=stored
        ),
        "a script that does nothing, with the keys and arguments of a new session": _sent_bare(
            bare, call(), nothing=True
        ),
        "`create_session`": lambda: store.create_session(*arguments()),
    }


def _listing(store: SessionStore, bare: Any) -> dict[str, Work]:
    ids = [
        store.create_session("claude", f"listed-{n}", "/src/project", f"task-{n // 4}").id
        for n in range(1000)
    ]
    keys = [f"{{agents}}:session:{session_id}" for session_id in ids]

    def pipelined() -> list[Any]:
        with bare.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(key)
            return list(pipe.execute())

    def listed() -> list[Any]:
        return store.find_sessions(limit=1000)

    def pages() -> None:
        call = SessionStore.find_sessions.__wrapped__(store, limit=1000)
        sha = bare.script_load(load(call.script).text)
        score, last, rows = "", "", 0
        while rows < 1000:
            args = [*call.args]
            args[2:4] = score, last
            reply = bare.execute_command("EVALSHA", sha, len(call.keys), *call.keys, *args)
            score, last = reply[1:3]
            rows += len(reply[4])

    def without_collector() -> None:
        gc.disable()
        try:
            listed()
        finally:
            gc.enable()

    return {
        "1,000 `HGETALL`, pipelined": pipelined,
        "the pages of a listing of 1,000, not decoded": pages,
        "the listing, Python's garbage collector off": without_collector,
        "the listing": listed,
    }
