"""Words of a prompt and the tokens that spell them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiba_hooks import TokenStream, UnknownWord
from aiba_hooks.words import check_words, distinct_words, find, merge_groups, split_words
from aiba_plugins.demo.random_audioldm2 import t5_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return t5_tokenizer()


def stream(tokenizer, *prompts, **options):
    return TokenStream.from_tokenizer("t5", tokenizer, prompts, padding=True, **options)


def test_punctuation_case_and_joiners():
    texts = [w for w, _, _ in split_words("Hip-hop, R&B & drum'n'bass! 808s (lo-fi)…")]
    assert texts == ["Hip-hop", "R&B", "drum'n'bass", "808s", "lo-fi"]
    assert find("BASS", "a bass, and Bass.") == [1, 3]
    assert find("bass#1", "a bass, and Bass.") == [3]
    assert find("bass#2", "a bass, and Bass.") == []
    assert find("acoustic guitar", "An acoustic guitar") == [1, 2]
    assert find("guitar acoustic", "An acoustic guitar") == []
    assert find("?!", "what?!") == []
    assert distinct_words(["a Bass", "A bass b"]) == ["a", "Bass", "b"]


def test_unicode_compatibility_forms_are_the_same_word():
    assert find("ﬂute", "a FLUTE") == [1]
    assert find("Ｂass", "bass") == [0]


def test_a_word_of_several_tokens_and_one_that_repeats(tokenizer):
    s = stream(tokenizer, "a kazoo, bass and Bass")
    groups = s.groups(0, ["kazoo", "bass"])
    tokens = s.tokens[0]
    assert "".join(tokens[i] for i in groups["kazoo"]).replace("▁", "") == "kazoo"
    assert next(tokens[i] for i in groups["bass"]) == "▁bass"
    assert len(groups["bass"]) == 1 + 5  # ▁bass, then ▁ B a s s
    assert [tokens[i] for i in groups["(other)"]] == ["▁a", ",", "▁and"]
    assert [tokens[i] for i in groups["(special)"]] == ["</s>"]


def test_padding_is_a_group_of_its_own(tokenizer):
    s = stream(tokenizer, "a bass", "a bass and drums with piano")
    assert set(s.groups(0, ["bass"])) == {"bass", "(other)", "(special)", "(padding)"}
    assert set(s.groups(1, ["bass"])) == {"bass", "(other)", "(special)"}
    assert merge_groups([s.groups(0, ["bass"]), s.groups(1, ["piano"])], ["piano", "bass"]) == [
        "piano", "bass", "(other)", "(special)", "(padding)",
    ]  # fmt: skip


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_groups_cover_every_key_once(prompts):
    s = TokenStream.from_tokenizer("t5", t5_tokenizer(), prompts, padding=True, truncation=True, max_length=77)
    for row, prompt in enumerate(prompts):
        words = [w for w in distinct_words([prompt]) if any(i in s.words[row] for i in find(w, prompt))]
        groups = s.groups(row, words)
        positions = sorted(p for group in groups.values() for p in group)
        assert positions == list(range(s.length))
        assert set(words) <= set(groups)


def test_a_word_that_no_prompt_has():
    with pytest.raises(
        UnknownWord, match="'violin' is not in the prompt 'a bass'; 'drums'. Its words are: a, bass, drums"
    ):
        check_words(["bass", "violin"], ["a bass", "drums"])
    with pytest.raises(UnknownWord, match="Its words are: none"):
        check_words(["bass"], ["..."])


def test_streams_join_along_the_keys(tokenizer):
    prompt = stream(tokenizer, "a bass")
    seconds = TokenStream.opaque("seconds", ["a bass"], 2, role="special")
    both = prompt.join(seconds, "t5+seconds")
    assert both.length == prompt.length + 2
    assert both.groups(0, ["bass"])["(special)"] == [2, 3, 4]
    assert not seconds.has_words
    assert both.has_words


def test_a_tokenizer_without_offsets_is_named():
    class Slow:
        def __call__(self, *args, **kwargs):
            raise NotImplementedError("return_offset_mapping is not available")

    with pytest.raises(TypeError, match="Slow returns no character offsets"):
        TokenStream.from_tokenizer("t5", Slow(), ["a"])


def test_streams_are_checked():
    with pytest.raises(ValueError, match="unknown role 'pad'"):
        TokenStream("t5", ("a",), (("a",),), (("pad",),), ((None,),))
    with pytest.raises(ValueError, match="differ in length"):
        TokenStream("t5", ("a",), (("a", "b"),), (("word",),), ((None,),))
