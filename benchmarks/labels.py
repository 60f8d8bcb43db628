"""Item 2, labels: messages to audited labels beside the tokenizer's batch call and TRL's preparation; mixing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Bench, alternate, answer, child, comparison, cores, limit, resident_bytes
from benchmarks.inputs import multiplied

MIXED = 1_000_000


def measure(bench: Bench) -> dict[str, Any]:
    """The table of the item."""
    folder = bench.folder("labels")
    rows = multiplied(bench.rows, folder / "rows.jsonl", 10 if bench.full else 2)
    few = multiplied(bench.rows, folder / "few.jsonl", 1)
    names = ("ours", "tokenizer", "trl")

    def run(name: str, source: Path) -> dict[str, float]:
        cache = bench.folder("cache")
        return child("labels", name, bench.model, source, folder, HF_DATASETS_CACHE=str(cache)).figures()

    figures = alternate({name: lambda name=name: run(name, rows) for name in names}, bench.rounds)
    alone = {name: run(name, few) for name in ("ours",)}
    mixed = child("labels", "mix", MIXED, HF_DATASETS_CACHE=str(bench.folder("cache"))).figures()
    return {
        "title": f"Labels: {int(figures['ours']['median']['rows']):,} rows, messages to audited labels",
        "comparisons": lines(figures, alone["ours"], mixed),
        "figures": figures,
        "few": alone,
        "mix": mixed,
    }


def lines(figures: dict[str, Any], few: dict[str, float], mixed: dict[str, float]) -> list[dict[str, Any]]:
    speeds = {name: found["median"]["rows_per_second"] for name, found in figures.items()}
    ours, memory = figures["ours"]["median"], "memory beyond the loaded rows"
    same = {found["median"]["digest"] for found in figures.values()}
    batch = "the fast tokenizer's batch call"
    trl = f"TRL's preparation, {cores()} processes"
    growth = ours["extra_bytes"] / max(few["extra_bytes"], 1)
    times = f"with {few['rows']:,.0f} rows"
    return [
        comparison("labels", speeds["ours"], speeds["tokenizer"], unit="rows/s", against=batch, target=">= 0.8"),
        comparison("labels", speeds["ours"], speeds["trl"], unit="rows/s", against=trl, target=">= 2.0"),
        limit("different token ids among the three", len(same) - 1, "<= 0", unit="sets"),
        comparison(memory, ours["extra_bytes"], few["extra_bytes"], unit="bytes", against=times, ratio=growth),
        limit(f"mix, split, upsample {MIXED:,} rows", mixed["seconds"], "<= 5", unit="s"),
        limit("their memory", mixed["extra_bytes"] / 1e6, "<= 500", unit="MB"),
    ]


# In a child


def digest_of(encoded: Any) -> int:
    """A number that equal token ids give."""
    import numpy as np
    import xxhash

    digest = xxhash.xxh3_64()
    for ids in encoded:
        digest.update(np.asarray(ids, np.int32).tobytes())
    return digest.intdigest() >> 12  # exact as a float


class Peak:
    """The highest resident size while the block runs, beyond what was there before; sampled, children included."""

    def __enter__(self) -> Peak:
        import threading

        self.before, self.highest, self.over = resident_bytes(), 0, threading.Event()
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def look(self) -> None:
        while not self.over.wait(0.02):
            self.highest = max(self.highest, resident_bytes())

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.watch.join()

    @property
    def extra(self) -> int:
        return max(0, self.highest - self.before)


def label_ours(model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from sft.data.labels.audit import audit
    from sft.data.labels.label import label
    from sft.data.sources.load import load_source
    from sft.settings import Settings, Source

    tokenizer = AutoTokenizer.from_pretrained(model)
    source = Source(id=str(rows))
    settings = Settings(
        stage=1,
        env_dir=folder,
        base_model=str(model),
        out_lora_dir=folder / "out",
        dataset_id=str(rows),
        max_seq_len=8192,
    )
    loaded = load_source(source)
    with Peak() as peak:
        started = time.perf_counter()
        labelled = label(loaded, tokenizer, settings)
        problems = audit(labelled, tokenizer, settings)
        seconds = time.perf_counter() - started
    assert not problems and len(labelled.dataset) == len(loaded.dataset), (problems, labelled.dropped)
    digest = digest_of(labelled.dataset.with_format("numpy")["input_ids"])
    return {"rows": len(loaded.dataset), "seconds": seconds, "extra_bytes": peak.extra, "digest": digest}


def encode_texts(model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """The floor: the rendered text of all rows, one call."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in read(rows)]
    with Peak() as peak:
        started = time.perf_counter()
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        seconds = time.perf_counter() - started
    return {"rows": len(texts), "seconds": seconds, "extra_bytes": peak.extra, "digest": digest_of(encoded)}


