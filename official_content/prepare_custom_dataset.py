#!/usr/bin/env python3
"""Turn a public or an own data set into a folder that stageN.env can name as SFT_DATASET_ID.

  prepare_custom_dataset.py --model meta-llama/Llama-2-7b-hf --source alpaca --num-samples 10000
  prepare_custom_dataset.py --model gpt2 --source csv --source-path data.csv --format chatml
  prepare_custom_dataset.py --inspect datasets/alpaca_gpt2_100

Rows are checked, exact duplicates and over-long rows removed and counted, and the first --num-samples kept. The folder
holds a split `train` with `messages` (what training reads), `text` (in the chosen format) and metadata.json.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sft.environment import offline_unless_reachable
from sft.errors import Problems
from sft.programs.command_line import encoding_name, run_program, whole_number
from sft.programs.prepare_dataset import Prepared

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Source

FILE_ENDINGS = {"json": (".json", ".jsonl"), "csv": (".csv",)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="M", help="hub id or folder of the model; its tokenizer counts the tokens")
    parser.add_argument(
        "--source", choices=["alpaca", "dolly", "wizardlm", "json", "csv"], help="where the rows come from"
    )
    parser.add_argument("--source-path", type=Path, metavar="P", help="the file of --source json (or .jsonl) and csv")
    parser.add_argument("--num-samples", type=whole_number, metavar="K", help="rows to keep (all)")
    parser.add_argument(
        "--format", choices=["alpaca", "chatml", "llama2"], default="alpaca", help="format of `text` (alpaca)"
    )
    parser.add_argument(
        "--max-length", type=int, default=2048, metavar="L", help="most tokens of a row; 0 counts none (2048)"
    )
    parser.add_argument("--encoding", type=encoding_name, help="encoding of a file that is not UTF-8")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write (datasets/<source>_<model>_<K>)")
    parser.add_argument(
        "--inspect", type=Path, metavar="DIR", help="only show rows, columns, lengths and the first row of DIR"
    )
    parser.add_argument("--input", metavar="P", help="another name of --source-path, or the hub id for huggingface")
    parser.add_argument("--input-type", choices=["jsonl", "csv", "huggingface"], help="with --input: what it is")
    return parser.parse_args()


def take_aliases(options: argparse.Namespace) -> None:
    """Translate --input and --input-type of the public program of this name."""
    if options.input is None:
        return
    if options.source or options.source_path:
        raise Problems(["--input and --source are two ways to say one thing; give one of them"])
    kinds = {".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl"}
    kind = options.input_type or kinds.get(Path(options.input).suffix, "huggingface")
    options.source = {"jsonl": "json", "csv": "csv", "huggingface": "huggingface"}[kind]
    if kind != "huggingface":
        options.source_path = Path(options.input)


def mistakes(options: argparse.Namespace) -> list[str]:
    """Everything wrong with the arguments, at once."""
    found = []
    if not options.model:
        found.append("--model is missing; name the model the rows are for")
    if not options.source:
        found.append("--source is missing; one of alpaca, dolly, wizardlm, json, csv")
    endings = FILE_ENDINGS.get(options.source, ())
    if endings and not options.source_path:
        found.append(f"--source {options.source} needs --source-path; name the file")
    elif endings and options.source_path.suffix.lower() not in endings:
        found.append(
            f"--source-path {options.source_path}: --source {options.source} reads {' and '.join(endings)} files"
        )
    if options.max_length < 0:
        found.append(f"--max-length {options.max_length}: tokens of a row, 0 for no limit")
    if options.source_path and options.source and not endings:
        found.append(f"--source-path {options.source_path}: --source {options.source} is read from the hub")
    return found


def target_folder(options: argparse.Namespace, rows: int) -> Path:
    name = options.input.rsplit("/", 1)[-1] if options.source == "huggingface" else options.source
    model = Path(options.model).name
    return options.output or Path("datasets") / f"{name}_{model}_{options.num_samples or rows}"


def refuse_existing(target: Path) -> None:
    if target.exists():
        raise Problems([f"{target}: exists already and is not overwritten; remove it or name another --output"])


def chosen_source(options: argparse.Namespace) -> "Source":
    from sft.programs.prepare_dataset import HUB_SOURCES
    from sft.settings import Source

    if options.source == "huggingface":
        return Source(id=options.input)
    if options.source_path:
        return Source(id=str(options.source_path), encoding=options.encoding)
    return HUB_SOURCES[options.source]


def build(options: argparse.Namespace) -> None:
    if options.output or options.num_samples:
        refuse_existing(target_folder(options, 0))
    offline_unless_reachable()
    from sft.programs import prepare_dataset

    source = chosen_source(options)
    tokenizer = prepare_dataset.load_tokenizer(options.model) if options.max_length else None
    prepared = prepare_dataset.prepare_dataset(
        source,
        text_format=options.format,
        tokenizer=tokenizer,
        max_length=options.max_length,
        num_samples=options.num_samples,
    )
    target = target_folder(options, len(prepared.rows))
    refuse_existing(target)
    metadata = {
        "model_name": options.model,
        "tokenizer": options.model if options.max_length else None,
        "source": source.id,
        "format": options.format,
        "max_length": options.max_length,
        "requested_samples": options.num_samples,
    }
    prepare_dataset.save_dataset(prepared, target, metadata)
    tell(options, source.id, prepared)
    print(f"In stageN.env:\nSFT_DATASET_ID={target}\n{template_line(options.format, tokenizer)}")


def template_line(text_format: str, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """The setting by which the text of this format is trained; only a model with its own template can do without."""
    line = f"SFT_CHAT_TEMPLATE={text_format}"
    own = tokenizer is not None and tokenizer.chat_template
    return f"# {line} would train the text as shown here; unset, the model's own chat template is used" if own else line


def tell(options: argparse.Namespace, name: str, prepared: "Prepared") -> None:
    """How many rows there are, what was lost, how long they are."""
    from sft.programs.prepare_dataset import bars, histogram, lost

    kept = len(prepared.rows)
    if options.num_samples and kept < options.num_samples:
        print(f"[WARNING] {name} gave only {kept:,} of the {options.num_samples:,} rows asked for")
    print(f"{kept:,} rows written; lost: {lost(prepared.dropped.placed()) or 'none'}")
    if prepared.lengths:
        print(f"tokens of the text\n{bars(histogram(prepared.lengths))}")


def inspect(folder: Path) -> None:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Problems([f"{folder}: not a folder written by save_to_disk ({error})"]) from error
    show(folder, loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded})


def show(folder: Path, splits: "dict[str, datasets.Dataset]") -> None:
    """Rows and columns of every split, lengths, first rows."""
    from sft.programs.prepare_dataset import bars, histogram

    for name, split in splits.items():
        print(f"{name}: {len(split):,} rows, columns {', '.join(split.column_names)}")
    described = folder / "metadata.json"
    known = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    if counted := known.get("histogram"):
        print(f"tokens of the text by {known['tokenizer']}\n{bars(counted)}")
    elif any(len(split) for split in splits.values()):
        lengths = [len(json.dumps(row, ensure_ascii=False)) for split in splits.values() for row in split]
        print(f"characters of a row (no token counts stand beside this data set)\n{bars(histogram(lengths))}")
    for name, split in splits.items():
        if len(split):
            print(f"first row of {name}:\n{json.dumps(split[0], indent=2, ensure_ascii=False, default=str)}")


def main() -> None:
    options = arguments()
    if options.inspect:
        inspect(options.inspect)
        return
    take_aliases(options)
    if found := mistakes(options):
        raise Problems(found)
    build(options)


def program() -> int:
    """The installed command."""
    return run_program(main)


if __name__ == "__main__":
    raise SystemExit(program())
