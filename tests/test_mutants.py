"""Damage to the Lua is noticed: a small share of ``scripts/mutants``, which does all of it.

(That tests pass on an undamaged copy is the control there.)
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import SERVERS

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "mutation"))
import damages
import mutants

#: One of a quick file of tests.
QUICK = next(one for one in damages.DAMAGES if one.tests[0] == damages.METADATA)


def test_every_damage_can_be_done() -> None:
    """Its text is in its file once: who changes a script changes its damages."""
    mutants.check_texts(damages.DAMAGES)


def test_there_are_damages_to_every_script_that_writes_and_to_every_page() -> None:
    done = Counter(damage.file for damage in damages.DAMAGES)
    assert sum(done.values()) >= 100
    scripts = {path.name for path in (mutants.ROOT / mutants.LUA).glob("*.lua")}
    appending = {"add_output.lua", "add_error.lua"}  # include/append.lua
    reading = {"get_session.lua", "read_whole.lua", "ping.lua", "drift.lua"}  # no decision in them
    doctors = {name for name in scripts if name.startswith(("check_", "repair_"))}  # corrupt.py
    assert scripts - appending - reading - doctors <= done.keys()


def test_a_damage_whose_text_is_gone_is_told() -> None:
    damage = damages.DAMAGES[0]
    for text in ("", 2 * damage.text):
        with pytest.raises(mutants.NotFoundOnceError, match="not once"):
            mutants.damaged(damage, text)


def test_a_damage_is_noticed() -> None:
    result = mutants.tried(QUICK, SERVERS[0])
    assert result.killed_by == QUICK.tests[0], result.trouble
