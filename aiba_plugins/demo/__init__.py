"""Pipelines that need no download."""

from __future__ import annotations

from functools import partial
from typing import Any

from aiba_hooks import Model, hookimpl
from aiba_plugins.demo import trained


def _random() -> Any:
    from aiba_plugins.demo.random_audioldm2 import build

    return build()


_TRAINED: dict[trained.Kind, str] = {
    "unet": "AudioLDM2Pipeline, small, trained on freely licensed stems: a U-Net on a mel latent",
    "dit": "StableAudioDiTModel on the same latent with time tokens only, trained on the same stems",
}


@hookimpl
def aiba_models() -> list[Model]:
    models = [
        Model(
            "demo:random",
            "AudioLDM2Pipeline, full topology (16 positions × 3 transformers), tiny, random weights",
            _random,
            trained=False,
        )
    ]
    models += [
        Model(f"demo:{kind}", summary, partial(trained.load, kind))
        for kind, summary in _TRAINED.items()
        if trained.available(kind)
    ]
    return models
