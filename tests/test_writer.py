"""Writers: text files of which every line is stored, in order and once."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import redis
from conftest import World
from waiting import until

from sessionstore import (
    AsyncSessionStore,
    AsyncWriter,
    InvalidArgumentError,
    LeaseLostError,
    OutcomeUnknownError,
    SessionNotFoundError,
    SessionStore,
    Writer,
    aside,
)
from sessionstore._server import PrivateServer
from sessionstore.lines import LONGEST_ENTRY
from sessionstore.testing import async_memory_store, memory_store

GONE = "agent_claude_00000000-0000-4000-8000-000000000000"
MIB = 1024 * 1024


@pytest.fixture
def own(store: Any) -> str:
    """A session."""
    created: str = store.create_session("claude", "s", "/src").id
    return created


def output(store: Any, session_id: str) -> tuple[str, ...]:
    entries: tuple[str, ...] = store.get_session(session_id).output_buffer
    return entries


# ---- What is stored ---------------------------------------------------------------------------


def test_a_line_is_an_entry_and_an_unfinished_one_is_stored_at_the_close(
    store: Any, own: str
) -> None:
    with store.writer(own) as out:
        out.write("one\ntw")
        out.write("o\n\nthree")
        out.flush()
        assert output(store, own) == ("one", "two", "")
    assert output(store, own) == ("one", "two", "", "three")


def test_errors_are_written_to_the_errors(store: Any, own: str) -> None:
    with store.writer(own, errors=True) as out:
        out.write("oops\n")
    session = store.get_session(own)
    assert (session.output_buffer, session.error_buffer) == ((), ("oops",))


def test_what_is_written_is_stored_after_a_moment_by_itself(world: World, store: Any) -> None:
    own = store.create_session("claude", "s", "/src").id
    with store.writer(own) as out:
        out.write("first\n")
        world.until(lambda: output(store, own) == ("first",), 5)
        out.write("second\n")
        world.until(lambda: output(store, own) == ("first", "second"), 5)


def test_a_write_tells_how_much_it_took(store: Any, own: str) -> None:
    with store.writer(own) as out:
        assert [out.write(what) for what in ("é\n", "é\n".encode(), "", b"", bytearray(b"x"))] == [
            2, 3, 0, 0, 1
        ]  # fmt: skip
        with pytest.raises(TypeError):
            out.write(5)
    assert output(store, own) == ("é", "é", "x")


def test_bytes_may_be_cut_anywhere(store: Any, own: str) -> None:
    text = "aé€😀\n".encode()
    with store.writer(own) as out:
        for cut in range(len(text)):
            out.write(text[:cut])
            out.write(memoryview(text)[cut:])
    assert output(store, own) == ("aé€😀",) * len(text)


def test_what_is_no_text_is_replaced_and_not_lost(store: Any, own: str) -> None:
    with store.writer(own) as out:
        out.write(b"caf\xe9\n")
        out.write("lone \ud800\n")
        out.write(b"cut \xf0\x9f")
        out.write("by a str\n")
        out.write(b"at the end \xf0\x9f")
    assert output(store, own) == (
        "caf\ufffd", "lone \ufffd", "cut \ufffdby a str", "at the end \ufffd"
    )  # fmt: skip


def test_an_endless_line_is_stored_in_pieces_as_it_grows(store: Any, own: str) -> None:
    with store.writer(own) as out:
        for _ in range(5):
            out.write("x" * (LONGEST_ENTRY // 2))
        out.flush()
        assert output(store, own) == ("x" * LONGEST_ENTRY,) * 2
    assert output(store, own) == ("x" * LONGEST_ENTRY,) * 2 + ("x" * (LONGEST_ENTRY // 2),)


def test_a_small_chunk_limit_splits_lines(world: World) -> None:
    store = world.store(chunk_limit=10)
    own = store.create_session("claude", "s", "/src").id
    with store.writer(own) as out:
        out.write("é" * 12 + "\nshort\n")
    assert output(store, own) == ("é" * 5, "é" * 5, "é" * 2, "short")


def test_many_and_large_lines_stay_in_order(world: World) -> None:
    store = world.store(buffer_limit=0, buffer_bytes=0)
    own = store.create_session("claude", "s", "/src").id
    lines = [f"{n} " + "x" * (n % 7 * 9000 if n % 50 == 0 else n % 7) for n in range(2500)]
    with store.writer(own, max_pending=100_000) as out:
        for line in lines:
            out.write(line + "\n")
    assert output(store, own) == tuple(lines)


def test_every_entry_is_redacted(world: World) -> None:
    store = world.store(redact=lambda text: text.replace("secret", "***"))
    own = store.create_session("claude", "s", "/src").id
    with store.writer(own) as out:
        out.write("a sec")
        out.write("ret\nno\n")
    assert output(store, own) == ("a ***", "no")


# ---- Errors and endings -----------------------------------------------------------------------


def test_opening_and_closing_contact_nobody(store: Any) -> None:
    with store.writer(GONE):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"session_id": ""},
        {"errors": "yes"},
        {"batch_bytes": 0},
        {"interval": -1},
        {"interval": 61},
        {"max_pending": 0},
        {"patience": float("nan")},
        {"patience": "long"},
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_at_once(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    for opened in (memory_store(), async_memory_store()):
        with pytest.raises(InvalidArgumentError, match=name) as caught:
            opened.writer(**({"session_id": GONE} | wrong))
        assert caught.value.argument == name


def test_an_error_is_raised_by_every_later_write_by_flush_and_by_the_close(
    world: World, store: Any
) -> None:
    out = store.writer(GONE)
    out.write("lost\n")

    def refused() -> bool:
        try:
            out.write("more\n")
        except SessionNotFoundError:
            return True
        return False

    world.until(refused, 5)
    assert refused()
    for operation in (out.flush, out.close):
        with pytest.raises(SessionNotFoundError):
            operation()
    out.close()
    assert out.closed


def test_leaving_tells_what_was_not_stored(store: Any) -> None:
    out = store.writer(GONE)
    with pytest.raises(SessionNotFoundError), out:
        out.write("lost\n")


def test_a_closed_writer_takes_nothing(store: Any, own: str) -> None:
    out = store.writer(own)
    out.close()
    out.close()
    with pytest.raises(ValueError, match="closed"):
        out.write("late\n")
    with pytest.raises(ValueError, match="closed"):
        out.flush()
    with pytest.raises(ValueError, match="closed"), out:
        pass
    assert output(store, own) == ()


def test_leaving_by_an_exception_stores_what_was_written(store: Any, own: str) -> None:
    with pytest.raises(ZeroDivisionError), store.writer(own) as out:
        print(out.write("before\nunfinished") / 0)
    assert output(store, own) == ("before", "unfinished")


def test_the_exception_of_the_body_wins_and_the_writers_is_logged(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), store.writer(GONE) as out:
        print(out.write("secret\n") / 0)
    assert "not everything that was written is stored: no session" in caplog.text
    assert "secret" not in caplog.text


def test_a_lost_lease_ends_the_writer_and_is_told(world: World, store: Any) -> None:
    own = store.create_session("claude", "s", "/src").id
    another = world.store(worker="another")
    lost: list[Any] = []
    lease = store.claim(own)
    lease.on_lost(lost.append)
    out = store.writer(own)
    out.write("mine\n")
    out.flush()
    another.update_status(own, "active", force=True)
    another.claim(own)
    out.write("not mine any more\n")
    with pytest.raises(LeaseLostError):
        out.flush()
    with pytest.raises(LeaseLostError):
        out.close()
    assert len(lost) == 1
    assert output(store, own) == ("mine",)


def test_closing_the_store_closes_its_writers_before_it_gives_leases_back(world: World) -> None:
    store, another = world.store(), world.store()
    own, gone = (store.create_session("claude", "s", "/src").id for _ in range(2))
    store.claim(own)
    outs = [store.writer(own), store.writer(own, errors=True), store.writer(gone)]
    for out in outs:
        out.write("last")
    another.delete_session(gone)
    with pytest.raises(SessionNotFoundError):
        store.close()
    session = another.get_session(own)
    assert (session.output_buffer, session.error_buffer) == (("last",), ("last",))
    assert (session.status, session.owner) == ("active", None)
    assert all(out.closed for out in outs)


# ---- Outages ----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again after a moment."""
    monkeypatch.setattr("sessionstore.writing.PAUSE", 0.02)


