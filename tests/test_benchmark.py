"""The benchmark counts operations by hand-checkable formulas, reports true scaling efficiency, names broken runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sft.programs.benchmark_report import read_runs, with_efficiency
from sft.programs.utilisation import read_recordings

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "official_content"
LOAD = {
    "seq_len": 64,
    "micro_batch": 4,
    "accumulation": 1,
    "dtype": "float32",
    "lora_r": 16,
    "checkpointing": False,
}


def summary(processes: int, rate: float, **more) -> dict:
    return {
        "model": "m",
        "nodes": processes,
        "processes": processes,
        "tokens_per_second": rate,
        "step_seconds": 1.0,
        "load": LOAD,
    } | more


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "summary.json").write_text(text, encoding="utf-8")


def test_efficiency_is_tokens_at_n_over_n_times_tokens_at_one():
    """100 tokens/s on one node, 180 on two, 320 on four: 100 %, 90 %, 80 %."""
    runs = with_efficiency([summary(4, 320.0), summary(1, 100.0), summary(2, 180.0)])
    assert [(run["processes"], run["efficiency"]) for run in runs] == [(1, 1.0), (2, 0.9), (4, 0.8)]


def test_other_work_is_not_compared():
    """A run with longer rows starts its own series, held against itself."""
    longer = summary(2, 50.0, load=LOAD | {"seq_len": 128})
    assert [run["efficiency"] for run in with_efficiency([summary(1, 100.0), longer])] == [1.0, 1.0]


def test_without_a_run_on_one_node_the_smallest_counts():
    """100 tokens/s on two nodes, 150 on four: 150 / (2 x 100) = 75 %."""
    runs = with_efficiency([summary(2, 100.0), summary(4, 150.0)])
    assert [run["efficiency"] for run in runs] == [1.0, 0.75]


def test_broken_runs_are_named_and_left_out(tmp_path):
    """Half a file, a missing file, missing figures, and one good run."""
    write(tmp_path, "a_good", json.dumps(summary(1, 10.0)))
    write(tmp_path, "b_half", '{"model": "m", "nod')
    write(tmp_path, "c_poor", '{"model": "m"}')
    (tmp_path / "d_empty").mkdir()
    runs, broken = read_runs(tmp_path)
    assert [run["run"] for run in runs] == ["a_good"]
    assert [text.split(":")[0] for text in broken] == ["b_half", "c_poor", "d_empty"]


def test_a_recording_beside_the_runs_is_no_broken_run(tmp_path):
    """collect_metrics.sh writes to results/metrics where it is not told otherwise."""
    write(tmp_path, "a_good", json.dumps(summary(1, 10.0)))
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "cpu_metrics.csv").write_text("timestamp,node\n", encoding="utf-8")
    runs, broken = read_runs(tmp_path)
    assert (len(runs), broken) == (1, [])


def generate(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAMS / "generate_report.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_report_is_one_file_without_outside_resources(tmp_path):
    """Both files, the figures in them, plots as inline SVG, no address to load anything from."""
    write(tmp_path, "one", json.dumps(summary(1, 1000.0, device="H200 <b>")))
    write(tmp_path, "two", json.dumps(summary(2, 1800.0)))
    result = generate(tmp_path)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "90%" in page
    assert ">1.4</text>" not in page  # one and two devices, nothing between
    assert "H200 &lt;b&gt;" in page
    assert "http" not in page
    assert "| 1,800 | 900 | 90% |" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("prepare", "message"), [(False, "no such folder"), (True, "no complete run")])
def test_no_runs_is_named(tmp_path, prepare, message):
    """Exit 2, nothing written."""
    folder = tmp_path / "results"
    if prepare:
        (folder / "half").mkdir(parents=True)
    result = generate(folder)
    assert (result.returncode, message in result.stderr, "Traceback" in result.stderr) == (2, True, False)
    assert not (folder / "report.html").exists()


def test_operations_are_counted_by_hand():
    """Two layers of width 8 (2 heads of 4), rows of 10, 1,000 weights, adapter of 100: attention 960."""
    from transformers import Qwen3Config

    from sft.programs.benchmark_shapes import flops_per_token

    config = Qwen3Config(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, head_dim=4)
    assert flops_per_token(config, 1000, 100, seq_len=10, full=False) == 4 * 1000 + 6 * 100 + 960
    assert flops_per_token(config, 1000, 1000, seq_len=10, full=True) == 6 * 1000 + 960


def test_only_the_experts_a_token_meets_are_active():
    """tiny-moe: 8 experts of 3 x 128 x 96 in 4 layers, of which 2 are met; router and attention are met in full."""
    from sft.programs.benchmark_shapes import matmul_parameters, model_config

    total, active = matmul_parameters(model_config("tiny-moe"))
    experts, router, attention, head = 4 * 3 * 128 * 96, 4 * 8 * 128, 4 * (2 * 128 * 128 + 2 * 128 * 64), 2048 * 128
    assert active == 2 * experts + router + attention + head
    norms = 4 * (2 * 128 + 2 * 32) + 128
    assert total == 8 * experts + router + attention + 2 * head + norms


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-4B-Instruct-2507", 4.02),
        ("meta-llama/Llama-2-7b-hf", 6.74),
        ("meta-llama/Llama-2-13b-hf", 13.02),
        ("meta-llama/Llama-2-70b-hf", 68.98),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7.24),
        ("unsloth/Qwen3-30B-A3B-Instruct-2507", 30.53),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("google/gemma-2-2b-it", 2.61),
    ],
)
def test_the_shapes_have_the_published_sizes(model, billions):
    """To three places of what the model cards say."""
    from sft.programs.benchmark_shapes import matmul_parameters, model_config

    assert matmul_parameters(model_config(model))[0] / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.fixture
def machine(tmp_path):
    """A copy of the script in a tree whose accelerate only prints what it was called with."""
    (tmp_path / "official_content").mkdir()
    shutil.copy(PROGRAMS / "run_benchmark.sh", tmp_path / "official_content")
    shutil.copytree(ROOT / "configs" / "accelerate", tmp_path / "configs" / "accelerate")
    tool(tmp_path / ".venv" / "bin" / "accelerate", 'echo "accelerate $*"')
    return tmp_path


def tool(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def start(machine: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    names = {"PROCESSES": "2", "PATH": f"{machine / 'bin'}:{os.environ['PATH']}", "HOME": str(machine)} | environment
    command = [machine / "official_content" / "run_benchmark.sh", *arguments]
    return subprocess.run(command, env=names, capture_output=True, text=True, check=False)


def test_one_machine_starts_all_its_processes(machine):
    """Two processes: data parallel, the model and further options handed on."""
    out = start(machine, "tiny", "1", "--seq-len", "64").stdout
    assert "configs/accelerate/ddp.yaml --num_processes 2 --num_machines 1" in out
    assert out.rstrip().endswith("official_content/benchmark.py tiny --nodes 1 --seq-len 64")
    assert "configs/accelerate/single.yaml --num_processes 1" in start(machine, "tiny", PROCESSES="1").stdout


def test_a_machine_of_several_knows_its_number(machine):
    """NODE_RANK and MASTER_ADDR: 2 x 2 processes."""
    out = start(machine, "tiny", "2", NODE_RANK="1", MASTER_ADDR="10.0.0.1").stdout
    assert "--num_processes 4 --num_machines 2" in out
    assert "--machine_rank 1 --main_process_ip 10.0.0.1" in out


def test_slurm_starts_every_machine(machine):
    """srun runs one task per node; each adds its own number, and the first host of the allocation leads."""
    tool(machine / "bin" / "scontrol", "printf 'nodeA\\nnodeB\\n'")
    tool(machine / "bin" / "srun", 'shift 4; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')
    lines = start(machine, "tiny", "2", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node[A-B]").stdout.splitlines()
    assert [line.split("--machine_rank ")[1].split(" ")[0] for line in lines] == ["0", "1"]
    assert all("--main_process_ip nodeA" in line and line.endswith("benchmark.py tiny --nodes 2") for line in lines)


def test_a_hostfile_starts_every_machine_by_ssh(machine):
    """The first two of three machines, comments and slots passed over; the first one leads, in this very folder."""
    (machine / "hosts").write_text("# ours\nnodeA slots=8\n\nnodeB slots=8\nnodeC\n", encoding="utf-8")
    tool(machine / "bin" / "ssh", 'echo "$2: $(bash -c "$3")"')
    out = start(machine, "tiny", "2", "--results", "my results", HOSTFILE=str(machine / "hosts")).stdout
    lines = sorted(out.splitlines())
    assert [line.split(":")[0] for line in lines] == ["nodeA", "nodeB"]
    for rank, line in enumerate(lines):
        assert f"--machine_rank {rank} --main_process_ip nodeA" in line
        assert line.endswith("benchmark.py tiny --nodes 2 --results my results")
    short = start(machine, "tiny", "4", HOSTFILE=str(machine / "hosts"))
    assert (short.returncode, "lists 3 machines, 4 are asked for" in short.stderr) == (2, True)


def record(folder: Path) -> None:
    """Two GPUs, three samples each, the last one cut off; one card does not say how busy it is."""
    folder.mkdir()
    (folder / "cpu_metrics.csv").write_text("timestamp,node,utilization_cpu\nt,n,50\n", encoding="utf-8")
    head = "timestamp,node,gpu_index,gpu_name,utilization_gpu,utilization_memory,memory_used_mb,memory_total_mb,t"
    rows = [
        "t,n,0,H100,0,0,1000,80000,30",
        "t,n,1,H100,[N/A],0,0,80000,30",
        "t,n,0,H100,95,9,60000,80000,60",
        "t,n,0,H1",
    ]
    (folder / "gpu_metrics.csv").write_text("\n".join([head, *rows]), encoding="utf-8")


def test_the_use_of_the_devices_stands_in_the_report(tmp_path):
    """0 and 95 % are 48 % in the mean and half of the samples busy; 60,000 MiB are 62.9 GB."""
    write(tmp_path, "one", json.dumps(summary(1, 1000.0)))
    record(tmp_path / "metrics")
    (series,) = read_recordings(tmp_path)
    assert series.cells == ["metrics", "n, GPU 0 (H100)", "2", "48%", "50%", "62.9"]
    assert generate(tmp_path).returncode == 0
    assert "<h2>Use of the devices</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "| metrics | n, GPU 0 (H100) | 2 | 48% | 50% | 62.9 |" in (tmp_path / "report.md").read_text(
        encoding="utf-8"
    )


def test_without_a_gpu_the_cpu_is_what_is_used(tmp_path):
    """No gpu_metrics.csv: the processor's series, no memory."""
    record(tmp_path / "metrics")
    (tmp_path / "metrics" / "gpu_metrics.csv").unlink()
    assert [series.cells for series in read_recordings(tmp_path)] == [["metrics", "n, CPU", "1", "50%", "0%", "–"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "MODEL is missing"), (["tiny", "zero"], "NODES zero"), (["tiny", "2"], "2 machines: run inside")],
)
def test_bad_arguments_are_named(machine, arguments, message):
    """Exit 2."""
    result = start(machine, *arguments)
    assert (result.returncode, message in result.stderr) == (2, True)


