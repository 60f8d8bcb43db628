"""What all tests share: a cache folder of their own, and tokenizers small enough to read."""

import os
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Before datasets is imported: prepared rows of tests never land in the person's cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="staged_sft_tests_")
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported: equalities are taken in float32, and two processes do not fit one GPU.
GPU_TESTS = os.environ.get("STAGED_TEST_GPU") == "1"
if not GPU_TESTS:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ids 0 to 20, in this order.
VOCABULARY = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "\n", "Hi", " there",
    "!", "One", " two", " three", "Output", ":", " {", "}", "Plan", "Bye",
)  # fmt: skip
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def word_tokenizer(
    template: str | None = CHATML, *, eos: str = "<|im_end|>", words: tuple[str, ...] = VOCABULARY
) -> Any:
    """One token per word with the space before it, per newline and per punctuation mark; unknown words are `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?\w+| ?[^\w\s]|\s"), behavior="isolated")
    bare.decoder = decoders.Fuse()
    bare.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token=eos, pad_token=eos, unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def byte_tokenizer(template: str | None = CHATML, *, eos: str = "<|im_end|>", trim_offsets: bool = False) -> Any:
    """Byte-level BPE with a few merges: spaces join words, and characters outside ASCII take several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare.decoder = decoders.ByteLevel()
    bare.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    bare.train_from_iterator(["Output: the user and the assistant write   JSON with spaces\n\n"] * 5, trainer)
    bare.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run with STAGED_TEST_GPU=1 alone, and then they alone: the others hold in float32 on a CPU."""
    for item in items:
        if bool(item.get_closest_marker("gpu")) is not GPU_TESTS:
            reason = "needs a CPU alone: make test" if GPU_TESTS else "needs a GPU: STAGED_TEST_GPU=1 make test"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def words() -> Any:
    """The word tokenizer with ChatML; do not change it."""
    return word_tokenizer()


@pytest.fixture
def make_settings(tmp_path: Any) -> Callable[..., Any]:
    """Settings of a stage 1 with these attributes besides the required ones."""
    from sft.settings import Settings

    def make(**attributes: Any) -> Any:
        return Settings(stage=1, env_dir=tmp_path, base_model="owner/tiny", out_lora_dir=tmp_path / "out", **attributes)

    return make


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with the installed commands of this very checkout, and `staged_sft` to import."""
    folder = tmp_path / "installed"
    folder.mkdir()
    (folder / "staged_sft").symlink_to(ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder
