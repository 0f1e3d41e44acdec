"""The command line in a pipe: what scripts read, exit codes, and bad days."""

from __future__ import annotations

import itertools
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, Finished, command_line
from conftest import PROGRAMS, SENTINEL, SERVERS
from faults import Fault, FaultProxy
from prestarted import PROGRAM
from waiting import until

from sessionstore import AgentSession, Lease, LeaseLostError
from sessionstore._server import PrivateServer
from sessionstore.cli import main

HEADER = [
    *("id", "type", "status", "service_session_id", "task_id", "mcp_session_id", "project_path"),
    *("created_at", "last_activity", "output_total", "error_total", "owner", "lease_expires_at"),
    "last_output",
]
ANY_ID = "agent_claude_00000000-0000-4000-8000-000000000000"
PASSWORD = "s3cret-and-l0ng"


@pytest.fixture
def cli(running: Callable[[str], PrivateServer]) -> Iterator[CommandLine]:
    """On one server: what is tested here is on this side of it."""
    with command_line(running(SERVERS[0])) as opened:
        yield opened


@pytest.fixture
def each_cli(server: PrivateServer) -> Iterator[CommandLine]:
    with command_line(server) as opened:
        yield opened


@pytest.fixture
def locked_server() -> Iterator[PrivateServer]:
    with PrivateServer(PROGRAMS[SERVERS[0]], ("--requirepass", PASSWORD)) as started:
        yield started


@pytest.fixture
def in_process(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Finished]:
    """Runs commands in this process, where starting so many others would take long."""
    for name, value in cli.environment().items():
        if name.startswith("SESSIONSTORE_"):
            monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["sessionstore", *arguments])
        code = main()
        return Finished(code, *capsys.readouterr())

    return run


def create(cli: CommandLine, **changes: Any) -> AgentSession:
    arguments = {"type": "claude", "service_session_id": "service-1", "project_path": "/src"}
    return cli.store.create_session(**(arguments | changes))


def table(tsv: str) -> list[dict[str, str]]:
    header, *rows = (line.split("\t") for line in tsv.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def unescaped(field: str) -> str:
    """What a reader of the TSV does to have the value itself."""
    short = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}

    def one(match: re.Match[str]) -> str:
        return short.get(match[1]) or chr(int(match[1][1:], 16))

    return re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|[tnr\\])", one, field)


# ---- ls ---------------------------------------------------------------------------------------


def test_ls_in_a_pipe_is_a_header_and_a_line_for_each_session(each_cli: CommandLine) -> None:
    first = create(each_cli, task_id="task-1", mcp_session_id="mcp-1")
    second = create(each_cli, type="codex", project_path="/p" * 200)
    each_cli.store.add_output(first.id, "one", "x" * 500)

    finished = each_cli.run("ls")

    assert (finished.code, finished.err) == (0, "")
    assert finished.out.splitlines()[0].split("\t") == HEADER
    rows = table(finished.out)
    assert [row["id"] for row in rows] == [first.id, second.id]
    assert rows[0]["task_id"] == "task-1"
    assert rows[0]["output_total"] == "2"
    assert rows[0]["last_output"] == "x" * 500
    assert rows[1]["project_path"] == "/p" * 200
    assert rows[1]["task_id"] == rows[1]["last_output"] == ""


def test_times_in_tsv_are_iso_8601(cli: CommandLine, in_process: Callable[..., Finished]) -> None:
    session = create(cli)
    (row,) = table(in_process("ls").out)
    assert datetime.fromisoformat(row["created_at"]) == session.created_at