def prepare_trl(model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """What SFTTrainer does to a data set of messages before it trains, with one process per core."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loaded = datasets.Dataset.from_list([{"messages": messages} for messages in read(rows)])
    clock: dict[str, Any] = {}

    class Clocked(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **keywords: Any) -> Any:
            with Peak() as peak:
                started = time.perf_counter()
                prepared = super()._prepare_dataset(*arguments, **keywords)
                clock.update(seconds=time.perf_counter() - started, extra_bytes=peak.extra)
            clock["prepared"] = prepared
            return prepared

    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(tokenizer)
    )
    args = SFTConfig(
        str(folder / "trl"), max_length=8192, dataset_num_proc=cores(), report_to=[], use_cpu=True, bf16=False
    )
    Clocked(
        transformers.AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=loaded,
        processing_class=tokenizer,
    )
    digest = digest_of(clock.pop("prepared")["input_ids"])
    return {"rows": len(loaded), "digest": digest} | clock


def read(rows: Path) -> list[Any]:
    import json

    return [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]


def mix_many(count: int, sources: int = 1) -> dict[str, Any]:
    """Splitting, mixing and upsampling of labelled rows that are there already."""
    from sft.data.mixture import mix
    from sft.settings import Settings

    folder = Path(os.environ["HF_DATASETS_CACHE"])
    loaded = [labelled_rows(count // sources, number) for number in range(sources)]
    settings = Settings(
        stage=1, env_dir=folder, base_model="none", out_lora_dir=folder / "out", dataset_id="none",
        use_upsampling=True, upsample_rules={"text_to_toml": 1.5, "toml": 1.2},
    )  # fmt: skip
    with Peak() as peak:
        started = time.perf_counter()
        mixed = mix(loaded, settings)
        seconds = time.perf_counter() - started
    return {"rows": count, "drawn": len(mixed.train), "seconds": seconds, "extra_bytes": peak.extra}


def labelled_rows(count: int, number: int) -> Any:
    """Rows of four tokens with all columns that labelling leaves."""
    from collections import Counter

    import datasets
    import numpy as np
    import pyarrow as pa

    from sft.data.sources.load import Rows
    from sft.settings import Source

    chance = np.random.default_rng(number)
    tokens = pa.ListArray.from_arrays(np.arange(0, 4 * count + 1, 4, dtype=np.int32), np.zeros(4 * count, np.int32))
    keys = np.array(["text_to_toml", "csv_to_json", "toml_to_yaml", "text_to_xml"])[np.arange(count) % 4]
    columns = {
        "messages": pa.nulls(count), "extras": pa.nulls(count), "number": pa.nulls(count),
        "task_key": pa.array(keys), "pack": pa.array([""] * count),
        "content_hash": pa.array(chance.integers(0, 2**63, count, dtype=np.uint64)), "input_ids": tokens,
        "labels": tokens, "length": np.full(count, 4, np.int32), "trained": np.full(count, 2, np.int32),
    }  # fmt: skip
    return Rows(Source(id=f"source {number}"), datasets.Dataset(pa.table(columns)), Counter(), "")


def main(name: str, *rest: str) -> None:
    if name == "mix":
        answer(mix_many(*map(int, rest)))
        return
    work = {"ours": label_ours, "tokenizer": encode_texts, "trl": prepare_trl}[name]
    found = work(*map(Path, rest))
    answer(found | {"rows_per_second": found["rows"] / found["seconds"]})


if __name__ == "__main__":
    main(*sys.argv[1:])
