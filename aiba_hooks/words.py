"""Words of a prompt, and which tokens spell them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiba_hooks.errors import UnknownWord

#: a word is a run of letters and digits; apostrophes, hyphens and ampersands inside one belong to it (hip-hop, R&B)
_WORD = re.compile(r"[^\W_]+(?:['’\-&][^\W_]+)*")
_OCCURRENCE = re.compile(r"^(.*\S)#(\d+)$")

ROLES = ("word", "other", "special", "padding", "prefix", "duration", "lyrics", "timbre")


def split_words(prompt: str) -> list[tuple[str, int, int]]:
    """Words of ``prompt`` with their character spans: ``(text, start, stop)``, punctuation left out."""
    return [(match.group(), match.start(), match.end()) for match in _WORD.finditer(prompt)]


def normalise(word: str) -> str:
    """What two spellings must share to be the same word: Unicode compatibility form, case folded."""
    return unicodedata.normalize("NFKC", word).casefold()


def distinct_words(prompts: Sequence[str]) -> list[str]:
    """Every word of the prompts once, in order of first appearance, spelt as there."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        for text, _, _ in split_words(prompt):
            seen.setdefault(normalise(text), text)
    return list(seen.values())


def find(request: str, prompt: str) -> list[int]:
    """Indices into ``split_words(prompt)`` that ``request`` names, or ``[]``.

    A word stands for all its occurrences, whatever their case or punctuation; ``"bass#1"`` for the second one only
    (counted from 0); several words (``"acoustic guitar"``) for that phrase, wherever it occurs.
    """
    occurrence = None
    if match := _OCCURRENCE.match(request):
        request, occurrence = match.group(1), int(match.group(2))
    wanted = [normalise(text) for text, _, _ in split_words(request)]
    words = [normalise(text) for text, _, _ in split_words(prompt)]
    if not wanted:
        return []
    starts = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
    if occurrence is not None:
        starts = starts[occurrence : occurrence + 1]
    return [start + offset for start in starts for offset in range(len(wanted))]


def check_words(requests: Sequence[str], prompts: Sequence[str]) -> None:
    """Raise :class:`UnknownWord` for a request that no prompt contains, listing the words that they do contain."""
    for request in requests:
        if not any(find(request, prompt) for prompt in prompts):
            known = ", ".join(distinct_words(prompts)) or "none"
            shown = "; ".join(repr(prompt) for prompt in dict.fromkeys(prompts))
            raise UnknownWord(f"{request!r} is not in the prompt {shown}. Its words are: {known}")


