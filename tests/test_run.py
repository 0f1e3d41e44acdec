"""``sessionstore run`` through its real entry point: one command as one session."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from faults import Fault, FaultProxy
from prestarted import PROGRAM, Started
from waiting import until

from sessionstore import AgentSession, SessionBusyError, SessionStore
from sessionstore._server import PrivateServer
from sessionstore.cli.run import run_command
from sessionstore.scripts import load


class Runner:
    """Runs commands as sessions of one namespace."""

    def __init__(self, server: PrivateServer) -> None:
        self._started: list[Started] = []
        self.namespace = f"test-{uuid4().hex[:12]}"
        self.store = SessionStore.from_url(server.url, namespace=self.namespace)
        self.redis: Any = redis.Redis.from_url(server.url, decode_responses=True)
        self.environment = {
            **os.environ,
            "SESSIONSTORE_URL": server.url,
            "SESSIONSTORE_NAMESPACE": self.namespace,
        }

    def start(self, *arguments: str, **options: Any) -> Started:
        return self.start_with("--type", "claude", *arguments, **options)

    def start_with(self, *arguments: str, **options: Any) -> Started:
        """Start ``run`` with these options of its own."""
        process = Started(["run", *arguments], self.environment, **options)
        self._started.append(process)
        return process

    def continued(self, session_id: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run ``run --session`` to its end."""
        process = self.start_with("--session", session_id, *arguments)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        process = self.start("--", *command, **options)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def session(self, **options: Any) -> AgentSession:
        (only,) = self.store.get_all_sessions(**options)
        return only

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:  # after a failed test
                process.terminate()
        for key in self.redis.scan_iter(f"{{{self.namespace}}}:*"):
            self.redis.unlink(key)
        self.redis.close()
        self.store.close()


@pytest.fixture
def runner(server: PrivateServer) -> Iterator[Runner]:
    opened = Runner(server)
    yield opened
    opened.close()


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_both_streams_are_stored_and_passed_through(runner: Runner) -> None:
    done = runner.run("sh", "-c", "echo one; echo two; echo oops >&2")
    assert (done.stdout, done.stderr) == (b"one\ntwo\n", b"oops\n")
    session = runner.session()
    assert session.output_buffer == ("one", "two")
    assert session.error_buffer == ("oops",)


def test_a_command_that_succeeds_ends_terminated(runner: Runner) -> None:
    assert runner.run("true").returncode == 0
    session = runner.session()
    assert (session.status, session.metadata["exit_code"]) == ("terminated", "0")


def test_a_command_that_fails_ends_in_error_with_its_own_exit_code(runner: Runner) -> None:
    assert runner.run("sh", "-c", "exit 42").returncode == 42
    session = runner.session()
    assert (session.status, session.metadata["exit_code"]) == ("error", "42")


def test_a_command_ended_by_a_signal_is_told_as_a_shell_does(runner: Runner) -> None:
    assert runner.run("sh", "-c", "kill -9 $$").returncode == 128 + 9
    session = runner.session()
    assert session.status == "error"
    assert (session.metadata["exit_code"], session.metadata["signal"]) == ("137", "SIGKILL")


