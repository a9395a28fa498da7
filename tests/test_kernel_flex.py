"""flex attention, eager and compiled: the maps are softmax(score_mod(q·kᵀ·scale)) under the mask, computed by hand."""

from __future__ import annotations

import functools
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as home
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from aiba_hooks import CheckColumnError, capture
from aiba_hooks.interception import ACTIVE, PATCHES
from aiba_hooks.kernels.flex import FlexAttention, replays_graphs
from aiba_hooks.plugins import manager
from aiba_hooks.testing import check_kernel

FLEX = flex_attention
B, H, T, S, D = 2, 4, 33, 21, 16
EVERYTHING = {"keep": "full", "heads": "all", "kinds": ("cross", "self", "unknown")}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _nothing_left():
    torch.manual_seed(0)
    yield
    assert home.flex_attention is FLEX
    assert ACTIVE.get() == ()
    assert not PATCHES._table


class Model(nn.Module):
    """Calls a function with a fixed set of options."""

    def __init__(self, call, **options):
        super().__init__()
        self.call, self.options = types.SimpleNamespace(it=call), options

    def forward(self, q, k, v):
        return self.call.it(q, k, v, **self.options)


def by_attribute(*args, **kwargs):
    return home.flex_attention(*args, **kwargs)


def by_name(*args, **kwargs):
    return flex_attention(*args, **kwargs)


def tensors(heads=H, queries=T, keys=S, dim=D, **options):
    return (
        torch.randn(B, H, queries, D, **options),
        torch.randn(B, heads, keys, D, **options),
        torch.randn(B, heads, keys, dim, **options),
    )


