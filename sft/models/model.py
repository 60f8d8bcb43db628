"""Tokenizer, base model, quantisation and adapter of a stage, all through transformers and peft."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import getstate, setstate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sft.data.labels.template import chat_template_for
from sft.distributed.launch import launched
from sft.environment import Deferred
from sft.errors import Problems, first_line
from sft.heap import return_holes
from sft.models.saved import keep_saved_exact
from sft.settings.rules import NO_FOLDER, is_missing_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sft.settings import Settings

# What the hub and the loaders raise for a folder that is no model, a wrong name, a missing token or no network.
# A config.json may hold anything: whatever the architecture's own code then raises says that it does not fit.
LOAD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip

# Before its first adapter PEFT asks whether bitsandbytes has 4-bit layers, and loads it for that; since 0.39 it has.
_quantiser = sys.modules.get("bitsandbytes")
if isinstance(_quantiser, Deferred):
    vars(_quantiser)["nn"] = SimpleNamespace(Linear4bit=None)
    is_bnb_4bit_available()
    del vars(_quantiser)["nn"]

_DIGITS = re.compile(r"\d+")
OTHER_SIZES = "its weights have other sizes than its config.json says"


def compute_dtype(settings: Settings) -> torch.dtype:
    """SFT_DTYPE; `auto` is bfloat16 on a GPU that has it, float16 on one that would emulate it, float32 on a CPU.

    All weights are never trained in float16, whose range their updates leave: there `auto` is float32.
    """
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if not torch.cuda.is_available():
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if settings.use_lora else torch.float32


def weight_dtype(settings: Settings) -> torch.dtype:
    """What weights are kept in: those that are trained themselves in float32, the compute type being autocast's.

    In bfloat16 nine of ten of their updates would vanish. DeepSpeed keeps a float32 copy of its own.
    """
    return compute_dtype(settings) if settings.use_lora or launched().deepspeed else torch.float32


def keep_adapters_exact(model: torch.nn.Module) -> None:
    """Adapters in float32 again: TRL has those of quantised models in bfloat16, where small updates vanish. Modules
    trained in full beside them likewise."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.float()
    keep_saved_exact(model)


def load_problem(what: str, name: str, error: Exception) -> Problems:
    """One plain message for a model that can't be loaded, saying which of the usual reasons it is."""
    text = f"{type(error).__name__} {error}".lower()
    reason = first_line(error)
    if "trust_remote_code" in text:
        remedy = "the model brings code of its own: read it, then set SFT_TRUST_REMOTE_CODE=1"
    elif Path(name).expanduser().exists():
        remedy = "the folder must hold config.json, tokenizer files and safetensors weights"
    elif is_missing_folder(name):
        remedy = NO_FOLDER
    elif "gated" in text or "401" in text or "403" in text:
        remedy = "the model is gated: accept its licence on its page and run official_content/configure_huggingface.sh"
    elif "404" in text or "not a valid model identifier" in text or "repositorynotfound" in text:
        remedy = "there is no such folder here and no such model on the hub: check the spelling"
    else:
        remedy = "there is no such folder here and the hub can't be reached: check the name and the network"
    return Problems([f"SFT_BASE_MODEL={name}: {what} could not be loaded ({reason}); {remedy}"])


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with a pad token and the chat template the settings ask for.

    Raises:
        Problems: it can't be loaded.
    """
    load_config(settings)  # one small file: a hub that can't be reached makes itself known once, not for each file
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.base_model, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
        tokenizer("Ping?")  # a class that does not fit tokenizer.json may show only here
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise load_problem("the tokenizer", settings.base_model, error) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise Problems([
            f"SFT_BASE_MODEL={settings.base_model}: has no tokenizer files, so that its tokenizer knows no words; "
            "copy tokenizer.json and tokenizer_config.json of the model there"
        ])  # fmt: skip
    if settings.chat_template:
        tokenizer.chat_template = chat_template_for(settings.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_config(settings: Settings) -> PretrainedConfig:
    """The base model's configuration, without its weights.

    Raises:
        Problems: it can't be loaded.
    """
    try:
        return AutoConfig.from_pretrained(
            settings.base_model, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise load_problem("the configuration", settings.base_model, error) from error


def quantization(settings: Settings) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of a 4- or 8-bit stage, else None."""
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(settings),
    )


