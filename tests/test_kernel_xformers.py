"""xFormers: layouts, biases and the forms of the function.

xFormers has no CPU operator. These tests run twice: with a stand-in module of the exact signatures, and, where xformers is
installed (``pip install --no-deps xformers==0.0.35`` leaves torch alone), with its real functions and bias classes, of which
only the choice of an operator is replaced. Both compute plain softmax."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_processor as processors
from torch import nn

from aiba_hooks import capture
from aiba_hooks.interception import ACTIVE, PATCHES
from aiba_hooks.testing import check_kernel
from aiba_plugins.kernels.xformers_ops import MemoryEfficientAttention

QUERIES, KEYS = [3, 1, 4], [2, 5, 3]  # lengths of three packed sequences
PADDING = 6
CPU = torch.device("cpu")


def heads_first(tensor):
    """[B, T, D], [B, T, H, D] or [B, T, G, H, D] as [B, heads, T, D]."""
    tensor = tensor[:, :, None] if tensor.ndim == 3 else tensor.flatten(2, -2) if tensor.ndim == 5 else tensor
    return tensor.transpose(1, 2)


def probabilities(query, key, bias=None, scale=None):
    """[B, heads, Tq, Tk] by hand; a query without keys has none."""
    q, k = heads_first(query), heads_first(key)
    logits = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None and not isinstance(bias, torch.Tensor):
        bias = bias.materialize(logits.shape)
    if bias is not None:
        logits = logits + bias.reshape(-1, *logits.shape[1:])
    return logits.softmax(-1).nan_to_num()


def operator(query, key, value, attn_bias=None, p=0.0, scale=None):
    """What xFormers' operators compute, in the layout of the query. Those for groups refuse values that are copies."""
    if query.ndim == 5 and query.shape[3] > 1 and key.stride(3) == 0:
        assert value.stride(3) == 0, "only heads that are expanded"
    assert value.stride(-1) == 1
    weights = torch.nn.functional.dropout(probabilities(query, key, attn_bias, scale), p)
    output = (weights @ heads_first(value)).transpose(1, 2)
    return output.reshape(*query.shape[:-1], value.shape[-1])


# ---- the stand-in, signatures as in xformers 0.0.35


@dataclasses.dataclass
class Lengths:
    starts: list
    lengths: list

    def intervals(self):
        yield from ((start, start + length) for start, length in zip(self.starts, self.lengths, strict=False))


@dataclasses.dataclass
class Block:
    """A block-diagonal bias, causal to the top left or not."""

    q_seqinfo: Lengths
    k_seqinfo: Lengths
    causal: bool = False

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        bias = torch.full(shape[-2:], float("-inf"))
        for (a, b), (c, d) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True):
            allowed = torch.ones(b - a, d - c)
            bias[a:b, c:d] = (allowed.tril() if self.causal else allowed).log()
        return bias.expand(shape)


class LowerTriangular:
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return torch.ones(shape[-2:]).tril().log().expand(shape)


