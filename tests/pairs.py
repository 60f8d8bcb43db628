"""Pairs: settings, rows, architectures, engines and events, drawn so that every two values meet at least once.

Most faults sat where two features meet. Each draw trains a stage or a ladder of stages twice, once undisturbed in one
process with one micro-batch a step, once as drawn, and holds both against the same invariants. `make torture` runs the
whole array, the suite a part of it chosen by seed.

    python -m tests.pairs [--seed 1] [--only NUMBER,NUMBER] [--share 10]
"""

import argparse
import json
import math
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from allpairspy import AllPairs
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests import faults, launching
from tests.campaigns import Campaign
from tests.tiny import WORDS, tokenizer, write_stage

FACTORS: dict[str, tuple[str, ...]] = {
    "rows": ("plain", "turns", "tools", "reasoning", "repeated", "ontology", "text"),
    "model": ("dense", "tied", "windowed", "mixture", "hybrid", "gpt2"),
    "event": ("fresh", "killed", "second stage", "after full training"),
    "adapter": ("lora", "rslora", "dora", "all layers"),
    "loss": ("whole answer", "after marker", "sample", "weight"),
    "batches": ("joined", "packed", "by length", "checkpointed"),
    "evaluation": ("loss", "structured", "none"),
    "noise": ("none", "dropout", "neftune"),
    "numbers": ("float32", "bfloat16"),
    "engine": ("one", "two"),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
TIED = {"tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"intermediate_size": 64, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "tied": ("qwen3", {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, **TIED}),
    "windowed": ("gemma3_text", {
        "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
    }),
    "mixture": ("qwen3_moe", {
        "moe_intermediate_size": 16, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    }),
    "hybrid": ("lfm2", {"intermediate_size": 64, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}),
    # Its own dropout, 0.1 unless said otherwise, would make every division another run.
    "gpt2": ("gpt2", {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0,
    }),
}  # fmt: skip
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.get('reasoning_content') %}<think>{{ message['reasoning_content'] }}</think>{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message.get('tool_calls') or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "size", "arguments": {"name": "red"}}}
TOOL = {"type": "function", "function": {"name": "size", "description": "the size", "parameters": {"type": "object"}}}
STEPS, ROWS, GLOBAL_BATCH = 4, 24, 4
RUN_LIMIT = 240.0
# Joined or apart, one or two processes: sums in another order. bfloat16 has 8 bits.
SAME_LOSS = {"float32": 2e-5, "bfloat16": 2e-2}

Draw = dict[str, str]


@dataclass
class Outcome:
    """What a draw showed; `faults` is empty when every invariant held."""

    draw: Draw
    code: int = 0
    faults: list[str] = field(default_factory=list)


def draws(seed: int) -> list[Draw]:
    """Every pair of values of two factors at least once, in an order and with fillings that the seed decides."""
    dice = random.Random(seed)
    values = [dice.sample(each, len(each)) for each in FACTORS.values()]
    return [dict(zip(FACTORS, drawn, strict=True)) for drawn in AllPairs(values)]


# Inputs


