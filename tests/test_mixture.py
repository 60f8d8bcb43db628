"""The rows of a stage: split, shares, draws, upsampling, losses; the same for the same seed."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sft.data import draws
from sft.data.labels import masks
from sft.data.losses import losses
from sft.data.mixture import Mix, mix, prepare_mix
from sft.data.sources.load import Rows
from sft.data.sources.shapes import content_hash
from sft.data.split import EARLIER, GENERATION
from sft.errors import Problems
from sft.settings import Source
from sft.settings.values import SourceRecord
from tests.conftest import byte_tokenizer, word_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def labelled(
    answers: list[str], *, task_keys: list[str] | None = None, packs: list[str] | None = None, **source: Any
) -> Rows:
    """Labelled rows with these answers; tokens are of no importance here: two each, one trained."""
    count = len(answers)
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in answers]
    columns = {
        "messages": chats,
        "task_key": task_keys or [""] * count,
        "pack": packs or [""] * count,
        "content_hash": [content_hash(chat) for chat in chats],
        "extras": [None] * count,
        "number": range(1, count + 1),
        "input_ids": [[1, 2]] * count,
        "labels": [[-100, 2]] * count,
        "length": [2] * count,
        "trained": [1] * count,
    }
    schema = pa.schema([*masks.CARRIED, *masks._LABELS.items()])
    table = pa.Table.from_pydict(columns, schema=schema)
    return Rows(Source(**{"id": "source", **source}), datasets.Dataset(table), Counter(), "f")


def texts(count: int, prefix: str = "a") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def drawn(mixed: Mix) -> list[tuple[int, int]]:
    """(source, row) of the training rows in their order."""
    return list(zip(mixed.train["source"], mixed.train["row"], strict=True))


def answers(dataset: datasets.Dataset) -> list[str]:
    return [chat[-1]["content"] for chat in dataset["messages"]]


# Shares and draws


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([1.0, 2.0], 1000, [333, 667]),
        ([1.0, 1.0, 1.0], 100, [34, 33, 33]),
        ([2.0, 1.5, 2.5, 1.0], 7, [2, 2, 2, 1]),
        ([0.1, 0.2], 3, [1, 2]),
        ([1.0, 0.0], 5, [5, 0]),
        ([1.0, 3.0], 0, [0, 0]),
    ],
)
def test_shares(weights: list[float], total: int, expected: list[int]):
    """Largest remainders, the first of equal ones; document 000's example of 1000 rows at 1.0 and 2.0 is 333 + 667."""
    assert draws.shares(weights, total) == expected


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 10_000))
def test_shares_are_exact_and_fair(weights: list[float], total: int):
    """The sum is the total, and no share is a whole row away from its weight."""
    counts = draws.shares(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6 * total


@given(st.integers(1, 50), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_a_draw_gives_every_row_whole_times(rows: int, count: int, seed: int):
    """Of 5 rows 12 are each row twice and two of them once more."""
    numbers = np.arange(10, 10 + rows)
    times = Counter(draws.draw(numbers, rows, count, seed=seed, stream=0).tolist())
    assert sum(times.values()) == count
    assert set(times) <= set(numbers.tolist())
    whole, rest = divmod(count, rows)
    assert sorted(times[number] for number in numbers.tolist()) == [whole] * (rows - rest) + [whole + 1] * rest


def test_the_contract_s_example(make_settings: Any):
    """1000 rows at 1.0 and 500 at 2.0 give 333 + 667; the 500 rows are drawn once or twice each."""
    sources = [labelled(texts(1000, "a"), id="a"), labelled(texts(500, "b"), id="b", weight=2.0)]
    mixed = mix(sources, make_settings(val_ratio=0.0))
    times = Counter(drawn(mixed))
    assert len(mixed.train) == 1000
    assert [record.drawn for record in mixed.sources] == [333, 667]
    assert Counter(count for (source, _), count in times.items() if source == 0) == {1: 333}
    assert Counter(count for (source, _), count in times.items() if source == 1) == {1: 333, 2: 167}


def test_total_size_limits_repeat_and_single_sources(make_settings: Any):
    """A single source gives every row once, times `repeat`; SFT_DATASET_MIX_TOTAL_SIZE replaces the largest source."""
    settings = make_settings(val_ratio=0.0)
    counts = lambda mixed: sorted(Counter(drawn(mixed)).values())  # noqa: E731
    assert counts(mix([labelled(texts(4))], settings)) == [1] * 4
    assert counts(mix([labelled(texts(4), repeat=2.5)], settings)) == [2, 2, 3, 3]
    assert counts(mix([labelled(texts(4), repeat=0.5)], settings)) == [1, 1]
    assert counts(mix([labelled(texts(4))], make_settings(val_ratio=0.0, dataset_mix_total_size=6))) == [1, 1, 2, 2]
    two = [labelled(texts(4), repeat=3.0), labelled(texts(6, "b"))]
    assert [record.drawn for record in mix(two, settings).sources] == [6, 6]


def test_a_source_without_rows_takes_no_share(make_settings: Any):
    """Its weight is left out and the mix says so."""
    mixed = mix([labelled(texts(3)), labelled([], id="empty")], make_settings(val_ratio=0.0))
    assert [record.drawn for record in mixed.sources] == [3, 0]
    assert mixed.warnings == ["[WARNING] empty: no row is left to train on"]


def test_the_mix_hangs_on_the_seed_alone(make_settings: Any):
    """Equal seeds give equal rows in equal order, and nothing draws from numpy's global state."""
    sources = [labelled(texts(40)), labelled(texts(30, "b"), weight=3.0)]
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first, again, other = (drawn(mix(sources, make_settings(seed=seed))) for seed in (1, 1, 2))
    assert np.random.get_state()[1].tolist() == before
    assert first == again
    assert sorted(first) != sorted(other)
    assert first != sorted(first)


def test_the_order_asked_for(make_settings: Any):
    """mix: all together; sources: one after the other; none: as in the files, pass by pass where rows are repeated."""
    sources = [labelled(texts(20, "a")), labelled(texts(8, "b"), repeat=2.5)]
    options = {"val_ratio": 0.0, "dataset_mix_total_size": 40}
    orders = {name: drawn(mix(sources, make_settings(shuffle=name, **options))) for name in ("mix", "sources", "none")}
    assert sorted(orders["mix"]) == sorted(orders["sources"]) == sorted(orders["none"])
    assert [source for source, _ in orders["sources"]] == [0] * 20 + [1] * 20
    assert orders["sources"] != sorted(orders["sources"])
    assert [source for source, _ in orders["mix"]] != sorted(source for source, _ in orders["mix"])
    assert [row for source, row in orders["none"] if source == 0] == list(range(20))
    second = [row for source, row in orders["none"] if source == 1]
    assert second[:16] == [*range(8), *range(8)]
    assert second[16:] == sorted(second[16:])
    assert len(second) == 20


# Validation


@pytest.mark.parametrize(
    ("rows", "ratio", "expected"), [(100, 0.05, 5), (3, 0.05, 1), (2, 0.9, 1), (1, 0.5, 0), (9, 0.0, 0)]
)
def test_the_size_of_the_validation_split(make_settings: Any, rows: int, ratio: float, expected: int):
    """At least one row where there are two, never all of them, none at ratio 0."""
    mixed = mix([labelled(texts(rows))], make_settings(val_ratio=ratio))
    assert (len(mixed.val), len(mixed.train)) == (expected, rows - expected)
    assert mixed.sources[0].validation_rows == expected


def test_no_validation_row_is_trained_on(make_settings: Any):
    """The same data set twice, an overlapping one and duplicates within: contents are on one side only."""
    first = texts(60) + ["a1", "a2", "a3"] * 5
    sources = [labelled(first), labelled(first), labelled(texts(30) + texts(30, "b"))]
    settings = make_settings(
        val_ratio=0.3, use_upsampling=True, upsample_rules={"pack:": 2.0}, dataset_mix_total_size=1000
    )
    mixed = mix(sources, settings)
    trained = {answers(sources[source].dataset.select([row]))[0] for source, row in set(drawn(mixed))}
    held = answers(mixed.val)
    assert len(set(held)) == len(held)
    assert not trained & set(held)
    assert trained | set(held) == {*texts(60), *texts(30, "b")}


def test_a_row_keeps_its_side_when_rows_are_added(make_settings: Any):
    """What was held out stays held out, as far as there is room: a later stage with the same data does not train it."""
    few, many = (answers(mix([labelled(texts(count))], make_settings(val_ratio=0.2)).val) for count in (100, 120))
    assert (len(few), len(many)) == (20, 24)
    assert len(set(few) & set(many)) >= 16


def test_evaluation_sources_replace_the_split(make_settings: Any):
    """All their rows are validation rows, in order; equal training rows are left out, counted and told."""
    mixed = mix([labelled(texts(10))], make_settings(), evaluation=[labelled(["x", "a3", "y"], id="eval")])
    assert answers(mixed.val) == ["x", "a3", "y"]
    assert sorted(row for _, row in drawn(mixed)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert mixed.dropped == {"equal to a validation row": 1}
    assert mixed.warnings == ["[WARNING] source: rows are left out (1 equal to a validation row)"]
    assert [record.id for record in mixed.sources] == ["source"]


def test_the_split_is_a_share_of_the_contents(make_settings: Any):
    """100 rows x 20 copies at 5 %: 5 contents with their 100 copies are held out, none of it counts as lost."""
    mixed = mix([labelled(texts(100) * 20)], make_settings(val_ratio=0.05))
    assert (len(mixed.val), len(mixed.train)) == (5, 1900)
    assert mixed.dropped == {"equal to a validation row": 95}
    assert (mixed.unasked, mixed.warnings) == (0, [])


def test_what_the_split_takes_beyond_its_share_counts_as_lost(make_settings: Any):
    """One content of 11 has 90 of 100 rows: held out it takes 90 where a tenth was asked for."""
    rows = labelled(["many"] * 90 + texts(10))
    many = rows.dataset["content_hash"][:1]
    contents = np.unique(np.array(rows.dataset["content_hash"], np.uint64))
    seed = next(seed for seed in range(99) if contents[np.argmin(draws.scrambled(contents, seed))] == many)
    mixed = mix([rows], make_settings(val_ratio=0.1, seed=seed))
    assert answers(mixed.val) == ["many"]
    assert mixed.dropped == {"equal to a validation row": 89}
    assert mixed.unasked == 89 - 9  # 100 rows of 11 contents: 9 copies of the average one
    settings = make_settings(val_ratio=0.1, seed=seed)
    (problem,) = losses([rows], mixed.unasked, mixed.dropped, settings)
    assert problem.startswith("SFT_OVERLONG=drop: 80 of 100 rows would be dropped (89 equal to a validation row); ")


def test_questions_asked_elsewhere_are_left_out(make_settings: Any):
    """Contents that an earlier stage or SFT_GEN_EVAL_DATASET asks are not trained on; they are counted and named."""
    rows, asked = labelled(texts(30)), labelled(["a1", "a2"]).dataset["content_hash"]
    questions = {EARLIER: np.array(asked[:1], np.uint64), GENERATION: np.array(asked, np.uint64)}
    mixed = mix([rows], make_settings(val_ratio=0.0), questions=questions)
    assert sorted(row for _, row in drawn(mixed)) == [0, *range(3, 30)]
    assert mixed.dropped == {EARLIER: 1, GENERATION: 1}
    assert mixed.unasked == 2
    assert mixed.warnings == [f"[WARNING] source: rows are left out (1 {EARLIER}, 1 {GENERATION})"]
    assert set(mixed.held.tolist()) == set(asked)  # what an earlier stage holds is known to later ones anyway


def test_duplicates_are_removed_on_request(make_settings: Any):
    """The first of equal rows is kept, across sources; without the setting all are."""
    sources = [labelled(["a", "b", "a"]), labelled(["b", "c"], weight=1.5)]
    assert mix(sources, make_settings(val_ratio=0.0)).dropped == {}
    mixed = mix(sources, make_settings(val_ratio=0.0, deduplicate=True, dataset_mix_total_size=5))
    assert mixed.dropped == {"duplicate": 2}
    assert set(drawn(mixed)) == {(0, 0), (0, 1), (1, 1)}


# Upsampling


@pytest.mark.parametrize(
    ("rule", "task_key", "pack", "expected"),
    [
        ("text_to_toml", "text_to_toml", "", True),
        ("toml", "text_to_toml", "", True),
        ("toml", "toml_to_yaml", "", True),
        ("tom", "text_to_toml", "", False),
        ("to", "text_to_toml", "", False),
        ("text_to", "text_to_toml", "", False),
        ("pack:hard", "", "hard", True),
        ("pack:hard", "hard", "harder", False),
        ("hard", "", "hard", False),
        ("", "", "", True),
    ],
)
def test_what_a_rule_matches(rule: str, task_key: str, pack: str, expected: bool):
    """The whole key or one of its parts, never a piece of one; packs only by `pack:`."""
    assert draws.matches(rule, task_key=task_key, pack=pack) == expected


def test_upsampling_multiplies(make_settings: Any):
    """Two rules on one row multiply; whole multipliers are exact; 0 leaves rows out; the rest stays as drawn."""
    keys = ["text_to_toml", "toml_to_yaml", "text_to_json", "csv_to_xml"]
    rows = labelled(texts(4), task_keys=keys, packs=["hard", "", "hard", ""])
    rules = {"toml": 2.0, "text_to_toml": 3.0, "pack:hard": 2.0, "xml": 0.0, "text_to_tmol": 2.0}
    mixed = mix([rows], make_settings(val_ratio=0.0, use_upsampling=True, upsample_rules=rules))
    assert Counter(row for _, row in drawn(mixed)) == {0: 12, 1: 2, 2: 2}
    assert mixed.dropped == {"left out by SFT_UPSAMPLE_RULES": 1}
    assert mixed.rows_in_words() == "16 to train (source 4; upsampling +12), 0 to validate"
    assert mixed.remarks() == ["Dropped: 1 left out by SFT_UPSAMPLE_RULES"]
    assert [(record["rule"], record["multiplier"], record["matched"]) for record in mixed.upsampling] == [
        ("toml", 2.0, 2), ("text_to_toml", 3.0, 1), ("pack:hard", 2.0, 2), ("xml", 0.0, 1), ("text_to_tmol", 2.0, 0),
    ]  # fmt: skip
    assert mixed.warnings == [
        "[WARNING] SFT_UPSAMPLE_RULES: text_to_tmol matches no row; there are csv_to_xml, text_to_json, text_to_toml,"
        " toml_to_yaml, pack:hard"
    ]
    assert len(mix([rows], make_settings(val_ratio=0.0, upsample_rules=rules)).train) == 4


def test_fractions_are_drawn_by_the_row(make_settings: Any):
    """2.25 keeps each of 4000 rows twice or three times, a quarter of them three times (standard error 0.7 %)."""
    rows = labelled(texts(4000), task_keys=["text_to_toml"] * 4000)
    settings = make_settings(val_ratio=0.0, use_upsampling=True, upsample_rules={"toml": 2.25})
    times = Counter(Counter(row for _, row in drawn(mix([rows], settings))).values())
    assert set(times) == {2, 3}
    assert times[3] / 4000 == pytest.approx(0.25, abs=0.03)


def test_a_row_s_luck_is_its_own():
    """Other rows, their order and their multipliers change nothing; copies of a row are decided one by one."""
    numbers = np.arange(1000)
    alone = draws.repeats(np.full(1000, 0.5), numbers, seed=3)
    half = draws.repeats(np.full(500, 0.5), numbers[::-2].copy(), seed=3)
    assert alone[::-2].tolist() == half.tolist()
    copies = draws.repeats(np.full(1000, 0.5), np.zeros(1000, np.int64), seed=3)
    assert 400 < copies.sum() < 600
    assert alone.tolist() != draws.repeats(np.full(1000, 0.5), numbers, seed=4).tolist()


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.5), st.floats(0.1, 4), st.floats(0, 3), st.integers(0, 99)
)
def test_every_mix_adds_up(first: int, second: int, ratio: float, weight: float, multiplier: float, seed: int):
    """As many rows as the largest pool has; training and validation meet nowhere; repeats are floor or ceiling."""
    from sft.settings import Settings

    settings = Settings(
        stage=1, env_dir=Path(), base_model="a/b", out_lora_dir=Path("out"), val_ratio=ratio, seed=seed,
        use_upsampling=True, upsample_rules={"toml": multiplier},
    )  # fmt: skip
    sources = [labelled(texts(first), task_keys=["toml"] * first), labelled(texts(second, "b"), weight=weight)]
    mixed = mix(sources, settings)
    sizes = [record.rows - record.validation_rows for record in mixed.sources]
    counts = [record.drawn for record in mixed.sources]
    assert sum(counts) == max(sizes)
    kept = Counter(source for source, _ in drawn(mixed))
    assert kept[1] == counts[1]
    assert np.floor(multiplier) * counts[0] <= kept[0] <= np.ceil(multiplier) * counts[0]
    trained = {f"{'ab'[source]}{row}" for source, row in drawn(mixed)}
    assert not trained & set(answers(mixed.val))


# What comes out


def test_columns_and_token_counts(make_settings: Any):
    """Training rows have what the trainer reads and where they come from; validation rows their messages too."""
    mixed = mix([labelled(texts(10))], make_settings(val_ratio=0.2))
    assert mixed.train.column_names == ["input_ids", "labels", "length", "source", "row"]
    assert mixed.val.column_names == [
        "messages", "task_key", "pack", "extras", "input_ids", "labels", "length", "source", "row",
    ]  # fmt: skip
    assert mixed.tokens == {"total": 16, "trained": 8, "longest_row": 2}
    counts = {"rows": 10, "validation_rows": 2, "drawn": 8}
    assert mixed.sources == [SourceRecord(id="source", split="train", weight=1.0, fingerprint="f", **counts)]


def test_a_million_rows_mix_in_seconds(make_settings: Any):
    """Splitting, mixing and upsampling take at most 5 s, here of processor time, whatever else the machine does."""
    count = 500_000
    numbers = np.arange(count, dtype=np.uint64)
    one = labelled(["a"], task_keys=["text_to_toml"]).dataset.data.table
    sources = []
    for start in (0, count):
        columns = {
            name: one[name].take(pa.array(np.zeros(count, np.int64)))
            for name in ("task_key", "pack", "length", "trained")
        }
        columns["content_hash"] = pa.array(draws.scrambled(numbers + np.uint64(start), 0))
        columns |= {name: pa.nulls(count, one[name].type) for name in ("messages", "extras", "number")}
        sources.append(Rows(Source(id="big"), datasets.Dataset(pa.table(columns)), Counter(), "f"))
    settings = make_settings(
        use_upsampling=True, upsample_rules={"toml": 1.5}, dataset_mix_total_size=1_000_000, deduplicate=True
    )
    begun = time.process_time()
    mixed = mix(sources, settings)
    assert time.process_time() - begun < 5
    assert len(mixed.train) == pytest.approx(1_500_000, rel=0.01)


# prepare


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prepare_goes_on_without_a_broken_source(tmp_path: Path, make_settings: Any):
    """The text scripts look for; strict or with nothing left it is a problem."""
    good = write(tmp_path / "good.jsonl", [{"prompt": "Hi", "completion": text} for text in texts(5)])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Hi"\n', encoding="utf-8")
    both = (Source(id=str(bad)), Source(id=str(good)))
    expected = f"[ERROR] Failed to load {bad}: {bad}, line 1: broken JSON (Expecting ',' delimiter, column 16)"
    said: list[str] = []
    mixed = prepare_mix(make_settings(dataset_mix=both, val_ratio=0.0), word_tokenizer(), say=said.append)
    assert (len(mixed.train), said) == (5, [expected])
    for settings in (make_settings(dataset_mix=both, strict=True), make_settings(dataset_mix=both[:1])):
        with pytest.raises(Problems) as caught:
            prepare_mix(settings, word_tokenizer(), say=said.append)
        assert (caught.value.problems, said) == ([expected], [expected])  # told once, by the listing


def test_losing_more_than_a_tenth_is_a_problem(tmp_path: Path, make_settings: Any):
    """2 of 20 rows may go; 3 may not, unless SFT_OVERLONG was written down."""
    rows = [{"prompt": "Hi", "completion": text} for text in texts(20)]
    for lost in (2, 3):
        rows[lost - 2 : lost] = [{"prompt": "Hi", "completion": ""}] * 2
        path = write(tmp_path / f"{lost}.jsonl", rows)
        settings = make_settings(dataset_id=str(path))
        if lost == 2:
            assert prepare_mix(settings, word_tokenizer()).dropped == {"empty answer": 2}
    with pytest.raises(Problems, match=r"3 of 20 rows would be dropped \(3 empty answer \(row 1\)\)"):
        prepare_mix(settings, word_tokenizer())
    accepted = make_settings(dataset_id=str(path), origins={"SFT_OVERLONG": "stage1.env"})
    assert prepare_mix(accepted, word_tokenizer()).dropped == {"empty answer": 3}


def test_over_long_rows_can_be_an_error(tmp_path: Path, make_settings: Any):
    """SFT_OVERLONG=error says how many and what to do."""
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": "Hi", "completion": "One " * 30}, {"prompt": "a", "completion": "b"}]
    )
    settings = make_settings(dataset_id=str(path), max_seq_len=20, overlong="error")
    with pytest.raises(Problems, match="SFT_OVERLONG=error: 1 rows are longer than SFT_MAX_SEQ_LEN=20; raise it"):
        prepare_mix(settings, word_tokenizer())


