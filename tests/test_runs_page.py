"""MLflow opens on training runs: the experiments of the stages, and nobody else's."""

from urllib.parse import unquote

import pytest

from sft.programs.runs_page import runs_page

STAGE = [{"key": "mlflow.experimentKind", "value": "custom_model_development"}]


@pytest.mark.parametrize(
    ("experiments", "place"),
    [
        ([], "experiments?"),
        ([{"experiment_id": "0", "name": "Default"}], "experiments?"),
        ([{"experiment_id": "0"}, {"experiment_id": "3", "tags": STAGE}], "experiments/3/runs?"),
        (
            [{"experiment_id": "2", "tags": STAGE}, {"experiment_id": "1", "tags": STAGE}, {"experiment_id": "0"}],
            'compare-experiments/s?experiments=["2","1"]&',
        ),
    ],
    ids=["nothing yet", "of others alone", "one stage", "a ladder"],
)
def test_the_page_shows_the_runs_of_all_stages(experiments: list[dict], place: str):
    """In MLflow's part for model training, which it does not open by itself."""
    page = runs_page("http://127.0.0.1:58000", experiments)
    assert unquote(page) == f"http://127.0.0.1:58000/#/{place}workflowType=machine_learning"
