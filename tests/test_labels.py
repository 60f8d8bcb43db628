"""Labels: what is trained of a row, for any chat template and tokenizer; kept on disk; audited; shown."""

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sft.data.labels import label as labelling
from sft.data.labels.audit import audit
from sft.data.labels.label import label, preview
from sft.data.labels.rendering import Rendered, render
from sft.data.labels.template import BUILT_IN, Chat, chat_template_for, template_of
from sft.data.labels.tokens import Encoded, encode_up_to, encoder
from sft.data.sources.load import Rows, load_source
from sft.data.workers import in_order
from sft.errors import Problems, RunFailed
from sft.settings import Source
from tests.conftest import CHATML, byte_tokenizer, word_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
M = -100
Turns = list[dict[str, str]]


def exchange(*contents: str) -> Turns:
    """user, assistant, user, ... with these contents."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def rows_of(tmp_path: Path) -> Any:
    """Rows with these messages."""

    def rows(*chats: Turns) -> Rows:
        path = tmp_path / "rows.jsonl"
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in chats]
        path.write_text("\n".join(lines), encoding="utf-8")
        return load_source(Source(id=str(path)))

    return rows


def trained_texts(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """The decoded runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, kept in zip(row["input_ids"], row["labels"], strict=True):
        if kept == M:
            runs.append([])
        else:
            assert kept == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


# What is trained


def test_an_answer_and_its_end_are_trained(words: Any, rows_of: Any, make_settings: Any):
    """Literal ids and labels: header, prompt and the newline after the end-of-turn token are masked."""
    row = label(rows_of(exchange("Hi there!", "One two")), words, make_settings()).dataset[0]
    assert row["input_ids"] == [3, 6, 8, 9, 10, 11, 4, 8, 3, 7, 8, 12, 13, 4, 8]
    assert row["labels"] == [M, M, M, M, M, M, M, M, M, M, M, 12, 13, 4, M]
    assert (row["length"], row["trained"]) == (15, 3)


def test_every_assistant_turn_is_trained(words: Any, rows_of: Any, make_settings: Any):
    """Two exchanges: both answers with their ends, no prompt; equal contents are told apart by place."""
    row = label(rows_of(exchange("Hi", "Hi", "Bye", "Bye")), words, make_settings()).dataset[0]
    assert row["input_ids"] == [3, 6, 8, 9, 4, 8, 3, 7, 8, 9, 4, 8, 3, 6, 8, 20, 4, 8, 3, 7, 8, 20, 4, 8]
    assert row["labels"] == [M, M, M, M, M, M, M, M, M, 9, 4, M, M, M, M, M, M, M, M, M, M, 20, 4, M]


def test_the_end_is_trained_though_it_is_the_padding_token_too(rows_of: Any, make_settings: Any):
    """pad = eos is how many models come; masking by the padding token would lose the end of every answer."""
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 4
    row = label(rows_of(exchange("Hi", "One")), tokenizer, make_settings()).dataset[0]
    assert [token for token in row["labels"] if token != M] == [12, 4]


def test_ids_are_those_of_the_chat_template(rows_of: Any, make_settings: Any):
    """As transformers renders and encodes: nothing is added before or after."""
    tokenizer = byte_tokenizer("{{ bos_token }}" + CHATML)
    messages = exchange("Write   JSON, 東京 👍", "{}\n\n  the user")
    row = label(rows_of(messages), tokenizer, make_settings()).dataset[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]


def test_train_on_prompt_trains_everything(words: Any, rows_of: Any, make_settings: Any):
    """Every token is its own label."""
    row = label(rows_of(exchange("Hi", "One")), words, make_settings(train_on_prompt=True)).dataset[0]
    assert row["labels"] == row["input_ids"] == [3, 6, 8, 9, 4, 8, 3, 7, 8, 12, 4, 8]


