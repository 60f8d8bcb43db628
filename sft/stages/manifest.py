"""stage.json: the record of a stage, read back only when it is whole."""

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError

from sft.settings.values import RECORD, SourceRecord
from sft.settings.variants import MARK
from sft.stages.paths import MANIFEST
from sft.storage.json_files import DamagedFile, json_text, plain, read_json

_PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")


class ParentRecord(BaseModel):
    """The result of an earlier stage, as the stage was made from it."""

    model_config = RECORD

    stage: int
    adapter_sha256: str


class SettingRecord(BaseModel):
    """A setting's value as JSON, and where it was said."""

    model_config = RECORD

    value: Any
    origin: str


class Manifest(BaseModel):
    """stage.json, key by key in the order of the file; None where nothing is known yet. `stage` 0: there is none."""

    model_config = RECORD

    stage: int = 0
    status: Literal["running", "complete", "failed"] = "running"
    base_model: str = ""
    parents: list[ParentRecord] = []
    settings: dict[str, SettingRecord] = {}
    sources: list[SourceRecord] = []
    inputs: dict[str, str] = {}
    train_rows: int | None = None
    val_rows: int | None = None
    dropped: dict[str, int] = {}
    replay: list[dict[str, Any]] = []
    tokens: dict[str, int | None] = {"total": None, "trained": None}
    steps: int | None = None
    metrics: dict[str, Any] = {}
    merge: dict[str, Any] | None = None
    adapter_sha256: str | None = None
    versions: dict[str, str | None] = {}
    mlflow_run_id: str | None = None
    started: str | None = None
    finished: str | None = None
    upsampling: list[dict[str, Any]] = []
    masked_loss: dict[str, Any] | None = None
    forgetting: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """What is written: the keys that were set."""
        return self.model_dump(exclude_unset=True)

    def changed(self, **fields: Any) -> Self:
        """With these keys set, to their values as JSON has them."""
        kept = {name: value for name, value in self if name in self.model_fields_set}
        return self.model_validate(kept | plain(fields))

    def values(self) -> dict[str, Any]:
        """The settings' values by name."""
        return {name: record.value for name, record in self.settings.items()}

    def tried(self) -> dict[str, Any]:
        """The values of those that came from `--try`."""
        return {name: record.value for name, record in self.settings.items() if record.origin == MARK}


_NEEDED = ("stage", "status", "base_model", "parents", "settings", "sources", "inputs", "adapter_sha256")
_SOMETIMES = {"upsampling", "masked_loss", "forgetting", "gate", "error"}  # not written before they are set


def blank_manifest() -> Manifest:
    """Every key that all stages have, without a value where only training can give one."""
    return Manifest.model_validate(Manifest().model_dump(exclude=_SOMETIMES))


def read_manifest(folder: Path, number: int) -> Manifest | None:
    """The manifest of stage `number`, None where there is no stage.json. Raises DamagedFile naming what is wrong."""
    path = folder / MANIFEST
    try:
        record = read_json(path)
        manifest = Manifest.model_validate(record)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the whole of it"
        raise DamagedFile(f"{path}: damaged at {place}") from error
    if missing := [name for name in _NEEDED if name not in manifest.model_fields_set]:
        raise DamagedFile(f"{path}: damaged at {missing[0]}")
    if not is_intact(record):
        raise DamagedFile(f"{path}: damaged, its content is not what was written")
    if manifest.stage != number:
        raise DamagedFile(f"{path}: is the manifest of stage {manifest.stage}, not of stage {number}")
    return manifest


def readable_parts(record: dict[str, Any]) -> Manifest:
    """For a report, which shows what it can: a manifest without the keys whose values can't be used."""
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        damaged = {each["loc"][0] for each in error.errors()}
        return Manifest.model_validate({name: value for name, value in record.items() if name not in damaged})


def with_digest(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the sha256 of its own text, by which a flipped bit in it is noticed."""
    plain = {name: value for name, value in record.items() if name != "digest"}
    return plain | {"digest": hashlib.sha256(json_text(plain).encode()).hexdigest()}


def is_intact(record: dict[str, Any]) -> bool:
    """Whether a record read from disk is what was written; one without a digest was written by hand."""
    return "digest" not in record or with_digest(record)["digest"] == record["digest"]


def versions() -> dict[str, str | None]:
    """Versions of the libraries that decide a result, None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
