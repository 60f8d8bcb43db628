"""Characters of units to tokens, by offsets: the same characters for every tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft.data.masked_loss import edge_mask
from sft.data.masked_loss.units import Unit, path_edges


def test_token_spans_by_offsets():
    """Leading spaces belong to the word's token; a token with punctuation in it is never masked; a unit without a token
    of its own gets an empty span; special tokens without characters are stepped over."""
    text = "<s>a -> bc d -> e,f"
    offsets = [
        (0, 0),
        (0, 3),
        (3, 4),
        (4, 7),
        (7, 9),
        (9, 10),
        (10, 12),
        (12, 15),
        (15, 17),
        (17, 18),
        (18, 19),
        (0, 0),
    ]
    assert [text[start:end] for start, end in offsets[3:10]] == [" ->", " b", "c", " d", " ->", " e", ","]
    units = [Unit("bc d", 5, 9), Unit("e,", 13, 15), Unit("c", 6, 7), Unit("inside b", 5, 5)]
    starts, ends = edge_mask.token_spans(offsets, units, shift=3, text=text)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [(4, 7), (8, 10), (5, 6), (0, 0)]
    joined = [(0, 3), (3, 4), (4, 9), (9, 12), (12, 15), (15, 18), (18, 19)]
    starts, ends = edge_mask.token_spans(joined, [Unit("c d", 6, 9), Unit("e", 13, 14)], shift=3, text=text)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [(3, 4), (0, 0)]


def test_a_newline_is_never_masked():
    """A token of title and newline together is left alone; space tokens inside a title go with it."""
    text = "r -> a b\n"
    starts, ends = edge_mask.token_spans([(0, 4), (4, 6), (6, 7), (7, 9)], path_edges(text), shift=0, text=text)
    assert (starts.tolist(), ends.tolist()) == ([1], [2])
    starts, ends = edge_mask.token_spans([(0, 5), (5, 6), (6, 7), (7, 8), (8, 9)], path_edges(text), shift=0, text=text)
    assert (starts.tolist(), ends.tolist()) == ([1], [4])


def test_no_units_and_no_tokens_give_empty_spans():
    """Rows of other sources in a mix have no unit; a row may be cut down to nothing."""
    assert [part.tolist() for part in edge_mask.token_spans([(0, 1)], [], shift=0, text="a")] == [[], []]
    assert [part.tolist() for part in edge_mask.token_spans([], [Unit("e", 0, 1)], shift=0, text="a")] == [[0], [0]]
    assert [part.tolist() for part in edge_mask.token_spans([(0, 1)], [Unit("e", 0, 1)], shift=0, text=" ")] == [
        [0],
        [0],
    ]


def byte_level(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def sentence_piece(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=200, unk_token="?", special_tokens=["?"], show_progress=False)
    )
    return tokenizer


@pytest.mark.parametrize("family", [byte_level, sentence_piece])
def test_tokenizers_of_two_families_mask_the_same_characters(family):
    """Every character of every child but spaces, and none besides, whatever the tokens."""
    answers = ["disease -> skin disease -> acne vulgaris\ndisease -> 皮膚の病気 -> naïve 🙂 cells\n", "a -> b\n"]
    tokenizer = family(answers * 20)
    prompt = "Title: x\nSome abstract.\n"
    for answer in answers:
        encoded = tokenizer.encode(prompt + answer)
        units = path_edges(answer)
        starts, ends = edge_mask.token_spans(encoded.offsets, units, shift=len(prompt), text=prompt + answer)
        covered = set()
        for start, end in zip(starts, ends, strict=True):
            for left, right in encoded.offsets[start:end]:
                covered |= {place for place in range(left, right) if not (prompt + answer)[place].isspace()}
        wanted = {place + len(prompt) for unit in units for place in range(unit.start, unit.end)}
        assert covered == {place for place in wanted if not (prompt + answer)[place].isspace()}
