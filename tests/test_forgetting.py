"""A drop is what a model lost of what an earlier one had learnt, no more and no less."""

import pytest

from sft.scoring import forgetting
from sft.scoring.forgetting import Matrix


@pytest.mark.parametrize(("after", "fell"), [(0.8, False), (0.74, True)])
def test_drop_needs_more_than_the_margin(after, fell):
    """With a margin of 0.1, 0.85 -> 0.80 is no drop and 0.85 -> 0.74 is one; the base's 0.99 taught nothing."""
    matrix = Matrix.read(
        {
            "models": ["base", "stage 1", "stage 2"],
            "tasks": ["stage 1"],
            "scores": [[0.99], [0.85], [after]],
            "margin": 0.1,
        }
    )
    assert bool(forgetting.drops(matrix)) is fell


def test_slow_decline_is_measured_against_the_best_earlier_model():
    """0.90, 0.86, 0.83: no single step falls by 0.05, stage 3 is 0.07 below stage 1."""
    models = ["base", "stage 1", "stage 2", "stage 3"]
    scores = [[0.0], [0.90], [0.86], [0.83]]
    found = forgetting.drops(Matrix.read({"models": models, "tasks": ["stage 1"], "scores": scores}))
    assert [(drop.model, drop.since, round(drop.before - drop.after, 3)) for drop in found] == [
        ("stage 3", "stage 1", 0.07)
    ]


def test_joined_matrix_takes_the_later_score():
    """Matrices of two stages become one; a cell both hold has the second one's score."""
    first = {"models": ["base", "stage 1"], "tasks": ["stage 1"], "scores": [[0.1], [0.5]]}
    second = {"models": ["stage 1", "stage 2"], "tasks": ["stage 1", "stage 2"], "scores": [[0.6, 0.2], [0.4, 0.9]]}
    joined = forgetting.joined([Matrix.read(first), None, Matrix.read(second)]).record()
    assert joined["models"] == ["base", "stage 1", "stage 2"]
    assert joined["scores"] == [[0.1, None], [0.6, 0.2], [0.4, 0.9]]


def test_sentence_names_the_six_largest_falls():
    """Eight tasks fell by 0.1 to 0.8: the six worst are named, two are counted, the one that rose is not a fall."""
    before = {f"text_to_{number}": 0.9 for number in range(1, 9)} | {"text_to_csv": 0.1}
    after = {f"text_to_{number}": 0.9 - number / 10 for number in range(1, 9)} | {"text_to_csv": 0.9, "unknown": None}
    by_task = {"stage 1": {"stage 1": before}, "stage 2": {"stage 1": after}}
    matrix = {"models": ["stage 1", "stage 2"], "tasks": ["stage 1"], "scores": [[0.9], [0.4]], "by_task": by_task}
    sentence = forgetting.drops(Matrix.read(matrix))[0].sentence()
    assert "text_to_8 0.900 -> 0.100; text_to_7 0.900 -> 0.200;" in sentence
    assert sentence.endswith("text_to_3 0.900 -> 0.600; and 2 more")


@pytest.mark.parametrize(
    ("key", "name"), [("text_to_toml", "toml"), ("csv_to_json", "json"), ("extraction", "extraction"), ("", "other")]
)
def test_format_of_a_task_key(key, name):
    """The output format is what follows the last _to_; a key without one stands for itself."""
    assert forgetting.format_of(key) == name


def test_stages_stand_in_the_order_of_their_numbers():
    """Base first, stage 10 after stage 2: rows and columns alike."""
    names = ["stage 10", "stage 2", "base", "stage 1"]
    matrix = Matrix({name: {"stage 10": {"": 0.5}, "stage 2": {"": 0.5}} for name in names}).record()
    assert matrix["models"] == ["base", "stage 1", "stage 2", "stage 10"]
    assert matrix["tasks"] == ["stage 2", "stage 10"]


def test_a_record_is_read_as_it_was_written():
    """Manifest form and back; what is not a whole matrix is none."""
    table = {"base": {"stage 1": {"": 0.1, "odd key": 0.2}}, "stage 1": {"stage 1": {"": 0.9}}}
    record = Matrix(table, margin=0.2).record()
    assert Matrix.read(record).record() == record
    for broken in (None, {}, [], record | {"scores": [[0.1]]}, record | {"models": [1, 2]}, record | {"scores": None}):
        assert Matrix.read(broken) is None


def test_overall_is_over_the_same_columns_for_every_model():
    """Stage 1's model was never asked stage 2's questions, so that only stage 1's tell the models apart."""
    table = {
        "base": {"stage 1": {"": 0.2, "text_to_json": 0.2, "a": 0.1}, "stage 2": {"": 0.0, "text_to_csv": 0.0}},
        "stage 1": {"stage 1": {"": 0.9, "text_to_json": 0.9}},
        "stage 2": {"stage 1": {"": 0.7, "text_to_json": 0.7}, "stage 2": {"": 1.0, "text_to_csv": 1.0}},
    }
    columns, scores = forgetting.format_scores(Matrix(table))
    assert columns == ["overall", "json", "csv", "a"]
    assert scores == {
        "base": {"overall": 0.2, "json": 0.2, "csv": 0.0, "a": 0.1},
        "stage 1": {"overall": 0.9, "json": 0.9},
        "stage 2": {"overall": 0.7, "json": 0.7, "csv": 1.0},
    }


def test_a_drop_says_whether_it_may_be_chance():
    """Question by question: ten of ten a little worse is real, two of ten much worse is not."""
    table = {"stage 1": {"stage 1": {"": 0.9}}, "stage 2": {"stage 1": {"": 0.8}}}
    before = [0.9] * 9 + [0.8]
    # Differences -0.8, -0.2 and eight times 0: their deviation is sqrt(0.58 / 9) = 0.2539, (1.96 * 2.539)^2 = 24.8.
    noise = ", within noise; about 25 questions would settle it)"
    for after, ending in (([0.7] * 9 + [0.9], ")"), ([0.1, 0.7, *before[2:]], noise)):
        questions = {"stage 1": {"stage 1": before}, "stage 2": {"stage 1": after}}
        (drop,) = forgetting.drops(Matrix(table, questions=questions))
        assert "; 95 % interval of the loss " in drop.sentence()
        assert drop.sentence().endswith(ending)
        assert drop.difference.real is (ending != noise)
    assert forgetting.drops(Matrix(table))[0].sentence().endswith("(stage 1 scored 0.900, now 0.800)")


def test_models_are_paired_only_on_the_same_questions():
    """Lists of unequal length say nothing; a question that one of them was not judged on is left out."""
    questions = {"base": {"stage 1": [0.0, None, 0.5]}, "stage 1": {"stage 1": [1.0, 1.0, None]}}
    matrix = Matrix({"base": {"stage 1": {"": 0.2}}, "stage 1": {"stage 1": {"": 1.0}}}, questions=questions)
    assert matrix.difference("base", "stage 1", "stage 1")[:4] == (1.0, 1.0, 1.0, 1)
    assert Matrix.read(matrix.record()) == matrix
    matrix.questions["base"]["stage 1"].pop()
    assert matrix.difference("base", "stage 1", "stage 1") is None
