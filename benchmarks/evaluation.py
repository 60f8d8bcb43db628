"""Item 5, evaluation: answers in batches beside one at a time, scoring, and what evaluating, saving, tracking cost."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Bench, alternate, answer, child, comparison, limit
from benchmarks.inputs import tiny_model

ANSWERS = 64


def measure(bench: Bench) -> dict[str, Any]:
    """The table of the item."""
    folder = bench.folder("evaluation")
    small = tiny_model(folder / "model", bench.rows, hidden=256, layers=6)
    model, tokens = (bench.model, 64) if bench.full else (small, 48)
    sizes = (1, 8, 16, 64)

    def run(size: int) -> dict[str, float]:
        return child("evaluation", "generate", model, bench.rows, size, tokens).figures()

    def theirs() -> dict[str, float]:
        return child("evaluation", "transformers", model, bench.rows, sizes[-1], tokens).figures()

    variants: dict[str, Any] = {str(size): lambda size=size: run(size) for size in sizes}
    figures = alternate(variants | {"transformers": theirs}, 3 if bench.full else bench.rounds)
    seconds = {size: figures[str(size)]["median"]["seconds"] for size in sizes}
    plain = figures["transformers"]["median"]["seconds"]
    speeds = [
        comparison(
            f"{ANSWERS} answers, {size} at a time", seconds[1] / seconds[size], 1.0, unit="x", against="one at a time",
            target=">= 8" if size == sizes[-1] else "",
        )
        for size in sizes[1:]
    ]  # fmt: skip
    rival = {"unit": "answers/s", "against": "transformers' generate, the same batch", "target": ">= 1.0"}
    speeds.append(comparison(f"{ANSWERS} answers at once", ANSWERS / seconds[sizes[-1]], ANSWERS / plain, **rival))
    scored = child("evaluation", "score", bench.rows).figures()
    shares = share_of_run(bench, folder, model if bench.full else small)
    lines = [
        *speeds,
        limit("scoring", scored["per_second"], ">= 100", unit="answers/s"),
        limit("checkpoints and tracking in a run", 100 * shares["kept"], "<= 3", unit="% of its time"),
        limit("evaluation, checkpoints, tracking", 100 * shares["share"], "<= 10", unit="% of its time"),
    ]
    title = f"Evaluation: {ANSWERS} answers of {tokens} tokens from {'SmolLM2-135M' if bench.full else 'a small model'}"
    return {"title": title, "comparisons": lines, "figures": figures, "scoring": scored, "run": shares}


def share_of_run(bench: Bench, folder: Path, model: Path) -> dict[str, float]:
    """How long a stage evaluates, saves and tracks at the default rhythm: a few steps with all three in between, each
    weighed by its rhythm: 50 steps per evaluation, 100 per checkpoint, 10 per log. What MLflow's thread computes beside
    the steps counts in full, as though nothing else could run meanwhile."""
    values = {
        "SFT_BASE_MODEL": model, "SFT_DATASET_ID": bench.rows, "SFT_OUT_LORA_DIR": folder / "out", "SFT_LORA_R": 8,
        "SFT_MAX_STEPS": 4 if bench.full else 20, "SFT_MAX_SEQ_LEN": 1024, "SFT_OVERLONG": "drop",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    values |= {"SFT_EVAL_STEPS": 4, "SFT_SAVE_STEPS": 4, "SFT_LOGGING_STEPS": 1}
    (folder / "stage1.env").write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))
    found = child("evaluation", "run", folder, HF_DATASETS_CACHE=str(bench.folder("cache"))).figures()
    steps = found["train"] - found["evaluate"] - found["save"] - found["log"]
    per_step = steps / found["steps"]
    evaluated = found["evaluate"] / found["evaluations"] / 50
    kept = found["save"] / found["saves"] / 100 + (found["log"] + found["send"]) / found["logs"] / 10
    whole = per_step + evaluated + kept
    return found | {"share": (evaluated + kept) / whole, "kept": kept / whole, "seconds_per_step": per_step}


# In a child


def generate(model: Path, rows: Path, size: int, tokens: int, *, plain: bool = False) -> dict[str, float]:
    """Greedy answers to the first prompts, every one `tokens` long; `plain`: by transformers' own generate, at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft.evaluation.answers import end_tokens, generate_answers, prompt_texts

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.generation_config.min_new_tokens = tokens
    lines = rows.read_text(encoding="utf-8").splitlines()[:ANSWERS]
    prompts = [json.loads(line)["messages"][:-1] for line in lines]

    def ours(count: int) -> None:
        assert (
            len(generate_answers(loaded, tokenizer, prompts[:count], max_new_tokens=tokens, batch_size=size)) == count
        )

    def theirs(count: int) -> None:
        texts = prompt_texts(prompts[:count], tokenizer)
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        ends = {"eos_token_id": end_tokens(loaded, tokenizer), "pad_token_id": tokenizer.pad_token_id}
        loaded.generate(**batch, max_new_tokens=tokens, do_sample=False, **ends)

    way = theirs if plain else ours
    way(1)
    started = time.perf_counter()
    way(ANSWERS)
    return {"seconds": time.perf_counter() - started}


