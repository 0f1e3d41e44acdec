"""A namespace of another schema: refused in clear words, and nothing is written.

A schema that this version knows may have more in it than it knows: that is no difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import command_line
from conftest import STYLES, World
from faults import Fault, FaultyWorld
from moments import everything
from test_contract_batch import FEEDS, OPERATIONS, batch_of
from versions import Change, made

import sessionstore.opening
from sessionstore import (
    Imported,
    ImportFormatError,
    OutcomeUnknownError,
    SchemaMismatchError,
    SessionStore,
    StoreSettings,
    __version__,
)
from sessionstore._server import PrivateServer
from sessionstore.opening import other_layout
from sessionstore.testing import memory_store

OWN = "agent_claude_00000000-0000-4000-8000-000000000000"
LATER_LAYOUT = {"schema": "2", "partitions": "1", "written_by": "1.4.0", "by_day": "yes"}


def exported() -> list[str]:
    """An export of one session."""
    with memory_store() as store:
        store.add_output(store.create_session("claude", "service-1", "/src").id, "one")
        return list(store.export_sessions())


# ---- Refused ---------------------------------------------------------------------------------


def written(store: Any) -> None:
    with store.writer(OWN) as out:
        out.write("line\n")


def batched(world: World, store: Any) -> None:
    with batch_of(world, store) as batch:
        counted = batch.get_metrics()
    counted.result()


#: By name, a call of everything that a store can do.
CALLS: dict[str, Callable[[World, Any], Any]] = {
    "create_session": lambda _, s: s.create_session("claude", "service-1", "/src"),
    "find_session_by_service_id": lambda _, s: s.find_session_by_service_id("service-1"),
    "get_sessions_by_type": lambda _, s: s.get_sessions_by_type("claude"),
    "update_status": lambda _, s: s.update_status(OWN, "active"),
    "update_metadata": lambda _, s: s.update_metadata(OWN, {"a": "b"}),
    "add_output": lambda _, s: s.add_output(OWN, "line"),
    "add_error": lambda _, s: s.add_error(OWN, "line"),
    "claim": lambda _, s: s.claim(OWN),
    "writer": lambda _, s: written(s),
    "batch": lambda world, s: batched(world, s),
    "import_sessions": lambda _, s: s.import_sessions(exported()),
    **{
        name: lambda _, s, name=name: getattr(s, name)()
        for name in ("get_all_sessions", "get_metrics", "find_sessions", "reap", "ping")
    },
    **{
        name: lambda _, s, name=name: getattr(s, name)(OWN)
        for name in (
            *("get_session", "find_session", "update_activity", "delete_session"),
            *("read_output", "read_errors"),
        )
    },
    **{
        name: lambda _, s, name=name: list(getattr(s, name)(OWN))
        for name in ("follow_output", "follow_errors")
    },
    "watch": lambda _, s: next(s.watch("0")),
    "iter_sessions": lambda _, s: list(s.iter_sessions()),
    "export_sessions": lambda _, s: list(s.export_sessions()),
}


#: They tell what is wrong with a namespace that no store can be opened on, and change nothing.
LOOKING = {"check", "repair", "drift"}


def test_the_calls_are_all_there_are() -> None:
    assert {*CALLS, *LOOKING} == {*OPERATIONS, *FEEDS} | {
        *("claim", "writer", "batch", "import_sessions")
    }


@pytest.mark.parametrize("name", CALLS)
def test_every_call_refuses_a_newer_schema_and_writes_nothing(world: World, name: str) -> None:
    world.redis.hset(world.meta, mapping=LATER_LAYOUT)
    store = world.store()

    for _ in range(2):  # not just the first
        with pytest.raises(SchemaMismatchError) as refused:
            CALLS[name](world, store)

    assert str(refused.value) == (
        f"namespace {world.namespace!r} has schema '2', written by sessionstore 1.4.0, this is "
        f"sessionstore {__version__}, which knows schema '1': upgrade this worker to the version "
        "that wrote it, or a newer one; nothing was written"
    )
    assert everything(world) == {world.meta: LATER_LAYOUT}


@pytest.mark.parametrize("look", ["check", "repair"])
def test_the_doctor_tells_of_a_newer_schema_and_touches_nothing(world: World, look: str) -> None:
    session = world.store().create_session("claude", "service-1", "/src")
    world.redis.srem(f"{world.prefix_of(session.id)}types", "claude")
    world.redis.hset(world.meta, mapping=LATER_LAYOUT)
    before = everything(world)

    (problem,) = [one for one in getattr(world.store(), look)() if not one.warning]

    assert (problem.kind, problem.repaired, problem.mendable) == ("layout", False, False)
    assert "written by sessionstore 1.4.0" in problem.message
    assert "upgrade this worker" in problem.message
    assert everything(world) == before


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["run", "--type", "claude", "--", "touch", "started"], ["doctor", "--repair"]],
    ids=" ".join,
)
def test_the_command_line_says_what_to_do_and_starts_nothing(
    server: PrivateServer,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with command_line(server) as cli:
        meta = f"{{{cli.namespace}}}:meta"
        cli.redis.hset(meta, mapping=LATER_LAYOUT)

        done = cli.run(*arguments)

        assert done.code == 1
        told = done.err + done.out
        assert "schema '2', written by sessionstore 1.4.0" in told
        assert "upgrade this worker to the version that wrote it, or a newer one" in told
        assert "Traceback" not in told
        assert cli.redis.keys(f"{{{cli.namespace}}}:*") == [meta]
        assert cli.redis.hgetall(meta) == LATER_LAYOUT
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ({"schema": "3", "written_by": "2.0.0"}, "schema '3', written by sessionstore 2.0.0, this"),
        ({"schema": "3"}, "schema '3', this is"),
        ({"schema": "3", "written_by": "\x1b[2J"}, "schema '3', this is"),
        ({"schema": "3"}, ": upgrade this worker to the version that wrote it, or a newer one;"),
        ({"schema": "1", "written_by": "0.1.0"}, "schema '1', written by sessionstore 0.1.0, this"),
        ({"schema": "1"}, "export them with that version, import them with this one into another"),
        ({"written_by": "0.1.0"}, "has schema None, written by sessionstore 0.1.0"),
        ({"schema": "\x1b[2J" * 9}, r"has schema '\x1b[2J\x1b[2J\x1b[, this is"),
        ({"schema": "\x1b[2J"}, "it is somebody else's, or damaged; use another namespace"),
        ({"schema": "2", "partitions": "16"}, "partitions '16', this store has '1': set the same"),
    ],
)
def test_what_is_said_of_another_layout(
    layout: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.opening, "SCHEMA_VERSION", "2")
    said = other_layout(layout, StoreSettings())
    assert told in said
    assert said.endswith("; nothing was written")
    assert "\x1b" not in said


@pytest.mark.operator
def test_what_a_layout_has_besides_is_no_mismatch_and_stays(world: World) -> None:
    layout = {"schema": "1", "partitions": str(world.partitions), "by_day": "yes"}
    world.redis.hset(world.meta, mapping=layout)
    store = world.store()
    store.create_session("claude", "service-1", "/src")
    assert not [one for one in store.repair() if not one.warning]
    assert world.redis.hgetall(world.meta) == layout


# ---- Looked at again ---------------------------------------------------------------------------


@pytest.fixture(params=STYLES)
def faulty(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[FaultyWorld]:
    world = FaultyWorld(request.param, server)
    yield world
    world.close()


def test_the_schema_is_looked_at_again_when_a_connection_has_failed(faulty: FaultyWorld) -> None:
    store = faulty.store()
    own = store.create_session("claude", "service-1", "/src").id
    faulty.redis.hset(faulty.meta, "schema", "2")
    assert store.add_output(own, "one") == 1  # who has opened a namespace goes on

    faulty.proxy.plan([Fault.LOSE_REPLY])
    # This one was carried out, perhaps, when the connection failed: it is not refused.
    assert store.add_output(own, "two") == 2
    for _ in range(2):
        with pytest.raises(SchemaMismatchError):
            store.add_output(own, "three")
    assert faulty.redis.lrange(faulty.session(own, ":output"), 0, -1) == ["one", "two"]

    faulty.redis.hset(faulty.meta, "schema", "1")
    assert store.add_output(own, "three") == 3


def test_a_write_of_unknown_outcome_can_be_repeated_whatever_is_found_afterwards(
    faulty: FaultyWorld,
) -> None:
    store = faulty.store(deadline=0.3)
    own = store.create_session("claude", "service-1", "/src").id
    faulty.proxy.plan([Fault.LOSE_REPLY] * 100)
    with pytest.raises(OutcomeUnknownError) as unknown:
        store.add_output(own, "one")
    faulty.proxy.plan([])
    faulty.redis.hset(faulty.meta, "schema", "2")

    assert store.repeat(unknown.value) == 1

    with pytest.raises(SchemaMismatchError):
        store.add_output(own, "two")
    assert faulty.redis.lrange(faulty.session(own, ":output"), 0, -1) == ["one"]


def test_a_server_that_has_lost_the_layout_gets_it_again(faulty: FaultyWorld) -> None:
    store = faulty.store()
    own = store.create_session("claude", "service-1", "/src").id
    layout = faulty.redis.hgetall(faulty.meta)
    faulty.redis.unlink(faulty.meta)

    faulty.proxy.plan([Fault.LOSE_REQUEST])
    store.add_output(own, "one")
    store.add_output(own, "two")

    assert faulty.redis.hgetall(faulty.meta) == layout


# ---- Exports -----------------------------------------------------------------------------------


def changed(lines: list[str], number: int, **changes: Any) -> list[str]:
    told = json.loads(lines[number])
    return [*lines[:number], json.dumps(told | changes), *lines[number:][1:]]


def test_an_export_of_a_newer_schema_is_refused_and_says_what_to_do() -> None:
    lines = changed(exported(), 0, schema="2", written_by="1.4.0")
    with memory_store() as store:
        with pytest.raises(ImportFormatError) as refused:
            store.import_sessions(lines)
        assert str(refused.value) == (
            "line 1: the export has schema '2', written by sessionstore 1.4.0, this is "
            f"sessionstore {__version__}, which knows schema '1': import it with the version that "
            "wrote it, or a newer one; nothing was written"
        )
        assert store.get_all_sessions() == []


def test_what_an_export_of_a_later_version_has_besides_is_kept_or_passed_over() -> None:
    """Hash fields are kept; what else a line says, and further counts, is passed over."""
    header, head, output, end, total = range(5)
    lines = exported()
    lines = changed(lines, header, compressed=False)
    fields = json.loads(lines[head])["fields"] | {"origin": "blue"}
    lines = changed(lines, head, fields=fields, labels=["a"])
    lines = changed(lines, output, source="stdout")
    lines = changed(lines, end, notes=3)
    lines = changed(lines, total, total=json.loads(lines[total])["total"] | {"notes": 3})
    with memory_store() as store:
        assert store.import_sessions(lines) == Imported(imported=1)
        assert [json.loads(line) for line in store.export_sessions()][head]["fields"] == fields


#: A version that has raised the schema is refused the old namespace, and imports its export.
MOVING = """
import sys
from sessionstore import SchemaMismatchError, SessionStore
url, old, new = sys.argv[1:]
with SessionStore.from_url(url, namespace=old) as store:
    try:
        store.get_metrics()
    except SchemaMismatchError as refused:
        print(refused)
