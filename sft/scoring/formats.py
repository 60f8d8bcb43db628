"""The five text formats of StructEval-T, read by real parsers that no answer can hang, crash or make run anything.

Limits hold before and after parsing, since parsers differ in what breaks them: PyYAML's C loader kills the process at a
few thousand nested brackets, tomllib is quadratic in the dots of a key, YAML's merge keys grow exponentially.
"""

import csv
import io
import json
import tomllib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from xml.sax import SAXException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl, InputSource

import yaml
from defusedxml.expatreader import create_parser

MAX_PAYLOAD = 100_000  # characters; the slowest reader needs 0.3 s for the worst of that length
MAX_DEPTH = 100  # levels; readers and walks recurse, and Python ends at 1,000 frames
MAX_NODES = 20_000  # what aliases make of a payload counts as well
MAX_ALIASES = 20  # of nested ones each may multiply what stands before it
MAX_MERGED = 300_000  # n aliases used in merge keys (`<<`) multiply a mapping by at most 3^(n/3)
MAX_NUMBER = 1_000  # characters; YAML's base-60 numbers are quadratic to read
MAX_DOTS = 500  # per line of TOML
# PyYAML's pure Python loader is about thirty times slower than libyaml.
MAX_YAML = MAX_PAYLOAD if yaml.__with_libyaml__ else 5_000


# Beside their own errors the parsers let these through: tomllib and json a ValueError for 5,000 digits, PyYAML an
# AttributeError for `!!timestamp x`, a KeyError for `!!bool x`, an OverflowError for a date before year 1.
PARSER_ERRORS = (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    yaml.YAMLError,
    SAXException,
    csv.Error,
)


class Reading(NamedTuple):
    """What a payload says. `value` is what the format's usual parser makes of it, None where it refuses;
    `strict` adds our conditions; `note` says in a few words why it is not."""

    value: Any
    strict: bool
    note: str


class TooLarge(ValueError):
    """The payload is over one of the limits above."""


@lru_cache(maxsize=32)  # score, faults and other formats ask about one text several times; nobody changes a reading
def read(payload: str, output_format: str) -> Reading:
    """Parse a payload as one of FORMATS; never raises for any text.

    Strict means a non-empty mapping or list (prose is a YAML scalar, `7` is JSON), no NaN or Infinity in JSON, and for
    CSV at least two columns and rows as wide as the header, which may stand alone. Of duplicate keys the last one
    counts where the parser allows them (JSON, YAML), as in StructEval; TOML and XML (attributes) refuse them.
    """
    if len(payload) > MAX_PAYLOAD:
        return Reading(None, False, f"longer than {MAX_PAYLOAD:,} characters")
    if not payload.strip():
        return Reading(None, False, "empty")
    reader = _READERS[output_format]
    try:
        value, complaint = reader(payload)
        check_size(value)
    except RecursionError:
        return Reading(None, False, f"nested deeper than {MAX_DEPTH} levels")
    except PARSER_ERRORS as error:
        return Reading(None, False, _first_line(error, output_format))
    if not complaint and not isinstance(value, dict | list):
        complaint = f"a single value, not a {output_format.upper()} structure"
    if not complaint and not value:
        complaint = "an empty structure"
    return Reading(value, not complaint, complaint)


def _first_line(error: Exception, output_format: str) -> str:
    reason = " ".join(str(error).split())[:120]
    return reason if isinstance(error, TooLarge) else f"not {output_format.upper()}: {reason}"


def check_size(value: Any) -> None:
    """Refuse deep or huge structures; counts shared YAML nodes once per use, so it sees cycles and bombs too."""
    nodes, level, depth = 0, [value], 0
    while level:
        children: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                children.extend(node.values())
            elif isinstance(node, list | tuple | set):
                children.extend(node)
            if nodes + len(children) > MAX_NODES:
                raise TooLarge(f"more than {MAX_NODES:,} values")
        nodes, level, depth = nodes + len(children), children, depth + 1
        if depth > MAX_DEPTH + 1:
            raise TooLarge(f"nested deeper than {MAX_DEPTH} levels")


def _read_json(text: str) -> tuple[Any, str]:
    constants: list[str] = []
    value = json.loads(text, parse_constant=constants.append)
    return value, f"{constants[0]} is not JSON" if constants else ""


class _YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # chosen at run time
    """The safe loader with short numbers only."""


class PlainYamlLoader(yaml.SafeLoader):
    """The same in pure Python, which takes a few texts otherwise than libyaml does; StructEval uses it."""


