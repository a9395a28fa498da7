"""Compiled models: taps inside compiled code, and eager with a reason where there can be none."""

from __future__ import annotations

import sys
import threading
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from aiba_hooks import (
    CaptureBudgetExceeded,
    CheckColumnError,
    NothingCaptured,
    capture,
    compiled,
    interception,
    intervene,
)
from aiba_hooks.compilation import CompiledModelWarning
from tests.test_values import Attention

KINDS = ("cross", "self")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x, context):
        x = x + self.attn1(self.norm(x))
        return x + self.attn2(x, context)


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def inputs():
    """Of three forwards."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 6, 32, generator=generator), torch.randn(2, 5, 32, generator=generator)) for _ in range(3)]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Nothing of a capture is left, and no compiled code of another test or run is found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert compiled.TRACE.place is None
    assert torch._dynamo.config.recompile_limit == 8
    assert compiled.TRACE.anywhere is None
    assert not compiled.TRACE.listening
    assert interception.PATCHES._table == {}
    assert not any(place.wanted for place, _ in compiled._PLACES.values())
    torch._dynamo.reset()


class Counted:
    """What Dynamo did inside a block."""

    def __enter__(self):
        torch._dynamo.utils.counters.clear()
        return self

    def __exit__(self, *error):
        counters = torch._dynamo.utils.counters
        self.breaks, self.graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


def quietly(target, **options):
    """A capture that says nothing of being compiled."""
    return Quiet(capture(target, **({"keep": "full", "kinds": KINDS} | options)))


class Quiet:
    def __init__(self, cap):
        self.cap = cap

    def __enter__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompiledModelWarning)
            return self.cap.__enter__()

    def __exit__(self, *error):
        return self.cap.__exit__(*error)


def same(maps, expected, atol=0.0):
    assert list(maps) == list(expected)
    for name, array in maps.items():
        np.testing.assert_allclose(array.values, expected[name].values, atol=atol, rtol=0, err_msg=name)


def compile_it(net, how, **options):
    options = {"backend": "eager", "fullgraph": True} | options
    if how == "torch.compile(m)":
        return torch.compile(net, **options)
    if how == "m.compile()":
        net.compile(**options)
    elif how == "m.forward":
        net.forward = torch.compile(net.forward, **options)
    elif how == "blocks":
        for block in net.blocks:
            block.compile(**options)
    elif how == "a module":
        net.blocks[1].attn2.compile(**options)
    elif how == "a module's forward":
        net.blocks[1].attn2.forward = torch.compile(net.blocks[1].attn2.forward, **options)
    return net


HOWS = ["torch.compile(m)", "m.compile()", "m.forward", "blocks", "a module", "a module's forward"]


@pytest.mark.parametrize("how", HOWS)
@torch.no_grad()
def test_a_compiled_model_is_captured_in_compiled_code(net, inputs, how):
    with capture(net, keep="full", kinds=KINDS) as eager:
        expected = [net(*x) for x in inputs]
    target = compile_it(net, how)
    plain = [target(*x) for x in inputs]
    taken = []
    for graphs in (1, 0):  # a second capture finds the tapped code of the first
        with Counted() as during, pytest.warns(CompiledModelWarning, match="the first forward runs eagerly"):
            with capture(target, keep="full", kinds=KINDS) as cap:
                outputs = [target(*x) for x in inputs]
                taken += [site.calls for site in cap.sites]
        same(cap.maps, eager.maps)  # and no _orig_mod in the names
        assert torch.equal(outputs[0], expected[0])
        assert all(torch.equal(output, other) for output, other in zip(outputs[1:], plain[1:], strict=True))
        assert (during.breaks, during.graphs) == ({}, graphs)
    assert taken == [3] * 8
    with Counted() as after:
        assert all(torch.equal(target(*x), other) for x, other in zip(inputs, plain, strict=True))
    assert (after.breaks, after.graphs) == ({}, 0)  # the code from before is found again


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_backends_that_lower_the_graph_keep_the_taps(net, inputs, backend):
    with capture(net, keep="full", kinds=KINDS) as eager:
        [net(*x) for x in inputs]
    target = compile_it(net, "torch.compile(m)", backend=backend)
    plain = [target(*x) for x in inputs]
    with Counted() as during, quietly(target) as cap:
        outputs = [target(*x) for x in inputs]
    same(cap.maps, eager.maps, atol=1e-6)
    assert all(torch.equal(output, other) for output, other in zip(outputs[1:], plain[1:], strict=True))
    assert (during.breaks, during.graphs) == ({}, 1)
    assert all(site.check < 1e-6 and site.calls == 3 for site in cap.sites)


@torch.no_grad()
def test_blocks_that_share_compiled_code_keep_their_names(inputs):
    torch.manual_seed(0)
    net = Net(blocks=12).eval()  # more than torch._dynamo.config.recompile_limit
    with capture(net, keep="full", kinds=KINDS) as eager:
        [net(*x) for x in inputs]
    compile_it(net, "blocks")
    with Counted() as during, quietly(net) as cap:
        [net(*x) for x in inputs]
    assert during.graphs == 1
    same(cap.maps, eager.maps)


@torch.no_grad()
def test_only_chosen_sites_are_tapped(net, inputs):
    target = compile_it(net, "m.compile()")
    with quietly(target, layers="blocks.1.*", kinds=("cross",)) as cap:
        [target(*x) for x in inputs]
    assert {site.name: site.calls for site in cap.sites} == {
        "blocks.0.attn1": 1,
        "blocks.0.attn2": 1,
        "blocks.1.attn1": 1,
        "blocks.1.attn2": 3,
    }
    assert cap.maps["blocks.1.attn2"].sizes["call"] == 3


@torch.no_grad()
def test_captures_nest_in_compiled_code(net, inputs):
    with capture(net, keep="full", kinds=KINDS) as eager:
        [net(*x) for x in inputs]
    target = compile_it(net, "torch.compile(m)")
    with quietly(target, kinds=("cross",)) as outer:
        target(*inputs[0])
        with quietly(target, kinds=("self",)) as inner:
            target(*inputs[0])
            target(*inputs[1])
        target(*inputs[2])
    assert {name: array.sizes["call"] for name, array in outer.maps.items()} == dict.fromkeys(
        ("blocks.0.attn2", "blocks.1.attn2"), 4
    )
    same(inner.maps, {name: eager.maps[name][:2] for name in ("blocks.0.attn1", "blocks.1.attn1")})


@torch.no_grad()
def test_another_thread_runs_the_same_compiled_model_unseen(net, inputs):
    target = compile_it(net, "torch.compile(m)")
    with quietly(target) as cap:
        target(*inputs[0])
        target(*inputs[1])
        thread = threading.Thread(target=lambda: torch.no_grad()(target)(*inputs[2]))
        thread.start()
        thread.join()
    assert {array.sizes["call"] for array in cap.maps.values()} == {2}


@torch.no_grad()
def test_lengths_may_change_in_dynamic_code(net):
    def run(model):
        for queries, keys in ((6, 5), (8, 7), (10, 4)):
            model(torch.ones(1, queries, 32), torch.ones(1, keys, 32))

    with capture(net, keep="full", kinds=KINDS) as eager:
        run(net)
    target = compile_it(net, "torch.compile(m)", dynamic=True)
    with Counted() as during, quietly(target) as cap:
        run(target)
    same(cap.maps, eager.maps)
    assert (during.breaks, during.graphs) == ({}, 1)


def test_inference_mode_and_gradients(net, inputs):
    def gradients(model):
        net.zero_grad()
        model(*inputs[1]).sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    with capture(net, keep="full", kinds=KINDS) as eager:
        expected = [gradients(net), gradients(net)]
    target = compile_it(net, "torch.compile(m)", backend="aot_eager")
    with quietly(target) as cap:
        found = [gradients(target), gradients(target)]
    same(cap.maps, eager.maps)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with torch.inference_mode(), quietly(target) as cap:
        target(*inputs[1])
        target(*inputs[1])
    same(cap.maps, eager.maps, atol=1e-6)


class Halved(Attention):
    """A graph break before the kernel, as a print or a data-dependent branch makes one."""

    def forward(self, x, context=None):
        key = self.to_k(context)
        torch._dynamo.graph_break()
        query, value = self.to_q(x), self.to_v(context)
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


@torch.no_grad()
def test_a_module_that_breaks_the_graph_by_itself_is_found_among_the_running_frames(inputs):
    torch.manual_seed(0)
    net = Net().eval()
    net.blocks[0].attn2 = Halved().eval()
    with capture(net, keep="full", kinds=KINDS) as eager:
        [net(*x) for x in inputs]
    target = compile_it(net, "torch.compile(m)", fullgraph=False)
    [target(*x) for x in inputs]
    with quietly(target) as cap:
        [target(*x) for x in inputs]
    same(cap.maps, eager.maps)


@torch.no_grad()
def test_a_compiled_function_that_a_models_file_calls(inputs):
    file = types.ModuleType("a_models_file")
    file.attend = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend="eager", fullgraph=True
    )
    sys.modules[file.__name__] = file
    try:

        class Model(Attention):
            def forward(self, x, context):
                return file.attend(self.to_q(x)[:, None], self.to_k(context)[:, None], self.to_v(context)[:, None])

        Model.__module__ = file.__name__
        model = Model().eval()
        with pytest.warns(CompiledModelWarning, match=r"a_models_file\.attend"), capture(model, keep="full") as cap:
            for x in inputs:
                model(*x)
        assert cap.maps[""].sizes == {"call": 3, "batch": 2, "query": 6, "key": 5}
    finally:
        del sys.modules[file.__name__]


@torch.no_grad()
def test_other_compiled_models_of_the_process_are_left_in_one_graph(net, inputs):
    class Other(Net):
        pass

    other = torch.compile(Other().eval(), backend="eager", fullgraph=True)
    plain = other(*inputs[0])
    for target in (net, compile_it(Net().eval(), "torch.compile(m)")):
        with Counted() as during, quietly(target) as cap:
            target(*inputs[0])
            assert torch.equal(other(*inputs[0]), plain)
            target(*inputs[0])
        assert during.breaks == {}
        assert {array.sizes["call"] for array in cap.maps.values()} == {2}


@torch.no_grad()
def test_the_module_inside_may_be_called_eagerly(net, inputs):
    target = compile_it(net, "torch.compile(m)")
    target(*inputs[0])
    with quietly(target) as cap:
        net(*inputs[0])
        target(*inputs[1])
        net(*inputs[2])
    assert {array.sizes["call"] for array in cap.maps.values()} == {3}


@torch.no_grad()
def test_a_user_mode_stays(net, inputs):
    class Counting(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Counting.seen += 1
            return func(*args, **(kwargs or {}))

    with capture(net, keep="full", kinds=KINDS) as eager:
        [net(*x) for x in inputs]
    target = compile_it(net, "m.compile()", fullgraph=False)
    with Counting(), quietly(target) as cap:
        [target(*x) for x in inputs]
    assert Counting.seen
    same(cap.maps, eager.maps)


# ---- errors inside compiled code


@torch.no_grad()
def test_an_error_in_a_tap_reaches_the_caller_and_everything_is_restored(net, inputs):
    target = compile_it(net, "torch.compile(m)", backend="aot_eager")
    held = {}
    with quietly(target) as cap:
        target(*inputs[0])
        held = cap.held_bytes
    before = [sorted(vars(module)) for module in net.modules()]
    with pytest.raises(CaptureBudgetExceeded), quietly(target, budget=held) as cap:
        target(*inputs[0])
        target(*inputs[1])
    assert [sorted(vars(module)) for module in net.modules()] == before
    assert target(*inputs[0]).shape == (2, 6, 32)


@torch.no_grad()
def test_the_check_column_sees_what_a_tap_misreads(net, inputs, monkeypatch):
    from aiba_hooks import serving

    called_by = serving._called_by

    def rolled(module, listener, args, kwargs, output):
        query, key, value = args
        called_by(module, listener, (query, key.roll(1, -2), value), kwargs, output)

    monkeypatch.setattr(serving, "_called_by", rolled)
    target = compile_it(net, "torch.compile(m)")
    with pytest.raises(CheckColumnError, match=r"blocks\.\d\.attn\d"), quietly(target):
        target(*inputs[0])
        target(*inputs[1])


# ---- what cannot be served runs eagerly, by name


def refused(target, reason, run, **options):
    with pytest.warns(CompiledModelWarning, match=reason), capture(target, keep="full", kinds=KINDS, **options) as cap:
        outputs = run(target)
    return cap, outputs


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
@torch.no_grad()
def test_cuda_graphs(net, inputs, options):
    with capture(net, keep="full", kinds=KINDS) as eager:
        expected = net(*inputs[0])
    target = torch.compile(net, **options)
    cap, output = refused(target, "replays CUDA graphs", lambda model: model(*inputs[0]))
    same(cap.maps, eager.maps)
    assert torch.equal(output, expected)


@torch.no_grad()
def test_attention_that_is_not_sdpa(inputs):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv = nn.Linear(32, 96)

        def forward(self, x, context):
            from torch.nn.attention.flex_attention import flex_attention

            query, key, value = self.to_qkv(x)[:, None].chunk(3, -1)
            return flex_attention(query, key, value)[:, 0]

    torch.manual_seed(0)
    model = Model().eval()
    model.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # flex attention warns of being eager
        with pytest.warns(CompiledModelWarning, match="flex_attention is not F.scaled_dot_product_attention"):
            with capture(model, keep="full", kinds=("self",)) as cap:
                for x in inputs:
                    model(*x)
    assert cap.maps[""].sizes["call"] == 3


@torch.no_grad()
def test_torchs_own_multi_head_attention():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 4, 8)
    with capture(model, keep="full", kinds=KINDS) as eager:
        model(x, x, x, need_weights=False)
    target = torch.compile(model, backend="eager")
    cap, _ = refused(target, "nn.MultiheadAttention", lambda m: [m(x, x, x, need_weights=False) for _ in range(2)])
    np.testing.assert_array_equal(cap.maps[""][0], eager.maps[""][0])


@torch.no_grad()
def test_a_forward_that_calls_other_sites_than_the_first(net, inputs):
    class Skipping(Net):
        skip = True

        def forward(self, x, context):
            for block in self.blocks[1:] if self.skip else self.blocks:
                x = block(x, context)
            return x

    def run(model):
        model(*inputs[0])
        net.skip = False
        for x in inputs:
            model(*x)

    torch.manual_seed(0)
    net = Skipping().eval()
    target = compile_it(net, "torch.compile(m)")
    cap, _ = refused(target, r"inside .* was called in this forward and not in the first", run)
    # the other block is seen once eager runs again
    assert {name: cap.maps[name].sizes["call"] for name in ("blocks.1.attn2", "blocks.0.attn2")} == {
        "blocks.1.attn2": 4,
        "blocks.0.attn2": 2,
    }


@torch.no_grad()
def test_a_forward_that_calls_a_site_less_often(inputs):
    class Skipping(Net):
        skip = False

        def forward(self, x, context):
            for block in self.blocks[1:] if self.skip else self.blocks:
                x = block(x, context)
            return x

    def run(model):
        model(*inputs[0])
        net.skip = True
        model(*inputs[1])

    net = Skipping().eval()
    cap, _ = refused(compile_it(net, "m.compile()"), r"blocks\.0\.attn1 called attention 0 times .* 1 times", run)
    assert cap.maps["blocks.1.attn1"].sizes["call"] == 2


@torch.no_grad()
def test_a_stance_that_forbids_to_compile(net, inputs):
    target = compile_it(net, "torch.compile(m)")
    target(*inputs[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        cap, _ = refused(target, "fail_on_recompile", lambda model: [model(*x) for x in inputs])
        assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"
    assert cap.maps["blocks.0.attn1"].sizes["call"] == 3


@torch.no_grad()
def test_a_module_whose_compiled_object_the_capture_was_not_given(net, inputs):
    target = torch.compile(net, backend="eager")
    with capture(net, keep="full", kinds=KINDS) as cap:  # not known to be compiled
        target(*inputs[0])
        target(*inputs[1])
    assert cap.maps["blocks.1.attn2"].sizes["call"] == 2
    cap, _ = refused(net, "an object that the capture was not given", lambda _: [target(*x) for x in inputs])
    assert cap.maps["blocks.1.attn2"].sizes["call"] == 3


# ---- denoisers


@pytest.fixture(scope="module")
def unet():
    """AudioLDM2's U-Net, as small as it gets: 12 transformers of three kinds, each with two attentions."""
    from diffusers import AudioLDM2UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AudioLDM2UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=[[None, 8, 8]] * 2,
            attention_head_dim=2,
            layers_per_block=1,
            norm_num_groups=2,
        ).eval()


