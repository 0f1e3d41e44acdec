"""Processes beside the doctor: workers that use a store, and a watcher that misses no session.

Each is this file as a program: ``NAME URL NAMESPACE SEED``. It works until its stdin ends, and then
prints what it has seen as JSON.
"""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from sessionstore import SessionStore, SessionStoreError

STATUSES: list[Any] = ["active", "busy", "starting", "error"]
KEPT = 8  # sessions that a worker has at a time


def going_on() -> bool:
    return not select.select([sys.stdin], [], [], 0)[0]


def traffic(url: str, namespace: str, rng: random.Random) -> dict[str, Any]:
    """Sessions come, are used in all ways, and go."""
    done: Counter[str] = Counter()
    ids: list[str] = []
    with SessionStore.from_url(url, namespace=namespace, buffer_limit=20) as store:

        def held(own: str) -> None:
            with store.claim(own, ttl=30, expected=("active", "error", "terminated", "starting")):
                store.add_output(own, "held")

        acts: dict[str, Callable[[str], object]] = {
            "update_status": lambda own: store.update_status(
                own, rng.choice(["starting", "active", "busy", "error", "terminated"])
            ),
            "add_output": lambda own: store.add_output(own, *["line ü"] * rng.randrange(1, 9)),
            "add_error": lambda own: store.add_error(own, "oops"),
            "update_activity": lambda own: store.update_activity(own),
            "update_metadata": lambda own: store.update_metadata(own, {"n": str(rng.random())}),
            "held": held,
        }
        while going_on():
            if len(ids) < KEPT:
                number = rng.randrange(1_000_000)
                made = store.create_session(
                    rng.choice(["claude", "codex"]), f"s-{number}", "/src", f"task-{number % 3}"
                )
                ids.append(made.id)
                done["create_session"] += 1
                continue
            own = rng.choice(ids)
            if rng.random() < 0.05:
                ids.remove(own)
                name, act = "delete_session", lambda one: store.delete_session(one, force=True)
            else:
                name, act = rng.choice(list(acts.items()))
            # Of a session that is damaged at the moment.
            with suppress(SessionStoreError, redis.ResponseError):
                act(own)
                done[name] += 1
    return dict(done)


def watcher(url: str, namespace: str, rng: random.Random) -> dict[str, Any]:
    """Its own sessions change their status all the time; no listing may ever miss one."""
    looks, missed = 0, []
    with SessionStore.from_url(url, namespace=namespace) as store:
        made = [store.create_session("watched", f"w-{n}", "/src", "watched") for n in range(12)]
        ids = {one.id for one in made}
        while going_on():
            for own in rng.sample(sorted(ids), 3):
                store.update_status(own, rng.choice(STATUSES))
            seen = {
                "all": {one.id for one in store.get_all_sessions(tail=0)},
                "type": {one.id for one in store.get_sessions_by_type("watched", tail=0)},
                "task": {one.id for one in store.find_sessions(task_id="watched")},
                "activity": {one.id for one in store.find_sessions(order="-last_activity")},
                "status": {
                    one.id
                    for one in store.find_sessions(status=["active", "busy", "starting", "error"])
                },
            }
            looks += 1
            missed += [f"{name}: {one}" for name, found in seen.items() for one in ids - found]
            counted = store.get_metrics().sessions_by_type.get("watched", 0)
            if counted < len(ids):
                missed.append(f"metrics: {counted}")
    return {"looks": looks, "missed": missed}


def naive(url: str, namespace: str, _: random.Random) -> dict[str, Any]:
    """The control: scan, look at the hash, and then remove what seems wrong. On a healthy store."""
    prefix, changed, looks = f"{{{namespace}}}:", 0, 0
    statuses = ("starting", "active", "busy", "error", "terminated")
    client: Any = redis.Redis.from_url(url, decode_responses=True)
    while going_on():
        looks += 1
        for status in statuses:
            for own in client.sscan_iter(f"{prefix}sessions:status:{status}"):
                found = client.hget(f"{prefix}session:{own}", "status")
                if found != status:
                    changed += client.srem(f"{prefix}sessions:status:{status}", own)
                if found is not None and found != status:
                    changed += client.sadd(f"{prefix}sessions:status:{found}", own)
    client.close()
    return {"looks": looks, "changed": changed}


class Process:
    """One of the above, at work until it is ended."""

    def __init__(self, what: Callable[..., Any], url: str, namespace: str, seed: object) -> None:
        arguments = [what.__name__, url, namespace, str(seed)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self) -> dict[str, Any]:
        out, _ = self._process.communicate("", timeout=30)
        assert self._process.returncode == 0
        return json.loads(out)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def at_work(
    url: str, namespace: str, rng: random.Random, *what: Callable[..., Any]
) -> Iterator[list[Process]]:
    processes = [Process(one, url, namespace, rng.random()) for one in what]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    _, name, url, namespace, seed = sys.argv
    print(json.dumps(globals()[name](url, namespace, random.Random(seed))))
