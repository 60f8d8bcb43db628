"""Hand-made ladders for tests: env files, data and stage folders without any training."""

import json
from collections.abc import Mapping
from pathlib import Path

from sft.settings import Settings, load_settings
from sft.stages.stage import Stage
from sft.storage import seals


def make_settings(root: Path, stage: int = 1, *, strict: bool = False, **values: object) -> Settings:
    """Settings of a stage under `root`: SFT_ names in lower case, one data file, a base model folder of two files."""
    base, rows = root / "base", root / "rows.jsonl"
    if not base.exists():
        base.mkdir(parents=True)
        (base / "config.json").write_text('{"model_type": "qwen3"}')
        (base / "model.safetensors").write_bytes(b"base weights")
        rows.write_text('{"prompt": "a", "completion": "b"}\n')
    lines = {"base_model": base, "out_lora_dir": root / "out", "dataset_id": rows} | values
    text = "".join(f"SFT_{name.upper()}='{value}'\n" for name, value in lines.items())
    (root / f"stage{stage}.env").write_text(text)
    return load_settings(stage, env_dir=root, environ={}, strict=strict)


def add_adapter(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)


def add_checkpoint(folder: Path, step: int, *, epoch: float = 0.5, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state: Mapping[str, object] = {"global_step": step, "epoch": epoch}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights of step %d" % step)
    if sealed:
        seals.seal(checkpoint)
    return checkpoint


def train(settings: Settings, weights: bytes | None = None, *, fresh: bool = False) -> Stage:
    """Go through a stage as train.py does, up to a complete one."""
    with Stage.open(settings, fresh=fresh) as stage:
        stage.begin()
        add_adapter(stage.folder, weights or b"adapter %d" % settings.stage)
        stage.complete(metrics={"epoch": 1.0})
    return stage
