"""Seeded synthetic records and how they look in the five formats: the source of the demo model's text and tasks.

Everything is drawn from a `random.Random`, so the same seed gives the same files on every machine.
"""

import csv
import io
import json
from random import Random
from typing import Any
from xml.sax.saxutils import escape

import yaml

FORMATS = ("json", "yaml", "toml", "xml", "csv")
KEYS = (
    "name city color size price stock email phone status level score rank team role title author pages year month day "
    "hour speed weight height width depth mode type group owner host port path user item code unit total tax brand "
    "model engine fuel seats genre artist album track region country street zone floor room bed guest plan grade "
    "course teacher topic"
).split()
GROUPS = "profile address settings account vehicle product server contact details limits budget device".split()
TABLES = "users orders books cars rooms players songs tasks items servers".split()
RECORD_WORDS = (
    "red blue green black white amber olive coral ivory navy lake river stone cloud storm maple cedar birch willow "
    "falcon eagle otter tiger panda koala wolf fox bear lion zebra horse salmon Tokyo Osaka Kyoto Nara Kobe Sapporo "
    "Paris Berlin Madrid Rome Oslo Dublin Vienna Prague Lisbon Athens Cairo Delhi Lima Quito Mika Kenji Yuki Haruto "
    "Sakura Aoi Ren Emma Liam Noah Olivia Ava Lucas Mia Ella Hugo Nina Omar Zara Ivan Petra open closed active idle "
    "ready busy draft final basic premium gold silver bronze small medium large high low fast slow north south east "
    "west alpha beta gamma delta omega jazz rock folk opera piano violin guitar drum apple banana cherry mango lemon "
    "peach plum grape pepper ginger honey sugar bread cheese butter coffee cocoa matcha copper iron nickel cobalt "
    "quartz topaz ruby pearl solar lunar comet orbit rocket shuttle anchor harbor bridge tunnel castle garden market "
    "museum library station airport forest desert island valley summit canyon meadow"
).split()


def draw_value(random: Random) -> Any:
    """A word (55 %), two words, a whole number or a boolean."""
    kind = random.random()
    if kind < 0.55:
        return random.choice(RECORD_WORDS)
    if kind < 0.65:
        return f"{random.choice(RECORD_WORDS)} {random.choice(RECORD_WORDS)}"
    if kind < 0.92:
        return random.randint(1, 999)
    return random.random() < 0.5


def draw_flat(random: Random, low: int, high: int) -> dict[str, Any]:
    return {key: draw_value(random) for key in random.sample(KEYS, random.randint(low, high))}


def draw_table(random: Random) -> list[dict[str, Any]]:
    """Two or three rows under the same two or three columns."""
    columns = random.sample(KEYS, random.randint(2, 3))
    return [{column: draw_value(random) for column in columns} for _ in range(random.randint(2, 3))]


def draw_record(random: Random, tabular: bool) -> Any:
    """A list of rows where CSV takes part, else a flat record or one with a nested group."""
    if tabular:
        return draw_table(random)
    record = draw_flat(random, 2, 4)
    if random.random() < 0.4:
        record[random.choice(GROUPS)] = draw_flat(random, 2, 3)
    return record


def scalar_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_json(record: Any) -> str:
    return json.dumps(record)


def to_yaml(record: Any) -> str:
    return yaml.safe_dump(record, sort_keys=False).rstrip("\n")


def toml_lines(record: dict[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in record.items() if not isinstance(value, dict)]


def to_toml(record: Any) -> str:
    if isinstance(record, list):
        return "\n".join("\n".join(["[[rows]]", *toml_lines(row)]) for row in record)
    tables = [[f"[{key}]", *toml_lines(value)] for key, value in record.items() if isinstance(value, dict)]
    return "\n".join(toml_lines(record) + [line for table in tables for line in table])


def xml_element(key: str, value: Any) -> str:
    nested = isinstance(value, dict)
    inner = "".join(xml_element(*pair) for pair in value.items()) if nested else escape(scalar_text(value))
    return f"<{key}>{inner}</{key}>"


def to_xml(record: Any) -> str:
    rows = [("row", row) for row in record] if isinstance(record, list) else record.items()
    return "<root>" + "".join(xml_element(key, value) for key, value in rows) + "</root>"


def to_csv(record: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, record[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: scalar_text(value) for key, value in row.items()} for row in record)
    return buffer.getvalue().rstrip("\n")


def flat_text(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} is {scalar_text(value)}" for key, value in record.items())


def to_text(record: Any) -> str:
    """The record in words: what the text_to_* tasks start from."""
    if isinstance(record, list):
        return "\n".join(f"row {number}: {flat_text(row)}" for number, row in enumerate(record, 1))
    own = {key: value for key, value in record.items() if not isinstance(value, dict)}
    groups = [f"{key} has {flat_text(value)}" for key, value in record.items() if isinstance(value, dict)]
    return "; ".join([flat_text(own), *groups])


RENDER = {"json": to_json, "yaml": to_yaml, "toml": to_toml, "xml": to_xml, "csv": to_csv, "text": to_text}


def draw_document(random: Random) -> str:
    """One pre-training document: the same record under several format headings, no chat in it.

    About one in seven is a list of words said twice: that makes copying pay from the first steps on.
    """
    if random.random() < 0.15:
        words = random.choices(RECORD_WORDS + KEYS, k=random.randint(4, 16))
        line = random.choice((" ", ", ", "\n")).join(words)
        return f"{line}\n{line}"
    tabular = random.random() < 0.35
    record = draw_record(random, tabular)
    formats = [name for name in ("text", *FORMATS) if tabular or name != "csv"]
    chosen = random.sample(formats, random.randint(2, 4))
    blocks = [f"# {name.upper()}\n{RENDER[name](record)}" for name in chosen]
    if random.random() < 0.5:  # without its heading the first block shows how a format begins
        blocks[0] = RENDER[chosen[0]](record)
    return "\n".join(blocks)


def draw_task(random: Random, source: str, target: str) -> dict[str, Any]:
    """One row of messages: the record in `source` and the answer in `target`."""
    record = draw_record(random, tabular="csv" in (source, target))
    given = RENDER[source](record)
    if source == "text":
        prompt = f"Write this as {target.upper()}:\n{given}"
    else:
        prompt = f"Convert the following {source.upper()} to {target.upper()}:\n{given}"
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": RENDER[target](record)}],
        "subcategory": f"{source}_to_{target}",
    }