def by_hand(q, k, score_mod=None, mask_mod=None, scale=None):
    """[batch, heads, Tq, Tk]."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, b, h, i, j)
    if mask_mod is not None:
        scores = scores.masked_fill(~mask_mod(b, h, i, j), float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0)


def captured(model, q, k, v):
    """Maps of the one site, after checking that the output did not change."""
    plain = model(q, k, v)
    with capture(model, **EVERYTHING) as cap:
        output = model(q, k, v)
    if not isinstance(plain, tuple):
        plain, output = (plain,), (output,)
    assert torch.equal(plain[0], output[0])
    assert [site.kernel for site in cap.sites] == ["flex_attention"]
    assert cap.sites[0].calls == 1
    assert cap.sites[0].check < 1e-5
    return cap, torch.from_numpy(cap.maps[""].values[0])


def alibi(score, b, h, i, j):
    return score - (i - j).abs() * 0.1 * (h + 1)


def softcap(score, b, h, i, j):
    return 2 * torch.tanh(score / 2)


DOCUMENTS = torch.arange(64) // 9


def causal(b, h, i, j):
    return i >= j


def window(b, h, i, j):
    return (i - j).abs() <= 4 + h


def documents(b, h, i, j):
    return DOCUMENTS[i] == DOCUMENTS[j]


# ---- values


@pytest.mark.parametrize("heads", [H, 2, 1])
@pytest.mark.parametrize("mask", [None, causal, window, documents], ids=lambda f: f and f.__name__)
@pytest.mark.parametrize("score", [None, alibi, softcap], ids=lambda f: f and f.__name__)
def test_eager_maps_are_the_softmax_by_hand(heads, mask, score):
    q, k, v = tensors(heads)
    block_mask = mask and create_block_mask(mask, None, H, T, S, device="cpu", BLOCK_SIZE=16)
    model = Model(by_attribute, score_mod=score, block_mask=block_mask, enable_gqa=heads != H, scale=0.4)
    with torch.no_grad():
        _, maps = captured(model, q, k, v)
    torch.testing.assert_close(maps.double(), by_hand(q, k, score, mask, 0.4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", [{"return_lse": True}, {"return_aux": AuxRequest(lse=True)}], ids=str)
def test_other_return_values_stay_as_they_are(form):
    q, k, v = tensors()
    model = Model(by_name, **form)
    with torch.no_grad():
        plain = model(q, k, v)
        _, maps = captured(model, q, k, v)
        with capture(model, **EVERYTHING):
            output = model(q, k, v)
    torch.testing.assert_close(maps.double(), by_hand(q, k), atol=1e-5, rtol=0)
    lse = (plain[1], output[1]) if "return_lse" in form else (plain[1].lse, output[1].lse)
    assert torch.equal(*lse)
    assert type(plain[1]) is type(output[1])


@pytest.mark.parametrize("dim", [4, 48])
def test_values_of_another_width(dim):
    q, k, v = tensors(dim=dim)
    with torch.no_grad():
        _, maps = captured(Model(by_name), q, k, v)
    torch.testing.assert_close(maps.double(), by_hand(q, k), atol=1e-5, rtol=0)


def test_one_row_of_keys_for_a_whole_batch():
    q, k, v = tensors()
    shift = torch.tensor([0, 5])

    def mask(b, h, i, j):
        return i + shift[b] >= j

    block_mask = create_block_mask(mask, B, None, T, S, device="cpu")
    with torch.no_grad():
        _, maps = captured(Model(by_name, block_mask=block_mask), q, k[:1], v[:1])
    torch.testing.assert_close(maps.double(), by_hand(q, k[:1].expand(B, -1, -1, -1), None, mask), atol=1e-5, rtol=0)


def test_rows_that_may_attend_to_nothing_are_zero():
    q, k, v = tensors()

    def mask(b, h, i, j):
        return i > j + 3

    block_mask = create_block_mask(mask, None, None, T, S, device="cpu")
    with torch.no_grad():
        cap, maps = captured(Model(by_name, block_mask=block_mask), q, k, v)
    assert (maps[:, :, :4] == 0).all()
    assert cap.sites[0].row_sum[0] == 0
    torch.testing.assert_close(maps.double(), by_hand(q, k, None, mask), atol=1e-5, rtol=0)


def test_eight_bit_keys_and_values():
    q, k, v = tensors()
    k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    with torch.no_grad():
        _, maps = captured(Model(by_name), q, k, v)
    torch.testing.assert_close(maps.double(), by_hand(q, k.float()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode):
    with mode():
        q, k, v = tensors()
        cap, maps = captured(Model(by_name, score_mod=alibi), q, k, v)
    torch.testing.assert_close(maps.double(), by_hand(q, k, alibi), atol=1e-5, rtol=0)
    assert cap.sites[0].tag == "cross"


def test_a_learned_bias_records_no_graph():
    slope = nn.Parameter(torch.tensor(0.3))

    def score(s, b, h, i, j):
        return s - slope * (i - j).abs()

    q, k, v = tensors()
    model = Model(by_name, score_mod=score)
    plain = model(q, k, v)
    with capture(model, **EVERYTHING) as cap:
        output = model(q, k, v)
    assert torch.equal(plain, output)
    np.testing.assert_allclose(cap.maps[""].values[0], by_hand(q, k, score).detach(), atol=1e-5)
    assert output.requires_grad
    assert not any(t.requires_grad for store in cap._stores.values() for t in store.values.values())


# ---- held by value, under partial and torch.compile

#: compiled, but by a backend that needs no C++ compiler: how it is found does not depend on what it compiles to
COMPILED = torch.compile(flex_attention, backend="eager")
HELD = {
    "flex_attention": flex_attention,
    "partial": functools.partial(flex_attention, score_mod=alibi),
    "compiled": COMPILED,
    "partial of compiled": functools.partial(COMPILED, score_mod=alibi),
    "compiled partial": torch.compile(functools.partial(flex_attention, score_mod=alibi), backend="eager"),
}


@pytest.mark.parametrize("place", ["global", "instance", "class", "base class"])
@pytest.mark.parametrize("form", HELD)
def test_every_form_is_captured_wherever_it_is_held_and_put_back(form, place):
    importer = types.ModuleType("a_models_own_flex")
    sys.modules[importer.__name__] = importer

    class Base(nn.Module):
        def forward(self, q, k, v):
            return importer.attend(q, k, v) if place == "global" else self.attend(q, k, v)

    class Holder(Base):
        pass

    model = Holder()
    if place == "global":
        importer.attend = HELD[form]
    elif place == "instance":
        model.attend = HELD[form]
    else:
        (Holder if place == "class" else Base).attend = staticmethod(HELD[form])
    spaces = [importer, model, Holder, Base]
    before = [dict(vars(space)) for space in spaces]
    q, k, v = tensors()
    try:
        with torch.no_grad():
            _, maps = captured(model, q, k, v)
            with capture(model, **EVERYTHING) as outer, capture(model, **EVERYTHING) as inner:
                model(q, k, v)
    finally:
        del sys.modules[importer.__name__]
    expected = by_hand(q, k, alibi if "partial" in form else None)
    torch.testing.assert_close(maps.double(), expected, atol=1e-5, rtol=0)
    assert [dict(vars(space)) for space in spaces] == before
    assert outer.maps[""].identical(inner.maps[""])


def test_a_partial_of_something_else_is_left_alone():
    model = Model(by_name)
    model.other = functools.partial(print, "flex_attention")
    q, k, v = tensors()
    other = model.other
    with torch.no_grad(), capture(model, **EVERYTHING):
        assert model.other is other
        model(q, k, v)


# ---- compiled for real

compiled = torch.compile(flex_attention)


def by_compiled(*args, **kwargs):
    return compiled(*args, **kwargs)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_flex_attention_is_asked_as_it_was_called(fresh):
    """Values sliced from a packed projection: strides that a plain buffer does not have. Nothing is compiled again."""
    packed = torch.randn(B, T, 3, H, D)
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    block_mask = create_block_mask(causal, None, None, T, T, device="cpu")
    model = Model(by_compiled, score_mod=alibi, block_mask=block_mask)
    with torch.no_grad():
        plain = model(q, k, v)
        before = graphs()
        with capture(model, **EVERYTHING) as cap:
            output = [model(q, k, v) for _ in range(2)]
        assert graphs() == before
    assert all(torch.equal(plain, out) for out in output)
    expected = by_hand(q, k, alibi, causal)
    np.testing.assert_allclose(cap.maps[""].values, np.stack([expected] * 2), atol=1e-5)
    assert cap.sites[0].check < 1e-5
    assert cap.sites[0].tag == "unknown"


def test_other_lengths_modes_and_return_values_compile_no_more_than_the_model_does(fresh):
    """On the backend that compiles nothing: dynamo's guards are the same."""
    model = Model(lambda *args, **kwargs: COMPILED_GLOBAL(*args, **kwargs))
    with torch.no_grad():
        COMPILED_GLOBAL(*tensors(), return_lse=True)  # torch warns once of that name, and compiles it anew afterwards

    @torch._dynamo.config.patch(recompile_limit=64)  # past the limit dynamo stops counting
    def run(watch):
        torch._dynamo.reset()
        before = graphs()
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            for keys in (5, 9, 13):
                for options in ({}, {"return_lse": True}, {"score_mod": alibi}):
                    model.options = options
                    with mode():
                        torch.manual_seed(keys)
                        q, k, v = tensors(keys=keys)
                        if watch:
                            with capture(model, **EVERYTHING) as cap:
                                model(q, k, v)
                            expected = by_hand(q, k, options.get("score_mod"))
                            np.testing.assert_allclose(cap.maps[""].values[0], expected, atol=1e-5)
                        else:
                            model(q, k, v)
        return graphs() - before

    assert 3 < run(True) == run(False) < 64


