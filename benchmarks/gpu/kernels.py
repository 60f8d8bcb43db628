"""Items attention, head and experts: our kernels beside the others, held against float32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.job import Job, distance
from sft.models import attention as rowwise

# Relative to the largest value: bfloat16 keeps eight bits, and sums of thousands lose two more.
CLOSE, CLOSE_ON_CPU = "<= 0.02", "<= 0.0001"


def attention(job: Job) -> None:
    """Joined rows: what a run takes, row by row, varlen, one masked product; outputs and gradients against float32."""
    cases = {
        "4 rows of 4,096": (job.size([4096] * 4, [24] * 2), None),
        "16 rows of 512": (job.size([512] * 16, [8] * 4), None),
        "one row of 4,096": (job.size([4096], [32]), None),
        "window of 1,024": (job.size([4096] * 4, [24] * 2), job.size(1024, 8)),
    }
    heads, groups, size = job.size((32, 8, 128), (4, 2, 16))
    for name, (lengths, window) in cases.items():
        if job.has_time(name, 6):
            states = [
                torch.randn(1, count, sum(lengths), size, device=job.device, dtype=job.dtype, requires_grad=True)
                for count in (heads, groups, groups)
            ]
            compare(job, name, states, lengths=lengths, window=window)
            del states
            job.forget()


def compare(job: Job, name: str, states: list[torch.Tensor], *, lengths: list[int], window: int | None) -> None:
    ways = attention_ways(job, lengths, window, states[0].shape[-1] ** -0.5)
    towards = torch.randn_like(states[0].transpose(1, 2))
    wanted = exact_attention(states, towards, lengths, window)
    taken: dict[str, float] = {}
    for way, call in ways.items():

        def step(call: Any = call) -> list[torch.Tensor]:
            out = call(*states)
            return [out, *torch.autograd.grad(out, states, towards)]

        found = step()
        worst = max(distance(mine, exact) for mine, exact in zip(found, wanted, strict=True))
        job.check(f"{name}, {way}: difference", worst, job.size(CLOSE, CLOSE_ON_CPU))
        del found
        taken[way] = job.milliseconds(step)
        job.figure(f"{name}, {way}: forward and backward", taken[way], "ms")
        job.figure(f"{name}, {way}: peak", job.peak(step), "bytes")
    if "varlen" in taken:
        job.check(f"{name}: what a run takes, of varlen", taken["auto"] / taken["varlen"], "<= 1.2", of_gpu=True)
    elif not job.rehearse:
        job.skip(f"{name}: varlen", "this card has no such kernel")


def attention_ways(job: Job, lengths: list[int], window: int | None, scale: float) -> dict[str, Any]:
    ends, longest, tokens = rowwise.row_ends(lengths).to(job.device), max(lengths), sum(lengths)
    row = torch.arange(len(lengths), device=job.device).repeat_interleave(torch.tensor(lengths, device=job.device))
    place = torch.arange(tokens, device=job.device)
    module, how = torch.nn.Module(), {"row_lengths": lengths, "row_ends": ends, "scaling": scale}

    def masked(query: Any, key: Any, value: Any) -> torch.Tensor:
        apart = place[:, None] - place
        mask = (row[:, None] == row) & (apart >= 0) & (apart < (window or tokens))
        # As transformers: with a mask the kernels know no grouped heads.
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)

    def one_by_one(*states: torch.Tensor) -> torch.Tensor:
        parts = zip(*(each.split(lengths, dim=2) for each in states), strict=True)
        found = [rowwise.causal_row(*part, window=window or tokens, scale=scale) for part in parts]
        return torch.cat(found, dim=2).transpose(1, 2)

    def varlen(*states: torch.Tensor) -> torch.Tensor:
        return rowwise.rows_at_once(*states, ends=ends, longest=longest, window=window or tokens, scale=scale)

    auto = {"auto": lambda *states: rowwise.attend(module, *states, None, sliding_window=window, **how)[0]}
    probe = torch.empty(1, 1, 1, 128, device=job.device, dtype=job.dtype)
    known = {"varlen": varlen} if rowwise.takes_varlen(probe, probe) else {}
    return auto | {"row by row": one_by_one} | known | {"masked": masked}


def exact_attention(states: list[torch.Tensor], towards: torch.Tensor, lengths: list[int], window: int | None) -> Any:
    """Output and gradients in float32, a softmax written out, row by row and group by group."""
    query, key, _ = (each.detach().float() for each in states)
    together = query.shape[1] // key.shape[1]
    results = [torch.zeros(each.shape, device=query.device) for each in (towards, *states)]
    start = 0
    for length in lengths:
        place = torch.arange(length, device=query.device)
        apart = place[:, None] - place
        seen = (apart >= 0) & (apart < (window or length))
        rows = slice(start, start + length)
        for group in range(key.shape[1]):
            heads = slice(group * together, (group + 1) * together)
            which = (heads, group, group)
            parts = [s[0, each, rows].detach().float().requires_grad_() for s, each in zip(states, which, strict=True)]
            scores = (parts[0] @ parts[1].T * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
            out = scores.softmax(-1) @ parts[2]
            found = torch.autograd.grad(out, parts, towards[0, rows, heads].transpose(0, 1).float())
            results[0][0, rows, heads] = out.detach().transpose(0, 1)
            for result, gradient, each in zip(results[1:], found, which, strict=True):
                result[0, each, rows] = gradient
        start += length
    return results


def head(job: Job) -> None:
    """TRL's fused head and our cross-entropy over many words, against float32; with a cap on the logits as well."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from sft.training.loss import token_cross_entropy

    words, width, tokens = job.size((151_936, 2560, 4096), (500, 32, 48))
    hidden = torch.randn(tokens, width, device=job.device, dtype=job.dtype, requires_grad=True)
    weight = (torch.randn(words, width, device=job.device) / width**0.5).to(job.dtype)
    targets = torch.randint(0, words, (tokens,), device=job.device)
    for cap in (None, 30.0):

        def fused(cap: float | None = cap) -> torch.Tensor:
            return -ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 4096, cap, 1.0, ("log_probs",))[0]

        def ours(cap: float | None = cap) -> torch.Tensor:
            logits = hidden @ weight.T
            return token_cross_entropy(logits if cap is None else cap * (logits / cap).tanh(), targets)

        wanted = exact_losses(hidden, weight, targets, cap)
        for name, call in {"fused head": fused, "ours": ours}.items():
            what = f"{name}{', capped' if cap else ''}"

            def step(call: Any = call) -> list[torch.Tensor]:
                losses = call()
                return [losses, *torch.autograd.grad(losses.sum(), hidden)]

            worst = max(distance(mine, exact) for mine, exact in zip(step(), wanted, strict=True))
            job.check(f"{what}: difference", worst, job.size(CLOSE, CLOSE_ON_CPU))
            job.figure(f"{what}: forward and backward", job.milliseconds(step), "ms")
            peak = job.peak(step)
            if name == "fused head":
                job.check(f"{what}: peak", peak / 2**30, "<= 1.5", "GiB", of_gpu=True)
            else:
                job.figure(f"{what}: peak", peak, "bytes")
            job.forget()