def test_every_value_can_be_read_back_from_tsv(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    nasty = "tab\tnewline\ncr\rback\\slash\\n esc\x1b[31m c1\x9b bidi\u202e \u2028 日本語 😀"
    session = create(cli, project_path="C:\\new\\table")
    cli.store.add_output(session.id, nasty)
    (row,) = table(in_process("ls").out)
    assert unescaped(row["last_output"]) == nasty
    assert unescaped(row["project_path"]) == "C:\\new\\table"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--type", "codex"], "b"),
        (["--status", "busy", "--status", "error"], "bc"),
        (["--status", "busy,error", "--type", "codex"], "b"),
        (["--task", "task-1"], "ac"),
        (["--service", "a"], "a"),
        (["--mcp", "mcp-c"], "c"),
        (["--limit", "2"], "ab"),
        (["--order", "-last_activity", "--limit", "1"], "a"),
        (["--owner", "nobody"], ""),
    ],
)
def test_ls_filters(
    cli: CommandLine, in_process: Callable[..., Finished], arguments: list[str], expected: str
) -> None:
    first = create(cli, service_session_id="a", task_id="task-1")
    create(cli, service_session_id="b", type="codex", status="busy")
    create(cli, service_session_id="c", task_id="task-1", mcp_session_id="mcp-c", status="error")
    cli.store.update_activity(first.id)
    rows = table(in_process("ls", *arguments).out)
    assert [row["service_session_id"] for row in rows] == list(expected)


