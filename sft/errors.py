"""The two ways a run ends badly; train.py turns them into exit codes."""

from collections.abc import Iterable


class Problems(Exception):
    """The person must change something (exit code 2). Carries every problem found, each with name, value and remedy.

    `every_rank`: of several processes not only the main one says it; others may not have the problem.
    """

    def __init__(self, problems: Iterable[str], *, every_rank: bool = False) -> None:
        self.problems, self.every_rank = list(problems), every_rank
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """The run failed for a reason outside the settings (exit code 1). The message is plain and ends with advice."""
