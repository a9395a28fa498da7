"""The words that the trained demo models know: training prompts and both tokenizers are made from these lists."""

from __future__ import annotations

from typing import Any

#: per instrument the words for it, its own name first
INSTRUMENTS: dict[str, tuple[str, ...]] = {
    "bass": ("bass", "bassline"),
    "bells": ("bells", "vibraphone", "marimba", "chimes"),
    "brass": ("brass", "trumpet", "horns"),
    "choir": ("choir", "voices"),
    "drums": ("drums", "drum kit", "beat"),
    "flute": ("flute", "pipes"),
    "guitar": ("guitar", "guitars"),
    "organ": ("organ", "accordion"),
    "percussion": ("percussion", "timpani"),
    "piano": ("piano", "keyboard"),
    "reed": ("reed", "saxophone", "clarinet"),
    "strings": ("strings", "violins", "violin"),
    "synth": ("synth", "synthesizer", "synths"),
}

#: words without a sound of their own
ARTICLES = ("a", "an", "the", "some", "one")
JOINERS = ("and", "with", "plus", "over")
NOUNS = ("music", "song", "piece", "track", "recording", "melody", "line", "tune")
VERBS = ("playing", "plays", "of", "in", "on", "by", "is", "are", "there", "together", "solo", "for", "this", "only")
NEUTRAL = ("nice", "good", "clear", "simple", "short", "instrumental", "lovely", "old", "new", "great", "quality")

#: letters spell every other word
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-&"


def words() -> list[str]:
    """Every word once, in a fixed order."""
    named = [word for names in INSTRUMENTS.values() for name in names for word in name.split()]
    return list(dict.fromkeys([*ARTICLES, *JOINERS, *named, *NOUNS, *VERBS, *NEUTRAL]))


def tokenizer(max_length: int = 64) -> Any:
    """A ``T5Tokenizer`` with one token per word of :func:`words`; the vocabulary is the same in every process."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in words()]
    known = {piece for piece, _ in pieces}
    pieces += [(letter, -6.0) for letter in LETTERS if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def byte_tokenizer(max_length: int = 160) -> Any:
    """A ``RobertaTokenizer`` over bytes, for the CLAP text tower."""
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizer

    vocab = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=max_length)
