"""A rival of the training item in an environment of its own: LLaMA-Factory, packed without contamination.

Run by that environment's Python (`--llamafactory PYTHON`), which has none of our dependencies beside torch's.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.training_peers import speed

PACKS_PER_STEP = 4


def train(model: Path, rows: Path, folder: Path, targets: str, cutoff: int) -> dict[str, float]:
    """Its command's own function over the same rows; padding doesn't count as tokens, the first step isn't timed."""
    stand_in_for_sound()
    from llamafactory.train.tuner import run_exp
    from transformers import Trainer, TrainerCallback

    write_data(rows, folder)
    seen: dict[str, Any] = {"tokens": 0, "times": []}
    plain = Trainer.training_step

    def counted(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **keywords: Any) -> Any:
        seen["tokens"] += real_tokens(inputs["input_ids"], self.processing_class.pad_token_id)
        return plain(self, model, inputs, *rest, **keywords)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            seen["times"].append((time.perf_counter(), time.process_time(), seen["tokens"]))
            seen["tokens"] = 0

    Trainer.training_step = counted
    arguments = {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
        "lora_alpha": 16, "lora_target": targets, "dataset": "rows", "dataset_dir": str(folder), "template": "chatml",
        "cutoff_len": cutoff, "packing": True, "neat_packing": True, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": PACKS_PER_STEP, "num_train_epochs": 1, "learning_rate": 1e-4, "logging_steps": 1,
        "lr_scheduler_type": "constant", "output_dir": str(folder / "out"), "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "disable_gradient_checkpointing": True, "optim": "adamw_torch_fused",
    }  # fmt: skip
    run_exp(arguments, callbacks=[Clock()])
    return speed(seen["times"])


def stand_in_for_sound() -> None:
    """It imports torchaudio, of which there is no wheel for a torch without CUDA; rows of text never use it."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        empty = ModuleType("torchaudio")
        empty.__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = empty


def write_data(rows: Path, folder: Path) -> None:
    """The rows and the file that tells it their columns."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_bytes(rows.read_bytes())
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}
    text = json.dumps({"rows": about | {"tags": tags | {"system_tag": "system"}}})
    (folder / "dataset_info.json").write_text(text)


def real_tokens(ids: Any, pad: int) -> int:
    """Tokens of (packs, length) without the run of padding at the end of each pack."""
    return sum(int((pack != pad).nonzero().max()) + 1 for pack in ids)


if __name__ == "__main__":
    _, model, rows, folder, targets, cutoff = sys.argv
    print(json.dumps(train(Path(model), Path(rows), Path(folder), targets, int(cutoff))), flush=True)