def test_an_answer_marked_as_context_stays_so_though_prompts_are_trained(words: Any, rows_of: Any, make_settings: Any):
    """All but its text and its end; an empty answer likewise. SFT_TRAIN_TURNS=last makes earlier ones a prompt."""
    flagged = exchange("Hi", "One", "Bye", "Plan")
    flagged[1]["train"] = False  # type: ignore[assignment]
    both = make_settings(train_on_prompt=True)
    row = label(rows_of(flagged), words, both).dataset[0]
    ids = [3, 6, 8, 9, 4, 8, 3, 7, 8, 12, 4, 8, 3, 6, 8, 20, 4, 8, 3, 7, 8, 19, 4, 8]
    assert row["input_ids"] == ids
    assert row["labels"] == [*ids[:9], M, M, *ids[11:]]
    assert label(rows_of(exchange("Hi", "", "Bye", "Plan")), words, both).dataset[0]["labels"].count(M) == 1
    last = make_settings(train_on_prompt=True, train_turns="last")
    assert label(rows_of(exchange("Hi", "One", "Bye", "Plan")), words, last).dataset[0]["labels"] == ids
    assert label(rows_of(flagged), words, last).dataset[0]["labels"] == row["labels"]


def test_a_context_turn_that_the_template_rewrote_is_not_trained_by_mistake(rows_of: Any, make_settings: Any):
    """Its characters are not to be found, so that the row is dropped where prompts are trained, and kept where not."""
    shout = "{{ message['content'] | upper if not loop.last else message['content'] }}"
    tokenizer = byte_tokenizer(CHATML.replace("{{ message['content'] }}", shout))
    flagged = exchange("Hi", "one", "Bye", "Plan")
    flagged[1]["train"] = False  # type: ignore[assignment]
    rows = label(rows_of(flagged), tokenizer, make_settings(train_on_prompt=True))
    reason = "turn that is not to be trained rewritten by the template (SFT_TRAIN_ON_PROMPT=1)"
    assert (len(rows.dataset), rows.dropped) == (0, {reason: 1})
    assert len(label(rows_of(flagged), tokenizer, make_settings()).dataset) == 1


def test_an_empty_answer_inside_a_row_is_counted(words: Any, rows_of: Any, make_settings: Any):
    """It is not trained; the others are. One that is marked, or is no last turn where only that counts, was not meant
    to be."""
    empty = exchange("Hi", "", "Bye", "Plan")
    rows = label(rows_of(empty), words, make_settings())
    assert rows.noted == {"empty answer of an earlier turn": 1}
    assert trained_texts(words, rows.dataset[0]) == ["Plan<|im_end|>"]
    assert label(rows_of(empty), words, make_settings(train_turns="last")).noted == {}
    empty[1]["train"] = False  # type: ignore[assignment]
    assert label(rows_of(empty), words, make_settings()).noted == {}


