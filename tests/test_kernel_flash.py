"""FlashAttention 2, 3 and 4, and SageAttention.

They need a GPU. These tests run stand-in modules of the exact signatures (flash_attn 2.8.3, flash_attn_interface 3.0,
flash_attn.cute of 2026, sageattention 1.0.6 and 2.2), computed by plain softmax, through the real adapters. Where triton and
sageattention are installed (``pip install --no-deps triton sageattention==1.0.6``), SageAttention's own code runs interpreted."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from aiba_hooks import capture
from aiba_hooks.interception import ACTIVE, PATCHES
from aiba_hooks.testing import check_kernel
from aiba_plugins.kernels import flash_attention, sage_attention
from aiba_plugins.kernels.flash_attention import FlashAttention
from aiba_plugins.kernels.sage_attention import PackedSageAttention, SageAttention


@pytest.fixture(autouse=True)
def _nothing_left():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert ACTIVE.get() == ()
    assert not PATCHES._table


# ---- attention by hand


def probabilities(q, k, scale=None, causal=False, window=(-1, -1), softcap=0.0, alibi=None):
    """One sequence: q [Tq, H, D], k [Tk, Hk, D] to [H, Tq, Tk], zero where a query has no key.

    As FlashAttention documents it: causal and windows are aligned to the bottom right corner.
    """
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("qhd,khd->hqk", q.float(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    # of each key, how far it lies behind the query's own place
    ahead = torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None] - (k.shape[0] - q.shape[0])
    if alibi is not None:
        logits = logits - alibi[:, None, None] * ahead.abs()
    left, right = (-1 if side is None else side for side in window)
    right = 0 if causal else right
    hidden = ((ahead > right) if right >= 0 else torch.zeros_like(ahead, dtype=torch.bool)) | (
        (ahead < -left) if left >= 0 else torch.zeros_like(ahead, dtype=torch.bool)
    )
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num()


def options_of(given):
    slopes = given.get("alibi_slopes")
    names = ("softmax_scale", "causal", "window_size", "softcap")
    options = dict(zip(("scale", "causal", "window", "softcap"), (given.get(name) for name in names), strict=True))
    return {**options, "softcap": options["softcap"] or 0.0}, slopes


def sequence(given, q, k, v, row):
    options, slopes = options_of(given)
    alibi = None if slopes is None else slopes[row] if slopes.ndim == 2 else slopes
    weights = torch.nn.functional.dropout(probabilities(q, k, alibi=alibi, **options), given.get("dropout_p") or 0.0)
    values = v.float()
    if given.get("v_descale") is not None:
        values = values * given["v_descale"][row][:, None]
    output = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return output.to(torch.bfloat16 if q.element_size() == 1 else q.dtype)


def parts(given):
    if "qkv" in given:
        qkv, heads = given["qkv"], given.get("num_heads_q")
        if qkv.ndim == 4 and heads is not None:
            shared = (qkv.shape[-2] - heads) // 2
            return qkv[..., :heads, :], qkv[..., heads : heads + shared, :], qkv[..., heads + shared :, :]
        return (qkv[..., i, :, :] for i in range(3))
    if "kv" in given:
        return given["q"], given["kv"][..., 0, :, :], given["kv"][..., 1, :, :]
    return given["q"], given["k"], given["v"]


def compute(given):
    """What the kernels compute; outputs that variable-length kernels do not write are garbage, as theirs are."""
    q, k, v = parts(given)
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype
    if given.get("cu_seqlens_q", given.get("cu_seqlens")) is None:
        return torch.stack([sequence(given, *rows, i) for i, rows in enumerate(zip(q, k, v, strict=True))])
    output = torch.full((*q.shape[:-1], v.shape[-1]), 777.0)
    starts = [given.get(f"cu_seqlens_{side}", given.get("cu_seqlens")).tolist() for side in "qk"]
    used = [given.get(f"seqused_{side}") for side in "qk"]
    for i in range(len(starts[0]) - 1):
        (a, b), (c, d) = (
            (s[i], s[i + 1] if u is None else s[i] + int(u[i])) for s, u in zip(starts, used, strict=True)
        )
        output[a:b] = sequence(given, q[a:b], k[c:d], v[c:d], i)
    return output


# ---- the stand-ins


def signed(name, parameters, body):
    """A function of this signature. ``body`` gets its bound arguments."""
    signature = inspect.signature(eval(f"lambda {parameters}: 0"))

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(dict(bound.arguments))

    function.__name__, function.__signature__ = name, signature
    return function


def flash(given):
    output = compute(given)
    if given.get("return_attn_probs"):  # version 2 returns three, version 3 two
        return (output, torch.zeros(1), None) if "dropout_p" in given else (output, torch.zeros(1))
    return (output, torch.zeros(1)) if given.get("return_lse") else output


def cached(given):
    """Appends to the cache, as the real one does."""
    if given["k"] is not None:
        given["k_cache"][:, : given["k"].shape[1]] = given["k"]
    return compute({**given, "k": given["k_cache"], "v": given["v_cache"]})


_TWO = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_THREE = (
    "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
)
_FOUR = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, "
    "return_lse=False"
)
SIGNATURES = {
    "flash_attn": {
        "flash_attn_func": f"q, k, v, {_TWO}",
        "flash_attn_kvpacked_func": f"q, kv, {_TWO}",
        "flash_attn_qkvpacked_func": f"qkv, {_TWO}",
        "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, {_TWO}, block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q, kv, {_LENGTHS}, {_TWO}",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_TWO}",
        "flash_attn_with_kvcache": (
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
            "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
            "return_softmax_lse=False"
        ),
    },
    "flash_attn_interface": {
        "flash_attn_func": f"q, k, v, {_THREE}",
        "flash_attn_qkvpacked_func": (
            "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, "
            "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, "
            "return_attn_probs=False"
        ),
        "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, seqused_q=None, seqused_k=None, {_THREE}",
    },
    "flash_attn.cute": {
        "flash_attn_func": f"q, k, v, qv=None, gather_kv_indices=None, {_FOUR}",
        "flash_attn_varlen_func": (
            "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
            f"min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, {_FOUR}"
        ),
    },
}


@pytest.fixture
def libraries(monkeypatch):
    """The stand-ins, imported: module name to module."""
    made = {}
    for path, functions in SIGNATURES.items():
        made[path] = module = types.ModuleType(path)
        for name, parameters in functions.items():
            setattr(module, name, signed(name, parameters, cached if "kvcache" in name else flash))
        monkeypatch.setitem(sys.modules, path, module)
    return made


class Model(nn.Module):
    """Calls ``library.name`` with tensors by position or keyword, and options by keyword."""

    def __init__(self, library, name, **options):
        super().__init__()
        self.library, self.name, self.options = library, name, options

    def forward(self, *tensors):
        return getattr(self.library, self.name)(*tensors, **self.options)


def only(library, name, *tensors, **options):
    """Maps [B, H, Tq, Tk] of one call and its site; the output is unchanged and the function restored."""
    model = Model(library, name, **options)
    before = vars(library)[name]
    plain = model(*tensors)
    with capture(model, keep="full", kinds=("cross", "self", "unknown"), heads="all") as cap:
        assert vars(library)[name] is not before
        output = model(*tensors)
    assert vars(library)[name] is before
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (plain, output)), strict=True):
        assert a is b is None or torch.equal(a, b)
    (site,) = cap.sites
    assert site.calls == 1
    return torch.from_numpy(cap.maps[""].values[0]), site


def batch(heads=4, kv_heads=4, queries=5, keys=7, dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


QUERIES, KEYS = [3, 1, 4], [2, 5, 4]


def packed(heads=4, kv_heads=4, queries=QUERIES, keys=KEYS, dim=8):
    """Sequences laid end to end, and the arguments that say so."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(queries), heads, dim), (sum(keys), kv_heads, dim), (sum(keys), kv_heads, dim))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    starts = [torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32) for lengths in (queries, keys)]
    lengths = {
        **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True)),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
    }
    return tensors, lengths


