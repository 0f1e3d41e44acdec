"""``sessionstore doctor`` through its real entry point."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from commandline import CommandLine, command_line
from conftest import SERVERS, World
from consistency import assert_consistent
from moments import everything
from rawkeys import RawKeys

from sessionstore._server import PrivateServer

COLUMNS = ["kind", "state", "key", "session_id", "message", "mending"]
NOTHING = "nothing is wrong"


@pytest.fixture
def cli(running: Callable[[str], PrivateServer]) -> Iterator[CommandLine]:
    with command_line(running(SERVERS[0])) as opened:
        yield opened


def raw(cli: CommandLine) -> RawKeys:
    return RawKeys(cli.redis, cli.namespace)


def rows(tsv: str) -> list[dict[str, str]]:
    """All but the warnings: the tests' server has no append-only file."""
    header, *lines = (line.split("\t") for line in tsv.splitlines())
    assert header == COLUMNS
    told = [dict(zip(header, line, strict=True)) for line in lines]
    return [row for row in told if row["state"] != "warning"]


def damage(cli: CommandLine) -> tuple[str, str]:
    """A session that is not in the index of its status; its id, and the index."""
    session = cli.store.create_session("claude", "service-1", "/src")
    index = f"{{{cli.namespace}}}:sessions:status:active"
    cli.redis.srem(index, session.id)
    return session.id, index


def test_a_healthy_store_is_said_to_be_so(cli: CommandLine) -> None:
    cli.store.create_session("claude", "service-1", "/src")
    for arguments in (["doctor"], ["doctor", "--repair"]):
        done = cli.run(*arguments)
        assert (done.code, rows(done.out)) == (0, [])
        assert done.err == f"1 session: {NOTHING}, 1 warning\n"


def test_without_repair_it_tells_and_changes_nothing(cli: CommandLine) -> None:
    session_id, index = damage(cli)
    before = everything(raw(cli))
    done = cli.run("doctor")
    assert done.code == 1
    found, drift = rows(done.out)
    assert found == {
        "kind": "index_missing",
        "state": "found",
        "key": index,
        "session_id": session_id,
        "message": f"{session_id} is not in this index",
        "mending": "add it",
    }
    assert (drift["kind"], drift["state"]) == ("drift", "left")
    assert done.err == "1 session: 2 problems, 1 warning; --repair mends 1 of them\n"
    assert everything(raw(cli)) == before


def test_repair_mends_and_a_second_run_finds_nothing(cli: CommandLine) -> None:
    session_id, _ = damage(cli)
    done = cli.run("doctor", "--repair")
    assert done.code == 0
    assert [(row["state"], row["session_id"]) for row in rows(done.out)] == [("mended", session_id)]
    assert done.err == "1 session: 1 mended, 0 left, 1 warning\n"
    again = cli.run("doctor", "--repair")
    assert (again.code, rows(again.out)) == (0, [])
    assert_consistent(raw(cli))


def test_what_only_people_can_mend_fails_the_run(cli: CommandLine) -> None:
    session = cli.store.create_session("claude", "service-1", "/src")
    cli.redis.hdel(f"{{{cli.namespace}}}:session:{session.id}", "project_path")
    done = cli.run("doctor", "--repair")
    assert done.code == 1
    assert [(row["kind"], row["state"]) for row in rows(done.out)] == [("field_unreadable", "left")]
    assert "0 mended, 1 left" in done.err


def test_json_is_an_array_of_the_same(cli: CommandLine) -> None:
    assert json.loads(cli.run("doctor", "--json").out)[0]["kind"] == "server"
    session_id, index = damage(cli)
    told: list[dict[str, Any]] = json.loads(cli.run("doctor", "--json", "--repair").out)
    assert all(list(one) == COLUMNS for one in told)
    assert [(one["kind"], one["key"], one["session_id"]) for one in told[1:]] == [
        ("index_missing", index, session_id)
    ]


def test_what_others_wrote_cannot_harm_a_terminal(cli: CommandLine) -> None:
    damage(cli)
    cli.redis.sadd(f"{{{cli.namespace}}}:sessions:type:claude", "\x1b[2J\u202eevil")
    cli.redis.set(f"{{{cli.namespace}}}:\x1b]0;x\x07\tmine", "x")
    for finished in (
        cli.on_terminal("doctor", env={"NO_COLOR": "1"}),
        cli.run("doctor"),
        cli.run("doctor", "--json"),
    ):
        assert finished.code == 1
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(finished.out + finished.err)
    assert r"\x1b[2J\u202eevil" in cli.run("doctor").out


def test_a_terminal_gets_lines_to_read(cli: CommandLine) -> None:
    session_id, index = damage(cli)
    shown = cli.on_terminal("doctor", "--repair", columns=200, env={"NO_COLOR": "1"}).out
    lines = shown.splitlines()
    at = lines.index(f"index_missing  {index}")
    assert lines[at + 1 : at + 3] == [
        f"  {session_id} is not in this index",
        "  mended: add it",
    ]
    assert lines[-1] == "1 session: 1 mended, 0 left, 1 warning"


def test_another_layout_is_told_and_fails(cli: CommandLine) -> None:
    damage(cli)
    cli.redis.hset(f"{{{cli.namespace}}}:meta", "schema", "99")
    before = everything(raw(cli))
    done = cli.run("doctor", "--repair")
    assert done.code == 1
    (row,) = rows(done.out)
    assert (row["kind"], row["state"]) == ("layout", "left")
    assert "schema '99'" in row["message"]
    assert everything(raw(cli)) == before


def test_a_server_that_no_store_can_be_opened_on_is_looked_at(own_server: PrivateServer) -> None:
    with command_line(own_server) as cli:
        damage(cli)
        cli.redis.config_set("maxmemory", "1gb")
        cli.redis.config_set("maxmemory-policy", "allkeys-lru")
        assert cli.run("ls").code == 1
        done = cli.run("doctor", "--repair")
        assert done.code == 1
        assert [(row["kind"], row["state"]) for row in rows(done.out)] == [
            ("server", "left"),
            ("index_missing", "mended"),
        ]


def test_a_server_out_of_reach_is_told(cli: CommandLine) -> None:
    done = cli.run("--url", "redis://127.0.0.1:1", "--timeout", "0.3", "doctor")
    assert done.code == 4
    assert "cannot reach the store at 127.0.0.1:1" in done.err


def test_help_says_when_it_fails(cli: CommandLine) -> None:
    shown = " ".join(cli.run("doctor", "--help").out.split())
    assert "Exit codes: 0 if nothing is wrong" in shown
    assert "1 if something is left" in shown


def test_partitions_are_those_of_the_environment(cli: CommandLine) -> None:
    world = World("sync", "any", cli.url, 16)
    try:
        session = world.store().create_session("claude", "service-1", "/src")
        world.redis.srem(f"{world.prefix_of(session.id)}types", "claude")
        env: dict[str, str | None] = {
            "SESSIONSTORE_PARTITIONS": "16",
            "SESSIONSTORE_NAMESPACE": world.namespace,
        }
        done = cli.run("doctor", "--repair", env=env)
        assert [(row["kind"], row["state"]) for row in rows(done.out)] == [
            ("index_missing", "mended")
        ]
        assert_consistent(world)
    finally:
        world.close()
