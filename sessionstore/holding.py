"""What leases do, apart from blocking or awaiting: shared by both stores.

A ``Holding`` is one lease as its worker knows it; ``Leases`` are those of one store object. What
takes several round trips is written as steps (``_call.py``), which a store carries out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeGuard, TypeVar, cast
from weakref import WeakSet

from redis.exceptions import RedisError

from sessionstore import arguments as check
from sessionstore import aside, codec
from sessionstore._call import Call, Request, Steps
from sessionstore.acknowledged import Acknowledged, Added
from sessionstore.errors import (
    DurabilityError,
    InvalidArgumentError,
    LeaseLostError,
    SessionBusyError,
    SessionNotActiveError,
    SessionNotFoundError,
    SessionStoreError,
    WritesLostError,
)
from sessionstore.models import ENDED_STATUSES, AgentSessionStatus
from sessionstore.operations import SessionOperations

T = TypeVar("T")

logger = logging.getLogger("sessionstore")

SHORTEST_TTL, LONGEST_TTL = 0.1, 86_400.0  # seconds
RENEWED_AFTER = 1 / 3  # of its time to live, so that two renewals may fail
MOST_RENEWED = 500  # leases in one round trip
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts to claim
_MOST_TOLD = 20  # times that one write is told of lost entries
_LONGEST_MESSAGE = 4096  # characters of an exception in the error buffer


#: Tries several calls in one round trip; gives for each what it failed with, if it did.
Apart: TypeAlias = Callable[[Sequence[Call[None]]], Steps[list[Exception | None]]]


@dataclass(slots=True, eq=False)
class Holding:
    """One lease, as its worker knows it. Times are of ``time.monotonic()``."""

    session_id: str
    owner: str
    fence: str
    ttl: float
    taken_from: str  # the status it had before
    output: Acknowledged
    error: Acknowledged
    losses: int = 0  # how often a write was told that entries are lost
    told_lost: int = 0  # how many entries those writes were told of
    found_lost: int = 0  # what a renewal has found and no write was told of yet
    deadline: float = 0.0
    renew_at: float = 0.0
    lost: LeaseLostError | None = None
    released: bool = False
    abandoned: bool = False
    ending: int = 0  # writes on their way that give it back
    suspected_at: float | None = None  # when it first looked lost, while one was on its way
    callbacks: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])

    def renewed(self, began: float) -> None:
        """It has been granted for another ``ttl`` by a request sent at ``began``."""
        self.deadline = max(self.deadline, began + self.ttl)
        self.renew_at = self.deadline - self.ttl * (1 - RENEWED_AFTER)

    @property
    def token(self) -> str:
        """What its writes and renewals carry; ``lua/include/known.lua`` reads it."""
        return f"{self.fence}:{self.output.expected}:{self.error.expected}"

    def has_added(self, added: Added, total: int, losses: int) -> None:
        """An append was acknowledged that was sent when there had been so many losses."""
        buffer: Acknowledged = getattr(self, added.buffer)
        # A total of before a loss may count what is lost, and was told of.
        buffer.add(added.entries, total if losses == self.losses else 0)

    def has_lost(self, token: str, losses: int, error: WritesLostError) -> None:
        """A write was told of lost entries that had this token when there had been so many losses.

        Others may be told of the same loss: it counts once.
        """
        _, output, errors = map(int, token.split(":"))
        is_old = output > self.output.expected or errors > self.error.expected
        if losses != self.losses or is_old:
            return
        self.losses += 1
        self.told_lost += error.lost
        self.found_lost = 0
        self.output.start_again(max(output - error.output_total, 0), error.output_total)
        self.error.start_again(max(errors - error.error_total, 0), error.error_total)

    def refuse_if_over(self) -> None:
        if self.lost is not None:
            raise self.lost
        if self.released or self.abandoned:
            what = "released" if self.released else "abandoned"
            raise SessionStoreError(f"the lease on session {self.session_id!r} has been {what}")


class Leases:
    """The leases that one store object holds. Safe for threads."""

    def __init__(self, store: SessionOperations, apart: Apart, label: str) -> None:
        self._store = store
        self._apart = apart
        self._label = label
        self.start_afresh()
        _alive.add(self)

    def start_afresh(self) -> None:
        """Hold nothing."""
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self.worker += f":{self._label}" if self._label else ""
        self.lock = threading.Lock()
        self._held: dict[str, Holding] = {}
        self._wakes_at = math.inf  # time.monotonic() of the next round of renewals
        self._closed = False
        self._has_warned = False

    def held(self) -> list[Holding]:
        """The leases that have not been given back, lost ones among them."""
        with self.lock:
            return list(self._held.values())

    def fence_of(self, session_id: str) -> str:
        """What a write to the session carries: its lease's token, or nothing."""
        holding = self._held.get(session_id)
        return "" if holding is None else holding.token

    def guarded(
        self,
        session_id: str,
        fence: str,
        decode: Callable[[Any], T],
        *,
        ends: bool = False,
        added: Added | None = None,
    ) -> Callable[[Any], T]:
        """The decoder of a write that carries a fence.

        Args:
            session_id: the session.
            fence: what the write carries.
            decode: the write's own decoder.
            ends: the write ends the lease too.
            added: what the write appends; its result is the buffer's total.
        """
        holding = self._held.get(session_id)
        if holding is None or not fence.startswith(f"{holding.fence}:"):
            return decode
        if ends:
            with self.lock:
                holding.ending += 1
        losses = holding.losses

        def told(reply: Any) -> T:
            try:
                result = decode(reply)
            except (LeaseLostError, SessionNotFoundError) as error:
                self.lose(holding, error, surely=True)
                raise
            except SessionStoreError as error:
                if ends:
                    self._is_not_ending(holding)
                if isinstance(error, WritesLostError):
                    with self.lock:
                        holding.has_lost(fence, losses, error)
                raise
            if added is not None:
                with self.lock:
                    holding.has_added(added, cast("int", result), losses)
            if ends:
                self._has_ended(holding)
            return result

        return told

    def _has_ended(self, holding: Holding) -> None:
        """It has been given back."""
        with self.lock:  # whatever it looked like meanwhile, it was not lost
            holding.released, holding.lost = True, None
            holding.callbacks.clear()
        self.forget(holding)

    def _is_not_ending(self, holding: Holding) -> None:
        with self.lock:
            holding.ending, holding.suspected_at = max(holding.ending - 1, 0), None

    def forget(self, holding: Holding) -> None:
        """Neither renew it nor send its fence any more."""
        with self.lock:
            if self._held.get(holding.session_id) is holding:
                del self._held[holding.session_id]

    def abandon(self, holding: Holding) -> None:
        """Let a lease run out."""
        with self.lock:
            holding.abandoned = True
        self.forget(holding)

    def lose(self, holding: Holding, error: SessionStoreError, *, surely: bool = False) -> None:
        """The server has said that a lease is lost. Its writes go on carrying its fence.

        A lease that this worker has given back looks lost as long as the answer to that write has
        not come: to a renewal, and when another thread claims the session. So unless it is
        ``surely`` lost, that answer is waited for, for twice the deadline of a call.
        """
        if not isinstance(error, LeaseLostError):
            error = _lost({"session_id": holding.session_id})
        with self.lock:
            if holding.released or holding.lost is not None:
                return
            if holding.ending > 0 and not surely:
                now = time.monotonic()
                holding.suspected_at = holding.suspected_at or now
                if now - holding.suspected_at < 2 * self._store.settings.deadline:
                    return
            holding.lost = error
            callbacks, holding.callbacks = holding.callbacks, []
        for callback in callbacks:
            call(callback)

    def when_lost(self, holding: Holding, callback: Callable[[], object]) -> None:
        """Have a function called once the lease is lost; at once if it is."""
        with self.lock:
            if holding.lost is None:
                holding.callbacks.append(callback)
                return
        call(callback)

    def handed_out(self, holding: Holding) -> Any:
        """The lease as its user sees it."""
        raise NotImplementedError  # blocking or awaiting

    def renew_in_background(self, *, sooner: bool) -> None:
        """See to it that leases are renewed; ``sooner``: one is due before the next round."""
        raise NotImplementedError  # a thread or a task

    def end_renewal(self) -> None:
        """Hold nothing any more; what renews in the background finds that out and ends."""
        with self.lock:
            self._held.clear()

    def _keep(self, holding: Holding) -> Any:
        with self.lock:
            before = self._held.get(holding.session_id)
            # The answer to an older claim may come later, if it had to be repeated.
            is_newest = before is None or int(before.fence) < int(holding.fence)
            if is_newest and not self._closed:
                self._held[holding.session_id] = holding
            sooner = holding.renew_at < self._wakes_at
        if before is not None:
            lost = _lost({"session_id": holding.session_id, "owner": self.worker})
            self.lose(before if is_newest else holding, lost)
        if is_newest and not self._closed:
            self.renew_in_background(sooner=sooner)
        return self.handed_out(holding)

    # ---- Round trips -------------------------------------------------------------------------

    def _request(self, operation: str, *arguments: Any) -> Request[Any]:
        """The request that an operation of the store would send."""
        build: Callable[..., Request[Any]] = vars(SessionOperations)[operation].build
        return build(self._store, *arguments)

    def claiming(
        self,
        session_id: str,
        ttl: float,
        wait: float,
        expected: AgentSessionStatus | Iterable[AgentSessionStatus],
    ) -> Steps[Any] | Call[Any]:
        """Claim a session: once, or again and again until ``wait`` seconds are over."""
        session_id = check.text("session_id", session_id)
        ttl = check.seconds("ttl", ttl, SHORTEST_TTL, LONGEST_TTL)
        wait = check.seconds("wait", wait)
        statuses = check.statuses("expected", expected)
        keys, worker = self._store.keyspace.of_session(session_id), self.worker

        def claim() -> Call[Any]:
            began = time.monotonic()

            def decode(reply: Any) -> Any:
                fence, output, error, taken_from = codec.done(reply).split(" ")
                known = Acknowledged(int(output)), Acknowledged(int(error))
                holding = Holding(session_id, worker, fence, ttl, taken_from, *known)
                holding.renewed(began)
                return self._keep(holding)

            return Call(
                "claim",
                keys=(
                    keys.session(session_id),
                    keys.activity,
                    keys.ended,
                    keys.leases,
                    keys.events,
                    keys.by_status("busy"),
                    keys.by_owner(worker),
                ),
                args=(session_id, keys.prefix, worker, round(ttl * 1000), *statuses),
                decode=decode,
                lane=keys.lane,
            )

        return _until_claimed(claim, wait) if wait else claim()

    def renewing(self, holding: Holding) -> Steps[None]:
        """Renew one lease now."""
        holding.refuse_if_over()
        yield self._renewal([holding])
        if holding.lost is not None:
            raise holding.lost

    def releasing(self, holding: Holding, status: AgentSessionStatus) -> Steps[None]:
        """Give a session back with a status."""
        status = check.status("status", status)
        if status == "busy":
            raise InvalidArgumentError.of("status", "must be another than busy")
        if holding.lost is not None:
            self.forget(holding)
        if not holding.released:
            holding.refuse_if_over()
            try:
                lost = yield from self._told_of_loss("update_status", holding.session_id, status)
            except (LeaseLostError, SessionNotFoundError):
                self.forget(holding)
                raise
            except DurabilityError:
                self._has_ended(holding)
                raise
            except RedisError:
                self._is_not_ending(holding)
                raise
            if lost is not None:
                raise lost

    def leaving(self, holding: Holding, error: BaseException | None) -> Steps[None]:
        """Give a session back as ``active``; of an exception, tell in the error buffer first."""
        if holding.released or holding.abandoned:
            return
        told = lost = None
        try:
            if holding.lost is None and _is_worth_telling(error):
                told = yield from self._telling(holding, error)
            if holding.lost is None:
                lost = yield from self._told_of_loss("update_status", holding.session_id, "active")
        except (LeaseLostError, SessionNotFoundError):
            pass
        except DurabilityError as failure:
            self._has_ended(holding)
            if error is None:
                raise
            logger.warning("%s was released: %s", holding.session_id, failure)
        except RedisError as failure:
            if error is None:
                raise
            logger.warning("%s was not released: %s", holding.session_id, failure)
        finally:
            self.forget(holding)
        if holding.lost is not None and holding.lost.owner and error is None:
            raise holding.lost  # somebody else is at work on it, and so were we
        lost = WritesLostError.together(told, lost)
        if lost is not None and error is None:
            raise lost
        if lost is not None:
            logger.warning("%s", lost)

    def _told_of_loss(self, operation: str, *arguments: Any) -> Steps[WritesLostError | None]:
        """Carry out a write, also if it is told of lost entries; that error, if it was.

        It may be told again: of what was acknowledged while it was on its way.
        """
        lost = None
        for _ in range(_MOST_TOLD):
            try:
                yield self._request(operation, *arguments)
            except WritesLostError as error:
                lost = WritesLostError.together(lost, error)
            else:
                return lost
        assert lost is not None
        raise lost

    def _telling(self, holding: Holding, error: BaseException) -> Steps[WritesLostError | None]:
        try:
            message = _message(error, self._store.settings.chunk_limit)
            return (yield from self._told_of_loss("add_error", holding.session_id, message))
        except (LeaseLostError, SessionNotFoundError):
            raise
        except Exception as failure:  # that the session is given back matters more
            logger.warning("%r was not told in %s: %s", error, holding.session_id, failure)
            return None

    def giving_all_back(self) -> Steps[None]:
        """Release what is held: nobody is going to renew it."""
        self._closed = True  # a claim that is on its way now is left to run out
        give_up_at = time.monotonic() + self._store.settings.deadline
        for holding in self.held():
            try:
                yield from self.leaving(holding, None)
            except DurabilityError as error:
                logger.warning("%s was released: %s", holding.session_id, error)
                if time.monotonic() > give_up_at:
                    break
            except Exception as error:
                logger.warning("%s was not released: %s", holding.session_id, error)
                if isinstance(error, RedisError):
                    break  # nor would the others be, each after its deadline
        self.end_renewal()

    def _renewal(self, holdings: Sequence[Holding]) -> Call[None]:
        """Renew leases on sessions of one partition, in one round trip."""
        began = time.monotonic()
        keys = self._store.keyspace.of_session(holdings[0].session_id)
        losses = [holding.losses for holding in holdings]

        def decode(reply: Any) -> None:
            answers = json.loads(codec.done(reply))
            for holding, before, answer in zip(holdings, losses, answers, strict=True):
                if isinstance(answer, dict):
                    self.lose(holding, _lost(cast("dict[str, Any]", answer)))
                    continue
                holding.renewed(began)
                self._find_lost(holding, answer, before)

        return Call(
            "renew",
            keys=(keys.leases, *(keys.session(holding.session_id) for holding in holdings)),
            args=tuple(
                value
                for holding in holdings
                for value in (holding.session_id, holding.token, round(holding.ttl * 1000))
            ),
            decode=decode,
            lane=keys.lane,
        )

    def _find_lost(self, holding: Holding, lost: int, losses: int) -> None:
        """A renewal found so many entries lost, sent when there had been so many losses."""
        with self.lock:
            if losses != holding.losses:
                return
            is_news = lost > holding.found_lost
            holding.found_lost = lost
        if is_news:
            logger.warning("%s", WritesLostError.found(holding.session_id, lost))

    def renewing_all(self, renewals: Sequence[Call[None]]) -> Steps[None]:
        """Send a round of renewals. What fails is due again soon.

        One partition may be away, and others must not wait for it: each is tried once.
        """
        failures: list[Exception | None] = []
        try:
            if self._store.settings.partitions > 1:
                failures = yield from self._apart(renewals)
            else:
                for renewal in renewals:  # noqa: UP028  a list cannot be sent the results
                    yield renewal
        except Exception as error:
            failures = [error]
        failure = next(filter(None, failures), None)
        if failure is not None and not self._has_warned:  # once, however long it takes
            logger.warning("leases were not renewed, trying again: %s", failure)
        self._has_warned = failure is not None

    def next_round(self) -> tuple[float, list[Call[None]]] | None:
        """Seconds until a renewal is due, and what is to be sent then; None if nothing is held.

        One round trip renews all leases of a partition that are due about now. Those that get no
        answer are due again soon.
        """
        now = time.monotonic()
        with self.lock:
            held = [holding for holding in self._held.values() if holding.lost is None]
            due_at = min((holding.renew_at for holding in held), default=math.inf)
            self._wakes_at = max(due_at, now)
        if not held:
            return None
        if due_at > now:
            return due_at - now, []
        by_partition: dict[str, list[Holding]] = defaultdict(list)
        for holding in held:
            if holding.renew_at - now < holding.ttl * RENEWED_AFTER / 2:
                holding.renew_at = now + min(1.0, holding.ttl / 10)
                keys = self._store.keyspace.of_session(holding.session_id)
                by_partition[keys.prefix].append(holding)
        return 0, [
            self._renewal(holdings[first : first + MOST_RENEWED])
            for holdings in by_partition.values()
            for first in range(0, len(holdings), MOST_RENEWED)
        ]


