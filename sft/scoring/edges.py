"""Scores of ontology answers: lines `A -> B -> C` from a root down, compared as sets of edges (document 003).

An edge is a (parent, child) pair. An answer's payload is found as for structured answers, so that text before an output
marker and code fences do not count as paths.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sft.scoring.extraction import f1, ratio
from sft.scoring.payload import DEFAULT_MARKERS, MAX_ANSWER, extract_payload

Edge = tuple[str, str]

ARROW = re.compile(r"(?<!\S)->(?!\S)")  # white space or a line end on both sides


def looks_like_paths(reference: str) -> bool:
    """Whether a reference is an ontology answer: every line of it that is not blank has an arrow."""
    lines = [line for line in reference.split("\n") if line.strip()]
    return bool(lines) and all(" -> " in line for line in lines)


def read_paths(answer: str, markers: Sequence[str] = DEFAULT_MARKERS) -> list[list[str]]:
    """The paths of an answer, one a non-blank line, each a list of stripped names (some empty in broken lines)."""
    if len(answer) > MAX_ANSWER:
        return []
    lines = extract_payload(answer, markers).split("\n")
    return [[name.strip() for name in ARROW.split(line)] for line in lines if line.strip()]


def path_edges(paths: Sequence[Sequence[str]]) -> set[Edge]:
    """The distinct edges of paths; a broken line gives those of its edges that have both names."""
    return {(parent, child) for path in paths for parent, child in pairwise(path) if parent and child}


def score_rows(
    pairs: Sequence[tuple[str, str]], *, markers: Sequence[str] = DEFAULT_MARKERS
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Score (answer, reference) pairs.

    A path is valid when it has at least two names, none of them empty, and starts at a root of any of the references;
    an answer without a line counts as one invalid path. `gen_edge_*` compare each answer's edges with its own
    reference's, summed over all pairs. Returns one dict a pair (`score`: its F1, 1.0 where neither has an edge) and the
    metrics, {} without pairs.
    """
    if not pairs:
        return [], {}
    gold = [read_paths(reference, markers) for _, reference in pairs]
    roots = {path[0] for paths in gold for path in paths}
    rows = [
        _score_row(read_paths(answer, markers), paths, roots) for (answer, _), paths in zip(pairs, gold, strict=True)
    ]
    found, extra, missed = (sum(row[key] for row in rows) for key in ("found", "extra", "missed"))
    metrics = {
        "gen_samples": float(len(rows)),
        "gen_path_valid_rate": sum(row["valid_paths"] for row in rows) / sum(max(row["paths"], 1) for row in rows),
        "gen_edge_precision": ratio(found, found + extra),
        "gen_edge_recall": ratio(found, found + missed),
        "gen_edge_f1": f1(found, extra, missed),
    }
    return rows, metrics


def _score_row(paths: list[list[str]], gold_paths: list[list[str]], roots: set[str]) -> dict[str, Any]:
    edges, gold = path_edges(paths), path_edges(gold_paths)
    found, extra, missed = len(edges & gold), len(edges - gold), len(gold - edges)
    return {
        "score": f1(found, extra, missed) if edges or gold else 1.0,
        "paths": len(paths),
        "valid_paths": sum(len(path) > 1 and all(path) and path[0] in roots for path in paths),
        "found": found,
        "extra": extra,
        "missed": missed,
    }