def stand_in():
    ops = types.ModuleType("xformers.ops")

    def memory_efficient_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        return operator(query, key, value, attn_bias, p, scale)

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        return operator(query, key, value, attn_bias, p, scale), torch.zeros(1)

    def memory_efficient_attention_forward(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        return operator(query, key, value, attn_bias, p, scale)

    def memory_efficient_attention_partial(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        return operator(query, key, value, attn_bias, p, scale), torch.zeros(1)

    for function in list(locals().values()):
        if callable(function):
            setattr(ops, function.__name__, function)
    ops.fmha = types.ModuleType("xformers.ops.fmha")
    vars(ops.fmha).update({name: value for name, value in vars(ops).items() if name.startswith("memory_")})
    return ops


INSTALLED = importlib.util.find_spec("xformers") is not None
needs_xformers = pytest.mark.skipif(not INSTALLED, reason="xformers is not installed")


@pytest.fixture(params=["stand-in", "xformers"] if INSTALLED else ["stand-in"])
def ops(request, monkeypatch):
    """``xformers.ops`` that computes plain softmax."""
    if request.param == "stand-in":
        made, package = stand_in(), types.ModuleType("xformers")
        package.ops = made
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", made)
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha", made.fmha)
        return made
    return real(monkeypatch)


def real(monkeypatch):
    """The real ``xformers.ops`` without operators."""
    import xformers.ops
    from xformers.ops import fmha

    def computed(inputs, op=None):
        # the checks of the real class, then softmax: its own layout is [B, T, G, H, D] for all
        shape = inputs.normalize_bmhk()
        flat = [getattr(inputs, name) for name in ("query", "key", "value", "attn_bias", "p", "scale")]
        return operator(*flat).reshape(shape)

    monkeypatch.setattr(fmha, "_memory_efficient_attention", computed)
    monkeypatch.setattr(fmha, "_memory_efficient_attention_forward", computed)
    monkeypatch.setattr(
        fmha,
        "_memory_efficient_attention_forward_requires_grad",
        lambda inputs, op=None: (computed(inputs), types.SimpleNamespace(lse=torch.zeros(1))),
    )
    return xformers.ops


@pytest.fixture(autouse=True)
def _nothing_left():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert ACTIVE.get() == ()
    assert not PATCHES._table


class Model(nn.Module):
    def __init__(self, ops, name="memory_efficient_attention", **options):
        super().__init__()
        self.ops, self.name, self.options = ops, name, options

    def forward(self, q, k, v):
        output = getattr(self.ops, self.name)(q, k, v, **self.options)
        return output[0] if isinstance(output, tuple) else output


def only(model, *inputs):
    before = vars(model.ops)[model.name]
    plain = model(*inputs)
    with capture(model, keep="full", kinds=("cross", "unknown"), heads="all") as cap:
        assert vars(model.ops)[model.name] is not before
        assert torch.equal(model(*inputs), plain)
    assert vars(model.ops)[model.name] is before
    (site,) = cap.sites
    assert (site.kernel, site.calls) == ("xformers", 1)
    return torch.from_numpy(cap.maps[""].values[0]), site


def tensors(*heads, queries=5, keys=7, dim=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, *heads, dim), (batch, keys, *heads, dim), (batch, keys, *heads, dim + 2))
    return [torch.randn(shape, generator=generator) for shape in shapes]


FORMS = [f"memory_efficient_attention{suffix}" for suffix in ("", "_forward", "_forward_requires_grad")]


@needs_xformers
def test_the_stand_in_has_xformers_signatures():
    import xformers.ops.fmha as real

    made = stand_in()
    for name in (*FORMS, "memory_efficient_attention_partial"):
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (made, real))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(), (4,), (2, 3)], ids=["3-D", "4-D", "5-D"])
def test_every_form_and_layout(ops, form, heads):
    q, k, v = tensors(*heads)
    v = v[..., : q.shape[-1]] if form.endswith("requires_grad") else v
    maps, site = only(Model(ops, form, scale=0.6), q, k, v)
    np.testing.assert_allclose(maps, probabilities(q, k, scale=0.6), atol=1e-6)
    count = int(np.prod(heads))
    assert site.query_shape == (2, count, 5, 8)
    assert site.key_shape == (2, count, 7, 8)


def test_grouped_queries_stay_expanded_in_the_second_call(ops):
    """[B, T, G, H, D], keys and values expanded over H, which operators for groups insist on."""
    q = torch.randn(2, 5, 2, 3, 8)
    k, v = (torch.randn(2, 7, 2, 1, 8).expand(-1, -1, -1, 3, -1) for _ in range(2))
    maps, site = only(Model(ops), q, k, v)
    np.testing.assert_allclose(maps, probabilities(q, k), atol=1e-6)
    assert site.query_shape[1] == 6
    assert site.key_shape[1] == 2


@pytest.mark.parametrize("heads", [(), (4,), (2, 3)], ids=["3-D", "4-D", "5-D"])
def test_a_tensor_as_bias(ops, heads):
    q, k, v = tensors(*heads)
    bias = torch.randn(2, *heads, 5, 7)
    maps, _ = only(Model(ops, attn_bias=bias), q, k, v)
    np.testing.assert_allclose(maps, probabilities(q, k, bias), atol=1e-6)


def unpacked(q, k, bias):
    """Probabilities of each sequence, zero-padded to [sequences, heads, longest queries, longest keys], by hand."""
    whole = probabilities(q, k, bias)[0]
    spans = list(zip(bias.q_seqinfo.intervals(), bias.k_seqinfo.intervals(), strict=True))
    shape = [max(span[i][1] - span[i][0] for span in spans) for i in (0, 1)]
    padded = torch.zeros(len(spans), whole.shape[0], *shape)
    for row, ((a, b), (c, d)) in zip(padded, spans, strict=True):
        row[:, : b - a, : d - c] = whole[:, a:b, c:d]
    assert float(padded.sum()) == pytest.approx(float(whole.sum()), rel=1e-5)  # nothing lies elsewhere
    return padded