def _until_claimed(claim: Callable[[], Call[Any]], wait: float) -> Steps[Any]:
    give_up_at = time.monotonic() + wait
    pause = _FIRST_PAUSE
    while True:
        try:
            return (yield claim())
        except (SessionBusyError, SessionNotActiveError) as error:
            left = give_up_at - time.monotonic()
            if left <= 0 or error.status in ENDED_STATUSES:
                raise
            # A lease is released at any time; at the latest it expires.
            ends_in = pause if error.expires_in is None else error.expires_in
        yield min(left, max(ends_in, 0.001), random.uniform(pause / 2, pause))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _lost(details: dict[str, Any]) -> LeaseLostError:
    error = LeaseLostError.from_details(details)
    assert isinstance(error, LeaseLostError)
    return error


def _is_worth_telling(error: BaseException | None) -> TypeGuard[BaseException]:
    """Not that a generator was closed, or that the program asked for its own good end."""
    if isinstance(error, SystemExit):
        return bool(error.code)
    return error is not None and not isinstance(error, GeneratorExit)


def _message(error: BaseException, most_bytes: int) -> str:
    """``Type: message``, without a traceback: that may show secrets."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    data = text[:_LONGEST_MESSAGE].encode(errors="replace")
    return data[:most_bytes].decode(errors="ignore")


def call(callback: Callable[[], object]) -> None:
    """Call what was to be told of a lost lease; it must not disturb what found that out."""

    def told() -> None:
        try:
            callback()
        except (Exception, SystemExit):
            logger.exception("a callback failed that was told of a lost lease")

    aside.call(told)


_alive: WeakSet[Leases] = WeakSet()


def alive() -> list[Leases]:
    """The leases of every store object in this process."""
    return list(_alive)


def _after_fork() -> None:
    """The leases stay the parent's: in the child, which is another worker, they are over."""
    for leases in alive():
        for holding in leases._held.values():  # pyright: ignore[reportPrivateUsage]
            holding.released = True
        leases.start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
