"""Worker processes for the attacks on leases: forked, stopped, killed, and never left behind.

A *scenario* is a function of a test file. It runs in a process of its own, because pytest's has
threads, which do not survive a fork; it forks its workers, does to them what the attack is about,
and returns what it has seen. Whatever happens, all its processes are killed when it is over.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import redis

LONGEST = 150  # seconds that a scenario, or a worker of one, may take, unless it is a long one


def play(
    scenario: Callable[..., Any],
    url: str,
    namespace: str,
    meanwhile: Callable[[Path], object] = lambda _: None,
    longest: int = LONGEST,
    **parameters: Any,
) -> Any:
    """What a scenario returns, as JSON has it.

    Args:
        scenario: what to play; it is given the url, the namespace and the parameters.
        url: of the server.
        namespace: of its stores.
        meanwhile: called here while it plays, with its working directory, a temporary one: for the
            files of workers and witnesses, and for telling each other how far things are.
        longest: seconds that it may take, and each of its workers.
        parameters: of the scenario.
    """
    seed = os.environ.get("FAULT_SEED") or str(random.randrange(2**32))
    print(f"replay with FAULT_SEED={seed}")
    program = str(Path(scenario.__code__.co_filename).resolve())
    arguments = json.dumps({"url": url, "namespace": namespace} | parameters)
    with tempfile.TemporaryDirectory() as directory:
        errors = Path(directory, "errors")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, program, scenario.__name__, str(longest), arguments],
                cwd=directory,
                env=os.environ | {"FAULT_SEED": seed},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        code = None
        try:
            meanwhile(Path(directory))
            code = process.wait(longest)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if code != 0:
                print(errors.read_text(errors="replace"))
        assert code == 0, "the scenario failed"
        return json.loads(Path(directory, "result").read_text())


def main(scenarios: dict[str, Any]) -> None:
    """Be the process of a scenario; ``scenarios`` are the globals of its file."""
    _, name, longest, arguments = sys.argv
    signal.alarm(int(longest))
    result = scenarios[name](**json.loads(arguments))
    Path("result").write_text(json.dumps(result))


def seeded(*of: object) -> random.Random:
    """A generator for one part of a scenario; the same again with the same FAULT_SEED."""
    return random.Random(repr((os.environ["FAULT_SEED"], *of)))


# ---- Workers ------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """Start a process that does the work and nothing else, not even clearing up at its exit."""
    child = os.fork()
    if child == 0:
        _work_and_end(work)
    return child


def _work_and_end(work: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        signal.alarm(int(sys.argv[2]))  # an alarm is not handed on to a child
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def together(work: Callable[[int, Any], Any], count: int) -> list[Any]:
    """The results of so many processes, each with its number and a barrier that all share."""
    context = get_context("fork")
    barrier = context.Barrier(count)
    receivers, workers = [], []
    for number in range(count):
        receiver, sender = context.Pipe(duplex=False)
        workers.append(fork(partial(_answer, work, number, barrier, sender)))
        sender.close()
        receivers.append(receiver)
    results = [receiver.recv() for receiver in receivers]
    for worker in workers:
        os.waitpid(worker, 0)
    return results


def _answer(work: Callable[[int, Any], Any], number: int, barrier: Any, sender: Any) -> None:
    sender.send(work(number, barrier))


class Gate:
    """Where processes wait until they are let in, together or one by one."""

    def __init__(self) -> None:
        self._closed, self._open = os.pipe()

    def wait(self) -> None:
        os.read(self._closed, 1)

    def let_in(self, count: int = 1) -> None:
        os.write(self._open, b"x" * count)

    def __del__(self) -> None:
        os.close(self._closed)
        os.close(self._open)


class Log:
    """What a worker has to say, a line at a time, in a file that outlives its SIGKILL."""

    def __init__(self, name: str) -> None:
        self._file = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


def lines_of(name: str) -> list[list[str]]:
    """The lines of a log so far, each as its words."""
    path = Path(name)
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The condition's first true value; a scenario fails if none comes in time."""
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > give_up:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.01)
    return value


@contextmanager
def plain_client(url: str) -> Iterator[Any]:
    """A client for naive versions and for witnesses: nothing of the library."""
    client = redis.Redis.from_url(url, decode_responses=True)
    try:
        yield client
    finally:
        client.close()
