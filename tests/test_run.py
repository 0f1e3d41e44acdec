"""``sessionstore run`` through its real entry point: one command as one session."""

from __future__ import annotations

import os
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
from waiting import until

from sessionstore import AgentSession, SessionStore
from sessionstore._server import PrivateServer

PROGRAM = str(Path(sys.executable).with_name("sessionstore"))


class Runner:
    """Runs commands as sessions of one namespace."""

    def __init__(self, server: PrivateServer) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self.namespace = f"test-{uuid4().hex[:12]}"
        self.store = SessionStore.from_url(server.url, namespace=self.namespace)
        self.redis: Any = redis.Redis.from_url(server.url, decode_responses=True)
        self.environment = {
            **os.environ,
            "SESSIONSTORE_URL": server.url,
            "SESSIONSTORE_NAMESPACE": self.namespace,
        }

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [PROGRAM, "run", "--type", "claude", *arguments]
        process = subprocess.Popen(command, env=self.environment, **options)
        self._started.append(process)
        return process

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
    assert [fields["status"] for _, fields in events] == ["starting", "busy", "terminated"]


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
    with process:
        assert process.wait(timeout=30) == 128 + signal.SIGPIPE
    assert runner.session(tail=0).metadata["signal"] == "SIGPIPE"


def test_a_background_process_that_keeps_the_pipe_is_not_waited_for(runner: Runner) -> None:
    done = runner.run("sh", "-c", "sleep 30 >&2 & echo $!")
    os.kill(int(done.stdout), signal.SIGKILL)
    assert done.returncode == 0
    assert runner.session().status == "terminated"
    assert b"background process" in done.stderr


def test_a_session_deleted_meanwhile_does_not_end_the_command(runner: Runner) -> None:
    process = runner.start("--", "sh", "-c", "echo a; read go; echo b", stdin=subprocess.PIPE)
    until(lambda: [s for s in runner.store.get_all_sessions() if s.output_buffer])
    runner.store.delete_session(runner.session().id)
    out, err = process.communicate(b"go\n", timeout=30)
    assert (process.returncode, out) == (0, b"a\nb\n")
    assert b"was deleted" in err
    assert runner.store.get_all_sessions() == []


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

    process = runner.start(
        "--", *python("import time\nfor i in range(60): print(i, flush=True); time.sleep(0.05)")
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
