"""--base-model: the base model of a trained stage where it lies now, the same by content as the one of its manifest."""

from dataclasses import replace
from pathlib import Path

from sft.errors import Problems
from sft.merging.weights import model_folder
from sft.programs.command_line import reworded
from sft.programs.export import Origin
from sft.settings.rules import is_missing_folder
from sft.stages.fingerprints import model_fingerprint
from sft.stages.paths import MODEL_CONFIG


def with_base_model(origin: Origin, given: str) -> Origin:
    """The origin on the base model at `given`, a folder or hub id.

    Where nothing is recorded of the base but a name that leads nowhere, `given` is taken at its word
    (`Origin.is_base_known` says so).

    Raises:
        Problems: it is no model, or another one than the recorded; names both.
    """
    if origin.is_base_trained:
        what = f"all weights were trained in {origin.base}, which needs no base model; leave the option away"
        raise Problems([f"--base-model {given}: {what}"])
    if given == origin.base:
        return origin
    content = _content(given, origin.settings.get("SFT_MODEL_REVISION"))
    recorded = _recorded_content(origin, given)
    if recorded is not None and recorded != content:
        what = f"is not the model that {origin.name} was trained on, {origin.base}: its content is another"
        raise Problems([f"--base-model {given}: {what}; name that model's folder"])
    return replace(origin, base=given, is_base_known=recorded is not None)


def has_moved(origin: Origin) -> bool:
    """Whether the base model was a folder, and there is none any more."""
    was_folder = origin.base_fingerprint.startswith("model:") or is_missing_folder(origin.base)
    return not origin.is_base_trained and was_folder and not Path(origin.base).expanduser().is_dir()


def require_base(origin: Origin, where: str) -> None:
    """Raises Problems, naming the option, where the base model is not at its place. `where`: how it was named."""
    if has_moved(origin):
        what = f"its base model {origin.base} is not there any more"
        if not origin.base_fingerprint:
            what = f"its base model {origin.base}: is no folder here"
        raise Problems([f"{where}: {what}; if it was moved, say where to with --base-model FOLDER"])


def is_base_of(origin: Origin, model: str) -> bool:
    """Whether the folder `model` has the content of the base model that the manifest records."""
    return Path(model).expanduser().is_dir() and model_fingerprint(model) == origin.base_fingerprint


def _content(name: str, revision: str | None) -> str:
    if Path(name).expanduser().is_file():
        raise Problems([f"--base-model {name}: is a file; name the folder of a model"])
    with reworded("SFT_BASE_MODEL=", "--base-model "):
        folder, _ = model_folder(name, revision)
    if not (folder / MODEL_CONFIG).is_file():
        raise Problems([f"--base-model {name}: holds no {MODEL_CONFIG}; name the folder of a model"])
    return model_fingerprint(str(folder))


def _recorded_content(origin: Origin, given: str) -> str | None:
    """None where it is not known. A hub id's is that of its files, from the cache or the hub."""
    if origin.base_fingerprint.startswith("model:"):
        return origin.base_fingerprint
    if not origin.base_fingerprint and not Path(origin.base).expanduser().is_dir():
        return None
    with reworded(
        f"SFT_BASE_MODEL={origin.base}:", f"--base-model {given}: can't be compared with {origin.base}, which"
    ):
        return model_fingerprint(str(model_folder(origin.base, origin.settings.get("SFT_MODEL_REVISION"))[0]))
