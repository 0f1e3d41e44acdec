"""An attack that injects too little, or a control that comes to no harm, is no proof."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from programme import Attack

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "verification"))
import report
from rows import ROWS


def attack(*, is_control: bool = False, figures: Path | None = None) -> Attack:
    return Attack("an attack", "a test", is_control, 10, in_full=False, figures=figures)


def test_a_proof_without_harm_holds() -> None:
    attack().tell(injected=10, wrong=0)


def test_a_proof_with_too_few_faults_fails() -> None:
    with pytest.raises(AssertionError, match="planned 10 faults, injected 9"):
        attack().tell(injected=9, wrong=0)


def test_a_proof_with_harm_fails() -> None:
    with pytest.raises(AssertionError, match="2 broken promises"):
        attack().tell(injected=10, wrong=2)


def test_a_control_without_harm_fails() -> None:
    attack(is_control=True).tell(injected=10, wrong=3)

    with pytest.raises(AssertionError, match="it shows nothing"):
        attack(is_control=True).tell(injected=10, wrong=0)


def test_what_is_told_is_written_down_even_if_it_fails(tmp_path: Path) -> None:
    figures = tmp_path / "figures"

    with pytest.raises(AssertionError):
        attack(figures=figures).tell(injected=10, wrong=1, live_chunks=7)

    assert json.loads(figures.read_text()) == {
        "attack": "an attack", "test": "a test", "control": False,
        "injected": 10, "wrong": 1, "seen": {"live_chunks": 7}, "outcomes": {},
    }  # fmt: skip


def test_each_row_of_the_programme_has_tests_that_show_it_and_a_control() -> None:
    marks = re.compile(r'(proves|controls)\(\s*"([^"]+)"')
    found: dict[str, Counter[str]] = {"proves": Counter(), "controls": Counter()}
    for path in Path(__file__).parent.glob("test_*.py"):
        for mark, name in marks.findall(path.read_text("utf-8")):
            found[mark][name] += 1
    assert found["proves"].keys() == {row.name for row in ROWS} - {"mutants"}
    assert found["controls"].keys() == {row.name for row in ROWS if row.control}


def test_the_readme_quotes_the_figures() -> None:
    readme = report.README.read_text("utf-8")
    figures = json.loads(report.FIGURES.read_text("utf-8"))
    assert report.quoted(readme, figures) == readme
    planned = {row.name: row.figure for row in ROWS}
    for name, found in figures["attacks"].items():
        assert found["injected"] >= planned[name]
        assert found["wrong"] == 0
