"""The address of MLflow's page that shows the training runs of every stage, for official_content/mlflow_ui.sh.

    python -m sft.programs.runs_page http://127.0.0.1:58000 [--open]

MLflow's start page (3.17) shows traces of agents, of which fine-tuning has none.
"""

import argparse
import json
import time
import webbrowser
from urllib.parse import quote
from urllib.request import urlopen

from sft.reporting.tracker import KIND_TAG, TRAINING

STARTING_SECONDS = 120.0  # on a busy machine the server takes half a minute


def runs_page(address: str, experiments: list[dict]) -> str:
    """The page of these experiments, listed as MLflow's interface does: of one its runs, of several all together."""
    kind = {"key": KIND_TAG, "value": TRAINING}
    numbers = [each["experiment_id"] for each in experiments if kind in each.get("tags", [])]
    if len(numbers) > 1:
        place = f"compare-experiments/s?experiments={quote(json.dumps(numbers, separators=(',', ':')))}&"
    else:
        place = f"experiments/{numbers[0]}/runs?" if numbers else "experiments?"
    return f"{address}/#/{place}workflowType=machine_learning"


def experiments_of(address: str) -> list[dict]:
    """All experiments of a server that is starting. Raises OSError when it has not answered after two minutes."""
    end = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            with urlopen(f"{address}/api/2.0/mlflow/experiments/search?max_results=1000", timeout=10) as answer:
                return json.load(answer).get("experiments", [])
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", help="where the server listens")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    options = parser.parse_args()
    page = runs_page(options.address, experiments_of(options.address))
    print(f"Training runs: {page}", flush=True)
    if options.open:
        webbrowser.open(page)


if __name__ == "__main__":
    main()
