"""`python -m benchmarks.scale.preparation [--rows 10000 100000 ...]`: short rows from file to audited labels.

Beside it the tokenizer's own batch call over the rendered text, in as many processes. Memory is that of all processes
together, pages they share counted once (PSS), looked at from outside; so is what runs alone: the time in which there
are no processes beside the one that started them. From both follows what more processes would bring.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Bench, answer, comparison, cores, environment, limit, progress
from benchmarks.inputs import benchmark_model, short_rows
from benchmarks.tables import amount, comparisons, grid
from sft.heap import tight_environment

PROCESSES = (1, 2, 4, 16, 64)
_EVERY = 0.05  # seconds between two looks
_MOST_TEXTS = 1_000_000  # of more rows the call takes the first, and its times are multiplied: it has no fixed costs
_TEXTS_AT_ONCE = 5_000  # of a million at once the tokenizer's answer takes more than ten gigabytes


def measure(bench: Bench) -> dict[str, Any]:
    """The table of the item: sizes are small, or with --full 10^5 and 10^6."""
    sizes = (100_000, 1_000_000) if bench.full else (10_000,)
    return measured(bench.model, bench.folder("preparation"), sizes)


def measured(model: Path, folder: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    lines, figures, tables = [], {}, []
    for size in sizes:
        progress(f"preparing {size:,} rows")
        found = figures[size] = compare(model, folder, size)
        ours, batch = found["ours"], found["batch"]
        what, rival = f"{size:,} rows", "the tokenizer's batch call"
        if batch["rows"] < size:
            rival += f" on {batch['rows']:,}, by rows"
        lines += [
            comparison(what, ours["seconds"], batch["seconds"], unit="s", against=rival, target="<= 1.3"),
            comparison(f"{what}, CPU", ours["cpu_seconds"], batch["cpu_seconds"], unit="s", against=rival),
            limit(f"{what}, all processes", ours["pss_bytes"] / 1e6, "<= 600", unit="MB"),
            limit(f"{what}, without files the system can drop", ours["anonymous_bytes"] / 1e6, "<= 600", unit="MB"),
        ]
        rows = [
            [str(n), amount(seconds(ours, n), "s"), f"{seconds(ours, 1) / seconds(ours, n):.1f}"] for n in PROCESSES
        ]
        title = f"{size:,} rows: {ours['alone_seconds']:.2f} s of {ours['seconds']:.2f} s run alone"
        tables.append({"title": title, "head": ["processes", "seconds", "times as fast"], "rows": rows})
    return {"title": "Preparation: file to audited labels", "comparisons": lines, "tables": tables, "figures": figures}


def seconds(ours: dict[str, float], processes: int) -> float:
    """With so many processes: what runs alone, then what they share, which waits for the one that writes it down."""
    shared = ours["workers_cpu_seconds"] / processes
    return ours["alone_seconds"] + max(shared, ours["parent_beside_seconds"])


def compare(model: Path, folder: Path, size: int) -> dict[str, dict[str, float]]:
    """Ours and the tokenizer's batch call over the same rows."""
    rows = short_rows(folder / f"{size}.jsonl", size)
    cache = {"HF_DATASETS_CACHE": str(folder / f"cache-{size}")}
    found = {name: watched([name, model, rows, folder], **cache) for name in ("ours", "batch")}
    batch = found["batch"]
    for name in ("seconds", "cpu_seconds", "workers_cpu_seconds"):
        batch[name] *= size / batch["rows"]
    return found


def watched(arguments: list[object], **variables: str) -> dict[str, float]:
    """What a child says of its run, and what was seen of all its processes between its first line and its last."""
    command = [sys.executable, "-m", "benchmarks.scale.preparation", *map(str, arguments)]
    environ = environment(**variables)
    environ = tight_environment(environ) or environ  # as train.py begins anew
    child = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    seen = Seen(child.pid)
    while not select.select([child.stdout], [], [], _EVERY)[0]:
        seen.look()
    said = child.stdout.read()
    if child.wait():
        raise RuntimeError(f"{command} ended with {child.returncode}")
    return json.loads(said) | seen.figures()


