"""The acceptance run on a GPU: `python -m benchmarks.gpu [--minutes 9] [--gpus 2] [--output gpu.json] [ITEM ...]`.

Twelve items, each in a process of its own with a time box; one that fails or is cut off does not stop the rest. Random
weights of real shapes (configs/benchmark_models.json), no network. Shown at the end: a table, the same as JSON; exit
code 1 where a threshold was missed, an item failed or ran out of time. An item whose packages are missing says so: it
has not passed. `--rehearse` does all of it on the CPU with tiny shapes and judges what no machine changes.
docs/gpu_machines.md has the commands for a machine without network.
"""