with SessionStore.from_url(url, namespace=new) as store:
    print(store.import_sessions(sys.stdin))
"""


def test_sessions_come_into_a_newer_schema_by_export_and_import(
    server: PrivateServer, tmp_path: Path
) -> None:
    raised = made(
        tmp_path / "raised",
        [
            Change("opening.py", 'SCHEMA_VERSION = "1"', 'SCHEMA_VERSION = "2"'),
            Change("_version.py", 'version("sessionstore")', '"1.0.0"'),
        ],
    )
    world = World("sync", server.program.name.lower(), server.url)
    try:
        store, new = world.store(), f"{world.namespace}-new"
        own = store.create_session("claude", "service-1", "/src").id
        store.add_output(own, "one")

        moved = subprocess.run(
            [sys.executable, "-c", MOVING, server.url, world.namespace, new],
            input="".join(store.export_sessions()),
            env=os.environ | {"PYTHONPATH": str(raised)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

        assert moved.returncode == 0, moved.stderr
        refused, imported = moved.stdout.splitlines()
        assert "schema '1', written by" in refused
        assert "this is sessionstore 1.0.0, which knows schema '2'" in refused
        assert imported.startswith("imported=1 ")
        with (
            SessionStore.from_url(server.url, namespace=new) as there,
            pytest.raises(SchemaMismatchError, match=r"written by sessionstore 1\.0\.0"),
        ):
            there.get_session(own)
        assert store.get_session(own).output_buffer == ("one",)
        for key in world.redis.scan_iter(f"{{{new}}}:*", count=1000):
            world.redis.unlink(key)
    finally:
        world.close()
