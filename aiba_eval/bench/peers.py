"""Other libraries that see attention, where they are installed and accept the model. None is needed or installed by AIBA."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from aiba_eval.bench.contestants import Maps, Refused, Watch
from aiba_eval.bench.subjects import Subject


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name in (None, module):
            raise Refused(f"not installed: pip install {package}") from error
        raise Refused(f"{package} needs {error.name}, which is not installed") from error


def _pipeline(subject: Subject) -> Any:
    """The least of a pipeline that these libraries ask for."""
    part = "transformer" if subject.architecture.kind == "stable-audio" else "unet"
    return SimpleNamespace(
        **{part: subject.denoiser},
        components={part: subject.denoiser},
        vae_scale_factor=8,
        tokenizer=None,
        image_processor=None,
        check_inputs=lambda prompt: None,
    )


@dataclass
class _Amd:
    capture: Any

    def read(self) -> Maps:
        computed = self.capture.compute()
        records = computed.records if hasattr(computed, "records") else computed
        maps = {
            f"{i}": record.data.float().cpu().numpy() for i, record in enumerate(records) if record.data is not None
        }
        if not maps:
            raise Refused("it ran and recorded nothing")
        return maps


def amd(mode: str) -> Callable[[Subject], AbstractContextManager[Watch]]:
    """attention-map-diffusers' ``AttentionCapture`` on the keys of the text, every timestep, left on the device."""

    @contextmanager
    def watch(subject: Subject) -> Iterator[Watch]:
        library = _library("attention_map_diffusers", "attention-map-diffusers")
        held = library.AttentionCapture(
            _pipeline(subject),
            relations="image->text",
            timesteps="all",
            mode=mode,
            offload=None,
            max_capture_bytes=None,
        )
        with held:
            yield _Amd(held)

    return watch


@dataclass
class _Daam:
    trace: Any

    def read(self) -> Maps:
        maps = {str(key): value.float().cpu().numpy() for key, value in self.trace.all_heat_maps}
        if not maps:
            raise Refused("it ran and recorded nothing")
        return maps


@contextmanager
def daam(subject: Subject) -> Iterator[Watch]:
    """DAAM's ``trace``."""
    library = _library("daam", "daam")
    if subject.architecture.kind == "stable-audio":
        raise Refused("it looks for a U-Net, and this is a transformer")
    pipeline = _pipeline(subject)
    with library.trace(pipeline) as held:
        pipeline.check_inputs(subject.prompt)
        yield _Daam(held)
