"""The promises of docs/architecture.md: outputs untouched, everything restored, never empty in silence, checked, bounded."""

from __future__ import annotations

import sys
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aiba_hooks import CaptureBudgetExceeded, DegeneratePooling, NothingCaptured, UnknownBackbone, capture
from aiba_hooks.interception import ACTIVE, PATCHES
from aiba_hooks.plugins import manager
from tests.conftest import generate, state
from tests.test_values import Attention

SDPA = F.scaled_dot_product_attention


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    assert F.scaled_dot_product_attention is SDPA
    assert ACTIVE.get() == ()
    assert not PATCHES._table


# ---- 1. outputs


@pytest.mark.parametrize("options", [{}, {"keep": "full", "kinds": ("cross", "self")}, {"pooling": "max"}])
def test_outputs_are_bit_identical(pipe, options):
    plain = generate(pipe, "a bass and drums", guidance_scale=2.5)
    with capture(pipe, **options):
        captured = generate(pipe, "a bass and drums", guidance_scale=2.5)
    assert np.array_equal(plain, captured)


def test_the_generator_does_not_move_under_dropout(module):
    class Dropped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, q, k, v):
            return SDPA_BY_NAME(q, k, v, dropout_p=0.5)

    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))
    torch.manual_seed(1)
    plain = [Dropped(module)(q, k, v), torch.rand(3)]
    torch.manual_seed(1)
    with capture(Dropped(module), keep="full", kinds=("unknown",)) as cap:
        captured = [cap._denoiser(q, k, v), torch.rand(3)]
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    np.testing.assert_allclose(cap.maps[""].sum("key"), 1, atol=1e-6)  # asked without dropout


def SDPA_BY_NAME(*args, **kwargs):
    return F.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_and_gradients_are_the_same_in_every_grad_mode(module, mode):
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    with mode():
        plain = module(x, context)
        with capture(module, keep="full") as cap:
            captured = module(x, context)
    assert torch.equal(plain, captured)
    assert plain.requires_grad == captured.requires_grad
    assert cap.maps[""].sizes == {"call": 1, "batch": 2, "query": 5, "key": 7}
    if captured.requires_grad:
        a, b = (torch.autograd.grad(out.sum(), module.to_q.weight)[0] for out in (plain, captured))
        assert torch.equal(a, b)


# ---- 2. restoration


def test_everything_is_restored_on_exit_and_the_users_hooks_stay(pipe):
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    before = state(pipe)
    with capture(pipe, words=["bass"]):
        assert hasattr(F.scaled_dot_product_attention, "__wrapped__")
        generate(pipe, "a bass", steps=1)
    assert state(pipe) == before
    assert calls == [1]
    handle.remove()


def test_everything_is_restored_when_the_body_raises_and_what_was_captured_is_kept(pipe):
    before = state(pipe)
    with pytest.raises(ZeroDivisionError), capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=1)
        raise ZeroDivisionError
    assert state(pipe) == before
    assert len(cap.maps) == 16


def test_the_bodys_exception_is_not_masked_by_nothing_captured(module):
    with pytest.raises(KeyError, match="mine"), capture(module, keep="full"):
        raise KeyError("mine")


@pytest.mark.parametrize("fail_at", range(8))
def test_a_failure_halfway_through_entering_is_rolled_back(pipe, monkeypatch, fail_at):
    """Each acquisition of __enter__ in turn fails."""
    before = state(pipe)
    counter = {"n": 0}

    def failing(function):
        def wrapped(*args, **kwargs):
            counter["n"] += 1
            if counter["n"] > fail_at:
                raise OSError("entering failed")
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(PATCHES, "acquire", failing(PATCHES.acquire))
        patch.setattr("aiba_hooks.capturing.SourceWatch", failing(sys.modules["aiba_hooks.capturing"].SourceWatch))
        for method in ("register_forward_pre_hook", "register_forward_hook"):
            patch.setattr(pipe.unet, method, failing(getattr(pipe.unet, method)), raising=False)
        try:
            with capture(pipe, words=["bass"]):
                entered = True
                generate(pipe, "a bass", steps=1)
        except OSError:
            entered = False
    for method in ("register_forward_pre_hook", "register_forward_hook"):
        pipe.unet.__dict__.pop(method, None)
    assert entered == (counter["n"] <= fail_at)
    assert state(pipe) == before


