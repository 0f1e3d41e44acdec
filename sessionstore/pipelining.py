"""Pipelines of scripts: what is sent in one round trip, and again for want of a script.

EVALSHA fails if the server does not know the script: after a restart, a failover, SCRIPT FLUSH. So
a pipeline has up to three rounds: EVALSHA; the scripts that were missing and EVALSHA; EVAL with the
text, where a user may not load scripts. A server that has lost its scripts refuses all that follow
in the pipeline too, so with the scripts loaded at its head nothing overtakes what was refused. A
user who may not load them sends EVAL at once where the order counts: of two scripts the server may
know only the second.

    SCRIPT LOAD a, b   a   a   SCRIPT FLUSH   a: refused   b: refused   →   again: a, b

If the scripts are lost in the middle of a pipeline and another client loads them again before its
end, what follows is carried out, and what was refused between comes after it: with SCRIPT FLUSH
every 20 ms and one other worker, 5 of 60 batches of 300. So where the order counts a pipeline uses
one of a few variants of each script, with digests of their own, that only such pipelines load. What
is left is the chance that another one of the same variant does so within these milliseconds.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

from redis.exceptions import ConnectionError, NoScriptError

from sessionstore._call import Call, Several, Snapshot
from sessionstore.errors import DurabilityError, own_copy
from sessionstore.keys import Keys
from sessionstore.lanes import Lane
from sessionstore.scripts import Script, guarded, load, variant

#: A request that is no batch of others.
Single: TypeAlias = Call[Any] | Snapshot[Any] | Several[Any]

#: What redis-py's ``execute_command`` takes.
Words: TypeAlias = tuple[str | int | bytes, ...]

VARIANTS = 8  # of each script; the server keeps them all


class Command(NamedTuple):
    """A script and what follows it in EVALSHA: number of keys, keys, arguments.

    Without a script, ``operands`` are a command by themselves. ``waits``: it is a write that
    replicas are to have, if the store is told so.
    """

    script: Script | None
    operands: Words
    waits: bool = False

    @property
    def evalsha(self) -> Words:
        return (
            self.operands if self.script is None else ("EVALSHA", self.script.sha, *self.operands)
        )

    @property
    def eval(self) -> Words:
        return self.operands if self.script is None else ("EVAL", self.script.text, *self.operands)


def command(call: Call[Any], lane: Lane | None, *, is_guarded: bool = False) -> Command:
    """The command that a call is; ``is_guarded``: with the guard of ``clusters.py``."""
    script, keys, args = load(call.script), call.keys, call.args
    if lane is not None and call.lane is not None:
        keys, args = (call.lane(lane.name), *keys), (lane.sequence, *args)
    if is_guarded:
        script, keys = guarded(script), (*keys, Keys.guard_of(keys[0]))
    return Command(script, (len(keys), *keys, *args), lane is not None and call.script != "renew")


def encoded(call: Call[Any], lane: Lane | None, *, is_guarded: bool = False) -> Command:
    """The same in bytes: redis-py's asyncio client takes four times as long to encode it."""
    script, operands, waits = command(call, lane, is_guarded=is_guarded)
    return Command(script, tuple([_bytes(one) for one in operands]), waits)


def _bytes(one: str | int | bytes) -> bytes:
    return one if type(one) is bytes else str(one).encode()


def commands(request: Single, lane: Lane | None, *, is_guarded: bool = False) -> list[Command]:
    """The commands that a request is, within a pipeline."""
    if isinstance(request, Call):
        return [command(request, lane, is_guarded=is_guarded)]
    if isinstance(request, Several):
        return [command(call, lane, is_guarded=is_guarded) for call in request.calls]
    words: list[Words] = [("MULTI",), *request.commands, ("EXEC",)]
    return [Command(None, one) for one in words]


def _reply(request: Single, replies: Sequence[Any]) -> Any:
    """What a request is answered with, made of its commands' replies; or its error."""
    if isinstance(request, Call):
        return replies[0]
    error = _first_error(replies)
    if error is not None:
        return error
    if isinstance(request, Several):
        return list(replies)
    results = replies[-1]  # of EXEC
    return _first_error(results) or results


def _first_error(replies: Sequence[Any]) -> Exception | None:
    return next((reply for reply in replies if isinstance(reply, Exception)), None)


def answer(request: Single, replies: Sequence[Any]) -> Any:
    """What a request is answered with; raises its error."""
    reply = _reply(request, replies)
    if isinstance(reply, Exception):
        raise reply
    return reply