@pytest.mark.parametrize("kind", ["plain", "causal", "padded keys"])
@pytest.mark.parametrize("heads", [(4,), (2, 3)], ids=["4-D", "5-D"])
def test_packed_sequences_of_a_stand_in_bias_are_maps_of_each_sequence(monkeypatch, kind, heads):
    made = stand_in()
    monkeypatch.setitem(sys.modules, "xformers.ops", made)
    queries, keys = (Lengths(np.cumsum([0, *lengths]).tolist(), lengths) for lengths in (QUERIES, KEYS))
    if kind == "padded keys":
        keys = Lengths([0, PADDING, 2 * PADDING], KEYS)
    bias = Block(queries, keys, kind == "causal")
    total = 3 * PADDING if kind == "padded keys" else sum(KEYS)
    q, k, v = tensors(*heads, queries=sum(QUERIES), keys=total, batch=1)
    maps, site = only(Model(made, attn_bias=bias), q, k, v)
    np.testing.assert_allclose(maps, unpacked(q, k, bias), atol=1e-6)
    assert site.query_shape[:3] == (3, int(np.prod(heads)), 4)


BIASES = {
    "LowerTriangularMask": lambda b: b.LowerTriangularMask(),
    "LowerTriangularMask in 5-D": lambda b: b.LowerTriangularMask(),
    "LowerTriangularMaskWithTensorBias": lambda b: b.LowerTriangularMask().add_bias(torch.randn(2, 4, 5, 7)),
    "LowerTriangularFromBottomRightMask": lambda b: b.LowerTriangularFromBottomRightMask(),
    "LowerTriangularFromBottomRightLocalAttentionMask": lambda b: (
        b.LowerTriangularFromBottomRightMask().make_local_attention(3)
    ),
    "LocalAttentionFromBottomRightMask": lambda b: b.LocalAttentionFromBottomRightMask(window_left=2, window_right=1),
}


@pytest.mark.parametrize("name", BIASES)
@needs_xformers
def test_every_bias_of_whole_batches(monkeypatch, name):
    ops = real(monkeypatch)
    bias = BIASES[name](ops.fmha.attn_bias)
    assert type(bias).__name__ == name.split()[0]
    q, k, v = tensors(*((2, 3) if name.endswith("5-D") else (4,)))
    maps, _ = only(Model(ops, attn_bias=bias), q, k, v)
    np.testing.assert_allclose(maps, probabilities(q, k, bias), atol=1e-6)


def padded(kind, *options):
    return lambda b: getattr(getattr(b, kind), "from_seqlens_local" if options else "from_seqlens")(
        QUERIES, PADDING, [5, 4, 6], *options, **({} if options else {"device": CPU})
    )


PACKED = {
    "BlockDiagonalMask": lambda b: b.BlockDiagonalMask.from_seqlens(QUERIES, KEYS, device=CPU),
    "BlockDiagonalCausalMask": lambda b: b.BlockDiagonalMask.from_seqlens(QUERIES, KEYS, device=CPU).make_causal(),
    "BlockDiagonalCausalFromBottomRightMask": lambda b: b.BlockDiagonalMask.from_seqlens(
        QUERIES, [4, 5, 4], device=CPU
    ).make_causal_from_bottomright(),
    "BlockDiagonalCausalLocalAttentionMask": lambda b: b.BlockDiagonalMask.from_seqlens(
        QUERIES, device=CPU
    ).make_local_attention(2),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda b: b.BlockDiagonalMask.from_seqlens(
        QUERIES, [4, 5, 4], device=CPU
    ).make_local_attention_from_bottomright(2),
    "BlockDiagonalPaddedKeysMask": padded("BlockDiagonalPaddedKeysMask"),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": padded("BlockDiagonalCausalWithOffsetPaddedKeysMask"),
    "BlockDiagonalLocalAttentionPaddedKeysMask": padded("BlockDiagonalLocalAttentionPaddedKeysMask", 1, 1),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": padded("BlockDiagonalCausalLocalAttentionPaddedKeysMask", 2),
    "BlockDiagonalGappyKeysMask": lambda b: b.BlockDiagonalGappyKeysMask.from_seqlens(
        QUERIES, [0, 5, 11, 18], [4, 5, 6], device=CPU
    ),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": lambda b: b.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(
        QUERIES, [0, 5, 11, 18], [4, 5, 6], device=CPU
    ),
}


@pytest.mark.parametrize("name", PACKED)
@needs_xformers
def test_every_bias_of_packed_sequences(monkeypatch, name):
    ops = real(monkeypatch)
    bias = PACKED[name](ops.fmha.attn_bias)
    assert type(bias).__name__ == name
    q, k, v = tensors(4, queries=sum(QUERIES), keys=bias.k_seqinfo.seqstart_py[-1], batch=1)
    maps, site = only(Model(ops, attn_bias=bias), q, k, v)
    np.testing.assert_allclose(maps, unpacked(q, k, bias), atol=1e-6)
    assert site.check < 1e-5


@needs_xformers
def test_every_bias_class_is_tested():
    from xformers.ops.fmha import attn_bias as module

    classes = {n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, module.AttentionBias)}
    paged = {name for name in classes if name.startswith("Paged")}
    assert classes - paged - {"AttentionBias"} == {name.split()[0] for name in (*BIASES, *PACKED)}
    assert all("block_tables" in inspect.signature(getattr(module, name)).parameters for name in paged)


