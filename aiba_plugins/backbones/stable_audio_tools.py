"""Models of stable-audio-tools (``ConditionedDiffusionModelWrapper`` run by ``generate_diffusion_cond``) with a DiT.

From ``stable_audio_tools/models/dit.py``, ``models/diffusion.py`` and ``inference/generation.py``: the latent is
[B, C, time], ``pretransform.downsampling_ratio`` samples to a column, all of it returned; tokens before the columns are the
global, memory and prepended ones. The keys are the conditioners of ``cross_attn_cond_ids`` one after the other, text padded
to its maximum; masks are not passed on. The DiT itself doubles the batch, **[conditional, unconditional]**, where ``cfg_scale``
is not 1 and the noise level lies in ``cfg_interval``. With ``differential`` a layer subtracts a second attention from its first
(``models/transformer.py``). The prompt stands in the metadata that the conditioner is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from aiba_hooks import Backbone, Conditioning, Lattice, MethodCall, SiteCall, Step, TokenStream, hookimpl
from aiba_plugins.backbones.latents import time_lattice


class StableAudioTools(Backbone):
    """stable-audio-tools' ConditionedDiffusionModelWrapper around a DiTWrapper."""

    name = "stable-audio-tools"
    denoiser_names = ("model",)
    prompt_method = "get_conditioning_inputs"
    observed_methods = ("conditioner.forward",)
    branches = ("conditional", "unconditional")
    branches_inside = True

    def matches(self, target: Any) -> bool:
        named = any(cls.__name__ == "ConditionedDiffusionModelWrapper" for cls in type(target).__mro__)
        return named and type(getattr(target, "model", None)).__name__ == "DiTWrapper"

    def conditioning_from(self, target: Any, calls: Sequence[MethodCall]) -> Conditioning | None:
        arguments = calls[-1].arguments
        if arguments["negative"]:
            return None
        tensors = arguments["conditioning_tensors"]
        called = next((call for call in reversed(calls) if call.name == "conditioner.forward"), None)
        rows = len(next(iter(tensors.values()))[0])
        prompts: tuple[str, ...] = ("",) * rows
        parts: list[TokenStream] = []
        for key in target.cross_attn_cond_ids:
            conditioner = target.conditioner.conditioners[key]
            tensor = tensors[key][0]
            length = int(tensor.shape[1]) if tensor.ndim == 3 else 1
            if called is not None and hasattr(conditioner, "tokenizer"):
                name = target.conditioner.default_keys.get(key, key)
                texts = [row.get(key, row.get(name)) for row in called.arguments["batch_metadata"]]
                prompts = tuple(text if isinstance(text, str) else text[0] for text in texts)
                parts.append(
                    TokenStream.from_tokenizer(
                        key, conditioner.tokenizer, prompts, padding="max_length", max_length=length, truncation=True
                    )
                )
            else:
                role = "duration" if key.startswith("seconds") else "other"
                parts.append(TokenStream.opaque(key, prompts, length, role=role))
        streams = (reduce(lambda a, b: a.join(b), parts),) if parts else ()
        return Conditioning(prompts, 1, True, streams)

    def guided(self, target: Any, arguments: Mapping[str, Any], conditioning: Conditioning) -> bool:
        options = {**arguments, **arguments.get("kwargs", {})}
        low, high = options.get("cfg_interval", (0, 1))
        conditioned = options["cross_attn_cond"] is not None or options["prepend_cond"] is not None
        if options["cfg_scale"] == 1.0 or not conditioned or options.get("exit_layer_ix") is not None:
            return False
        if (low, high) == (0, 1):
            return True  # the whole schedule: nothing to read from the device
        time = float(options["t"][0])
        noise = math.sin(time * math.pi / 2) if target.diffusion_objective == "v" else time
        return bool(low <= noise <= high)

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        """Time t in 0..1; the noise level is tan(πt/2) for the v objective (α = cos, σ = sin), t for rectified flow."""
        time = arguments["t"]
        return Step(time, (time.float() * math.pi / 2).tan() if target.diffusion_objective == "v" else time)

    def signs(self, site: SiteCall) -> Sequence[float] | None:
        return (1.0, -1.0) if getattr(site.module, "differential", False) else None

    def lattice(self, site: SiteCall) -> Lattice:
        target = site.target
        patch = int(getattr(target.model.model, "patch_size", 1))
        columns = int(site.arguments["x"].shape[-1]) // patch
        ratio = 1 if target.pretransform is None else target.pretransform.downsampling_ratio
        return time_lattice(columns, patch * ratio / target.sample_rate, prefix=site.queries - columns)


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [StableAudioTools()]
