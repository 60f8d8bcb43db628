"""The rivals of the training item, each in a process of its own: a loop written by hand, and TRL's SFTTrainer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """How TRL runs: its defaults are padded micro-batches of 8, bfloat16 autocast, gradient checkpointing."""

    label: str
    packing: bool
    bf16: bool
    checkpointing: bool
    micro_batch: int


TRL = {
    "trl": Variant("TRL's defaults (padded)", packing=False, bf16=True, checkpointing=True, micro_batch=8),
    "trl-padded": Variant("TRL padded, float32", packing=False, bf16=False, checkpointing=False, micro_batch=8),
    "trl-packed": Variant("TRL packed, float32", packing=True, bf16=False, checkpointing=False, micro_batch=2),
    "trl-packed-bf16": Variant("TRL packed, bfloat16", packing=True, bf16=True, checkpointing=False, micro_batch=2),
}


def adapted_model(model: Path, dtype: str, targets: list[str]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    return loaded, get_peft_model(loaded, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=targets))


def bare_loop(
    model: Path, folder: Path, attention: str, dtype: str, *, accumulation: int, targets: list[str]
) -> dict[str, float]:
    """PyTorch and nothing around it. `rows`: each row by torch's attention, and logits for trained positions only;
    `sdpa`: neither.

    In bfloat16: weights in it, adapters in float32 as PEFT makes them, autocast.
    """
    import torch

    loaded, adapted = adapted_model(model, dtype, targets)
    if attention == "rows":
        attend_by_rows(loaded)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    adapted.train()
    batches = torch.load(folder / "batches.pt", weights_only=False)
    losses, times = [], []
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        trained = sum(batch["num_items"] for batch in step)
        total = 0.0
        for batch in step:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = token_losses(adapted, batch, all_positions=attention != "rows").sum() / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total, trained))
        tokens = sum(batch["input_ids"].shape[1] for batch in step)
        times.append((time.perf_counter(), time.process_time(), tokens))
    return speed(times) | {"loss": per_token(losses)}


def attend_by_rows(loaded: Any) -> None:
    """Joined rows one after the other through torch's scaled_dot_product_attention, without a mask."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    from sft.models.attention import causal_row, mask, row_lengths

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **keywords: Any) -> Any:
        lengths = row_lengths(keywords["position_ids"])
        parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        rows = [causal_row(*part, window=query.shape[2], scale=keywords["scaling"]) for part in parts]
        return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("bare_rows", attend)
    AttentionMaskInterface.register("bare_rows", mask)
    loaded.set_attn_implementation("bare_rows")


def token_losses(adapted: Any, batch: dict[str, Any], *, all_positions: bool) -> Any:
    import torch

    targets = (batch["labels"][0] != -100).nonzero()[:, 0]
    wanted = 0 if all_positions else targets - 1
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = adapted(**inputs, use_cache=False, logits_to_keep=wanted).logits[0]
    logits = logits[targets - 1] if all_positions else logits
    return torch.nn.functional.cross_entropy(logits.float(), batch["labels"][0, targets], reduction="none")


def train_trl(
    model: Path, folder: Path, variant: Variant, *, rows_per_step: int, targets: list[str]
) -> dict[str, float]:
    """SFTTrainer over the same rows, already tokenized, in the same order where they are not packed."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (folder / "ordered.jsonl").read_text(encoding="utf-8").splitlines()]
    accumulation = 2 if variant.packing else rows_per_step // variant.micro_batch
    args = SFTConfig(
        str(folder / "trl"), max_length=1024, packing=variant.packing, bf16=variant.bf16, use_cpu=True,
        gradient_checkpointing=variant.checkpointing, per_device_train_batch_size=variant.micro_batch,
        gradient_accumulation_steps=accumulation, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1,
        num_train_epochs=1, report_to=[], save_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True,
        optim="adamw_torch_fused", shuffle_dataset=False,
    )  # fmt: skip
    seen: dict[str, Any] = {"tokens": 0, "trained": 0, "times": [], "losses": []}

    class Counted(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            seen["trained"] += int((inputs["labels"] != -100).sum())
            return super().compute_loss(model, inputs, *arguments, **keywords)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            seen["times"].append((time.perf_counter(), time.process_time(), seen["tokens"]))
            seen["tokens"] = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **keywords: Any) -> None:
            if "loss" in logs:
                seen["losses"].append((logs["loss"], seen["trained"]))
                seen["trained"] = 0

    trainer = Counted(
        AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=targets),
    )
    trainer.add_callback(Clock())
    trainer.train()
    return speed(seen["times"]) | {"loss": per_token(seen["losses"])}


def speed(times: list[tuple[float, float, int]]) -> dict[str, float]:
    """Tokens per second, and per CPU second, of all steps but the first."""
    tokens = sum(count for *_, count in times[1:])
    seconds, cpu_seconds = (times[-1][column] - times[0][column] for column in (0, 1))
    return {"speed": tokens / seconds, "cpu_speed": tokens / cpu_seconds}


def per_token(losses: list[tuple[float, float]]) -> float:
    """Mean over trained tokens of (mean loss, trained tokens) of the steps."""
    return sum(loss * trained for loss, trained in losses) / sum(trained for _, trained in losses)
