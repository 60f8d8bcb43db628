"""Staged fine-tuning."""

import sys

# Signals, locks and forked processes are those of Linux and macOS: the first import says so instead of failing at one.
if sys.platform == "win32":
    print("[ERROR] Windows itself is not supported: install WSL (wsl --install) and start this in it", file=sys.stderr)
    raise SystemExit(2)
