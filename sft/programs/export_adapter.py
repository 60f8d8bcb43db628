"""A ladder's result as one LoRA adapter for the untouched base model, compared before it is published."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sft.errors import Problems
from sft.merging.combine import Combined, combine
from sft.merging.parents import with_adapters
from sft.merging.probe import compare, probe_ids, probe_logits
from sft.merging.weights import model_folder
from sft.programs.export import TOKENIZER_FILES, Origin, load_plainly
from sft.stages.paths import MERGE_RECORD
from sft.storage import atomic, json_files

# What vLLM serves: larger ranks need an adapter with --rank, others are filled up to the next of these.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportedAdapter:
    """The combined adapter, how far its answers are from the stage's (logits on the probe prompts), and what servers
    take of it, a sentence each."""

    combined: Combined
    max_abs_diff: float
    kl: float
    notes: tuple[str, ...]


def export_adapter(origin: Origin, target: Path, *, rank: int | None = None) -> ExportedAdapter:
    """Writes the adapter with the tokenizer's files to `target`.

    Raises:
        Problems: there is nothing that adds up: all weights of a stage were trained, or a stage is no plain LoRA.
    """
    if not origin.adapters:
        raise Problems(["--as-adapter: all weights were trained in this stage; leave it away and serve the model"])
    trained_whole = [each.stage for each in origin.manifests if each.values().get("SFT_USE_LORA") is False]
    if trained_whole:
        what = f"stage {trained_whole[0]} trained all weights, which no adapter on the base model holds"
        raise Problems([f"--as-adapter: {what}; leave it away and serve the merged model"])
    disable_progress_bar()
    with atomic.published_folder(target) as folder:
        combined = combine(
            origin.base,
            origin.adapters,
            folder,
            rank=rank,
            revision=origin.settings.get("SFT_MODEL_REVISION"),
            trust_remote_code=origin.trust_remote_code,
        )
        for path in {path for pattern in TOKENIZER_FILES for path in (origin.tokenizer or folder).glob(pattern)}:
            if path.parent != folder:
                shutil.copyfile(path, folder / path.name)
        figures = _compared(origin, folder)
        notes = serving_notes(combined)
        json_files.write_json(
            folder / MERGE_RECORD,
            {"adapters": len(origin.adapters), "rank": rank, "errors": combined.errors, "notes": notes} | figures,
        )
    return ExportedAdapter(combined, figures["max_abs_diff"], figures["kl"], notes)


def _compared(origin: Origin, folder: Path) -> dict[str, float]:
    """Logits of base + one adapter against base + all adapters, both by PEFT in float32."""
    source, _ = model_folder(origin.base, origin.settings.get("SFT_MODEL_REVISION"))
    tokenizer = AutoTokenizer.from_pretrained(
        origin.tokenizer or origin.base, trust_remote_code=origin.trust_remote_code
    )
    prompts = probe_ids(tokenizer)
    expected = probe_logits(with_adapters(load_plainly(source, origin, "float32"), origin.adapters), prompts)
    one = PeftModel.from_pretrained(load_plainly(source, origin, "float32"), folder)
    return compare(expected, probe_logits(one, prompts))


def serving_notes(combined: Combined) -> tuple[str, ...]:
    """What servers need to know of the adapter (docs/serving.md)."""
    largest = max(combined.ranks.values())
    fitting = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    notes = [
        f"vLLM: --max-lora-rank {fitting}"
        if fitting
        else f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this one has {largest}: shorten it with --rank"
    ]
    if any("experts" in name for name in combined.ranks):
        notes.append("it changes experts of a mixture, which few servers take in an adapter: serve the merged model")
    if any("embed" in name for name in combined.ranks):
        notes.append("it changes the embeddings, which vLLM and llama.cpp don't take in an adapter")
    return tuple(notes)
