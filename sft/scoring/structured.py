"""Scores of structured answers: StructEval-T's figures and the strict ones it lacks.

Source of the path grammar and the 0.2 / 0.8 score: the evaluation of non-renderable tasks in StructEval
(https://github.com/TIGER-AI-Lab/StructEval). The rest is ours.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sft.scoring.formats import FORMATS, Reading, read
from sft.scoring.payload import DEFAULT_MARKERS, MAX_ANSWER, extract_payload, without_thinking

_MISSING = object()


class StructuredScore(NamedTuple):
    """One answer. Rates lie within [0, 1]; None is what could not be judged for want of paths or a reference."""

    parses: bool  # strictly, see formats.read
    only: bool  # parses, and the answer is nothing but the payload
    key_rate: float | None  # share of the key paths that exist
    value_rate: float | None  # share of the reference's leaves that are equal at the same place
    exact: bool | None  # the same structure as the reference: order of keys free, order of lists not
    score: float  # round(0.2 * parses + 0.8 * key_rate, 2)
    structeval: float | None = None  # the benchmark's own figure, whose parsers take prose for YAML; only with paths
    note: str = ""  # why it does not parse, or why nothing but parsing was judged


class Match(NamedTuple):
    """How much of a reference structure an answer has: nodes are all keys and list items below the root."""

    nodes: int
    found: int
    leaves: int
    equal: int
    exact: bool

    @property
    def key_rate(self) -> float:
        return self.found / self.nodes

    @property
    def value_rate(self) -> float:
        return self.equal / self.leaves


def target_format(task_key: str) -> str | None:
    """The format a task asks for: `text_to_toml` -> toml, `Text to JSON` -> json, `yaml` -> yaml; else None."""
    last_word = re.split(r"[^a-z0-9]+", task_key.lower())[-1]
    last_word = "yaml" if last_word == "yml" else last_word
    return last_word if last_word in FORMATS else None


def score_answer(
    answer: str,
    output_format: str,
    *,
    reference: str | None = None,
    paths: Sequence[str] = (),
    markers: Sequence[str] = DEFAULT_MARKERS,
) -> StructuredScore:
    """Score one answer that should be in `output_format` (one of FORMATS).

    Key paths are `paths` (StructEval's raw_output_metric) or else every key and list index of the reference's payload.
    Without paths and without a reference that parses only parsing is judged: the score is then 1.0 or 0.0.
    """
    reading, only = _read_answer(answer, output_format, markers)
    gold = read(extract_payload(reference, markers), output_format) if reference is not None else None
    match = compare(comparable(gold.value), comparable(reading.value)) if gold and gold.strict else None
    if not reading.strict and match:
        match = match._replace(found=0, equal=0, exact=False)
    benchmark_keys = _path_rate(reading.value, paths)
    key_rate = (benchmark_keys if reading.strict else 0.0) if paths else match and match.key_rate
    return StructuredScore(
        parses=reading.strict,
        only=only,
        key_rate=key_rate,
        value_rate=match and match.value_rate,
        exact=match and match.exact,
        score=_combine(reading.strict, key_rate),
        structeval=_combine(bool(reading.value), benchmark_keys) if paths else None,
        note=reading.note or _unjudged(gold, paths),
    )


def _read_answer(answer: str, output_format: str, markers: Sequence[str]) -> tuple[Reading, bool]:
    if len(answer) > MAX_ANSWER:
        return Reading(None, False, f"an answer of {len(answer):,} characters"), False
    payload = extract_payload(answer, markers)
    reading = read(payload, output_format)
    return reading, reading.strict and payload.strip() == without_thinking(answer).strip()


def _combine(parses: bool, key_rate: float | None) -> float:
    return float(parses) if key_rate is None else round(0.2 * parses + 0.8 * key_rate, 2)


def _unjudged(gold: Reading | None, paths: Sequence[str]) -> str:
    if gold is not None and not gold.strict:
        return f"the reference does not parse: {gold.note}"
    return "" if gold or paths else "no key paths and no reference: only parsing is judged"


# Key paths -----------------------------------------------------------------------------------------------------------

_PATH_TOKEN = re.compile(r"\[[^\]]*\]|\[.*|(?:`[^`]*`?|[^.`\[])+")


def path_exists(value: Any, path: str) -> bool:
    """StructEval's path grammar: dots, `[n]`, `*` for any list element, back-ticks quote a key, `csv::Header`, and
    `@attr` falls back to `attr`. A malformed path exists nowhere (StructEval raises)."""
    nodes = [value]
    for token in _path_tokens(path):
        nodes = [child for node in nodes for child in _step(node, token)]
    return bool(nodes)


def _path_rate(value: Any, paths: Sequence[str]) -> float:
    return sum(path_exists(value, path) for path in paths) / len(paths) if paths else 0.0


def _path_tokens(path: str) -> list[str]:
    if path.startswith("csv::"):
        return [path]
    return [token if token.startswith("[") else token.replace("`", "") for token in _PATH_TOKEN.findall(path)]


def _step(node: Any, token: str) -> Iterator[Any]:
    """The children of a node that a token names: none, one, or with `*` all elements of a list."""
    if isinstance(node, list):
        if token == "*":
            yield from node
        elif (index := re.fullmatch(r"\[\s*\+?(\d{1,9})\s*\]", token)) and int(index[1]) < len(node):
            yield node[int(index[1])]
    elif isinstance(node, dict):
        if token.startswith("csv::") and "csv_headers" in node:
            yield from [True] * (token.removeprefix("csv::") in node["csv_headers"])
        elif token in node:
            yield node[token]
        elif token.startswith("@") and token.removeprefix("@") in node:
            yield node[token.removeprefix("@")]


# Comparison with a reference -----------------------------------------------------------------------------------------


def comparable(value: Any) -> Any:
    """A parsed structure as it is compared: CSV as the list of its rows, everything else as it is."""
    return value["csv_rows"] if isinstance(value, dict) and "csv_headers" in value else value


def compare(reference: Any, answer: Any) -> Match:
    """Look up every node of a non-empty reference structure in the answer.

    Values are equal with their types (`1` is not `"1"`, but is `1.0`); in XML and CSV all values are texts.
    """
    nodes = found = leaves = equal = 0
    pending = [(reference, answer)]
    while pending:
        expected, given = pending.pop()
        for key, child in _items(expected):
            other = _lookup(given, key, expected)
            nodes += 1
            found += other is not _MISSING
            if isinstance(child, dict | list) and child:
                pending.append((child, other))
            else:
                leaves += 1
                equal += _same(child, other)
    exact = found == nodes and equal == leaves and _count_nodes(answer) == nodes
    return Match(nodes, found, leaves, equal, exact)


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


def _count_nodes(value: Any) -> int:
    count, pending = 0, [value]
    while pending:
        children = [child for _, child in _items(pending.pop())]
        count += len(children)
        pending.extend(children)
    return count


# Aggregates ----------------------------------------------------------------------------------------------------------

_METRICS = {
    "gen_parse_rate": "parses",
    "gen_only_rate": "only",
    "gen_key_rate": "key_rate",
    "gen_value_rate": "value_rate",
    "gen_exact_rate": "exact",
    "gen_score": "score",
    "gen_structeval_score": "structeval",
}


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
        for name, field in _METRICS.items()
        if (judged := [float(value) for score in group if (value := getattr(score, field)) is not None])
    }
