"""The two ways a run ends badly, and words that messages share; train.py turns the ends into exit codes."""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any


class Problems(Exception):
    """The person must change something (exit code 2). Carries every problem found, each with name, value and remedy.

    `every_rank`: of several processes not only the main one says it; others may not have the problem.
    """

    def __init__(self, problems: Iterable[str], *, every_rank: bool = False) -> None:
        self.problems, self.every_rank = list(problems), every_rank
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:  # found by another process, it arrives as it was
        return partial(type(self), every_rank=self.every_rank), (self.problems,)


class RunFailed(Exception):
    """The run failed for a reason outside the settings (exit code 1). The message is plain and ends with advice."""


_HERE = Path(__file__).resolve().parents[1]
REPOSITORY = _HERE if (_HERE / "train.py").is_file() else None
"""The repository this runs from; None where the package was installed and stands among others."""
STARTED_AS = "python train.py" if REPOSITORY else "staged-sft"
"""What a person types to start a stage."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


SECRET_NAME = re.compile(r"TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE)
"""In a name: its value is nobody's business."""
# A password of an address, an access token (16 characters: shorter ones are words), a query that is named like one.
_CREDENTIALS = re.compile(
    r"(?<=://)[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_\w{30,}|\bsk-[\w-]{30,}|\bAKIA[0-9A-Z]{16}"
    rf"|(?<=[?&])(?P<name>(?i:[\w.-]*(?:{SECRET_NAME.pattern}|SIGNATURE)[\w.-]*=))[^&#\s\"'`]+"
)


def hide_secrets(text: str) -> str:
    """The text with credentials inside URLs and access tokens replaced by ***."""
    return _CREDENTIALS.sub(lambda match: (match["name"] or "") + "***", text)


_REFUSED_PICKLE = re.compile(r"Weights only load failed\.[^\n]*")
_UNSAFE_ADVICE = re.compile(
    r"\n[^\n]*(?:[Rr]e-running `?torch\.load|safe_globals|weights_only=False|documentation of torch\.load)[^\n]*"
)


def plainly(text: str) -> str:
    """A library's message as it may be passed on: without credentials, and without torch's advice on how to load a
    pickle that could run code."""
    refused = "a pickled file holds more than tensors and could run code, so it is not loaded; take safetensors instead"
    return hide_secrets(_UNSAFE_ADVICE.sub("", _REFUSED_PICKLE.sub(refused, text)))


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own errors, the system's, those of a name it does not like, and those of the
    HTTP library under it, which changed with its versions 1 and 2."""
    from huggingface_hub.errors import HfHubHTTPError

    below = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (HfHubHTTPError, *below, OSError, ValueError)
