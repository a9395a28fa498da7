"""nn.MultiheadAttention and nn.TransformerEncoderLayer: the maps are the weights that they return, on the path that torch takes."""

from __future__ import annotations

import dataclasses
import sys
import types
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aiba_hooks import CheckColumnError, NothingCaptured, capture
from aiba_hooks.interception import ACTIVE, PATCHES, Edited, intercept
from aiba_hooks.kernels import projections
from aiba_hooks.kernels.multihead_attention import MultiHeadAttention, TransformerEncoderLayer
from aiba_hooks.kernels.projections import CHECKED_QUERIES
from aiba_hooks.plugins import manager
from aiba_hooks.testing import check_kernel

NAMES = {
    (F, "multi_head_attention_forward"): F.multi_head_attention_forward,
    (F, "scaled_dot_product_attention"): F.scaled_dot_product_attention,
    (torch, "_native_multi_head_attention"): torch._native_multi_head_attention,
    (torch, "_transformer_encoder_layer_fwd"): torch._transformer_encoder_layer_fwd,
    (nn.MultiheadAttention, "forward"): nn.MultiheadAttention.forward,
    (nn.TransformerEncoderLayer, "forward"): nn.TransformerEncoderLayer.forward,
    (nn.TransformerEncoder, "forward"): nn.TransformerEncoder.forward,
}
E, H, B, T, S = 32, 4, 3, 7, 9
EVERYTHING = {"keep": "full", "heads": "all", "kinds": ("cross", "self", "joint", "unknown")}


@pytest.fixture(autouse=True)
def _nothing_left():
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.manual_seed(0)
    yield
    assert all(getattr(place, name) is function for (place, name), function in NAMES.items())
    assert torch.backends.mha.get_fastpath_enabled() is enabled
    assert ACTIVE.get() == ()
    assert not PATCHES._table


@pytest.fixture
def paths(monkeypatch):
    """Which of torch's functions ran: the spies stand beneath the interceptors."""
    ran = []
    for (place, name), function in list(NAMES.items())[:4]:

        def spy(*args, _name=name, _function=function, **kwargs):
            ran.append(_name)
            return _function(*args, **kwargs)

        if name == "multi_head_attention_forward":
            continue  # bound by its own signature, which a spy does not have
        monkeypatch.setattr(place, name, spy)
        monkeypatch.setitem(NAMES, (place, name), spy)
    return ran