def exact_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None) -> Any:
    """Losses and the gradient of the hidden states in float32, 256 tokens at a time."""
    losses, gradients, wide = [], [], weight.float()
    for part, wanted in zip(hidden.detach().float().split(256), targets.split(256), strict=True):
        part = part.requires_grad_()
        logits = part @ wide.T
        logits = logits if cap is None else cap * (logits / cap).tanh()
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        gradients.append(torch.autograd.grad(loss.sum(), part)[0])
        losses.append(loss.detach())
    return [torch.cat(losses), torch.cat(gradients)]


def experts(job: Job) -> None:
    """A layer of Qwen3-30B-A3B with an adapter on its experts: every way of ours, PEFT's, frozen; waits counted."""
    from sft.models import grouped
    from sft.models.experts import route_experts

    model = expert_layer(job)
    own = copy.deepcopy(model)
    job.check("layers that stay on PEFT's way", len(route_experts(own)), "<= 0")
    peft_way, routed = (each.base_model.model.model.layers[0].mlp.experts for each in (model, own))
    frozen = peft_way.get_base_layer()
    decided, ways = grouped.way_of, ["torch", *(["triton"] if triton_works() else [])]
    native = decided(frozen.down_proj)
    calls: dict[str, Any] = {f"ours, {way}": routed for way in ways} | {"PEFT": peft_way, "frozen": frozen}
    for tokens in job.size((512, 8192), (12, 40)):
        inputs = routing(job, frozen, tokens)
        wanted = exact_experts(peft_way, *inputs)
        taken: dict[str, float] = {}
        for name, module in calls.items():
            way = name.removeprefix("ours, ")
            if way in ways:
                grouped.way_of = {"torch": lambda weight: "torch", "triton": lambda weight: "triton"}[way]
            step = expert_step(module, inputs)
            if name != "frozen":
                worst = max(distance(mine, exact) for mine, exact in zip(step(), wanted, strict=True))
                what, close = f"{tokens} tokens, {name}: difference", job.size("<= 0.05", CLOSE_ON_CPU)
                # PEFT rounds W + BA to bfloat16: a figure beside ours.
                if way in ways:
                    job.check(what, worst, close)
                else:
                    job.figure(what, worst)
            taken[name] = job.milliseconds(step)
            job.figure(f"{tokens} tokens, {name}: forward and backward", taken[name], "ms")
            job.figure(f"{tokens} tokens, {name}: peak", job.peak(step), "bytes")
            if way == native:
                job.check(f"{tokens} tokens, {name}: waits for the device", waits(job, step), "<= 0", of_gpu=True)
            grouped.way_of = decided
        job.check(f"{tokens} tokens: ours, {native}, of frozen", taken[f"ours, {native}"] / taken["frozen"], "<= 1.5",
                  of_gpu=True)  # fmt: skip
        job.forget()