def test_plain_text_is_trained_whole_and_ended(tmp_path: Path, make_settings: Any):
    """No template is needed or applied; the end of text is added once."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One two"}\n{"text": "One<|im_end|>"}\n', encoding="utf-8")
    rows = load_source(Source(id=str(path)))
    dataset = label(rows, word_tokenizer(template=None), make_settings()).dataset
    assert dataset["input_ids"][:] == dataset["labels"][:] == [[12, 13, 4], [12, 4]]


def test_a_tokenizer_without_chat_template_is_a_problem(rows_of: Any, make_settings: Any):
    """The remedy names the built-in templates."""
    with pytest.raises(Problems, match="no chat template; set chatml, llama2, alpaca, mistral"):
        label(rows_of(exchange("Hi", "One")), word_tokenizer(template=None), make_settings())


def test_rows_the_template_refuses_are_counted(rows_of: Any, make_settings: Any):
    """A template that wants roles to alternate refuses one of three rows; the others are kept in order."""
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    rows = label(
        rows_of(exchange("Hi", "One"), exchange("Hi", "One")[::-1] + exchange("", "Bye")[1:], exchange("Bye", "One")),
        word_tokenizer(strict),
        make_settings(),
    )
    assert (len(rows.dataset), rows.dropped) == (2, {"the template refused it: no": 1})
    assert [row[3] for row in rows.dataset["input_ids"]] == [9, 20]


def test_a_template_without_system_role_gets_it_in_the_first_prompt(rows_of: Any, make_settings: Any):
    """Gemma's template refuses the role: the text begins the user's turn, and the row keeps the fitted messages."""
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = rows_of([{"role": "system", "content": "Plan"}, *exchange("Hi", "One")])
    row = label(rows, word_tokenizer(strict), make_settings()).dataset[0]
    assert row["messages"] == exchange("Plan\n\nHi", "One")
    assert row["input_ids"] == [3, 6, 8, 19, 8, 8, 9, 4, 8, 3, 7, 8, 12, 4, 8]


# Any chat template


def trl_templates() -> Path:
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "chat_templates"


def published_templates() -> list[Any]:
    """Chat templates of public models as TRL carries them; those for images only are left out."""
    folder = trl_templates()
    images = ("idefics3", "llava_next", "smolvlm", "vl.")
    return [
        pytest.param(path.read_text(encoding="utf-8"), id=path.stem)
        for path in sorted(folder.glob("*.jinja"))
        if not any(word in path.name for word in images)
    ] + [pytest.param(text, id=name) for name, text in BUILT_IN.items()]


@pytest.mark.parametrize("text", published_templates())
def test_turns_of_every_published_template(text: str):
    """One and two exchanges: each assistant turn ends as the model must end it, holds its answer and no prompt."""
    template = template_of(byte_tokenizer(text, eos="</s>"))
    assert template is not None
    contents = ("Where is it?", "It is here.", "Where is it?", "  It is {here}.\n")
    for chat_ in (exchange(*contents[:2]), exchange(*contents)):
        (row,) = render(template, [Chat(chat_)])
        assert isinstance(row, Rendered)
        turns = [row.text[start:end] for start, end in row.turns]
        assert len(turns) == len(chat_) // 2
        for turn, message in zip(turns, chat_[1::2], strict=True):
            assert turn.count(message["content"].strip()) == 1
            assert "Where" not in turn
            assert turn.partition(message["content"].strip())[2].strip() != ""
        assert row.text[: row.turns[0][0]].count("Where is it?") == 1
        content = chat_[-1]["content"]
        assert row.shift is not None
        assert row.text[row.shift + len(content) - len(content.lstrip()) :].startswith(content.strip())


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3", "gemma", "lfm2", "cohere2", "glm4moe"])
def test_comparing_prompts_finds_what_marks_say(name: str):
    """Two ways that share nothing: the training template's marks, and the same template with the marks taken out."""
    folder = trl_templates()
    marked = (folder / f"{name}_training.jinja").read_text(encoding="utf-8")
    bare = re.sub(r"(\{%-?) generation (-?%\})", r"\1 if true \2", marked)
    bare = re.sub(r"(\{%-?) endgeneration (-?%\})", r"\1 endif \2", bare)
    chats = [
        exchange("Where?", "Here."),
        exchange("Where?", "Here.", "And?", " There 東京.\n"),
        exchange("a", "a", "a", "a"),
    ]
    found = []
    for text in (marked, bare):
        template = template_of(byte_tokenizer(text, eos="</s>"))
        assert template is not None
        assert template.marked == (text is marked)
        found.append(
            [(row.text, row.turns) for row in render(template, list(map(Chat, chats))) if isinstance(row, Rendered)]
        )
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_marks_in_the_wrong_place_are_not_trusted(rows_of: Any, make_settings: Any):
    """Marks around the user's turn, or that leave out the end of the answer, give way to comparing."""
    user = (
        "{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ m.content + '\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    unended = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\n' }}"
        "{% else %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    for text in (user, unended):
        tokenizer = word_tokenizer(text)
        rows = label(rows_of(exchange("Hi", "One")), tokenizer, make_settings())
        assert trained_texts(tokenizer, rows.dataset[0]) == ["One<|im_end|>"]
        assert audit(rows, tokenizer, make_settings()) == []


@pytest.mark.parametrize("name", ["chatml", "llama2", "alpaca", "mistral"])
def test_built_in_templates(name: str, rows_of: Any, make_settings: Any):
    """Text by text, with a system message and a second exchange, and without in the prompt."""
    tokenizer = byte_tokenizer(chat_template_for(name), eos="</s>")
    messages = [{"role": "system", "content": "S"}, *exchange("q", "a", "r", "b")]
    expected = {
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|></s>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|></s>\n",
        "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST] b </s>",
        "mistral": "<s>[INST] S\n\nq [/INST]a</s>[INST] r [/INST]b</s>",
        "alpaca": "<s>S\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n"
        "### Instruction:\nr\n\n### Response:\nb</s>\n\n",
    }
    trained = {"chatml": ["a<|im_end|></s>", "b<|im_end|></s>"], "llama2": [" a </s>", " b </s>"]}
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected[name]
    rows = label(rows_of(messages), tokenizer, make_settings())
    assert trained_texts(tokenizer, rows.dataset[0]) == trained.get(name, ["a</s>", "b</s>"])
    assert audit(rows, tokenizer, make_settings()) == []
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert expected[name].startswith(prompt)


def test_a_template_from_a_file_and_one_that_is_none(tmp_path: Path):
    """A .jinja file is read as it is; anything else is refused with the names there are."""
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}\n", encoding="utf-8")
    assert chat_template_for(str(path)) == "{{ messages }}\n"
    with pytest.raises(
        Problems, match="SFT_CHAT_TEMPLATE=nope: neither chatml, llama2, alpaca, mistral nor a readable"
    ):
        chat_template_for("nope")


