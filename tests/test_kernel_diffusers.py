"""diffusers: the dispatcher with every backend of its registry, and the eager processors."""

from __future__ import annotations

import inspect
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models import attention_dispatch as dispatch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from torch import nn

from aiba_hooks import capture
from aiba_hooks.interception import ACTIVE, PATCHES
from aiba_hooks.testing import check_kernel
from aiba_plugins.kernels import sage_attention
from aiba_plugins.kernels.diffusers_dispatch import DispatchedAttention
from aiba_plugins.kernels.diffusers_eager import EagerScores

Backend = dispatch.AttentionBackendName
REGISTRY = dispatch._AttentionBackendRegistry
FUNCTION = dispatch.dispatch_attention_fn
SCORES = Attention.get_attention_scores
SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _nothing_left():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models gain nothing from a second thread, and lose much where another process runs
    yield
    torch.set_num_threads(threads)
    assert dispatch.dispatch_attention_fn is FUNCTION
    assert Attention.get_attention_scores is SCORES
    assert F.scaled_dot_product_attention is SDPA
    assert ACTIVE.get() == ()
    assert not PATCHES._table


def softmax(q, k, mask=None, scale=None, causal=False, gqa=False):
    """[B, H, Tq, Tk] by hand, of [B, H, Tq, D] and [B, Hk, Tk, D]."""
    if gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return logits.softmax(-1)


class Noted:
    """SDPA by hand that notes its probabilities, in place of torch's."""

    def __init__(self):
        self.seen = []

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        probabilities = softmax(query, key, attn_mask, scale, is_causal, enable_gqa)
        self.seen.append(probabilities)
        if enable_gqa:
            value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return probabilities @ value


def eagerly(monkeypatch, run):
    """Probabilities of every SDPA call that ``run`` makes, in order, computed by hand."""
    noted = Noted()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", noted)
        run()
    return noted.seen


def everything(module, run, **options):
    """The output and the full maps, head by head, of every attention of ``module`` while it runs."""
    with torch.no_grad():
        plain = run()
        with capture(module, keep="full", kinds=("cross", "self", "joint", "unknown"), heads="all", **options) as cap:
            captured = run()
    assert torch.equal(plain, captured)
    return cap, {name: torch.from_numpy(array.values[0]) for name, array in cap.maps.items()}


def sharpened(model):
    """Random weights give flat attention, which hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("to_q", "to_k", "add_q", "add_k")) and parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 2 * parameter.shape[1] ** -0.5
    return model.eval()


# ---- whole models


@pytest.fixture(scope="module")
def unet():
    """A U-Net of Stable Diffusion's class."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
    )
    return sharpened(model)


@pytest.fixture(scope="module")
def unet_run(unet):
    latent, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 12)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return lambda: unet(latent, torch.tensor(3), text, encoder_attention_mask=mask).sample


def test_the_unets_sdpa_maps_equal_its_eager_processors(unet, unet_run):
    original = unet.attn_processors
    cap, fused = everything(unet, unet_run)
    assert {site.kernel for site in cap.sites} == {"sdpa"}
    try:
        unet.set_attn_processor(processors.AttnProcessor())
        cap, eager = everything(unet, unet_run)
        assert {site.kernel for site in cap.sites} == {"diffusers:get_attention_scores"}
        assert [site.calls for site in cap.sites] == [1] * len(cap.sites)
        assert cap.uncovered == []
        store = {}
        names = {id(module): name for name, module in unet.named_modules()}

        def noted(self, query, key, mask=None):
            probabilities = SCORES(self, query, key, mask)
            store[names[id(self)]] = probabilities.unflatten(0, (-1, self.heads))
            return probabilities

        Attention.get_attention_scores = noted
        with torch.no_grad():
            unet_run()
    finally:
        Attention.get_attention_scores = SCORES
        unet.set_attn_processor(original)
    assert set(store) == set(eager) == set(fused)
    assert len(store) == 8
    for name, expected in store.items():
        assert torch.equal(eager[name], expected)
        np.testing.assert_allclose(fused[name], expected, atol=1e-5)
        assert expected.std() > 0.01, "too flat to tell"


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_sliced_attention_is_put_together_to_one_call_a_forward(unet, unet_run, size):
    original = unet.attn_processors
    try:
        unet.set_attn_processor(processors.AttnProcessor())
        _, eager = everything(unet, unet_run)
        unet.set_attn_processor(processors.SlicedAttnProcessor(size))
        cap, sliced = everything(unet, unet_run)
    finally:
        unet.set_attn_processor(original)
    assert [site.calls for site in cap.sites] == [1] * 8
    assert all("#" not in site.name and site.check is not None and site.check < 1e-6 for site in cap.sites)
    for name, expected in eager.items():
        np.testing.assert_allclose(sliced[name], expected, atol=1e-6)


