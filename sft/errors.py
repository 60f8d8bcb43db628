"""The two ways a run ends badly; train.py turns them into exit codes."""

from collections.abc import Iterable


class Problems(Exception):
    """The person must change something (exit code 2). Carries every problem found, each with name, value and remedy."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """The run failed for a reason outside the settings (exit code 1). The message is plain and ends with advice."""