def test_an_error_inside_the_forward_leaves_nothing_listening(pipe):
    handle = pipe.unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=1)
    handle.remove()
    assert not cap.listening
    generate(pipe, "a bass", steps=1)


# ---- interception of names imported by value


def test_a_kernel_imported_by_value_is_captured_and_restored(module):
    importer = types.ModuleType("a_models_own_file")
    importer.scaled_dot_product_attention = SDPA  # from torch.nn.functional import scaled_dot_product_attention
    exec("def attend(q, k, v): return scaled_dot_product_attention(q, k, v)", importer.__dict__)
    sys.modules[importer.__name__] = importer
    try:

        class Model(torch.nn.Module):
            def forward(self, q, k, v):
                return importer.attend(q, k, v)

        q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        model = Model()
        with capture(model, keep="full") as cap:
            model(q, k, v)
        assert cap.sites[0].tag == "cross"
        assert importer.scaled_dot_product_attention is SDPA
    finally:
        del sys.modules[importer.__name__]


@pytest.mark.parametrize("place", ["instance", "class", "staticmethod"])
def test_a_kernel_held_by_a_module_or_its_class_is_captured_and_restored(place):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return self.attend(q, k, v)

    if place == "staticmethod":
        Model.attend = staticmethod(SDPA)
    elif place == "class":
        Model.attend = SDPA  # a builtin is no method: it is not bound
    model = Model()
    if place == "instance":
        model.attend = SDPA
    before = dict(vars(model)), dict(vars(Model))
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with capture(model, keep="full") as cap:
        model(q, k, v)
    assert cap.sites[0].captured
    assert (dict(vars(model)), dict(vars(Model))) == before


def test_a_module_imported_inside_the_block_does_not_keep_the_interceptor(module):
    with capture(module, keep="full"):
        late = types.ModuleType("imported_inside")
        late.scaled_dot_product_attention = F.scaled_dot_product_attention
        sys.modules[late.__name__] = late
        module(torch.randn(1, 3, 32), torch.randn(1, 4, 32))
    try:
        assert late.scaled_dot_product_attention is SDPA
    finally:
        del sys.modules[late.__name__]


def test_someone_elses_patch_made_inside_the_block_is_kept_with_a_warning(module):
    def theirs(*args, **kwargs):
        return SDPA(*args, **kwargs)

    with pytest.warns(RuntimeWarning, match="replaced by someone else"), capture(module, keep="full"):
        module(torch.randn(1, 3, 32), torch.randn(1, 4, 32))
        F.scaled_dot_product_attention = theirs
    assert F.scaled_dot_product_attention is theirs
    F.scaled_dot_product_attention = SDPA


# ---- 3. nesting and threads


def test_captures_nest(pipe):
    with capture(pipe, words=["bass"]) as outer:
        with capture(pipe, words=["drums"], layers="mid*") as inner:
            generate(pipe, "a bass and drums", steps=1)
        generate(pipe, "a bass", steps=1)
    assert len(inner.maps) == 1
    assert len(outer.maps) == 16
    assert outer.maps["mid_block.attentions.2.transformer_blocks.0.attn2"].sizes["prompt"] == 2


@pytest.mark.parametrize("count", [2, 4])
def test_threads_see_only_their_own_calls(count):
    modules = [Attention().eval() for _ in range(count)]
    inputs = [(torch.randn(1, 4 + i, 32), torch.randn(1, 9 + i, 32)) for i in range(count)]
    with torch.no_grad():
        for module, (x, context) in zip(modules, inputs, strict=True):
            module(x, context)
    barrier = threading.Barrier(count)
    found, errors = [None] * count, []

    def work(i):
        try:
            barrier.wait()
            with torch.no_grad(), capture(modules[i], keep="full") as cap:
                for _ in range(20):
                    modules[i](*inputs[i])
            found[i] = cap.maps[""]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, array in enumerate(found):
        assert array.sizes == {"call": 20, "batch": 1, "query": 4 + i, "key": 9 + i}
        assert float(array.std("call").max()) < 1e-6


