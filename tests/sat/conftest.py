"""stable-audio-tools on CPU torch, in an environment of its own (`make test-sat`); elsewhere these tests are not collected."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

PRESENT = importlib.util.find_spec("stable_audio_tools") is not None
collect_ignore_glob = [] if PRESENT else ["test_*.py"]


def _module(name, **attributes):
    module = sys.modules[name] = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _torchaudio():
    """Its wheel is built for CUDA: without its compiled extension the rest of it runs on CPU torch."""
    nothing = {"__path__": [], "_check_cuda_version": lambda: None, "fail_if_no_align": lambda function: function}
    utils = _module("torchaudio._extension.utils", _load_lib=lambda *_: False, _init_dll_path=lambda: None)
    _module(
        "torchaudio._extension", _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, utils=utils, **nothing
    )
    import torchaudio  # noqa: F401


def _k_diffusion():
    """Its package imports evaluation code (clip, torchvision); only its samplers are used."""
    spec = importlib.util.find_spec("k_diffusion")
    _module("k_diffusion", __path__=list(spec.submodule_search_locations))
    vision = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in vision:
        _module(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
    import k_diffusion.external
    import k_diffusion.sampling
    import k_diffusion.utils  # noqa: F401

    for name in vision:
        del sys.modules[name]  # transformers must not take the stub for the library


if PRESENT:
    _torchaudio()
    _k_diffusion()


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory):
    """A folder with a random T5 and its tokenizer, known to stable-audio-tools' conditioner."""
    from stable_audio_tools.models.conditioners import T5Conditioner
    from transformers import T5Config, T5EncoderModel

    from aiba_plugins.demo.random_audioldm2 import t5_tokenizer

    folder = str(tmp_path_factory.mktemp("t5"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(
            T5Config(vocab_size=1000, d_model=128, d_ff=64, d_kv=8, num_heads=4, num_layers=1)
        ).save_pretrained(folder)
    t5_tokenizer(24).save_pretrained(folder)
    T5Conditioner.T5_MODELS.append(folder)
    T5Conditioner.T5_MODEL_DIMS[folder] = 128
    return folder


@pytest.fixture(scope="session")
def build(text_encoder):
    """``build(objective="v", **dit)``: a ConditionedDiffusionModelWrapper laid out like Stable Audio Open, 4 heads for 2 KV."""
    from stable_audio_tools import create_model_from_config

    from tests.tiny import draw_zeros

    def make(objective="v", **dit):
        coder = {"channels": 4, "c_mults": [1, 2, 4], "strides": [4, 4, 4], "use_snake": True}
        autoencoder = {
            "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 16, **coder}},
            "decoder": {
                "type": "oobleck",
                "config": {"out_channels": 2, "latent_dim": 8, "final_tanh": False, **coder},
            },
            "bottleneck": {"type": "vae"},
            "latent_dim": 8,
            "downsampling_ratio": 64,
            "io_channels": 2,
        }
        seconds = ["seconds_start", "seconds_total"]
        conditioners = [
            {"id": "prompt", "type": "t5", "config": {"t5_model_name": text_encoder, "max_length": 24}},
            *({"id": key, "type": "number", "config": {"min_val": 0, "max_val": 512}} for key in seconds),
        ]
        config = {
            "model_type": "diffusion_cond",
            "sample_size": 4096,
            "sample_rate": 4000,
            "audio_channels": 2,
            "model": {
                "pretransform": {"type": "autoencoder", "iterate_batch": True, "config": autoencoder},
                "conditioning": {"configs": conditioners, "cond_dim": 128},
                "io_channels": 8,
                "diffusion": {
                    "cross_attention_cond_ids": ["prompt", *seconds],
                    "global_cond_ids": seconds,
                    "type": "dit",
                    "diffusion_objective": objective,
                    "config": {
                        "io_channels": 8,
                        "embed_dim": 256,
                        "depth": 2,
                        "num_heads": 4,
                        "cond_token_dim": 128,
                        "global_cond_dim": 256,
                        "project_cond_tokens": False,
                        "transformer_type": "continuous_transformer",
                        **dit,
                    },
                },
            },
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model_from_config(config).eval()
            draw_zeros(model.model)
        for conditioner in model.conditioner.conditioners.values():
            # the text encoder is kept outside the module, in half precision
            if "model" in vars(conditioner):
                conditioner.model.float()
        return model.requires_grad_(False)

    return make