def sharpened(module):
    """Neither flat nor one-hot probabilities: both would hide mistakes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "in_proj_weight" in name or "q_proj" in name or "k_proj" in name:
                parameter.mul_(3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return module.eval()


def attention(**options):
    return sharpened(nn.MultiheadAttention(E, H, **options))


def inputs(batch_first, *, cross):
    x, y = torch.randn(B, T, E), torch.randn(B, S, E)
    x, y = (x, y) if batch_first else (x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous())
    return (x, y, y) if cross else (x, x, x)


def captured(module, *args, **kwargs):
    """Maps [batch, heads, Tq, Tk] of the one site, after checking that the output did not change."""
    plain = module(*args, **kwargs)
    with capture(module, **EVERYTHING) as cap:
        output = module(*args, **kwargs)
    for a, b in zip(plain, output, strict=True) if isinstance(plain, tuple) else [(plain, output)]:
        assert (a is None and b is None) or torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    assert len(cap.sites) == 1
    assert cap.sites[0].calls == 1
    assert cap.sites[0].check < cap_tolerance(output)
    return cap, torch.from_numpy(cap.maps[cap.sites[0].name].values[0])


def cap_tolerance(output):
    output = output[0] if isinstance(output, tuple) else output
    return {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[output.dtype]


PADDING = torch.arange(S)[None] >= torch.tensor([[9], [4], [6]])
MASKS = {
    "plain": {},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.linspace(-2, 0, B * S).reshape(B, S)},
    "mask": {"attn_mask": torch.arange(T)[:, None] + 2 < torch.arange(S)[None]},
    "float mask": {"attn_mask": torch.sin(torch.arange(T * S).reshape(T, S).float())},
    "mask per head": {"attn_mask": torch.rand(B * H, T, S, generator=torch.Generator().manual_seed(1)) < 0.3},
    "mask and padding": {
        "attn_mask": torch.arange(T)[:, None] + 2 < torch.arange(S)[None],
        "key_padding_mask": PADDING,
    },
}


def cut(masks, keys):
    return {name: mask[..., :keys] for name, mask in masks.items()}


# ---- values: nn.MultiheadAttention's own weights are the reference


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "tokens-first"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no-weights"])
def test_maps_are_the_modules_own_weights_head_by_head(masks, cross, batch_first, weights):
    module = attention(batch_first=batch_first)
    arguments = inputs(batch_first, cross=cross)
    options = cut(MASKS[masks], S if cross else T)
    expected = module(*arguments, **options, need_weights=True, average_attn_weights=False)[1]
    cap, maps = captured(module, *arguments, **options, need_weights=weights)
    torch.testing.assert_close(maps, expected.detach(), atol=1e-5, rtol=0)
    assert cap.sites[0].tag == ("cross" if cross else "self")
    with torch.no_grad():  # self-attention now takes its fast path
        cap, maps = captured(module, *arguments, **options, need_weights=weights, average_attn_weights=False)
    torch.testing.assert_close(maps, expected.detach(), atol=1e-5, rtol=0)
    fast = not cross and batch_first and not any(mask.is_floating_point() for mask in options.values())
    assert cap.sites[0].kernel == ("native_multi_head_attention" if fast else "multi_head_attention")
    assert cap.sites[0].tag == ("cross" if cross else "self")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad", [True, False], ids=["slow", "fast"])
def test_other_dtypes(dtype, grad):
    module = attention(batch_first=True).to(dtype)
    x = torch.randn(B, T, E, dtype=dtype)
    with torch.set_grad_enabled(grad):
        expected = module(x, x, x, average_attn_weights=False)[1]
        _, maps = captured(module, x, x, x)
    torch.testing.assert_close(maps, expected.detach().float(), atol=1e-6 if dtype == torch.float64 else 2e-2, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_and_gradients_are_the_same_in_every_grad_mode(mode):
    module = attention(batch_first=True)
    with mode():
        x = torch.randn(B, T, E)
        plain = module(x, x, x)[0]
        _, maps = captured(module, x, x, x)
        with capture(module, **EVERYTHING):
            output = module(x, x, x)[0]
        expected = module(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(maps, expected.detach(), atol=1e-5, rtol=0)
    assert output.requires_grad == plain.requires_grad
    if plain.requires_grad:
        a, b = (torch.autograd.grad(out.sum(), module.in_proj_weight)[0] for out in (plain, output))
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 20, "vdim": 12},
        {"bias": False},
        {"kdim": 20, "vdim": 12, "bias": False, "add_bias_kv": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", ["plain", "mask and padding"])
@pytest.mark.parametrize("weights", [True, False])
def test_constructor_options(options, masks, weights):
    module = attention(**options)
    x, y = torch.randn(T, B, E), torch.randn(S, B, options.get("kdim", E))
    z = torch.randn(S, B, options["vdim"]) if "vdim" in options else y
    expected = module(x, y, z, **MASKS[masks], average_attn_weights=False)[1]
    cap, maps = captured(module, x, y, z, **MASKS[masks], need_weights=weights)
    torch.testing.assert_close(maps, expected.detach(), atol=1e-5, rtol=0)
    extra = options.get("add_bias_kv", False) + options.get("add_zero_attn", False)
    assert cap.sites[0].key_shape == (B, H, S + extra, E // H)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("masks", ["plain", "mask and padding"])
def test_inputs_without_a_batch(weights, masks):
    module = attention(batch_first=True)
    x, y = torch.randn(T, E), torch.randn(S, E)
    options = {name: mask[1] if name == "key_padding_mask" else mask for name, mask in MASKS[masks].items()}
    expected = module(x, y, y, **options, average_attn_weights=False)[1]
    cap, maps = captured(module, x, y, y, **options, need_weights=weights)
    torch.testing.assert_close(maps[0], expected.detach(), atol=1e-5, rtol=0)
    assert cap.sites[0].query_shape == (1, H, T, E // H)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_the_causal_hint(padded, weights):
    """Without weights and padding torch drops the mask and trusts the hint; else it drops the hint."""
    module = attention()
    x = torch.randn(T, B, E)
    causal = nn.Transformer.generate_square_subsequent_mask(T)
    options = {"attn_mask": causal, "key_padding_mask": PADDING[:, :T].float() * -1e9 if padded else None}
    expected = module(x, x, x, **options, average_attn_weights=False)[1]
    _, maps = captured(module, x, x, x, **options, is_causal=True, need_weights=weights)
    torch.testing.assert_close(maps, expected.detach(), atol=1e-5, rtol=0)
    _, maps = captured(module, x, x, x, attn_mask=torch.zeros(T, T), is_causal=True, need_weights=False)
    assert (maps.triu(1) == 0).all()  # a wrong hint: what ran was causal


def test_keys_and_values_that_come_projected():
    module = attention()
    x = torch.randn(T, B, E)
    key, value = torch.randn(B * H, S, E // H), torch.randn(B * H, S, E // H)

    class Static(nn.Module):
        def forward(self, x):
            arguments = (module.in_proj_weight, module.in_proj_bias, None, None, True, 0.0)
            out = (module.out_proj.weight, module.out_proj.bias)
            return F.multi_head_attention_forward(
                x, x, x, E, H, *arguments, *out, static_k=key, static_v=value, average_attn_weights=False
            )

    model = Static()
    _, expected = model(x)
    cap, maps = captured(model, x)
    torch.testing.assert_close(maps, expected.detach(), atol=1e-5, rtol=0)
    assert cap.sites[0].tag == "cross"
    assert "lengths" in cap.sites[0].evidence


def test_dropout_is_not_asked_for_and_the_generator_does_not_move():
    module = attention(dropout=0.5)
    x = torch.randn(T, B, E)
    expected = module(x, x, x, average_attn_weights=False)[1]
    module.train()
    torch.manual_seed(1)
    plain = [*module(x, x, x), torch.rand(3)]
    torch.manual_seed(1)
    with capture(module, **EVERYTHING) as cap:
        output = [*module(x, x, x), torch.rand(3)]
    assert all(torch.equal(a, b) for a, b in zip(plain, output, strict=True))
    np.testing.assert_allclose(cap.maps[""].values[0], expected.detach(), atol=1e-5)


def test_autocast():
    module = attention(batch_first=True)
    x, y = torch.randn(B, T, E), torch.randn(B, S, E)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x, y, y, average_attn_weights=False)[1]
        _, maps = captured(module, x, y, y)
        _, fused = captured(module, x, y, y, need_weights=False)
    torch.testing.assert_close(maps, expected.detach().float(), atol=2e-2, rtol=0)
    torch.testing.assert_close(fused, expected.detach().float(), atol=2e-2, rtol=0)


def test_rows_that_may_attend_to_nothing_are_zero():
    module = attention(batch_first=True)
    x = torch.randn(B, T, E)
    hidden = torch.zeros(B, T, dtype=torch.bool)
    hidden[1] = True
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            cap, maps = captured(module, x, x, x, key_padding_mask=hidden)
        assert (maps[1] == 0).all()
        torch.testing.assert_close(maps[[0, 2]].sum(-1), torch.ones(2, H, T))
        assert cap.sites[0].row_sum[0] == 0


def test_self_attention_with_positions_added_to_query_and_key_is_self():
    module = attention()
    x, position = torch.randn(T, B, E), torch.randn(T, B, E)
    cap, _ = captured(module, x + position, x + 2 * position, x)
    assert cap.sites[0].tag == "cross"  # three tensors: nothing says that they are one
    q = x + position
    cap, _ = captured(module, q, q, x)
    assert cap.sites[0].tag == "self"
    cap, _ = captured(module, x, x + position, x)
    assert cap.sites[0].tag == "self"
    assert "query and value" in cap.sites[0].evidence


# ---- TransformerEncoder and TransformerDecoder


def layer(**options):
    return sharpened(nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True, **options))


def weights_of(module, *args, **kwargs):
    """The weights of every nn.MultiheadAttention below ``module``, asked of itself: name -> [batch, heads, Tq, Tk]."""
    found, handles = {}, []
    for name, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention):

            def ask(part, args, kwargs):
                kwargs.update(need_weights=True, average_attn_weights=False)
                return args, kwargs

            def keep(part, args, output, name=name):
                found[name] = output[1].detach()

            handles += [part.register_forward_pre_hook(ask, with_kwargs=True), part.register_forward_hook(keep)]
    with torch.enable_grad():  # the slow path
        module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masks", ["plain", "padding", "mask", "mask per head", "mask and padding"])
@pytest.mark.parametrize("grad", [True, False], ids=["slow", "fast"])
def test_an_encoder_layer(paths, norm_first, activation, masks, grad):
    module = layer(norm_first=norm_first, activation=activation)
    x = torch.randn(B, T, E)
    names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
    options = {names[name]: mask for name, mask in cut(MASKS[masks], T).items()}
    expected = weights_of(module, x, **options)
    with torch.set_grad_enabled(grad):
        module(x, **options)
        plain = list(paths)
        paths.clear()
        cap, maps = captured(module, x, **options)
    assert ("_transformer_encoder_layer_fwd" in plain) is not grad
    assert [name for name in paths if "scaled" not in name][-1:] == ([] if grad else plain[-1:])
    torch.testing.assert_close(maps, expected["self_attn"], atol=1e-5, rtol=0)
    site = cap.sites[0]
    assert (site.name, site.tag) == ("self_attn", "self")
    assert site.kernel == ("multi_head_attention" if grad else "transformer_encoder_layer")


def test_a_float_mask_on_the_fast_path_shows_what_ran():
    """nn.TransformerEncoderLayer hands it over, and the fast path hides every key whose entry is not zero."""
    module = layer()
    x = torch.randn(B, T, E)
    mask = torch.sin(torch.arange(T * T).reshape(T, T).float()).clamp_min(0)
    with torch.no_grad():
        cap, maps = captured(module, x, src_mask=mask)
    assert cap.sites[0].kernel == "transformer_encoder_layer"
    torch.testing.assert_close(maps, weights_of(module, x, src_mask=mask != 0)["self_attn"], atol=1e-5, rtol=0)


def test_an_encoder_layer_in_bfloat16():
    module = layer().to(torch.bfloat16)
    x = torch.randn(B, T, E, dtype=torch.bfloat16)
    expected = weights_of(module, x)
    with torch.no_grad():
        _, maps = captured(module, x)
    torch.testing.assert_close(maps, expected["self_attn"].float(), atol=2e-2, rtol=0)


def test_more_queries_than_the_check_repeats():
    module = layer()
    x = torch.randn(1, 3 * CHECKED_QUERIES, E)
    with torch.no_grad():
        _, maps = captured(module, x)
    torch.testing.assert_close(maps, weights_of(module, x)["self_attn"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_runs_on_its_fast_path_though_it_is_watched(paths, norm_first):
    encoder = nn.TransformerEncoder(layer(norm_first=norm_first), 3, enable_nested_tensor=False).eval()
    model = nn.Sequential(nn.Linear(E, E), encoder)  # a projection that is watched
    x = torch.randn(B, T, E)
    with torch.no_grad():
        plain = model(x)
        with capture(model, **EVERYTHING) as cap:
            output = model(x)
            again = model(x)
    assert torch.equal(plain, output)
    assert torch.equal(plain, again)
    assert paths.count("_transformer_encoder_layer_fwd") == 9
    expected = weights_of(model, x)
    assert set(cap.maps) == set(expected) == {f"1.layers.{i}.self_attn" for i in range(3)}
    for name, array in cap.maps.items():
        np.testing.assert_allclose(array.values, np.stack([expected[name]] * 2), atol=1e-5)


def test_nested_tensors_are_padded_with_zeros_to_the_longest(paths):
    encoder = nn.TransformerEncoder(layer(), 2).eval()
    x = torch.randn(B, T, E)
    lengths = [6, 4, 5]  # none as long as the input
    padding = torch.arange(T)[None] >= torch.tensor(lengths)[:, None]
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=padding)
        with capture(encoder, **EVERYTHING) as cap:
            output = encoder(x, src_key_padding_mask=padding)
    assert torch.equal(plain, output)
    assert paths.count("_transformer_encoder_layer_fwd") == 4
    expected = weights_of(encoder, x, src_key_padding_mask=padding)
    for name, array in cap.maps.items():
        maps = array.values[0]
        assert maps.shape == (B, H, 6, 6)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                maps[row, :, :length, :length], expected[name][row, :, :length, :length], atol=1e-5
            )
            assert (maps[row, :, length:] == 0).all()
            assert (maps[row, :, :, length:] == 0).all()
    assert all(site.tag == "self" and site.check < 1e-5 for site in cap.sites)


def test_nested_tensors_in_attention_alone():
    """What an encoder layer does with nested tensors where something keeps it from its own fast path."""
    module = attention(batch_first=True)
    rows = [torch.randn(n, E) for n in (5, 3)]
    nested = torch.nested.as_nested_tensor(rows)
    with torch.no_grad():
        plain = module(nested, nested, nested, need_weights=False)[0]
        with capture(module, **EVERYTHING) as cap:
            output = module(nested, nested, nested, need_weights=False)[0]
        expected = [module(row[None], row[None], row[None], average_attn_weights=False)[1] for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(plain.unbind(), output.unbind(), strict=True))
    for row, (weights, n) in enumerate(zip(expected, (5, 3), strict=True)):
        np.testing.assert_allclose(cap.maps[""].values[0, row, :, :n, :n], weights[0], atol=1e-5)
    assert cap.sites[0].check < 1e-5


@pytest.mark.parametrize("grad", [True, False], ids=["slow", "fast"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_layer_has_a_self_and_a_cross_site(grad, batch_first):
    module = sharpened(nn.TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=batch_first))
    shape = ((B, T), (B, S)) if batch_first else ((T, B), (S, B))
    x, memory = (torch.randn(*s, E) for s in shape)
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T),
        "tgt_is_causal": True,
        "memory_key_padding_mask": PADDING,
    }
    expected = weights_of(module, x, memory, **options)
    with torch.set_grad_enabled(grad):
        plain = module(x, memory, **options)
        with capture(module, **EVERYTHING) as cap:
            output = module(x, memory, **options)
    assert torch.equal(plain, output)
    assert {site.name: str(site.tag) for site in cap.sites} == {"self_attn": "self", "multihead_attn": "cross"}
    for name, array in cap.maps.items():
        np.testing.assert_allclose(array.values[0], expected[name], atol=1e-5)


# ---- the path that torch takes


def test_the_users_own_hook_keeps_its_effect(paths):
    module = layer()
    seen = []
    handle = module.linear1.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(B, T, E)
    with torch.no_grad():
        plain = module(x)
        cap, _ = captured(module, x)
        assert torch.equal(plain, module(x))
    handle.remove()
    assert len(seen) == 4
    assert "_transformer_encoder_layer_fwd" not in paths
    assert cap.sites[0].kernel == "native_multi_head_attention"


def test_a_torch_function_mode_of_the_users_keeps_its_effect(paths):
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    module = layer()
    x = torch.randn(B, T, E)
    with torch.no_grad(), Mode():
        cap, maps = captured(module, x)
    assert "_transformer_encoder_layer_fwd" not in paths
    assert cap.sites[0].kernel == "multi_head_attention"
    torch.testing.assert_close(maps, weights_of(module, x)["self_attn"], atol=1e-5, rtol=0)


def test_the_switch_of_the_fast_path_is_left_as_found():
    module = layer()
    x = torch.randn(B, T, E)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            cap, _ = captured(module, x)
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert cap.sites[0].kernel == "multi_head_attention"


def test_sdpa_inside_is_not_counted_a_second_time():
    module = attention()
    x = torch.randn(T, B, E)
    cap, _ = captured(module, x, x, x, need_weights=False)
    assert [site.kernel for site in cap.sites] == ["multi_head_attention"]


def test_captures_nest_on_a_layer_and_a_failing_forward_leaves_nothing():
    module = layer()
    x = torch.randn(B, T, E)
    with torch.no_grad():
        with capture(module, **EVERYTHING) as outer:
            with capture(module, **EVERYTHING) as inner:
                module(x)
            module(x)
        assert (outer.maps["self_attn"].sizes["call"], inner.maps["self_attn"].sizes["call"]) == (2, 1)
        with pytest.raises(RuntimeError, match="embed_dim"), capture(module, **EVERYTHING) as cap:
            module(torch.randn(B, T, E + 1))
    assert not cap.listening
    assert "forward" not in vars(module)


def test_a_layers_own_forward_attribute_is_put_back():
    module = layer()
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate does
    mine = module.forward
    x = torch.randn(B, T, E)
    with torch.no_grad():
        captured(module, x)
    assert module.forward is mine


@pytest.mark.parametrize("fast", [True, False])
def test_calls_that_are_not_chosen_cost_no_projection(monkeypatch, fast):
    for name in ("_project", "_project_native"):
        monkeypatch.setattr(projections, name, lambda *_: pytest.fail("projected"))
    module = layer()
    with (
        torch.set_grad_enabled(not fast),
        pytest.raises(NothingCaptured, match="tagged self, not in kinds"),
        capture(module, keep="full"),
    ):
        module(torch.randn(B, T, E))


# ---- names held by value


def test_functions_imported_by_value_are_captured_and_restored(paths):
    importer = types.ModuleType("a_models_own_attention")
    importer.forward_of = F.multi_head_attention_forward
    importer.native = torch._native_multi_head_attention
    before = dict(vars(importer))
    sys.modules[importer.__name__] = importer

    class Own(nn.MultiheadAttention):
        def forward(self, x, fast):
            if fast:
                weights = self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias
                return importer.native(x, x, x, E, H, *weights, need_weights=True, average_attn_weights=False)
            weights = self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0
            return importer.forward_of(
                x, x, x, E, H, *weights, self.out_proj.weight, self.out_proj.bias, average_attn_weights=False
            )

    module = sharpened(Own(E, H, batch_first=True))
    x = torch.randn(B, T, E)
    try:
        with torch.no_grad():
            for fast in (True, False):
                cap, maps = captured(module, x, fast)
                torch.testing.assert_close(maps, module(x, fast)[1], atol=1e-5, rtol=0)
                assert cap.sites[0].tag == "self"
        assert dict(vars(importer)) == before
    finally:
        del sys.modules[importer.__name__]


# ---- the check


@pytest.mark.parametrize("mistake", ["scale", "rolled keys", "swapped heads", "lost mask"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_check_catches_a_misread_call(monkeypatch, mistake, fast):
    """Both projections are seen only after the output projection, the encoder layer's after its norms and feed-forward."""
    name = "_project_native" if fast else "_project"
    project = getattr(projections, name)

    def misread(*args):
        heads = project(*args)
        change = {
            "scale": {"query": heads.query * 1.1},
            "rolled keys": {"key": heads.key.roll(1, -2)},
            "swapped heads": {"query": heads.query.flip(1)},
            "lost mask": {"mask": None},
        }[mistake]
        return dataclasses.replace(heads, **change)

    monkeypatch.setattr(projections, name, misread)
    module = layer() if fast else attention(batch_first=True)
    x = torch.randn(B, T, E)
    options = {("src_key_padding_mask" if fast else "key_padding_mask"): PADDING[:, :T]}
    with torch.no_grad(), pytest.raises(CheckColumnError, match="asked again"), capture(module, **EVERYTHING):
        module(x, **options) if fast else module(x, x + 1, x + 2, **options)


