"""Does the merged model answer as base + adapter did? Logits on fixed prompts, stored by a finishing stage and compared
by the next one after it has loaded its merged base: no second model is ever needed for it.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from sft.errors import RunFailed
from sft.models.model import answering
from sft.stages.paths import MERGE_RECORD, PROBE
from sft.storage.atomic import write_bytes
from sft.storage.json_files import read_json

PROMPTS = (
    "The committee met on Tuesday to discuss the budget, and after two hours it decided to",
    '{"name": "Mira Okafor", "age": 41, "languages": ["en", "ja"], "address": {"city":',
    "def mean(values):\n    total = sum(values)\n    return total /",
    '[server]\nhost = "127.0.0.1"\nport = 8080\n\nConverted to YAML:\nserver:\n  host:',
)
MAX_TOKENS = 48  # keeps the prompts short for a vocabulary of bytes as well
POSITIONS = 2  # logits of the last tokens of each prompt; more would cost megabytes with today's vocabularies
# The largest mean KL divergence (nats) that rounding explains, by the coarser number format of the two sides. Measured
# on SmolLM2-135M: 2e-11 in float32, 1e-3 to 2e-3 with bfloat16 on either side, whatever the adapter's own effect. The
# rest is room for mixtures of experts, where rounding also changes which experts answer, and for quantised stages.
MAX_KL = {"float32": 1e-6, "float16": 5e-3, "bfloat16": 5e-2, "quantized": 0.5}

# Rounding alone may look like this much: an adapter with a smaller effect can't be told from none by answers. Two to
# five times what was measured above.
NOISE = {"float32": 1e-9, "float16": 1e-4, "bfloat16": 4e-3, "quantized": 5e-2}


def probe_ids(tokenizer: Any) -> list[list[int]]:
    """Token ids of the fixed prompts, without chat template, at most MAX_TOKENS each."""
    return [tokenizer(prompt)["input_ids"][:MAX_TOKENS] for prompt in PROMPTS]


def probe_logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """(prompts, POSITIONS, vocabulary) logits in float32 on the CPU; draws no random numbers and changes no mode."""
    rows = []
    with answering(model):
        for ids in prompts:
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            rows.append(logits[0, -POSITIONS:].float().cpu())
    return torch.stack(rows)


def store_probe(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Writes `folder`/probe.safetensors: token ids, logits with the adapter on and with it off, number format.

    Call it on the model that has just been trained, adapter still apart from the base (all ranks together where the
    weights are split over them; then give only the main process a folder that exists and let it write).
    """
    prompts = probe_ids(tokenizer)
    tensors = {f"input_ids.{number}": torch.tensor(ids) for number, ids in enumerate(prompts)}
    tensors["logits"] = probe_logits(model, prompts)
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        tensors["logits_without_adapter"] = probe_logits(model, prompts)
    # A single entry: safetensors writes several in another order each time, and equal runs shall leave equal bytes.
    write_bytes(folder / PROBE, save(tensors, metadata={"precision": precision(model)}))
    return folder / PROBE


def precision(model: Any) -> str:
    """The coarsest number format of the weights: quantized, bfloat16, float16 or float32."""
    if getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False):
        return "quantized"
    found = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return next((name for name in ("bfloat16", "float16") if name in found), "float32")


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) over all positions, in nats."""
    first, second = (logits.double().log_softmax(-1) for logits in (reference, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def compare(reference: torch.Tensor, merged: torch.Tensor) -> dict[str, float]:
    """{"max_abs_diff": of the logits, "kl": mean, in nats}."""
    return {"max_abs_diff": float((reference - merged).abs().max()), "kl": divergence(reference, merged)}


def verify(merged: Any, probe: Path) -> dict[str, float]:
    """Compares a merged model with the probe of the stage whose adapter was folded in last.

    Returns {"max_abs_diff", "kl", "adapter_kl"}; `adapter_kl` is how far the adapter moved the model, by which
    the other two are read. Raises RunFailed with the figures when rounding does not explain the difference, or the
    merged model is no nearer to the model with its adapter than to the one without.
    """
    with safe_open(probe, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        stored_precision = (file.metadata() or {}).get("precision", "float32")
    prompts = [tensors[f"input_ids.{number}"].tolist() for number in range(len(tensors) - 2)]
    precisions = {stored_precision, precision(merged), *_written_as(merged)}
    return judge(
        tensors["logits"], tensors["logits_without_adapter"], probe_logits(merged, prompts), precisions=precisions
    )


def _written_as(merged: Any) -> list[str]:
    """The number format a merged folder was rounded to: loading it in a finer one brings nothing back."""
    record = Path(str(getattr(merged.config, "_name_or_path", ""))) / MERGE_RECORD
    written = read_json(record)["dtype"] if record.is_file() else None
    return [written] if written in MAX_KL else []


def judge(
    reference: torch.Tensor, without_adapter: torch.Tensor, merged: torch.Tensor, *, precisions: set[str]
) -> dict[str, float]:
    """The figures of `verify`; RunFailed when they say that the merged weights are not base + adapter."""
    figures = compare(reference, merged) | {"adapter_kl": divergence(reference, without_adapter)}
    allowed = max(MAX_KL[name] for name in precisions)
    limit = f"at most {allowed:g} is rounding"
    failed = not figures["kl"] <= allowed  # NaN fails as well
    if not failed and not shows_adapter(figures):
        noise = max(NOISE[name] for name in precisions)
        left_out = divergence(without_adapter, merged) < figures["adapter_kl"] / 2
        failed = left_out or figures["adapter_kl"] > noise
        limit = "less than half of the adapter's own is needed, or it may have been left out"
    if failed:
        raise RunFailed(
            f"The merged model does not answer as base + adapter did: KL {figures['kl']:.3g} ({limit}), largest logit "
            f"difference {figures['max_abs_diff']:.3g}; the adapter itself moved the model by KL "
            f"{figures['adapter_kl']:.3g}. Delete the merged folder and run again; if it stays, report it."
        )
    return figures


def shows_adapter(figures: dict[str, float]) -> bool:
    """Whether the answers show that the adapter is in the merged weights: they are nearer to those with it."""
    return figures["kl"] < figures["adapter_kl"] / 2


def verdict(figures: dict[str, float]) -> str:
    """The figures of `verify` for people, and what they can't tell."""
    text = f"KL {figures['kl']:.1e}, largest logit difference {figures['max_abs_diff']:.1e}"
    text += f" (the last adapter moved the model by KL {figures['adapter_kl']:.1e})"
    drowned = "; so small an effect drowns in rounding: the answers alone don't show that the adapter is in the weights"
    return text if shows_adapter(figures) else text + drowned