def by_sequence(q, k, queries=QUERIES, keys=KEYS, **options):
    """Maps of each sequence, zero-padded to the longest, by hand."""
    padded = torch.zeros(len(queries), q.shape[1], max(queries), max(keys))
    for row, one, other in zip(padded, q.split(queries), k.split(keys), strict=True):
        row[:, : one.shape[0], : other.shape[0]] = probabilities(one, other, **options)
    return padded


def by_batch(q, k, **options):
    return torch.stack([probabilities(one, other, **options) for one, other in zip(q, k, strict=True)])


# ---- whole batches

OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (3, 0)},
    "softcap": {"softcap": 1.5},
}


def hand(options):
    names = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "alibi"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("library", SIGNATURES)
def test_batches(libraries, library, options):
    q, k, v = batch(kv_heads=2)
    maps, site = only(libraries[library], "flash_attn_func", q, k, v, **options)
    np.testing.assert_allclose(maps, by_batch(q, k, **hand(options)), atol=1e-6)
    assert (site.kernel, site.key_shape) == ("flash_attention:flash_attn_func", (2, 2, 7, 8))


def test_causal_is_aligned_to_the_bottom_right_and_a_query_without_keys_has_no_attention(libraries):
    q, k, v = batch(queries=5, keys=2)
    maps, site = only(libraries["flash_attn"], "flash_attn_func", q, k, v, causal=True)
    assert maps[:, :, :3].abs().max() == 0
    np.testing.assert_allclose(maps[:, :, 3], torch.tensor([1.0, 0.0]).expand(2, 4, 2), atol=1e-6)
    assert site.row_sum == (0, pytest.approx(1))
    np.testing.assert_allclose(maps, by_batch(q, k, causal=True), atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["per head", "per sequence and head"])
