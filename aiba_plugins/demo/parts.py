"""The parts of the trained demo pipelines, with their sizes. Training builds them here; loading reads their saved
configurations, so a change here changes new training runs only.

Both pipelines share the mel definition of AudioLDM2 (16 kHz, 64 bins, hop 10 ms), one VAE (factor 4, 8 channels: a latent
of 25 columns a second by 16 bands) and one vocoder. Only the denoiser and its text encoder differ."""

from __future__ import annotations

from typing import Any

from aiba_plugins.demo import vocabulary

#: of the text embeddings, and of the generated (GPT-2) embeddings
TEXT_DIM = 64
LATENT_CHANNELS, LATENT_BANDS = 8, 16
#: centre and half-width of log-mels; the VAE's first and last layers start at this scale
LOG_MEL_CENTRE, LOG_MEL_SCALE = -5.0, 4.0


def vae() -> Any:
    """The mel VAE: [batch, 1, time, 64] log-mels to [batch, 8, time / 4, 16]. Convolutions only: any length."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    first, last = model.encoder.conv_in, model.decoder.conv_out
    first.weight.data /= LOG_MEL_SCALE
    first.bias.data -= first.weight.data.sum((1, 2, 3)) * LOG_MEL_CENTRE
    last.weight.data *= LOG_MEL_SCALE
    last.bias.data.fill_(LOG_MEL_CENTRE)
    return model


def vocoder() -> Any:
    """HiFi-GAN: log-mels at 100 columns a second to 16 kHz."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    model = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=16000,
            upsample_initial_channel=192,
            upsample_rates=[5, 4, 4, 2],
            upsample_kernel_sizes=[11, 8, 8, 4],  # kernel - rate is even: exactly 160 samples a column
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=True,
        )
    )
    model.mean.fill_(LOG_MEL_CENTRE)
    model.scale.fill_(LOG_MEL_SCALE)
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()  # the class draws so small that its first output is silence
    return model


def scheduler() -> Any:
    """DDIM on AudioLDM2's noise schedule, predicting v."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def text_encoder() -> Any:
    """One layer of T5 over the word-level vocabulary."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary.tokenizer()),
            d_model=TEXT_DIM,
            d_ff=2 * TEXT_DIM,
            d_kv=16,
            num_heads=4,
            num_layers=1,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def unet() -> Any:
    """AudioLDM2's U-Net at three levels: no attention at the first, three transformers per position at the others."""
    from diffusers import AudioLDM2UNet2DConditionModel

    return AudioLDM2UNet2DConditionModel(
        sample_size=125,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=[[None, TEXT_DIM, TEXT_DIM]] * 3,
        transformer_layers_per_block=1,
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=8,
    )


def dit() -> Any:
    """Stable Audio's transformer on the same latent, its bands folded into channels: time tokens only."""
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=125,
        in_channels=LATENT_CHANNELS * LATENT_BANDS,
        out_channels=LATENT_CHANNELS * LATENT_BANDS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=TEXT_DIM,
        cross_attention_input_dim=TEXT_DIM,
        time_proj_dim=64,
        global_states_input_dim=TEXT_DIM,
    )


def audioldm2(vae: Any, vocoder: Any) -> Any:
    """An ``AudioLDM2Pipeline`` around a VAE and a vocoder; every other part is new.

    The CLAP part is tiny and stays as drawn: in this pipeline it only feeds the generated (GPT-2) stream, beside T5.
    """
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, GPT2Config, GPT2LMHeadModel

    clap_text = {
        "vocab_size": len(vocabulary.byte_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "projection_dim": 16,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    clap_audio = {
        "spec_size": 16,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": 32,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "projection_dim": 16,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    language_model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=TEXT_DIM,
            n_head=4,
            n_layer=1,
            n_positions=160,
            vocab_size=8,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    language_model.config.max_new_tokens = 8
    return AudioLDM2Pipeline(
        vae=vae,
        text_encoder=ClapModel(ClapConfig(text_config=clap_text, audio_config=clap_audio, projection_dim=16)),
        text_encoder_2=text_encoder(),
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=TEXT_DIM, langauge_model_dim=TEXT_DIM
        ),
        language_model=language_model,
        tokenizer=vocabulary.byte_tokenizer(),
        tokenizer_2=vocabulary.tokenizer(),
        feature_extractor=ClapFeatureExtractor(
            feature_size=8, sampling_rate=48000, hop_length=16000, max_length_s=10, fft_window_size=1024
        ),
        unet=unet(),
        scheduler=scheduler(),
        vocoder=vocoder,
    )


def mel_dit(vae: Any, vocoder: Any) -> Any:
    """A ``MelDiTPipeline`` around a VAE and a vocoder; every other part is new."""
    from aiba_plugins.demo.mel_dit import MelDiTPipeline

    return MelDiTPipeline(
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=vocabulary.tokenizer(max_length=32),
        transformer=dit(),
        scheduler=scheduler(),
        vocoder=vocoder,
    )
