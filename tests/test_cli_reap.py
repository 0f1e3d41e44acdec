"""``sessionstore reap`` through its real entry point: what is dead is ended, what lives is not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from commandline import CommandLine, Finished, command_line
from conftest import PROGRAMS, SERVERS
from faults import FaultProxy, contents
from prestarted import Started
from waiting import until

from sessionstore import AgentSession
from sessionstore._server import PrivateServer

#: Seconds. The second look must come before three of them, on a busy machine too.
GRACE = 0.6
COLUMNS = ["action", "id", "status", "owner", "reason"]


def grace(seconds: float) -> dict[str, str | None]:
    return {"SESSIONSTORE_REAP_GRACE": str(seconds)}


@pytest.fixture
def cli(running: Callable[[str], PrivateServer]) -> Iterator[CommandLine]:
    with command_line(running(SERVERS[0])) as opened:
        yield opened


@pytest.fixture
def each_cli(server: PrivateServer) -> Iterator[CommandLine]:
    with command_line(server) as opened:
        yield opened


def create(cli: CommandLine, **changes: Any) -> AgentSession:
    return cli.store.create_session("claude", "service-1", "/src", **changes)


def rows(tsv: str) -> list[dict[str, str]]:
    header, *lines = (line.split("\t") for line in tsv.splitlines())
    assert header == COLUMNS
    return [dict(zip(header, line, strict=True)) for line in lines]


def runs(cli: CommandLine, ttl: float, script: str) -> tuple[Started, AgentSession]:
    """A ``run`` of a shell script that has written something, and its session."""
    process = cli.start("run", "--type", "claude", "--ttl", str(ttl), "--", "sh", "-c", script)
    session = until(lambda: next((s for s in cli.store.get_all_sessions() if s.output_total), None))
    return process, session


def lost_session(cli: CommandLine) -> AgentSession:
    """A session whose ``run`` was killed, when its lease has expired."""
    process, session = runs(cli, 0.5, "echo $$; exec sleep 60")
    process.kill()
    process.communicate()
    os.kill(int(session.output_buffer[0]), signal.SIGKILL)
    return until(lambda: expired(cli, session.id))


def expired(cli: CommandLine, session_id: str) -> AgentSession | None:
    session = cli.store.get_session(session_id)
    assert session.lease_expires_at is not None
    return session if session.lease_expires_at < session.read_at else None


# ---- Once -------------------------------------------------------------------------------------


def test_one_run_ends_the_session_of_a_killed_worker(each_cli: CommandLine) -> None:
    lost = lost_session(each_cli)
    finished = each_cli.run("reap", env=grace(GRACE))
    assert finished.code == 0
    marked, ended = rows(finished.out)
    assert (marked["action"], ended["action"]) == ("marked", "lost")
    for row in (marked, ended):
        assert (row["id"], row["status"], row["owner"]) == (lost.id, "busy", lost.owner)
        assert f"the lease of {lost.owner} expired at " in row["reason"]
    assert finished.err == (
        "1 lease has expired: looking again in 0.66 s, so that a worker that lives can renew\n"
    )
    session = each_cli.store.get_session(lost.id)
    assert (session.status, session.owner) == ("error", None)
    assert session.output_buffer == lost.output_buffer
    assert f"worker {lost.owner} was lost" in session.error_buffer[-1]


def test_a_reaped_session_can_be_continued(cli: CommandLine) -> None:
    lost = lost_session(cli)
    cli.run("reap", env=grace(GRACE))
    assert cli.run("run", "--session", lost.id, "--", "echo", "done").code == 0
    session = cli.store.get_session(lost.id)
    assert (session.status, session.output_buffer[-1]) == ("terminated", "done")


def test_what_lives_is_left_alone(cli: CommandLine) -> None:
    session = create(cli)
    create(cli, status="terminated")
    with cli.store.claim(session.id):
        finished = cli.run("reap", "--idle-for", "0", env=grace(0.2))
        assert cli.store.get_session(session.id).status == "busy"
    assert finished == Finished(0, "\t".join(COLUMNS) + "\n")


def reaped_while_stalled(
    cli: CommandLine, go_on: Path, *, within_grace: bool
) -> tuple[Finished, int]:
    """What one ``reap`` does about a ``run`` that stalls past its lease and comes back.

    Args:
        cli: the command line.
        go_on: the file that the command waits for.
        within_grace: it comes back as soon as its lease is said to have expired; else when ``reap``
            has ended.

    Returns:
        What ``reap`` said, and the exit code of ``run``.
    """
    script = f"echo ready; while [ ! -e {go_on} ]; do sleep 0.05; done"
    process, session = runs(cli, 0.5, script)
    process.send_signal(signal.SIGSTOP)
    until(lambda: expired(cli, session.id))
    reaping = cli.start("reap", env=grace(3 if within_grace else GRACE))
    assert reaping.stderr is not None
    assert b"looking again" in reaping.stderr.readline()
    if not within_grace:
        reaping.wait()
    process.send_signal(signal.SIGCONT)
    out, err = reaping.communicate()
    if within_grace:
        go_on.touch()
    process.communicate()
    return Finished(reaping.returncode, out.decode(), err.decode()), process.returncode


def test_a_worker_that_comes_back_within_the_grace_period_keeps_its_session(
    cli: CommandLine, tmp_path: Path
) -> None:
    reaped, code = reaped_while_stalled(cli, tmp_path / "go-on", within_grace=True)
    assert [row["action"] for row in rows(reaped.out)] == ["marked"]
    assert reaped.err == "1 left alone: renewed, or in other hands meanwhile\n"
    assert code == 0
    (session,) = cli.store.get_all_sessions()
    assert (session.status, session.error_total) == ("terminated", 0)


def test_the_control_of_a_worker_that_comes_back(cli: CommandLine, tmp_path: Path) -> None:
    """One that comes back too late has lost its session, and stops its command."""
    reaped, code = reaped_while_stalled(cli, tmp_path / "go-on", within_grace=False)
    assert [row["action"] for row in rows(reaped.out)] == ["marked", "lost"]
    assert code == 5
    (session,) = cli.store.get_all_sessions()
    assert session.status == "error"


def test_a_dry_run_tells_all_and_changes_nothing(cli: CommandLine) -> None:
    sessions = {
        "marked": lost_session(cli),
        "terminated": create(cli),
        "deleted": create(cli, status="error"),
    }
    with redis.Redis.from_url(cli.url) as client:
        before = contents(client, f"{{{cli.namespace}}}")
        finished = cli.run("reap", "--dry-run", "--idle-for", "0", "--ended-for", "0")
        assert contents(client, f"{{{cli.namespace}}}") == before
    assert (finished.code, finished.err) == (0, "")
    told = {row["action"]: row for row in rows(finished.out)}
    assert {action: row["id"] for action, row in told.items()} == {
        action: session.id for action, session in sessions.items()
    }
    assert " expired at " in told["marked"]["reason"]
    assert told["terminated"]["reason"].startswith("idle for ")
    assert told["deleted"]["reason"].startswith("error for ")
    assert told["deleted"]["owner"] == ""


def test_idle_and_ended_sessions_are_reaped_only_if_asked(cli: CommandLine) -> None:
    create(cli)
    create(cli, status="terminated")
    assert rows(cli.run("reap").out) == []
    assert rows(cli.run("reap", "--idle-for", "1h", "--ended-for", "7d").out) == []
    done = cli.run("reap", "--idle-for", "0s", "--ended-for", "0")
    assert [row["action"] for row in rows(done.out)][:2] == ["terminated", "deleted"]


def test_the_retention_of_the_environment_counts(cli: CommandLine) -> None:
    session = create(cli, status="terminated")
    done = cli.run("reap", env={"SESSIONSTORE_RETENTION": "0"})
    assert [(row["action"], row["id"]) for row in rows(done.out)] == [("deleted", session.id)]


def test_json_is_one_array_over_both_passes(cli: CommandLine) -> None:
    lost = lost_session(cli)
    told = json.loads(cli.run("reap", "--json", env=grace(GRACE)).out)
    assert [one["action"] for one in told] == ["marked", "lost"]
    assert all(list(one) == COLUMNS and one["id"] == lost.id for one in told)
    assert cli.run("reap", "--json").out == "[]\n"


def test_what_was_done_is_told_if_the_second_look_is_interrupted(cli: CommandLine) -> None:
    lost_session(cli)
    process = cli.start("reap", "--json", env=grace(60))
    assert process.stderr is not None
    assert b"looking again in 66 s" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    assert [one["action"] for one in json.loads(out)] == ["marked"]


def test_a_limit_that_was_reached_is_told(cli: CommandLine) -> None:
    for _ in range(3):
        create(cli, status="terminated")
    done = cli.run("reap", "--ended-for", "0", "--limit", "2")
    assert len(rows(done.out)) == 2
    assert done.err == "there may be more: a pass does 2 of each kind (--limit)\n"
    assert cli.run("reap", "--ended-for", "0", "--limit", "2").err == ""


def test_a_server_out_of_reach_is_told_and_nothing_else(cli: CommandLine) -> None:
    done = cli.run("--url", "redis://127.0.0.1:1", "--timeout", "0.3", "reap", "--json")
    assert (done.code, done.out) == (4, "")
    assert "cannot reach the store at 127.0.0.1:1" in done.err


# ---- Again and again --------------------------------------------------------------------------


def lines_of(process: Started) -> Iterator[list[str]]:
    assert process.stdout is not None
    return (line.decode().rstrip("\n").split("\t") for line in process.stdout)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_every_tells_what_it_does_until_a_signal_ends_it(
    cli: CommandLine, number: signal.Signals, code: int
) -> None:
    process = cli.start("reap", "--every", "0.1", "--ended-for", "0", env=grace(GRACE))
    told = lines_of(process)
    assert next(told) == COLUMNS
    for _ in range(2):
        session = create(cli, status="terminated")
        assert next(told)[:2] == ["deleted", session.id]
    process.send_signal(number)
    assert process.communicate()[1] == b""
    assert process.returncode == code


def test_every_looks_again_when_the_grace_period_is_over(cli: CommandLine) -> None:
    lost = lost_session(cli)
    process = cli.start("reap", "--every", "1h", env=grace(GRACE))
    told = lines_of(process)
    assert [next(told)[:2] for _ in range(3)] == [
        ["action", "id"],
        ["marked", lost.id],
        ["lost", lost.id],
    ]
    process.terminate()
    process.communicate()
    assert process.returncode == 0


def test_every_in_json_is_an_object_a_line(cli: CommandLine) -> None:
    process = cli.start("reap", "--every", "0.1", "--ended-for", "0", "--json")
    assert process.stdout is not None
    for _ in range(2):
        session = create(cli, status="terminated")
        told = json.loads(process.stdout.readline())
        assert (told["action"], told["id"]) == ("deleted", session.id)
    process.terminate()
    assert process.communicate()[0] == b""


def test_every_goes_on_through_an_outage(
    cli: CommandLine, running: Callable[[str], PrivateServer]
) -> None:
    with FaultProxy(running(SERVERS[0]).port) as proxy:
        process = cli.start(
            *("--url", proxy.url, "--timeout", "0.3"),
            *("reap", "--every", "0.1", "--ended-for", "0"),
        )
        told = lines_of(process)
        next(told)
        first = create(cli, status="terminated")
        assert next(told)[:2] == ["deleted", first.id]
        proxy.down()
        assert process.stderr is not None
        outage = process.stderr.readline().decode()
        assert "the store at 127.0.0.1:" in outage
        assert outage.endswith("; going on\n")
        second = create(cli, status="terminated")
        proxy.up()
        assert next(told)[:2] == ["deleted", second.id]
        assert process.stderr.readline() == b"the store answers again\n"
        process.terminate()
        process.communicate()
        assert process.returncode == 0


def test_every_ends_at_what_no_later_pass_can_mend(cli: CommandLine) -> None:
    with PrivateServer(PROGRAMS[SERVERS[0]], ("--requirepass", "secret")) as locked:
        finished = cli.run("--url", locked.url, "reap", "--every", "0.1")
    assert finished.code == 4
    assert "authentication failed" in finished.err


def test_every_on_a_terminal_has_one_header_over_all_passes(cli: CommandLine) -> None:
    lost = lost_session(cli)
    finished = cli.on_terminal(
        *("reap", "--every", "1h"), env=grace(GRACE) | {"NO_COLOR": "1"}, stop_at="not renewed\n"
    )
    assert finished.code == 0
    said, header, *lines = finished.out.splitlines()
    assert said == "reaping every 3600 s; Ctrl-C ends it"
    assert header.split() == ["ACTION", "ID", "STATUS"]
    assert [line.split() for line in lines[::2]] == [
        ["marked", lost.id, "busy"],
        ["lost", lost.id, "busy"],
    ]
