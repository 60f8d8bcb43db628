"""Scores of structured answers: StructEval-T's weights (0.2 for parsing, 0.8 for key paths) held to stricter rules, and
the benchmark's own figure beside them (sft.scoring.structeval).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sft.scoring.faults import counted, faults_of_form
from sft.scoring.formats import FORMATS, SPELLINGS, Reading, other_format, read
from sft.scoring.metrics import STRUCTURED_FIELDS
from sft.scoring.payload import DEFAULT_MARKERS, MAX_ANSWER, Payload, find_payload, whole, without_thinking
from sft.scoring.structeval import path_exists, structeval_score

_MISSING = object()


class StructuredScore(NamedTuple):
    """One answer. Rates lie within [0, 1]; None is what could not be judged for want of paths or a reference."""

    parses: bool  # strictly, see formats.read
    only: bool  # parses, and the answer is nothing but the payload
    key_rate: float | None  # share of the key paths that exist
    value_rate: float | None  # share of the reference's leaves that are equal at the same place
    exact: bool | None  # the same structure as the reference: order of keys free, order of lists not
    score: float  # round(0.2 * in_format + 0.8 * key_rate, 2)
    structeval: float | None = None  # the benchmark's own figure; only with paths, and for its five formats
    note: str = ""  # why it does not parse, or why nothing but parsing was judged
    in_format: bool = False  # parses, and is not another format that the parser happens to take (JSON for YAML)
    faults: tuple[str, ...] = ()  # what is wrong with it, names of faults.FAULTS


class Match(NamedTuple):
    """How much of a reference structure an answer has: nodes are all keys and list items below the root."""

    nodes: int
    found: int
    leaves: int
    equal: int
    exact: bool
    mistyped: int  # values of another type than the reference's
    differing: int  # other values of the same type

    @property
    def key_rate(self) -> float:
        return self.found / self.nodes

    @property
    def value_rate(self) -> float:
        return self.equal / self.leaves


def target_format(task_key: str) -> str | None:
    """The format a task asks for: `text_to_toml` -> toml, `Text to JSON` -> json, `yaml` -> yaml; else None."""
    last_word = re.split(r"[^a-z0-9]+", task_key.lower())[-1]
    name = SPELLINGS.get(last_word, last_word)
    return name if name in FORMATS else None


class _Judged(NamedTuple):
    """A text with its payload, and what the format's parser makes of that."""

    payload: Payload
    reading: Reading
    disguise: str | None  # the format it is written in instead

    @property
    def bare(self) -> bool:
        return not (self.payload.before or self.payload.after or self.payload.fenced)


def score_answer(
    answer: str,
    output_format: str,
    *,
    reference: str | None = None,
    paths: Sequence[str] = (),
    markers: Sequence[str] = DEFAULT_MARKERS,
    cut: bool = False,
) -> StructuredScore:
    """Score one answer that should be in `output_format` (one of FORMATS).

    Key paths are `paths` (StructEval's raw_output_metric) or else every key and list index of the reference's payload.
    Without paths and without a reference that parses only parsing is judged: the score is then 1.0 or 0.0. An answer in
    another format than the one asked for is no answer, unless the reference is in that one too. `cut`: it ended at the
    limit of new tokens.
    """
    gold = _judge(reference, output_format, markers) if reference is not None else None
    given = _judge(answer, output_format, markers)
    reading, answered = given.reading, given.reading.strict and (not given.disguise or bool(gold and gold.disguise))
    match = _match(gold.reading, reading if answered else Reading(None, False, "")) if gold else None
    key_rate = (_path_rate(reading.value, paths) if answered else 0.0) if paths else match and match.key_rate
    form = faults_of_form(
        answer, given.payload, output_format, parses=reading.strict, other=None if answered else given.disguise, cut=cut
    )
    if gold and not gold.bare:  # what the reference does as well is no fault
        form = tuple(name for name in form if name not in ("fence", "preface", "text after"))
    return StructuredScore(
        parses=reading.strict,
        only=reading.strict and given.payload.text.strip() == without_thinking(answer).strip(),
        key_rate=key_rate,
        value_rate=match and match.value_rate,
        exact=match and match.exact,
        score=_combine(answered, key_rate),
        structeval=structeval_score(answer, output_format, paths) if paths else None,
        note=reading.note or _note(given.disguise if not answered else None, output_format, gold, paths),
        in_format=answered,
        faults=form + (_faults_of_content(match, key_rate) if answered else ()),
    )


def _judge(text: str, output_format: str, markers: Sequence[str]) -> _Judged:
    """The whole text where it parses; else what stands between marks, in a fence or after an output marker."""
    if len(text) > MAX_ANSWER:
        return _Judged(Payload(""), Reading(None, False, f"an answer of {len(text):,} characters"), None)
    payload = whole(text)
    reading = read(payload.text, output_format)
    if not reading.strict:
        payload = find_payload(text, markers)
        reading = read(payload.text, output_format)
    return _Judged(payload, reading, other_format(payload.text, output_format))


def _match(gold: Reading, given: Reading) -> Match | None:
    """None where the reference does not parse."""
    if not gold.strict:
        return None
    match = compare(comparable(gold.value), comparable(given.value))
    return match if given.strict else match._replace(found=0, equal=0, exact=False, mistyped=0, differing=0)