COMPILED_GLOBAL = torch.compile(flex_attention, backend="eager")


def test_the_first_forward_compiles_nothing_of_its_own(fresh):
    """The coverage audit watches it through a torch-function mode, which compiled code is specialised on."""
    model = Model(lambda *args: COMPILED_GLOBAL(*args))
    q, k, v = tensors()
    with torch.no_grad():
        with capture(model, **EVERYTHING):
            model(q, k, v)
        before = graphs()
        model(q, k, v)
        assert graphs() == before


def test_a_compiled_helper_of_the_models_still_runs_in_the_first_forward(fresh):
    """It is traced through the mode of the coverage audit."""

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def helper(x):
        return torch.softmax(x @ x.mT, -1) @ x

    model = Model(lambda q, k, v: by_name(helper(q), k, v))
    q, k, v = tensors()
    with torch.no_grad():
        _, maps = captured(model, q, k, v)
        torch.testing.assert_close(maps.double(), by_hand(helper(q), k), atol=1e-5, rtol=0)


def test_a_compiled_function_that_calls_it_is_captured(fresh):
    """Compiled inside the block around the interceptor: the graph breaks there."""
    q, k, v = tensors()

    def attend(q, k, v):
        return flex_attention(q * 2, k, v)

    model = Model(torch.compile(attend, backend="eager"))
    with torch.no_grad():
        plain = model(q, k, v)
        with capture(model, **EVERYTHING) as cap:
            output = model(q, k, v)
        assert torch.equal(plain, model(q, k, v))
    torch.testing.assert_close(output, plain)
    np.testing.assert_allclose(cap.maps[""].values[0], by_hand(q * 2, k), atol=1e-5)


