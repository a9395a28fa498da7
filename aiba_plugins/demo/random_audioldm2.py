"""A real ``AudioLDM2Pipeline``, built offline: every part of the original's class, its full attention topology and its mel
geometry, with few channels and random weights."""

from __future__ import annotations

from typing import Any

#: pieces of the text vocabulary; anything else is spelt in letters
WORDS = [
    "a",
    "an",
    "and",
    "the",
    "of",
    "with",
    "in",
    "on",
    "some",
    "soft",
    "loud",
    "slow",
    "fast",
    "deep",
    "bright",
    "warm",
    "quiet",
    "solo",
    "music",
    "song",
    "piece",
    "track",
    "line",
    "playing",
    "plays",
    "bass",
    "drums",
    "drum",
    "piano",
    "guitar",
    "organ",
    "strings",
    "brass",
    "reed",
    "flute",
    "synth",
    "bells",
    "violin",
    "acoustic",
    "electric",
    "kick",
    "snare",
    "melody",
    "chords",
    "beat",
    "rhythm",
    "hammer",
    "hitting",
    "wooden",
    "surface",
    "low",
    "quality",
]


def build(seed: int = 0) -> Any:
    """Build the pipeline in eval mode.

    The U-Net has AudioLDM2's blocks: no attention at the first level, then 16 positions of three transformers
    (``cross_attention_dim = [None, gpt2, t5]``); the mel front end is AudioLDM2's (64 bins, hop 10 ms, 16 kHz).

    Parameters
    ----------
    seed : of the weights. The process-wide generator is left as found.

    Raises
    ------
    ModuleNotFoundError
        diffusers or transformers is not installed.
    """
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'this pipeline needs {error.name}: pip install "aiba[diffusers]"', name=error.name
        ) from error
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _pipeline()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # constructors leave train mode, where dropout makes repeats differ
    return pipe


def _pipeline() -> Any:
    from diffusers import (
        AudioLDM2Pipeline,
        AudioLDM2ProjectionModel,
        AudioLDM2UNet2DConditionModel,
        AutoencoderKL,
        DDIMScheduler,
    )
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        GPT2Config,
        GPT2LMHeadModel,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        T5Config,
        T5EncoderModel,
    )

    gpt2_dim, t5_dim = 16, 32
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=256,
        in_channels=8,
        out_channels=8,
        block_out_channels=(8, 16, 24, 40),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        cross_attention_dim=[[None, gpt2_dim, t5_dim]] * 4,
        transformer_layers_per_block=1,
        attention_head_dim=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=8,
        block_out_channels=[8, 8, 16],
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )
    text = {
        "vocab_size": 1000,
        "hidden_size": 8,
        "intermediate_size": 37,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "projection_dim": 8,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    audio = {
        "spec_size": 16,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": 37,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "projection_dim": 8,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    clap = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    features = ClapFeatureExtractor(
        feature_size=8, sampling_rate=48000, hop_length=16000, max_length_s=10, fft_window_size=1024
    )
    t5 = T5EncoderModel(T5Config(vocab_size=1000, d_model=t5_dim, d_ff=37, d_kv=8, num_heads=1, num_layers=1))
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            n_embd=gpt2_dim, n_head=1, n_layer=1, vocab_size=1000, n_positions=99, bos_token_id=0, eos_token_id=0
        )
    )
    gpt2.config.max_new_tokens = 8
    projection = AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=t5_dim, langauge_model_dim=gpt2_dim)
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=16000,
            upsample_initial_channel=32,
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
            normalize_before=False,
        )
    )
    for parameter in vocoder.parameters():
        parameter.data.mul_(8.0)  # its initialisation is near-silent
    return AudioLDM2Pipeline(
        vae=vae,
        text_encoder=clap,
        text_encoder_2=t5,
        projection_model=projection,
        language_model=gpt2,
        tokenizer=_roberta_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        feature_extractor=features,
        unet=unet,
        scheduler=scheduler,
        vocoder=vocoder,
    )


def t5_tokenizer(max_length: int = 77) -> Any:
    """A T5 tokenizer over :data:`WORDS`; the vocabulary is written out, so it is the same in every process."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-&"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def _roberta_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizer

    vocab = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=77)