def test_two_pipelines_in_two_threads_each_see_only_their_own_calls(pipe):
    from aiba_plugins.demo.random_audioldm2 import build

    other = build(seed=1)
    other.set_progress_bar_config(disable=True)
    jobs = [(pipe, "a bass and drums", "bass"), (other, "soft piano with guitar", "piano")]

    def run(target, prompt, word):
        with capture(target, words=[word]) as cap:
            audio = generate(target, prompt, steps=3, seconds=1.28)
        return audio, cap.maps

    alone = [run(*job) for job in jobs]
    barrier, together, errors = threading.Barrier(2), [None, None], []

    def work(i):
        try:
            barrier.wait()
            together[i] = run(*jobs[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for (audio, maps), (expected_audio, expected_maps) in zip(together, alone, strict=True):
        assert np.array_equal(audio, expected_audio)
        assert list(maps) == list(expected_maps)
        assert all(maps[site].identical(expected_maps[site]) for site in maps)


def test_one_module_shared_by_threads_gives_each_capture_its_own_calls():
    module = Attention().eval()
    contexts = [torch.randn(1, 5, 32) for _ in range(2)]
    x = torch.randn(1, 4, 32)
    barrier, found = threading.Barrier(2), [None, None]

    def work(i):
        with torch.no_grad(), capture(module, keep="full") as cap:
            barrier.wait()
            for _ in range(30):
                module(x, contexts[i])
        found[i] = cap.maps[""]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [array.sizes["call"] for array in found] == [30, 30]
    assert all(float(array.std("call").max()) < 1e-6 for array in found)
    assert float(abs(found[0] - found[1]).max()) > 1e-4


# ---- 4. nothing captured


def test_nothing_captured_names_the_sites_and_why_each_did_not_match(pipe):
    with pytest.raises(NothingCaptured) as error, capture(pipe, layers="*.attn3"):
        generate(pipe, "a bass", steps=1)
    message = str(error.value)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1: self" in message
    assert "name does not match layers=['*.attn3']" in message


def test_nothing_captured_says_that_the_denoiser_did_not_run(pipe):
    with pytest.raises(NothingCaptured, match="did not run inside the with block"), capture(pipe):
        pass


def test_nothing_captured_names_attention_that_no_kernel_adapter_caught():
    class OwnAttention(torch.nn.Module):
        def forward(self, x):
            return torch.softmax(x @ x.transpose(-1, -2), -1) @ x

    model = torch.nn.Sequential(OwnAttention())
    with (
        pytest.raises(NothingCaptured, match=r"0 \(OwnAttention\): multiplies a softmax of its own"),
        capture(model, keep="full"),
    ):
        model(torch.randn(1, 4, 8))


def test_a_kind_that_is_there_is_named_when_another_was_asked_for(module):
    with pytest.raises(NothingCaptured, match=r"tagged self, not in kinds=\('cross',\)"), capture(module, keep="full"):
        module(torch.randn(1, 4, 32))


def test_steps_that_are_never_reached(pipe):
    with pytest.raises(ValueError, match="steps=\\[7\\] reaches outside the 2 steps"), capture(pipe, steps=[7]):
        generate(pipe, "a bass", steps=2)


# ---- 5. row sums


def test_row_sums_are_recorded(pipe, module):
    with capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=1)
    captured = [site for site in cap.sites if site.captured]
    assert all(abs(total - 1) < 1e-5 for site in captured for total in site.row_sum)
    assert all(site.check < 1e-5 for site in captured)


def test_masked_rows_are_legitimate(module):
    mask = torch.zeros(1, 1, 4, 5, dtype=torch.bool)
    mask[:, :, 1:] = True  # query 0 may attend to nothing
    with torch.no_grad(), capture(module, keep="full") as cap:
        output = module(torch.randn(1, 4, 32), torch.randn(1, 5, 32), mask)
    del output
    rows = cap.maps[""].sum("key", skipna=False).values[0, 0]
    np.testing.assert_allclose(rows[1:], 1, atol=1e-6)
    assert rows[0] == 0 or np.isnan(rows[0])


# ---- 6. budget


def test_the_budget_is_kept_and_its_error_says_what_would_fit(pipe):
    with pytest.raises(CaptureBudgetExceeded) as error, capture(pipe, budget="4 KiB"):
        generate(pipe, "a bass", steps=2)
    message = str(error.value)
    assert "past budget=4.0 KiB" in message
    assert "reduce_steps='uniform'" in message
    with capture(pipe, words=["bass"], reduce_steps="uniform") as cap:
        generate(pipe, "a bass", steps=3)
    assert cap.held_bytes == cap.maps.nbytes


@pytest.mark.parametrize("budget", ["2 parsecs", "", "-1MB", 0, float("inf")])
def test_a_budget_that_is_no_size_is_refused(module, budget):
    with pytest.raises(ValueError, match="budget must be"):
        capture(module, keep="full", budget=budget)


# ---- degenerate pooling and other input


def test_mean_over_all_keys_is_refused(pipe):
    with pytest.raises(DegeneratePooling, match="1/Tk for every query"):
        capture(pipe, pooling="mean")


def test_words_that_cover_every_key_are_refused():
    from aiba_hooks.selectors import refuse_degenerate

    with pytest.raises(DegeneratePooling, match="covers all 4 keys"):
        refuse_degenerate({"a whole prompt": range(4)}, 4, "sum", "site")
    refuse_degenerate({"part": range(3), "(special)": [3]}, 4, "mean", "site")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("text",)}, "kinds must be one of 'cross', 'self', 'joint', 'unknown'; got 'text'"),
        ({"kinds": ()}, "kinds is empty"),
        ({"branch": "cond"}, "branch must be one of"),
        ({"heads": "max"}, "heads must be one of"),
        ({"keep": "all"}, "keep must be one of"),
        ({"pooling": "median"}, "pooling must be one of"),
        ({"steps": 3}, "steps must be a list of indices"),
        ({"steps": []}, "steps is an empty list"),
        ({"words": []}, "words is an empty list"),
        ({"reduce_steps": "late"}, "reduce_steps must be"),
        ({"reduce_steps": [0.0, 0.0]}, "not all zero"),
        ({"pooling": "weighted", "words": ["bass"]}, "needs words as a mapping"),
    ],
)
def test_bad_options_are_refused_by_value(pipe, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        capture(pipe, **options)


def test_a_target_that_no_backbone_recognises():
    with (
        pytest.raises(UnknownBackbone, match=r"no backbone recognises str \(registered: .*audioldm2"),
        capture("model"),
    ):
        pass
    with pytest.raises(UnknownBackbone, match="no backbone is named 'tango'"), capture("model", backbone="tango"):
        pass


def test_pooling_words_of_a_bare_module_is_refused_with_the_remedy(module):
    with pytest.raises(ValueError, match="Pass keep='full'"), capture(module):
        pass


def test_a_capture_is_entered_once(module):
    cap = capture(module, keep="full", kinds=("self",))
    with cap:
        module(torch.randn(1, 4, 32))
    with pytest.raises(RuntimeError, match="entered once"), cap:
        pass


def test_maps_are_there_after_the_block_only(module):
    with capture(module, keep="full", kinds=("self",)) as cap:
        module(torch.randn(1, 4, 32))
        with pytest.raises(RuntimeError, match="after the with block"):
            _ = cap.maps
    with pytest.raises(KeyError, match="no map of 'up.0'"):
        cap.maps["up.0"]


def test_a_denoiser_that_runs_before_any_prompt(pipe):
    with pytest.raises(RuntimeError, match="Encode the prompt inside the with block"), capture(pipe):
        pipe.unet(torch.randn(1, 8, 16, 16), 3, torch.randn(1, 8, 16))


def test_plugins_are_not_asked_per_call(pipe, monkeypatch):
    with capture(pipe, words=["bass"]) as cap:
        monkeypatch.setattr(manager(), "collect", lambda hook: pytest.fail("pluggy on the per-call path"))
        generate(pipe, "a bass", steps=1)
    assert len(cap.maps) == 16