def test_graph_replay_is_recognised():
    """Asked again it would overwrite the model's own output, on CUDA."""
    assert replays_graphs(torch.compile(flex_attention, mode="reduce-overhead"))
    assert not replays_graphs(torch.compile(flex_attention))
    assert not replays_graphs(COMPILED)
    assert not replays_graphs(flex_attention)


# ---- layout of the values


@pytest.mark.parametrize("layout", ["expanded heads", "expanded batch", "unfolded", "sliced", "head_dim first"])
def test_values_in_any_memory_layout(layout):
    q, k, v = tensors()
    if layout == "expanded heads":
        v = v[:, :1].expand(B, H, S, D)
    elif layout == "expanded batch":
        v = v[:1].expand(B, H, S, D)
    elif layout == "unfolded":
        v = torch.randn(B, H, S + D).unfold(-1, D, 1)[:, :, :S]
    elif layout == "sliced":
        v = torch.randn(B, H, 2 * S, 3 * D)[:, :, ::2, D : 2 * D]
    else:
        v = torch.randn(B, H, D, S).transpose(-1, -2)
    with torch.no_grad():
        _, maps = captured(Model(by_name), q, k, v)
    torch.testing.assert_close(maps.double(), by_hand(q, k), atol=1e-5, rtol=0)


# ---- the check


class Misread(FlexAttention):
    mistake = ""

    def read(self, function, arguments, output):
        arguments = dict(arguments)
        if self.mistake == "scale":
            arguments["scale"] = 0.4
        if self.mistake == "rolled keys":
            arguments["key"] = arguments["key"].roll(1, -2)
        if self.mistake in ("score_mod", "block_mask"):
            arguments[self.mistake] = None
        return super().read(function, arguments, output)


@pytest.mark.parametrize("mistake", ["scale", "rolled keys", "score_mod", "block_mask"])
def test_the_check_column_catches_a_misread_call(monkeypatch, mistake):
    adapter = Misread()
    adapter.mistake = mistake
    monkeypatch.setattr(manager(), "collect", lambda hook: [adapter] if hook == "aiba_kernels" else [])
    block_mask = create_block_mask(causal, None, None, T, S, device="cpu")
    model = Model(by_name, score_mod=alibi, block_mask=block_mask)
    with torch.no_grad(), pytest.raises(CheckColumnError, match="asked again"), capture(model, **EVERYTHING):
        model(*tensors())


def test_the_adapter_conforms():
    q, k, v = tensors(2)
    figures = check_kernel(
        FlexAttention(),
        lambda: by_name(q, k, v, score_mod=alibi, enable_gqa=True),
        probabilities=by_hand(q, k, alibi).float(),
    )
    assert figures["check"] < 1e-5
