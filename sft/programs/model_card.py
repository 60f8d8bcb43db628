"""The README.md of an exported model, in the form the hub reads. Names no path of this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.merging.merge import MergeRecord
    from sft.stages.manifest import Manifest

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base_line}tags:
- sft
{lora_tag}---

# {title}

{origin}

## Stages
{stages}

## Weights
{weights}

## Licence
Not stated: this program does not know it. It follows from the licence of the base model and of the data; say it here
before you share the model.
"""


def model_card(base: str, manifests: Sequence["Manifest"], record: "MergeRecord") -> str:
    """Markdown: base, stages with their data and settings, how the weights were made, licence unknown."""
    count = len(record.adapters)
    name = _public(base)
    return CARD.format(
        base_line=f"base_model: {base}\n" if name == base else "",
        title=f"{Path(name).name}, fine-tuned",
        lora_tag="- lora\n" if count else "",
        origin=_origin(f"`{name}`" + (f" at revision `{record.base_revision}`" if record.base_revision else ""), count),
        stages=_stages(manifests),
        weights=_weights(record),
    )


def _origin(base: str, adapters: int) -> str:
    if not adapters:
        return f"{base}, all of whose weights were trained."
    many = "s, in the order in which they were trained," if adapters > 1 else ""
    return f"{base} with {adapters} LoRA adapter{many} folded into its weights."


def _public(name: str) -> str:
    """A hub id as it is, a path by its last part."""
    path = Path(name).expanduser()
    is_path = path.is_absolute() or path.exists() or name.startswith((".", "~"))
    return path.resolve().name if is_path else name


def _stages(manifests: Sequence["Manifest"]) -> str:
    if not manifests:
        return "Not known: the adapter came without the manifest of a stage."
    rows = [
        "| stage | data (rows drawn) | rows | steps | rate | rank, alpha | eval loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for manifest in manifests:
        values = manifest.values()
        drawn = [(source.id, "?" if source.drawn is None else source.drawn) for source in manifest.sources]
        sources = ", ".join(f"{_public(name)} ({count})" for name, count in drawn)
        shape = f"{values.get('SFT_LORA_R')}, {values.get('SFT_LORA_ALPHA')}"
        facts = [manifest.stage, sources, manifest.train_rows, manifest.steps, values.get("SFT_LR")]
        loss = manifest.metrics.get("eval_loss")
        rows.append("| " + " | ".join(_cell(fact) for fact in [*facts, shape, loss]) + " |")
    return "\n".join(rows)


def _cell(fact: Any) -> str:
    if fact is None:
        return "-"
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact).replace("|", "\\|")


def _weights(record: "MergeRecord") -> str:
    if not record.adapters:
        return f"{record.dtype}, as trained."
    lines = [f"{record.dtype}; {record.tensors_changed} tensors changed, added in float32 and rounded once."]
    if record.rounding_loss:
        lines.append(f"Rounding took {100 * record.rounding_loss:.2g} % of the update.")
    if record.kl is not None:
        lines.append(
            f"Verified on probe prompts against base + adapters: mean KL {record.kl:.2g}, largest logit difference "
            f"{record.max_abs_diff:.2g}."
        )
    return "\n".join(lines + [f"Note: {warning}" for warning in record.warnings if "/" not in warning])