def test_nothing_left_is_a_problem(tmp_path: Path, make_settings: Any):
    """An empty file, empty answers alone, a failed audit: listed, not trained on."""
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Hi", "completion": ""}] * 3)
    with pytest.raises(
        Problems, match=r"none of its 3 rows can be trained on \(3 empty answer \(row 1\)\); repair the rows"
    ):
        prepare_mix(make_settings(dataset_id=str(path), origins={"SFT_OVERLONG": "stage1.env"}), word_tokenizer())
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(Problems, match="no row is left to train on"):
        prepare_mix(make_settings(dataset_id=str(tmp_path / "rows.jsonl")), word_tokenizer())
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Hi", "completion": "One"}] * 2)
    unended = word_tokenizer("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    with pytest.raises(Problems, match="an end of turn that is not trained"):
        prepare_mix(make_settings(dataset_id=str(path)), unended)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_document_000_s_second_stage(make_settings: Any):
    """Two data sets at 1.0 and 2.0 with TOML upsampled threefold: counts by hand from the files."""
    mixing = (
        Source(id=str(SHARED / "structured_cot_512_v2.jsonl"), limit=600),
        Source(id=str(SHARED / "structured_cot_512.jsonl"), limit=300, weight=2.0),
    )
    settings = make_settings(
        dataset_mix=mixing, mask_cot=True, max_seq_len=100_000, use_upsampling=True,
        upsample_rules={"text_to_toml": 3.0, "toml_to_yaml": 2.0},
    )  # fmt: skip
    mixed = prepare_mix(settings, byte_tokenizer())
    assert [record.validation_rows for record in mixed.sources] == [30, 15]
    assert [record.drawn for record in mixed.sources] == [190, 380]
    first, second = mixed.upsampling
    assert len(mixed.train) == 570 + 2 * first["matched"] + second["matched"]
    assert first["matched"] > 0


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.5, 0.99])
def test_contents_are_chosen_and_found_as_by_telling_them_apart_first(ratio: float, copies: int):
    """The quick ways by one sort and by marks give what numpy's own functions do, row for row."""
    random = np.random.default_rng(5)
    for count in (0, 1, 2, 300):
        hashes = random.permuted(np.repeat(random.integers(0, 2**64, count, np.uint64), copies))
        contents, first = np.unique(hashes, return_index=True)
        wanted = min(max(1, round(count * ratio)), count - 1) if ratio and count > 1 else 0
        chosen = np.argsort(draws.scrambled(contents, 7), kind="stable")[:wanted]
        assert draws.validation_rows(hashes, ratio, 7).tolist() == np.sort(first[chosen]).tolist()
        assert draws.distinct(hashes) == count
        some = np.concatenate([hashes[::3], random.integers(0, 2**64, 9, np.uint64), hashes[:5] ^ np.uint64(1 << 60)])
        assert draws.among(hashes, some).tolist() == np.isin(hashes, some).tolist()
