"""Asking again, over shapes, masks, layouts, grouped heads, dtypes, batch sizes and groups.

The quick profile runs a few hundred cases; ``pytest tests/test_properties.py --hypothesis-profile full`` runs 2,500."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from aiba_hooks import capture
from aiba_hooks.kernels.sdpa import ScaledDotProductAttention
from aiba_hooks.selectors import columns, pool_nonlinear, received

KERNEL = ScaledDotProductAttention()


@st.composite
def attention(draw):
    """Arguments of an SDPA call and its probabilities by plain softmax in float64: [batch, heads, Tq, Tk]."""
    layout = draw(st.sampled_from(["[T, D]", "[B, T, D]", "[B, H, T, D]", "[B, G, H, T, D]"]))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dim, value_dim = draw(st.sampled_from([1, 2, 8, 16])), draw(st.sampled_from([1, 2, 8, 16]))
    batch, kv_heads, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    gqa = layout == "[B, H, T, D]" and repeat > 1
    leading = {
        "[T, D]": (),
        "[B, T, D]": (batch,),
        "[B, H, T, D]": (batch, kv_heads),
        "[B, G, H, T, D]": (batch, 2, kv_heads),
    }[layout]
    q_leading = (batch, kv_heads * repeat) if gqa else leading
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from([None, 0.2, 1.0]))
    mask_kind = draw(st.sampled_from(["none", "bool", "float", "causal", "per row"]))

    def tensor(*shape):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        if draw(st.booleans()) and len(shape) > 2:  # as heads are split in practice: a transposed view
            made = made.transpose(-2, -3).contiguous().transpose(-2, -3)
        return made

    q, k, v = tensor(*q_leading, queries, dim), tensor(*leading, keys, dim), tensor(*leading, keys, value_dim)
    options = {"scale": scale}
    if gqa:
        options["enable_gqa"] = True
    bias = torch.zeros(queries, keys, dtype=torch.float64)
    if mask_kind == "causal":
        options["is_causal"] = True
        bias = torch.full_like(bias, -math.inf).triu(1)
    elif mask_kind != "none":
        shape = (*q_leading[:1], *(1,) * (len(q_leading) - 1), 1, keys) if mask_kind == "per row" else (queries, keys)
        allowed = torch.rand(*shape, generator=generator) > 0.3
        allowed[..., 0] = True  # rows without a key are tested elsewhere
        bias = torch.zeros(shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)
        options["attn_mask"] = allowed if mask_kind == "bool" else bias.to(dtype)
    wide_k = k.double().repeat_interleave(repeat, -3) if gqa else k.double()
    scores = q.double() @ wide_k.transpose(-1, -2) * (scale if scale is not None else dim**-0.5) + bias
    probabilities = torch.softmax(scores, -1)
    four = probabilities.reshape(
        probabilities.shape[0] if probabilities.ndim > 2 else 1,
        -1 if probabilities.ndim > 3 else 1,
        *probabilities.shape[-2:],
    )
    return (q, k, v), options, four


def read(call):
    inputs, options, expected = call
    output = F.scaled_dot_product_attention(*inputs, **options)
    arguments = KERNEL.bind(F.scaled_dot_product_attention, inputs, options)
    return KERNEL.read(F.scaled_dot_product_attention, arguments, output), expected


def tolerance(call):
    return {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[call.value.dtype]


@given(attention())
def test_full_maps_are_the_softmax(inputs):
    call, expected = read(inputs)
    parts, errors = zip(*((part, error) for _, part, error in call.ask_keys()), strict=True)
    full = torch.cat(parts, -1).double()
    assert full.shape == expected.shape
    np.testing.assert_allclose(full, expected, atol=tolerance(call))
    assert float(errors[0]) <= call.allowed


@given(attention(), st.data())
def test_pooled_groups_are_sums_means_maxima_and_log_means_of_the_softmax(inputs, data):
    call, expected = read(inputs)
    rows, keys = call.value.shape[0], call.keys
    count = data.draw(st.integers(1, 5))
    groups = [
        {
            f"w{g}": sorted(data.draw(st.sets(st.integers(0, keys - 1), min_size=1)))
            for g in range(count)
            if data.draw(st.integers(0, 3))
        }
        for _ in range(rows)
    ]
    names = [f"w{g}" for g in range(count)]
    heads = lambda answer: answer.double().mean(1)  # noqa: E731
    results = {}
    for pooling in ("sum", "mean"):
        results[pooling], error = call.ask(columns(groups, names, keys, pooling), heads)
        assert float(error) <= call.allowed
    for pooling in ("max", "logmean"):
        results[pooling], _ = pool_nonlinear(call, groups, names, pooling, heads)
    for row in range(rows):
        for column, name in enumerate(names):
            positions = groups[row].get(name)
            if positions is None:
                assert float(results["sum"][row, :, column].abs().max()) == 0
                continue
            inside = expected[row].mean(0)[:, positions]
            for pooling, theirs in (("sum", inside.sum(-1)), ("mean", inside.mean(-1)), ("max", inside.amax(-1))):
                np.testing.assert_allclose(
                    results[pooling][row, :, column], theirs, atol=tolerance(call) * len(positions)
                )
            if call.value.dtype == torch.float64 and float(inside.min()) > 1e-6:
                np.testing.assert_allclose(results["logmean"][row, :, column], inside.log().mean(-1), atol=1e-4)


@given(attention())
def test_received_attention_is_the_column_mean(inputs):
    call, expected = read(inputs)
    got, _ = received(call, lambda answer: answer.double().mean(1))
    np.testing.assert_allclose(got, expected.mean(1).mean(-2), atol=tolerance(call))


@given(attention())
def test_a_call_inside_a_module_is_captured_with_its_output_untouched(inputs):
    (q, k, v), options, expected = inputs

    class Module(torch.nn.Module):
        def forward(self):
            return F.scaled_dot_product_attention(q, k, v, **options)

    module = Module()
    plain = module()
    with capture(module, keep="full", kinds=("cross", "unknown"), heads="all") as cap:
        output = module()
    assert torch.equal(output, plain)
    array = cap.maps[""].isel(call=0)
    assert array.dims == ("batch", "head", "query", "key")
    call = KERNEL.read(F.scaled_dot_product_attention, KERNEL.bind(None, (q, k, v), options), plain)
    np.testing.assert_allclose(array, expected, atol=tolerance(call))


@given(attention(), st.sampled_from(["scale", "keys", "heads", "values"]))
def test_a_misread_call_never_passes_its_check_with_wrong_maps(inputs, mistake):
    """Whatever the shapes: if the maps of a corrupted call are wrong by more than rounding, the check column says so.

    One column of values cannot see a change that leaves its own output as it was; those cases do not count."""
    (q, k, v), options, expected = inputs
    output = F.scaled_dot_product_attention(q, k, v, **options)
    if mistake == "scale":
        wrong = (q * 1.7, k, v)
    elif mistake == "keys":
        wrong = (q, k.roll(1, -2), v)
    elif mistake == "heads":
        wrong = (q.flip(0) if q.ndim == 3 else q.flip(1) if q.ndim == 4 else q, k, v)
    else:
        wrong = (q, k, v.roll(1, -2))
    call = KERNEL.read(F.scaled_dot_product_attention, KERNEL.bind(None, wrong, options), output)
    _, error = call.ask(torch.ones(1, call.keys, 1))
    four = v.reshape(*call.value.shape).double()
    repeat = expected.shape[1] // four.shape[1]
    right = expected @ four.repeat_interleave(repeat, 1)
    full = torch.cat([part for _, part, _ in call.ask_keys()], -1).double()
    moved = (full @ call.value.double().repeat_interleave(repeat, 1) - right)[..., 0].abs().amax() / right[
        ..., 0
    ].abs().amax()
    if float(moved) > 2 * call.allowed + 2 * tolerance(call):
        assert float(error) > call.allowed