def test_slices_of_a_forward_that_failed_are_forgotten(unet, unet_run):
    original = unet.attn_processors
    fails = [True]

    def failing(self, *args):
        if fails and len(args[0]) == 1 and args[0].storage_offset():
            fails.clear()
            raise ZeroDivisionError
        return SCORES(self, *args)

    try:
        unet.set_attn_processor(processors.SlicedAttnProcessor(1))
        _, expected = everything(unet, unet_run)
        Attention.get_attention_scores = failing
        with torch.no_grad(), capture(unet, keep="full", heads="all") as cap:
            with pytest.raises(ZeroDivisionError):
                unet_run()
            unet_run()
        assert Attention.get_attention_scores is failing
    finally:
        Attention.get_attention_scores = SCORES
        unet.set_attn_processor(original)
    for name, array in cap.maps.items():
        np.testing.assert_allclose(array.values[-1], expected[name], atol=1e-6)


def test_slices_out_of_order_are_an_error_that_says_what_to_do():
    attention = Attention(8, heads=2, dim_head=4, processor=processors.SlicedAttnProcessor(1))
    kernel, query = EagerScores(), torch.randn(4, 5, 4)
    scores = {"self": attention, "query": query[2:3], "key": query[2:3], "attention_mask": None}
    with pytest.raises(RuntimeError, match=r"starts at row 2 of 4 after 0 rows.*disable_attention_slicing"):
        kernel.read(SCORES, scores, torch.rand(1, 5, 5))


def test_sd3_joint_attention_equals_softmax_of_what_its_processor_computes(monkeypatch):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=12,
        caption_projection_dim=24,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    sharpened(model)
    latent, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 16)

    def run():
        return model(latent, text, pooled, torch.tensor([3, 3])).sample

    cap, maps = everything(model, run)
    expected = eagerly(monkeypatch, run)
    assert [(site.name, site.tag.kind) for site in cap.sites] == [
        ("transformer_blocks.0.attn", "joint"),
        ("transformer_blocks.0.attn2", "self"),
        ("transformer_blocks.1.attn", "joint"),
    ]
    for site, probabilities in zip(cap.sites, expected, strict=True):
        np.testing.assert_allclose(maps[site.name], probabilities, atol=1e-5)


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    sharpened(model)
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, lambda: model(**inputs).sample


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
def test_a_dispatched_model_is_seen_once_and_its_maps_are_softmax(monkeypatch, backend):
    """The model's file holds the dispatcher by value; SDPA and flex below it are not seen a second time."""
    model, run = flux()
    expected = eagerly(monkeypatch, run)
    if backend == "_native_flash":  # for half precision, says its check; torch's CPU kernel takes float32
        assert not REGISTRY._checks_enabled
    importer = sys.modules[type(model).__module__]
    assert importer.dispatch_attention_fn is FUNCTION
    with dispatch.attention_backend(backend):
        cap, maps = everything(model, run)
    assert importer.dispatch_attention_fn is FUNCTION
    assert len(cap.sites) == len(expected) == 2
    for site, probabilities in zip(cap.sites, expected, strict=True):
        assert (site.kernel, site.calls) == (f"diffusers:{backend}", 1)
        np.testing.assert_allclose(maps[site.name], probabilities, atol=1e-5)


