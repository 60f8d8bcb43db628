"""The five text formats of StructEval-T, read by real parsers that no answer can hang, crash or make run anything.

Limits hold before and after parsing, since parsers differ in what breaks them: PyYAML's C loader kills the process at a
few thousand nested brackets, tomllib is quadratic in the dots of a key, YAML's merge keys grow exponentially.
"""

import csv
import io
import json
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple
from xml.sax import SAXException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl, InputSource

import yaml
from defusedxml.expatreader import create_parser

FORMATS = ("json", "yaml", "toml", "xml", "csv")
MAX_PAYLOAD = 100_000  # characters; the slowest reader needs 0.3 s for the worst of that length
MAX_DEPTH = 100
MAX_NODES = 20_000
MAX_ALIASES = 20
MAX_MERGED = 300_000  # n aliases used in merge keys (`<<`) multiply a mapping by at most 3^(n/3)
MAX_NUMBER = 1_000  # characters; YAML's base-60 numbers are quadratic to read
MAX_DOTS = 500  # per line of TOML
# PyYAML's pure Python loader is about thirty times slower than libyaml.
MAX_YAML = MAX_PAYLOAD if yaml.__with_libyaml__ else 5_000


# Beside their own errors the parsers let these through: tomllib and json a ValueError for 5,000 digits, PyYAML an
# AttributeError for `!!timestamp x`, a KeyError for `!!bool x`, an OverflowError for a date before year 1.
_PARSER_ERRORS = (
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


class _TooLarge(ValueError):
    """The payload is over one of the limits above."""


def read(payload: str, output_format: str) -> Reading:
    """Parse a payload as one of FORMATS; never raises for any text.

    Strict means a non-empty mapping or list (prose is a YAML scalar, `7` is JSON), no NaN or Infinity in JSON, and for
    CSV at least two columns, one row below the header, and rows of equal width. Of duplicate keys the last one counts
    where the parser allows them (JSON, YAML), as in StructEval; TOML and XML (attributes) refuse them.
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
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
        yaml.YAMLError,
        SAXException,
        csv.Error,
    ) as e:
        return Reading(None, False, _first_line(e, output_format))
    if not complaint and not isinstance(value, dict | list):
        complaint = f"a single value, not a {output_format.upper()} structure"
    if not complaint and not value:
        complaint = "an empty structure"
    return Reading(value, not complaint, complaint)


def _first_line(error: Exception, output_format: str) -> str:
    reason = " ".join(str(error).split())[:120]
    return reason if isinstance(error, _TooLarge) else f"not {output_format.upper()}: {reason}"


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
                raise _TooLarge(f"more than {MAX_NODES:,} values")
        nodes, level, depth = nodes + len(children), children, depth + 1
        if depth > MAX_DEPTH + 1:
            raise _TooLarge(f"nested deeper than {MAX_DEPTH} levels")


def _read_json(text: str) -> tuple[Any, str]:
    constants: list[str] = []
    value = json.loads(text, parse_constant=constants.append)
    return value, f"{constants[0]} is not JSON" if constants else ""


class _YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # chosen at run time
    """The safe loader with short numbers only."""


def _short_number(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(loader: Any, node: Any) -> Any:
        if len(node.value) > MAX_NUMBER:
            raise _TooLarge(f"a number of more than {MAX_NUMBER:,} characters")
        return construct(loader, node)

    return checked


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _short_number(yaml.SafeLoader.construct_yaml_int))
_YamlLoader.add_constructor("tag:yaml.org,2002:float", _short_number(yaml.SafeLoader.construct_yaml_float))


def _read_yaml(text: str) -> tuple[Any, str]:
    if len(text) > MAX_YAML:
        raise _TooLarge(f"longer than {MAX_YAML:,} characters")
    _check_yaml_events(text)
    return yaml.load(text, Loader=_YamlLoader), ""


def _check_yaml_events(text: str) -> None:
    """Limits that must hold before the document is composed, which is where the C loader overflows its stack."""
    depth = aliases = count = 0
    for count, event in enumerate(yaml.parse(text, Loader=_YamlLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > MAX_DEPTH:
            raise _TooLarge(f"nested deeper than {MAX_DEPTH} levels")
        if aliases > MAX_ALIASES:
            raise _TooLarge(f"more than {MAX_ALIASES} aliases")
        if count > 2 * MAX_NODES:
            raise _TooLarge(f"more than {MAX_NODES:,} values")
    if ("<<" in text or "merge" in text) and count * 3 ** (aliases / 3) > MAX_MERGED:
        raise _TooLarge("merge keys that may grow without bound")


def _read_toml(text: str) -> tuple[Any, str]:
    # Dots before the first `=` are parts of a key, and tomllib is quadratic in those; numbers and texts may have more.
    keys = (line.partition("=")[0] for line in text.split("\n"))
    if any(key.count(".") > MAX_DEPTH for key in keys) or any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise _TooLarge(f"a key of more than {MAX_DEPTH} parts, or a line with more than {MAX_DOTS} dots")
    return tomllib.loads(text), ""


class _XmlContent(ContentHandler):
    """Builds dicts as the xmltodict package does: `@attribute`, `#text`, repeated elements as lists, texts stripped."""

    def __init__(self) -> None:
        super().__init__()
        self.document: dict[str, Any] = {}
        self._open: list[tuple[dict[str, Any], list[str]]] = [(self.document, [])]

    def startElement(self, name: str, attrs: AttributesImpl) -> None:
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
    content = _XmlContent()
    parser = create_parser(forbid_dtd=True, forbid_entities=True, forbid_external=True)
    parser.setContentHandler(content)
    source = InputSource()
    source.setCharacterStream(io.StringIO(text.lstrip()))
    parser.parse(source)
    return content.document, ""


def _read_csv(text: str) -> tuple[Any, str]:
    """As StructEval keeps it: {"csv_headers": [...], "csv_rows": [{header: cell}]}; blank lines do not count."""
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    header = rows[0] if rows else []
    value = {"csv_headers": header, "csv_rows": [dict(zip(header, row, strict=False)) for row in rows[1:]]}
    return value, _csv_complaint(text, rows)


def _csv_complaint(text: str, rows: list[list[str]]) -> str:
    if len(rows) < 2:
        return "CSV without a row below its header"
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