@pytest.mark.parametrize("text", ["{{ undefined_function() }}", "{% for %}", "{{ messages[5].content }}", "constant"])
def test_a_broken_template_is_a_problem(text: str, rows_of: Any, make_settings: Any):
    """Syntax errors and templates that fail on a question and its answer end with one line."""
    with pytest.raises(Problems, match="SFT_CHAT_TEMPLATE=: the chat template cannot be used"):
        label(rows_of(exchange("Hi", "One")), word_tokenizer(text), make_settings())


class SlowWords:
    """A tokenizer without offsets, as Python-only tokenizers are."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, text: str, **options: Any) -> Any:
        return self.fast(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


def test_tokenizers_without_offsets_give_the_same_labels(rows_of: Any, make_settings: Any):
    """Characters are found by encoding prefixes instead."""
    settings = make_settings(mask_cot=True)
    tokenizer = byte_tokenizer()
    chats = [exchange("Write 東京", "Output:\n{}"), exchange("a", "b", "c", "the Output: d")]
    fast, slow = (label(rows_of(*chats), each, settings).dataset for each in (tokenizer, SlowWords(tokenizer)))
    assert fast["labels"][:] == slow["labels"][:]
    assert [trained_texts(tokenizer, row) for row in slow] == [["{}<|im_end|>"], ["b<|im_end|>", " d<|im_end|>"]]


# Output markers


@pytest.mark.parametrize(
    ("mode", "answer", "expected"),
    [
        ("after_marker", "Plan\nOutput:\n{}", "{}<|im_end|>"),
        ("after_marker", "Plan\nOutput: {}", " {}<|im_end|>"),
        ("after_marker", "Plan\nOutput: \r\n{}", "{}<|im_end|>"),
        ("after_marker", "Plan\nOutput:\n\n{}", "\n{}<|im_end|>"),
        ("after_marker", "Output: Output: {}", " Output: {}<|im_end|>"),
        ("from_marker", "Plan\nOutput:\n{}", "Output:\n{}<|im_end|>"),
        ("from_marker", "Plan Output:{}", "Output:{}<|im_end|>"),
        ("after_marker", "Final: a Output: b", " a Output: b<|im_end|>"),
        ("after_marker", "no mark", "no mark<|im_end|>"),
    ],
)
@pytest.mark.parametrize("trim", [False, True])
def test_text_before_the_first_marker_is_context(
    rows_of: Any, make_settings: Any, mode: str, answer: str, expected: str, trim: bool
):
    """Found by characters: it does not matter how the tokenizer joins the marker with its neighbours."""
    tokenizer = byte_tokenizer(trim_offsets=trim)
    rows = label(
        rows_of(exchange("Hi Output: x", answer)), tokenizer, make_settings(mask_cot=True, output_learn_mode=mode)
    )
    assert trained_texts(tokenizer, rows.dataset[0]) == [expected]
    assert rows.noted == ({"no output marker": 1} if answer == "no mark" else {})


def test_only_the_final_answer_has_its_marker_looked_for(rows_of: Any, make_settings: Any):
    """Earlier turns are trained whole; a marker in the prompt is no marker; nothing behind one is fully masked."""
    tokenizer = byte_tokenizer()
    rows = rows_of(exchange("a", "Output: b", "Output: c", "d\nOutput: e"), exchange("a", "b\nOutput: \n "))
    rows = label(rows, tokenizer, make_settings(mask_cot=True))
    assert [trained_texts(tokenizer, row) for row in rows.dataset] == [["Output: b<|im_end|>", " e<|im_end|>"]]
    assert rows.dropped == {"fully masked": 1}


# Length


def test_over_long_rows(words: Any, rows_of: Any, make_settings: Any):
    """15 tokens fit 15. At 13 a row is dropped, or cut on the right; one whose prompt alone is too long always goes."""
    chats = exchange("Hi there!", "One two"), exchange("Hi", "One"), exchange("Hi there" * 6, "One")
    fits = label(rows_of(*chats), words, make_settings(max_seq_len=15))
    assert (fits.dataset["length"][:], fits.dropped) == ([15, 12], {"over-long": 1})
    dropped = label(rows_of(*chats), words, make_settings(max_seq_len=13))
    assert (dropped.dataset["length"][:], dropped.dropped) == ([12], {"over-long": 2})
    cut = label(rows_of(*chats), words, make_settings(max_seq_len=13, overlong="truncate"))
    assert (cut.dataset["length"][:], cut.dropped, cut.noted) == ([13, 12], {"over-long": 1}, {"truncated": 1})
    assert cut.dataset[0]["labels"] == [M] * 11 + [12, 13]
    marked = make_settings(max_seq_len=13, overlong="truncate", mask_cot=True)
    lost = label(rows_of(exchange("Hi", "One two three Output: two")), words, marked)
    assert (len(lost.dataset), lost.dropped) == (0, {"fully masked": 1})


# Units of the masked loss


def test_units_are_token_spans_of_the_final_answer(rows_of: Any, make_settings: Any):
    """Each span decodes to its child; an earlier turn and the prompt have none; cut units are left out."""
    tokenizer = byte_tokenizer()
    settings = make_settings(masked_loss="inverse_frequency")
    chat_ = exchange("user -> spaces", "a -> b", "x", "the user -> write JSON -> 東 京\nthe user -> 京\n")
    row = label(rows_of(chat_), tokenizer, settings).dataset[0]
    spans = list(zip(row["unit_starts"], row["unit_ends"], strict=True))
    assert [tokenizer.decode(row["input_ids"][start:end]).strip() for start, end in spans] == [
        "write JSON",
        "東 京",
        "京",
    ]
    assert [json.loads(edge) for edge in row["unit_edges"]] == [
        ["path", "the user", "write JSON"],
        ["path", "write JSON", "東 京"],
        ["path", "the user", "京"],
    ]
    limit = make_settings(masked_loss="inverse_frequency", overlong="truncate", max_seq_len=spans[1][1] - 1)
    assert label(rows_of(chat_), tokenizer, limit).dataset[0]["unit_edges"] == row["unit_edges"][:1]


def test_titles_with_arrows_and_newlines_are_units_as_a_whole(tmp_path: Path, make_settings: Any):
    """The borders are those of the row's own paths, not of the text they are rendered to."""
    rows = tmp_path / "rows.jsonl"
    paths = [["root", "x -> y", "two\nlines"], ["root", "z"]]
    rows.write_text(json.dumps({"title": "T", "abstract": "A.", "paths": paths}))
    settings, tokenizer = make_settings(masked_loss="inverse_frequency"), byte_tokenizer()
    row = label(load_source(Source(id=str(rows))), tokenizer, settings).dataset[0]
    spans = zip(row["unit_starts"], row["unit_ends"], strict=True)
    decoded = [tokenizer.decode(row["input_ids"][start:end]).strip() for start, end in spans]
    assert decoded == ["x -> y", "two\nlines", "z"]
    edges = [["path", "root", "x -> y"], ["path", "x -> y", "two\nlines"], ["path", "root", "z"]]
    assert [json.loads(edge) for edge in row["unit_edges"]] == edges