# ---- the dispatcher's arguments


class Model(nn.Module):
    """Calls the dispatcher the way the model files do."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return dispatch.dispatch_attention_fn(q, k, v, **self.options)


def tensors(heads=4, kv_heads=4, queries=6, keys=6, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, queries, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def only(q, k, v, **options):
    """The only site's maps [B, H, Tq, Tk] of one dispatched call, the site, and the output."""
    model = Model(**options)
    plain = model(q, k, v)
    with capture(model, keep="full", kinds=("cross", "unknown"), heads="all") as cap:
        output = model(q, k, v)
    (site,) = cap.sites
    for a, b in zip(*([x if isinstance(x, tuple) else (x,) for x in (plain, output)]), strict=True):
        assert torch.equal(a, b)
    return torch.from_numpy(cap.maps[""].values[0]), site, output


def backend_by_hand(real, quantised=0.0):
    """A function of a backend's exact signature: plain softmax on [B, T, H, D]."""
    signature = inspect.signature(real)
    called = []

    def fake(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        called.append(given)
        q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
        groups = q.shape[1] // k.shape[1]
        probabilities = softmax(q, k, given["attn_mask"], given.get("scale"), given.get("is_causal", False), groups > 1)
        v = v + quantised * v.abs().amax() * torch.linspace(-1, 1, v.shape[-2])[:, None]
        output = (probabilities @ v.repeat_interleave(groups, 1)).transpose(1, 2)
        if given.get("return_lse") or given.get("return_attn_probs"):
            return output, torch.zeros(q.shape[:-1])
        return output

    fake.__signature__ = signature
    fake.called = called
    return fake


def test_every_backend_is_tested():
    """A new backend of diffusers has to be looked at."""
    assert {backend.value for backend in REGISTRY.list_backends()} == {
        *(
            "native",
            "_native_cudnn",
            "_native_efficient",
            "_native_flash",
            "_native_math",
            "_native_npu",
            "_native_xla",
        ),
        *("flex", "xformers"),
        *("flash", "flash_hub", "flash_varlen", "flash_varlen_hub", "flash_4_hub", "_flash_3", "_flash_varlen_3"),
        *("_flash_3_hub", "_flash_3_varlen_hub", "aiter_fa2_hub"),
        *("sage", "sage_hub", "sage_blackwell_hub", "sage_varlen", "_sage_qk_int8_pv_fp8_cuda"),
        *("_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton"),
    }


@pytest.mark.parametrize("backend", REGISTRY.list_backends(), ids=lambda backend: backend.value)
@pytest.mark.parametrize("causal", [False, True])
def test_each_backends_arguments_are_read(monkeypatch, backend, causal):
    """Functions of the exact signatures in the registry, by softmax; every argument of the call reaches the second one."""
    fake = backend_by_hand(REGISTRY._backends[backend])
    monkeypatch.setitem(REGISTRY._backends, backend, fake)
    takes = REGISTRY._supported_arg_names[backend]
    causal = causal and "is_causal" in takes
    scale = 0.7 if "scale" in takes else None
    q, k, v = tensors(kv_heads=2)
    maps, site, _ = only(q, k, v, is_causal=causal, scale=scale, enable_gqa=True, backend=backend, dropout_p=0.0)
    expected = softmax(q.transpose(1, 2), k.transpose(1, 2), None, scale, causal, gqa=True)
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    assert site.kernel == f"diffusers:{backend.value}"
    assert site.key_shape == (2, 2, 6, 8)
    for given in fake.called:
        assert {"is_causal": causal, "scale": scale}.items() >= {
            name: given[name] for name in ("is_causal", "scale") if name in given
        }.items()


@pytest.mark.parametrize("option", ["return_lse", "return_attn_probs"])
def test_a_tuple_with_the_logsumexp_is_read(monkeypatch, option):
    backend = {"return_lse": Backend.FLASH, "return_attn_probs": Backend._FLASH_3_HUB}[option]
    monkeypatch.setitem(REGISTRY._backends, backend, backend_by_hand(REGISTRY._backends[backend]))
    q, k, v = tensors()
    maps, _, output = only(q, k, v, backend=backend, attention_kwargs={option: True})
    assert isinstance(output, tuple)
    np.testing.assert_allclose(maps, softmax(q.transpose(1, 2), k.transpose(1, 2)), atol=1e-6)


@pytest.mark.parametrize("kind", ["bool 2-D", "bool 4-D", "float 4-D", "none"])
@pytest.mark.parametrize("gqa", [False, True])
def test_masks_scale_and_grouped_queries_of_the_native_backend(kind, gqa):
    q, k, v = tensors(kv_heads=2 if gqa else 4, keys=9)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, 5:] = False
    mask = {
        "bool 2-D": keep,
        "bool 4-D": keep[:, None, None],
        "float 4-D": torch.randn(2, 4, 6, 9),
        "none": None,
    }[kind]
    maps, site, _ = only(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=gqa)
    by_hand = keep[:, None, None] if kind == "bool 2-D" else mask
    np.testing.assert_allclose(maps, softmax(q.transpose(1, 2), k.transpose(1, 2), by_hand, 0.5, gqa=gqa), atol=1e-6)
    assert site.check < 1e-5


