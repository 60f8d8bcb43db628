"""What a large unchanged file's digest and a passed audit are remembered by, and what makes them be asked again."""

import os
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from sft.data.labels import audit as auditing
from sft.data.labels.label import label
from sft.data.sources import store
from sft.data.sources.load import load_source
from sft.settings import Source
from sft.storage.seals import xxh3
from tests.tiny import tokenizer, write_rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    seen: list[str] = []

    def hashed(path: Path) -> str:
        seen.append(path.name)
        return xxh3(path)

    monkeypatch.setattr(store, "xxh3", hashed)
    return seen


def large(path: Path) -> Path:
    path.write_bytes(b"0123456789abcdef" * (store._WORTH_REMEMBERING // 16))
    time.sleep(2 * store._TICK / 1e9)
    return path


def test_an_unchanged_file_is_read_once(cache: Path, read: list[str]):
    """By inode, size and times."""
    path = large(cache / "rows.jsonl")
    assert [store.digest_of(path) for _ in range(3)] == [xxh3(path)] * 3
    assert read == ["rows.jsonl"]


@pytest.mark.parametrize("times", ["as they come", "set back"])
def test_one_changed_byte_is_seen(cache: Path, read: list[str], times: str):
    """Though size, inode and, set back by hand, even the time of the last change are the same."""
    path = large(cache / "rows.jsonl")
    before, was = store.digest_of(path), path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"!")
    if times == "set back":
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert store.digest_of(path) == xxh3(path) != before
    assert read == ["rows.jsonl"] * 2


def test_a_file_that_was_just_written_is_not_remembered(cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch):
    """A second change within a tick of the clock would leave its times as they are."""
    path = large(cache / "rows.jsonl")
    monkeypatch.setattr(store, "_TICK", 10**12)
    assert store.digest_of(path) == store.digest_of(path)
    assert read == ["rows.jsonl"] * 2


def test_a_damaged_note_is_no_digest(cache: Path, read: list[str]):
    """The file is read then."""
    path = large(cache / "rows.jsonl")
    store.digest_of(path)
    (note,) = (cache / "cache" / "staged_sft" / "digests").iterdir()
    for text in ("", "[]", '{"file": null}'):
        note.write_text(text)
        assert store.digest_of(path) == xxh3(path)
    assert len(read) == 4


def test_rows_that_passed_the_audit_are_audited_once(cache: Path, make_settings: Any, monkeypatch: pytest.MonkeyPatch):
    """Other settings are other rows; rows of which the file says something else are looked at again."""
    looked: list[int] = []
    problems = auditing._problems

    def counted(*arguments: Any) -> list[str]:
        looked.append(1)
        return problems(*arguments)

    monkeypatch.setattr(auditing, "_problems", counted)
    source, words = Source(id=str(write_rows(cache / "rows.jsonl", 20))), tokenizer()
    for settings, expected in (({}, 1), ({}, 1), ({"train_on_prompt": True}, 2), ({}, 2)):
        made = make_settings(**settings)
        rows = label(load_source(source), words, made)
        assert auditing.audit(rows, words, made) == []
        assert len(looked) == expected
    (mark,) = {path for path in store.cache_folder().glob("*.audited") if path.stem == rows.labels.stem}
    mark.write_text("1 another digest")
    assert auditing.audit(rows, words, make_settings()) == []
    assert len(looked) == 3
