#!/usr/bin/env bash
# Measures training throughput of a model with random weights, on one machine or on several.
#   ./official_content/run_benchmark.sh MODEL [NODES=1] [options of benchmark.py ...]
#   ./official_content/run_benchmark.sh Qwen/Qwen3-4B-Instruct-2507 1 --seq-len 2048 --micro-batch 2
# Environment: PROCESSES per machine (its GPUs, else 1) · CONFIG launch file (configs/accelerate/single.yaml or ddp.yaml).
# Several machines: inside a Slurm allocation nothing more is needed; HOSTFILE=FILE (one machine a line) starts it on the
# first NODES of them by ssh, in this same folder; else run it on each with NODE_RANK=0.. and MASTER_ADDR set. LOCAL_NODES=1 starts all of them on this machine, to try it out. Then: generate_report.py results/
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
fail() { echo "[ERROR] $1" >&2; exit 2; }

case "${1:-}" in -h | --help) usage; exit 0 ;; "") usage >&2; fail "MODEL is missing" ;; esac
model="$1"
nodes="${2:-1}"
shift $(($# < 2 ? $# : 2))
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "NODES $nodes: a number from 1 on"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
accelerate="$root/.venv/bin/accelerate"
[ -x "$accelerate" ] || accelerate="$(command -v accelerate || true)"
[ -n "$accelerate" ] || fail "accelerate is not installed; run: make install"

gpus="$( (command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true)"
processes="${PROCESSES:-${gpus:-0}}"
[[ "$processes" =~ ^[0-9]+$ ]] || fail "PROCESSES $processes: a number from 1 on"
((processes > 0)) || processes=1
total=$((nodes * processes))
config="${CONFIG:-$root/configs/accelerate/$( ((total > 1)) && echo ddp || echo single).yaml}"
[ -r "$config" ] || fail "CONFIG $config: no such launch file"

program=("$root/official_content/benchmark.py" "$model" --nodes "$nodes" "$@")
port="${MASTER_PORT:-29511}"
launch=("$accelerate" launch --config_file "$config" --num_processes "$total" --num_machines "$nodes" --main_process_port "$port")

if ((nodes == 1)); then
  exec "${launch[@]}" "${program[@]}"
elif [ "${LOCAL_NODES:-0}" = 1 ] || [ -n "${HOSTFILE:-}" ]; then
  hosts=()
  if [ -n "${HOSTFILE:-}" ]; then
    [ -r "$HOSTFILE" ] || fail "HOSTFILE $HOSTFILE: no such file"
    mapfile -t hosts < <(awk 'NF && $1 !~ /^#/ {print $1}' "$HOSTFILE")
    ((${#hosts[@]} >= nodes)) || fail "HOSTFILE $HOSTFILE: lists ${#hosts[@]} machines, $nodes are asked for"
  fi
  pids=()
  trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
  for ((rank = 0; rank < nodes; rank++)); do
    command=("${launch[@]}" --machine_rank "$rank" --main_process_ip "${hosts[0]:-127.0.0.1}" "${program[@]}")
    if [ -n "${HOSTFILE:-}" ]; then
      # -tt: who stops this stops the run there as well
      ssh -tt "${hosts[$rank]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")" </dev/null &
    else
      "${command[@]}" &
    fi
    pids+=($!)
  done
  failed=0
  for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done
  exit "$failed"
elif [ -n "${SLURM_JOB_ID:-}" ] && command -v srun >/dev/null; then
  head="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  head="${head%%$'\n'*}" # no pipe into head: what it cuts off ends with SIGPIPE, and so would this script
  # one task per machine; each adds its own number to the launch command, whose length stands first
  # shellcheck disable=SC2016
  start='length=$1 head=$2; shift 2; exec "${@:1:length}" --machine_rank "$SLURM_NODEID" --main_process_ip "$head" "${@:length+1}"'
  exec srun --nodes "$nodes" --ntasks-per-node 1 \
    bash -c "$start" _ "${#launch[@]}" "$head" "${launch[@]}" "${program[@]}"
elif [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ]; then
  exec "${launch[@]}" --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" "${program[@]}"
fi
fail "$nodes machines: run inside a Slurm allocation, with HOSTFILE set, or on each machine with NODE_RANK and MASTER_ADDR set"
