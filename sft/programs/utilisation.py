"""What collect_metrics.sh recorded beside the runs -> how busy each device was, and how full."""

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HEADING = ("recording", "device", "samples", "mean use", "samples at 90 % or more", "peak memory, GB")
BUSY = 90.0  # per cent: what a GPU that waits for nothing shows


class Recorded(NamedTuple):
    """The series of one device: per cent of use at each sample, megabytes at the peak."""

    recording: str
    device: str
    use: tuple[float, ...]
    peak_megabytes: float

    @property
    def cells(self) -> list[str]:
        """A row of the table."""
        mean = sum(self.use) / len(self.use)
        busy = sum(value >= BUSY for value in self.use) / len(self.use)
        memory = f"{self.peak_megabytes * 2**20 / 1e9:,.1f}" if self.peak_megabytes else "–"
        return [self.recording, self.device, str(len(self.use)), f"{mean:.0f}%", f"{busy:.0%}", memory]


def is_recording(folder: Path) -> bool:
    """Whether collect_metrics.sh wrote into the folder."""
    return (folder / "cpu_metrics.csv").is_file()


def read_recordings(results: Path) -> list[Recorded]:
    """GPUs of every recording in or directly below the folder, by node and number; where there are none, the CPU."""
    folders = [folder for folder in (results, *sorted(results.iterdir())) if folder.is_dir() and is_recording(folder)]
    return [series for folder in folders for series in (_gpus(folder) or _cpus(folder))]


def _gpus(folder: Path) -> list[Recorded]:
    samples = defaultdict(list)
    for row in _rows(folder / "gpu_metrics.csv"):
        name = f"{row['node']}, GPU {row['gpu_index']} ({row['gpu_name']})"
        samples[name].append((row["utilization_gpu"], row["memory_used_mb"]))
    return list(_series(folder, samples))


def _cpus(folder: Path) -> list[Recorded]:
    samples = defaultdict(list)
    for row in _rows(folder / "cpu_metrics.csv"):
        samples[f"{row['node']}, CPU"].append((row["utilization_cpu"], "0"))
    return list(_series(folder, samples))


def _series(folder: Path, samples: dict[str, list[tuple[str, str]]]) -> Iterator[Recorded]:
    for device, pairs in samples.items():
        use = [value for value in (_number(first) for first, _ in pairs) if value is not None]
        if use:
            yield Recorded(folder.name, device, tuple(use), max(_number(second) or 0.0 for _, second in pairs))


def _rows(path: Path) -> Sequence[dict[str, str]]:
    """The rows that are whole; a recording that was cut off ends in half of one."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]


def _number(text: str) -> float | None:
    """None for what nvidia-smi writes where a card does not say: [N/A]."""
    try:
        return float(text)
    except ValueError:
        return None
