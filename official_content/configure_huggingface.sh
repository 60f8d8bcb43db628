#!/usr/bin/env bash
# Stores a Hugging Face token where huggingface_hub looks for it (mode 600) after testing it. The token is never shown.
#   ./official_content/configure_huggingface.sh [MODEL...]     asks for the token; tests access to each MODEL too
#   ./official_content/configure_huggingface.sh < token.txt    takes it from a file or a pipe
# Make a token of role "read" at https://huggingface.co/settings/tokens.
set -euo pipefail
umask 077

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0"; }
fail() { echo "[ERROR] $1" >&2; exit 2; }

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3 || true)"
[ -n "$python" ] || fail "python is not installed"
"$python" -c 'import huggingface_hub' 2>/dev/null || fail "huggingface_hub is not installed; run: make install"

[ -z "${HF_TOKEN:-}" ] || echo "[WARNING] HF_TOKEN is set in this shell and wins over the stored token; unset it to use the stored one" >&2
token=""
if [ -t 0 ]; then
  read -rsp "Enter your Hugging Face token: " token
  echo
else
  read -r token || true
fi
token="${token//[$' \t\r\n']/}"
[ -n "$token" ] || fail "no token was given; nothing was stored"
[[ "$token" =~ ^hf_[A-Za-z0-9]{20,}$ ]] || fail "this does not look like a token (hf_ and letters and digits); nothing was stored"

# The token goes through a pipe: neither the process list nor a log ever holds it.
printf '%s' "$token" | "$python" "$root/official_content/store_token.py" "$@"
