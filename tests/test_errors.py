"""What a message, a manifest or a report never shows."""

import pickle
import traceback

import pytest
import torch

from sft.cli import explain
from sft.errors import hide_secrets, plainly

TOKEN = "hf_" + "a1" * 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://anna:geheim@db/x", "postgres://***@db/x"),
        (f"run-{TOKEN} of stage 1", "run-*** of stage 1"),
        ("gh" + "p_" + "x" * 36, "***"),
        ("sk-" + "k" * 40, "***"),
        ("http://host/mlflow?token=abc.def&x=1", "http://host/mlflow?token=***&x=1"),
        ('"s3://bucket/x?a=1&X-Amz-Signature=0f%2F"', '"s3://bucket/x?a=1&X-Amz-Signature=***"'),
        ("http://host/?ACCESS_KEY=a#end", "http://host/?ACCESS_KEY=***#end"),
    ],
)
def test_credentials_are_hidden_wherever_they_stand(text: str, shown: str):
    """Passwords of addresses, access tokens, and values of queries that are named like one."""
    assert hide_secrets(text) == shown
    assert hide_secrets(shown) == shown


@pytest.mark.parametrize(
    "text", ["hf_short", "a@b.org", "task-structured-data-set-with-a-long-name-of-40", "a?b=c", "tokens=3"]
)
def test_other_text_stays(text: str):
    """Words that only look a little like it."""
    assert hide_secrets(text) == text


def test_torch_s_advice_to_run_pickled_code_is_never_passed_on(tmp_path):
    """Message and traceback say why the file is not loaded, and nothing about how to load it all the same."""
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(print))  # a function: more than tensors
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(path, weights_only=True)
    for text in (str(caught.value), "".join(traceback.format_exception(caught.value)), explain(caught.value)):
        shown = plainly(text)
        assert "could run code, so it is not loaded; take safetensors instead" in shown
        for advice in ("re-run", "weights_only=False", "`False`", "safe_globals", "trusted source", "docs/stable"):
            assert advice.lower() not in shown.lower(), advice
