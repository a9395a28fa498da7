"""ACE-Step 1.5 (diffusers ``AceStepPipeline``): a diffusion transformer that reads lyrics, timbre and text.

From ``diffusers/pipelines/ace_step``: the latent is [B, time, C] at 25 Hz and ``patch_size`` frames make a token (12.5 Hz), none
before them; its channels are no frequencies. The keys are the lyrics, the timbre of a reference and the text, packed so that
the pads of a batch come last, unmasked. The text is a template around the prompt: only the prompt's own tokens are its words.
Guidance runs one forward, **[conditional, unconditional]**, within ``cfg_interval_start`` .. ``cfg_interval_end``;
the unconditional keys are one learned embedding, so that attention there is 1/Tk everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aiba_hooks import Backbone, Conditioning, Lattice, MethodCall, SiteCall, Step, TokenStream, hookimpl
from aiba_hooks.words import split_words
from aiba_plugins.backbones.latents import scheduler_sigma, time_lattice


class AceStep(Backbone):
    """diffusers' AceStepPipeline and subclasses of it."""

    name = "ace-step"
    denoiser_names = ("transformer",)
    prompt_method = "prepare_latents"
    observed_methods = ("check_inputs", "encode_prompt", "condition_encoder.forward")
    branches = ("conditional", "unconditional")

    def matches(self, target: Any) -> bool:
        return any(cls.__name__ == "AceStepPipeline" for cls in type(target).__mro__)

    def conditioning_from(self, target: Any, calls: Sequence[MethodCall]) -> Conditioning | None:
        begun = max((i for i, call in enumerate(calls) if call.name == "check_inputs"), default=0)
        encoded = [call for call in calls[begun:] if call.name == "encode_prompt"]
        if len(encoded) > 1:
            raise NotImplementedError(
                "audio_cover_strength below 1 runs a third kind of forward in every step, which is not told apart from the "
                "conditional one; capture with audio_cover_strength=1.0"
            )
        packed = next((call for call in calls[begun:] if call.name == "condition_encoder.forward"), None)
        if not encoded or packed is None:
            return None  # not encoded inside the block
        options = dict(encoded[0].arguments)
        prompts = _listed(options["prompt"])
        lyrics, languages = (_listed(options[name], len(prompts)) for name in ("lyrics", "vocal_language"))
        shared = {name: options[name] for name in ("audio_duration", "instruction", "bpm", "keyscale", "timesignature")}
        texts, sung = zip(
            *(
                target._format_prompt(prompt=prompt, lyrics=words, vocal_language=language, **shared)
                for prompt, words, language in zip(prompts, lyrics, languages, strict=True)
            ),
            strict=True,
        )
        text = TokenStream.from_tokenizer(
            "text", target.tokenizer, texts, padding="longest", truncation=True, max_length=options["max_text_length"]
        )
        lyric = TokenStream.from_tokenizer(
            "lyrics", target.tokenizer, sung, padding="longest", truncation=True, max_length=options["max_lyric_length"]
        )
        mask = packed.result[1]
        timbre = int(mask.shape[1]) - lyric.length - text.length
        valid = [int(row.sum()) for row in mask]
        stream = _packed(prompts, lyric, timbre, _of_caption(text, prompts), valid)
        return Conditioning(prompts, 1, bool(target.do_classifier_free_guidance), (stream,))

    def guided(self, target: Any, arguments: Mapping[str, Any], conditioning: Conditioning) -> bool:
        return conditioning.guided and arguments["hidden_states"].shape[0] == 2 * conditioning.rows

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        return Step(arguments["timestep"], scheduler_sigma(target.scheduler))

    def lattice(self, site: SiteCall) -> Lattice:
        patch = int(site.target.transformer.config.patch_size)
        return time_lattice(site.queries, patch / site.target.latents_per_second)


def _listed(value: str | Sequence[str], count: int = 1) -> tuple[str, ...]:
    return (value,) * count if isinstance(value, str) else tuple(value)


def _of_caption(text: TokenStream, prompts: tuple[str, ...]) -> TokenStream:
    """The template's tokens with the words of the prompt inside it; the template's own are ``"other"``."""
    roles, words = [], []
    for row, prompt in enumerate(prompts):
        filled = text.prompts[row]
        before = len(split_words(filled[: filled.index(prompt, max(filled.find("# Caption"), 0))]))
        own = [None if word is None else word - before for word in text.words[row]]
        own = [word if word is not None and 0 <= word < len(split_words(prompt)) else None for word in own]
        words.append(tuple(own))
        roles.append(
            tuple(
                "other" if role == "word" and word is None else role
                for role, word in zip(text.roles[row], own, strict=True)
            )
        )
    return replace(text, prompts=prompts, roles=tuple(roles), words=tuple(words), truncated=())


def _packed(
    prompts: tuple[str, ...], lyric: TokenStream, timbre: int, text: TokenStream, valid: Sequence[int]
) -> TokenStream:
    """Lyrics, timbre and text in one stream, each row's pads moved to its end in order (``_pack_sequences``)."""
    tokens, roles, words = [], [], []
    for row in range(len(prompts)):
        kinds = ["padding" if role == "padding" else "lyrics" for role in lyric.roles[row]]
        spoken = [role != "padding" for role in (*kinds, *text.roles[row])]
        voiced = valid[row] - sum(spoken)
        kinds += ["timbre" if i < voiced else "padding" for i in range(timbre)]
        names = [*lyric.tokens[row], *(f"timbre {i}" for i in range(timbre)), *text.tokens[row]]
        kinds += text.roles[row]
        own = [*[None] * (lyric.length + timbre), *text.words[row]]
        order = sorted(range(len(kinds)), key=lambda i: kinds[i] == "padding")  # stable
        tokens.append(tuple(names[i] for i in order))
        roles.append(tuple(kinds[i] for i in order))
        words.append(tuple(own[i] for i in order))
    return TokenStream(
        "conditions", prompts, tuple(tokens), tuple(roles), tuple(words), argument="encoder_hidden_states"
    )


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [AceStep()]