def test_alibi_slopes(libraries, shape):
    slopes = torch.rand(shape)
    q, k, v = batch()
    maps, _ = only(libraries["flash_attn"], "flash_attn_func", q, k, v, alibi_slopes=slopes)
    for row in range(2):
        alibi = slopes if slopes.ndim == 1 else slopes[row]
        np.testing.assert_allclose(maps[row], probabilities(q[row], k[row], alibi=alibi), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"causal": True, "softmax_scale": 0.7}], ids=["plain", "causal, scale"])
def test_packed_tensors(libraries, options):
    q, k, v = batch(kv_heads=2)
    expected = by_batch(q, k, **hand(options))
    maps, _ = only(libraries["flash_attn"], "flash_attn_kvpacked_func", q, torch.stack([k, v], 2), **options)
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    q, k, v = batch(queries=7)
    expected = by_batch(q, k, **hand(options))
    for library in ("flash_attn", "flash_attn_interface"):
        maps, _ = only(libraries[library], "flash_attn_qkvpacked_func", torch.stack([q, k, v], 2), **options)
        np.testing.assert_allclose(maps, expected, atol=1e-6)
    q, k, v = batch(queries=7, kv_heads=2)
    qkv = torch.cat([q, k, v], 2)
    maps, site = only(libraries["flash_attn_interface"], "flash_attn_qkvpacked_func", qkv, num_heads_q=4, **options)
    np.testing.assert_allclose(maps, by_batch(q, k, **hand(options)), atol=1e-6)
    assert site.key_shape[1] == 2


def test_tuple_outputs(libraries):
    q, k, v = batch()
    for library, option in (
        ("flash_attn", "return_attn_probs"),
        ("flash_attn_interface", "return_attn_probs"),
        ("flash_attn.cute", "return_lse"),
    ):
        assert isinstance(libraries[library].flash_attn_func(q, k, v, **{option: True}), tuple)
        maps, _ = only(libraries[library], "flash_attn_func", q, k, v, **{option: True})
        np.testing.assert_allclose(maps, by_batch(q, k), atol=1e-6)


