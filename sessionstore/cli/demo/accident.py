"""What the demo does to one of its workers: it is killed half way through a job.

Its lease runs out, a reaper finds that out and sets the session to ``error``, and another worker
claims the session and does the job again from its beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from sessionstore import SessionStore
from sessionstore.cli.demo.worker import Job

#: Output entries in the store that make half of the job.
HALF_WAY = 6
#: Seconds after which a session must have fallen to ``error``: many times lease and grace period.
PATIENCE = 30.0


class Stage(Enum):
    """How far it has come."""

    NONE = "there is none in this demo"
    AHEAD = "the job has not come half way"
    KILLED = "the worker is dead, its session still busy"
    HANDED_ON = "the session has fallen to error, the job is anybody's"
    FINISHED = "another worker has finished the job"


@dataclass
class Accident:
    """One worker's death, and what follows from it."""

    job: Job | None = None
    kill: Callable[[int], None] = lambda _: None  # a worker, by its number
    hand_on: Callable[[Job], None] = lambda _: None
    stage: Stage = Stage.NONE
    session_id: str = ""
    killed: int = 0  # the worker's number
    finished_by: int = 0
    lost_owner: str = ""  # its name in the store
    kept: tuple[int, int] = (0, 0)  # entries of output and errors that it had surely stored
    killed_at: float = 0.0  # time.monotonic()
    seconds_to_error: float = 0.0

    def plan(self, job: Job, kill: Callable[[int], None], hand_on: Callable[[Job], None]) -> None:
        """Let it happen to whichever worker gets this job."""
        self.job, self.kill, self.hand_on = job, kill, hand_on
        self.stage = Stage.AHEAD

    def watch(self, store: SessionStore, session_id: str | None, worker: int) -> bool:
        """Look at the job's session and do what is due; True if the stage is another now."""
        if session_id is None or self.stage not in (Stage.AHEAD, Stage.KILLED):
            return False
        session = store.get_session(session_id, tail=0)
        if self.stage is Stage.AHEAD:
            if session.owner is None or session.output_total < HALF_WAY:
                return False
            self.session_id, self.killed, self.lost_owner = session_id, worker, session.owner
            self.kept = (session.output_total, session.error_total)
            self.kill(worker)
            self.killed_at = time.monotonic()
            self.stage = Stage.KILLED
            return True
        self.seconds_to_error = time.monotonic() - self.killed_at
        if session.status != "error" and self.seconds_to_error < PATIENCE:
            return False
        assert self.job is not None
        self.hand_on({**self.job, "session_id": session_id})
        self.stage = Stage.HANDED_ON
        return True
