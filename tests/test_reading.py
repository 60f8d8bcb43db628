"""What is read of a batch of prompts: beginnings in common once, groups with little padding; and rows that leave."""

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EncoderRepetitionPenaltyLogitsProcessor, PreTrainedModel

from sft.evaluation import answers as answers_module
from sft.evaluation import decoding, reading, shared
from sft.evaluation.answers import generate_answers
from sft.evaluation.shared import groups, with_beginnings
from sft.models import ragged
from tests.test_answers import GROUPED, LEFT_ALONE, NEW_TOKENS, WORDS, model_of

SYSTEM = "red blue green small large name color size red red blue blue"


def depths(prompts: list[list[int]], *, cost: int = 2, room: int = 100) -> list[int]:
    return [prompt.shared for prompt in with_beginnings(prompts, cost=cost, room=room)]


def test_a_beginning_in_common_is_found_whatever_follows():
    """Three prompts of unequal length begin alike, two others alike and longer, one like nobody."""
    a, b = [1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]
    prompts = [[*a, 20, 21], [*b, 30], [*a, 22], [99, 98, 97], [*b, 31, 32, 33], [*a, 23, 24, 25, 26]]
    assert depths(prompts) == [4, 7, 4, 0, 7, 4]


def test_nothing_in_common_is_nothing_shared():
    """Nor is a single prompt, and no prompt is no mistake."""
    assert depths([[1, 2, 3], [2, 3, 4], [3, 4, 5]]) == [0, 0, 0]
    assert depths([]) == []
    assert depths([[7]]) == [0]


def test_the_last_token_of_a_prompt_is_never_shared():
    """Where a prompt is the beginning of another, or the same: its last token gives the logits behind it."""
    assert depths([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]]) == [4, 4]
    assert depths([[1, 2, 3, 4, 5]] * 3) == [4, 4, 4]


def test_a_beginning_is_read_only_where_it_pays():
    """Two rows save its length once: less than a pass costs. Many with a short one beat a few with a longer one."""
    assert depths([[1, 2, 3, 4], [1, 2, 3, 5]], cost=3) == [0, 0]
    assert depths([[1, 2, 3, 4], [1, 2, 3, 5]], cost=2) == [3, 3]
    many = [[1, 2, 3, 4, 5, number] for number in (10, 11)] + [[1, 2, 3, number] for number in range(20, 26)]
    assert depths(many) == [3] * 8
    assert depths([[1, *range(10, 30), 3], [1, *range(10, 30), 4], [1, 5, 6]]) == [21, 21, 0]


def test_beginnings_take_no_more_room_than_given():
    """The one that saves most stays."""
    prompts = [[1] * 5 + [number] for number in range(2, 6)] + [[9] * 6 + [number] for number in range(2, 4)]
    assert depths(prompts, room=10) == [5] * 4 + [0] * 2
    assert depths(prompts, room=11) == [5] * 4 + [6] * 2


def test_the_choice_is_the_best_there_is():
    """Against a search through all cuts of the tree of beginnings, 200 times."""

    def best(ids: list[tuple[int, ...]], depth: int) -> int:
        if len(ids) < 2:
            return 0
        after: dict[Any, list[tuple[int, ...]]] = {}
        for each in ids:
            after.setdefault(each[depth] if len(each) > depth else (each, object()), []).append(each)
        return max((len(ids) - 1) * depth - 2, sum(best(part, depth + 1) for part in after.values()))

    chance = random.Random(0)
    for _ in range(200):
        prompts = [[chance.randint(1, 2) for _ in range(chance.randint(1, 9))] for _ in range(chance.randint(1, 12))]
        found = with_beginnings(prompts, cost=2, room=10**6)
        read_once = {prompt.beginning for prompt in found if prompt.shared}
        saved = sum(prompt.shared for prompt in found) - sum(len(each) + 2 for each in read_once)
        assert saved >= best([tuple(prompt[:-1]) for prompt in prompts], 0)
        assert all(prompt.shared < len(prompt.ids) for prompt in found)