def test_dropout_is_off_in_the_second_call(libraries):
    q, k, v = batch()
    model = Model(libraries["flash_attn"], "flash_attn_func", dropout_p=0.5)
    torch.manual_seed(1)
    plain = [model(q, k, v), torch.rand(2)]
    torch.manual_seed(1)
    with capture(model, keep="full", heads="all") as cap:
        captured = [model(q, k, v), torch.rand(2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    np.testing.assert_allclose(cap.maps[""].values[0], by_batch(q, k), atol=1e-6)


@pytest.mark.parametrize("name", ["q, k, v", "q, kv", "qkv"])
def test_tensors_by_keyword(libraries, name):
    q, k, v = batch(queries=7)
    tensors = {"q": q, "k": k, "v": v, "kv": torch.stack([k, v], 2), "qkv": torch.stack([q, k, v], 2)}
    function = {"q, k, v": "flash_attn_func", "q, kv": "flash_attn_kvpacked_func", "qkv": "flash_attn_qkvpacked_func"}
    given = {part: tensors[part] for part in name.split(", ")}
    maps, _ = only(libraries["flash_attn"], function[name], **given)
    np.testing.assert_allclose(maps, by_batch(q, k), atol=1e-6)


def test_eight_bit_values_and_their_scale(libraries):
    """Version 3 multiplies the values of a head by ``v_descale``: selectors are asked without it."""
    q, k, v = (x.to(torch.float8_e4m3fn) for x in batch(kv_heads=2, dim=16))
    scale = torch.rand(2, 2) + 0.5
    maps, site = only(libraries["flash_attn_interface"], "flash_attn_func", q, k, v, v_descale=scale)
    np.testing.assert_allclose(maps, by_batch(q, k), atol=4e-3)  # answers are bfloat16
    assert site.check < 1e-2


# ---- packed sequences


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("library", SIGNATURES)
def test_variable_lengths_are_maps_of_each_sequence(libraries, library, options):
    (q, k, v), lengths = packed(kv_heads=2)
    maps, site = only(libraries[library], "flash_attn_varlen_func", q, k, v, **lengths, **options)
    np.testing.assert_allclose(maps, by_sequence(q, k, **hand(options)), atol=1e-6)
    assert site.query_shape == (3, 4, 4, 8)
    assert site.key_shape == (3, 2, 5, 8)
    assert site.check < 1e-5


def test_variable_lengths_of_packed_tensors(libraries):
    (q, k, v), lengths = packed(kv_heads=2)
    library = libraries["flash_attn"]
    maps, _ = only(library, "flash_attn_varlen_kvpacked_func", q, torch.stack([k, v], 1), **lengths, causal=True)
    np.testing.assert_allclose(maps, by_sequence(q, k, causal=True), atol=1e-6)
    (q, k, v), lengths = packed(queries=KEYS)
    starts = {"cu_seqlens": lengths["cu_seqlens_k"], "max_seqlen": 5}
    maps, _ = only(library, "flash_attn_varlen_qkvpacked_func", torch.stack([q, k, v], 1), **starts, causal=True)
    np.testing.assert_allclose(maps, by_sequence(q, k, KEYS, KEYS, causal=True), atol=1e-6)


def test_rows_that_a_variable_length_kernel_does_not_use_or_write(libraries):
    """Version 3: sequences shorter than their place. What lies behind them is garbage, and stays out of maps and check."""
    (q, k, v), lengths = packed()
    used = {
        "seqused_q": torch.tensor([2, 1, 3], dtype=torch.int32),
        "seqused_k": torch.tensor([2, 3, 4], dtype=torch.int32),
    }
    library = libraries["flash_attn_interface"]
    maps, site = only(library, "flash_attn_varlen_func", q, k, v, **lengths, **used)
    for row, (i, j, one, other) in enumerate(zip((2, 1, 3), (2, 3, 4), q.split(QUERIES), k.split(KEYS), strict=True)):
        np.testing.assert_allclose(maps[row, :, :i, :j], probabilities(one[:i], other[:j]), atol=1e-6)
        assert maps[row, :, i:].abs().sum() == maps[row, :, :, j:].abs().sum() == 0
    assert site.check < 1e-5


def test_lengths_that_are_not_given_are_computed(libraries):
    (q, k, v), lengths = packed()
    lengths = {name: value for name, value in lengths.items() if name.startswith("cu")}
    maps, _ = only(libraries["flash_attn.cute"], "flash_attn_varlen_func", q, k, v, **lengths)
    np.testing.assert_allclose(maps, by_sequence(q, k), atol=1e-6)


# ---- refused by name


def test_what_cannot_be_asked_again_is_refused_by_name(libraries):
    q, k, v = batch()
    two, three = libraries["flash_attn"], libraries["flash_attn_interface"]
    (pq, pk, pv), lengths = packed()
    refused = [
        (Model(three, "flash_attn_func", qv=q), (q, k, v), "scores read the values"),
        (
            Model(two, "flash_attn_varlen_func", **lengths, block_table=k),
            (pq, pk, pv),
            "paged key-value cache .block_table",
        ),
        (
            Model(two, "flash_attn_with_kvcache"),
            (q, k.clone(), v),
            "with_kvcache: attention that writes into a key-value",
        ),
        (Model(libraries["flash_attn.cute"], "flash_attn_varlen_func", seqused_q=k), (q, k, v), "written in part"),
    ]
    for model, tensors, message in refused:
        with pytest.raises(NotImplementedError, match=message), capture(model, keep="full"):
            model(*tensors)


def test_a_cache_is_appended_to_once(libraries):
    q, cache, v = batch()
    new = torch.randn(2, 1, 4, 8)
    appended = []
    library = libraries["flash_attn"]
    original = library.flash_attn_with_kvcache
    library.flash_attn_with_kvcache = signed(
        "flash_attn_with_kvcache",
        SIGNATURES["flash_attn"]["flash_attn_with_kvcache"],
        lambda given: appended.append(1) or original(**given),
    )
    model = Model(library, "flash_attn_with_kvcache", k=new, v=new)
    with pytest.raises(NotImplementedError, match="use_cache=False"), capture(model, keep="full"):
        model(q, cache, v)
    assert appended == [1]


# ---- importers, edits, mistakes


def test_importers_by_value_are_captured_and_restored(libraries, monkeypatch):
    """diffusers and stable-audio-tools import the function by name."""
    importer = types.ModuleType("a_models_own_file")
    importer.flash_attn_func = original = libraries["flash_attn"].flash_attn_func
    monkeypatch.setitem(sys.modules, importer.__name__, importer)
    q, k, v = batch()
    maps, _ = only(importer, "flash_attn_func", q, k, v)
    assert importer.flash_attn_func is original
    np.testing.assert_allclose(maps, by_batch(q, k), atol=1e-6)


@pytest.mark.parametrize("case", ["batch", "kvpacked", "packed", "eight bits", "tuple"])
def test_an_edited_output_goes_back_in_the_calls_layout(libraries, case):
    kernel, options = FlashAttention(), {}
    library, name, tensors = "flash_attn", "flash_attn_func", batch()
    if case == "kvpacked":
        name, tensors = "flash_attn_kvpacked_func", [tensors[0], torch.stack(tensors[1:], 2)]
    elif case == "packed":
        name, (tensors, options) = "flash_attn_varlen_func", packed()
    elif case == "eight bits":
        library, options = "flash_attn_interface", {"v_descale": torch.rand(2, 4) + 0.5}
        tensors = [x.to(torch.float8_e4m3fn) for x in tensors]
    elif case == "tuple":
        options = {"return_attn_probs": True}
    function = getattr(libraries[library], name)
    output = function(*tensors, **options)
    call = kernel.read(function, kernel.bind(function, tuple(tensors), options), output)
    edited = call.restore(call.again(2 * call.value))
    if case == "tuple":
        assert edited[1:] == output[1:]
        edited, output = edited[0], output[0]
    torch.testing.assert_close(
        edited.float(), 2 * output.float(), rtol=2e-2, atol=2e-2 if case == "eight bits" else 1e-5
    )


# ---- SageAttention

_SAGE = "tensor_layout='HND', {}is_causal=False, sm_scale=None, {}**kwargs"
SAGE = {
    "sageattn": "q, k, v, " + _SAGE.format("", "return_lse=False, "),
    "sageattn_qk_int8_pv_fp16_triton": (
        "q, k, v, tensor_layout='HND', quantization_backend='triton', is_causal=False, attn_mask=None, sm_scale=None, "
        "smooth_k=True, return_lse=False, **kwargs"
    ),
    "sageattn_qk_int8_pv_fp16_cuda": (
        "q, k, v, tensor_layout='HND', is_causal=False, qk_quant_gran='per_thread', sm_scale=None, "
        "pv_accum_dtype='fp32', smooth_k=True, smooth_v=False, return_lse=False, **kwargs"
    ),
    "sageattn_qk_int8_pv_fp8_cuda": (
        "q, k, v, tensor_layout='HND', is_causal=False, qk_quant_gran='per_thread', sm_scale=None, "
        "pv_accum_dtype='fp32+fp16', smooth_k=True, smooth_v=False, return_lse=False, **kwargs"
    ),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": (
        "q, k, v, tensor_layout='HND', is_causal=False, qk_quant_gran='per_thread', sm_scale=None, "
        "pv_accum_dtype='fp32+fp32', smooth_k=True, return_lse=False, **kwargs"
    ),
    # version 1
    "sageattn_1": "q, k, v, tensor_layout='HND', is_causal=False, sm_scale=None, smooth_k=True, **kwargs",
}
_BLACKWELL = "q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs"
_SAGE_PACKED = f"q, k, v, {_LENGTHS}, is_causal=False, sm_scale=None, smooth_k=True, **kwargs"


def sage(given):
    """Values of 8 bits with a scale per channel, as version 2 has them; the key loses its mean in place, as in 1 and 3."""
    v = given["v"]
    packed_sequences = "cu_seqlens_q" in given
    tokens = 0 if packed_sequences else 1 if given.get("tensor_layout") == "NHD" else 2
    given["k"] -= given["k"].mean(tokens, keepdim=True)
    scale = v.abs().amax(tokens, keepdim=True).clamp_min(1e-9) / 448
    v = (v / scale).to(torch.float8_e4m3fn).to(v.dtype) * scale
    flat = {
        **{name: given[name] for name in ("q", "k")},
        "v": v,
        "softmax_scale": given.get("sm_scale"),
        "causal": given["is_causal"],
        "window_size": (-1, -1),
        "softcap": 0.0,
        **{name: given[name] for name in given if name.startswith("cu_")},
    }
    if packed_sequences or given.get("tensor_layout") == "NHD":
        output = compute(flat)
    else:
        output = compute({**flat, **{name: flat[name].transpose(1, 2) for name in "qkv"}}).transpose(1, 2)
    return (output, torch.zeros(1)) if given.get("return_lse") else output


@pytest.fixture
def sageattention(monkeypatch):
    module = types.ModuleType("sageattention")
    for name, parameters in SAGE.items():
        setattr(module, name, signed(name, parameters, sage))
    module.sageattn_varlen = signed("sageattn_varlen", _SAGE_PACKED, sage)
    monkeypatch.setitem(sys.modules, "sageattention", module)
    return module


def sage_maps(model, q, k, v):
    """Maps, site and the model's own output; captured and not, from fresh keys, for the kernel changes them."""
    keys = [k.clone(), k.clone()]
    plain = model(q, keys[0], v)
    with capture(model, keep="full", heads="all", kinds=("cross", "unknown")) as cap:
        output = model(q, keys[1], v)
    plain, output = (x[0] if isinstance(x, tuple) else x for x in (plain, output))
    assert torch.equal(plain, output)
    assert torch.equal(*keys), "asking again moved the model's own keys"
    (site,) = cap.sites
    return torch.from_numpy(cap.maps[""].values[0]), site


@pytest.mark.parametrize("version_1", [False, True], ids=["2.x", "1.x"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "sm_scale": 0.4}], ids=["plain", "causal, scale"])
def test_sage_layouts_and_versions(sageattention, layout, options, version_1):
    if version_1:
        sageattention.sageattn = sageattention.sageattn_1
    q, k, v = batch(queries=7, kv_heads=2)
    expected = by_batch(q, k, scale=options.get("sm_scale"), causal=options.get("is_causal", False))
    if layout == "HND":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    model = Model(sageattention, "sageattn", tensor_layout=layout, **options)
    maps, site = sage_maps(model, q, k, v)
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert site.key_shape == (2, 2, 7, 8)
    assert site.check < sage_attention.TOLERANCE


