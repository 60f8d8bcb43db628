#!/usr/bin/env bash
# Records GPU, CPU, memory and network series as CSV, one file each, beside a run on the same machine.
#   ./official_content/collect_metrics.sh [DIR=results/metrics] [INTERVAL=5] [DURATION=300]
# INTERVAL and DURATION in seconds; DURATION 0 goes on until Ctrl-C. gpu_metrics.csv needs nvidia-smi,
# ib_metrics.csv an InfiniBand adapter. Files of an earlier recording in DIR are never overwritten.
set -euo pipefail
export LC_ALL=C

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0"; }
fail() { echo "[ERROR] $1" >&2; exit 2; }

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
[ $# -le 3 ] || fail "three arguments at most: DIR INTERVAL DURATION"
folder="${1:-results/metrics}"
interval="${2:-5}"
duration="${3:-300}"
[[ "$interval" =~ ^[0-9]+(\.[0-9]+)?$ && ! "$interval" =~ ^0+(\.0+)?$ ]] || fail "INTERVAL $interval: seconds above 0"
[[ "$duration" =~ ^[0-9]+$ ]] || fail "DURATION $duration: whole seconds, 0 for no end"
[ -r /proc/stat ] || fail "/proc/stat is not readable; this script needs Linux"

node="$(hostname)"
files=(cpu memory network)
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && files+=(gpu)
counters=(/sys/class/infiniband/*/ports/*/counters)
[ -d "${counters[0]}" ] && files+=(ib)
for name in "${files[@]}"; do
  [ ! -e "$folder/${name}_metrics.csv" ] || fail "$folder/${name}_metrics.csv exists and is not overwritten; name another DIR"
done
mkdir -p "$folder"

header() { echo "$2" >"$folder/$1_metrics.csv"; }
header cpu timestamp,node,utilization_cpu,load_1min,processes_running
header memory timestamp,node,memory_used_mb,memory_total_mb,swap_used_mb
header network timestamp,node,interface,received_bytes,sent_bytes
for name in "${files[@]}"; do
  case "$name" in
    gpu) header gpu timestamp,node,gpu_index,gpu_name,utilization_gpu,utilization_memory,memory_used_mb,memory_total_mb,temperature ;;
    ib) header ib timestamp,node,port,received_bytes,sent_bytes ;;
  esac
done

# busy and all ticks since start; the share between two readings is the utilisation
ticks() { awk '/^cpu / {all = 0; for (i = 2; i <= 9; i++) all += $i; print all - $5 - $6, all}' /proc/stat; }
read -r busy_before all_before < <(ticks)

sample_cpu() {
  local busy all share
  read -r busy all < <(ticks)
  share="$(awk -v b=$((busy - busy_before)) -v a=$((all - all_before)) 'BEGIN {printf "%.1f", (a > 0 ? 100 * b / a : 0)}')"
  busy_before="$busy" all_before="$all"
  awk -v t="$1" -v n="$node" -v s="$share" '{split($4, p, "/"); print t "," n "," s "," $1 "," p[1]}' /proc/loadavg
}
sample_memory() {
  awk -v t="$1" -v n="$node" '{m[$1] = $2} END {printf "%s,%s,%d,%d,%d\n", t, n, (m["MemTotal:"] - m["MemAvailable:"]) / 1024,
    m["MemTotal:"] / 1024, (m["SwapTotal:"] - m["SwapFree:"]) / 1024}' /proc/meminfo
}
sample_network() {
  awk -v t="$1" -v n="$node" 'NR > 2 {sub(":", " "); if ($1 != "lo") print t "," n "," $1 "," $2 "," $10}' /proc/net/dev
}
sample_gpu() {
  nvidia-smi --format=csv,noheader,nounits \
    --query-gpu=index,name,utilization.gpu,utilization.memory,memory.used,memory.total,temperature.gpu |
    sed "s/, /,/g; s/^/$1,$node,/"
}
# the counters are in 4-byte words
sample_ib() {
  local counter
  for counter in "${counters[@]}"; do
    echo "$1,$node,$(echo "$counter" | cut -d/ -f5,7),$(($(<"$counter/port_rcv_data") * 4)),$(($(<"$counter/port_xmit_data") * 4))"
  done
}

rows=0
finish() { echo "$rows samples of ${files[*]} in $folder"; exit 0; }
trap finish INT TERM
end=$((SECONDS + duration))
echo "recording ${files[*]} every $interval s into $folder"
while ((duration == 0 || SECONDS < end)); do
  # in the background, so that a signal ends the wait at once
  sleep "$interval" & wait $!
  now="$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  for name in "${files[@]}"; do "sample_$name" "$now" >>"$folder/${name}_metrics.csv"; done
  rows=$((rows + 1))
done
finish
