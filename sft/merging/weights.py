"""Weights as they lie on disk: safetensors shards read by byte range and written in place, never loaded whole.

The format (https://huggingface.co/docs/safetensors): 8 bytes header length, a JSON header with dtype, shape and byte
range of every tensor, then the raw bytes.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.errors import Problems, RunFailed, first_line, hub_errors
from sft.stages.paths import MODEL_CONFIG

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: `start` is its absolute byte offset in `path`, `size` its bytes."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def item_size(self) -> int:
        return self.size // max(self.elements, 1)

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file in the order of their bytes; Problems when the file is cut."""
    broken = f"{path}: is not a whole safetensors file; download or write it again"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise Problems([broken])
        header = file.read(length)
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise Problems([broken]) from error
    entries.pop("__metadata__", None)
    tensors = [
        StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    ]
    if max((t.start + t.size for t in tensors), default=8 + length) != path.stat().st_size:
        raise Problems([broken])
    return sorted(tensors, key=lambda tensor: tensor.start)


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, [] when it has none; Problems when the index names a missing one."""
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise Problems([f"{folder}: misses {', '.join(missing)}, named in {INDEX}; download or write the model again"])
    return [folder / name for name in names]


def read_bytes(
    stored: StoredTensor, first: int = 0, count: int | None = None, *, into: torch.Tensor | None = None
) -> torch.Tensor:
    """`count` elements of a tensor from element `first`, flat, in the stored dtype; into `into` if given."""
    count = stored.elements - first if count is None else count
    target = torch.empty(count, dtype=DTYPES[stored.dtype]) if into is None else into[:count]
    view = _raw(target)
    with stored.path.open("rb", buffering=0) as file:
        position = stored.start + first * stored.item_size
        while view:
            read = os.preadv(file.fileno(), [view], position)
            if not read:
                raise RunFailed(f"{stored.path} ended while reading {stored.name}; was it changed during the merge?")
            view, position = view[read:], position + read
    return target


def _raw(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs lack the buffer


def load(stored: StoredTensor) -> torch.Tensor:
    """The whole tensor in float32 and its shape."""
    return read_bytes(stored).reshape(stored.shape).float()


def write_bytes(descriptor: int, values: torch.Tensor, position: int) -> None:
    """All bytes of a contiguous flat tensor at an absolute position of an open file."""
    view = _raw(values)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def create_shard(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[StoredTensor]:
    """Writes the header of a shard for (name, dtype, shape)s and reserves its bytes; where each tensor goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, places = 0, []
    for name, dtype, shape in tensors:
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        places.append((name, dtype, shape, end, size))
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on multiples of 8 bytes, as the library writes them
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return [
        StoredTensor(name, path, dtype, shape, 8 + len(text) + start, size)
        for name, dtype, shape, start, size in places
    ]


def write_index(folder: Path, shards: dict[str, list[StoredTensor]]) -> None:
    """The index of several shards, as transformers reads it; none for a single `model.safetensors`."""
    if list(shards) == [SINGLE]:
        return
    index = {
        "metadata": {"total_size": sum(t.size for tensors in shards.values() for t in tensors)},
        "weight_map": {t.name: name for name, tensors in shards.items() for t in tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def convert_pickles(paths: Iterable[Path], folder: Path) -> list[Path]:
    """PyTorch .bin files rewritten as safetensors in `folder`, one by one, without running any pickled code."""
    folder.mkdir(parents=True)
    shards = []
    for path in paths:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shards.append(folder / f"{path.stem}.safetensors")
        layout = [(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
        places = create_shard(shards[-1], layout)
        with shards[-1].open("r+b", buffering=0) as file:
            for place in places:
                write_bytes(file.fileno(), tensors[place.name].contiguous().reshape(-1), place.start)
    return shards


# A repository often carries the same weights in several formats: safetensors first, pickles only without them.
TEXTS = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*"]
ELSEWHERE = ["original/*", "onnx/*", "*/*.safetensors"]


def model_folder(base: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a base model (downloaded if it is a hub id) and the hub commit, None for a plain folder."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder, None
    from sft.settings.rules import is_missing_folder  # with all settings: a merge of folders needs none

    if is_missing_folder(base):
        raise Problems([f"SFT_BASE_MODEL={base}: there is no such folder; put the model there again"])
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                base, revision=revision, allow_patterns=[*TEXTS, "*.safetensors"], ignore_patterns=ELSEWHERE
            )
        )
        if not list(snapshot.glob("*.safetensors")):
            snapshot = Path(snapshot_download(base, revision=revision, allow_patterns=[*TEXTS, "pytorch_model*.bin"]))
    except hub_errors() as error:
        reason = first_line(error)
        remedy = "put a model folder there, or check the hub id, the network and the token"
        raise Problems(
            [f"SFT_BASE_MODEL={base}: is no folder here and not to be had from the hub ({reason}); {remedy}"]
        ) from error
    return snapshot, snapshot.name


def read_config(folder: Path) -> dict:
    """config.json of a model folder; Problems when it is missing or the weights are already quantised."""
    path = folder / MODEL_CONFIG
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