def test_groups_cost_least():
    """Rows x longest plus the price of a pass, against every division of nine rows; no row is lost."""
    lengths = [100, 80, 75, 74, 20, 16, 15, 14, 1]
    for cost in (0, 10, 40, 1000):

        def work(parts: list[slice], cost: int = cost) -> int:
            return sum((part.stop - part.start) * max(lengths[part]) + cost for part in parts)

        found = groups(lengths, cost=cost)
        assert [row for part in found for row in range(part.start, part.stop)] == list(range(9))
        every = []
        for cuts in range(2**8):
            edges = [0, *(place + 1 for place in range(8) if cuts >> place & 1), 9]
            every.append([slice(*pair) for pair in pairwise(edges)])
        assert work(found) == min(map(work, every))
    assert groups([5], cost=1) == [slice(0, 1)]
    assert sum(part.stop - part.start for part in groups(list(range(1000, 0, -1)), cost=1)) == 1000


def prompts_with(system: str, lengths: tuple[int, ...] = (1, 9, 30, 2, 17, 4, 1)) -> list[list[dict[str, str]]]:
    said = "red blue green small large name color size".split()
    return [
        [
            {"role": "system", "content": f"{system} {('', 'name')[row % 2]}"},
            {"role": "user", "content": " ".join(said[(row + word) % 8] for word in range(length))},
        ]
        for row, length in enumerate(lengths)
    ]


def texts_of(prompts: list[list[dict[str, str]]]) -> list[str]:
    return [WORDS.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in prompts]


def ours(model: Any, texts: list[str], size: int, new: int = NEW_TOKENS) -> list[str]:
    return [each.text for each in generate_answers(model, WORDS, texts, max_new_tokens=new, batch_size=size)]