@pytest.mark.parametrize("name", [name for name in SAGE if name != "sageattn_1"])
@pytest.mark.parametrize("lse", [False, True])
def test_every_sage_function(sageattention, name, lse):
    q, k, v = (x.transpose(1, 2) for x in batch())
    maps, site = sage_maps(Model(sageattention, name, return_lse=lse), q, k, v)
    np.testing.assert_allclose(maps, by_batch(q.transpose(1, 2), k.transpose(1, 2)), atol=1e-5)
    assert site.kernel == f"sage_attention:{name}"


def test_sage_of_packed_sequences(sageattention):
    (q, k, v), lengths = packed(kv_heads=2)
    model = Model(sageattention, "sageattn_varlen", **lengths)
    maps, site = sage_maps(model, q, k, v)
    np.testing.assert_allclose(maps, by_sequence(q, k), atol=1e-5)
    assert site.check < sage_attention.TOLERANCE


def test_sage_3(monkeypatch):
    module = types.ModuleType("sageattn3")
    module.sageattn3_blackwell = signed("sageattn3_blackwell", _BLACKWELL, sage)
    monkeypatch.setitem(sys.modules, "sageattn3", module)
    q, k, v = (x.transpose(1, 2) for x in batch())
    maps, _ = sage_maps(Model(module, "sageattn3_blackwell"), q, k, v)
    np.testing.assert_allclose(maps, by_batch(q.transpose(1, 2), k.transpose(1, 2)), atol=1e-5)