def test_ls_json_is_an_array_with_a_session_on_each_line(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    sessions = [create(cli), create(cli, task_id="task-1")]
    cli.store.add_output(sessions[1].id, "old", "new")

    out = in_process("ls", "--json").out

    first, second = json.loads(out)
    assert [first["id"], second["id"]] == [session.id for session in sessions]
    assert (second["taskId"], second["output_buffer"]) == ("task-1", ["new"])
    assert [json.loads(line.rstrip(","))["id"] for line in out.splitlines()[1:-1]] == [
        session.id for session in sessions
    ]


def test_an_empty_store_is_a_header_or_an_empty_array(in_process: Callable[..., Finished]) -> None:
    assert in_process("ls").out.splitlines() == ["\t".join(HEADER)]
    assert in_process("ls", "--json").out == "[]\n"


def test_an_unreadable_record_is_left_out_with_a_warning(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    broken, good = create(cli), create(cli)
    cli.redis.hset(f"{{{cli.namespace}}}:session:{broken.id}", "created_at", "\x1b[2Jnever")
    finished = in_process("ls")
    assert [row["id"] for row in table(finished.out)] == [good.id]
    assert "warning: left out of a listing" in finished.err
    assert "\x1b" not in finished.err


def test_ls_tells_who_holds_a_session_and_until_when(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    taken = create(cli)
    create(cli)
    with cli.store.claim(taken.id) as lease:
        first, second = table(in_process("ls").out)
        session = cli.store.get_session(taken.id)
        assert [row["id"] for row in table(in_process("ls", "--owner", lease.owner).out)] == [
            taken.id
        ]
    assert first["owner"] == lease.owner
    assert session.lease_expires_at is not None
    assert datetime.fromisoformat(first["lease_expires_at"]) == session.lease_expires_at
    assert second["owner"] == second["lease_expires_at"] == ""


# ---- show, metrics, rm ------------------------------------------------------------------------


def test_show_in_a_pipe_is_field_and_value(cli: CommandLine) -> None:
    session = create(cli, metadata={"branch": "main", "note": "a\tb"})
    cli.store.add_output(session.id, *map(str, range(20)))
    cli.store.add_error(session.id, "oops")

    header, *lines = cli.run("show", session.id, "-n", "2").out.splitlines()

    assert header == "field\tvalue"
    rows = [line.split("\t") for line in lines]
    assert ["id", session.id] in rows
    assert ["meta:branch", "main"] in rows
    assert ["meta:note", r"a\tb"] in rows
    assert [value for field, value in rows if field == "output"] == ["18", "19"]
    assert ["error", "oops"] in rows


def test_show_json_has_the_originals_names(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    session = create(cli, metadata={"branch": "main"})
    cli.store.add_output(session.id, *map(str, range(20)))
    shown = json.loads(in_process("show", session.id, "--json").out)
    assert shown["serviceSessionId"] == "service-1"
    assert shown["output_buffer"] == [str(number) for number in range(10, 20)]
    assert shown["output_total"] == 20
    assert shown["metadata"] == {"branch": "main"}


def test_metrics_in_a_pipe_are_kind_name_count(cli: CommandLine) -> None:
    create(cli)
    create(cli, type="codex", status="busy")
    rows = table(cli.run("metrics").out)
    counts = {(row["kind"], row["name"]): row["count"] for row in rows}
    assert counts["total", ""] == "2"
    assert counts["status", "busy"] == counts["type", "codex"] == "1"
    assert counts["status", "error"] == "0"


def test_metrics_json_has_the_originals_names(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    create(cli, status="busy")
    counted = json.loads(in_process("metrics", "--json").out)
    assert counted["totalSessions"] == counted["busySessions"] == 1
    assert counted["sessionsByType"] == {"claude": 1}


def test_rm_deletes(cli: CommandLine) -> None:
    first, second = create(cli), create(cli)
    finished = cli.run("rm", first.id, second.id)
    assert (finished.code, finished.err) == (0, "")
    assert table(finished.out) == [{"id": s.id, "deleted": "true"} for s in (first, second)]
    assert cli.store.get_metrics().total_sessions == 0


def test_rm_deletes_what_is_there_and_names_what_is_not(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    session = create(cli)
    finished = in_process("rm", ANY_ID, session.id, "--json")
    assert finished.code == 3
    assert f"no session '{ANY_ID}'" in finished.err
    assert json.loads(finished.out) == [
        {"id": ANY_ID, "deleted": False},
        {"id": session.id, "deleted": True},
    ]
    assert cli.store.find_session(session.id) is None


def test_rm_refuses_what_a_worker_holds_and_deletes_the_others(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    taken, free = create(cli), create(cli)
    with cli.store.claim(taken.id) as lease:
        finished = in_process("rm", taken.id, free.id, ANY_ID)
        assert cli.store.get_session(taken.id).owner == lease.owner
    assert finished.code == 1
    assert [row["deleted"] for row in table(finished.out)] == ["false", "true", "false"]
    refused, missing = finished.err.splitlines()
    assert f"'{taken.id}' is held by {lease.owner}, whose lease runs for another " in refused
    assert refused.endswith("--force deletes it")
    assert missing == f"error: no session '{ANY_ID}'"


def test_rm_with_force_deletes_what_a_worker_holds(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    taken = create(cli)
    lease = cli.store.claim(taken.id)
    finished = in_process("rm", "--force", taken.id)
    assert (finished.code, finished.err) == (0, "")
    assert cli.store.find_session(taken.id) is None
    until(lambda: _is_lost(lease))


def _is_lost(lease: Lease) -> bool:
    with suppress(LeaseLostError):
        lease.renew()
    return lease.lost


# ---- logs -------------------------------------------------------------------------------------


def test_logs_prints_all_entries_in_order_over_many_pages(each_cli: CommandLine) -> None:
    session = create(each_cli)
    entries = [f"line {number}" for number in range(2500)]
    each_cli.store.add_output(session.id, *entries)
    finished = each_cli.run("logs", session.id)
    assert (finished.code, finished.err) == (0, "")
    assert finished.out == "".join(f"{entry}\n" for entry in entries)


def test_logs_prints_the_newest_entries_of_the_buffer_asked_for(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    session = create(cli)
    cli.store.add_output(session.id, "output")
    cli.store.add_error(session.id, "first", "second", "third")
    assert in_process("logs", session.id, "--errors", "-n", "2").out == "second\nthird\n"


def test_logs_json_is_an_object_a_line_with_its_position(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    session = create(cli)
    cli.store.add_output(session.id, "zero", "one\x1b\u202e\n\ttwo")
    out = in_process("logs", session.id, "--json", "-n", "1").out
    assert out.isascii()
    assert json.loads(out) == {"position": 1, "text": "one\x1b\u202e\n\ttwo"}


def test_logs_raw_prints_the_very_characters(cli: CommandLine) -> None:
    session = create(cli)
    text = "\x1b[31mred\x07\r\u202e\x9b 日本"
    cli.store.add_output(session.id, text)
    assert cli.run("logs", session.id, "--raw").out == text + "\n"


def test_logs_tells_on_stderr_how_many_lines_were_dropped(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    session = create(cli)
    with type(cli.store).from_url(cli.url, namespace=cli.namespace, buffer_limit=5) as small:
        small.add_output(session.id, *map(str, range(1205)))
    finished = in_process("logs", session.id)
    kept = int(finished.out.split()[0])
    assert finished.out.split() == [str(number) for number in range(kept, 1205)]
    assert finished.err == f"… {kept:,} lines dropped …\n"


def test_follow_prints_entries_as_they_appear_and_ends_with_the_session(cli: CommandLine) -> None:
    session = create(cli)
    process = cli.start("logs", "-f", session.id)
    assert process.stdout is not None
    for number in range(3):
        cli.store.add_output(session.id, f"line {number}")
        assert process.stdout.readline() == f"line {number}\n".encode()
    cli.store.add_output(session.id, "the last")
    cli.store.update_status(session.id, "terminated")
    assert process.communicate() == (b"the last\n", b"")
    assert process.returncode == 0


def test_follow_ends_when_the_session_is_deleted(cli: CommandLine) -> None:
    session = create(cli)
    cli.store.add_output(session.id, "line")
    process = cli.start("logs", "-f", session.id)
    assert process.stdout is not None
    assert process.stdout.readline() == b"line\n"
    cli.store.delete_session(session.id)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, b"")
    assert "deleted" in err.decode()


def test_ctrl_c_ends_following_with_130_and_without_a_word(cli: CommandLine) -> None:
    session = create(cli)
    cli.store.add_output(session.id, "line")
    process = cli.start("logs", "-f", session.id)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"")
    assert process.returncode == 130


# ---- Pipes and files that take no more --------------------------------------------------------


@pytest.mark.parametrize("arguments", [["logs"], ["logs", "--raw"], ["logs", "--json"]])
def test_a_reader_that_leaves_is_no_error_to_talk_about(
    cli: CommandLine, arguments: list[str]
) -> None:
    session = create(cli)
    for _ in range(10):
        cli.store.add_output(session.id, *["x" * 500] * 1000)
    process = cli.start(*arguments, session.id)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


def test_following_a_quiet_session_ends_when_the_reader_leaves(cli: CommandLine) -> None:
    session = create(cli)
    cli.store.add_output(session.id, "line")
    process = cli.start("logs", "-f", session.id)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_is_a_failure_in_one_line(cli: CommandLine) -> None:
    create(cli)
    with Path("/dev/full").open("w") as full:
        process = cli.start("ls", stdout=full.fileno())
        _, err = process.communicate()
    assert process.returncode == 1
    assert err == b"error: No space left on device\n"


# ---- Exit codes -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["show", "logs", "rm"])
def test_no_such_session_is_3(in_process: Callable[..., Finished], command: str) -> None:
    finished = in_process(command, ANY_ID)
    assert finished.code == 3
    assert finished.err == f"error: no session '{ANY_ID}'\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ls", "--status", "sleeping"], "status must be one of starting, active, busy"),
        (["ls", "--type", "Claude"], "type must match"),
        (["ls", "--limit", "-1"], "--limit"),
        (["ls", "--order", "newest"], "--order"),
        (["show", ""], "session_id must not be empty"),
        (["show", "a\x1bb"], r"session_id has a control character: 'a\x1bb'"),
        (["show"], "Missing argument"),
        (["logs", ANY_ID, "--json", "--raw"], "cannot be used together"),
        (["lst"], "No such command 'lst'"),
        (["--colour"], "--colour"),
        (["run", "--type", "claude", "--meta", "x", "--", "true"], "NAME=VALUE"),
        (["run", "--", "true"], "'--type' / '--session': neither given"),
        (["run", "--type", "a", "--session", "b", "--", "true"], "both given"),
        (["run", "--session", "b", "--task", "t", "--", "true"], "'--task': goes with --type"),
        (["run", "--session", "b", "--unique", "--", "true"], "'--unique': goes with --type"),
        (["run", "--type", "a", "--wait", "0", "--", "true"], "'--wait': goes with --session"),
        (["run", "--session", "b", "--wait", "-1", "--", "true"], "'-1' is no duration"),
        (["run", "--type", "claude", "--ttl", "0", "--", "true"], "ttl must be 0.1 to 86400"),
        (["reap", "--every", "0"], "'--every': must be above 0"),
        (["reap", "--idle-for", "1 week"], "'1 week' is no duration: 30 (seconds), 90s, 15m"),
        (["reap", "--ended-for", "nan"], "'nan' is no duration"),
        (["reap", "--ended-for", "999999d"], "ended_for must be"),
        (["reap", "--limit", "1001"], "--limit"),
        (["run", "--type", "claude"], "COMMAND"),
        (["--timeout", "0", "ls"], "--timeout"),
        (["--namespace", "{x}", "ls"], "namespace is not valid"),
        (["demo", "/no/such/file"], "/no/such/file"),
        (["--url", "http://localhost", "ls"], "the URL is not valid"),
        ([], ""),
    ],
    ids=lambda value: " ".join(value).replace("\x1b", "ESC") if isinstance(value, list) else "",
)
def test_wrong_usage_is_2_and_told(
    in_process: Callable[..., Finished], arguments: list[str], told: str
) -> None:
    finished = in_process(*arguments)
    assert finished.code == 2
    assert told in finished.err
    assert "Traceback" not in finished.err
    assert "\x1b" not in finished.err


def test_without_a_url_the_command_says_what_to_set(cli: CommandLine) -> None:
    finished = cli.run("ls", env={"SESSIONSTORE_URL": None})
    assert (finished.code, finished.out) == (2, "")
    assert "SESSIONSTORE_URL" in finished.err
    assert "--url" in finished.err


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{PASSWORD}/x@localhost",
        f"redis://:12#{PASSWORD}@localhost:6379",
        f"redis+sentinel://:{PASSWORD}/x@localhost/primary",
        f"redis+sentinel://:12/{PASSWORD}@localhost/primary",
    ],
)
def test_a_password_that_breaks_the_url_is_not_shown(cli: CommandLine, url: str) -> None:
    finished = cli.run("ls", env={"SESSIONSTORE_URL": url})
    assert finished.code == 2
    assert "percent-encoded" in finished.err
    assert PASSWORD not in finished.err


def test_an_unreachable_server_is_4_with_its_address(cli: CommandLine) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        url = f"redis://user:{PASSWORD}@{address}/0"
        finished = cli.run("--timeout", "0.5", "ls", env={"SESSIONSTORE_URL": url})
    assert (finished.code, finished.out) == (4, "")
    assert finished.err == f"error: cannot reach the store at {address}: Connection refused\n"


def test_a_mute_server_is_4_with_its_address(cli: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        finished = cli.run("--url", f"redis://{address}", "--timeout", "0.5", "metrics")
    assert (finished.code, finished.out) == (4, "")
    assert finished.err == f"error: cannot reach the store at {address}: no answer in time\n"


def test_an_unreachable_socket_is_4_with_its_path(cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "no.sock"
    finished = cli.run("--url", f"unix://:{PASSWORD}@{path}", "--timeout", "0.5", "ls")
    assert finished.code == 4
    assert str(path) in finished.err
    assert PASSWORD not in finished.err


def test_the_sentinels_tell_where_the_store_is(
    cli: CommandLine, running: Callable[[str], Any]
) -> None:
    assert cli.run("--url", running(SENTINEL).url, "ls", "--json").out == "[]\n"


def test_sentinels_out_of_reach_are_4_with_their_addresses(cli: CommandLine) -> None:
    url = f"redis+sentinel://:{PASSWORD}@127.0.0.1:1,[::1]:1/primary?sentinel_password={PASSWORD}"
    finished = cli.run("--url", url, "--timeout", "0.5", "ls")
    assert (finished.code, finished.out) == (4, "")
    assert "cannot reach the store at primary of 127.0.0.1:1, [::1]:1: No master" in finished.err
    assert PASSWORD not in finished.err


def test_a_deletion_without_an_answer_is_not_said_to_have_failed(
    cli: CommandLine, running: Callable[[str], PrivateServer]
) -> None:
    session = create(cli)
    with FaultProxy(running(SERVERS[0]).port) as proxy:
        proxy.plan(itertools.repeat(Fault.LOSE_REPLY))
        finished = cli.run("--url", proxy.url, "--timeout", "0.5", "rm", session.id)
    assert finished.code == 4
    assert "may or may not have been made" in finished.err
    assert f"127.0.0.1:{proxy.port}" in finished.err


def test_a_wrong_password_is_4_and_is_not_shown(
    cli: CommandLine, locked_server: PrivateServer
) -> None:
    wrong = locked_server.url.replace("//", "//:wr0ng-one@")
    finished = cli.run("ls", env={"SESSIONSTORE_URL": wrong})
    assert finished.code == 4
    assert f"authentication failed at 127.0.0.1:{locked_server.port}" in finished.err
    assert "wr0ng-one" not in finished.err


def test_a_missing_password_is_4(cli: CommandLine, locked_server: PrivateServer) -> None:
    finished = cli.run("ls", env={"SESSIONSTORE_URL": locked_server.url})
    assert finished.code == 4
    assert f"authentication failed at 127.0.0.1:{locked_server.port}" in finished.err


def test_the_right_password_opens(cli: CommandLine, locked_server: PrivateServer) -> None:
    right = locked_server.url.replace("//", f"//:{PASSWORD}@")
    assert cli.run("ls", "--json", env={"SESSIONSTORE_URL": right}).out == "[]\n"


def test_a_namespace_of_another_version_is_1(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    cli.redis.hset(f"{{{cli.namespace}}}:meta", "schema", "99\x1b[2J")
    finished = in_process("ls")
    assert finished.code == 1
    assert finished.err.startswith("error: namespace")
    assert "\x1b" not in finished.err


def test_what_a_server_says_is_1_without_harm(cli: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hostile:

        def answer() -> None:
            connection, _ = hostile.accept()
            with connection:
                while request := connection.recv(65536):
                    commands = len(re.findall(rb"(?:\A|\r\n)\*\d+\r\n", request))
                    connection.sendall(b"-ERR no \x1b[2J\xc2\x9b\r\n" * commands)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        finished = cli.run("--url", f"redis://127.0.0.1:{hostile.getsockname()[1]}", "ls")
        thread.join(60)
    assert finished.code == 1
    assert finished.err == "error: no \\x1b[2J\\x9b\n"


def test_warnings_of_the_library_are_shown_without_harm(
    in_process: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessionstore.cli.demo import main as demo

    def run_demo(*_: Any, **__: Any) -> int:
        logging.getLogger("sessionstore").warning("seen: %s", "\x1b[2J")
        return 0

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert in_process("demo").err == "warning: seen: \\x1b[2J\n"


def test_a_server_that_evicts_is_1(in_process: Callable[..., Finished]) -> None:
    options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with PrivateServer(PROGRAMS[SERVERS[0]], options) as evicting:
        finished = in_process("--url", evicting.url, "ls")
    assert finished.code == 1
    assert "evicts" in finished.err
    assert finished.err.count("\n") == 1


def test_a_buffer_of_the_wrong_type_is_1(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    session = create(cli)
    cli.store.add_output(session.id, "line")
    key = f"{{{cli.namespace}}}:session:{session.id}:output"
    cli.redis.delete(key)
    cli.redis.set(key, "not a list")
    finished = in_process("logs", session.id)
    assert finished.code == 1
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1


# ---- Global options ---------------------------------------------------------------------------


def test_options_of_the_store_work_before_and_after_the_command(cli: CommandLine) -> None:
    session = create(cli)
    options = ["--url", cli.url, "--namespace", cli.namespace]
    nothing: dict[str, str | None] = {"SESSIONSTORE_URL": None, "SESSIONSTORE_NAMESPACE": None}
    before = cli.run(*options, "ls", env=nothing)
    after = cli.run("ls", *options, env=nothing)
    assert before == after
    assert session.id in after.out


def test_the_option_after_the_command_wins_over_the_one_before(
    cli: CommandLine, in_process: Callable[..., Finished]
) -> None:
    session = create(cli)
    finished = in_process("--namespace", "elsewhere", "ls", "--namespace", cli.namespace)
    assert session.id in finished.out


def test_version_and_help_need_no_server(cli: CommandLine) -> None:
    nothing: dict[str, str | None] = {"SESSIONSTORE_URL": None}
    assert re.fullmatch(r"sessionstore \d\S*\n", cli.run("--version", env=nothing).out)
    finished = cli.run("--help", env=nothing)
    assert finished.code == 0
    for command in ("run", "ls", "show", "logs", "metrics", "rm", "reap", "demo"):
        assert f" {command} " in finished.out


@pytest.mark.parametrize("arguments", [("ls",), ("--help",), ("ls", "--nonsense"), ("show", "x")])
def test_the_commands_of_these_tests_are_the_program(
    cli: CommandLine, arguments: tuple[str, ...]
) -> None:
    create(cli)
    real = subprocess.run([PROGRAM, *arguments], env=cli.environment(), capture_output=True)
    here = cli.run(*arguments)
    assert (here.code, here.out, here.err) == (
        real.returncode,
        real.stdout.decode(),
        real.stderr.decode(),
    )


def test_version_loads_no_module_of_a_command() -> None:
    code = (
        "import sys; sys.argv = ['sessionstore', '--version']\n"
        "from sessionstore.cli import main; main()\n"
        "print([name for name in sys.modules if name in ('sessionstore.cli.run',"
        " 'sessionstore.cli.demo', 'sessionstore.cli.views')])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.splitlines()[-1] == "[]"


# ---- What is handed to run and demo -----------------------------------------------------------


def test_everything_from_the_command_on_belongs_to_the_command(
    cli: CommandLine, in_process: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessionstore.cli import run

    called: list[Any] = []

    def run_command(store: Any, command: Any, **options: Any) -> int:
        called.append((store.settings.deadline, list(command), options))
        return 42

    monkeypatch.setattr(run, "run_command", run_command)
    monkeypatch.delenv("SESSIONSTORE_DEADLINE", raising=False)
    arguments = (
        *("--url", cli.url, "run", "--type", "claude", "--task", "T", "--service", "S"),
        *("--mcp", "M", "--project", "/p", "--meta", "a=b=c", "--meta", "d=", "--unique"),
        *("git", "log", "--json", "-n", "3", "--", "--url", "x"),
    )
    assert in_process(*arguments).code == 42
    assert called == [
        (
            10.0,
            ["git", "log", "--json", "-n", "3", "--", "--url", "x"],
            {
                "type": "claude",
                "task_id": "T",
                "service_session_id": "S",
                "mcp_session_id": "M",
                "project_path": "/p",
                "metadata": {"a": "b=c", "d": ""},
                "unique": True,
                "session_id": None,
                "wait": 0.0,
                "ttl": 30.0,
            },
        )
    ]


def test_durations_are_seconds_or_have_a_unit(
    in_process: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessionstore.cli import run

    called: list[tuple[Any, ...]] = []

    def run_command(*_: Any, **options: Any) -> int:
        called.append(tuple(options[name] for name in ("type", "session_id", "wait", "ttl")))
        return 0

    monkeypatch.setattr(run, "run_command", run_command)
    for wait, ttl in (("15m", "90s"), ("2h", "1.5"), ("0.5d", "7"), ("0", ".5 m")):
        in_process("run", "--session", "x", "--wait", wait, "--ttl", ttl, "true")
    assert called == [
        (None, "x", 900.0, 90.0),
        (None, "x", 7200.0, 1.5),
        (None, "x", 43200.0, 7.0),
        (None, "x", 0.0, 30.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (["demo"], None),
        (["demo", "--url", "redis://a"], "redis://a"),
        (["--url", "redis://b", "demo"], "redis://b"),
    ],
)
def test_demo_uses_an_existing_server_only_if_an_option_names_it(
    in_process: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    url: str | None,
) -> None:
    from sessionstore.cli.demo import main as demo

    called: list[Any] = []

    def run_demo(_: Path | None, **options: Any) -> int:
        called.append(options)
        return 0

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert in_process(*arguments).code == 0
    (options,) = called
    assert options["url"] == url
