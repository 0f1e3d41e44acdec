"""``sessionstore events``, and ``logs -f`` and ``events -f`` through outages."""

from __future__ import annotations

import json
import re
import select
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from commandline import CommandLine, command_line
from conftest import SERVERS
from faults import FaultProxy

from sessionstore._server import PrivateServer

HEADER = [
    *("at", "event", "session_id", "type", "old_status", "status", "owner", "actor"),
    "cursor",
]


@pytest.fixture
def cli(running: Callable[[str], PrivateServer]) -> Iterator[CommandLine]:
    with command_line(running(SERVERS[0])) as opened:
        yield opened


def life(cli: CommandLine) -> str:
    """A session that is claimed and given back: three events."""
    session_id = cli.store.create_session("claude", "service-1", "/src").id
    cli.store.claim(session_id).release()
    return session_id


def rows(out: str) -> list[list[str]]:
    return [line.split("\t") for line in out.splitlines()]


# ---- What has happened --------------------------------------------------------------------------


def test_events_in_a_pipe_are_tsv_with_a_header(cli: CommandLine) -> None:
    session_id = life(cli)
    finished = cli.run("events")
    header, created, claimed, released = rows(finished.out)
    assert (finished.code, finished.err, header) == (0, "", HEADER)
    worker = cli.store.worker
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", created[0])
    assert created[1:8] == ["created", session_id, "claude", "", "active", "", worker]
    assert claimed[1:8] == ["claimed", session_id, "claude", "active", "busy", worker, worker]
    assert released[1:8] == ["released", session_id, "claude", "busy", "active", worker, worker]


def test_events_as_json_are_an_object_a_line(cli: CommandLine) -> None:
    session_id = life(cli)
    events = [json.loads(line) for line in cli.run("events", "--json").out.splitlines()]
    assert [list(event) for event in events] == [HEADER] * 3
    assert [(event["event"], event["session_id"]) for event in events] == [
        (name, session_id) for name in ("created", "claimed", "released")
    ]
    assert events[0]["owner"] is None


def test_events_of_one_session_and_the_newest_only(cli: CommandLine) -> None:
    first, second = life(cli), life(cli)
    of_first = rows(cli.run("events", "--session", first).out)[1:]
    newest = rows(cli.run("events", "--tail", "2").out)[1:]
    assert [row[2] for row in of_first] == [first] * 3
    assert [row[1:3] for row in newest] == [["claimed", second], ["released", second]]


def test_events_go_on_after_a_cursor_and_tell_of_a_gap(cli: CommandLine) -> None:
    life(cli)
    cursors = [row[-1] for row in rows(cli.run("events").out)[1:]]
    after = cli.run("events", "--after", cursors[0])
    assert [row[-1] for row in rows(after.out)[1:]] == cursors[1:]
    assert after.err == ""

    cli.redis.xtrim(f"{{{cli.namespace}}}:events", maxlen=1, approximate=False)
    after = cli.run("events", "--after", cursors[0])
    assert [row[-1] for row in rows(after.out)[1:]] == cursors[2:]
    assert after.err == "… events before this one are not kept any more …\n"


def test_a_cursor_that_is_none_is_a_matter_of_usage(cli: CommandLine) -> None:
    for command in (["events"], ["events", "-f"]):
        finished = cli.run(*command, "--after", "yesterday")
        assert finished.code == 2
        assert finished.err == "error: cursor is not an event's: 'yesterday'\n"


def test_events_on_a_terminal_are_lines_for_people_and_harmless(cli: CommandLine) -> None:
    session_id = life(cli)
    hostile: Any = {"event": "\x1b[2J", "session_id": "x\u202ey", "type": "t", "actor": "a\rb"}
    cli.redis.xadd(f"{{{cli.namespace}}}:events", hostile)
    out = cli.on_terminal("events", env={"NO_COLOR": "1"}, columns=200).out
    created, claimed, released, last = out.splitlines()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    worker = re.escape(cli.store.worker)
    assert re.fullmatch(rf"{time}  created         {session_id}  active  by {worker}", created)
    assert re.fullmatch(
        rf"{time}  claimed         {session_id}  active → busy  by {worker}", claimed
    )
    assert re.fullmatch(
        rf"{time}  released        {session_id}  busy → active  by {worker}", released
    )
    assert last.split()[2:] == [r"\x1b[2J", r"x\u202ey", "by", r"a\rb"]


# ---- What happens -------------------------------------------------------------------------------


def test_follow_begins_with_now_and_ends_with_ctrl_c(cli: CommandLine) -> None:
    life(cli)
    process = cli.start("events", "-f")
    assert process.stdout is not None
    assert process.stdout.readline().decode().split() == HEADER
    marker = ""
    while not select.select([process.stdout], [], [], 0.2)[0]:  # until it has looked where now is
        marker = cli.store.create_session("claude", "marker", "/src").id
    while marker not in process.stdout.readline().decode():
        pass
    session_id = life(cli)
    for event in ("created", "claimed", "released"):
        assert process.stdout.readline().decode().split("\t")[1:3] == [event, session_id]
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"")
    assert process.returncode == 130


def test_follow_can_begin_with_the_newest(cli: CommandLine) -> None:
    life(cli)
    process = cli.start("events", "-f", "--tail", "1", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "released"
    session_id = cli.store.create_session("codex", "service-2", "/src").id
    assert json.loads(process.stdout.readline())["session_id"] == session_id
    process.stdout.close()  # and its reader leaves
    assert process.communicate()[1] == b""
    assert process.returncode == 141


# ---- Outages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["logs", "events"])
def test_following_goes_on_through_an_outage(
    cli: CommandLine, running: Callable[[str], PrivateServer], what: str
) -> None:
    session_id = cli.store.create_session("claude", "service-1", "/src").id
    cli.store.add_output(session_id, "before")
    command = ["logs", "-f", session_id] if what == "logs" else ["events", "-f", "--tail", "1"]
    with FaultProxy(running(SERVERS[0]).port) as proxy:
        process = cli.start("--url", proxy.url, "--timeout", "0.5", *command)
        assert process.stdout is not None
        assert process.stderr is not None
        if what == "events":
            process.stdout.readline()
        assert process.stdout.readline()
        proxy.down()
        outage = process.stderr.readline().decode()
        assert "the store at 127.0.0.1:" in outage
        assert outage.endswith("; going on\n")
        cli.store.add_output(session_id, "meanwhile")
        cli.store.update_status(session_id, "terminated")
        proxy.up()
        line = process.stdout.readline().decode()
        assert line == "meanwhile\n" if what == "logs" else "status_changed" in line
        if what == "events":
            process.terminate()
        out, err = process.communicate()
    assert (out, err) == (b"", b"")
    assert process.returncode == (0 if what == "logs" else -signal.SIGTERM)


def test_logs_of_a_deleted_session_say_how_much_was_missed(cli: CommandLine) -> None:
    session_id = cli.store.create_session("claude", "service-1", "/src").id
    cli.store.add_output(session_id, "one")
    process = cli.start("logs", "-f", session_id)
    assert process.stdout is not None
    assert process.stdout.readline() == b"one\n"
    process.send_signal(signal.SIGSTOP)
    cli.store.add_output(session_id, *map(str, range(2000)))
    cli.store.delete_session(session_id)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, b"")
    assert err.decode() == "… 2,000 lines dropped …\n… the session was deleted …\n"
