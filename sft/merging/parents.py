"""What a stage's adapter goes on: earlier adapters merged into the base model, loaded, compared with their probe."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import PeftModel

from sft.distributed import ranks
from sft.distributed.launch import launched
from sft.distributed.ranks import say
from sft.errors import RunFailed
from sft.merging.merge import Ingredients, is_current, merge, record_verification
from sft.merging.probe import store_probe, verdict, verify
from sft.models.model import compute_dtype, load_model
from sft.stages.paths import MERGE_RECORD, PROBE
from sft.storage import json_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.settings import Settings
    from sft.stages.stage import Stage


def merge_parents(stage: Stage) -> str:
    """What the stage's adapter goes on: the base model, or the published merge of all earlier adapters.

    The main process merges, all others wait for the folder.
    """
    if not stage.adapters:
        return stage.start_model
    if PartialState().is_main_process and not is_current(stage.merged_base, ingredients(stage)):
        if stage.merged_base.exists():
            say(f"{stage.merged_base} is damaged or of another lineage, so it is made again")
        say("Merging earlier adapters into the base model (needs memory and disk space for a moment) ...")
        record = merge(
            stage.start_model,
            [parent.folder for parent in stage.adapters],
            stage.merged_base,
            dtype=stage.settings.merge_dtype,
            revision=stage.settings.model_revision,
            fingerprint=ingredients(stage).base,
            trust_remote_code=stage.settings.trust_remote_code,
        )
        for warning in record.warnings:
            say(f"[WARNING] {warning}")
        count = len(stage.adapters)
        say(f"Merged {count} adapter{'s' if count > 1 else ''} in {record.seconds:.1f} s: {stage.merged_base}")
        stage.update(merge=merge_facts(stage))
    wait_for_merge(stage)
    return str(stage.merged_base)


def ingredients(stage: Stage) -> Ingredients:
    """What the stage's merged base has to be made from."""
    digests = tuple(parent.adapter_sha256 for parent in stage.adapters)
    return Ingredients(stage.start_fingerprint, digests, stage.settings.merge_dtype)


def with_adapters(model: Any, adapters: Sequence[Path]) -> Any:
    """The model with the last adapter beside its weights, those before it folded in by PEFT, in order."""
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return PeftModel.from_pretrained(model, adapters[-1]) if adapters else model


def load_verified(stage: Stage, base: str) -> PreTrainedModel:
    """The model the stage trains on; a merged one must answer the probe prompts as its last adapter did.

    Raises:
        RunFailed: it does not.
    """
    splitting = zero3_configuration(stage.settings)  # from_pretrained looks for it
    model = load_model(base, stage.settings)
    del splitting
    if not launched().splits_weights:
        verify_merged(stage, model)
    return model


def zero3_configuration(settings: Settings) -> Any:
    """Under ZeRO-3 what makes transformers split the weights while they are loaded, as long as it is kept."""
    if launched().sharding != "zero3":
        return None
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision({torch.bfloat16: "bf16", torch.float16: "fp16"}.get(compute_dtype(settings), "no"))
    plugin.set_deepspeed_weakref()
    return plugin


def verify_merged(stage: Stage, model: PreTrainedModel) -> None:
    """Compares the merged base with the probe of its last adapter, where there is one, and keeps the figures."""
    probe = stage.adapters[-1].folder / PROBE if stage.adapters else None
    if probe is None or not probe.exists():
        return
    figures = verify(model, probe)
    if PartialState().is_main_process:
        record_verification(stage.merged_base, figures)
        stage.update(merge=merge_facts(stage))
    say(f"Merged base verified: {verdict(figures)}")


def keep_probe(stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stores the trained model's logits on the probe prompts; all ranks call it, the main process keeps it."""
    with TemporaryDirectory() as elsewhere:
        folder = stage.folder if PartialState().is_main_process else Path(elsewhere)
        store_probe(folder, model, tokenizer)


def merge_facts(stage: Stage) -> dict[str, Any]:
    """The manifest's `merge` record, from merge.json."""
    record = json_files.read_json(stage.merged_base / MERGE_RECORD)
    names = ("max_abs_diff", "kl", "seconds", "peak_rss_bytes", "rounding_loss")
    return {name: record.get(name) for name in names}


def wait_for_merge(stage: Stage) -> None:
    """Ranks other than the main one wait until the merged base is there.

    Raises:
        RunFailed: the merge did not end in time, or this node does not see the output folder.
    """
    record = stage.merged_base / MERGE_RECORD
    main = PartialState().is_main_process
    made = ranks.from_main(record.read_text(encoding="utf-8") if main else None, "the merge of earlier adapters")
    if not ranks.sees(record, made):
        raise RunFailed(
            f"{stage.merged_base} was merged by the main process, but {socket.gethostname()} does not see it: "
            "SFT_OUT_LORA_DIR must be on storage that all nodes share."
        )
    ranks.wait("all processes to see the merged base")  # the main process adds figures to the record next
