"""Workers of two minor versions on one namespace, while a team replaces them one by one.

The later version is made from the present one (``versions.py``). Real servers, real processes
(``rolling_workers.py``). The controls are older versions that do not bear a later one beside them:
the same attack on the same checks must find them out.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import consistency
import pytest
from conftest import SERVERS, World
from consistency import assert_consistent, expected_metrics, sessions_of
from faults import seeded
from moments import everything
from programme import Attack, controls, proves
from rawkeys import RawKeys
from rolling_workers import ACTS, GRACE
from versions import LATER, LATER_VERSION, PRESENT, UNFIT, made

from sessionstore import SessionStore, __version__
from sessionstore._server import PrivateServer

PROGRAM = str(Path(__file__).with_name("rolling_workers.py"))
LONGEST = 600  # seconds that a process may take
#: What the later version keeps and this one does not know.
ORIGINS = "sessions:origin:"


def world_on(server: PrivateServer) -> World:
    return World("sync", server.program.name.lower(), server.url)


# ---- Processes of a version ------------------------------------------------------------------


class Process:
    """A worker of one version; see ``rolling_workers.py``."""

    def __init__(
        self, version: Path, name: str, url: str | None, namespace: str, folder: Path, *more: object
    ) -> None:
        self.name = name
        self.version = version
        self.errors = folder / f"errors-of-{name}-{namespace}"
        with self.errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, PROGRAM, name, url or "", namespace, *map(str, more)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(version)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._watchdog = threading.Timer(LONGEST, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def hear(self) -> Any:
        """The next line it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self.name} has ended:\n{self.errors.read_text(errors='replace')}"
        return json.loads(line)

    def tell(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.communicate()


class Readers:
    """This version's followers, one of a buffer and one of the events, while others write."""

    def __init__(self, store: SessionStore, followed: str) -> None:
        self.chunks: list[str] = []
        self.events: list[Any] = []
        self.failures: list[str] = []
        self._last = ""
        self._store, self._followed = store, followed
        self._threads = [
            threading.Thread(target=self._run, args=(one,), daemon=True)
            for one in (self._follow, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, reading: Callable[[], None]) -> None:
        try:
            reading()
        except Exception as error:
            self.failures.append(f"{reading.__name__}: {type(error).__name__}: {error}")

    def _follow(self) -> None:
        for page in self._store.follow_output(self._followed):
            assert page.dropped == page.lost == 0
            self.chunks += page.chunks

    def _watch(self) -> None:
        for event in self._store.watch("0"):
            self.events.append(event)
            if event.session_id == self._last and event.event == "deleted":
                return

    def end(self) -> None:
        """End what is followed, and read to the end."""
        self._last = self._store.create_session("claude", "the last one", "/src").id
        self._store.update_status(self._followed, "terminated")
        self._store.delete_session(self._last)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a follower does not come to an end"


# ---- A deploy, and what became of its promises ---------------------------------------------------


class Deploy:
    """Workers of two versions at work together, this version reading beside them.

    Args:
        world: where.
        folder: for their files.
        older: the version of the older ones.
        later: of the others.
        styles: of the workers of each version, a process each.
        operations: of all of them together, at least.
        rng: decides what they do.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        older: Path,
        later: Path,
        styles: Sequence[str],
        operations: int,
        rng: random.Random,
    ) -> None:
        self.world, self.store = world, world.store(reap_grace=3 * GRACE)
        self.broken: list[str] = []
        share, where = -(-operations // (2 * len(styles))), (world.url, world.namespace)
        processes = [
            Process(version, f"{age}-{style}", *where, folder, style, share, rng.random())
            for style in styles
            for age, version in (("older", older), ("later", later))
        ]
        try:
            lasting = [own for process in processes for own in process.hear()]
            readers = Readers(self.store, lasting[0])
            for process in processes:
                process.tell(lasting)
            self.reports = {process.name: process.hear() for process in processes}
        finally:
            for process in processes:
                process.end()
        for process in processes:
            report = self.reports[process.name]
            assert report["package"] == str(process.version / "sessionstore")
        self.lasting, self.readers = lasting, readers
        self.deleted = [own for report in self.reports.values() for own in report["deleted"]]
        self.created = [own for report in self.reports.values() for own in report["created"]]
        self.done: Counter[str] = Counter()
        for report in self.reports.values():
            self.done.update(report["done"])
        self.refused = sum(report["refused"] for report in self.reports.values())
        self.operations = share * len(processes)
        self.end_what_was_abandoned()
        readers.end()
        self.sessions = sessions_of(world)
        self.check_workers()
        self.check_sessions()
        self.check_what_later_workers_keep()
        self.check_readers()
        self.check_doctor()

    def of(self, age: str) -> list[dict[str, Any]]:
        """What the workers of one version were answered."""
        return [report for name, report in self.reports.items() if name.startswith(age)]

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    def end_what_was_abandoned(self) -> None:
        """By this version: the first look may have been another's."""

        def nothing_is_held() -> bool:
            reaped = self.store.reap(ended_for=0)
            self.deleted += [one.session_id for one in reaped if one.action == "deleted"]
            return not self.world.scores("leases")

        self.world.until(nothing_is_held)

    def check_workers(self) -> None:
        for name, report in self.reports.items():
            self.broken += [f"{name}: {what}" for what in report["fell"]]
            self.broken += [f"{name}: held by two"] * report["held_by_two"]

    def check_sessions(self) -> None:
        """Each is there until one worker has deleted it; each append is in it once and in order."""
        left = set(self.created) - set(self.deleted)
        self.expect(set(self.sessions) == left, "sessions are lost, or there again")
        self.expect(len(self.deleted) == len(set(self.deleted)), "one was deleted twice")
        listed = {one.id for one in self.store.get_all_sessions(tail=0)}
        self.expect(listed == left, f"a listing misses {len(left - listed)} sessions")
        for own in self.lasting:
            for buffer, noted in (("output", "appended"), ("errors", "errors")):
                entries = self.world.redis.lrange(self.world.session(own, f":{buffer}"), 0, -1)
                for name, report in self.reports.items():
                    found = [entry for entry in entries if entry.startswith(f"{name} ")]
                    self.expect(found == report[noted].get(own, []), f"{buffer} of {name} differ")
            for name, report in self.reports.items():
                value = self.sessions[own].get(f"meta:{name}")
                self.expect(value == report["noted"].get(own), f"metadata of {name} differ")

    def check_what_later_workers_keep(self) -> None:
        for report in self.of("later"):
            index = self.world.members(f"{ORIGINS}{report['owner']}")
            for own in set(report["created"]) & set(self.sessions):
                origin = self.sessions[own].get("origin")
                self.expect(origin == report["owner"], "a field that the later keeps is gone")
                self.expect(own in index, "an index that the later keeps has lost a session")
            for field, those in (
                ("last_entry_at", {*report["appended"], *report["errors"]}),
                ("status_since", report["changed"]),
            ):
                for own in those:
                    self.expect(field in self.sessions[own], f"{field} is gone")

    def check_readers(self) -> None:
        self.broken += self.readers.failures
        followed = self.world.redis.lrange(self.world.session(self.lasting[0], ":output"), 0, -1)
        self.expect(self.readers.chunks == followed, "the follower has read something else")
        seen = Counter(event.event for event in self.readers.events)
        by_later = sum(len(report["created"]) for report in self.of("later"))
        self.expect(seen["created"] == len(self.created) + 1, "created events are missing")
        self.expect(seen["deleted"] == len(self.deleted) + 1, "deleted events are missing")
        self.expect(seen["origin_noted"] == by_later, "events of an unknown kind are missing")
        self.unknown_events = seen["origin_noted"]

    def check_doctor(self) -> None:
        """This version's: it tells of what it does not know, and touches nothing."""
        before = everything(self.world)
        self.expect(not any(":quarantine:" in key for key in before), "a doctor has set keys aside")
        unknown = {key for key in before if f":{ORIGINS}" in key}
        for look in (self.store.check, self.store.repair):
            problems = list(look())
            self.broken += [f"the older doctor: {one}" for one in problems if not one.warning]
            told = {one.key for one in problems if one.kind == "unknown_key"}
            self.expect(told == unknown, "unknown keys are not those of the later version")
        self.expect(everything(self.world) == before, "the older doctor has touched something")


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The later minor version."""
    return made(tmp_path / "later", LATER, digests=LATER_VERSION)


@pytest.fixture
def deploy_world(server: PrivateServer) -> Iterator[World]:
    world = world_on(server)
    yield world
    world.close()


@proves("rolling deploy", ordinary=400, full=20_000)
def test_workers_of_two_minor_versions_share_a_namespace(
    deploy_world: World,
    later: Path,
    tmp_path: Path,
    attack: Attack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, styles = deploy_world, ("sync", "async")

    deploy = Deploy(world, tmp_path, PRESENT, later, styles, attack.size, seeded())

    assert {report["version"] for report in deploy.of("older")} == {__version__}
    assert {report["version"] for report in deploy.of("later")} == {LATER_VERSION}
    assert set(deploy.done) == set(ACTS), "an operation was never carried out"
    assert deploy.refused > 0, "nobody has met anybody"
    kept = [fields for fields in deploy.sessions.values() if "origin" in fields]
    assert kept
    # Through an export and an import of this version nothing of it is lost.
    with world.store(namespace=f"{world.namespace}-copy") as copy:
        copied = RawKeys(world.redis, f"{world.namespace}-copy")
        copy.import_sessions(deploy.store.export_sessions())
        assert without_fences(copied) == without_fences(world)
        # After the last older worker has gone, the later doctor brings its own index up to date.
        monkeypatch.setitem(consistency.INDEXED, "origin", "origin")
        where = [(world.url, one.namespace, tmp_path, "sync", 0, 0) for one in (world, copied)]
        doctors = [Process(later, "doctor", *one) for one in where]
        for one, doctor in zip((world, copied), doctors, strict=True):
            repaired, left = doctor.hear()
            doctor.end()
            assert all(f":{ORIGINS}" in key for _, key in repaired)
            assert left == []
            assert_consistent(one)
        assert copied.members(f"{ORIGINS}{kept[0]['origin']}")
        copied.remove()
    assert deploy.store.get_metrics().model_dump() == expected_metrics(world)
    print(*deploy.broken[:20], sep="\n")
    attack.tell(
        injected=deploy.operations,
        wrong=len(deploy.broken),
        refused=deploy.refused,
        entries=sum(
            len(entries)
            for report in deploy.reports.values()
            for noted in ("appended", "errors")
            for entries in report[noted].values()
        ),
        claims=deploy.done["hold"] + deploy.done["abandon"],
        sessions_created=len(deploy.created),
        sessions_deleted=len(deploy.deleted),
        events_of_an_unknown_kind=deploy.unknown_events,
        sessions_with_unknown_fields=len(kept),
    )


def without_fences(world: Any) -> dict[str, dict[str, str]]:
    """All hashes; a fence is not carried over as it is."""
    return {
        own: {name: value for name, value in fields.items() if name != "fence"}
        for own, fields in sessions_of(world).items()
    }


@pytest.mark.parametrize("server", SERVERS[:1], indirect=True)
@pytest.mark.parametrize("why", UNFIT)
@controls("rolling deploy", ordinary=100, full=400)
def test_an_older_version_that_does_not_bear_a_later_one_is_found_out(
    deploy_world: World, later: Path, tmp_path: Path, attack: Attack, why: str
) -> None:
    unfit = made(tmp_path / "unfit", UNFIT[why])

    deploy = Deploy(deploy_world, tmp_path, unfit, later, ("sync",), attack.size, seeded())

    print(*deploy.broken[:20], sep="\n")
    attack.tell(injected=deploy.operations, wrong=len(deploy.broken))