def denoise(unet, seed):
    generator = torch.Generator().manual_seed(seed)
    sample, generated, text = (torch.randn(2, *size, generator=generator) for size in ((4, 8, 8), (8, 8), (5, 8)))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return unet(
        sample, 300, encoder_hidden_states=generated, encoder_hidden_states_1=text, encoder_attention_mask_1=mask
    ).sample


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole, aot_eager", "transformers, inductor"])
@torch.no_grad()
def test_the_u_net_of_audioldm2(unet, how):
    with capture(unet, keep="full", kinds=KINDS) as eager:
        [denoise(unet, seed) for seed in range(3)]
    inner = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    compiled_modules = [unet] if how.startswith("whole") else inner
    try:
        for module in compiled_modules:
            module.compile(backend=how.split(", ")[1], fullgraph=True)
        plain = [denoise(unet, seed) for seed in range(3)]
        with Counted() as before:
            denoise(unet, 0)
        with Counted() as during, quietly(unet) as cap:
            outputs = [denoise(unet, seed) for seed in range(3)]
        with Counted() as after:
            assert torch.equal(denoise(unet, 1), plain[1])
    finally:
        for module in compiled_modules:
            module._compiled_call_impl = None
    assert (during.breaks, before.graphs, after.graphs) == ({}, 0, 0)
    assert len(cap.maps) == 24
    same(cap.maps, eager.maps, atol=1e-5)
    assert all(torch.equal(output, other) for output, other in zip(outputs[1:], plain[1:], strict=True))
    assert all(site.calls == 3 and site.check < 1e-5 for site in cap.sites)


