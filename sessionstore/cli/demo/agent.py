"""A stand-in for a coding agent: prints the stream of JSON lines that one prints, in its tempo.

python -m sessionstore.cli.demo.agent NAME STEPS
"""

from __future__ import annotations

import json
import random
import sys
import time

STEPS = [
    {"type": "assistant", "text": "Let me read the failing test first."},
    {"type": "tool_use", "tool": "Read", "input": {"path": "tests/test_parser.py"}},
    {"type": "tool_result", "lines": 214},
    {"type": "assistant", "text": "The parser drops the last token — “naïve” input shows it 🔍"},
    {"type": "tool_use", "tool": "Grep", "input": {"pattern": "def next_token"}},
    {"type": "tool_result", "matches": 3},
    {"type": "tool_use", "tool": "Edit", "input": {"path": "src/parser.py", "line": 88}},
    {"type": "tool_result", "ok": True},
    {"type": "tool_use", "tool": "Bash", "input": {"command": "pytest -q"}},
    {"type": "tool_result", "text": "\u001b[32m42 passed\u001b[0m in 1.31s"},
    {"type": "assistant", "text": "All green. I add a regression test."},
]


def main(name: str, steps: int) -> None:
    """Print so many steps, each after a short pause."""
    tempo = random.Random(name)
    print(json.dumps({"type": "system", "subtype": "init", "agent": name}), flush=True)
    for number in range(steps):
        time.sleep(tempo.uniform(0.1, 0.5))
        if number % 5 == 4:
            print(f"warning: retrying request {number} (overloaded)", file=sys.stderr, flush=True)
        print(json.dumps(STEPS[number % len(STEPS)], ensure_ascii=False), flush=True)
    print(json.dumps({"type": "result", "subtype": "success", "turns": steps}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