def test_json_units_begin_after_the_marker(rows_of: Any, make_settings: Any):
    """Braces in the reasoning are not the payload; an answer without JSON is trained unmasked and counted."""
    settings = make_settings(masked_loss="inverse_frequency", masked_loss_unit="json_edge")
    tokenizer = byte_tokenizer()
    rows = label(rows_of(exchange("q", 'Plan {x}\nOutput:\n{"k": "v"}'), exchange("q", "none")), tokenizer, settings)
    first, second = rows.dataset
    spans = zip(first["unit_starts"], first["unit_ends"], strict=True)
    assert {tokenizer.decode(first["input_ids"][start:end]).strip() for start, end in spans} == {"k", "v"}
    assert second["unit_edges"] == []
    assert rows.noted == {"no JSON in the answer": 1}


# Kept on disk


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time rows are tokenised."""
    calls: list[int] = []
    original = labelling.encoder

    def counting(tokenizer: Any, **options: Any) -> Any:
        encode = original(tokenizer, **options)

        def count(texts: Sequence[str]) -> Any:
            if not texts[0].endswith("assistant\n"):  # else the prompt's border is looked at
                calls.append(len(texts))
            return encode(list(texts))

        return count

    monkeypatch.setattr(labelling, "encoder", counting)
    return calls


def test_labels_are_made_once(rows_of: Any, make_settings: Any, encodings: list[int]):
    """Equal content, tokenizer and settings are found again; what labels hang on makes them anew, nothing else does."""
    rows = rows_of(exchange("Hi", "made once"))
    first = label(rows, word_tokenizer(), make_settings())
    again = label(rows, word_tokenizer(), make_settings(lr=5.0, seed=1, overlong="error", output_markers=("X:",)))
    assert len(encodings) == 1
    assert again.dataset[0] == first.dataset[0]
    for tokenizer, settings in (
        (word_tokenizer(eos="</s>"), make_settings()),
        (word_tokenizer(CHATML + " "), make_settings()),
        (word_tokenizer(), make_settings(max_seq_len=100)),
        (word_tokenizer(), make_settings(train_on_prompt=True)),
        (word_tokenizer(), make_settings(mask_cot=True)),
        (word_tokenizer(), make_settings(mask_cot=True, output_markers=("X:",))),
    ):
        before = len(encodings)
        label(rows, tokenizer, settings)
        assert len(encodings) == before + 1
    label(rows_of(exchange("Hi", "edited")), word_tokenizer(), make_settings())
    assert len(encodings) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "no notes", "broken notes"])
def test_damaged_labels_are_made_again(rows_of: Any, make_settings: Any, encodings: list[int], damage: str):
    """One changed byte is enough to notice; the dropped rows are counted as before."""
    rows = rows_of(exchange("Hi", f"damage {damage}"), exchange("Hi " * 3000, "too long"))
    first = label(rows, word_tokenizer(), make_settings())
    path = Path(first.dataset.cache_files[0]["filename"])
    expected, content = first.dataset[0], path.read_bytes()
    if damage == "flip":
        middle = content.index(b"damage")
        path.write_bytes(content[:middle] + b"D" + content[middle + 1 :])
    elif damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "no notes":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("{", encoding="utf-8")
    again = label(rows, word_tokenizer(), make_settings())
    assert len(encodings) == 2
    assert again.dataset[0] == expected
    assert again.dropped == first.dropped == {"over-long": 1}


def test_several_processes_give_the_same_rows_in_order(
    rows_of: Any, make_settings: Any, monkeypatch: pytest.MonkeyPatch
):
    """Two processes over 5 batches of 2; counts add up."""
    monkeypatch.setattr(labelling, "_ROWS_AT_ONCE", 2)
    tokenizer = byte_tokenizer()
    chats = [exchange(f"question {number}", f"answer {number}" * (100 if number == 4 else 1)) for number in range(9)]
    one, two = (label(rows_of(*chats), tokenizer, make_settings(max_seq_len=60 + n, num_proc=n)) for n in (1, 2))
    assert one.dataset.to_list() == two.dataset.to_list()
    assert [row["messages"][0]["content"][-1] for row in two.dataset] == list("01235678")
    assert one.dropped == two.dropped == {"over-long": 1}


def test_a_killed_process_ends_the_run_with_advice():
    """It would be waited for forever otherwise."""
    with pytest.raises(RunFailed, match="killed, most likely for memory: try SFT_NUM_PROC=1"):
        list(in_order(os._exit, [1, 1], processes=2))
    assert list(in_order(abs, [-1, 2, -3], processes=2)) == [1, 2, 3]


# Audit


def with_labels(rows: Rows, **columns: list[Any]) -> Rows:
    """The rows with columns put in by hand, as a damaged cache would have them."""
    dataset = rows.dataset
    for name, values in columns.items():
        features = dataset.features[name]
        dataset = dataset.remove_columns(name).add_column(name, values, feature=features)
    return Rows(rows.source, dataset, rows.dropped, rows.fingerprint)


def test_the_audit_finds_each_fault(words: Any, rows_of: Any, make_settings: Any):
    """Rows are named; faultless ones are not."""
    rows = label(rows_of(*[exchange("Hi", "One")] * 3), words, make_settings())
    good = [M] * 9 + [12, 4, M]
    assert rows.dataset["labels"][:] == [good] * 3
    assert audit(rows, words, make_settings()) == []
    for bad, expected in (
        ([M] * 12, "have no trained token (rows 1)"),
        ([M] * 9 + [12, M, M], "have an end of turn that is not trained (rows 1)"),
        ([M] * 9 + [13, 4, M], "have labels that are not the row's tokens (rows 1)"),
        ([M] * 3 + [9] + [M] * 5 + [12, 4, M], "have trained tokens in the prompt (rows 1)"),
    ):
        (problem,) = audit(with_labels(rows, labels=[good, bad, good]), words, make_settings())
        assert expected in problem


def test_a_template_that_ends_no_turn_fails_the_audit(rows_of: Any, make_settings: Any):
    """The model would never learn to stop."""
    tokenizer = word_tokenizer("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    rows = label(rows_of(exchange("Hi", "One")), tokenizer, make_settings())
    (problem,) = audit(rows, tokenizer, make_settings())
    assert (
        "have an end of turn that is not trained (rows 0); the chat template must write the end-of-turn token"
        in problem
    )


def test_rows_cut_by_truncation_need_no_end(words: Any, rows_of: Any, make_settings: Any):
    """Only they: the others must end."""
    settings = make_settings(max_seq_len=13, overlong="truncate")
    rows = label(rows_of(exchange("Hi there!", "One two"), exchange("Hi", "One")), words, settings)
    assert audit(rows, words, settings) == []
    bad = with_labels(rows, labels=[rows.dataset[0]["labels"], [M] * 9 + [12, M, M]])
    assert len(audit(bad, words, settings)) == 1


# Preview


def test_the_preview_colours_what_is_trained(words: Any, rows_of: Any, make_settings: Any):
    """Green between escape codes, corner brackets without colour."""
    row = label(rows_of(exchange("Hi", "One two")), words, make_settings()).dataset[0]
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert preview(words, row) == f"{start}\x1b[32mOne two<|im_end|>\x1b[0m\n"
    assert preview(words, row, colour=False) == f"{start}「One two<|im_end|>」\n"


# Properties and real data

BYTES = {trim: byte_tokenizer(trim_offsets=trim) for trim in (False, True)}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30)


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=3), st.booleans())
def test_any_text_is_trained_exactly(pairs: list[tuple[str, str]], trim: bool):
    """Whatever the texts hold, the trained tokens are those of the answers and their ends, and decode to them."""
    tokenizer = BYTES[trim]
    template = template_of(tokenizer)
    messages = exchange(*(text for pair in pairs for text in pair))
    (row,) = render(template, [Chat(messages)])
    assert row is not None
    assert [row.text[start:end] for start, end in row.turns] == [f"{answer}<|im_end|>" for _, answer in pairs]
    (encoded,) = labelling.encoder(tokenizer)([row.text])
    spans = [encoded.ids[encoded.first(start) : encoded.end(end)] for start, end in row.turns]
    assert [tokenizer.decode(ids) for ids in spans] == [f"{answer}<|im_end|>" for _, answer in pairs]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_rows_train_the_payload_only(make_settings: Any):
    """Document 000's data: every row has one marker, and what is trained is all that follows it."""
    tokenizer = byte_tokenizer()
    rows = load_source(Source(id=str(SHARED / "structured_cot_512_v2.jsonl"), limit=300))
    labelled = label(rows, tokenizer, make_settings(mask_cot=True, max_seq_len=100_000))
    assert (len(labelled.dataset), labelled.noted) == (300, {})
    for row in labelled.dataset:
        payload = row["messages"][-1]["content"].split("Output:\n", maxsplit=1)[1]
        assert trained_texts(tokenizer, row) == [f"{payload}<|im_end|>"]
    assert audit(labelled, tokenizer, make_settings(mask_cot=True)) == []


