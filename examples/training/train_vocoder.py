"""Train the vocoder on mixes and single stems, with AudioLDM2's log-mels as its input.

    python examples/training/train_vocoder.py --work WORK --minutes 30

The loss compares spectra at several resolutions (spectral convergence and log magnitude) and log-mels; there is no
discriminator, so fine texture stays smeared. Noise is added to the input log-mels, since a VAE's are not exact.
"""

from __future__ import annotations

import torch
from data import HOP, SAMPLE_RATE, LogMel, Stems, normalise
from loop import Trainer, arguments, generators

from aiba_plugins.demo import parts

#: (transform size, hop) of the spectra that are compared
RESOLUTIONS = ((2048, 512), (1024, 256), (512, 128), (256, 64), (64, 16))
COLUMNS = 64
INPUT_NOISE = 0.05


def spectral(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over resolutions of spectral convergence plus the L1 distance of log magnitudes."""
    total = made.new_zeros(())
    for size, hop in RESOLUTIONS:
        window = torch.hann_window(size, device=made.device)
        a, b = (
            torch.stft(wave, size, hop, window=window, return_complex=True).abs().clamp_min(1e-4)
            for wave in (made, real)
        )
        total = total + (a - b).norm() / b.norm() + (a.log() - b.log()).abs().mean()
    return total / len(RESOLUTIONS)


def main() -> None:
    options = arguments(__doc__, steps=20000, batch=16, rate=1e-3).parse_args()
    options.seconds = COLUMNS * HOP / SAMPLE_RATE  # for the record
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    stems = Stems(options.work / "data" / "train.safetensors", options.device)
    front, vocoder = LogMel().to(options.device), parts.vocoder().to(options.device).train()

    def loss_of(step: int) -> torch.Tensor:
        rng, noise = generators(options.seed, step, options.device)
        # two transforms' worth of context: the log-mels at the ends are those of the longer clip
        audio = normalise(stems.batch(rng, options.batch, COLUMNS + 16)[0])
        mel = front(audio)[:, 8:-8]
        real = audio[:, 8 * HOP : -8 * HOP]
        noisy = mel + INPUT_NOISE * torch.randn(mel.shape, generator=noise, device=mel.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            made = vocoder(noisy)
        made = made.float()
        return spectral(made, real) + (front(made) - front(real)).abs().mean()

    Trainer(options.work / "vocoder.safetensors", {"vocoder": vocoder}, options).run(loss_of)


if __name__ == "__main__":
    main()