def answers(
    requests: Sequence[tuple[Single, Any]],
    sent: Sequence[Sequence[Command]],
    replies: Sequence[Any],
) -> list[Any]:
    """What each of several requests is answered with, or its error."""
    following = iter(replies)
    return [
        _reply(request, list(islice(following, len(several))))
        for (request, _), several in zip(requests, sent, strict=True)
    ]


def _is_done(reply: Any) -> bool:
    """Whether a write was carried out; it may have been refused, or have failed."""
    return isinstance(reply, (str, bytes)) and reply[:2] in ("ok", b"ok")


# While it waited, or between the write and WAIT.
_DEMOTED = re.compile(r"^UNBLOCKED|WAIT cannot be used with replica", re.IGNORECASE)


class Replication(NamedTuple):
    """How many replicas are to have a write before it is answered; ``wait_replicas``.

    WAIT is sent behind the writes, on the same connection: on another one it knows of no write to
    wait for, and answers at once.
    """

    replicas: int
    wait_ms: int  # at most

    @property
    def words(self) -> Words:
        return ("WAIT", self.replicas, self.wait_ms)

    def failure(self, answer: Any, reply: Any) -> Exception:
        """What a write is told, given its answer and the reply to WAIT: too few, or an error."""
        if isinstance(reply, Exception):
            if _DEMOTED.search(str(reply)):  # sent again, to the new primary
                return ConnectionError(f"the server became a replica meanwhile: {reply}")
            error = DurabilityError.of(self.replicas, None, str(reply))
            error.__cause__ = reply
        else:
            error = DurabilityError.of(self.replicas, int(reply), f"{self.wait_ms / 1000:g} s")
        error.answer = answer
        return error


class Rounds:
    """The rounds of one pipeline.

    Args:
        commands: what is to be sent.
        in_order: send the scripts in the first round already, to keep the order.
        may_load: whether this user may load scripts, as far as is known.
        replication: how many replicas are to have what was written, and how long to wait for them.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        *,
        in_order: bool = False,
        may_load: bool = True,
        replication: Replication | None = None,
    ) -> None:
        if in_order and may_load:
            number = random.randrange(VARIANTS)
            commands = [
                one._replace(script=one.script and variant(one.script, number)) for one in commands
            ]
        self._commands = commands
        self._missing: Sequence[int] = range(len(commands))
        self._round = 0 if may_load or not in_order else 2
        self._is_loading = in_order
        self._loads = 0
        self._replication = replication
        self._is_waiting = False
        #: For each command its reply, or its error.
        self.replies: list[Any] = [None] * len(commands)

    def following(self) -> list[Words]:
        """What is to be sent now; nothing once all have been answered."""
        self._round += 1
        if self._round > 3:
            return []
        to_send = [self._commands[number] for number in self._missing]
        words = self._words(to_send)
        self._is_waiting = self._replication is not None and any(one.waits for one in to_send)
        if self._replication is not None and self._is_waiting:
            words.append(self._replication.words)
        return words

    def _words(self, to_send: Sequence[Command]) -> list[Words]:
        if self._round == 3:
            self._loads = 0
            return [one.eval for one in to_send]
        scripts = (
            dict.fromkeys(one.script for one in to_send if one.script) if self._is_loading else ()
        )
        self._loads = len(scripts)
        return [
            *(("SCRIPT", "LOAD", one.text) for one in scripts),
            *(one.evalsha for one in to_send),
        ]

    def take(self, replies: Sequence[Any]) -> None:
        """The replies to what was sent."""
        end = len(replies) - self._is_waiting
        for number, reply in zip(self._missing, replies[self._loads : end], strict=True):
            self.replies[number] = reply
        if self._replication is not None and self._is_waiting:
            self._have_replicas(self._replication, replies[-1])
        self._missing = [n for n in self._missing if isinstance(self.replies[n], NoScriptError)]
        self._is_loading = True
        if not self._missing:
            self._round = 3

    def _have_replicas(self, replication: Replication, reply: Any) -> None:
        """From how many replicas have what was just written to the replies to it."""
        if not isinstance(reply, Exception) and int(reply) >= replication.replicas:
            return
        for number in self._missing:
            if self._commands[number].waits and _is_done(self.replies[number]):
                self.replies[number] = replication.failure(self.replies[number], reply)

    def fail(self, error: Exception) -> bool:
        """A round has failed as a whole: whether that is the failure of some commands only.

        Of those that were answered in an earlier round the answers are known. Without this, a
        failure to connect would say of all of them that they have surely not been carried out.
        """
        if len(self._missing) == len(self._commands):
            return False
        for number in self._missing:
            self.replies[number] = own_copy(error)
        self._missing, self._round = (), 3
        return True
