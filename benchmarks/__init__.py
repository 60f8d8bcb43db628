"""Ours beside what people would use instead, in alternation, in one run: see docs/performance.md."""
