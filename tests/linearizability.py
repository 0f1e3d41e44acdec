"""Whether a recorded history of one session could have happened one operation at a time.

An operation takes effect at one moment between its invocation and its response. A history is
*linearizable* if such moments can be chosen that every answer is the one that the model gives
(Herlihy and Wing, 1990). The search is that of Wing and Gong (1993): take, as the next in order,
any operation that was invoked before all others left have responded and whose answer the model
gives; go back if that leads nowhere; never look twice at the same set of operations done with the
same state.

The model is a session with a holder and a list. It knows of time only that no lease expires.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operation:
    """One call as its caller saw it.

    Attributes:
        name: claim, append, release, take_away (the operator's override) or read.
        lease: of the caller, "" if it has none; of a claim, the one that it asks for.
        text: of an append.
        answer: "ok", "busy" (somebody else's lease is in the way) or "lost" (the caller's own is
            not in force any more); of an append that went well the total, of a read the entries.
        invoked: before it was sent, by a clock that all callers share.
        responded: after its answer had come.
    """

    name: str
    lease: str
    text: str
    answer: str | int | tuple[str, ...]
    invoked: int
    responded: int


@dataclass(frozen=True, slots=True)
class State:
    """The session: the lease in force, "" if none is, and what has been appended."""

    holder: str = ""
    entries: tuple[str, ...] = ()


def step(state: State, operation: Operation) -> State | None:
    """The state after the operation; None if it would have been answered differently."""
    holder, lease = state.holder, operation.lease
    match operation.name, operation.answer:
        case "claim", "ok":
            return None if holder else State(lease, state.entries)
        case "claim", "busy":
            return state if holder else None
        case "append", int(total):
            passes = holder == lease and total == len(state.entries) + 1
            return State(holder, (*state.entries, operation.text)) if passes else None
        case "append", "busy":
            return state if holder and not lease else None
        case "append" | "release", "lost":
            return state if lease and holder != lease else None
        case "release", "ok":
            return State("", state.entries) if holder == lease else None
        case "take_away", "ok":
            return State("", state.entries)
        case "read", entries:
            return state if entries == state.entries else None
    return None


def is_linearizable(history: Sequence[Operation]) -> bool:
    """Whether the operations of a history can be put in an order that the model allows."""
    everything = (1 << len(history)) - 1
    seen: set[tuple[int, State]] = set()
    todo = [(0, State())]
    while todo:
        done, state = todo.pop()
        if done == everything:
            return True
        left = [i for i in range(len(history)) if not done >> i & 1]
        first_response = min(history[i].responded for i in left)
        for i in left:
            if history[i].invoked <= first_response:
                following = step(state, history[i])
                if following is not None and (done | 1 << i, following) not in seen:
                    seen.add((done | 1 << i, following))
                    todo.append((done | 1 << i, following))
    return False


def overlapping(history: Sequence[Operation]) -> int:
    """How many operations were under way at the same time as another."""
    return sum(
        any(a is not b and a.invoked <= b.responded and b.invoked <= a.responded for b in history)
        for a in history
    )
