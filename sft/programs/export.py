"""A stage's result as one model folder: what to merge, verified before it is published, with a model card."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sft.errors import Problems, RunFailed, first_line, hub_errors
from sft.merging.merge import Ingredients, MergeRecord, merge
from sft.merging.parents import with_adapters
from sft.merging.probe import judge, precision, probe_ids, probe_logits, shows_adapter, verdict, verify
from sft.merging.weights import model_folder
from sft.programs.model_card import model_card
from sft.stages.lineage import result_sha256
from sft.stages.manifest import Manifest, ParentRecord, read_manifest
from sft.stages.paths import ADAPTER, ADAPTER_CONFIG, MANIFEST, MERGE_RECORD, MODEL_CONFIG, PROBE, sibling_stage
from sft.storage.json_files import DamagedFile, read_json
from sft.storage.seals import MARK, damage, is_sealed

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
)

_NEW_TOKEN = "make one with write access on https://huggingface.co/settings/tokens and set it as HF_TOKEN"


@dataclass(frozen=True)
class Origin:
    """Where the weights come from: base model, adapters in order, and the manifests of their stages, oldest first.

    `earlier`: what the stage's own merged base was made from, where it has one. `base_fingerprint`: the base's content
    as the manifest records it, "" where it doesn't. `is_base_trained`: the base is a stage's whole model.
    `is_base_known`: it was not taken at a person's word.
    """

    base: str
    adapters: tuple[Path, ...]
    tokenizer: Path | None
    manifests: tuple[Manifest, ...] = ()
    probe: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    earlier: Ingredients | None = None
    name: str = ""
    base_fingerprint: str = ""
    is_base_trained: bool = False
    is_base_known: bool = True

    @property
    def base_name(self) -> str:
        """What others call the base model: the hub id that was trained on, even where a copy of it is used."""
        return self.manifests[-1].base_model if self.base_fingerprint.startswith("hub:") else self.base

    @property
    def trust_remote_code(self) -> bool:
        return bool(self.settings.get("SFT_TRUST_REMOTE_CODE"))


def find_origin(folder: Path) -> Origin:
    """What a stage's folder, one of its checkpoints, its best_model or a plain PEFT adapter was made from.

    Raises Problems when a stage it builds on is missing, unfinished, damaged or was trained again since.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise Problems([f"--checkpoint_dir {folder}: no such folder; name OUT_stageN or one of its checkpoints"])
    if is_sealed(folder) and (faults := damage(folder)):
        raise Problems([f"--checkpoint_dir {folder}: is damaged ({'; '.join(faults)}); name another checkpoint"])
    stage = next((place for place in (folder, folder.parent) if (place / MANIFEST).is_file()), None)
    if not (folder / ADAPTER).is_file() and not (folder / MODEL_CONFIG).is_file():
        raise Problems([f"--checkpoint_dir {folder}: holds neither {ADAPTER} nor a model; name the folder of a result"])
    return _plain_origin(folder) if stage is None else _stage_origin(folder, stage)


def _plain_origin(folder: Path) -> Origin:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise Problems([f"--checkpoint_dir {folder}: is a whole model already, there is nothing to merge"])
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise Problems([f"--checkpoint_dir {folder}: its adapter_config.json names no base model; add it there"])
    return Origin(base, (folder,), folder, name=folder.name)


def _stage_origin(folder: Path, stage: Path) -> Origin:
    manifest = _manifest(stage)
    if folder == stage and manifest.status != "complete":
        remedy = "wait for its end, resume it, or name one of its checkpoints"
        raise Problems([f"--checkpoint_dir {folder}: stage {manifest.stage} is {manifest.status}; {remedy}"])
    if folder == stage and (result_sha256(folder) or ("", None))[1] != manifest.adapter_sha256:
        raise Problems([f"--checkpoint_dir {folder}: its weights are not those that stage.json lists; train it again"])
    adapters: list[Path] = []
    base, manifests = manifest.base_model, []
    recorded = fingerprint = manifest.inputs.get("SFT_BASE_MODEL", "")
    digests: tuple[str, ...] = ()
    for parent in sorted(manifest.parents, key=lambda entry: entry.stage):
        place = _sibling(stage, manifest.stage, parent.stage)
        kind = _checked_parent(place, parent, manifest.stage)
        digest = parent.adapter_sha256
        if kind == "model":
            base, adapters, fingerprint, digests = str(place), [], f"model:{digest}", ()
        else:
            adapters, digests = [*adapters, place], (*digests, digest)
        manifests.append(_manifest(place))
    if (folder / ADAPTER_CONFIG).is_file():
        adapters.append(folder)
    else:
        base, adapters = str(folder), []
    settings = manifest.values()
    probe = stage / PROBE if folder == stage and (stage / PROBE).is_file() else None
    tokenizer = next((place for place in (folder, stage) if (place / "tokenizer_config.json").is_file()), None)
    earlier = Ingredients(fingerprint, digests, settings.get("SFT_MERGE_DTYPE")) if digests else None
    return Origin(
        base,
        tuple(adapters),
        tokenizer,
        (*manifests, manifest),
        probe,
        settings,
        earlier,
        name=folder.name,
        base_fingerprint=recorded,
        is_base_trained=base != manifest.base_model,
    )