@pytest.fixture(scope="module")
def stable_audio():
    from tests import tiny

    return tiny.stable_audio()


@pytest.mark.parametrize("how", ["whole, aot_eager", pytest.param("blocks, inductor", marks=pytest.mark.slow)])
def test_the_diffusion_transformer_of_stable_audio(stable_audio, how):
    """Grouped heads, and a pipeline: words, steps, guidance branches."""
    from tests.tiny import generate

    def run():
        return generate(stable_audio, "a bass and drums", steps=3)

    with capture(stable_audio, words=["bass"]) as eager:
        run()
    original = stable_audio.transformer
    where, backend = how.split(", ")
    try:
        if where == "whole":
            stable_audio.transformer = torch.compile(original, backend=backend, fullgraph=True)
        else:
            for block in original.transformer_blocks:
                block.compile(backend=backend, fullgraph=True)
        run()
        with Counted() as during, quietly(stable_audio, keep="pooled", words=["bass"], kinds=("cross",)) as cap:
            run()
    finally:
        stable_audio.transformer = original
        for block in original.transformer_blocks:
            block._compiled_call_impl = None
    assert (during.breaks, during.graphs) == ({}, 1)
    same(cap.maps, eager.maps, atol=1e-5)
    assert {site.calls for site in cap.sites if site.captured} == {3}