def write_model(folder: Path, name: str) -> Path:
    """A random two-layer model of an architecture with the tokenizer of tests/tiny.py."""
    words = tokenizer()
    words.chat_template = TEMPLATE
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    shared = SIZES if name != "gpt2" else {}
    config = CONFIG_MAPPING[kind](vocab_size=len(words), **shared | sizes | tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def rows_of(kind: str) -> Iterator[dict[str, Any]]:
    """Rows of one kind, every one another, of unequal length."""
    for number in range(ROWS):
        value = number % 6 if kind == "repeated" else number
        name = WORDS[value % 5] * (1 + value % 3)
        ask = {"role": "user", "content": f"Write this as JSON: the name is {name} and {value}"}
        say = {"role": "assistant", "content": f'Steps of {name}.\nOutput:\n{{"name": "{name}", "size": {value}}}'}
        if kind == "turns":
            yield {"messages": [ask, say, {"role": "user", "content": f"and {name}"}, say]}
        elif kind == "tools":
            called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
            yield {"messages": [ask, called, {"role": "tool", "content": name}, say], "tools": [TOOL]}
        elif kind == "reasoning":
            yield {"messages": [ask, say | {"reasoning_content": f"the color is {name}"}]}
        elif kind == "ontology":
            yield {"title": name, "abstract": f"and {value}", "paths": [["Main", name], ["Main", name, str(value)]]}
        elif kind == "text":
            yield {"text": f"the name is {name} and the size is {value}"}
        else:
            yield {"messages": [ask, say], "subcategory": "text_to_json"}


def settings_of(draw: Draw, folder: Path) -> dict[str, object]:
    """The settings of the drawn stage, without output folder and division."""
    settings: dict[str, object] = {
        "SFT_BASE_MODEL": folder / "base", "SFT_DATASET_ID": folder / "rows.jsonl", "SFT_MAX_STEPS": STEPS,
        "SFT_NUM_PROC": 1, "SFT_MAX_SEQ_LEN": 512, "SFT_LR": "2e-3", "SFT_DTYPE": draw["numbers"],
        "SFT_GEN_EVAL_SAMPLES": 3,
        "SFT_GEN_MAX_NEW_TOKENS": 4, "SFT_NUM_GENERATE_SAMPLES": 0, "SFT_REPORT_TO": "mlflow",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.parent}/mlflow.db", "SFT_GRADIENT_CHECKPOINTING": "0",
    }  # fmt: skip
    if draw["model"] in ("gpt2", "hybrid") or draw["adapter"] == "all layers":
        settings["SFT_LORA_TARGET_MODULES"] = "all-linear"
    marked = {"SFT_MASKED_LOSS": "inverse_frequency", "SFT_MASKED_LOSS_MODE": draw["loss"]}
    unit = {"SFT_MASKED_LOSS_UNIT": "path_edge" if draw["rows"] == "ontology" else "json_edge"}
    settings |= {
        "whole answer": {}, "after marker": {"SFT_MASK_COT": 1}, "sample": marked | unit, "weight": marked | unit,
    }[draw["loss"]]  # fmt: skip
    settings |= {
        "joined": {}, "packed": {"SFT_PACKING": 1}, "by length": {"SFT_GROUP_BY_LENGTH": 1},
        "checkpointed": {"SFT_GRADIENT_CHECKPOINTING": "1"},
    }[draw["batches"]]  # fmt: skip
    settings |= {
        "loss": {}, "structured": {"SFT_GEN_EVAL": "structured"}, "none": {"SFT_VAL_RATIO": 0},
    }[draw["evaluation"]]  # fmt: skip
    settings |= {"none": {}, "dropout": {"SFT_LORA_DROPOUT": 0.1}, "neftune": {"SFT_NEFTUNE_NOISE_ALPHA": 5}}[
        draw["noise"]
    ]
    settings |= {"lora": {}, "all layers": {}, "rslora": {"SFT_LORA_RSLORA": 1}, "dora": {"SFT_LORA_DORA": 1}}[
        draw["adapter"]
    ]
    return settings


def write_ladder(draw: Draw, folder: Path) -> int:
    """Model, rows and env files; the number of the last stage, which is the one drawn."""
    folder.mkdir(parents=True)
    write_model(folder / "base", draw["model"])
    lines = [json.dumps(row) for row in rows_of(draw["rows"])]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = settings_of(draw, folder)
    plain = {"SFT_MASKED_LOSS": "none", "SFT_MASK_COT": 0, "SFT_GEN_EVAL": "none", "SFT_DTYPE": "float32"}
    before = {"second stage": [{}], "after full training": [{}, {"SFT_USE_LORA": 0}]}.get(draw["event"], [])
    for number, extra in enumerate(before, start=1):
        write_stage(folder, number, settings | plain | {"SFT_VAL_RATIO": 0, "SFT_MAX_STEPS": 2} | extra)
    write_stage(folder, len(before) + 1, settings)
    return len(before) + 1


# Runs


def arguments(folder: Path, stage: object, out: str, *, batch: int, accumulation: int) -> list[object]:
    sets = {
        "SFT_OUT_LORA_DIR": folder / out / "out", "SFT_PER_DEVICE_TRAIN_BS": batch, "SFT_GRAD_ACCUM": accumulation,
    }  # fmt: skip
    flags = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    return ["--stage", stage, "--env-dir", folder, *flags]


def forked(folder: Path, given: Sequence[object], log: str) -> tuple[int, str]:
    run = faults.start(given, folder / log, prepare=faults.own_cache(folder))
    code = run.wait(RUN_LIMIT)
    if code is None:
        run.signal(signal.SIGKILL)
        code = run.wait(10.0)
    return code if code is not None else -9, run.text()


