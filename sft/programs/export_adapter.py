"""A ladder's result as one LoRA adapter for the untouched base model, compared before it is published."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sft.errors import Problems
from sft.evaluation.generation_evaluation import GenerationEvaluation
from sft.merging.combine import Combined, combine
from sft.merging.parents import with_adapters
from sft.merging.probe import compare, probe_ids, probe_logits
from sft.merging.weights import model_folder
from sft.programs.export import TOKENIZER_FILES, Origin, load_plainly
from sft.scoring.significance import Difference, paired_difference
from sft.settings import Settings
from sft.stages.paths import MERGE_RECORD, QUESTIONS
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
    answers: "AnswersCompared | None" = None


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
        figures, answers = _compared(origin, folder, shortened=bool(combined.errors))
        notes = serving_notes(combined)
        facts = {"adapters": len(origin.adapters), "rank": rank, "errors": combined.errors, "notes": notes}
        json_files.write_json(folder / MERGE_RECORD, facts | figures | {"answers": answers and answers.record()})
    return ExportedAdapter(combined, figures["max_abs_diff"], figures["kl"], notes, answers)


@dataclass(frozen=True)
class AnswersCompared:
    """gen_score of the stage's own questions, as all its stages answer them and as the shortened adapter does."""

    exact: float
    shortened: float
    difference: Difference

    def record(self) -> dict[str, Any]:
        return {"exact": self.exact, "shortened": self.shortened, "difference": self.difference._asdict()}

    def sentence(self) -> str:
        return f"gen_score {self.exact:.3f} -> {self.shortened:.3f} ({self.difference.sentence()})"


def _answered(evaluation: GenerationEvaluation | None, model: Any) -> list[float | None]:
    if evaluation is None:
        return []
    samples, _ = evaluation.score(evaluation.rows, evaluation.answer(model, evaluation.rows))
    return [sample.get("score") for sample in samples]


def _compared(origin: Origin, folder: Path, *, shortened: bool) -> tuple[dict[str, float], AnswersCompared | None]:
    """Logits of base + one adapter against base + all adapters, both by PEFT in float32; of a shortened adapter the
    answers to the stage's questions as well, where it has some that are scored."""
    source, _ = model_folder(origin.base, origin.settings.get("SFT_MODEL_REVISION"))
    tokenizer = AutoTokenizer.from_pretrained(
        origin.tokenizer or origin.base, trust_remote_code=origin.trust_remote_code
    )
    prompts = probe_ids(tokenizer)
    evaluation = _questions(origin, tokenizer) if shortened else None
    stages = with_adapters(load_plainly(source, origin, "float32"), origin.adapters)
    expected, before = probe_logits(stages, prompts), _answered(evaluation, stages)
    del stages
    one = PeftModel.from_pretrained(load_plainly(source, origin, "float32"), folder)
    pairs = [(x, y) for x, y in zip(before, _answered(evaluation, one), strict=True) if x is not None and y is not None]
    found = None
    if pairs:
        exact, short = zip(*pairs, strict=True)
        found = AnswersCompared(fmean(exact), fmean(short), paired_difference(exact, short))
    return compare(expected, probe_logits(one, prompts)), found


def _questions(origin: Origin, tokenizer: Any) -> GenerationEvaluation | None:
    """The questions the stage kept, answered as long and judged as its manifest says; None where it has none."""
    adapter = origin.adapters[-1]
    places = [place for place in (adapter, *adapter.parents[:1]) if (place / QUESTIONS).is_file()]
    if not places or not origin.manifests:
        return None
    plain = Settings.model_construct(template_options=origin.settings.get("SFT_TEMPLATE_OPTIONS") or {})
    rows = json_files.read_records(places[0] / QUESTIONS)
    return GenerationEvaluation(plain, places[0], tokenizer, rows).of_stage(origin.manifests[-1])


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
