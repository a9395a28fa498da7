"""Draw training clips and encode them with the trained VAE, once for both denoisers.

    python examples/training/encode.py --work WORK --count 40000

Writes the latents (posterior means, each channel brought to mean 0 and deviation 1, which export.py folds into the VAE) and
the instruments of every clip. Prompts are drawn anew in every training step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import HOP, SAMPLE_RATE, LogMel, Stems
from loop import load_average
from safetensors.torch import save_file

from aiba_plugins.demo import parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40000, help="clips")
    parser.add_argument(
        "--subsets",
        type=int,
        default=4,
        help="clips of every window, each a mix of other instruments of it: only the prompt tells them apart",
    )
    parser.add_argument("--seconds", type=float, default=2.56, help="length of a clip")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    stems = Stems(options.work / "data" / f"{options.split}.safetensors", options.device)
    front, vae = LogMel().to(options.device), parts.vae().to(options.device).eval()
    state = load_average(options.work / "vae.safetensors", {"vae": vae})
    columns = round(options.seconds * SAMPLE_RATE / HOP)
    latents, instruments, size = [], [], 40
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
        for first in range(0, options.count, size):
            audio, named = stems.batch(np.random.default_rng((options.seed, 1, first)), size, columns, options.subsets)
            latents.append(vae.encode(front(audio)[:, None]).latent_dist.mode().half().cpu())
            instruments += named
            if first % (100 * size) == 0:
                print(first, flush=True)
    stacked = torch.cat(latents).float()
    known = options.work / "data" / "channels.json"
    if not known.exists():  # the first run decides for all lengths
        sample = stacked[:2000]
        moments = {"mean": sample.mean((0, 2, 3)).tolist(), "std": sample.std((0, 2, 3)).tolist()}
        known.write_text(json.dumps({**moments, "vae_step": state["step"]}))
    mean, std = channels(options.work)
    stacked = (stacked - mean[:, None, None]) / std[:, None, None]
    about = {"instruments": instruments, "subsets": options.subsets}
    path = options.work / "data" / f"latents-{options.seconds:g}.safetensors"
    save_file({"latents": stacked.half()}, str(path), {"about": json.dumps(about)})
    print(path.name, tuple(stacked.shape), flush=True)


def channels(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every latent channel."""
    moments = json.loads((work / "data" / "channels.json").read_text())
    return torch.tensor(moments["mean"]), torch.tensor(moments["std"])


def standardise(vae: Any, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the standardisation into the VAE's two 1 × 1 convolutions, so that its latents have it by themselves."""
    count = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        before.weight[:count] /= std[:, None, None, None]
        before.bias[:count] = (before.bias[:count] - mean) / std
        before.bias[count:] -= 2 * std.log()  # log variances
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= std[None, :, None, None]


if __name__ == "__main__":
    main()