def killed_and_resumed(folder: Path, given: Sequence[object], stage: int) -> tuple[int, str]:
    """Killed once the first checkpoint of the stage is there, then started again."""
    run = faults.start(given, folder / "killed.log", prepare=faults.own_cache(folder))
    first = folder / "drawn" / f"out_stage{stage}" / "checkpoint-2" / "COMPLETE.json"
    end = time.monotonic() + RUN_LIMIT
    while not run.is_over() and not first.exists() and time.monotonic() < end:
        time.sleep(0.002)
    run.signal(signal.SIGKILL)
    run.wait(10.0)
    return forked(folder, given, "resumed.log")


def two_processes(folder: Path, given: Sequence[object]) -> tuple[int, str]:
    try:
        code, text = launching.run("torchrun", folder / "two", *given)
    except subprocess.TimeoutExpired as error:
        return -9, f"no end in {error.timeout:.0f} s: {(folder / 'two.log').read_text(encoding='utf-8')[-600:]}"
    # The launcher ends with 1 whatever its processes ended with.
    return (2 if "to solve; nothing was written" in text else code), text


def problems(text: str) -> set[str]:
    """The problems listed, without the places where stages and ranks differ."""
    lines = [line for line in text.splitlines() if "[ERROR]" in line]
    return {re.sub(r"^(\[rank\d\]: |rank \d: |stage \d+: )*", "", line) for line in lines}


# Invariants


def try_draw(draw: Draw, folder: Path) -> Outcome:
    """Checks and trains a draw; every invariant that does not hold is one line of `faults`."""
    outcome = Outcome(draw)
    stage = write_ladder(draw, folder)
    simple = arguments(folder, f"1-{stage}", "simple", batch=GLOBAL_BATCH, accumulation=1)
    if stage > 1:
        code, text = forked(
            folder, [*arguments(folder, f"1-{stage - 1}", "simple", batch=4, accumulation=1)], "before.log"
        )
        if code not in (0, 2):
            outcome.faults.append(f"an earlier stage ended with {code}: {text[-600:]}")
        if code:
            outcome.code = code
            return outcome
    checked, said = forked(folder, [*simple, "--check"], "check.log")
    outcome.code, text = forked(folder, simple, "simple.log")
    if checked != outcome.code or (outcome.code == 2 and problems(said) != problems(text)):
        outcome.faults.append(f"--check {checked} {problems(said)}, run {outcome.code} {problems(text)}")
    if outcome.code:
        outcome.faults += [f"exit code {outcome.code}: {text[-600:]}"] if outcome.code != 2 else []
        return outcome
    outcome.faults += rows_lost(draw, folder, stage) + records_differ(folder, stage)
    if stage > 1:
        outcome.faults += vacuous_verification(folder, stage)
    outcome.faults += disturbed(draw, folder, stage)
    return outcome