def test_the_benchmark_trains_experts_as_a_run_does(tmp_path):
    """Our way for adapters on experts, not PEFT's: throughput of the real training step."""
    from sft.models.experts import RoutedAdapter
    from sft.programs import benchmark

    load = benchmark.Load(8, 1, 1, 1, 0, 2, False, "float32")
    ways = []

    class Watched(benchmark.StagedTrainer):
        def train(self, *arguments, **keywords):
            ways.append([type(module) is RoutedAdapter for module in self.model.modules()])
            return super().train(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "StagedTrainer", Watched)
        patch.setattr(benchmark, "matrix_rate", lambda *arguments: 1e9)
        assert benchmark.measure("tiny-moe", load, tmp_path)["tokens_per_second"] > 0
    assert sum(ways[0]) == 4  # one a layer


@pytest.mark.slow
def test_two_processes_are_measured(tmp_path):
    """The tiny model with two processes on this machine: the summary's figures belong together, the report has them."""
    command = [PROGRAMS / "run_benchmark.sh", "tiny", "1", "--results", tmp_path, "--seq-len", "32", "--steps", "3"]
    environment = os.environ | {"PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert (printed["processes"], printed["nodes"]) == (2, 1)
    assert printed["tokens_per_second"] == pytest.approx(2 * 4 * 32 / printed["step_seconds"])
    assert generate(tmp_path).returncode == 0
    assert len(read_runs(tmp_path)[0]) == 1