REAL_SAGE = """
import json, sageattention, torch
from aiba_hooks import capture

class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=True)

torch.manual_seed(0)
q, k, v = (torch.randn(1, 70, 2, 64) for _ in range(3))
first, second = k.clone(), k.clone()
plain = Model()(q, first, v)
with capture(Model(), keep="full", heads="all", kinds=("unknown",)) as cap:
    output = cap.target(q, second, v)
logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
expected = logits.masked_fill(~torch.ones(70, 70).tril().bool(), float("-inf")).softmax(-1)
error = float((torch.from_numpy(cap.maps[""].values[0]) - expected).abs().max())
same = torch.equal(plain, output) and torch.equal(first, second)
print(json.dumps({"same": same, "moved": not torch.equal(first, k), "error": error, "check": cap.sites[0].check}))
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sageattention", "triton")),
    reason="sageattention 1.0.6 and triton are not installed",
)
def test_the_real_sage_attention_interpreted():
    """Its Triton kernels run on CPU tensors under the interpreter; -O takes out its assertions that they are on a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-O", "-c", REAL_SAGE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["same"]
    assert found["moved"]  # the key lost its mean in place, in the model's own call
    assert found["error"] < 0.03  # queries and keys have 8 bits
    assert found["check"] < 1e-3


def test_sages_edited_output_goes_back_in_the_calls_layout(sageattention):
    q, k, v = batch(queries=7)
    (pq, pk, pv), lengths = packed()
    for kernel, function, tensors, options in (
        (SageAttention(), sageattention.sageattn, (q, k, v), {"tensor_layout": "NHD", "return_lse": True}),
        (PackedSageAttention(), sageattention.sageattn_varlen, (pq, pk, pv), lengths),
    ):
        output = function(*tensors, **options)
        call = kernel.read(function, kernel.bind(function, tensors, options), output)
        edited = call.restore(call.again(2 * call.value))
        edited, output = (x[0] if isinstance(x, tuple) else x for x in (edited, output))
        torch.testing.assert_close(edited, 2 * output)


