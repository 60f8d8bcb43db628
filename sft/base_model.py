"""A model's name to the folder that holds it, and whether adapters may be folded into it."""

import json
from pathlib import Path

from sft.checks import is_missing_folder
from sft.errors import Problems

# A repository often carries the same weights in several formats: safetensors first, pickles only without them.
TEXTS = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*"]
ELSEWHERE = ["original/*", "onnx/*", "*/*.safetensors"]


def model_folder(base: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a base model (downloaded if it is a hub id) and the hub commit, None for a plain folder."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder, None
    if is_missing_folder(base):
        raise Problems([f"SFT_BASE_MODEL={base}: there is no such folder; put the model there again"])
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot = Path(
            snapshot_download(
                base, revision=revision, allow_patterns=[*TEXTS, "*.safetensors"], ignore_patterns=ELSEWHERE
            )
        )
        if not list(snapshot.glob("*.safetensors")):
            snapshot = Path(snapshot_download(base, revision=revision, allow_patterns=[*TEXTS, "pytorch_model*.bin"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "put a model folder there, or check the hub id, the network and the token"
        raise Problems(
            [f"SFT_BASE_MODEL={base}: is no folder here and not to be had from the hub ({reason}); {remedy}"]
        ) from error
    return snapshot, snapshot.name


def read_config(folder: Path) -> dict:
    """config.json of a model folder; Problems when it is missing or the weights are already quantised."""
    path = folder / "config.json"
    if not path.is_file():
        raise Problems([f"SFT_BASE_MODEL={folder}: holds no config.json; name a folder written by save_pretrained"])
    config = json.loads(path.read_text(encoding="utf-8"))
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method")
        remedy = "name the full-precision model and set SFT_LOAD_IN_4BIT=1: merged weights are quantised on load"
        raise Problems(
            [f"SFT_BASE_MODEL={folder}: its weights are quantised ({method}), nothing is merged into such; {remedy}"]
        )
    return config