def expert_step(module: Any, inputs: tuple[torch.Tensor, ...]) -> Callable[[], list[torch.Tensor]]:
    """Output, gradient of the hidden states and of what is trained."""
    x = inputs[0].detach().requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step() -> list[torch.Tensor]:
        out = module(x, *inputs[1:])
        return [out, *torch.autograd.grad(out.sum(), [x, *parameters])]

    return step


def triton_works() -> bool:
    from sft.environment import triton_missing

    return torch.cuda.is_available() and not triton_missing()


def expert_layer(job: Job) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = job.size(
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    )
    config = AutoConfig.for_model(
        "qwen3_moe", **sizes, vocab_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    with job.device:
        bare = AutoModelForCausalLM.from_config(config, dtype=job.dtype)
        targets = ["gate_proj", "up_proj", "down_proj"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(bare, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def routing(job: Job, layer: Any, tokens: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, chosen experts and their weights, as the router would hand them on."""
    chosen_at_once = job.size(8, 2)
    hidden = torch.randn(tokens, layer.down_proj.shape[1], device=job.device, dtype=job.dtype)
    scores = torch.randn(tokens, len(layer.down_proj), device=job.device).softmax(-1)
    weights, chosen = scores.topk(chosen_at_once, dim=-1)
    return hidden, chosen, (weights / weights.sum(-1, keepdim=True)).to(job.dtype)


def exact_experts(
    wrapper: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    """Output and gradients in float32, one expert after the other, W + scaling * BA written out."""
    layer, x = wrapper.get_base_layer(), hidden.detach().float().requires_grad_()
    parameters = [p for p in wrapper.parameters() if p.requires_grad]
    deltas, each = {}, wrapper
    while type(each).__name__ == "ParamWrapper":
        b, a, scaling = each.get_delta_factors("default")
        deltas[each.parameter_name] = scaling * torch.einsum("eor,eri->eoi", b.float(), a.float())
        each = each.base_layer
    out = torch.zeros_like(x)
    for number in range(len(layer.down_proj)):
        token, place = (chosen == number).nonzero(as_tuple=True)
        wide, narrow = (getattr(layer, n)[number].float() + deltas[n][number] for n in ("gate_up_proj", "down_proj"))
        gate, up = (x[token] @ wide.T).chunk(2, dim=-1)
        found = (torch.nn.functional.silu(gate) * up) @ narrow.T
        out = out.index_add(0, token, found * weights[token, place, None].float())
    return [out.detach(), *torch.autograd.grad(out.sum(), [x, *parameters])]


def waits(job: Job, step: Callable[[], Any]) -> int:
    """How often the host waits for the device in a call; a CPU has nothing to wait for."""
    if job.device.type != "cuda":
        step()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