def test_every_function_is_bound_wherever_it_can_be_looked_up():
    bound = set(FlashAttention.bindings)
    for path, functions in SIGNATURES.items():
        for name in functions:
            if "kvcache" not in name:
                assert f"{path}:{name}" in bound
    assert "flash_attn.flash_attn_interface:flash_attn_func" in bound
    assert "flash_attn:flash_attn_with_kvcache" in flash_attention.FlashCache.bindings
    assert {f"sageattention:{name}" for name in SAGE if name != "sageattn_1"} <= set(SageAttention.bindings)


@pytest.mark.parametrize("library", SIGNATURES)
def test_the_adapter_conforms(libraries, library):
    q, k, v = batch(kv_heads=2)
    run = lambda: libraries[library].flash_attn_func(q, k, v, causal=True, softcap=1.5)  # noqa: E731
    check_kernel(FlashAttention(), run, probabilities=by_batch(q, k, causal=True, softcap=1.5))
    (q, k, v), lengths = packed(kv_heads=2)
    run = lambda: libraries[library].flash_attn_varlen_func(q, k, v, **lengths)  # noqa: E731
    check_kernel(FlashAttention(), run, probabilities=by_sequence(q, k))


def test_the_sage_adapters_conform(sageattention):
    q, k, v = (x.transpose(1, 2) for x in batch())
    # the kernel changes its key: every run has one of its own
    run = lambda: sageattention.sageattn(q, k.clone(), v)  # noqa: E731
    expected = by_batch(q.transpose(1, 2), k.transpose(1, 2))
    check_kernel(SageAttention(), run, probabilities=expected, atol=1e-4)