@pytest.mark.parametrize(("name", "code"), [("no-such-command", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_start_leaves_a_session_that_says_why(
    runner: Runner, name: str, code: int
) -> None:
    done = runner.run(name)
    assert done.returncode == code
    assert name.encode() in done.stderr
    session = runner.session()
    assert session.status == "error"
    assert session.metadata["exit_code"] == str(code)
    assert name in session.error_buffer[0]


def test_statuses_are_starting_busy_then_the_end(runner: Runner) -> None:
    runner.run("true")
    events = runner.redis.xrange(f"{{{runner.namespace}}}:events")
    assert [(fields["event"], fields["status"]) for _, fields in events] == [
        ("created", "starting"),
        ("claimed", "busy"),
        ("released", "terminated"),
    ]


def test_a_slow_child_that_flushes_is_seen_at_once(runner: Runner, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    script = f"echo first; while [ ! -e {go_on} ]; do sleep 0.02; done; echo second"
    process = runner.start("--", "sh", "-c", script)

    def seen() -> tuple[str, ...]:
        sessions = runner.store.get_all_sessions()
        return sessions[0].output_buffer if sessions else ()

    until(lambda: seen() == ("first",))
    until(lambda: runner.session().status == "busy")
    go_on.touch()
    assert process.communicate(timeout=30)[0] == b"first\nsecond\n"
    assert seen() == ("first", "second")


def test_bytes_that_are_no_utf8_and_a_missing_last_newline_are_kept(runner: Runner) -> None:
    raw = b"caf\xe9\nna\xc3\xafve\nno end"
    done = runner.run(*python(f"import sys; sys.stdout.buffer.write({raw!r})"))
    assert done.stdout == raw
    assert runner.session().output_buffer == ("caf\ufffd", "naïve", "no end")


def test_an_endless_line_is_split(runner: Runner) -> None:
    runner.run(*python("print('x' * 1_000_000, end='')"))
    session = runner.session()
    assert "".join(session.output_buffer) == "x" * 1_000_000
    assert session.output_total == 16


def test_huge_output_is_counted_whole_and_kept_bounded(runner: Runner) -> None:
    done = runner.run("seq", "1", "300000")
    assert done.stdout == b"".join(b"%d\n" % n for n in range(1, 300_001))
    session = runner.session()
    assert session.output_total == 300_000
    assert session.output_buffer == tuple(str(n) for n in range(290_001, 300_001))


def test_empty_lines_by_the_thousand_fit(runner: Runner) -> None:
    runner.run(*python("print('\\n' * 99_999, end='')"))
    assert runner.session(tail=0).output_total == 99_999


def test_signals_reach_the_command(runner: Runner) -> None:
    script = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    process = runner.start("--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == b"bye\n"
    assert process.returncode == 7
    assert runner.session().output_buffer == ("ready", "bye")


def test_stdin_is_the_commands(runner: Runner) -> None:
    process = runner.start("--", "cat", stdin=subprocess.PIPE)
    assert process.communicate(b"hello\n", timeout=30)[0] == b"hello\n"
    assert runner.session().output_buffer == ("hello",)


def test_the_command_is_told_its_session(runner: Runner) -> None:
    done = runner.run("sh", "-c", 'echo "$SESSIONSTORE_SESSION_ID"')
    assert done.stdout.decode().strip() == runner.session().id


def test_what_the_session_is_about_is_stored(runner: Runner) -> None:
    arguments = ["--task", "t1", "--service", "s1", "--mcp", "m1", "--project", "/src"]
    process = runner.start(*arguments, "--meta", "branch=main", "--", "echo", "-n", "--help")
    assert process.communicate(timeout=30)[0] == b"--help"
    session = runner.session()
    about = (session.task_id, session.service_session_id, session.mcp_session_id)
    assert about == ("t1", "s1", "m1")
    assert session.project_path == "/src"
    assert session.metadata["branch"] == "main"
    assert session.metadata["command"] == "echo -n --help"


def test_unique_refuses_a_service_session_in_use(runner: Runner, tmp_path: Path) -> None:
    taken = runner.store.create_session("claude", "s1", "/src")
    mark = tmp_path / "mark"
    process = runner.start("--service", "s1", "--unique", "--", "touch", str(mark))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert taken.id.encode() in err
    assert not mark.exists()


def test_a_reader_that_leaves_ends_the_command_as_in_any_pipeline(runner: Runner) -> None:
    process = runner.start("--", "yes")
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGPIPE
    assert runner.session(tail=0).metadata["signal"] == "SIGPIPE"


def test_a_background_process_that_keeps_the_pipe_is_not_waited_for(runner: Runner) -> None:
    done = runner.run("sh", "-c", "sleep 30 >&2 & echo $!")
    os.kill(int(done.stdout), signal.SIGKILL)
    assert done.returncode == 0
    assert runner.session().status == "terminated"
    assert b"background process" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_output_never_reaches_the_server_as_commands(runner: Runner, closed: str) -> None:
    """A closed stdout's number would be taken by the connection to the server."""
    canary = f"canary-{uuid4().hex}"
    child = f"printf 'SET {canary} 1\\r\\n'; printf 'SET {canary} 2\\r\\n' >&2"
    command = f'exec {PROGRAM} run --type claude -- sh -c "{child}" {closed}'
    done = subprocess.run(["sh", "-c", command], env=runner.environment, timeout=30)
    assert done.returncode == 0
    assert runner.redis.get(canary) is None
    assert runner.session().output_buffer == (f"SET {canary} 1\r",)
    assert runner.session().error_buffer == (f"SET {canary} 2\r",)


def test_a_small_chunk_limit_splits_lines_and_loses_none(runner: Runner) -> None:
    runner.environment["SESSIONSTORE_CHUNK_LIMIT"] = "100"
    runner.run(*python("print('short'); print('é' * 200); print('after')"))
    session = runner.session()
    assert "".join(session.output_buffer) == "short" + "é" * 200 + "after"
    assert session.status == "terminated"


def test_metadata_without_room_for_runs_own_is_refused_before_the_command(
    runner: Runner, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    names = [part for n in range(60) for part in ("--meta", f"n{n}=x")]
    process = runner.start(*names, "--", "touch", str(mark))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert b"exit_code" in err
    assert not mark.exists()


def test_full_memory_for_a_while_loses_nothing(own_server: PrivateServer) -> None:
    runner = Runner(own_server)
    process = runner.start("--", "sh", "-c", "echo a; read go; echo b", stdin=subprocess.PIPE)
    until(lambda: [s for s in runner.store.get_all_sessions() if s.output_buffer])
    runner.redis.config_set("maxmemory", 1)
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    assert process.stderr is not None
    assert b"takes nothing now" in process.stderr.readline()
    runner.redis.config_set("maxmemory", 0)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert runner.session().output_buffer == ("a", "b")
    assert runner.session().status == "terminated"
    runner.close()


def test_a_background_process_that_goes_on_writing_is_left_behind(runner: Runner) -> None:
    child = "(while :; do echo tick; sleep 0.5; done) & echo pid=$!"
    done = runner.run("sh", "-c", child)
    os.kill(int(done.stdout.partition(b"pid=")[2].split()[0]), signal.SIGKILL)
    assert done.returncode == 0
    assert runner.session().status == "terminated"


def test_a_store_out_of_reach_is_told_before_the_command_runs(
    runner: Runner, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    runner.environment["SESSIONSTORE_URL"] = "redis://:secret@127.0.0.1:1"
    process = runner.start("--timeout", "1", "--", "touch", str(mark))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 4
    assert b"127.0.0.1:1" in err
    assert b"secret" not in err
    assert not mark.exists()


def test_an_outage_in_the_middle_loses_nothing(own_server: PrivateServer) -> None:
    runner = Runner(own_server)
    own_server_back = threading.Event()

    def crash() -> None:
        own_server.kill()
        time.sleep(3)
        own_server.start()
        own_server_back.set()

    # Nobody can renew for longer than the lease lasts.
    process = runner.start(
        *("--ttl", "1", "--"),
        *python("import time\nfor i in range(60): print(i, flush=True); time.sleep(0.05)"),
    )
    until(lambda: [s for s in runner.store.get_all_sessions() if s.output_total > 5])
    thread = threading.Thread(target=crash)
    thread.start()
    out, _ = process.communicate(timeout=60)
    thread.join()
    assert own_server_back.is_set()
    assert process.returncode == 0
    assert runner.session().output_buffer == tuple(out.decode().split())
    assert runner.session().output_total == 60
    assert runner.session().status == "terminated"
    runner.close()


# ---- The lease --------------------------------------------------------------------------------

CHATTY = "while :; do echo x; sleep 0.05; done"


def running(runner: Runner) -> AgentSession:
    """The only session, when its command runs and has written something."""

    def started() -> AgentSession | None:
        sessions = runner.store.get_all_sessions(tail=1)
        return sessions[0] if sessions and sessions[0].output_total else None

    return until(started)


def test_the_session_is_this_workers_while_the_command_runs(runner: Runner) -> None:
    process = runner.start("--", "sh", "-c", "echo a; read go", stdin=subprocess.PIPE)
    session = running(runner)
    assert (session.status, session.owner) == ("busy", f"{session.metadata['host']}:{process.pid}")
    assert session.lease_expires_at is not None
    assert 20 < (session.lease_expires_at - session.read_at).total_seconds() <= 30
    with pytest.raises(SessionBusyError):
        runner.store.add_output(session.id, "of somebody else")
    process.communicate(b"go\n", timeout=30)
    assert runner.session().output_buffer == ("a",)


def test_at_the_end_nothing_is_left_of_the_lease(runner: Runner) -> None:
    runner.run("true")
    session = runner.session()
    assert (session.owner, session.lease_expires_at) == (None, None)
    assert not runner.redis.exists(f"{{{runner.namespace}}}:leases")
    assert runner.store.add_output(session.id, "of anybody") == 1


def test_the_lease_is_renewed_while_the_command_is_quiet(runner: Runner) -> None:
    process = runner.start(
        *("--ttl", "2", "--"), "sh", "-c", "echo a; read go", stdin=subprocess.PIPE
    )
    first = running(runner)
    assert first.lease_expires_at is not None
    later = until(lambda: (s := runner.session()).read_at > first.lease_expires_at and s)
    assert (later.status, later.owner) == ("busy", first.owner)
    process.communicate(b"go\n", timeout=30)
    assert process.returncode == 0


def test_lost_entries_are_told_and_the_command_goes_on(runner: Runner) -> None:
    """As after a failover to a server that lacked the newest two."""
    code = "echo a; echo b; echo c; read go; echo d; read go; echo e"
    process = runner.start("--", "sh", "-c", code, stdin=subprocess.PIPE)
    session = until(lambda: (s := running(runner)).output_total == 3 and s)
    key = f"{{{runner.namespace}}}:session:{session.id}"
    runner.redis.ltrim(f"{key}:output", 0, 0)
    runner.redis.hset(key, "output_total", 1)
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    until(lambda: runner.session().output_total == 2)
    _, err = process.communicate(b"go\n", timeout=30)
    told = "the server lost 2 entries of this session in a failover"
    assert (process.returncode, f"{told}; the command goes on" in err.decode()) == (0, True)
    ended = runner.session()
    assert (ended.output_buffer, ended.error_buffer) == (("a", "d", "e"), (told,))
    assert ended.status == "terminated"


def test_a_deleted_session_stops_the_command(runner: Runner) -> None:
    process = runner.start("--", "sh", "-c", CHATTY)
    session = running(runner)
    runner.store.delete_session(session.id, force=True)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 5
    assert f"the lease on {session.id} was lost (it was deleted): stopping the command" in (
        err.decode()
    )
    assert runner.store.get_all_sessions() == []
    assert not runner.redis.keys(f"{{{runner.namespace}}}:session:*")


@pytest.mark.parametrize("command", [CHATTY, "echo x; exec sleep 60"], ids=["chatty", "quiet"])
def test_a_lost_lease_stops_the_command_and_names_the_holder(runner: Runner, command: str) -> None:
    process = runner.start("--ttl", "2", "--", "sh", "-c", command)
    session = running(runner)
    runner.store.update_status(session.id, "active", force=True)
    with runner.store.claim(session.id) as lease:
        _, err = process.communicate(timeout=30)
        assert process.returncode == 5
        assert err.decode().count("was lost") == 1
        assert f"held by {lease.owner} now" in err.decode()
    assert runner.session().status == "active"


def written_after_the_loss(runner: Runner, changed: str = "") -> tuple[int, int, str]:
    """What a run whose command goes on for a while writes into a session taken from it.

    Returns:
        How many entries of output and of errors, and the status that the session is left in.
    """
    command = "trap 'echo stale; echo stale >&2; exit 0' TERM; " + CHATTY
    process = runner.start_with(
        *("--type", "claude", "--ttl", "1", "--", "sh", "-c", command), changed=changed
    )
    session_id = running(runner).id
    runner.store.update_status(session_id, "active", force=True)
    with runner.store.claim(session_id):
        before = runner.session(tail=0)
        if changed:
            time.sleep(0.3)
            process.terminate()
        out, _ = process.communicate(timeout=30)
        assert b"stale" in out
        after = runner.session(tail=0)
    return (
        after.output_total - before.output_total,
        after.error_total - before.error_total,
        after.status,
    )


def test_nothing_is_written_after_the_loss(runner: Runner) -> None:
    assert written_after_the_loss(runner) == (0, 0, "busy")


def test_the_control_of_nothing_is_written_after_the_loss(runner: Runner) -> None:
    """A worker that passes every fence and never renews writes, and ends what is not its own."""
    changed = (
        "from sessionstore.lease import ThreadLeases\n"
        "ThreadLeases.fence_of = lambda *_: 'force'\n"
        "ThreadLeases.renew_in_background = lambda *_, **__: None\n"
    )
    output, errors, status = written_after_the_loss(runner, changed)
    assert output > 0
    assert errors == 1
    assert status == "terminated"


def test_a_command_that_does_not_stop_is_killed(runner: Runner) -> None:
    ignoring = python(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('ignored', flush=True))\n"
        "print(os.getpid(), flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    process = runner.start_with(
        *("--type", "claude", "--ttl", "1", "--", *ignoring),
        changed="from sessionstore.cli import run; run.STOPPED_AFTER = 0.5",
    )
    session = running(runner)
    runner.store.update_status(session.id, "active", force=True)
    out, _ = process.communicate(timeout=30)
    command, said = out.decode().split()
    assert (said, process.returncode) == ("ignored", 5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(command), 0)


def test_a_loss_found_at_the_end_is_told(runner: Runner) -> None:
    process = runner.start("--", "sh", "-c", "echo a; read go", stdin=subprocess.PIPE)
    session = running(runner)
    runner.store.update_status(session.id, "active", force=True)
    _, err = process.communicate(b"go\n", timeout=30)
    assert process.returncode == 5
    assert "active and held by nobody now" in err.decode()
    assert "how the command ended is not recorded" in err.decode()
    assert runner.session().status == "active"


# ---- A session continued ----------------------------------------------------------------------


def test_a_session_is_continued(runner: Runner) -> None:
    runner.run("sh", "-c", "echo one; echo oops >&2; kill -9 $$")
    before = runner.session()
    assert {"exit_code", "signal"} <= before.metadata.keys()

    done = runner.continued(
        before.id, *("--meta", "branch=main", "--", "sh", "-c", 'echo "$SESSIONSTORE_SESSION_ID"')
    )

    assert (done.returncode, done.stdout.decode().strip()) == (0, before.id)
    after = runner.session()
    assert after.output_buffer == ("one", before.id)
    assert after.error_buffer == ("oops",)
    assert (after.status, after.owner) == ("terminated", None)
    assert after.metadata["branch"] == "main"
    assert after.metadata["exit_code"] == "0"
    assert "signal" not in after.metadata
    assert after.metadata["command"].startswith("sh -c 'echo ")
    assert after.metadata["pid"] != before.metadata["pid"]


def test_while_it_is_continued_nothing_tells_of_an_earlier_end(runner: Runner) -> None:
    runner.run("sh", "-c", "kill -9 $$")
    session = runner.session()
    process = runner.start_with(
        *("--session", session.id, "--", "sh", "-c", "echo a; read go"), stdin=subprocess.PIPE
    )
    during = running(runner)
    assert during.status == "busy"
    assert not {"exit_code", "signal"} & during.metadata.keys()
    process.communicate(b"go\n", timeout=30)


def test_a_session_in_other_hands_is_not_continued(runner: Runner, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    session = runner.store.create_session("claude", "s1", "/src", metadata={"exit_code": "3"})
    with runner.store.claim(session.id) as lease:
        done = runner.continued(session.id, "--", "touch", str(mark))
    assert (done.returncode, done.stdout) == (1, b"")
    told = done.stderr.decode()
    assert told.startswith(f"error: session '{session.id}' is held by {lease.owner}, ")
    assert re.search(r"whose lease runs for another (2\d|30)\.\d s", told)
    assert told.count("\n") == 1
    assert not mark.exists()
    assert runner.session().metadata == {"exit_code": "3"}


def test_only_what_has_not_terminated_is_continued(runner: Runner, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    session = runner.store.create_session("claude", "s1", "/src", status="terminated")
    done = runner.continued(session.id, "--wait", "30", "--", "touch", str(mark))
    assert done.returncode == 1
    assert done.stderr.decode() == (
        f"error: session '{session.id}' is terminated: only one that is active, error or starting "
        "can be continued\n"
    )
    assert not mark.exists()


def test_a_session_that_is_not_there_is_not_continued(runner: Runner) -> None:
    assert runner.continued("agent_claude_nobody", "--", "true").returncode == 3


def test_a_session_in_other_hands_is_waited_for(runner: Runner) -> None:
    session = runner.store.create_session("claude", "s1", "/src")
    with runner.store.claim(session.id) as lease:
        process = runner.start_with("--session", session.id, "--wait", "1m", "--", "echo", "mine")
        time.sleep(0.5)
        assert process.poll() is None
        assert runner.session().owner == lease.owner
    assert process.communicate(timeout=30) == (b"mine\n", b"")
    assert runner.session().output_buffer == ("mine",)


# ---- As a function: the workers of the demo call it so ----------------------------------------


def held(runner: Runner) -> list[str]:
    return runner.redis.zrange(f"{{{runner.namespace}}}:leases", 0, -1)


def run_here(runner: Runner, *command: str, **options: Any) -> int:
    options = {"on_data": lambda *_: None, "stdin": subprocess.DEVNULL} | options
    return run_command(runner.store, command, **options)


def test_commands_follow_each_other_on_one_store(runner: Runner) -> None:
    ids: list[str] = []
    for code in (0, 3, 127):
        program = ("no-such-command",) if code == 127 else ("sh", "-c", f"echo a; exit {code}")
        assert run_here(runner, *program, type="claude", on_created=ids.append) == code
        assert held(runner) == []
    assert run_here(runner, "echo", "b", session_id=ids[1], on_created=ids.append) == 0
    assert ids[3] == ids[1]
    assert runner.store.get_session(ids[1]).output_buffer == ("a", "b")
    assert held(runner) == []


def test_the_session_is_claimed_when_its_id_is_told(runner: Runner) -> None:
    owners: list[str | None] = []

    def look(session_id: str) -> None:
        owners.append(runner.store.get_session(session_id).owner)

    run_here(runner, "true", type="claude", on_created=look)
    assert owners == [runner.store.worker]


@pytest.mark.parametrize(("is_new", "status"), [(True, "error"), (False, "active")])
def test_a_failure_before_the_command_gives_the_session_back(
    runner: Runner, is_new: bool, status: str
) -> None:
    def fail(_: str) -> None:
        raise KeyboardInterrupt

    which = {"type": "claude"}
    if not is_new:
        which = {"session_id": runner.store.create_session("claude", "s1", "/src").id}
    with pytest.raises(KeyboardInterrupt):
        run_here(runner, "true", on_created=fail, **which)
    assert (runner.session().status, runner.session().owner) == (status, None)
    assert held(runner) == []


def renewed_after_the_end(runner: Runner) -> bool:
    """Whether the lease of a run whose end the store refused to take is renewed all the same."""
    ended = f"{{{runner.namespace}}}:ended"

    def spoil(_: int, __: bytes) -> None:
        runner.redis.set(ended, "no sorted set")

    assert run_here(runner, "echo", "a", type="claude", ttl=0.5, on_data=spoil) == 0
    first = runner.session()
    assert (first.status, first.owner) == ("busy", runner.store.worker)
    time.sleep(1)
    second = runner.session()
    runner.redis.delete(ended)
    return first.lease_expires_at != second.lease_expires_at


def test_an_end_that_cannot_be_recorded_is_no_failure_and_ends_the_renewal(
    runner: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not renewed_after_the_end(runner)
    assert "how the command ended is not recorded" in capfd.readouterr().err


def test_the_control_of_an_end_that_cannot_be_recorded(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that does not let go of its lease keeps the session for ever."""
    monkeypatch.setattr("sessionstore.cli.run._Recorder.close", lambda _: None)
    assert renewed_after_the_end(runner)


def run_with_a_late_answer_to_its_end(runner: Runner, server: PrivateServer) -> int:
    """The exit code of ``true`` when renewals find the lease over before its end is confirmed."""
    script = load("update_status")
    ours = {script.sha.encode(), script.text.encode()}
    with (
        FaultProxy(server.port, matches=lambda words: bool(ours & {*words}), delay=1) as proxy,
        SessionStore.from_url(proxy.url, namespace=runner.namespace) as store,
    ):
        proxy.plan([Fault.DELAY_REPLY])
        code = run_command(store, ["true"], type="claude", ttl=0.3, on_data=lambda *_: None)
        assert proxy.injected[Fault.DELAY_REPLY] == 1
    assert runner.session().status == "terminated"
    return code


def test_a_lease_that_this_worker_has_ended_itself_is_not_lost(
    runner: Runner, server: PrivateServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_with_a_late_answer_to_its_end(runner, server) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("which", [{}, {"type": "claude", "session_id": "x"}], ids=["none", "both"])
def test_a_new_session_or_one_to_continue_is_needed(runner: Runner, which: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="not both"):
        run_here(runner, "true", **which)


def test_a_bad_ttl_leaves_no_session_behind(runner: Runner) -> None:
    with pytest.raises(ValueError, match="ttl"):
        run_here(runner, "true", type="claude", ttl=0.0)
    assert runner.store.get_all_sessions() == []
