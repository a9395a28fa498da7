"""Cases of the fused kernel. ``test_fused.py`` runs this file: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiba_hooks import CheckColumnError, capture, fused
from aiba_hooks.kernels.sdpa import ScaledDotProductAttention
from tests.conftest import generate

KERNEL = ScaledDotProductAttention()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = ("none", "bool", "float", "causal", "rows", "heads", "dead")
#: relative to the largest entry of a map
AGREES = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@st.composite
def attention(draw):
    """Inputs and options of an SDPA call."""
    batch, kv_heads, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    dim = draw(st.sampled_from([1, 8, 17, 24, 40, 64, 80]))
    dtype = draw(st.sampled_from(list(AGREES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def tensor(heads, tokens, width):
        made = torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)
        if draw(st.booleans()):  # as heads are split in practice: a transposed view
            made = made.transpose(1, 2).contiguous().transpose(1, 2)
        return made.to(DEVICE)

    heads = kv_heads * repeat
    inputs = tensor(heads, queries, dim), tensor(kv_heads, keys, dim), tensor(kv_heads, keys, dim)
    options = {"scale": draw(st.sampled_from([None, 0.2 * dim**-0.5]))}
    if repeat > 1:
        options["enable_gqa"] = True
    kind = draw(st.sampled_from(MASKS))
    shape = {"rows": (batch, 1, 1, keys), "heads": (heads, queries, keys), "dead": (1, 1, queries, keys)}
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "float":
        options["attn_mask"] = torch.randn(queries, keys, generator=generator).to(dtype).to(DEVICE)
    elif kind != "none":
        seen = torch.rand(shape.get(kind, (queries, keys)), generator=generator) > 0.3
        if kind == "dead":
            seen[..., 0, :] = False  # a query that may see no key
        else:
            seen[..., 0] = True
        options["attn_mask"] = seen.to(DEVICE)
    return inputs, options


def probabilities(inputs, options):
    """The softmax in float64, [batch, heads, Tq, Tk]; 0 for a query without a key."""
    query, key = inputs[0].double(), inputs[1].double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = options["scale"] if options["scale"] is not None else query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    mask = options.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if options.get("is_causal"):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0)


def read(inputs, options, given=None):
    """The call, as the adapter reads it; of ``given`` where it misreads its inputs."""
    output = F.scaled_dot_product_attention(*inputs, **options)
    function = F.scaled_dot_product_attention
    return KERNEL.read(function, KERNEL.bind(function, given or inputs, options), output)


def agrees(ours, theirs, dtype):
    return float((ours.double() - theirs).abs().amax()) <= AGREES[dtype] * max(float(theirs.abs().amax()), 1e-3)


LONG = tuple(torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (70, 150, 150))


@settings(max_examples=50)
@given(attention(), st.integers(1, 5), st.booleans())
@example((LONG, {"scale": None}), 2, True)
@example((LONG, {"scale": None, "is_causal": True}), 2, True)
def test_pooled_and_received_attention_is_that_of_the_softmax(case, groups, mean):
    inputs, options = case
    call, expected = read(inputs, options), probabilities(inputs, options)
    dtype = inputs[0].dtype
    generator = torch.Generator().manual_seed(groups)
    selector = torch.rand(1, call.keys, groups, generator=generator).to(DEVICE)
    pooled, check = fused.pool(call, selector, mean)
    theirs = expected @ selector[:, None].double()
    assert agrees(pooled, theirs.mean(1) if mean else theirs, dtype)
    assert float(check.error) <= call.allowed
    got, check = fused.received(call, mean)
    theirs = expected.mean(-2)
    assert agrees(got, theirs.mean(1) if mean else theirs, dtype)
    assert float(check.error) <= call.allowed


@pytest.mark.parametrize("rows", [1, 2])
def test_any_number_of_groups(rows):
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(2, 2, n, 8, generator=generator).to(DEVICE) for n in (5, 9, 9))
    call = read(inputs, {"scale": None})
    selector = torch.rand(rows, 9, fused.GROUPS + 3, generator=generator).to(DEVICE)
    pooled, _ = fused.pool(call, selector, True)
    theirs = probabilities(inputs, {"scale": None}).mean(1) @ selector.double()
    assert agrees(pooled, theirs, torch.float32)


@settings(max_examples=25)
@given(attention(), st.sampled_from(["scale", "keys", "heads", "values"]))
def test_a_misread_call_does_not_pass_its_check(case, mistake):
    (query, key, value), options = case
    wrong = {
        "scale": (query * 1.7, key, value),
        "keys": (query, key.roll(1, -2), value),
        "heads": (query.flip(1), key, value),
        "values": (query, key, value.roll(1, -2)),
    }[mistake]
    call = read((query, key, value), options, wrong)
    repeat = query.shape[1] // key.shape[1]
    made = probabilities(wrong, options) @ wrong[2].double().repeat_interleave(repeat, 1)
    moved = (made - call.output.double())[..., 0].abs().amax() / call.output[..., 0].double().abs().amax()
    for check in (fused.pool(call, torch.ones(1, call.keys, 1, device=DEVICE), True)[1], fused.received(call, True)[1]):
        # one column of values cannot see a change that leaves its own output as it was
        if float(moved) > 2 * call.allowed:
            assert float(check.error) > call.allowed
        assert abs(float(check.error) - float(moved)) <= 2e-2 * float(moved) + call.allowed


def test_outputs_that_are_not_finite_do_not_count_but_answers_do():
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(1, 2, n, 8, generator=generator).to(DEVICE) for n in (5, 9, 9))
    selector = torch.ones(1, 9, 1, device=DEVICE)
    call = read(inputs, {"scale": None})
    call.output[0, 0, 3, 0] = math.inf
    call.output[0, 1, 2, 0] = math.nan
    assert float(fused.pool(call, selector, True)[1].error) < call.allowed
    broken = (inputs[0].clone().fill_(math.nan), *inputs[1:])
    assert float(fused.pool(read(inputs, {"scale": None}, broken), selector, True)[1].error) == math.inf


OPTIONS = st.fixed_dictionaries(
    {
        "heads": st.sampled_from(["mean", "all"]),
        "branch": st.sampled_from(["conditional", "unconditional", "both"]),
        "pooling": st.sampled_from(["sum", "mean", "weighted"]),
        "kinds": st.sampled_from([("cross",), ("self",), ("cross", "self")]),
        "reduce_steps": st.booleans(),
    }
)


@settings(max_examples=6)
@given(OPTIONS)
def test_a_capture_of_a_pipeline_is_the_same_fused_and_asked(shared_pipe, options):
    pipe = shared_pipe.to(DEVICE)
    words = {"bass": 1.0, "drums": 2.0} if options["pooling"] == "weighted" else ["bass", "drums"]
    if options["reduce_steps"]:
        options = {**options, "reduce_steps": "uniform"}
    plain = generate(pipe, "a bass and drums")
    maps = {}
    with pytest.MonkeyPatch.context() as patch:
        for chosen in ("never", "always"):
            patch.setenv(fused.VARIABLE, chosen)
            with capture(pipe, words=words, layers="mid_block.*", **options) as cap:
                audio = generate(pipe, "a bass and drums")
            assert (audio == plain).all()
            maps[chosen] = cap
    assert list(maps["never"].maps) == list(maps["always"].maps)
    for name, array in maps["always"].maps.items():
        assert abs(array - maps["never"].maps[name]).max() < 1e-6
        assert array.dims == maps["never"].maps[name].dims
    for ours, theirs in zip(maps["always"].sites, maps["never"].sites, strict=True):
        assert (ours.check is None) == (theirs.check is None)
        assert ours.check is None or ours.check < 1e-5
        assert (ours.row_sum is None) == (theirs.row_sum is None)
        assert ours.row_sum is None or ours.row_sum == pytest.approx(theirs.row_sum, abs=1e-5)


def test_a_misread_call_ends_a_capture_through_the_fused_kernel(shared_pipe, monkeypatch):
    pipe = shared_pipe.to(DEVICE)
    true = ScaledDotProductAttention.read

    def misread(self, function, arguments, output):
        return true(self, function, {**arguments, "key": arguments["key"].roll(1, -2)}, output)

    monkeypatch.setattr(ScaledDotProductAttention, "read", misread)
    monkeypatch.setenv(fused.VARIABLE, "always")
    with pytest.raises(CheckColumnError, match=r"\(sdpa\): asked again, the kernel differs"):
        with capture(pipe, words=["bass"], layers="mid_block.*"):
            generate(pipe, "a bass")