def _manifest(folder: Path) -> Manifest:
    try:
        manifest = read_manifest(folder, int(read_json(folder / MANIFEST)["stage"]))
    except (DamagedFile, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise Problems([f"{folder / MANIFEST}: cannot be read ({error}); train the stage again"]) from error
    assert manifest is not None  # read_json has just found it
    return manifest


def _sibling(stage: Path, number: int, other: int) -> Path:
    """OUT_stageK beside OUT_stageN; only the end of the name is looked at."""
    folder = sibling_stage(stage, number, other)
    if folder is None:
        raise Problems(
            [f"{stage}: was renamed, its earlier stages cannot be found; call it <name>_stage{number} again"]
        )
    return folder


def _checked_parent(folder: Path, parent: ParentRecord, number: int) -> str:
    result = result_sha256(folder) if folder.is_dir() else None
    if result is None:
        raise Problems(
            [f"{folder}: holds no adapter, but stage {number} was trained on it; put it back or train it again"]
        )
    if result[1] != parent.adapter_sha256:
        raise Problems([f"{folder}: was trained again after stage {number}; train stage {number} again with --fresh"])
    return result[0]


def check_target(target: Path) -> None:
    """Problems when the target holds something that is not an earlier export."""
    if target.exists() and not (target / MERGE_RECORD).is_file() and (target.is_file() or any(target.iterdir())):
        raise Problems([f"{target}: exists and is no earlier export; name another --output"])


def export(origin: Origin, target: Path) -> MergeRecord:
    """Merges, verifies and publishes the model with tokenizer and card at `target`."""
    disable_progress_bar()

    def finish(folder: Path, record: MergeRecord) -> None:
        if origin.tokenizer:
            for path in {path for pattern in TOKENIZER_FILES for path in origin.tokenizer.glob(pattern)}:
                shutil.copyfile(path, folder / path.name)
        if origin.adapters:
            figures = _verified(origin, folder)
            record.max_abs_diff, record.kl = figures["max_abs_diff"], figures["kl"]
            if not shows_adapter(figures):
                record.warnings.append(f"verified as far as answers can tell: {verdict(figures)}")
        (folder / "README.md").write_text(model_card(origin.base_name, origin.manifests, record), encoding="utf-8")

    return merge(
        origin.base,
        origin.adapters,
        target,
        dtype=origin.settings.get("SFT_MERGE_DTYPE"),
        revision=origin.settings.get("SFT_MODEL_REVISION"),
        trust_remote_code=origin.trust_remote_code,
        finish=finish,
    )


def _verified(origin: Origin, folder: Path) -> dict[str, float]:
    """The figures of the comparison with the stage's own probe, or with base + adapters loaded for it here."""
    if origin.probe:
        return verify(load_plainly(folder, origin), origin.probe)
    prompts = probe_ids(AutoTokenizer.from_pretrained(folder, trust_remote_code=origin.trust_remote_code))
    dtype = read_json(folder / MODEL_CONFIG).get("dtype")
    with_adapter, without, stored_precision = _reference(origin, prompts, dtype)
    merged = load_plainly(folder, origin)
    precisions = {stored_precision, precision(merged)}
    return judge(with_adapter, without, probe_logits(merged, prompts), precisions=precisions)


def _reference(origin: Origin, prompts: list[list[int]], dtype: str | None) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits with the last adapter on and off, on the base with the earlier ones folded in by PEFT; number format."""
    base, _ = model_folder(origin.base, origin.settings.get("SFT_MODEL_REVISION"))
    model = load_plainly(base, origin, dtype)
    model = with_adapters(model, origin.adapters)
    with_adapter = probe_logits(model, prompts)
    with model.disable_adapter():
        return with_adapter, probe_logits(model, prompts), precision(model)


def load_plainly(folder: Path, origin: Origin, dtype: str | None = None) -> Any:
    """The model in a folder as transformers loads it, in its own number format or another."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=origin.trust_remote_code
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# merge.json names folders of this machine, and the mark of completeness lists it.
KEPT_HERE = [MERGE_RECORD, MARK]


def check_repository(name: str, *, offline: bool) -> None:
    """Problems that are better said before a long merge: a name that is none, no network, no token, one that only reads
    or that the hub does not know."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Problems([f"--push {name}: is no repository name such as me/my-model ({error})"]) from error
    if offline:
        raise Problems([f"--push {name}: the hub can't be reached from here; leave --push away and upload later"])
    if get_token() is None:
        remedy = "run official_content/configure_huggingface.sh or hf auth login first, or set HF_TOKEN"
        raise Problems([f"--push {name}: there is no hub token; {remedy}"])
    try:
        role = HfApi().whoami()["auth"]["accessToken"]["role"]
    except KeyError:
        return
    except hub_errors() as error:
        if getattr(getattr(error, "response", None), "status_code", 0) == 401:
            raise Problems([f"--push {name}: the hub does not know this token; {_NEW_TOKEN}"]) from error
        return  # what else there is to say, the upload says
    if role == "read":
        raise Problems([f"--push {name}: this hub token may only read; {_NEW_TOKEN}"])


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Creates the repository if needed, uploads the folder, returns its address."""
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository.repo_id, ignore_patterns=KEPT_HERE)
    except hub_errors() as error:
        reason = first_line(error)
        raise RunFailed(
            f"The upload to {name} failed: {reason}. The model is complete in {folder}; try again."
        ) from error
    return str(repository)
