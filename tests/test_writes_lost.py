"""Failovers that take acknowledged writes away, and workers under a lease who are told of each.

A planned failover loses the most: both servers are there, and the old primary goes on taking writes
until the sentinels are asked again.
"""

from __future__ import annotations

import signal
import time
import traceback
from typing import Any
from uuid import uuid4

import pytest
from programme import Attack, controls, proves
from sentinels import PrivateSentinels
from test_sentinel import FAILOVERS, NOTICED
from workers import Life, Work, at_work

from sessionstore import AgentSession, WritesLostError
from sessionstore.holding import Holding

DEADLINE = 20.0
KINDS = ("kill", "stop", "swap")


class Leased(Life):
    """A worker that appends under a lease, to both buffers, and adds up what it is told is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.acknowledged_lines: list[str] = []
        self.told = self.lost = 0

    async def live(self, store: Any, is_over: Any) -> None:
        self.session_id = (await store.create_session("claude", uuid4().hex, "/src")).id
        lease = await store.claim(self.session_id, ttl=120)
        while not is_over.is_set():
            line = self._line()
            add = store.add_error if len(self.lines) % 4 == 0 else store.add_output
            try:
                await add(self.session_id, line)
                self.acknowledged_lines.append(line)
            except WritesLostError as error:
                self.told += error.lost
            except Exception:
                self.wrong_answers += 1
                traceback.print_exc()
            self.calls += 1
            self.end_turn()
        try:
            await lease.release()
        except WritesLostError as error:
            self.told += error.lost

    def broken(self, stored: dict[str, AgentSession]) -> int:
        """What is stored twice or was never written, and how many entries were lost untold."""
        own = stored.pop(self.session_id, None)
        if own is None:
            return self.wrong_answers + 1 + len(self.acknowledged_lines)
        lines = [*own.output_buffer, *own.error_buffer]
        self.lost = len(set(self.acknowledged_lines).difference(lines))
        untold = abs(self.lost - self.told)
        return self.wrong_answers + len(lines) - len({*lines} & {*self.lines}) + untold


def fail_over(pair: PrivateSentinels, work: Work, kind: str, times: int) -> None:
    """Let the other server take over, again and again."""
    for _ in range(times):
        work.wait_for_turns(50)
        pair.wait_until_replicated()
        old = FAILOVERS[kind](pair)
        time.sleep(NOTICED)
        work.wait_for_turns(50)
        if kind == "kill":
            old.start()
        if kind == "stop":
            old.signal(signal.SIGCONT)
        pair.wait_until_well()
    work.wait_for_turns(50)


def tell(attack: Attack, work: Work) -> None:
    wrong = work.broken()
    lives = [life for life in work.lives if isinstance(life, Leased)]
    lost, told = sum(life.lost for life in lives), sum(life.told for life in lives)
    attack.tell(injected=attack.size, wrong=wrong, **work.seen(), lost=lost, told=told)


@pytest.mark.parametrize("kind", KINDS)
@proves("lost writes", ordinary=1, full=5)
def test_who_holds_a_lease_is_told_of_every_entry_that_a_failover_took(
    pair: PrivateSentinels, kind: str, attack: Attack
) -> None:
    with at_work(pair.url, threads=2, tasks=2, life=Leased, deadline=DEADLINE) as work:
        fail_over(pair, work, kind, attack.size)
    tell(attack, work)


@controls("lost writes", ordinary=1)
def test_without_the_count_entries_are_lost_in_silence(
    pair: PrivateSentinels, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Holding, "token", property(lambda self: f"{self.fence}:0:0"))
    with at_work(pair.url, threads=2, tasks=2, life=Leased, deadline=DEADLINE) as work:
        fail_over(pair, work, "swap", attack.size)
    tell(attack, work)
