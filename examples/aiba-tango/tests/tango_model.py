"""A model of Tango's shape for tests: class, attributes, methods and order of calls are Tango's; few channels, random weights.

The U-Net, the T5 encoder, its tokenizer and the schedulers are the real classes of diffusers and transformers. Nothing is
downloaded.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WORDS = ("a", "and", "of", "with", "deep", "soft", "bass", "drums", "piano", "flute")
LETTERS = "abcdefghijklmnopqrstuvwxyz.,-"  # spell every other word


def t5_tokenizer():
    """A T5 tokenizer over ``WORDS`` and ``LETTERS``."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def scheduler():
    """The scheduler of Stable Diffusion 2.1, which Tango samples with."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )


class AudioDiffusion(nn.Module):
    """Tango's denoiser with its text encoder."""

    def __init__(self):
        super().__init__()
        self.noise_scheduler = scheduler()
        self.inference_scheduler = scheduler()
        self.tokenizer = t5_tokenizer()
        self.text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=16,
                d_ff=32,
                d_kv=8,
                num_heads=2,
                num_layers=1,
                is_gated_act=True,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=(32, 2),
            in_channels=8,
            out_channels=8,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,  # Tango has 2
            norm_num_groups=4,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            attention_head_dim=2,  # diffusers' name for the number of heads
            cross_attention_dim=16,
            use_linear_projection=True,
            upcast_attention=True,
        )

    def _embed(self, texts, **options):
        batch = self.tokenizer(texts, truncation=True, return_tensors="pt", **options)
        with torch.no_grad():
            states = self.text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return states, batch.attention_mask

    def encode_text(self, prompt):
        """Embeddings and mask of the prompts, without guidance."""
        states, mask = self._embed(prompt, max_length=self.tokenizer.model_max_length, padding=True)
        return states, mask == 1

    def encode_text_classifier_free(self, prompt, num_samples_per_prompt):
        """Embeddings and mask of empty prompts, then of the prompts; every prompt once per sample."""
        states, mask = self._embed(prompt, max_length=self.tokenizer.model_max_length, padding=True)
        empty, empty_mask = self._embed([""] * len(prompt), max_length=states.shape[1], padding="max_length")
        states, mask, empty, empty_mask = (
            tensor.repeat_interleave(num_samples_per_prompt, 0) for tensor in (states, mask, empty, empty_mask)
        )
        return torch.cat([empty, states]), torch.cat([empty_mask, mask]) == 1

    def prepare_latents(self, batch_size, inference_scheduler, num_channels_latents, dtype, device):
        """Noise: channels × 256 columns of time × 16 bands."""
        noise = torch.randn((batch_size, num_channels_latents, 256, 16), dtype=dtype, device=device)
        return noise * inference_scheduler.init_noise_sigma

    @torch.no_grad()
    def inference(
        self,
        prompt,
        inference_scheduler,
        num_steps=20,
        guidance_scale=3,
        num_samples_per_prompt=1,
        disable_progress=True,
    ):
        """Latents of a list of prompts."""
        device = self.text_encoder.device
        guided = guidance_scale > 1.0
        if guided:
            embeddings, mask = self.encode_text_classifier_free(prompt, num_samples_per_prompt)
        else:
            embeddings, mask = self.encode_text(prompt)
            embeddings = embeddings.repeat_interleave(num_samples_per_prompt, 0)
            mask = mask.repeat_interleave(num_samples_per_prompt, 0)
        inference_scheduler.set_timesteps(num_steps, device=device)
        latents = self.prepare_latents(
            len(prompt) * num_samples_per_prompt,
            inference_scheduler,
            self.unet.config.in_channels,
            embeddings.dtype,
            device,
        )
        for t in inference_scheduler.timesteps:
            both = torch.cat([latents] * 2) if guided else latents
            both = inference_scheduler.scale_model_input(both, t)
            noise = self.unet(both, t, encoder_hidden_states=embeddings, encoder_attention_mask=mask).sample
            if guided:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = inference_scheduler.step(noise, t, latents).prev_sample
        return latents


def build(seed=0):
    """The model in eval mode, as Tango has it after loading."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AudioDiffusion().eval()