def _faults_of_content(match: Match | None, key_rate: float | None) -> tuple[str, ...]:
    if match is None:
        return ("wrong key",) if key_rate is not None and key_rate < 1 else ()
    wrong = {
        "wrong key": match.found < match.nodes or (key_rate or 0) < 1,
        "wrong type": match.mistyped > 0,
        "wrong value": match.differing > 0,
        "extra key": not match.exact and match.found == match.nodes and match.equal == match.leaves,
    }
    return tuple(name for name, there in wrong.items() if there)


def _path_rate(value: Any, paths: Sequence[str]) -> float:
    return sum(path_exists(value, path) for path in paths) / len(paths)


def _combine(parses: bool, key_rate: float | None) -> float:
    return float(parses) if key_rate is None else round(0.2 * parses + 0.8 * key_rate, 2)


def _note(disguise: str | None, output_format: str, gold: _Judged | None, paths: Sequence[str]) -> str:
    if disguise:
        return f"{disguise.upper()}, not {output_format.upper()}"
    if gold is not None and not gold.reading.strict:
        return f"the reference does not parse: {gold.reading.note}"
    return "" if gold or paths else "no key paths and no reference: only parsing is judged"


class Lint(NamedTuple):
    """Training answers whose task names a format, and how many of them have which fault (names of faults.FAULTS)."""

    answers: int
    faults: dict[str, int]

    def sentence(self) -> str:
        """What a person should know before training on them; "" where nothing is wrong."""
        unparsable = sum(self.faults.get(name, 0) for name in ("empty", "trailing comma", "syntax"))
        parts = [
            (unparsable, "don't parse as their own format"),
            (self.faults.get("other format", 0), "are in another format"),
            (self.faults.get("fence", 0), "have a fence"),
            (self.faults.get("text after", 0), "have text after the payload"),
        ]
        named = [f"{count:,} {what}" for count, what in parts if count]
        return f"Of {self.answers:,} answers in a named format {', '.join(named)}" if named else ""


def lint(answers: Iterable[tuple[str, str]], markers: Sequence[str] = DEFAULT_MARKERS) -> Lint:
    """The faults of form of (task key, answer) pairs that a model is to be trained on, by the words used for its own
    answers. Text before a payload is no fault there: reasoning is taught so."""
    formats = ((target_format(task_key), answer) for task_key, answer in answers)
    found = [score_answer(answer, name, markers=markers).faults for name, answer in formats if name]
    return Lint(len(found), counted([name for name in faults if name != "preface"] for faults in found))


# Comparison with a reference -----------------------------------------------------------------------------------------


def comparable(value: Any) -> Any:
    """A parsed structure as it is compared: CSV as the list of its rows (a header alone by its names), everything else
    as it is."""
    if not isinstance(value, dict) or "csv_headers" not in value:
        return value
    return value["csv_rows"] or dict.fromkeys(value["csv_headers"])


def compare(reference: Any, answer: Any) -> Match:
    """Look up every node of a non-empty reference structure in the answer.

    Values are equal with their types (`1` is not `"1"`, but is `1.0`); in XML and CSV all values are texts.
    """
    nodes = found = leaves = equal = mistyped = differing = 0
    pending = [(reference, answer)]
    while pending:
        expected, given = pending.pop()
        for key, child in _items(expected):
            other = _lookup(given, key, expected)
            nodes += 1
            found += other is not _MISSING
            mistyped += other is not _MISSING and _kind(child) is not _kind(other)
            if isinstance(child, dict | list) and child:
                pending.append((child, other))
            else:
                leaves += 1
                equal += _same(child, other)
                differing += _kind(child) is _kind(other) and not _same(child, other)
    exact = found == nodes and equal == leaves and _count_nodes(answer) == nodes
    return Match(nodes, found, leaves, equal, exact, mistyped, differing)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, dict):
        return node.items()
    return enumerate(node) if isinstance(node, list) else ()


def _lookup(given: Any, key: Any, expected: Any) -> Any:
    if isinstance(expected, dict):
        return given.get(key, _MISSING) if isinstance(given, dict) else _MISSING
    return given[key] if isinstance(given, list) and key < len(given) else _MISSING


def _same(expected: Any, given: Any) -> bool:
    if isinstance(expected, bool) is not isinstance(given, bool):
        return False
    return bool(expected == given) or bool(expected != expected and given != given)  # NaN equals NaN here


def _kind(value: Any) -> type:
    """The type that matters: all numbers are of one kind, truth values of another."""
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _count_nodes(value: Any) -> int:
    count, pending = 0, [value]
    while pending:
        children = [child for _, child in _items(pending.pop())]
        count += len(children)
        pending.extend(children)
    return count


# Aggregates ----------------------------------------------------------------------------------------------------------


def aggregate(scores: Sequence[tuple[str, str, StructuredScore]]) -> dict[str, float]:
    """Means over (task key, format, score): `gen_parse_rate` and so on, each also `/<format>` and `/<task key>`.

    A mean is over the rows where the figure could be judged, and absent where there are none; {} for no rows.
    """
    groups: dict[str, list[StructuredScore]] = defaultdict(list)
    for task_key, output_format, score in scores:
        for suffix in {"", f"/{output_format}", f"/{task_key}" if task_key else ""}:
            groups[suffix].append(score)
    return {
        name + suffix: sum(judged) / len(judged)
        for suffix, group in sorted(groups.items())
        for name, field in STRUCTURED_FIELDS.items()
        if (judged := [float(value) for score in group if (value := getattr(score, field)) is not None])
    }
