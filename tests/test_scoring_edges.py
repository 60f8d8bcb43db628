"""Edge metrics of ontology answers equal those computed by hand."""

import json
from pathlib import Path

import pytest

from sft.data.masked_loss.units import path_edges as training_units
from sft.data.masked_loss.units import readable_edge
from sft.scoring.edges import looks_like_paths, path_edges, read_paths, score_rows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def test_paths_are_read_line_by_line():
    """Names are stripped, arrows inside words stay, blank lines, fences and text before a marker are no paths."""
    assert read_paths("病気 -> 皮膚病 \r\n\n  a->b -> c\n") == [["病気", "皮膚病"], ["a->b", "c"]]
    assert read_paths("Two paths.\nOutput:\n```\nr -> a\nr\n```") == [["r", "a"], ["r"]]
    assert read_paths("r -> \n -> a\nr -> -> a") == [["r", ""], ["", "a"], ["r", "", "a"]]


def test_edges_are_distinct_pairs_of_neighbours():
    """A name repeated in another path gives its edge once; a gap gives none."""
    assert path_edges([["r", "a", "b"], ["r", "a"], ["r", "", "b"], ["r"]]) == {("r", "a"), ("a", "b")}


def test_metrics_are_summed_over_all_answers():
    """Found 2, extra 3, missed 3 edges; of five lines and one empty answer three are valid paths."""
    pairs = [
        ("r -> a -> b\nr -> x\n", "r -> a -> b\n"),
        ("a -> c\nr\n", "r -> c\n"),
        ("q -> a", "q -> d"),
        ("", "r -> e\n"),
    ]
    rows, metrics = score_rows(pairs)
    # extra: r->x, a->c, q->a; missed: r->c, q->d, r->e; "a -> c" and "r" are invalid, "q" is a root of a reference
    assert metrics == {
        "gen_samples": 4.0,
        "gen_path_valid_rate": 3 / 6,
        "gen_edge_precision": 2 / 5,
        "gen_edge_recall": 2 / 5,
        "gen_edge_f1": 2 / 5,
    }
    assert [row["score"] for row in rows] == [0.8, 0.0, 0.0, 0.0]


def test_no_edges_anywhere():
    """Rows without an edge in answer and reference are right; no rows give no metrics."""
    rows, metrics = score_rows([("r", "r")])
    assert rows[0]["score"] == 1.0
    assert (metrics["gen_edge_f1"], metrics["gen_path_valid_rate"]) == (0.0, 0.0)
    assert score_rows([]) == ([], {})


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("r -> a\n\nr -> b -> c\n", True), ("r -> a\nr\n", False), ('{"a": "x -> y"\n}', False), ("", False)],
)
def test_ontology_references_are_recognised(reference, expected):
    """Every line that is not blank has an arrow."""
    assert looks_like_paths(reference) is expected


@pytest.mark.parametrize("answer", ["r -> a -> b\nr -> c", "x->y -> z ->\n-> q -> w", "one\n", "a  ->  b\t->\tc"])
def test_the_edges_scored_are_the_edges_trained_on(answer):
    """Scoring and the masked loss agree on what an edge is, but for empty names, which only the latter counts."""
    trained = {readable_edge(unit.edge) for unit in training_units(answer)}
    scored = {f"{parent} -> {child}" for parent, child in path_edges(read_paths(answer))}
    assert {text for text in trained if all(text.split(" -> "))} == scored


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_ontology_rows_score_fully_against_themselves():
    """350 rows of the disease ontology: every path valid, every edge found."""
    lines = (SHARED / "doid_paths_eval.jsonl").read_text("utf-8").splitlines()
    answers = ["".join(" -> ".join(path) + "\n" for path in json.loads(line)["paths"]) for line in lines]
    metrics = score_rows([(answer, answer) for answer in answers])[1]
    assert (metrics["gen_samples"], metrics["gen_edge_f1"], metrics["gen_path_valid_rate"]) == (350.0, 1.0, 1.0)