# ---- edits


class Editor:
    """Scales one key's values, as a reweighting of a word does."""

    listening = True

    def __init__(self, position, factor):
        self.position, self.factor = position, factor
        self.adapters = {}

    def observe(self, function, args, kwargs, output):
        kernel = self.adapters[function]
        call = kernel.read(function, kernel.bind(function, args, kwargs), output).prepared()
        change = torch.zeros_like(call.value)
        change[:, :, self.position] = call.value[:, :, self.position] * (self.factor - 1)
        return Edited(call.again(change), call.restore, call.output)

    def run(self, module, *args, **kwargs):
        with ExitStack() as stack:
            for key in intercept(manager().collect("aiba_kernels"), module.modules(), self.adapters):
                stack.callback(PATCHES.release, key)
            token = ACTIVE.set((self,))
            stack.callback(ACTIVE.reset, token)
            return module(*args, **kwargs)


def attended(module, probabilities, values, factor):
    """The module's output [batch, Tq, channels] from [batch, heads, Tq, Tk], with key 2 scaled."""
    weight, bias = module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :]
    v = F.linear(values, weight, bias).unflatten(-1, (H, -1)).transpose(1, 2).clone()
    v[:, :, 2] *= factor
    return module.out_proj((probabilities @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_an_edit_of_attention(fast, weights):
    module = attention(batch_first=True)
    x = torch.randn(B, T, E)
    with torch.set_grad_enabled(not fast):
        plain, probabilities = module(x, x, x, average_attn_weights=False)
        same, _ = Editor(2, 1.0).run(module, x, x, x, need_weights=weights)
        edited, shown = Editor(2, -1.5).run(module, x, x, x, need_weights=weights, average_attn_weights=False)
    assert torch.equal(same, module(x, x, x, need_weights=weights)[0] if not fast else plain)
    torch.testing.assert_close(edited, attended(module, probabilities, x, -1.5), atol=1e-5, rtol=0)
    assert (shown is not None) is weights
    if not fast:
        assert edited.requires_grad


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_an_edit_of_an_encoder_layer(paths, norm_first, nested):
    module = layer(norm_first=norm_first)
    x = torch.randn(B, T, E)
    lengths = [T, 4, 5] if nested else [T] * B
    given = torch.nested.as_nested_tensor([row[:n] for row, n in zip(x, lengths, strict=True)]) if nested else x
    with torch.no_grad():
        plain = module(given)
        same = Editor(2, 1.0).run(module, given)
        edited = Editor(2, -1.5).run(module, given)
        assert paths.count("_transformer_encoder_layer_fwd") == 3
        for row, n in enumerate(lengths):
            alone = x[row : row + 1, :n]
            assert torch.equal(same[row], plain[row])
            entering = module.norm1(alone) if norm_first else alone
            probabilities = module.self_attn(entering, entering, entering, average_attn_weights=False)[1]
            state = alone + attended(module.self_attn, probabilities, entering, -1.5)
            if norm_first:
                expected = state + module._ff_block(module.norm2(state))
            else:
                state = module.norm1(state)
                expected = module.norm2(state + module._ff_block(state))
            torch.testing.assert_close(edited[row], expected[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_adapters_conform_and_can_be_edited(norm_first):
    """The kit: shapes, linearity, the reference, restoration; an edit that changes nothing returns the very output."""
    x = torch.randn(B, T, E)
    module = attention()
    reference = module(x.transpose(0, 1), *[x.transpose(0, 1)] * 2, average_attn_weights=False)[1].detach()
    figures = check_kernel(MultiHeadAttention(), lambda: module(*[x.transpose(0, 1)] * 3), probabilities=reference)
    assert figures["check"] < 1e-5
    module = layer(norm_first=norm_first)
    reference = weights_of(module, x)["self_attn"]
    with torch.no_grad():
        figures = check_kernel(TransformerEncoderLayer(), lambda: module(x), probabilities=reference)
    assert figures["check"] < 1e-5
