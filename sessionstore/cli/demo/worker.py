"""A worker process of the demo: takes jobs, runs each as a session, keeps its raw output aside.

Jobs come as JSON lines on stdin, reports go as JSON lines to stdout. When stdin closes, the demo
is over, or dead: the worker ends its command and itself.

    SESSIONSTORE_URL=… python -m sessionstore.cli.demo.worker NAMESPACE DIRECTORY NUMBER
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sessionstore import SessionStore
from sessionstore.cli.run import run_command

Job = dict[str, Any]
KEPT_LINES = 10_000  # of each buffer
#: Seconds: short, for one of the workers will be killed, and nobody wants to wait long.
TTL, REAP_GRACE = 2.0, 1.0


def raw_output(directory: Path, session_id: str, descriptor: int, *, again: bool = False) -> Path:
    """The file with the very bytes that a session's command wrote to stdout (1) or stderr (2).

    ``again``: what it wrote when the job was done again, after its worker had been killed.
    """
    return directory / f"{session_id}.{descriptor}{'.again' if again else ''}"


def main(namespace: str, directory: Path, number: int) -> None:
    """Run jobs until there are no more."""
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_take_jobs, args=(jobs,), daemon=True).start()
    with SessionStore(
        namespace=namespace,
        buffer_limit=KEPT_LINES,
        buffer_bytes=0,
        worker=f"worker-{number}",
        reap_grace=REAP_GRACE,
    ) as store:
        while (job := jobs.get()) is not None:
            _run(store, job, directory, number)


def _take_jobs(jobs: queue.SimpleQueue[Job | None]) -> None:
    for line in sys.stdin:
        job = json.loads(line)
        jobs.put(job)
        if job is None:
            return
    os.kill(os.getpid(), signal.SIGTERM)  # handed on to the command, if one runs
    time.sleep(1)
    os._exit(1)


def _run(store: SessionStore, job: Job, directory: Path, number: int) -> None:
    session_ids: list[str] = []

    def created(session_id: str) -> None:
        session_ids.append(session_id)
        _report("created", job, session_id=session_id)

    def keep(descriptor: int, data: bytes) -> None:
        file = raw_output(directory, session_ids[0], descriptor, again="session_id" in job)
        with file.open("ab") as kept:
            kept.write(data)

    try:
        code = run_command(
            store,
            job["command"],
            **_session_of(job),
            ttl=TTL,
            metadata={"worker": str(number), "job": job["title"]},
            on_created=created,
            on_data=keep,
            stdin=subprocess.DEVNULL,  # this process's own brings jobs
        )
    except Exception as error:
        _report("failed", job, error=f"{type(error).__name__}: {error}")
    else:
        _report("done", job, session_id=session_ids[0], code=code)


def _session_of(job: Job) -> dict[str, Any]:
    """A new session, or the one whose worker was lost."""
    if "session_id" in job:
        return {"session_id": job["session_id"]}
    return {name: job[name] for name in ("type", "task_id", "project_path")}


def _report(event: str, job: Job, **details: Any) -> None:
    print(json.dumps({"event": event, "job": job["number"], **details}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
