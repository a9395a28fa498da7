"""Train the mel VAE that both pipelines share.

python examples/training/train_vae.py --work WORK --minutes 10
"""

from __future__ import annotations

import torch
from data import HOP, SAMPLE_RATE, LogMel, Stems
from loop import Trainer, arguments, generators

from aiba_plugins.demo import parts

#: weight of the KL term, per latent value
KL = 1e-4


def main() -> None:
    options = arguments(__doc__, steps=2500, batch=8, rate=1e-3).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    stems = Stems(options.work / "data" / "train.safetensors", options.device)
    front, vae = LogMel().to(options.device), parts.vae().to(options.device)
    columns = round(options.seconds * SAMPLE_RATE / HOP)

    def loss_of(step: int) -> torch.Tensor:
        rng, noise = generators(options.seed, step, options.device)
        mel = front(stems.batch(rng, options.batch, columns)[0])[:, None]
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            posterior = vae.encode(mel).latent_dist
            latent = posterior.sample(generator=noise)
            decoded = vae.decode(latent).sample
        kl = posterior.kl().float().mean() / latent[0].numel()
        return (decoded.float() - mel).abs().mean() / parts.LOG_MEL_SCALE + KL * kl

    Trainer(options.work / "vae.safetensors", {"vae": vae}, options).run(loss_of)


if __name__ == "__main__":
    main()
