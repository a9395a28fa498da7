"""Fixtures: real pipelines of the real libraries, tiny and offline."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: waiting for each other costs them tenfold
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("full", max_examples=500, **_COMMON)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the models are tiny; threads only get in each other's way


@pytest.fixture(scope="session")
def shared_pipe():
    from aiba_plugins.demo.random_audioldm2 import build

    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dit():
    """The diffusion transformer's pipeline with fresh weights."""
    from aiba_plugins.demo import parts

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = parts.mel_dit(parts.vae(), parts.vocoder())
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return made


@pytest.fixture
def pipe(shared_pipe):
    """A tiny random AudioLDM2Pipeline with the full topology, checked to be left as it was found."""
    before = state(shared_pipe)
    yield shared_pipe
    assert state(shared_pipe) == before


def state(pipe):
    """What a capture could leave behind: hooks and instance attributes of every module, methods of the pipeline, SDPA."""
    modules = [
        (
            name,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            sorted(k for k in vars(m) if not k.startswith("_forward")),
        )
        for name, m in pipe.unet.named_modules()
    ]
    return modules, sorted(vars(pipe)), torch.nn.functional.scaled_dot_product_attention


def generate(pipe, prompt, *, steps=2, seconds=0.64, seed=0, **options):
    return pipe(
        prompt,
        num_inference_steps=steps,
        audio_length_in_s=seconds,
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).audios
