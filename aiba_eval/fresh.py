"""A pipeline with fresh weights: what a figure is without training.

An untrained network gives every word some map, the same each time, which leans towards one word or another by accident.
Intervals over pieces do not cover that; the distribution over initialisations does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any


class CannotReinitialise(TypeError):
    """A part of a pipeline cannot be built anew. The message names it and says what to do."""


def with_fresh_weights(pipeline: Any, seed: int, *, keep: Sequence[str] = ("vae", "vocoder")) -> Any:
    """The same pipeline with fresh weights, drawn as its classes draw them.

    Every part with weights, but for those to keep, is built anew from its configuration (diffusers' ``from_config``,
    transformers' ``Model(config)``), on its device and in its dtype, in eval mode. Tokenizers and the scheduler are shared.

    Parameters
    ----------
    pipeline
        Of diffusers: it has ``components``.
    seed : int
        torch's generator is seeded while the parts are built, and left as found.
    keep : sequence of str
        Parts that stay as they are: by default what encodes and decodes audio, so that only the denoiser and its text
        encoders forget.

    Returns
    -------
    pipeline of the same class

    Raises
    ------
    CannotReinitialise
        The pipeline has no ``components``, or a part has no configuration to build it from.
    """
    import torch

    if not hasattr(pipeline, "components"):
        raise CannotReinitialise(
            f"{type(pipeline).__name__} does not list its components: pass reinitialise=, a function (pipeline, seed) -> pipeline"
        )
    parts = dict(pipeline.components)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module) and name not in keep:
                parts[name] = _rebuilt(name, part)
    taken = inspect.signature(type(pipeline).__init__).parameters
    made = type(pipeline)(**{name: part for name, part in parts.items() if name in taken})
    if hasattr(made, "set_progress_bar_config"):
        made.set_progress_bar_config(disable=True)
    return made


def _rebuilt(name: str, part: Any) -> Any:
    import torch

    kind, config = type(part), getattr(part, "config", None)
    if config is None:
        raise CannotReinitialise(
            f"{name} ({kind.__name__}) has no configuration to build it from: pass reinitialise=, a function "
            "(pipeline, seed) -> pipeline"
        )
    # diffusers' models are built by a class method, transformers' by their constructor
    made = kind.from_config(config) if hasattr(kind, "from_config") else kind(copy.deepcopy(config))
    weight = next(part.parameters())
    # not made.to(): diffusers' own warns of parts to be kept in float32 even where there are none
    return torch.nn.Module.to(made, weight.device, weight.dtype).eval()
