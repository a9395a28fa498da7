"""Pipelines that need no download."""

from __future__ import annotations

from typing import Any

from aiba_hooks import Model, hookimpl


def _random() -> Any:
    from aiba_plugins.demo.random_audioldm2 import build

    return build()


@hookimpl
def aiba_models() -> list[Model]:
    return [
        Model(
            "demo:random",
            "AudioLDM2Pipeline, full topology (16 positions × 3 transformers), tiny, random weights",
            _random,
            trained=False,
        )
    ]