def _short_number(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(loader: Any, node: Any) -> Any:
        if len(node.value) > MAX_NUMBER:
            raise TooLarge(f"a number of more than {MAX_NUMBER:,} characters")
        return construct(loader, node)

    return checked


for _loader in (_YamlLoader, PlainYamlLoader):
    _loader.add_constructor("tag:yaml.org,2002:int", _short_number(yaml.SafeLoader.construct_yaml_int))
    _loader.add_constructor("tag:yaml.org,2002:float", _short_number(yaml.SafeLoader.construct_yaml_float))


def _read_yaml(text: str) -> tuple[Any, str]:
    if len(text) > MAX_YAML:
        raise TooLarge(f"longer than {MAX_YAML:,} characters")
    return load_yaml(text, _YamlLoader), ""


def load_yaml(text: str, loader: Any) -> Any:
    """The document, by a safe loader of PyYAML. Raises TooLarge beyond the limits, and PARSER_ERRORS."""
    _check_yaml_events(text, loader)
    return yaml.load(text, Loader=loader)


def _check_yaml_events(text: str, loader: Any) -> None:
    """Limits that must hold before the document is composed, which is where the C loader overflows its stack."""
    depth = aliases = count = 0
    for count, event in enumerate(yaml.parse(text, Loader=loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > MAX_DEPTH:
            raise TooLarge(f"nested deeper than {MAX_DEPTH} levels")
        if aliases > MAX_ALIASES:
            raise TooLarge(f"more than {MAX_ALIASES} aliases")
        if count > 2 * MAX_NODES:
            raise TooLarge(f"more than {MAX_NODES:,} values")
    if ("<<" in text or "merge" in text) and count * 3 ** (aliases / 3) > MAX_MERGED:
        raise TooLarge("merge keys that may grow without bound")


def _read_toml(text: str) -> tuple[Any, str]:
    # Dots before the first `=` are parts of a key, and tomllib is quadratic in those; numbers and texts may have more.
    keys = (line.partition("=")[0] for line in text.split("\n"))
    if any(key.count(".") > MAX_DEPTH for key in keys) or any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise TooLarge(f"a key of more than {MAX_DEPTH} parts, or a line with more than {MAX_DOTS} dots")
    return tomllib.loads(text), ""


class _XmlContent(ContentHandler):
    """Builds dicts as the xmltodict package does: `@attribute`, `#text`, repeated elements as lists, texts stripped."""

    def __init__(self) -> None:
        super().__init__()
        self.document: dict[str, Any] = {}
        self._open: list[tuple[dict[str, Any], list[str]]] = [(self.document, [])]

    def startElement(self, name: str, attrs: AttributesImpl) -> None:
        if len(self._open) > MAX_DEPTH:  # before 30,000 open elements have been built, which takes a second
            raise TooLarge(f"nested deeper than {MAX_DEPTH} levels")
        self._open.append(({f"@{key}": value for key, value in attrs.items()}, []))

    def characters(self, content: str) -> None:
        self._open[-1][1].append(content)

    def endElement(self, name: str) -> None:
        children, pieces = self._open.pop()
        text = "".join(pieces).strip() or None
        if children and text:
            children["#text"] = text
        parent, element = self._open[-1][0], children or text
        if name not in parent:
            parent[name] = element
        elif isinstance(parent[name], list):
            parent[name].append(element)
        else:
            parent[name] = [parent[name], element]


def _read_xml(text: str) -> tuple[Any, str]:
    return load_xml(text.lstrip(), doctype=False), ""


def load_xml(text: str, *, doctype: bool) -> dict[str, Any]:
    """The document as the xmltodict package has it. `doctype` allows a document type without entities, whose outside
    parts are never fetched. Raises PARSER_ERRORS."""
    content = _XmlContent()
    parser = create_parser(forbid_dtd=not doctype, forbid_entities=True, forbid_external=not doctype)
    parser.setContentHandler(content)
    source = InputSource()
    source.setCharacterStream(io.StringIO(text))
    parser.parse(source)
    return content.document


def _read_csv(text: str) -> tuple[Any, str]:
    """As StructEval keeps it: {"csv_headers": [...], "csv_rows": [{header: cell}]}; blank lines do not count."""
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    header = rows[0] if rows else []
    value = {"csv_headers": header, "csv_rows": [dict(zip(header, row, strict=False)) for row in rows[1:]]}
    return value, _csv_complaint(text, rows)


def _csv_complaint(text: str, rows: list[list[str]]) -> str:
    if len(rows[0]) < 2:
        return "CSV of a single column"
    if len({len(row) for row in rows}) > 1:
        return "CSV rows of unequal width"
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), strict=True):
            pass
    except csv.Error as error:
        return f"not CSV: {error}"
    return ""


_READERS: dict[str, Callable[[str], tuple[Any, str]]] = {
    "json": _read_json,
    "yaml": _read_yaml,
    "toml": _read_toml,
    "xml": _read_xml,
    "csv": _read_csv,
}
"""Format -> what its parser makes of a text, and what we complain of. A reader may raise PARSER_ERRORS and no other."""
FORMATS = tuple(_READERS)
"""Every format there is. Fences, prompts, task keys and report columns go by these names; nothing else lists them."""
SPELLINGS = {"yml": "yaml"}
"""Other names that people and models have for a format."""


# Answers in another format than the one asked for ---------------------------------------------------------------------


def other_format(payload: str, output_format: str) -> str | None:
    """The format a payload is written in instead of the one asked for; None where it is in that one, or in none.

    YAML's parser takes nearly all JSON and CSV's any text with a comma, so that parsing alone says nothing there. Here
    and in `_reads_as` is what else such a format asks for; another whose parser takes texts of others joins them.
    """
    if len(payload) > MAX_PAYLOAD:
        return None
    if output_format != "csv" and read(payload, output_format).strict:
        return "json" if output_format == "yaml" and _is_json_like(payload) else None
    return next((name for name in FORMATS if name != output_format and _reads_as(payload, name)), None)


def _reads_as(payload: str, name: str) -> bool:
    reading = read(payload, name)
    if name == "yaml":
        return reading.strict and not _is_json_like(payload)
    return reading.strict and (name != "csv" or len(reading.value["csv_rows"]) > 1)


def _is_json_like(payload: str) -> bool:
    """Whether a text that YAML takes is JSON, at most with slips YAML forgives (a comma too many, single quotes)."""
    if read(payload, "json").strict:
        return True
    root = yaml.compose(payload, Loader=_YamlLoader)
    if not isinstance(root, yaml.CollectionNode) or not root.flow_style:
        return False
    keys = [key for node in _yaml_nodes(root) if isinstance(node, yaml.MappingNode) for key, _ in node.value]
    return bool(keys) and all(getattr(key, "style", None) in ("'", '"') for key in keys)


def _yaml_nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, however often it is used."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            if isinstance(node, yaml.MappingNode):
                waiting += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value