def score(rows: Path) -> dict[str, float]:
    """Reference answers scored as `structured` scores a model's."""
    from sft.scoring.score import score as score_rows

    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()[:2000]]
    cases = []
    for row in read:
        text, kind = row["messages"][-1]["content"], (row.get("metadata") or {}).get("format", "json")
        cases.append({"answer": text, "reference": text, "task": f"text_to_{kind}"})
    started = time.perf_counter()
    _, metrics = score_rows("structured", cases)
    seconds = time.perf_counter() - started
    per_second = len(cases) / seconds
    return {"answers": len(cases), "seconds": seconds, "per_second": per_second, "score": metrics["gen_score"]}


def run_stage(env_dir: Path) -> dict[str, float]:
    """A stage as the program runs it, with a clock around training, evaluating, saving and logging."""
    import train
    from sft import cli, run
    from sft.reporting.tracker import Tracker
    from sft.training.trainer import StagedTrainer

    clock: dict[str, float] = {}
    clocked(StagedTrainer, "evaluate", "evaluate", "evaluations", clock)
    clocked(StagedTrainer, "_save_checkpoint", "save", "saves", clock)
    clocked(StagedTrainer, "save_best", "save", "bests", clock)
    clocked(StagedTrainer, "log", "log", "logs", clock)
    clocked(Tracker, "_send_metrics", "send", "sent", clock, time.thread_time)
    clocked(run, "train", "train", "trainings", clock)
    steps: list[int] = []
    finish_run = run.finish
    run.finish = lambda stage, trainer, *rest: (
        steps.append(trainer.state.global_step),
        finish_run(stage, trainer, *rest),
    )
    code = cli.command_line(train.main, ["--stage", "1", "--env-dir", str(env_dir)])
    assert code == 0
    return clock | {"steps": steps[0]}


def clocked(
    owner: Any,
    name: str,
    column: str,
    counter: str,
    clock: dict[str, float],
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Adds up what calls of `owner.name` take; a call inside another of its thread counts once, `train` apart."""
    plain = getattr(owner, name)

    def timed(*arguments: Any, **keywords: Any) -> Any:
        running = vars(_running)
        nested = running.get("inside", False)
        running["inside"] = column != "train"
        started = now()
        try:
            return plain(*arguments, **keywords)
        finally:
            running["inside"] = nested
            clock[column] = clock.get(column, 0.0) + (0.0 if nested else now() - started)
            clock[counter] = clock.get(counter, 0) + 1

    setattr(owner, name, timed)


_running = threading.local()


def main(name: str, *rest: str) -> None:
    if name in ("generate", "transformers"):
        model, rows, size, tokens = rest
        answer(generate(Path(model), Path(rows), int(size), int(tokens), plain=name == "transformers"))
    else:
        answer({"score": score, "run": run_stage}[name](Path(rest[0])))


if __name__ == "__main__":
    main(*sys.argv[1:])
