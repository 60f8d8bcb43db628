#!/usr/bin/env bash
# Opens the MLflow UI on the training runs recorded in mlruns/, on this machine only.
#   ./official_content/mlflow_ui.sh [PORT=58000]
# MLFLOW_TRACKING_URI names another store. From elsewhere: ssh -L 58000:127.0.0.1:58000 HOST
set -euo pipefail

usage() { sed -n '2,4s/^# \{0,1\}//p' "$0"; }
fail() { echo "[ERROR] $1" >&2; exit 2; }

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
[ $# -le 1 ] || fail "one argument at most: the port"
port="${1:-58000}"
[[ "$port" =~ ^[0-9]{1,5}$ ]] && ((10#$port >= 1 && 10#$port <= 65535)) || fail "port $port: a number from 1 to 65535"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mlflow="$root/.venv/bin/mlflow"
[ -x "$mlflow" ] || mlflow="$(command -v mlflow || true)"
[ -n "$mlflow" ] || fail "mlflow is not installed; run: make install"
(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && fail "port $port is in use; name another: $0 58001"

mkdir -p "$root/mlruns"
store="${MLFLOW_TRACKING_URI:-sqlite:///$root/mlruns/mlflow.db}"
address="http://127.0.0.1:$port"
echo "MLflow UI: $address (Ctrl-C stops it)"
open=""
[ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ] && [ "$(uname)" != Darwin ] || open="--open"
# Waits for the server, then prints and opens the page that shows training runs: MLflow starts on another one.
(cd "$root" && exec "$(dirname "$mlflow")/python" -m sft.programs.runs_page "$address" $open) &
exec "$mlflow" ui --host 127.0.0.1 --port "$port" --backend-store-uri "$store" \
  --default-artifact-root "$root/mlruns/artifacts" --workers 1