def test_only_the_beginning_of_a_text_that_is_far_too_long_is_encoded():
    """A limit of 10 tokens: of 100,000 words the start suffices; a single huge word is encoded whole."""
    tokenizer = word_tokenizer()
    asked: list[int] = []

    def encode(texts: list[str]) -> Sequence[Encoded]:
        asked.extend(map(len, texts))
        return encoder(tokenizer)(texts)

    texts = ["Hi", "One " * 100_000, "a" * 100_000]
    short, long, word = encode_up_to(encode, texts, 10)
    assert (len(short.ids), len(word.ids)) == (1, 1)
    assert 10 < len(long.ids) < 10_000
    assert asked == [2, 64 * 74, 64 * 74, 100_000]


def test_rows_of_unknown_words_fail_the_audit(tmp_path: Path, make_settings: Any):
    """A tokenizer for another language or with a broken vocabulary: nothing could be learnt from such rows."""
    path = tmp_path / "rows.jsonl"
    texts = ["One two three", "東京 大阪 京都", "One two three", "Bye 名古屋 神戸 横浜"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = word_tokenizer()
    rows = label(load_source(Source(id=str(path))), tokenizer, make_settings())
    (problem,) = audit(rows, tokenizer, make_settings())
    assert "2 rows of" in problem
    assert "are mostly <unk> (rows 1, 3): the tokenizer has no tokens for their text" in problem


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("added", "text"), [("<s>", "One two"), ("<s>", "<s>One two"), ("", "One two")])
def test_plain_text_begins_as_the_tokenizer_begins_it(
    tmp_path: Path, make_settings: Any, added: str, text: str, slow: bool
):
    """BOS stands there where `tokenizer(text)` puts it, once, and EOS once; conversations get none beside theirs."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    if added:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text}, {"messages": exchange("Hi", "One")}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = SlowWords(tokenizer) if slow else tokenizer
    dataset = label(load_source(Source(id=str(path))), words, make_settings()).dataset
    assert dataset["input_ids"][0] == [*([1] if added else []), 12, 13, 4]
    assert dataset["labels"][0] == [*([M] if added else []), 12, 13, 4]
    assert dataset["input_ids"][1] == [3, 6, 8, 9, 4, 8, 3, 7, 8, 12, 4, 8]