@contextmanager
def unanswered(store: Any, times: int) -> Iterator[None]:
    """The next writes are carried out, and nobody is told; the store does not send them again."""
    store.ping()
    store = getattr(store, "store", store)  # itself, of one that only looks blocking
    left, send = iter(range(times)), store._send

    def check(request: Any) -> None:
        if getattr(request, "script", "") == "add_output" and next(left, None) is not None:
            raise redis.ConnectionError("reply lost")

    def lost(request: Any, lane: Any) -> Any:
        reply = send(request, lane)
        check(request)
        return reply

    async def lost_async(request: Any, lane: Any) -> Any:
        reply = await send(request, lane)
        check(request)
        return reply

    was_own = store._own_client
    store._own_client = False
    store._send = lost_async if isinstance(store, AsyncSessionStore) else lost
    try:
        yield
    finally:
        store._own_client = was_own
        del store._send


@pytest.mark.usefixtures("quick")
def test_lost_replies_lose_nothing_and_double_nothing_and_are_told_once(
    store: Any, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    with unanswered(store, 3), store.writer(own) as out:
        out.write("secret\n")
        out.flush()
        out.write("two\n")
    assert output(store, own) == ("secret", "two")
    assert caplog.text.count("takes nothing now") == 1
    assert "secret" not in caplog.text


def test_the_control_that_sends_anew_stores_twice(
    store: Any, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anew(backlog: Any, entries: list[str]) -> Any:
        while True:
            with suppress(OutcomeUnknownError):
                yield backlog._build(backlog._store, backlog.session_id, *entries)
                return

    monkeypatch.setattr("sessionstore.writing.Backlog.storing", anew)
    with unanswered(store, 1), store.writer(own) as out:
        out.write("one\n")
    assert output(store, own) == ("one", "one")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("patience", [0, 0.2])
def test_patience_has_an_end(store: Any, own: str, patience: float) -> None:
    out = store.writer(own, patience=patience)
    out.write("one\n")
    began = time.monotonic()
    with unanswered(store, 1000), pytest.raises(OutcomeUnknownError):
        out.close()
    assert patience <= time.monotonic() - began < patience + 2
    assert output(store, own) == ("one",)


def test_an_outcome_too_old_to_be_repeated_fails(
    store: Any, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessionstore.lanes.REPEATABLE_FOR", 0.0)
    out = store.writer(own)
    out.write("one\n")
    with unanswered(store, 1), pytest.raises(OutcomeUnknownError):
        out.close()


# ---- Blocking ---------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[SessionStore]:
    with memory_store() as opened:
        yield opened


@pytest.fixture
def there(memory: SessionStore) -> str:
    """A session in memory."""
    return memory.create_session("claude", "s", "/src").id


class Gate:
    """Holds a store's writes up while it is closed."""

    def __init__(self, store: SessionStore) -> None:
        self._opened = threading.Event()
        self.reached = threading.Event()
        send = store._send

        def waiting(request: Any, lane: Any) -> Any:
            if lane is not None:
                self.reached.set()
                assert self._opened.wait(30)
            return send(request, lane)

        store._send = waiting  # type: ignore[method-assign]

    def open(self) -> None:
        self._opened.set()


def test_it_is_a_text_file(memory: SessionStore, there: str) -> None:
    with memory.writer(there) as out:
        assert isinstance(out, io.TextIOBase)
        assert (out.encoding, out.errors, out.writable()) == ("utf-8", "replace", True)
        assert (out.readable(), out.seekable(), out.isatty()) == (False, False, False)
        print("print", 1, file=out)
        out.writelines(["lines\n", "more\n"])
        with pytest.raises(io.UnsupportedOperation):
            out.read()
    assert output(memory, there) == ("print 1", "lines", "more")


def test_logging_writes_to_it(memory: SessionStore, there: str) -> None:
    logger = logging.getLogger("test-writer")
    logger.propagate = False
    with memory.writer(there) as out:
        logger.addHandler(handler := logging.StreamHandler(out))
        logger.warning("first\nsecond")
        assert output(memory, there) == ("first", "second")
        logger.removeHandler(handler)


def test_a_process_is_pumped_into_it(memory: SessionStore, there: str) -> None:
    code = "import sys; sys.stdout.buffer.write('é€😀\\n'.encode() * 9000)"
    with (
        memory.writer(there) as out,
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        shutil.copyfileobj(process.stdout, out.buffer, 1001)
    assert output(memory, there) == ("é€😀",) * 9000


def logs_in_time(store: SessionStore, own: str, seconds: float) -> bool:
    """Whether a logger that writes to a writer gets through while the writer's thread logs too."""
    root = logging.getLogger()
    with unanswered(store, 1), store.writer(own) as out:
        handler = logging.StreamHandler(out)
        root.addHandler(handler)
        try:
            working = threading.Thread(target=lambda: root.warning("mine"), daemon=True)
            working.start()
            working.join(seconds)
            in_time = not working.is_alive()
            until(lambda: store.get_session(own).output_total == 2)
        finally:
            root.removeHandler(handler)
    return in_time


def test_a_handler_that_waits_for_the_thread_does_not_keep_it_from_logging(
    memory: SessionStore, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "LONGEST_WAIT", 0.1)
    assert logs_in_time(memory, there, 10)
    mine, told = output(memory, there)
    assert mine == "mine"
    assert "takes nothing now" in told


def test_the_control_of_a_handler_waits_as_long_as_the_thread_does(
    memory: SessionStore, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "LONGEST_WAIT", 1.0)
    assert not logs_in_time(memory, there, 0.8)


def test_threads_share_it_and_each_keeps_its_order(memory: SessionStore, there: str) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(number: int) -> None:
        for n in range(500):
            out.write(f"{number} {n}\n")

    try:
        with memory.writer(there, max_pending=5000) as out:
            threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    entries = [entry.split() for entry in output(memory, there)]
    for number in range(6):
        assert [int(n) for who, n in entries if who == str(number)] == list(range(500))


def test_a_write_waits_for_room(memory: SessionStore, there: str) -> None:
    gate, line = Gate(memory), "x" * 84 + "\n"  # counts for 101
    most: list[int] = []
    with memory.writer(there, max_pending=10_000) as out:

        def work() -> None:
            for _ in range(500):
                out.write(line)
                most.append(out._backlog.pending)

        thread = threading.Thread(target=work)
        thread.start()
        assert gate.reached.wait(10)
        time.sleep(0.2)
        stopped_at = len(most)
        time.sleep(0.1)
        assert len(most) == stopped_at < 110
        gate.open()
        thread.join(10)
    assert max(most) < 10_000 + 101
    assert len(output(memory, there)) == 500


def test_a_write_that_waits_for_room_learns_of_a_failure(memory: SessionStore) -> None:
    gate = Gate(memory)
    out = memory.writer(GONE, max_pending=100)
    threading.Timer(0.2, gate.open).start()
    with pytest.raises(SessionNotFoundError):
        out.writelines(["x" * 80 + "\n"] * 100)
    with pytest.raises(SessionNotFoundError):
        out.close()


def test_a_write_for_which_there_is_no_room_does_not_wait_for_the_interval(
    memory: SessionStore, there: str
) -> None:
    began = time.monotonic()
    with memory.writer(there, max_pending=100, interval=60) as out:
        out.writelines(["x" * 80 + "\n"] * 10)
    assert time.monotonic() - began < 30


def test_its_thread_ends_when_nothing_is_written_and_comes_again(
    memory: SessionStore, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessionstore.writer.LINGER", 0.05)

    def threads() -> int:
        return sum(thread.name == "sessionstore-writer" for thread in threading.enumerate())

    with memory.writer(there) as out:
        for n in range(2):
            out.write(f"{n}\n")
            until(lambda: threads() == 0)
    assert output(memory, there) == ("0", "1")


def test_redact_may_print_to_the_writer_itself() -> None:
    outs: list[Writer] = []

    def redact(text: str) -> str:
        if text == "one":
            outs[0].write("redacting\n" * 10)
            outs[0].flush()
        return text

    with memory_store(redact=redact) as store:
        own = store.create_session("claude", "s", "/src").id
        with store.writer(own, max_pending=10) as out:
            outs.append(out)
            out.write("one\n")
            until(lambda: len(output(store, own)) == 11)


def run_in_python(code: str, url: str, namespace: str) -> subprocess.CompletedProcess[str]:
    head = (
        "import os, sys, threading, time\n"
        "import sessionstore.writer, sessionstore\n"
        "store = sessionstore.SessionStore.from_url(sys.argv[1], namespace=sys.argv[2])\n"
        "own = store.create_session('claude', 's', '/src').id\n"
    )
    arguments = [sys.executable, "-c", head + code, url, namespace]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def real(server: PrivateServer) -> Iterator[World]:
    """Each real server."""
    world = World("sync", server.program.name.lower(), server.url)
    yield world
    world.close()


AT_EXIT = "lease = store.claim(own)\nout = store.writer(own)\nprint('a\\nlast', end='', file=out)\n"


def at_exit(real: World, code: str) -> tuple[tuple[str, ...], str, str]:
    """Output, status and stderr after a program that ends like this."""
    assert real.url is not None
    done = run_in_python(code, real.url, real.namespace)
    (session,) = real.store().get_all_sessions()
    return session.output_buffer, session.status, done.stderr


def test_at_exit_writers_are_closed_before_leases_are_given_back(real: World) -> None:
    assert at_exit(real, AT_EXIT) == (("a", "last"), "active", "")


def test_the_control_that_gives_leases_back_first_loses_the_lease(real: World) -> None:
    """Another worker takes the session as soon as it is free."""
    other = (
        "import atexit\n"
        "from sessionstore import lease as leases, store as stores\n"
        "another = sessionstore.SessionStore.from_url(sys.argv[1], namespace=sys.argv[2])\n"
        "atexit.unregister(stores._at_exit)\n"
        "def wrongly():\n"
        "    leases.give_all_back()\n"
        "    another.claim(own).abandon()\n"
        "    stores._at_exit()\n"
        "atexit.register(wrongly)\n"
    )
    late = AT_EXIT.replace("store.writer(own", "store.writer(own, interval=9")
    stored, _, _ = at_exit(real, other + late)
    assert stored == ()


def test_a_forked_child_sends_nothing_of_its_parents_and_goes_on(real: World) -> None:
    code = (
        "out = store.writer(own, interval=30)\n"
        "out.write('parent\\nunfinished ')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    out.write('child\\n')\n"
        "    sys.exit()\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert store.get_session(own).output_buffer == ('child',), store.get_session(own)\n"
        "out.write('line\\n')\n"
    )
    stored, _, err = at_exit(real, code)
    assert err == ""
    assert stored == ("child", "parent", "unfinished line")


# ---- On an event loop -------------------------------------------------------------------------


def run(work: Any) -> None:
    """Run on a fresh loop; no task may be left behind."""

    async def main() -> None:
        async with async_memory_store() as store:
            own = (await store.create_session("claude", "s", "/src")).id
            await work(store, own)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def held_up(store: Any) -> asyncio.Event:
    """Hold a store's writes up until the event is set."""
    opened, send = asyncio.Event(), store._send

    async def waiting(request: Any, lane: Any) -> Any:
        if lane is not None:
            await opened.wait()
        return await send(request, lane)

    store._send = waiting
    return opened


def test_an_awaited_write_waits_for_room_and_its_cancellation_loses_nothing() -> None:
    async def work(store: Any, own: str) -> None:
        opened = held_up(store)
        taken: list[str] = []

        async def write(out: AsyncWriter) -> None:
            for n in range(100):
                await out.write(f"{n:079}\n")
                taken.append(f"{n:079}")

        async with store.writer(own, max_pending=1000) as out:
            writing = asyncio.create_task(write(out))
            await asyncio.sleep(0.1)
            assert 10 <= len(taken) <= 12
            assert out._backlog.pending < 1000 + 96
            writing.cancel()
            await asyncio.wait([writing])
            opened.set()
        assert (await store.get_session(own)).output_buffer == tuple(taken)

    run(work)


def test_leaving_a_cancelled_writer_stores_what_was_taken() -> None:
    async def work(store: Any, own: str) -> None:
        opened = held_up(store)

        async def write() -> None:
            async with store.writer(own) as out:
                await out.write("one\ntwo")
                await asyncio.sleep(60)

        task = asyncio.create_task(write())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        opened.set()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (await store.get_session(own)).output_buffer == ("one", "two")

    run(work)


def test_a_task_that_is_cancelled_while_it_gathers_loses_nothing() -> None:
    async def work(store: Any, own: str) -> None:
        async with store.writer(own, interval=60) as out:
            await out.write("one\n")
            await asyncio.sleep(0)
            out._task.cancel()
            await out.flush()
            assert (await store.get_session(own)).output_buffer == ("one",)

    run(work)


def test_a_task_that_is_cancelled_while_it_sends_is_told() -> None:
    async def work(store: Any, own: str) -> None:
        held_up(store)
        out = store.writer(own, interval=0)
        await out.write("one\n")
        await asyncio.sleep(0.01)
        out._task.cancel()
        with pytest.raises(Exception, match="event loop ended"):
            await out.close()

    run(work)


def test_an_awaited_writer_that_was_never_closed_is_told_at_exit() -> None:
    code = (
        "import asyncio, logging\n"
        "from sessionstore.testing import async_memory_store\n"
        "logging.basicConfig()\n"
        "out = async_memory_store().writer('a')\n"
        "asyncio.run(out.write('unfinished'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert "a: not everything that was written is stored: it was not closed" in done.stderr


def test_an_awaited_writer_works_in_a_forked_child_too() -> None:
    store = async_memory_store()
    out = store.writer(GONE)
    asyncio.run(out.write(""))
    child = os.fork()
    if child == 0:
        os._exit(0 if out._backlog.pending == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    asyncio.run(out.close())