@torch.no_grad()
def test_the_dispatcher_of_diffusers(inputs):
    """It is seen first in eager code; in compiled code the SDPA that it goes on to is tapped."""
    from diffusers.models import attention_dispatch

    class Dispatched(Attention):
        def forward(self, x, context):
            tensors = self.to_q(x), self.to_k(context), self.to_v(context)
            return attention_dispatch.dispatch_attention_fn(*(t.unflatten(-1, (4, -1)) for t in tensors)).flatten(2)

    torch.manual_seed(0)
    model = Dispatched().eval()
    with capture(model, keep="full", kinds=KINDS) as eager:
        [model(*x) for x in inputs]
    target = torch.compile(model, backend="aot_eager", fullgraph=True)
    with Counted() as during, quietly(target) as cap:
        [target(*x) for x in inputs]
    assert [site.kernel for site in cap.sites] == ["diffusers:native"]
    assert (during.breaks, during.graphs) == ({}, 1)
    same(cap.maps, eager.maps, atol=1e-6)
    with attention_dispatch.attention_backend("flex"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        cap, _ = refused(model_again(model), "diffusers:flex is not F.sc", lambda m: [m(*x) for x in inputs])
    assert cap.maps[""].sizes["call"] == 3


def model_again(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def test_an_edit_of_a_compiled_pipeline(stable_audio):
    from tests.tiny import generate

    with intervene(stable_audio, reweight={"bass": 0.0}):
        expected = generate(stable_audio, "a bass and drums")
    stable_audio.transformer.compile(backend="eager")
    try:
        with pytest.warns(CompiledModelWarning, match="an edit changes outputs"):
            with intervene(stable_audio, reweight={"bass": 0.0}):
                edited = generate(stable_audio, "a bass and drums")
    finally:
        stable_audio.transformer._compiled_call_impl = None
    assert torch.equal(torch.as_tensor(edited), torch.as_tensor(expected))


def test_nothing_captured_is_still_an_error(net, inputs):
    target = compile_it(net, "torch.compile(m)")
    with torch.no_grad(), pytest.raises(NothingCaptured, match="name does not match"), quietly(target, layers="no.*"):
        target(*inputs[0])
        target(*inputs[1])
