"""JSON text -> its keys and scalars with character spans. The standard parser gives values without their places.

Iterative, so that ten thousand open brackets cost memory in proportion and no recursion.
"""

import hashlib
import json
import re
from typing import NamedTuple

_STRING = r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_NUMBER = r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
_TOKEN = re.compile(
    rf"[ \t\n\r]*+(?:(?P<string>{_STRING})|(?P<scalar>{_NUMBER}|true|false|null)|(?P<mark>[{{}}\[\]:,]))"
)
_BLANK = re.compile(r"[ \t\n\r]*+")

_OPENED = {"value": "{[", "item or end": "{["}
_CLOSED = {"key or end": "}", "item or end": "]", "comma or end": "}]"}
_AFTER_COMMA = {"}": "key", "]": "value"}
_LONG_PATH = (
    512  # characters; beyond it a path is named by its digest, or nested rows would grow with the square of depth
)


class Leaf(NamedTuple):
    """A key or a scalar at characters start:end (no quotes). `path` and `name` are JSON text without outer brackets."""

    kind: str
    path: str
    name: str
    start: int
    end: int


def scan(text: str, start: int, end: int) -> list[Leaf] | None:
    """Every key and scalar of the JSON object or list that fills text[start:end]; None where that is not valid JSON."""
    scanner = _Scanner()
    while scanner.state != "done":
        match = _TOKEN.match(text, start, end)
        if match is None or not scanner.accept(match):
            return None
        start = match.end()
    blank = _BLANK.match(text, start, end)
    return scanner.leaves if blank is not None and blank.end() == end else None


def canonical(text: str) -> str:
    """A string as JSON text that UTF-8 can store; one text for one string, a lone surrogate stays an escape."""
    written = json.dumps(text, ensure_ascii=False)
    return written if _storable(written) else json.dumps(text)


class _Scanner:
    """What may come next, the open brackets, and the leaves so far."""

    def __init__(self) -> None:
        self.state = "value"
        self.path = ""
        self.open: list[tuple[str, str]] = []  # (closing bracket, path of the members)
        self.leaves: list[Leaf] = []

    def accept(self, match: re.Match[str]) -> bool:
        """Take one token; False where the grammar has no place for it."""
        kind = str(match.lastgroup)
        start, end = match.span(kind)
        if kind == "mark":
            return self._mark(match[kind])
        name = _name(match[kind])
        if kind == "string":
            start, end = start + 1, end - 1
            if self.state in ("key", "key or end"):
                return self._key(name, start, end)
        return self._scalar(name, start, end)

    def _key(self, name: str, start: int, end: int) -> bool:
        parent = self.open[-1][1]
        self.leaves.append(Leaf("key", parent, name, start, end))
        self.path = _joined(parent, name)
        self.state = "colon"
        return True

    def _scalar(self, name: str, start: int, end: int) -> bool:
        # A bare scalar is a valid JSON text but has no key to hang on: prose such as "42" is not a payload.
        if self.state not in _OPENED or not self.open:
            return False
        self.leaves.append(Leaf("value", self.path, name, start, end))
        self.state = "comma or end"
        return True

    def _mark(self, mark: str) -> bool:
        if mark in _OPENED.get(self.state, ""):
            return self._open(mark)
        if self.open and mark == self.open[-1][0] and mark in _CLOSED.get(self.state, ""):
            self.open.pop()
            self.state = "comma or end" if self.open else "done"
            return True
        if mark == ":" and self.state == "colon":
            self.state = "value"
            return True
        if mark == "," and self.state == "comma or end":
            closing, self.path = self.open[-1]
            self.state = _AFTER_COMMA[closing]
            return True
        return False

    def _open(self, mark: str) -> bool:
        if mark == "[":
            self.path = _joined(self.path, "[]")
        self.open.append(("]" if mark == "[" else "}", self.path))
        self.state = "item or end" if mark == "[" else "key or end"
        return True


def _joined(path: str, element: str) -> str:
    longer = f"{path}, {element}" if path else element
    if len(longer) <= _LONG_PATH:
        return longer
    return json.dumps({"digest": hashlib.blake2b(longer.encode(errors="surrogatepass"), digest_size=16).hexdigest()})


def _name(lexeme: str) -> str:
    return canonical(json.loads(lexeme)) if lexeme[0] == '"' and "\\" in lexeme else lexeme


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
