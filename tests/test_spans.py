"""Where turns stand: every chat template TRL ships, as published and edited by one comment, gives the same trained
text for every kind of conversation; what a template does not write is said."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sft.data.labels.masks import label_row
from sft.data.labels.rendering import (
    EARLIER_REASONING_CUT,
    NO_CALLS,
    NO_TOOL_ANSWERS,
    REASONING_CUT,
    REWRITTEN,
    THOUGHTS_TWICE,
    TOOLS_UNSAID,
    render,
)
from sft.data.labels.template import BUILT_IN, Chat, ChatTemplate, template_of
from sft.data.labels.tokens import encoder
from sft.data.sources.turns import Dropped
from sft.errors import Problems
from tests.conftest import byte_tokenizer

Turns = list[dict[str, Any]]
ASKED, WHERE, AND = ({"role": "user", "content": text} for text in ("What is it?", "Where is it?", "And now?"))
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a code.",
        "parameters": {"type": "object", "properties": {"item": {"type": "string", "description": "Which."}}},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"item": "xyz"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "tool", "name": "look_up", "tool_call_id": "abcdefghi", "content": "Seventeen"}


def said(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


KINDS = {
    "two exchanges": Chat([ASKED, said("It is here."), WHERE, said("Over there.")]),
    "equal answers": Chat([ASKED, said("Yes"), WHERE, said("Yes"), AND, said("Yes")]),
    "think in the text": Chat(
        [ASKED, said("<think>\nhm one\n</think>\n\nOne."), WHERE, said("<think>\nhm two\n</think>\n\nTwo.")]
    ),
    "reasoning": Chat(
        [ASKED, said("One.", reasoning_content="hm one"), WHERE, said("Two.", reasoning_content="hm two")]
    ),
    "system": Chat([{"role": "system", "content": "Be kind."}, ASKED, said("It is here.")]),
    "tools": Chat([ASKED, said("It is here.")], [TOOL]),
    "tool call": Chat([ASKED, CALLING], [TOOL]),
    "tool answer": Chat([ASKED, CALLING, ANSWER, said("It is 17.")], [TOOL]),
    "tool answers, twice": Chat(
        [ASKED, CALLING, ANSWER, said("It is 17."), WHERE, CALLING, ANSWER, said("So.")], [TOOL]
    ),
    "assistant first": Chat([said("Welcome!"), ASKED, said("It is here.")]),
}  # fmt: skip


def trl_templates() -> list[Any]:
    """Chat templates of public models; those for images only are left out, and TRL's own training versions."""
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "chat_templates"
    images = ("idefics3", "llava_next", "smolvlm", "vl", "_training")
    paths = [path for path in sorted(folder.glob("*.jinja")) if not any(word in path.name for word in images)]
    return [pytest.param(path.read_text(encoding="utf-8"), id=path.stem) for path in paths] + [
        pytest.param(text, id=name) for name, text in BUILT_IN.items()
    ]


def of(text: str) -> ChatTemplate:
    template = template_of(byte_tokenizer(text, eos="</s>"))
    assert template is not None
    return template


def outcome(template: ChatTemplate, chat: Chat) -> tuple[list[str], tuple[str, ...]]:
    """The trained texts and what is noted; for a row that is dropped nothing and its reason."""
    (row,) = render(template, [Chat(template.fitted(chat.messages), chat.tools)])
    if isinstance(row, Dropped):
        return [], (str(row),)
    return [row.text[start:end] for start, end in row.turns], row.noted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", trl_templates())
def test_trained_text_of_every_template(text: str, kind: str):
    """All turns are trained, each with its words, its end and nothing that others said; or it is said what isn't."""
    template, chat = of(text), KINDS[kind]
    trained, noted = outcome(template, chat)
    assert (trained, noted) == outcome(of("{# edited #}" + text), chat)
    if not trained:
        (reason,) = noted
        assert reason in (NO_CALLS, NO_TOOL_ANSWERS) or "refused it: " in reason
        return
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    if REWRITTEN in noted:  # DeepSeek's template writes a second call without the header of an answer
        assert (kind, len(trained)) == ("tool answers, twice", 3)
        assert "｜Assistant｜" in text
        answers.pop(2)
    assert len(trained) == len(answers)
    assert set(noted) <= {REWRITTEN, TOOLS_UNSAID, REASONING_CUT, EARLIER_REASONING_CUT, THOUGHTS_TWICE}
    for turn, message in zip(trained, answers, strict=True):
        words = message["content"].rpartition("</think>")[2].strip() or "xyz"
        assert turn.count(words) == 1
        assert turn.partition(words)[2].strip()
        others = [each["content"] for each in chat.messages if each["role"] != "assistant"]
        assert not any(other in turn for other in others)
    reasoned = "hm two" in trained[-1]
    assert reasoned or REASONING_CUT in noted or kind not in ("think in the text", "reasoning")
    assert TOOLS_UNSAID in noted or not chat.tools or template.writes_tools


