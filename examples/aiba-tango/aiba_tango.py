"""An AIBA backbone for Tango (declare-lab/tango): text to audio by a plain diffusers U-Net over AudioLDM's mel latent."""

from aiba_hooks import Backbone, Conditioning, Lattice, TokenStream, hookimpl, mel_edges

SECONDS_PER_COLUMN = 4 * 0.01  # the VAE shrinks both axes of the mel by 4, and the mel's hop is 10 ms


class TangoBackbone(Backbone):
    """``AudioDiffusion`` of Tango: one Flan-T5 stream, guidance as one batch, a latent of 256 columns × 16 bands."""

    name = "tango"
    denoiser_names = ("unet",)
    prompt_method = ("encode_text_classifier_free", "encode_text")  # inference calls the one or the other
    branches = ("unconditional", "conditional")

    def matches(self, target):
        ours = any(cls.__name__ == "AudioDiffusion" for cls in type(target).__mro__)
        return ours and hasattr(target, "encode_text_classifier_free")

    def conditioning(self, target, arguments, result):
        prompts = tuple(arguments["prompt"])
        limit = target.tokenizer.model_max_length
        options = {"padding": True, "truncation": True, "max_length": limit}  # as Tango calls its tokenizer
        argument = "encoder_hidden_states"  # of the U-Net: sites that read it attend to the text
        stream = TokenStream.from_tokenizer("t5", target.tokenizer, prompts, argument=argument, **options)
        guided = "num_samples_per_prompt" in arguments  # only encode_text_classifier_free has it
        waveforms = arguments.get("num_samples_per_prompt")  # encode_text is not told: the batch will say
        return Conditioning(prompts=prompts, waveforms=waveforms, guided=guided, streams=(stream,))

    def sigma(self, target, timestep):
        kept = float(target.noise_scheduler.alphas_cumprod[int(timestep)])
        return ((1 - kept) / kept) ** 0.5

    def lattice(self, site):
        columns, bands = site.arguments["sample"].shape[-2:]
        latent = {"seconds_per_column": SECONDS_PER_COLUMN, "frequency_edges": mel_edges(bands, 0, 8000)}
        return Lattice.of_level(site.queries, (columns, bands), **latent)


@hookimpl
def aiba_backbones():
    return [TangoBackbone()]
