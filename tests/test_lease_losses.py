"""What a lease's holder expects to be stored, against a server that loses its newest entries.

Appends are on their way at the same time, answers come late and in any order, and what got no
answer is carried out again, as when a store sends it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from sessionstore import WritesLostError
from sessionstore.acknowledged import Acknowledged, Added
from sessionstore.holding import Holding

AT_CLAIM = 7  # entries that others had added


@dataclass(eq=False)
class Append:
    count: int
    token: str
    losses: int
    result: int | WritesLostError | None = None  # None until it is carried out


class Simulation:
    """One lease, and a server that loses what it was told last."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        known = Acknowledged(AT_CLAIM), Acknowledged(0)
        self.holding = Holding("agent_1", "worker", "1", 30.0, "active", *known)
        self.stored: list[Append] = []
        self.on_their_way: list[Append] = []
        self.acknowledged: list[Append] = []
        self.carried_out_again = 0  # entries that were lost before they were acknowledged

    @property
    def total(self) -> int:
        return AT_CLAIM + sum(append.count for append in self.stored)

    def missing(self, token: str) -> int:
        """What ``lua/include/known.lua`` finds."""
        return max(int(token.split(":")[1]) - self.total, 0)

    def send(self) -> None:
        holding = self.holding
        self.on_their_way.append(Append(self.random.randint(1, 3), holding.token, holding.losses))

    def carry_out(self, append: Append) -> None:
        if append.result is None and (lost := self.missing(append.token)):
            error = WritesLostError()
            error.lost, error.output_total, error.error_total = lost, self.total, 0
            append.result = error
        elif append.result is None:
            self.stored.append(append)
            append.result = self.total

    def answer(self, append: Append) -> None:
        self.carry_out(append)
        self.on_their_way.remove(append)
        if isinstance(append.result, WritesLostError):
            self.holding.has_lost(append.token, append.losses, append.result)
        elif append.result is not None:
            added = Added("output", append.count)
            self.holding.has_added(added, append.result, append.losses)
            self.acknowledged.append(append)

    def fail_over(self) -> None:
        kept = self.random.randint(0, len(self.stored))
        lost, self.stored = self.stored[kept:], self.stored[:kept]
        for append in lost:
            if append in self.on_their_way:
                append.result = None
                self.carried_out_again += append.count

    def run(self, steps: int) -> None:
        for _ in range(steps):
            chance = self.random.random()
            if chance < 0.4:
                self.send()
            elif chance < 0.45:
                self.fail_over()
            elif self.on_their_way:
                step = self.carry_out if chance < 0.7 else self.answer
                step(self.random.choice(self.on_their_way))
        while self.on_their_way:
            self.answer(self.random.choice(self.on_their_way))

    def told(self) -> int:
        """How many entries the holder knows to be lost, after a last write or renewal."""
        return self.holding.told_lost + self.missing(self.holding.token)

    def lost(self) -> int:
        return sum(one.count for one in self.acknowledged if one not in self.stored)


@pytest.mark.parametrize("steps", [8, 40, 400])
def test_no_loss_is_hidden_and_none_is_made_up(steps: int) -> None:
    harmed = exact = 0
    for seed in range(500):
        simulation = Simulation(seed)
        simulation.run(steps)
        told, lost = simulation.told(), simulation.lost()
        assert lost <= told <= lost + simulation.carried_out_again, f"seed {seed}"
        harmed += lost > 0
        exact += told == lost
    assert harmed > 20
    assert exact > 250


def test_one_append_at_a_time_is_told_to_the_entry() -> None:
    simulation = Simulation(0)
    for _ in range(3000):
        if simulation.random.random() < 0.2:
            simulation.fail_over()
        simulation.send()
        simulation.answer(simulation.on_their_way[0])
    assert simulation.lost() > 100
    assert simulation.told() == simulation.lost()


def test_an_entry_of_unknown_outcome_takes_the_place_of_no_other() -> None:
    """It was stored, its answer never came; the next one's total tells of both."""
    known = Acknowledged(AT_CLAIM)
    known.add(1, AT_CLAIM + 2)
    assert known.expected == AT_CLAIM + 2
    known.start_again(lost=1, total=AT_CLAIM + 1)
    assert known.expected == AT_CLAIM + 1
    known.add(1, AT_CLAIM + 2)
    assert known.expected == AT_CLAIM + 2


def refusal(lost: int, output_total: int) -> WritesLostError:
    error = WritesLostError()
    error.lost, error.output_total, error.error_total = lost, output_total, 0
    return error


def test_a_refusal_of_before_a_loss_is_no_second_loss() -> None:
    """Its token was read before another thread was told, how many losses there were after."""
    holding = Holding("agent_1", "worker", "1", 30.0, "active", Acknowledged(0), Acknowledged(0))
    holding.has_added(Added("output", 5), 5, 0)
    before = holding.token
    holding.has_lost(before, 0, refusal(2, 3))
    holding.has_lost(before, 1, refusal(2, 3))
    assert (holding.told_lost, holding.output.expected) == (2, 3)
    holding.has_added(Added("output", 1), 4, 1)
    assert holding.output.expected == 4
