"""Attacks with a figure: a small share of each in the ordinary tests, all of it by scripts/verify.

A test that shows a promise is marked with the attack's name and with how much of it it does; so is
its control, a naive version in which the same attack must do harm.

    @proves("claim race", ordinary=200, full=5_000)
    def test_exactly_one_gets_each_session(attack): ...

    @controls("claim race", ordinary=50, full=200)
    def test_reading_and_then_setting_lets_two_hold(attack): ...

Each is given an ``Attack``: it injects ``attack.size`` faults and tells what came of them. A proof
fails if fewer were injected, or if anything was wrong; a control fails if nothing was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

IN_FULL = "--in-full"
ATTACK = "--attack"
FIGURES = "--figures"


def proves(attack: str, *, ordinary: int, full: int) -> pytest.MarkDecorator:
    """This test shows a promise: ``ordinary`` faults with the other tests, ``full`` by itself."""
    return pytest.mark.proves(attack, ordinary=ordinary, full=full)


def controls(attack: str, *, ordinary: int, full: int | None = None) -> pytest.MarkDecorator:
    """This test shows that the attack harms what has no such promise."""
    return pytest.mark.controls(attack, ordinary=ordinary, full=full or ordinary)


@dataclass
class Attack:
    """One test's share of an attack.

    Attributes:
        size: how many faults to inject.
        in_full: whether this is more than the ordinary tests' share.
    """

    name: str
    test: str
    is_control: bool
    size: int
    in_full: bool
    figures: Path | None = None
    has_told: bool = False

    def tell(
        self,
        *,
        injected: int,
        wrong: int,
        outcomes: Mapping[str, int] | None = None,
        **seen: int,
    ) -> None:
        """Say what came of it, once at the end of the test.

        Args:
            injected: faults that happened.
            wrong: how many times a promise was broken.
            outcomes: how often each came up of those that all must come up often.
            seen: what else was counted: proof that the attack met something alive.
        """
        assert not self.has_told, "told once already"
        self.has_told = True
        print(f"{self.name}: {injected:,} injected, {wrong:,} wrong; {_listed(seen)}")
        if self.figures is not None:
            counts = {
                "injected": injected, "wrong": wrong, "seen": seen, "outcomes": dict(outcomes or {})
            }  # fmt: skip
            line = {"attack": self.name, "test": self.test, "control": self.is_control, **counts}
            with self.figures.open("a", encoding="utf-8") as file:  # as other processes do
                file.write(json.dumps(line) + "\n")
        assert injected >= self.size, f"planned {self.size} faults, injected {injected}"
        if self.is_control:
            assert wrong > 0, "the attack does no harm to the naive version: it shows nothing"
        else:
            assert wrong == 0, f"{wrong} broken promises"


def _listed(seen: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in seen.items())


# ---- What conftest.py takes from here ------------------------------------------------------


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("attacks")
    group.addoption(IN_FULL, action="store_true", help="attacks at their full figures")
    group.addoption(ATTACK, metavar="NAME", help="only the tests of this attack")
    group.addoption(FIGURES, metavar="FILE", help="append what attacks found, as JSON lines")


def mark_of(item: Any) -> pytest.Mark | None:
    mark: pytest.Mark | None = item.get_closest_marker("proves")
    return mark or item.get_closest_marker("controls")


def is_asked_for(item: Any, attack: str | None) -> bool:
    """Whether a test is to run, as far as ``--attack`` says."""
    if attack is None:
        return True
    mark = mark_of(item)
    return mark is not None and mark.args[0] == attack


@pytest.fixture
def attack(request: pytest.FixtureRequest) -> Iterator[Attack]:
    """This test's share of an attack."""
    mark = mark_of(request.node)
    assert mark is not None, "a test with an attack is marked with @proves or @controls"
    in_full = bool(request.config.getoption(IN_FULL))
    figures = request.config.getoption(FIGURES)
    one = Attack(
        name=mark.args[0],
        test=request.node.nodeid,
        is_control=mark.name == "controls",
        size=mark.kwargs["full" if in_full else "ordinary"],
        in_full=in_full,
        figures=Path(figures) if figures else None,
    )
    failed_before = request.session.testsfailed
    yield one
    has_failed = request.session.testsfailed > failed_before
    assert one.has_told or has_failed, "the test has not told what came of its attack"