@dataclass(frozen=True)
class TokenStream:
    """The keys of one text stream, token by token.

    Attributes
    ----------
    name
        What the stream is called in tags and selections: ``"t5"``.
    prompts
        One text per row.
    tokens, roles, words
        Per prompt, one entry per key: the token's text, its role (``"word"``, ``"other"`` for punctuation, ``"special"``,
        ``"padding"``, ``"prefix"``, ``"duration"``, ``"lyrics"``, ``"timbre"``) and the index of its word in ``split_words(prompt)`` or None.
    argument
        The denoiser's argument that carries it (``"encoder_hidden_states_1"``), which is how a site's stream is recognised.
    """

    name: str
    prompts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    roles: tuple[tuple[str, ...], ...]
    words: tuple[tuple[int | None, ...], ...]
    argument: str | None = None
    truncated: tuple[tuple[str, ...], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for row in range(len(self.prompts)):
            sizes = {len(self.tokens[row]), len(self.roles[row]), len(self.words[row]), self.length}
            if len(sizes) != 1:
                raise ValueError(
                    f"stream {self.name!r}: tokens, roles and words of prompt {row} differ in length: {sizes}"
                )
            unknown = set(self.roles[row]) - set(ROLES)
            if unknown:
                raise ValueError(f"stream {self.name!r}: unknown role {unknown.pop()!r}; roles are {', '.join(ROLES)}")

    @property
    def length(self) -> int:
        """Number of keys."""
        return len(self.tokens[0]) if self.tokens else 0

    @property
    def has_words(self) -> bool:
        """False for a stream that is not aligned with words (AudioLDM2's GPT-2 embeddings)."""
        return any(word is not None for row in self.words for word in row)

    @classmethod
    def from_tokenizer(
        cls,
        name: str,
        tokenizer: Any,
        prompts: Sequence[str],
        *,
        argument: str | None = None,
        **options: Any,
    ) -> TokenStream:
        """Tokenise ``prompts`` as the pipeline does and align every token with its word.

        Parameters
        ----------
        tokenizer
            A transformers tokenizer with offsets (a "fast" one).
        options
            What the pipeline passes to it (padding, max_length, truncation).

        Raises
        ------
        TypeError
            The tokenizer returns no offsets.
        """
        try:
            batch = tokenizer(list(prompts), return_offsets_mapping=True, return_special_tokens_mask=True, **options)
        except NotImplementedError as error:
            raise TypeError(
                f"{type(tokenizer).__name__} returns no character offsets; load the fast tokenizer (use_fast=True)"
            ) from error
        tokens, roles, words, lost = [], [], [], []
        for row, prompt in enumerate(prompts):
            ids = [int(i) for i in batch["input_ids"][row]]
            spans = [(int(a), int(b)) for a, b in batch["offset_mapping"][row]]
            attended = [int(i) for i in batch["attention_mask"][row]]
            special = [int(i) for i in batch["special_tokens_mask"][row]]
            tokens.append(tuple(tokenizer.convert_ids_to_tokens(ids)))
            aligned = list(_align(prompt, spans))
            row_roles = []
            for position in range(len(ids)):
                if not attended[position]:
                    row_roles.append("padding")
                elif special[position] or aligned[position] == "special":
                    row_roles.append("special")
                else:
                    row_roles.append("word" if isinstance(aligned[position], int) else "other")
            roles.append(tuple(row_roles))
            words.append(
                tuple(
                    a if r == "word" and isinstance(a, int) else None for a, r in zip(aligned, row_roles, strict=True)
                )
            )
            reached = {word for word in words[-1] if word is not None}
            lost.append(tuple(text for i, (text, _, _) in enumerate(split_words(prompt)) if i not in reached))
        return cls(name, tuple(prompts), tuple(tokens), tuple(roles), tuple(words), argument, tuple(lost))

    @classmethod
    def opaque(
        cls, name: str, prompts: Sequence[str], length: int, *, role: str = "other", argument: str | None = None
    ) -> TokenStream:
        """A stream of ``length`` keys that stand for no word (generated embeddings, timing tokens)."""
        rows = len(prompts)
        labels = tuple(f"{name} {i}" for i in range(length))
        return cls(
            name, tuple(prompts), (labels,) * rows, ((role,) * length,) * rows, ((None,) * length,) * rows, argument
        )

    def join(self, other: TokenStream, name: str | None = None, argument: str | None = None) -> TokenStream:
        """This stream followed by ``other`` along the key axis (Stable Audio: prompt, then seconds)."""
        return TokenStream(
            name or self.name,
            self.prompts,
            tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True)),
            tuple(a + b for a, b in zip(self.roles, other.roles, strict=True)),
            tuple(a + b for a, b in zip(self.words, other.words, strict=True)),
            argument or self.argument,
            self.truncated,
        )

    def groups(self, row: int, requests: Sequence[str]) -> dict[str, list[int]]:
        """Key positions of prompt ``row`` by group: one per request that it contains, then the rest by role.

        The rest is named in parentheses, so that the groups together cover every key: ``"(other)"`` (words not asked for
        and punctuation), ``"(special)"``, ``"(padding)"`` and so on; groups without a key are left out.

        Raises
        ------
        UnknownWord
            A requested word of this prompt was cut off by the tokenizer's maximum length.
        """
        prompt, ids = self.prompts[row], self.words[row]
        found: dict[str, list[int]] = {}
        for request in requests:
            indices = set(find(request, prompt))
            if not indices:
                continue
            positions = [position for position, word in enumerate(ids) if word in indices]
            if not positions:
                raise UnknownWord(
                    f"{request!r} is in the prompt {prompt!r} but beyond the {self.length} tokens of stream {self.name!r}: "
                    "the tokenizer cut it off. Shorten the prompt"
                )
            found[request] = positions
        taken = {position for positions in found.values() for position in positions}
        for position, role in enumerate(self.roles[row]):
            if position not in taken:
                found.setdefault("(other)" if role in ("word", "other") else f"({role})", []).append(position)
        return found


def _align(prompt: str, spans: Sequence[tuple[int, int]]) -> Iterator[int | str | None]:
    """For each token span the index of its word, None for punctuation, ``"special"`` for an empty span."""
    words = split_words(prompt)
    for start, stop in spans:
        if start == stop:
            yield "special"
            continue
        overlapping = [i for i, (_, a, b) in enumerate(words) if a < stop and start < b]
        if overlapping:
            yield overlapping[0]
        elif prompt[start:stop].isspace() and "\n" not in prompt[start:stop]:
            # a lone word-boundary piece ("▁" before a word that the vocabulary spells in letters) belongs to that word
            yield next((i for i, (_, a, _) in enumerate(words) if a == stop), None)
        else:
            yield None


def merge_groups(rows: Sequence[Mapping[str, Sequence[int]]], requests: Sequence[str]) -> list[str]:
    """The common ``word`` axis of several prompts: requests first, then the groups in parentheses in a fixed order."""
    present = {name for row in rows for name in row}
    fixed = [f"({role})" for role in (*ROLES[1:], "audio")]
    return [r for r in requests if r in present] + [name for name in fixed if name in present]