def disturbed(draw: Draw, folder: Path, stage: int) -> list[str]:
    """The stage as drawn against the undisturbed one: the same losses, and the same bits after a kill."""
    batch, accumulation = (1, GLOBAL_BATCH) if draw["engine"] == "one" else (1, GLOBAL_BATCH // 2)
    if draw["event"] == "killed":
        batch, accumulation = (GLOBAL_BATCH, 1) if draw["engine"] == "one" else (batch, accumulation)
    given = arguments(folder, stage, "drawn", batch=batch, accumulation=accumulation)
    for path in folder.glob("simple/out_stage*"):  # earlier stages are the same
        number = re.search(r"stage(\d+)", path.name)
        if path.is_dir() and number and int(number[1]) < stage:
            shutil.copytree(path, folder / "drawn" / path.name)
    if draw["engine"] == "two":
        code, text = two_processes(folder, given)
    elif draw["event"] == "killed":
        code, text = killed_and_resumed(folder, given, stage)
    else:
        code, text = forked(folder, given, "drawn.log")
    if code:
        return [f"as drawn it ended with {code}: {text[-800:]}"]
    first, second = (folder / out / f"out_stage{stage}" for out in ("simple", "drawn"))
    if draw["event"] == "killed" and draw["engine"] == "one":
        pairs = [load_file(path / "adapter_model.safetensors") for path in (first, second)]
        same = all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
        return [] if same else ["the adapter of the resumed run is another one"]
    # Dropout is drawn for the tokens of a micro-batch, so there another division is another run.
    return [] if draw["noise"] == "dropout" else losses_differ(first, second, SAME_LOSS[draw["numbers"]])


def losses_differ(first: Path, second: Path, limit: float) -> list[str]:
    """The loss of the first step, made by equal weights on equal rows, under another division."""
    values = [series(folder, "loss")[0] for folder in (first, second)]
    far = not all(map(math.isfinite, values)) or abs(values[0] - values[1]) > limit * max(1.0, abs(values[0]))
    return [f"loss of step 1 {values[0]} as one micro-batch, {values[1]} as drawn"] if far else []


def series(folder: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def rows_lost(draw: Draw, folder: Path, stage: int) -> list[str]:
    """Every row is trained, validated or counted under a reason."""
    manifest = json.loads((folder / "simple" / f"out_stage{stage}" / "stage.json").read_text())
    known = manifest["train_rows"] + manifest["val_rows"] + sum(manifest["dropped"].values())
    return [] if known == ROWS else [f"{ROWS} rows, but {known} trained, validated or dropped: {manifest['dropped']}"]


def records_differ(folder: Path, stage: int) -> list[str]:
    """metrics.jsonl, manifest, report and MLflow tell of the same run."""
    out = folder / "simple" / f"out_stage{stage}"
    manifest, report = (json.loads((out / name).read_text()) for name in ("stage.json", "report.json"))
    found = []
    if manifest["steps"] != STEPS:
        found.append(f"{manifest['steps']} steps in the manifest instead of {STEPS}")
    if not manifest["tokens"]["trained"] or not (out / "report.html").is_file() or not report:
        found.append("nothing trained by the manifest, or no report")
    with sqlite3.connect(folder.parent / "mlflow.db") as store:
        run = store.execute("select status from runs where run_uuid = ?", (manifest["mlflow_run_id"],)).fetchall()
        tracked = store.execute(
            "select step, value from metrics where run_uuid = ? and key = 'loss'", (manifest["mlflow_run_id"],)
        ).fetchall()
    losses = [round(value, 6) for value in series(out, "loss")]
    if run != [("FINISHED",)] or [round(value, 6) for _, value in sorted(tracked)] != losses:
        found.append(f"MLflow has {run} with {sorted(tracked)}, metrics.jsonl {losses}")
    if manifest["metrics"].get("loss") is not None and round(manifest["metrics"]["loss"], 6) != losses[-1]:
        found.append(f"the manifest's loss is {manifest['metrics']['loss']}, the last logged one {losses[-1]}")
    return found


def vacuous_verification(folder: Path, stage: int) -> list[str]:
    """The merged base answers its probe; the base without the last adapter must not."""
    from sft.errors import RunFailed
    from sft.merging.probe import verify
    from sft.stages.paths import PROBE

    out = folder / "simple"
    probe = out / f"out_stage{stage - 1}" / PROBE
    if not probe.exists() or not (out / f"out_stage{stage}_merged_base").exists():
        return []
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    try:
        figures = verify(model, probe)
    except RunFailed:
        return []
    return [f"the base without its adapter passes as merged: {figures}"]


def campaign(numbers: Sequence[int], root: Path, seed: int) -> Campaign:
    """The draws with these numbers; one that held is removed from the disk."""
    array, found = draws(seed), Campaign("pairs of features")
    # Made beforehand: on a busy machine its tables take longer than a short run waits for its tracker. In a process of
    # its own, so that no connection is inherited by the runs, which are forked.
    root.mkdir(parents=True, exist_ok=True)
    make = "import mlflow, sys; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
    subprocess.run([sys.executable, "-c", make, f"sqlite:///{root}/mlflow.db"], check=True, capture_output=True)
    for number in numbers:
        folder = root / f"draw{number}"
        started = time.monotonic()
        outcome = try_draw(array[number], folder)
        found.tried["refused alike by --check and run" if outcome.code == 2 else "trained"] += 1
        seconds = time.monotonic() - started
        print(f"{number} {', '.join(outcome.draw.values())}: {outcome.code}, {seconds:.0f} s", flush=True)
        if outcome.faults:
            found.fail(f"{number} {outcome.draw}: {'; '.join(outcome.faults)}")
        else:
            shutil.rmtree(folder)
    return found


def chosen(seed: int, share: int) -> list[int]:
    """Every `share`th draw, beginning where the seed says."""
    return list(range(seed % share, len(draws(seed)), share))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pairs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=int, default=1, help="every so many draws")
    parser.add_argument("--only", default="", help="comma list of draws by number")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave what was lost there")
    options = parser.parse_args()
    root = options.keep or Path(mkdtemp(prefix="pairs"))
    only = [int(number) for number in options.only.split(",") if number]
    found = campaign(only or chosen(options.seed, options.share), root, options.seed)
    print(found.table())
    return 1 if found.lost else 0


if __name__ == "__main__":
    sys.exit(main())