def load_model(source: str | Path, settings: Settings, *, device: torch.device | None = None) -> PreTrainedModel:
    """The causal language model in `source` (a hub id, or a folder such as a merged base), ready for an adapter.

    `device`: where a quantised model, or on a GPU any, goes; None is this process's own, for which all processes must
    be there.

    Raises:
        Problems: it can't be loaded.
    """
    keywords: dict[str, Any] = {"dtype": weight_dtype(settings), "trust_remote_code": settings.trust_remote_code}
    if settings.attn != "auto":
        keywords["attn_implementation"] = settings.attn
    if str(source) == settings.base_model:
        keywords["revision"] = settings.model_revision
    quantized = quantization(settings)
    if quantized is not None:
        keywords["quantization_config"] = quantized
    # Placed while it is loaded, tensor by tensor, each process onto its own device: else the main memory would hold a
    # whole copy for every process of the machine.
    if quantized is not None or (torch.cuda.is_available() and not launched().splits_weights):
        keywords["device_map"] = {"": device or PartialState().device}
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **keywords)
    except LOAD_ERRORS as error:
        raise load_problem("the model", str(source), error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise unfit(source, OTHER_SIZES) from error
    model, loaded = found
    if not launched().splits_weights:  # else each process sees a part of them
        if loaded["missing_keys"]:
            raise unfit(source, lacking(loaded["missing_keys"]))
        if cut := cut_away(loaded["unexpected_keys"], model):
            raise unfit(source, cut)
    for module in model.modules():
        # bitsandbytes packs 4-bit weights in evaluation where the CPU has AVX-512 for bfloat16; training goes on with
        # them afterwards, and layers whose width is no multiple of 32 end in an assertion.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # no tensor, a switch
    return model


def lacking(missing: Iterable[str]) -> str:
    """What is wrong with files without these weights, which transformers makes up."""
    first, *others = sorted(missing)
    return f"its files lack {first}{f' and {len(others)} more' if others else ''}, which would be random"


def cut_away(unexpected: Iterable[str], model: torch.nn.Module) -> str:
    """What is wrong where files hold weights of parts that the model has, in more layers or with biases: its
    config.json leaves them out. "" for none; heads, towers and layers for guessing ahead are parts it does not have."""
    if getattr(getattr(model, "config", None), "num_nextn_predict_layers", 0):
        return ""
    parts = {_DIGITS.sub("0", name) for name, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = []
    for name in sorted(unexpected):
        part = _DIGITS.sub("0", name.rpartition(".")[0])
        if part and {part, prefix + part, part.removeprefix(prefix)} & parts:
            found.append(name)
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"its config.json leaves out {found[0]}{more} of its files: a cut model would be trained"


def unfit(source: str | Path, fault: str) -> Problems:
    """The weights and the configuration of a model don't belong together."""
    return Problems([f"SFT_BASE_MODEL={source}: {fault}; copy or download the model again, with its own config.json"])


@contextmanager
def casts_left_to_autocast(layers: Iterable[LoraLayer]) -> Iterator[None]:
    """Adapters take their input as it comes, for a pass under autocast.

    PEFT casts it to the adapter's float32 first and autocast back to bfloat16 at once: the same numbers, but every
    adapted projection then keeps a copy of its own for the backward pass. PEFT's 4-bit layers leave it out as well.
    PEFT's `disable_input_dtype_casting` does the same by a walk through all modules: 8 ms instead of 0.4 (docs/log.md).
    """
    changed = [layer for layer in layers if layer.cast_input_dtype_enabled]
    for layer in changed:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in changed:
            layer.cast_input_dtype_enabled = True


@contextmanager
def factors_cast(layers: Iterable[LoraLayer], dtype: torch.dtype) -> Iterator[None]:
    """The factors of adapters in the number format of the model, exact again afterwards.

    PEFT casts the input of a float32 adapter to float32, for every token and projection, and its output back: 500 of
    3,700 kernels a token in a model of 36 layers. Training's autocast rounds the factors in the same way.
    """
    exact = [(p, p.data) for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]
    for parameter, data in exact:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data


def lora_layers(model: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def trained_modules(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters per kind of module, for the log: {"q_proj": 4096, ...}."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = [
                part
                for part in name.split(".")
                if not part.startswith("lora_") and part not in ("default", "modules_to_save", "weight", "bias")
            ]
            kind = "experts" if "experts" in parts else parts[-1]
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    return counts


@dataclass(frozen=True)
class RandomState:
    """Python's, numpy's and torch's random states, those of all GPUs included."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever runs inside, random states are afterwards as they were before: resume stays exact with evaluation on
    or off."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def answering(model: torch.nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode with its key-value cache on, and back as it was; holes that training left in
    the heap, and answers in turn, go back to the system."""
    return_holes()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        return_holes()
