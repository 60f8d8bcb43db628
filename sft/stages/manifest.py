"""stage.json: the record of a stage, read back only when it is whole."""

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sft.stages.paths import MANIFEST
from sft.storage.json_files import DamagedFile, json_text, read_json

_PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Parent(_Record):
    stage: int
    adapter_sha256: str


class _Source(_Record):
    id: str
    fingerprint: str | None


class _Setting(_Record):
    value: Any
    origin: str


class _Manifest(_Record):
    stage: int
    status: Literal["running", "complete", "failed"]
    base_model: str
    parents: list[_Parent]
    settings: dict[str, _Setting]
    sources: list[_Source]
    inputs: dict[str, str]
    adapter_sha256: str | None


def read_manifest(folder: Path, number: int) -> dict[str, Any] | None:
    """The manifest of stage `number`, None where there is no stage.json. Raises DamagedFile naming what is wrong."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        _Manifest.model_validate(manifest)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the whole of it"
        raise DamagedFile(f"{path}: damaged at {place}") from error
    if not is_intact(manifest):
        raise DamagedFile(f"{path}: damaged, its content is not what was written")
    if manifest["stage"] != number:
        raise DamagedFile(f"{path}: is the manifest of stage {manifest['stage']}, not of stage {number}")
    return manifest


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


def blank_manifest() -> dict[str, Any]:
    """Every key of a manifest, without a value where only training can give one."""
    return {
        "stage": None, "status": "running", "base_model": None, "parents": [], "settings": {}, "sources": [],
        "inputs": {}, "train_rows": None, "val_rows": None, "dropped": {}, "replay": [],
        "tokens": {"total": None, "trained": None}, "steps": None, "metrics": {}, "merge": None, "adapter_sha256": None,
        "versions": {}, "mlflow_run_id": None, "started": None, "finished": None,
    }  # fmt: skip
