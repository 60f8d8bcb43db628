"""What data and models are known by: their content, wherever it lies and whatever it is called."""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.sources.files import SourceError, files_of_folder, files_of_pattern, has_kind, is_pattern
from sft.errors import hub_errors
from sft.stages.paths import MODEL_CONFIG
from sft.storage.seals import content_fingerprint, files_fingerprint, sha256

if TYPE_CHECKING:
    from sft.settings import Source

_WHOLE = 16 * 1024 * 1024  # files up to here are read whole; of weights samples tell one model from another
_SAMPLE, _SAMPLES = 4096, 256  # bytes each, how many: 1 MiB of a file of any size, in milliseconds
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAVED = {"state.json", "dataset_info.json", "dataset_dict.json"}
# What transformers reads of a model folder.
_MODEL_FILES = (
    *(MODEL_CONFIG, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*"),
    *("merges.txt", "chat_template*", "additional_chat_templates/*", "*.jinja", "*.model", "*.tiktoken", "*.spm"),
    *("*.safetensors", "*.safetensors.index.json"),
)
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def source_fingerprint(source: "Source") -> str | None:
    """`sha256:` of a local file, `folder:` of a folder or glob, `hub:<id>@<commit>` of a hub id; None: not there.

    A hub id whose commit can't be found out (no network, not in the cache) has its revision, or main, instead.
    """
    path = Path(source.id).expanduser()
    if path.is_file():
        return content_fingerprint(path)
    if path.is_dir():
        return files_fingerprint({str(file.relative_to(path)): file for file in _files_of(path, source.split)})
    if is_pattern(source.id):
        files = files_of_pattern(source.id)
        return files_fingerprint({file.name: file for file in files}) if files else None
    return None if _is_path(source.id) else f"hub:{source.id}@{_data_commit(source.id, source.revision or 'main')}"


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a folder that are read; all of them where loading it would fail."""
    below = sorted(path for path in folder.rglob("*") if path.is_file())
    if any(path.name in _SAVED for path in folder.iterdir()):  # datasets puts caches beside the rows
        return [p for p in below if p.name in _SAVED or (p.suffix == ".arrow" and not p.name.startswith("cache-"))]
    try:
        return files_of_folder(folder, split)
    except SourceError:
        return below


def _is_path(name: str) -> bool:
    """Whether a data set's id can only be a path, as `data.sources.load` sees it."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or has_kind(Path(name))


def _data_commit(name: str, revision: str) -> str:
    """The commit that a branch or tag stands at: the hub's word, else the cache's, else the name itself."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    if not constants.is_offline_mode():
        try:
            return HfApi().dataset_info(name, revision=revision, timeout=10).sha or revision
        except hub_errors():
            pass  # loading it says why; what the cache holds is what would be read
    known = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / revision
    return known.read_text(encoding="utf-8").strip() if known.is_file() else revision


def is_same(old: str | None, new: str | None) -> bool:
    """Whether two fingerprints say the same, as far as both are known.

    Where the commit of a hub id is unknown on one side the id alone is compared, and not there may be out of reach.
    """
    if old is None or new is None:
        return old == new or is_unresolved(old) or is_unresolved(new)
    if is_unresolved(old) != is_unresolved(new):
        return old.rpartition("@")[0] == new.rpartition("@")[0]
    return old == new


def is_unresolved(fingerprint: str | None) -> bool:
    """Whether it names a hub id by a branch or tag whose commit is not known."""
    kind, _, rest = (fingerprint or "").partition(":")
    return kind == "hub" and not _COMMIT.fullmatch(rest.rpartition("@")[2])


def _sampled_sha256(path: Path) -> str:
    """Digest of a large file's size and of 256 blocks of 4 KiB spread over it (1 MiB read, not 140 GB)."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as stream:
        for index in range(_SAMPLES):
            stream.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """`model:` of a local folder's configuration, tokenizer and weights; `hub:<id>@<revision or main>` otherwise.

    Code counts where the configuration names it (`auto_map`), pickles where there is nothing better; other files are
    read by nobody. Files over 16 MiB are sampled: another training changes every block, a single flipped bit may go
    unseen.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return f"hub:{name}@{revision or 'main'}"
    patterns = [*_MODEL_FILES, *(("*.py",) if _has_code(folder) else ())]
    patterns += _PICKLES if not any(folder.glob("*.safetensors")) else ()
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    digests = (
        f"{p.relative_to(folder)} {(_sampled_sha256 if p.stat().st_size > _WHOLE else sha256)(p)}\n" for p in files
    )
    return f"model:{hashlib.sha256(''.join(digests).encode()).hexdigest()}"


def _has_code(folder: Path) -> bool:
    for name in (MODEL_CONFIG, "tokenizer_config.json"):
        try:
            if "auto_map" in json.loads((folder / name).read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            continue  # what is wrong with it is said where it is loaded
    return False