class Seen:
    """The processes of a program as they are seen from outside."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, {"Pss": 0, "Pss_Anon": 0}
        self.alone = self.beside = 0.0
        self.last, self.spent = time.perf_counter(), self._spent()

    def look(self) -> None:
        """Once more: memory now, and whether there were others since the last look."""
        pids = [self.pid, *_children(self.pid)]
        sizes = [_sizes(pid) for pid in pids]
        self.peak = {name: max(peak, sum(size.get(name, 0) for size in sizes)) for name, peak in self.peak.items()}
        now, spent = time.perf_counter(), self._spent()
        if len(pids) == 1:
            self.alone += now - self.last
        else:
            self.beside += spent - self.spent
        self.last, self.spent = now, spent

    def _spent(self) -> float:
        """CPU seconds of the first process."""
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def figures(self) -> dict[str, float]:
        return {
            "pss_bytes": self.peak["Pss"], "anonymous_bytes": self.peak["Pss_Anon"], "alone_seconds": self.alone,
            "parent_beside_seconds": self.beside,
        }  # fmt: skip


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (thread / "children").read_text(encoding="ascii").split())


def _sizes(pid: int) -> dict[str, int]:
    """Bytes of a process by kind, each page shared out among those that have it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


# In a child


def prepare(model: Path, rows: Path, folder: Path) -> dict[str, float]:
    """As the program prepares a source, with what it has loaded by then."""
    from sft.environment import silence_libraries, silence_torch, uncollected

    silence_libraries()
    with uncollected():
        silence_torch()
        import sft.run  # noqa: F401 - the memory of the program is that of its libraries as well
    from transformers import AutoTokenizer

    from sft.data.labels.audit import audit
    from sft.data.labels.label import label
    from sft.data.sources.load import load_source
    from sft.settings import Settings, Source

    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = Settings(
        stage=1, env_dir=folder, base_model=str(model), out_lora_dir=folder / "out", dataset_id=str(rows),
        max_seq_len=2048, num_proc=cores(),
    )  # fmt: skip
    begin()
    clock = [time.perf_counter()]
    loaded = load_source(Source(id=str(rows)), processes=cores())
    clock.append(time.perf_counter())
    labelled = label(loaded, tokenizer, settings)
    clock.append(time.perf_counter())
    problems = audit(labelled, tokenizer, settings)
    clock.append(time.perf_counter())
    assert not problems and len(labelled.dataset) == len(loaded.dataset), problems
    parts = dict(zip(("reading", "labelling", "audit"), (b - a for a, b in pairwise(clock)), strict=True))
    return {"rows": len(loaded.dataset), "seconds": clock[-1] - clock[0]} | parts


def encode(model: Path, rows: Path, folder: Path) -> dict[str, float]:
    """The rendered text of all rows in the tokenizer's batch call."""
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(model)
    with rows.open(encoding="utf-8") as file:
        texts = [
            tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            for line in islice(file, _MOST_TEXTS)
        ]
    _shared.update(texts=texts, tokenizer=tokenizer)
    begin()
    started = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(cores()) as pool:
        tokens = sum(pool.imap_unordered(_encoded, range(0, len(texts), _TEXTS_AT_ONCE)))
        pool.close()
        pool.join()
    return {"rows": len(texts), "tokens": tokens, "seconds": time.perf_counter() - started}


_shared: dict[str, Any] = {}


def _encoded(start: int) -> int:
    ids = _shared["tokenizer"](_shared["texts"][start : start + _TEXTS_AT_ONCE], add_special_tokens=False)["input_ids"]
    return sum(map(len, ids))


def _spent(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def begin() -> None:
    """All is loaded: from here on it is timed."""
    _shared["spent"] = _spent(resource.RUSAGE_SELF)
    print("begins", flush=True)


def run(name: str, *paths: str) -> None:
    found = {"ours": prepare, "batch": encode}[name](*map(Path, paths))
    own, workers = _spent(resource.RUSAGE_SELF) - _shared["spent"], _spent(resource.RUSAGE_CHILDREN)
    answer(found | {"workers_cpu_seconds": workers, "cpu_seconds": own + workers})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.preparation", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000])
    parser.add_argument("--model", type=Path, help="a folder with SmolLM2-135M-Instruct (default: made from the extra)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="staged_sft_preparation_") as scratch:
        folder = Path(scratch)
        model = options.model or benchmark_model(folder)[0]
        found = measured(model, folder, tuple(options.rows))
    print(f"{comparisons(found['comparisons'])}\n")
    for table in found["tables"]:
        print(f"{table['title']}\n\n{grid(table['head'], table['rows'])}\n")
    print(json.dumps(found["figures"]))


if __name__ == "__main__":
    run(*sys.argv[1:]) if sys.argv[1:2] in (["ours"], ["batch"]) else main()