def theirs(model: PreTrainedModel, texts: list[str], new: int = NEW_TOKENS) -> list[str]:
    """transformers' own generate on the padded batch."""
    batch = WORDS(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ends: Any = model.generation_config.eos_token_id or WORDS.eos_token_id
    if hasattr(model.config, "output_router_logits"):
        batch["output_router_logits"] = False  # its loss of the router fails on a padded batch
    with torch.no_grad():
        made = model.generate(
            **batch, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=WORDS.pad_token_id
        )
    return WORDS.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def positions_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Shapes of the ids of every pass from now on."""
    seen: list[tuple[int, int]] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    model.base_model.register_forward_pre_hook(see, with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", GROUPED)
def test_prompts_that_share_a_beginning_are_answered_as_by_transformers(name: str, monkeypatch: pytest.MonkeyPatch):
    """Two system prompts, questions of 1 to 30 words, in one batch and in several; runs of the cache by themselves."""
    monkeypatch.setattr(decoding, "_RUN_BYTES", 1)
    for module in (answers_module, reading):
        monkeypatch.setattr(module, "pass_cost", lambda device: 1)
    model = model_of(GROUPED[name])
    texts = texts_of(prompts_with(SYSTEM))
    expected = [theirs(model, [text])[0] for text in texts]
    assert len(set(expected)) > 4
    own = sum(len(WORDS(text, add_special_tokens=False)["input_ids"]) for text in texts)
    seen = positions_of(model)
    for size in (1, 3, 7):
        seen.clear()
        assert ours(model, texts, size) == expected, size
        decoded = len(texts) * (NEW_TOKENS - 1)
        assert sum(rows * tokens for rows, tokens in seen) - decoded < 0.75 * own


def test_a_beginning_is_read_once_for_all_batches_of_an_evaluation():
    """Prompts that are one another's beginning and equal ones among them, one by one: 31 tokens are read for the first,
    then only what is new."""
    model = model_of(GROUPED["llama"])
    ids = WORDS(SYSTEM + " " + SYSTEM, add_special_tokens=False)["input_ids"] * 2
    texts = [WORDS.decode(ids[:length]) for length in (60, 50, 60, 55)]
    lengths = [len(WORDS(text, add_special_tokens=False)["input_ids"]) for text in texts]
    expected = theirs(model, texts)
    seen = positions_of(model)
    assert ours(model, texts, 1) == expected
    read = sum(tokens for _, tokens in seen if tokens > 1)
    assert read < sum(lengths) - 2 * min(lengths)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_models_with_windows_or_states_read_whole_prompts(name: str):
    """What they keep of a beginning is no longer all of it: transformers' own way, the same answers."""
    model = model_of(LEFT_ALONE[name])
    texts = texts_of(prompts_with(SYSTEM))
    assert reading.read_prompts(model, with_beginnings([[1, 2]], cost=0, room=0), room=1, kept={}) is None
    assert ours(model, texts, 7) == [theirs(model, [text])[0] for text in texts]


def ending(name: str = "llama") -> PreTrainedModel:
    """A model whose answers end at different lengths: a third of all words ends one."""
    model = model_of(GROUPED[name])
    model.generation_config.eos_token_id = [WORDS.eos_token_id, *range(5, len(WORDS), 5)]
    return model


def test_answers_that_are_finished_leave(monkeypatch: pytest.MonkeyPatch):
    """Steps compute fewer and fewer rows, and every answer is what it is alone."""
    monkeypatch.setattr(decoding, "_RUN_BYTES", 1)
    for name in GROUPED:
        model = ending(name)
        texts = texts_of(prompts_with(SYSTEM, (1, 9, 30, 2, 17, 4, 1, 3, 5, 7, 11, 13)))
        expected = [theirs(model, [text], 40)[0] for text in texts]
        seen = positions_of(model)
        assert ours(model, texts, 12, 40) == expected
        steps = [rows for rows, tokens in seen if tokens == 1]
        assert steps == sorted(steps, reverse=True)
        assert len(set(steps)) > 2


def test_nobody_leaves_where_a_processor_knows_all_rows():
    """A model's own settings may ask for one that remembers the prompts of the batch; answers are transformers'."""
    model = ending()
    model.generation_config.encoder_repetition_penalty = 1.3
    texts = texts_of(prompts_with(SYSTEM, (3, 3, 3, 3, 5, 5)))
    expected = theirs(model, texts, 40)
    assert not issubclass(EncoderRepetitionPenaltyLogitsProcessor, decoding._ROW_BY_ROW)
    seen = positions_of(model)
    assert ours(model, texts, 6, 40) == expected
    assert {rows for rows, tokens in seen if tokens == 1} == {6}


def test_a_model_s_own_settings_choose_tokens_as_in_transformers():
    """Repetition penalty, banned repetitions and a least length from generation_config.json."""
    model = ending()
    plain = ours(model, texts_of(prompts_with(SYSTEM)), 7, 20)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.min_new_tokens = 4
    texts = texts_of(prompts_with(SYSTEM))
    assert ours(model, texts, 7, 20) == theirs(model, texts, 20) != plain


def test_the_model_has_its_own_attention_again():
    """After answers run by run, and after one that failed."""
    model = model_of(GROUPED["llama"])
    before = model.config._attn_implementation
    with pytest.raises(KeyError), ragged.run_by_run(model):
        assert model.config._attn_implementation == ragged.NAME != before
        raise KeyError
    assert model.config._attn_implementation == before


class Kernels(TorchDispatchMode):
    """Counts operations that are no views, and the numbers that attention reads as keys."""

    VIEWS = ("slice", "view", "transpose", "expand", "select", "alias", "detach", "squeeze", "t.", "split")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if not name.startswith(self.VIEWS):
            self.counts["kernels"] += 1
        if "attention" in name:
            self.counts["keys"] += args[1].numel()
        return func(*args, **(kwargs or {}))


def of_a_token(answer: Any) -> Counter[str]:
    """Counts of one decoding step: an answer of nine tokens beside one of eight."""
    found = []
    for new in (9, 8):
        with Kernels() as kernels:
            answer(new)
        found.append(kernels.counts)
    found[0].subtract(found[1])
    return found[0]


@pytest.mark.parametrize("name", GROUPED)
def test_a_token_takes_no_more_operations_than_in_transformers(name: str):
    """Prompts of equal and of unequal length."""
    model = model_of(GROUPED[name])
    for lengths in ((5,) * 7, (1, 9, 30, 2, 17, 4, 1)):
        texts = texts_of(prompts_with(SYSTEM, lengths))
        mine = of_a_token(lambda new, texts=texts: ours(model, texts, 7, new))
        other = of_a_token(lambda new, texts=texts: theirs(model, texts, new))
        assert mine["kernels"] <= other["kernels"]
        assert mine["keys"] <= other["keys"]


def test_a_token_reads_no_padding_of_the_longest_prompt(monkeypatch: pytest.MonkeyPatch):
    """Seven short prompts beside a long one: a third of the keys that the padded batch has."""
    monkeypatch.setattr(decoding, "_RUN_BYTES", 1000)
    model = model_of(GROUPED["llama"])
    texts = texts_of(prompts_with("", (1, 2, 3, 90, 1, 2, 3, 2)))
    mine = of_a_token(lambda new: ours(model, texts, 8, new))
    other = of_a_token(lambda new: theirs(model, texts, new))
    assert mine["keys"] < other["keys"] / 3
    assert shared.pass_cost("cpu") < shared.pass_cost("cuda")
