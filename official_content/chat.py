#!/usr/bin/env python3
"""Talk to the model of a stage.

  chat.py --stage 3
  chat.py --stage 1 --env-dir configs/recipes/debug_gpt2 --max-new-tokens 200
  chat.py --stage 3 --base-model models/moved
  echo 'Write this as JSON: name is Sora' | chat.py --stage 3

A line is a message; one that ends in a backslash goes on in the next. /reset forgets the conversation, /quit ends it.
Answers are greedy, as in the generation evaluation. They go to stdout, everything else to stderr.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import Problems, RunFailed
from sft.programs.command_line import reworded, run_program, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.programs.export import Origin
    from sft.settings import Settings

Messages = list[dict[str, str]]
Told = Mapping[str, Any]
NOTHING: Told = {}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", type=whole_number, required=True, metavar="N", help="stage to talk to; it must be complete")
    add("--env-dir", type=Path, default=Path(), metavar="DIR", help="where stageN.env are (default: current directory)")
    add("--set", action="append", default=[], dest="overrides", metavar="NAME=VALUE", help="override one setting")
    add("--base-model", metavar="MODEL", help="where the base model lies now, instead of SFT_BASE_MODEL")
    add("--system", default="", metavar="TEXT", help="system message at the start of the conversation (none)")
    add("--max-new-tokens", type=whole_number, default=512, metavar="K", help="longest answer in tokens (512)")
    return parser.parse_args()


def trained_folder(settings: "Settings") -> Path:
    """OUT_stageN. Raises Problems, without importing torch, where there is no trained stage in it."""
    from sft.stages.paths import MANIFEST, stage_folder

    folder = stage_folder(settings.out_lora_dir, settings.stage)
    if not (folder / MANIFEST).is_file():
        remedy = f"train it with {settings.command()}, or name its folder by --env-dir or --set"
        raise Problems([f"{folder}: holds no trained stage; {remedy}"])
    return folder


def find_stage(folder: Path) -> "Origin":
    """What the stage's model is made of. Raises Problems for a stage that is not complete or was outdated since."""
    from sft.programs.export import find_origin

    with reworded("--checkpoint_dir ", ""):
        return find_origin(folder)


def settings_of(options: argparse.Namespace) -> "Settings":
    """The stage's settings, with the base model that was named by the option."""
    from sft.settings import load_settings

    overrides = list(options.overrides)
    if options.base_model:
        with reworded("SFT_BASE_MODEL=", "--base-model "):
            overrides.append(f"SFT_BASE_MODEL={options.base_model}")
            return load_settings(options.stage, env_dir=options.env_dir, overrides=overrides)
    try:
        return load_settings(options.stage, env_dir=options.env_dir, overrides=overrides)
    except Problems as found:
        if all(text.startswith("SFT_BASE_MODEL=") for text in found.problems) and (model := own_model(options)):
            overrides.append(f"SFT_BASE_MODEL={model}")
            return load_settings(options.stage, env_dir=options.env_dir, overrides=overrides)
        remedy = "; if the base model was moved, say where to with --base-model FOLDER"
        raise Problems(
            text + remedy if text.startswith("SFT_BASE_MODEL=") else text for text in found.problems
        ) from found


def own_model(options: argparse.Namespace) -> Path | None:
    """A whole model of the stage's own, which needs no base model: what it started from merged, or what it trained."""
    from sft.settings import load_settings
    from sft.stages.paths import MODEL_CONFIG, merged_base, stage_folder

    somewhere = [*options.overrides, "SFT_BASE_MODEL=the/base"]  # reads like a hub id, which nobody looks up here
    settings = load_settings(options.stage, env_dir=options.env_dir, overrides=somewhere)
    folder = stage_folder(settings.out_lora_dir, settings.stage)
    return next((place for place in (merged_base(folder), folder) if (place / MODEL_CONFIG).is_file()), None)


