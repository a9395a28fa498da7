"""Pipelines of the real classes, tiny, with random weights and no download: one builder per backbone under test."""

from __future__ import annotations

import torch

from aiba_plugins.demo.random_audioldm2 import t5_tokenizer


def finished(pipe):
    """Eval mode (constructors leave train mode), no progress bar."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_audio(scheduler="cosine", *, columns=64, strides=(4, 4, 4), rate=4000, length=24):
    """StableAudioPipeline: 6 heads with 3 key-value heads, ``columns`` latent columns of prod(strides) samples."""
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = StableAudioDiTModel(
            sample_size=columns,
            in_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=6,
            num_key_value_attention_heads=3,
            out_channels=8,
            cross_attention_dim=24,
            time_proj_dim=8,
            global_states_input_dim=48,
            cross_attention_input_dim=24,
        )
        vae = AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=list(strides),
            decoder_channels=3,
            decoder_input_channels=8,
            audio_channels=2,
            channel_multiples=[1, 2, 2, 2, 2][: len(strides)],
            sampling_rate=rate,
        )
        t5 = T5EncoderModel(T5Config(vocab_size=1000, d_model=24, d_ff=37, d_kv=8, num_heads=1, num_layers=1))
        projection = StableAudioProjectionModel(text_encoder_dim=24, conditioning_dim=24, min_value=0, max_value=512)
    options = {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_schedule": "exponential"}
    schedulers = {"cosine": CosineDPMSolverMultistepScheduler, "edm": EDMDPMSolverMultistepScheduler}
    return finished(
        StableAudioPipeline(
            vae=vae,
            text_encoder=t5,
            projection_model=projection,
            tokenizer=t5_tokenizer(length),
            transformer=transformer,
            scheduler=schedulers[scheduler](sigma_min=0.3, sigma_max=500, **options),
        )
    )


def generate(pipe, prompt, *, steps=2, seed=0, **options):
    """Audio of a pipeline call with a fixed seed."""
    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options).audios


def fast_tokenizer(max_length=256):
    """A tokenizer with offsets over the words of the demonstration vocabulary, in letters otherwise."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from aiba_plugins.demo.random_audioldm2 import WORDS

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-&#[]:<>|_/\n"
    tokenizer = Tokenizer(models.Unigram([*pieces, *((letter, -6.0) for letter in letters)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def stable_audio_3(differential=True, *, patch=1, memory=3, length=24):
    """StableAudio3Pipeline: two calls per attention layer where ``differential``, memory tokens, 16 Hz audio by 4 samples."""
    from diffusers import (
        AutoencoderSAME,
        FlowMatchEulerDiscreteScheduler,
        StableAudio3DiTModel,
        StableAudio3Pipeline,
    )
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
    from transformers import T5GemmaConfig, T5GemmaEncoderModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = T5GemmaModuleConfig(
            vocab_size=600,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            sliding_window=64,
            layer_types=["full_attention"] * 2,
        ).to_dict()
        transformer = StableAudio3DiTModel(
            io_channels=8,
            patch_size=patch,
            embed_dim=32,
            depth=2,
            num_heads=4,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=9,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=memory,
            use_differential_attention=differential,
        )
        vae = AutoencoderSAME(
            audio_channels=2,
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            use_differential_attention=False,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=16,
        )
        text = T5GemmaEncoderModel(T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False))
        duration = StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16)
        draw_zeros(vae)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, stochastic_sampling=False)
    return finished(
        StableAudio3Pipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            tokenizer=fast_tokenizer(length),
            text_encoder=text,
            duration_embedder=duration,
        )
    )


def ace_step():
    """AceStepPipeline: 4 heads with 2 key-value heads, sliding and full self-attention, patches of 2 latent frames."""
    from diffusers import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
        AceStepPipeline,
        AceStepTransformer1DModel,
        AutoencoderOobleck,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Qwen3Config, Qwen3Model

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    base = {"hidden_size": 32, "intermediate_size": 64, **heads, "rope_theta": 1e4, "sliding_window": 4}
    pooled = {"audio_acoustic_hidden_dim": 8, "pool_window_size": 2, "num_attention_pooler_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return finished(
            AceStepPipeline(
                transformer=AceStepTransformer1DModel(
                    **base, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2
                ),
                condition_encoder=AceStepConditionEncoder(
                    **base,
                    text_hidden_dim=32,
                    timbre_hidden_dim=8,
                    num_lyric_encoder_hidden_layers=2,
                    num_timbre_encoder_hidden_layers=2,
                ),
                vae=AutoencoderOobleck(
                    encoder_hidden_size=6,
                    downsampling_ratios=[1, 2],
                    decoder_channels=3,
                    decoder_input_channels=8,
                    audio_channels=2,
                    channel_multiples=[2, 4],
                    sampling_rate=50,
                ),
                text_encoder=Qwen3Model(
                    Qwen3Config(
                        hidden_size=32,
                        intermediate_size=64,
                        num_hidden_layers=2,
                        **heads,
                        vocab_size=600,
                        max_position_embeddings=512,
                    )
                ),
                tokenizer=fast_tokenizer(512),
                scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
                audio_tokenizer=AceStepAudioTokenizer(
                    **base, **pooled, fsq_dim=32, fsq_input_levels=[4, 4, 4], fsq_input_num_quantizers=1
                ),
                audio_token_detokenizer=AceStepAudioTokenDetokenizer(**base, **pooled),
            )
        )


def longcat():
    """LongCatAudioDiTPipeline: 24 kHz audio by 2 samples; its zero-initialised parts are drawn, so that prompts matter."""
    from diffusers import LongCatAudioDiTPipeline, LongCatAudioDiTTransformer, LongCatAudioDiTVae
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = LongCatAudioDiTPipeline(
            tokenizer=fast_tokenizer(),
            text_encoder=UMT5EncoderModel(UMT5Config(d_model=32, num_layers=1, num_heads=4, d_ff=64, vocab_size=600)),
            transformer=LongCatAudioDiTTransformer(
                dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=32, latent_dim=8, text_conv=False
            ),
            vae=LongCatAudioDiTVae(
                in_channels=1,
                channels=16,
                c_mults=[1],
                strides=[2],
                latent_dim=8,
                encoder_latent_dim=16,
                downsampling_ratio=2,
                sample_rate=24000,
            ),
        )
        draw_zeros(pipe.transformer)
    return finished(pipe)


def draw_zeros(module, std=0.1):
    """Draw parameters that were initialised to zero: with them nothing downstream depends on the prompt."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
