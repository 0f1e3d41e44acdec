"""The demo as a whole: a server, the workers, what one sees, the verdict."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from sessionstore import Reaper, SessionStore
from sessionstore._server import PrivateServer, find_program
from sessionstore.cli.demo import show
from sessionstore.cli.demo.accident import Accident, Stage
from sessionstore.cli.demo.jobs import built_in_jobs, jobs_from
from sessionstore.cli.demo.verify import Findings, plain_client, verify
from sessionstore.cli.demo.worker import REAP_GRACE, Job
from sessionstore.cli.failures import naming_the_server
from sessionstore.connecting import URL_VARIABLE
from sessionstore.settings import ENVIRONMENT_PREFIX

REFRESH_SECONDS = 0.15
ANSWER_SECONDS = 10.0


@dataclass
class Progress:
    """What the workers have reported."""

    jobs: Sequence[Job]
    sessions: dict[int, str] = field(default_factory=dict[int, str])  # job number → session id
    codes: dict[str, int] = field(default_factory=dict[str, int])  # session id → exit code
    failures: list[str] = field(default_factory=list[str])
    workers: dict[int, int] = field(default_factory=dict[int, int])  # job number → who has it
    waiting: queue.Queue[Job] = field(default_factory=queue.Queue[Job])
    unfinished: int = 0
    accident: Accident = field(default_factory=Accident)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.unfinished = len(self.jobs)
        for job in self.jobs:
            self.waiting.put(job)

    def take(self, report: Mapping[str, Any], worker: int) -> None:
        with self.lock:
            number = report["job"]
            if report["event"] == "created":
                self.sessions[number], self.workers[number] = report["session_id"], worker
                return
            self.unfinished -= 1
            if report["event"] == "done":
                self.codes[report["session_id"]] = report["code"]
            else:
                self.failures.append(f"{self.jobs[number]['title']}: {report['error']}")
            if self.accident.stage is Stage.HANDED_ON and self.accident.job is self.jobs[number]:
                self.accident.stage = Stage.FINISHED
                self.accident.finished_by = worker

    def died(self, worker: int, job: Job) -> None:
        """A worker has ended without a last report; one that was killed on purpose may."""
        with self.lock:
            if worker != self.accident.killed:
                self.unfinished -= 1
                self.failures.append(f"worker {worker} died at {job['title']!r}")


def run_demo(
    commands: Path | None,
    *,
    url: str | None,
    server: str | None,
    keep: bool,
    workers: int,
    json_output: bool,
) -> int:
    """Run the demo and return its exit code: 0 if everything was found to be right.

    Args:
        commands: a file with a command a line; None: the built-in ones.
        url: a server that runs already; None: start one, for the demo alone.
        server: which program to start; None: the first that is found.
        keep: leave server and sessions there at the end.
        workers: how many worker processes.
        json_output: print nothing but one JSON object at the end.
    """
    say = show.Quiet() if json_output else show.on_this_terminal()
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
        del os.environ[name]  # nobody's settings but the demo's own
    with ExitStack() as stack:
        own = stack.enter_context(PrivateServer(find_program(server))) if url is None else None
        # In the server's directory, which goes even if the demo is killed.
        work = TemporaryDirectory(dir=own.directory if own else None)
        directory = Path(stack.enter_context(work))
        jobs = built_in_jobs(directory) if commands is None else jobs_from(commands)
        namespace = "agents" if own else f"demo-{uuid4().hex[:8]}"
        server_url = own.url if own else str(url)
        say.began(own, server_url, namespace, jobs, workers)
        stack.enter_context(naming_the_server(server_url, ANSWER_SECONDS))
        progress = Progress(jobs)
        victim = jobs[0] if commands is None and workers > 1 else None
        code, summary = _run(server_url, namespace, directory, progress, workers, victim, say)
        if json_output:
            if keep:
                summary |= {"url": server_url, "namespace": namespace, "pid": own and own.pid}
            print(json.dumps(summary, indent=2))
        if own and keep:
            own.keep()
        elif not own and not keep:
            _remove(server_url, namespace)
        say.farewell(own, server_url, namespace, keep=keep)
    return code


def _run(
    url: str,
    namespace: str,
    directory: Path,
    progress: Progress,
    workers: int,
    victim: Job | None,
    say: show.Quiet,
) -> tuple[int, dict[str, Any]]:
    """The exit code and a summary; the worker that gets the job ``victim`` is killed at it."""
    accident = progress.accident
    started = time.monotonic()
    with SessionStore.from_url(
        url, namespace=namespace, deadline=ANSWER_SECONDS, worker="demo", reap_grace=REAP_GRACE
    ) as store:
        store.ping()
        with (
            _workers(workers, url, namespace, directory, progress, say.reported) as (pids, threads),
            Reaper(store, every=REAP_GRACE / 2),
            say.live(store, progress) as refresh,
        ):
            if victim is not None:
                accident.plan(
                    victim, lambda worker: os.kill(pids[worker], SIGKILL), progress.waiting.put
                )
            while any(thread.is_alive() for thread in threads):
                if victim is not None:
                    number = victim["number"]
                    session_id = progress.sessions.get(number)
                    if accident.watch(store, session_id, progress.workers.get(number, 0)):
                        say.happened(accident)
                refresh()
                time.sleep(REFRESH_SECONDS)
            refresh()
        findings = verify(url, namespace, directory, progress.codes, accident)
        findings.problems += progress.failures
        findings.problems += [
            f"doctor: {one.kind} {one.key}: {one.message}"
            for one in store.check()
            if not one.warning
        ]
        findings.expect("jobs that ended", len(progress.codes), len(progress.jobs))
        if victim is not None:
            findings.expect("the killed worker's job", accident.stage, Stage.FINISHED)
        metrics = store.get_metrics()
        findings.expect("get_metrics total", metrics.total_sessions, len(progress.codes))
    seconds = time.monotonic() - started
    say.verdict(progress, findings, seconds)
    if progress.sessions:
        say.redis_cli(url, namespace, progress.sessions[min(progress.sessions)])
    return (1 if findings.problems else 0), _summary(progress, findings, seconds)


def _summary(progress: Progress, findings: Findings, seconds: float) -> dict[str, Any]:
    return {
        "sessions": len(progress.codes),
        "exit_codes": {str(code): n for code, n in Counter(progress.codes.values()).items()},
        "lines": findings.lines,
        "buffers": findings.buffers,
        "index_sets": findings.indexes,
        "seconds": round(seconds, 1),
        "rescued": _rescue(progress.accident),
        "problems": findings.problems,
    }


def _rescue(accident: Accident) -> dict[str, Any] | None:
    if accident.stage is Stage.NONE:
        return None
    return {
        "session_id": accident.session_id,
        "killed_worker": accident.killed,
        "seconds_until_error": round(accident.seconds_to_error, 1),
        "finished_by_worker": accident.finished_by,
    }


@contextmanager
def _workers(
    count: int,
    url: str,
    namespace: str,
    directory: Path,
    progress: Progress,
    reported: Callable[[Job, int, Mapping[str, Any]], None],
) -> Generator[tuple[dict[int, int], list[threading.Thread]]]:
    """The worker processes, and for each a thread that hands it jobs and takes its reports.

    Gives the process id of each worker by its number, and the threads.
    """
    processes: list[subprocess.Popen[str]] = []

    def serve(process: subprocess.Popen[str], number: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while progress.unfinished:
            try:
                job = progress.waiting.get(timeout=REFRESH_SECONDS)
            except queue.Empty:
                continue  # a job may come back from a worker that is lost
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                report = json.loads(line)
                progress.take(report, number)
                reported(job, number, report)
                if report["event"] != "created":
                    break
            else:
                progress.died(number, job)
                return
        process.stdin.write("null\n")
        process.stdin.flush()

    try:
        for number in range(1, count + 1):
            arguments = (namespace, str(directory), str(number))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "sessionstore.cli.demo.worker", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, URL_VARIABLE: url},  # not where `ps` shows its password
                    start_new_session=True,  # Ctrl-C is for the demo, which then ends its workers
                )
            )
        threads = [
            threading.Thread(target=serve, args=(process, number), daemon=True)
            for number, process in enumerate(processes, 1)
        ]
        for thread in threads:
            thread.start()
        yield {n: process.pid for n, process in enumerate(processes, 1)}, threads
    finally:
        for process in processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # of the one that was killed
                process.stdin.close()  # a worker that still has a job ends it
        for process in processes:
            process.wait(timeout=10)


def _remove(url: str, namespace: str) -> None:
    with plain_client(url) as client:
        for key in client.scan_iter(f"{{{namespace}}}:*", count=1000):
            client.unlink(key)