CHATML = BUILT_IN["chatml"]
THINK = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.reasoning_content -%}{{ '<think>\n' + "
    "m.reasoning_content + '\n</think>\n\n' }}{%- endif -%}{{ m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@pytest.mark.parametrize("text", [CHATML, THINK])
def test_flags_and_train_turns_choose_turns(text: str):
    """Marked and unmarked templates alike: a turn that is flagged or empty is context, so are all but the last one."""
    template = of(text)
    draft = said("Draft.", trained=False)
    chat = Chat([said("Welcome!"), ASKED, draft, WHERE, said("Here."), AND, said(""), AND, said("There.")])
    ends = "<|im_end|></s>" if text is CHATML else "<|im_end|>"
    assert outcome(template, chat)[0] == [words + ends for words in ("Welcome!", "Here.", "There.")]
    (row,) = render(template, [chat], train="last")
    assert not isinstance(row, Dropped)
    assert [row.text[start:end] for start, end in row.turns] == ["There." + ends]
    (row,) = render(template, [Chat([ASKED, said("Here."), AND, draft])], train="last")
    assert isinstance(row, Dropped)
    assert str(row) == "no answer that is to be trained"


@pytest.mark.parametrize(
    ("content", "reasoning", "expected"),
    [
        ("Answer: 7", "so: Answer: 5", " 7<|im_end|>"),
        ("It is 7", "so: Answer: 5", "It is 7<|im_end|>"),
        ("<think>\nAnswer: 5\n</think>\n\nPlan. Answer: 7", None, " 7<|im_end|>"),
        ("<think>\nAnswer: 5\n</think>\n\nIt is 7", None, "It is 7<|im_end|>"),
        ("Plan. Answer: 7", None, " 7<|im_end|>"),
    ],
)
def test_reasoning_is_context_where_chains_of_thought_are(
    content: str, reasoning: str | None, expected: str, make_settings: Any
):
    """SFT_MASK_COT: markers count behind the reasoning; without one there all of the answer is trained, uncounted."""
    tokenizer, settings = byte_tokenizer(THINK), make_settings(mask_cot=True)
    template = template_of(tokenizer)
    (row,) = render(template, [Chat([ASKED, said(content, **({"reasoning_content": reasoning} if reasoning else {}))])])
    assert not isinstance(row, Dropped)
    noted: Counter[str] = Counter()
    (encoded,) = encoder(tokenizer)([row.text])
    found = label_row(row, encoded, settings, noted=noted)
    assert tokenizer.decode([token for start, end in found.trained for token in found.ids[start:end]]) == expected
    assert noted == {}


def test_a_word_of_the_answer_is_no_reasoning(make_settings: Any):
    """A template that writes none, and an answer that happens to hold the text of it: once a start at -1."""
    tokenizer, settings = byte_tokenizer(CHATML), make_settings(mask_cot=True)
    chat = Chat([ASKED, said("6 times 7 is 42. Answer: 42", reasoning_content="42")])
    (row,) = render(template_of(tokenizer), [chat])
    assert not isinstance(row, Dropped)
    (encoded,) = encoder(tokenizer)([row.text])
    found = label_row(row, encoded, settings, noted=Counter())
    trained = tokenizer.decode([token for start, end in found.trained for token in found.ids[start:end]])
    assert trained == " 42<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('Roles must\nalternate') }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 1 / 0 }}",
        "{{ messages[99].role }}", "{{ none + 1 }}", "{{ '%d' | format('x') }}", "{{ nobody() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)  # fmt: skip
def test_whatever_a_template_raises_is_a_reason(text: str):
    """Its own words in one line; the other rows are kept."""
    template = of("{% if messages[0].content == 'What is it?' %}" + text + "{% endif %}" + CHATML)
    rows = render(template, [Chat([WHERE, said("Here.")]), Chat([ASKED, said("Here.")]), Chat([AND, said("There.")])])
    assert [isinstance(row, Dropped) for row in rows] == [False, True, False]
    assert str(rows[1]).startswith("the template refused it: ")
    assert "\n" not in str(rows[1])
    assert ("Roles must alternate" in str(rows[1])) == ("raise_exception" in text)


def test_options_reach_the_template_and_misspelt_ones_are_refused():
    """What the prompt then supplies is not trained."""
    supplied = THINK.replace("assistant\n' }}", "assistant\n' + ('<think></think>' if fast else '') }}")
    tokenizer = byte_tokenizer(supplied.replace("{{ m.content", "{{ ('<think></think>' if fast and m.role != 'user' "
                                                "else '') + m.content"))  # fmt: skip
    for options in ({}, {"fast": True}):
        template = template_of(tokenizer, options)
        assert template is not None
        assert outcome(template, Chat([ASKED, said("Here.")])) == (["Here.<|im_end|>"], ())
        assert template.render([Chat([ASKED])], prompt=True)[0].endswith(
            "assistant\n" + "<think></think>" * len(options)
        )
    with pytest.raises(Problems, match="SFT_TEMPLATE_OPTIONS=fst: the chat template reads no such option"):
        template_of(tokenizer, {"fst": True})


def test_reasoning_is_handed_over_under_the_name_a_template_reads():
    """gpt-oss reads `thinking`, the others `reasoning_content`: transformers offers both."""
    template = of(THINK.replace("reasoning_content", "thinking"))
    trained, noted = outcome(template, Chat([ASKED, said("Here.", reasoning_content="hm")]))
    assert (trained, noted) == (["<think>\nhm\n</think>\n\nHere.<|im_end|>"], ())