def load(
    settings: "Settings", origin: "Origin", base_model: str | None = None
) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """The stage's model, ready to answer, and its tokenizer. `base_model`: where its base model lies now; without it
    SFT_BASE_MODEL may say that too.

    Raises:
        Problems: that is another model, or the recorded one is gone.
    """
    import torch
    from transformers import AutoTokenizer

    from sft.merging.merge import is_current
    from sft.merging.parents import with_adapters
    from sft.models.model import load_model
    from sft.programs.base_model import has_moved, is_base_of, require_base, with_base_model
    from sft.stages.paths import merged_base, stage_folder

    if base_model or (has_moved(origin) and is_base_of(origin, settings.base_model)):
        origin = with_base_model(origin, base_model or settings.base_model)

    merged = merged_base(stage_folder(settings.out_lora_dir, settings.stage))
    base, adapters = origin.base, origin.adapters
    if origin.earlier and is_current(merged, origin.earlier):
        base, adapters = str(merged), adapters[-1:]
    elif len(adapters) > 1 and settings.quantised:
        remedy = f"add {' '.join(f'--set {name}=0' for name in settings.quantised)}"
        raise Problems([f"{merged}: is missing or outdated, and nothing is merged into quantised weights; {remedy}"])
    if base == origin.base:
        require_base(origin, origin.name)
    model = with_adapters(load_model(base, settings), adapters)
    if torch.cuda.is_available() and not settings.quantised:
        model = model.to("cuda")
    tokenizer = AutoTokenizer.from_pretrained(origin.tokenizer or base, trust_remote_code=settings.trust_remote_code)
    return model.eval(), tokenizer


def typed() -> Iterator[str]:
    """Lines typed on a terminal, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys and a history
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def spoken(lines: Iterable[str]) -> Iterator[str]:
    """Messages from lines: one that ends in a backslash goes on in the next, blank ones are left out."""
    parts: list[str] = []
    for line in lines:
        parts.append(line.rstrip("\n"))
        if parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
            continue
        if any(part.strip() for part in parts):
            yield "\n".join(parts)
        parts = []
    if any(part.strip() for part in parts):
        yield "\n".join(parts)


def answer(
    model: Any, tokenizer: "PreTrainedTokenizerBase", messages: Messages, max_new_tokens: int, told: Told = NOTHING
) -> str:
    """Streams the answer to stdout and returns it; `told` are SFT_TEMPLATE_OPTIONS."""
    import torch
    from transformers import TextStreamer

    from sft.evaluation.answers import end_tokens

    ids = prompt_ids(tokenizer, messages, told).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
        )
    except torch.OutOfMemoryError as error:
        raise RunFailed("Out of memory: /reset the conversation sooner, or add --set SFT_LOAD_IN_4BIT=1") from error
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Messages, told: Told = NOTHING) -> Any:
    """The rendered conversation as ids of shape (1, tokens). Raises Problems for what the template refuses."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise Problems(["the stage's tokenizer has no chat template: it was trained on plain text, not to answer"])
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **told)
    except TemplateError as error:
        raise Problems([f"the model's chat template refuses the conversation ({error}); leave out --system"]) from error
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def fitting(
    model: Any, tokenizer: "PreTrainedTokenizerBase", messages: Messages, room: int, told: Told = NOTHING
) -> Messages:
    """The conversation without its oldest exchanges, where it would not fit the model's positions."""
    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    while prompt_ids(tokenizer, messages, told).shape[1] + room > longest:
        start = 1 if messages[0]["role"] == "system" else 0
        if len(messages) - start < 3:
            break
        print("(the oldest exchange is forgotten: the model's positions are used up)", file=sys.stderr)
        messages = messages[:start] + messages[start + 2 :]
    return messages


def talk(model: Any, tokenizer: "PreTrainedTokenizerBase", options: argparse.Namespace, told: Told) -> None:
    """Answers until the input ends."""
    start: Messages = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    by_hand = sys.stdin.isatty()
    if by_hand:
        print(f"Stage {options.stage}. /reset forgets the conversation, /quit ends it.", file=sys.stderr)
    for said in spoken(typed() if by_hand else sys.stdin):
        if said.strip() == "/quit":
            return
        if said.strip() == "/reset":
            messages = list(start)
            continue
        asked = [*messages, {"role": "user", "content": said}]
        messages = fitting(model, tokenizer, asked, options.max_new_tokens, told)
        found = answer(model, tokenizer, messages, options.max_new_tokens, told)
        messages.append({"role": "assistant", "content": found})


def main() -> None:
    options = arguments()
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr] - a stray byte is no reason to end
    settings = settings_of(options)
    folder = trained_folder(settings)
    settings.export_passthrough()
    from sft.environment import offline_unless_reachable, silence_libraries, silence_torch

    offline_unless_reachable()
    silence_libraries()
    silence_torch()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    origin = find_stage(folder)
    with reworded("SFT_BASE_MODEL=", f"{folder}: its base model "):
        model, tokenizer = load(settings, origin, options.base_model)
    talk(model, tokenizer, options, settings.template_options)


def program() -> int:
    """The installed command."""
    return run_program(main)


if __name__ == "__main__":
    raise SystemExit(program())