@pytest.mark.parametrize("place", ["argument", "attention_kwargs"])
def test_dropout_is_off_in_the_second_call_wherever_it_was_given(place):
    q, k, v = tensors()
    options = {"dropout_p": 0.5} if place == "argument" else {"attention_kwargs": {"dropout_p": 0.5}}
    model = Model(**options)
    torch.manual_seed(3)
    plain = [model(q, k, v), torch.rand(2)]
    torch.manual_seed(3)
    with capture(model, keep="full", kinds=("unknown",), heads="all") as cap:
        captured = [model(q, k, v), torch.rand(2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    np.testing.assert_allclose(cap.maps[""].values[0], softmax(q.transpose(1, 2), k.transpose(1, 2)), atol=1e-6)
    assert options.get("attention_kwargs", {"dropout_p": 0.5}) == {"dropout_p": 0.5}  # the caller's own dict


def test_context_parallel_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(REGISTRY._backends, Backend.NATIVE, backend_by_hand(REGISTRY._backends[Backend.NATIVE]))
    model = Model(parallel_config=types.SimpleNamespace(context_parallel_config=None))
    with (
        pytest.raises(NotImplementedError, match=r"diffusers:native: context-parallel attention.*enable_parallelism"),
        capture(model, keep="full"),
    ):
        model(*tensors())


def test_the_active_backend_is_named_and_quantised_ones_have_their_own_tolerance(monkeypatch):
    for backend in (Backend.SAGE, Backend.FLASH):
        monkeypatch.setitem(REGISTRY._backends, backend, backend_by_hand(REGISTRY._backends[backend], quantised=0.005))
    q, k, v = tensors()
    arguments = {**inspect.signature(FUNCTION).bind(q, k, v).arguments, "dropout_p": 0.0}
    for backend, allowed in ((Backend.SAGE, sage_attention.TOLERANCE), (Backend.FLASH, 2e-4)):
        monkeypatch.setattr(REGISTRY, "_active_backend", backend)
        call = DispatchedAttention().read(FUNCTION, arguments, FUNCTION(q, k, v))
        assert (call.kernel, call.allowed) == (f"diffusers:{backend.value}", allowed)


def test_an_edited_output_goes_back_in_the_dispatchers_layout():
    q, k, v = tensors()
    arguments = {**inspect.signature(FUNCTION).bind(q, k, v).arguments, "dropout_p": 0.0}
    output = FUNCTION(q, k, v)
    call = DispatchedAttention().read(FUNCTION, arguments, output)
    assert torch.equal(call.restore(call.output), output)
    assert torch.equal(call.restore(call.again(call.value)), output)


# ---- other eager processors


def attend(attention, *args, **kwargs):
    cap, maps = everything(attention, lambda: attention(*args, **kwargs))
    return cap.sites, maps


@pytest.mark.parametrize("size", [None, 1, 3])
def test_added_keys_and_values_of_the_text_come_first(size):
    torch.manual_seed(0)
    processor = processors.AttnAddedKVProcessor() if size is None else processors.SlicedAttnAddedKVProcessor(size)
    attention = Attention(
        16,
        heads=4,
        dim_head=4,
        added_kv_proj_dim=12,
        norm_num_groups=4,
        bias=True,
        processor=processor,
        cross_attention_norm=None,
    )
    hidden, text = torch.randn(2, 16, 9), torch.randn(2, 5, 12)
    with torch.no_grad():
        x = attention.group_norm(hidden).transpose(1, 2)
        q, k, t = (
            layer(source).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer, source in ((attention.to_q, x), (attention.to_k, x), (attention.add_k_proj, text))
        )
    (site,), maps = attend(attention, hidden, text)
    np.testing.assert_allclose(maps[""], softmax(q, torch.cat([t, k], 2)), atol=1e-6)
    assert (site.queries, site.keys) == (9, 14) if hasattr(site, "queries") else site.key_shape[-2] == 14


def test_custom_diffusion_and_ip_adapter_processors():
    torch.manual_seed(0)
    hidden, text, image = torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.randn(2, 1, 3, 16)
    attention = Attention(16, 16, heads=4, dim_head=4)
    custom = processors.CustomDiffusionAttnProcessor(True, True, hidden_size=16, cross_attention_dim=16)
    attention.set_processor(custom)
    sites, maps = attend(attention, hidden, text)
    with torch.no_grad():
        q, k = (
            layer(source).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer, source in ((custom.to_q_custom_diffusion, hidden), (custom.to_k_custom_diffusion, text))
        )
    np.testing.assert_allclose(maps[sites[0].name], softmax(q, k), atol=1e-6)

    adapter = processors.IPAdapterAttnProcessor(16, 16, num_tokens=(3,), scale=1.0)
    attention.set_processor(adapter)
    sites, maps = attend(attention, hidden, (text, [image[:, 0]]))
    with torch.no_grad():
        q, k, i = (
            layer(source).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer, source in ((attention.to_q, hidden), (attention.to_k, text), (adapter.to_k_ip[0], image[:, 0]))
        )
    assert [site.name.rpartition("#")[2] for site in sites] == ["0", "1"]  # the text, then the image
    np.testing.assert_allclose(maps[sites[0].name], softmax(q, k), atol=1e-6)
    np.testing.assert_allclose(maps[sites[1].name], softmax(q, i), atol=1e-6)


def test_upcast_attention_in_half_precision():
    torch.manual_seed(0)
    attention = Attention(16, heads=4, dim_head=4, upcast_attention=True, upcast_softmax=True).to(torch.bfloat16)
    attention.set_processor(processors.AttnProcessor())
    hidden = torch.randn(2, 6, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        q, k = (p(hidden).unflatten(-1, (4, 4)).transpose(1, 2) for p in (attention.to_q, attention.to_k))
    _, maps = attend(attention, hidden)
    assert torch.equal(maps[""], softmax(q, k).to(torch.bfloat16).float())


# ---- conformance


def test_the_adapters_conform():
    q, k, v = tensors(kv_heads=2, keys=9)
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[1, ..., 5:] = False
    expected = softmax(q.transpose(1, 2), k.transpose(1, 2), keep, 0.5, gqa=True)
    options = {"attn_mask": keep, "scale": 0.5, "enable_gqa": True}
    check_kernel(
        DispatchedAttention(), lambda: dispatch.dispatch_attention_fn(q, k, v, **options), probabilities=expected
    )
    attention = Attention(16, heads=4, dim_head=4, processor=processors.AttnProcessor())
    q, k = torch.randn(8, 5, 4), torch.randn(8, 7, 4)
    expected = softmax(q[:, None], k[:, None]).reshape(2, 4, 5, 7)
    check_kernel(EagerScores(), lambda: attention.get_attention_scores(q, k), probabilities=expected)