def test_paged_keys_and_partial_attention_are_refused_by_name(ops):
    q, k, v = tensors(4)
    bias = types.SimpleNamespace(block_tables=torch.zeros(1, 1), materialize=lambda shape: torch.zeros(shape))
    if hasattr(ops, "LowerTriangularMask"):
        paged = ops.fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask
        bias = paged.from_seqlens([5], [7], torch.zeros(1, 1, dtype=torch.int32), 8, device=CPU)
        bias.materialize = lambda shape: torch.zeros(shape)
    with (
        pytest.raises(NotImplementedError, match=r"xformers: a paged key-value cache \(\w+\) cannot be captured"),
        capture(Model(ops, attn_bias=bias), keep="full") as cap,
    ):
        cap.target(q, k, v)
    partial = Model(ops.fmha, "memory_efficient_attention_partial")
    with (
        pytest.raises(
            NotImplementedError, match="memory_efficient_attention_partial: attention over a part of the keys"
        ),
        capture(partial, keep="full"),
    ):
        partial(q, k, v[..., :8])


def test_dropout_is_off_in_the_second_call(ops):
    q, k, v = tensors(4)
    model = Model(ops, p=0.5)
    torch.manual_seed(1)
    plain = [model(q, k, v), torch.rand(2)]
    torch.manual_seed(1)
    with capture(model, keep="full", heads="all") as cap:
        captured = [model(q, k, v), torch.rand(2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    np.testing.assert_allclose(cap.maps[""].values[0], probabilities(q, k), atol=1e-6)


def test_an_importer_by_value_is_captured_and_restored(ops, monkeypatch):
    importer = types.ModuleType("a_models_own_file")
    importer.attend = original = ops.memory_efficient_attention
    monkeypatch.setitem(sys.modules, importer.__name__, importer)
    model = Model(importer, "attend")
    q, k, v = tensors(4)
    maps, _ = only(model, q, k, v)
    assert importer.attend is original
    np.testing.assert_allclose(maps, probabilities(q, k), atol=1e-6)


def test_diffusers_xformers_processor_folds_heads_into_the_batch(ops, monkeypatch):
    monkeypatch.setattr(processors, "xformers", types.SimpleNamespace(ops=ops), raising=False)
    torch.manual_seed(0)
    attention = processors.Attention(16, 12, heads=4, dim_head=4, processor=processors.XFormersAttnProcessor()).eval()
    hidden, text = torch.randn(2, 6, 16), torch.randn(2, 8, 12)
    with torch.no_grad(), capture(attention, keep="full", heads="all") as cap:
        attention(hidden, text)
        q, k = attention.to_q(hidden), attention.to_k(text)
    (site,) = cap.sites
    assert (site.kernel, site.query_shape) == ("xformers", (8, 1, 6, 4))
    q, k = (x.unflatten(-1, (4, 4)) for x in (q, k))
    np.testing.assert_allclose(cap.maps[""].values[0].reshape(2, 4, 6, 8), probabilities(q, k), atol=1e-6)


@pytest.mark.parametrize("heads", [(), (4,), (2, 3)], ids=["3-D", "4-D", "5-D"])
def test_an_edited_output_goes_back_in_the_calls_layout(monkeypatch, heads):
    made = stand_in()
    q, k, v = tensors(*heads)
    function = made.memory_efficient_attention
    output = function(q, k, v)
    kernel = MemoryEfficientAttention()
    call = kernel.read(function, kernel.bind(function, (q, k, v), {}), output)
    torch.testing.assert_close(call.restore(call.again(2 * call.value)), 2 * output)
    if heads:
        queries, keys = (Lengths(np.cumsum([0, *lengths]).tolist(), lengths) for lengths in (QUERIES, KEYS))
        q, k, v = tensors(*heads, queries=sum(QUERIES), keys=sum(KEYS), batch=1)
        bias = Block(queries, keys)
        output = function(q, k, v, bias)
        call = kernel.read(function, kernel.bind(function, (q, k, v, bias), {}), output)
        torch.testing.assert_close(call.restore(call.again(2 * call.value)), 2 * output)


def test_the_adapter_conforms(ops):
    q = torch.randn(2, 5, 2, 3, 8)
    k, v = (torch.randn(2, 7, 2, 1, 8).expand(-1, -1, -1, 3, -1) for _ in range(2))
    run = lambda: ops.memory_efficient_attention(q, k, v, scale=0.6)  # noqa: E731
    check_kernel(MemoryEfficientAttention(), run, probabilities=probabilities(q, k, scale=0.6))
