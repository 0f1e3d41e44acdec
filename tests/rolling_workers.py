"""Workers of a rolling deploy: each a process, of the version that PYTHONPATH names.

This file is their program: ``NAME URL NAMESPACE STYLE OPERATIONS SEED``. A worker makes sessions
that last and tells their ids, is told those of all workers, does its share of operations on them,
and prints what it was answered. With ``doctor`` for a NAME it repairs, checks, and prints what it
found.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from typing import Any

import sessionstore
from sessionstore import (
    AsyncSessionStore,
    SessionBusyError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStore,
)

LASTING = 2  # sessions of each worker that nobody ends
PASSING = "passing"  # the task of the sessions that come and go
GRACE = 0.05  # seconds, of the reaper
REFUSALS = (SessionNotFoundError, SessionBusyError, SessionStatusError)
#: Each as often as it stands here, in random order.
ACTS = [
    *("append", "append", "append", "append_error", "batch", "note", "change", "hold", "hold"),
    *("create", "create", "end", "delete", "abandon", "reap", "read", "list", "doctor"),
]


class Warned(logging.Handler):
    """A warning of the library is something that it could not read, or do."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Worker:
    """One worker, and what it was answered."""

    def __init__(self, name: str, store: Any, seed: str) -> None:
        self.name, self.store, self.rng = name, store, random.Random(seed)
        self.lasting: list[str] = []
        self.number = 0
        self.done: Counter[str] = Counter()
        self.refused = 0
        self.held_by_two = 0
        self.fell: list[str] = []
        self.created: list[str] = []
        self.deleted: list[str] = []
        self.changed: set[str] = set()
        self.appended: dict[str, list[str]] = defaultdict(list)
        self.errors: dict[str, list[str]] = defaultdict(list)
        self.noted: dict[str, str] = {}

    def next_text(self) -> str:
        self.number += 1
        return f"{self.name} {self.number}"

    def one(self) -> str:
        return self.rng.choice(self.lasting)

    def passing(self) -> str:
        """Anybody's session that comes and goes."""
        found = self.store.find_sessions(task_id=PASSING, limit=20)
        return self.rng.choice(found).id if found else self.create()

    def work(self, operations: int) -> None:
        acts: list[str] = []
        for _ in range(operations):
            acts = acts or self.rng.sample(ACTS, len(ACTS))
            act = acts.pop()
            try:
                getattr(self, act)()
                self.done[act] += 1
            except REFUSALS:
                self.refused += 1
            except Exception as error:  # no other answer is right
                self.fell.append(f"{act}: {type(error).__name__}: {error}")

    # ---- Sessions that last ------------------------------------------------------------------

    def append(self) -> None:
        own, texts = self.one(), [self.next_text() for _ in range(self.rng.randrange(1, 4))]
        self.store.add_output(own, *texts)
        self.appended[own] += texts

    def append_error(self) -> None:
        own, text = self.one(), self.next_text()
        self.store.add_error(own, text)
        self.errors[own].append(text)

    def batch(self) -> None:
        own, text, value = self.one(), self.next_text(), self.next_text()
        batch = self.store.batch()
        if not isinstance(self.store, SessionStore):
            batch = awaiting(batch, self.store)
        with batch as calls:
            added = calls.add_output(own, text)
            noted = calls.update_metadata(own, {self.name: value})
            read = calls.get_session(own, tail=0)
        noted.result()
        self.noted[own] = value
        assert read.result().metadata[self.name] == value
        added.result()  # refused while another holds it
        self.appended[own].append(text)

    def note(self) -> None:
        own, value = self.one(), self.next_text()
        self.store.update_metadata(own, {self.name: value})
        self.noted[own] = value

    def change(self) -> None:
        own = self.one()
        self.store.update_status(own, self.rng.choice(["starting", "active"]))
        self.changed.add(own)

    def hold(self) -> None:
        """The witness is a file: it can be created only once."""
        own, text = self.one(), self.next_text()
        lease = self.store.claim(own, ttl=60, expected=("starting", "active"))
        try:
            os.close(os.open(f"held-{own}", os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            self.held_by_two += 1
        self.store.add_output(own, text)
        self.appended[own].append(text)
        time.sleep(self.rng.uniform(0, 0.002))
        with suppress(FileNotFoundError):
            os.unlink(f"held-{own}")
        lease.release()
        self.changed.add(own)

    # ---- Sessions that come and go -----------------------------------------------------------

    def create(self, task_id: str | None = PASSING) -> str:
        made = self.store.create_session(
            self.rng.choice(["claude", "codex"]), self.next_text(), "/src", task_id
        )
        self.created.append(made.id)
        return str(made.id)

    def end(self) -> None:
        own = self.passing()
        self.store.update_status(own, self.rng.choice(["terminated", "error"]))

    def delete(self) -> None:
        own = self.passing()
        if self.store.delete_session(own):
            self.deleted.append(own)

    def abandon(self) -> None:
        """As a worker does that dies: a reaper, or another claim, is to find it."""
        self.store.claim(
            self.passing(), ttl=0.1, expected=("starting", "active", "error", "terminated")
        ).abandon()

    def reap(self) -> None:
        reaped = self.store.reap(ended_for=0.02)
        self.deleted += [one.session_id for one in reaped if one.action == "deleted"]

    # ---- Reading -----------------------------------------------------------------------------

    def read(self) -> None:
        own = self.one()
        session = self.store.get_session(own)
        assert session.output_total == len(session.output_buffer)
        assert self.store.find_session_by_service_id(session.service_session_id, tail=0).id == own
        self.store.read_output(own, session.output_total // 2)

    def list(self) -> None:
        listed = {one.id for one in self.store.get_all_sessions(tail=0)}
        assert listed.issuperset(self.lasting), "a listing misses sessions"
        assert self.store.get_metrics().total_sessions >= len(self.lasting)

    def doctor(self) -> None:
        """Workers go on meanwhile."""
        for look in (self.store.check, self.store.repair):
            self.fell += [f"doctor: {one}" for one in look() if not self.is_expected(one)]

    def is_expected(self, problem: Any) -> bool:
        """A warning; and to the later doctor that older workers do not keep up its own index."""
        is_own = self.name.startswith("later") and ":sessions:origin:" in problem.key
        return problem.warning or is_own


def awaiting(asynchronous: Any, like: Any) -> Any:
    """An asyncio store, or what is like one that is here, as if it were blocking."""
    from conftest import Awaiting  # costs half a second

    return Awaiting(asynchronous, asyncio.Runner() if like is None else like._runner)


def main(name: str, url: str, namespace: str, style: str, operations: str, seed: str) -> None:
    warned = Warned()
    logging.getLogger("sessionstore").addHandler(warned)
    settings: Any = {"namespace": namespace, "reap_grace": GRACE}
    if style == "sync":
        store: Any = SessionStore.from_url(url, **settings)
    else:
        store = awaiting(AsyncSessionStore.from_url(url, **settings), None)
    with store:
        if name == "doctor":
            told = [[[one.kind, one.key] for one in look() if not one.warning]
                    for look in (store.repair, store.check)]  # fmt: skip
            print(json.dumps(told))
            return
        worker = Worker(name, store, seed)
        own = [worker.create(None) for _ in range(LASTING)]
        print(json.dumps(own), flush=True)
        worker.lasting = json.loads(sys.stdin.readline())
        worker.work(int(operations))
        report = vars(worker) | {
            "changed": sorted(worker.changed),
            "fell": worker.fell + warned.messages,
            "owner": store.worker,
            "package": os.path.dirname(sessionstore.__file__),
            "version": sessionstore.__version__,
        }
        for other in ("store", "rng", "lasting", "number"):
            del report[other]
        print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
