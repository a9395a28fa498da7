"""Why the attention maps of Stable Audio look flat: the causes one by one, each with the number that shows it.

    python examples/flat_maps.py [--seed 0] [--seconds 8]

The calls are those of diffusers' own StableAudioDiTModel with the token counts of Stable Audio Open 1.0 (one global token
and 1024 latent columns as queries; 128 text tokens, most of them zero padding, and two timing tokens as keys), tiny and with
random weights: what is shown here follows from how the calls are made, not from what a model has learnt. The recipe taken
apart is :func:`aiba_eval.paper_recipe`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from aiba_eval import paper_recipe
from aiba_hooks import capture

COLUMNS, TEXT, TIMING = 1024, 128, 2
KEYS = TEXT + TIMING
#: 44.1 kHz and 2048 samples for each latent column
SECONDS_PER_COLUMN = 2048 / 44100
WORDS = 4
CROSS = "transformer_blocks.*.attn2"


@dataclass(frozen=True)
class Cause:
    """One cause of flat maps: ``number`` says what is measured, with the cause and without it."""

    name: str
    number: str
    with_it: float
    without: float


def attention(seed: int = 0) -> np.ndarray:
    """Cross-attention probabilities of one forward, [guidance branch, queries, keys]: mean over layers and heads."""
    from diffusers import StableAudioDiTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StableAudioDiTModel(
            sample_size=COLUMNS,
            in_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=8,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=32,
            cross_attention_input_dim=16,
        ).eval()
        latent = torch.randn(1, 8, COLUMNS)
        states = torch.zeros(2, KEYS, 16)  # no negative prompt: the unconditional row is zeros
        states[1, :WORDS] = 4 * torch.randn(WORDS, 16)  # then come the padding tokens, zeroed and not masked
        states[1, TEXT:] = torch.randn(TIMING, 16)
        timing = torch.randn(1, 1, 32)
    with torch.no_grad(), capture(model, keep="full", layers=CROSS) as captured:
        model(latent.expand(2, -1, -1), torch.tensor([0.5]), states, timing.expand(2, -1, -1), return_dict=False)
    return np.mean([array.values[0] for array in captured.maps.values()], axis=0, dtype=float)


def variation(values: np.ndarray) -> float:
    """Standard deviation over mean."""
    return float(np.std(values) / np.abs(np.mean(values)))


def causes(probabilities: np.ndarray, seconds: float = 8.0) -> list[Cause]:
    """The causes, measured on [unconditional and conditional, queries, keys]."""
    unconditional, conditional = probabilities
    recipe = paper_recipe(conditional)
    word = conditional[1:, 0]  # the first word's map: without query 0, which is the global token
    both = (conditional + unconditional)[1:, 0] / 2
    padding = slice(WORDS, TEXT)
    masked = np.delete(conditional, padding, axis=1)
    masked /= masked.sum(1, keepdims=True)
    square = word[: recipe.side**2].reshape(recipe.side, recipe.side)
    kept = int(np.ceil(seconds / SECONDS_PER_COLUMN))
    words = conditional[:, :WORDS].sum(1)
    return [
        Cause("mean over all keys", "variation over queries (without: one word)", variation(recipe.mean), variation(word)),
        Cause("mean over all keys, log", "deviation over queries (without: log of one word)", float(np.std(recipe.log_mean)), float(np.std(np.log(word)))),
        Cause("unconditional half", "variation of that half (without: the other)", variation(unconditional[1:, 0]), variation(word)),
        Cause("both halves averaged", "variation of a word's map (without: half of it)", variation(both), variation(word)),
        Cause("padding not masked", "share of the attention on padding", float(conditional[:, padding].sum(1).mean()), 0.0),
        Cause("padding not masked", "share left for the words", float(words.mean()), float(masked[:, :WORDS].sum(1).mean())),
        Cause("padding not masked", "deviation of the log-mean over queries", float(np.std(recipe.log_mean)), float(np.std(paper_recipe(masked).log_mean))),
        Cause("square reshape", "variation over the axis it invents", variation(square.mean(1)), 0.0),
        Cause("square reshape", "seconds from one row to the next", recipe.side * SECONDS_PER_COLUMN, 0.0),
        Cause("whole window generated", "share of the columns that are cropped away", 1 - kept / COLUMNS, 0.0),
        Cause("global token kept", "by how many columns the map is shifted", float(len(words) - COLUMNS), 0.0),
    ]  # fmt: skip


def table(rows: list[Cause]) -> str:
    """The causes as text."""
    widths = max(len(r.name) for r in rows), max(len(r.number) for r in rows)
    head = f"{'cause':{widths[0]}}  {'number':{widths[1]}}  {'with it':>9}  {'without':>9}"
    lines = [f"{r.name:{widths[0]}}  {r.number:{widths[1]}}  {r.with_it:9.2g}  {r.without:9.2g}" for r in rows]
    return "\n".join([head, "-" * len(head), *lines])


def main(arguments: list[str] | None = None) -> list[Cause]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the latent")
    parser.add_argument("--seconds", type=float, default=8.0, help="how much of the window the pipeline keeps")
    options = parser.parse_args(arguments)
    probabilities = attention(options.seed)
    rows = causes(probabilities, options.seconds)
    print(table(rows))
    recipe, coarse = paper_recipe(probabilities[1]), paper_recipe(np.full((50, 77), 1 / 77))
    print(
        f"\nThe length rule takes {KEYS} keys for {COLUMNS + 1} queries as cross-attention: {recipe.taken}. It would take "
        f"77 keys at a coarse level of 50 queries: {coarse.taken}, though that is cross-attention too."
    )
    return rows


if __name__ == "__main__":
    main()
