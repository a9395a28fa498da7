"""What makes a capture cheap gives the same maps: the fused kernel, all keys in one pass, one branch only, deferred checks.

The fused kernel's own cases are in ``fused_cases.py``. They need an accelerator or Triton's interpreter, which is chosen when
Triton is imported: so they run in processes of their own."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from aiba_hooks import AttentionCall, Kernel, capture, dense, fused
from aiba_hooks.checks import Check, CheckLog, deviation, deviations
from aiba_hooks.kernels.sdpa import ScaledDotProductAttention
from tests.conftest import generate
from tests.test_properties import attention, read, tolerance

ROOT = Path(__file__).parent.parent
KERNEL = ScaledDotProductAttention()
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)"
)


def run_cases(**environment):
    command = [sys.executable, "-m", "pytest", "tests/fused_cases.py", "-q", "--no-header", "-p", "no:cacheprovider"]
    made = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", made.stdout)
    assert "skipped" not in made.stdout


@needs_triton
def test_the_fused_kernel_in_tritons_interpreter():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_fused_kernel_on_a_gpu():
    run_cases(TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("function", ["pool", "receive"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(function, dtype):
    """The interpreter accepts what the compiler does not."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aiba_hooks import triton_kernels
kernel = triton_kernels.{function}
exact = {dtype == "fp32"}
size = 32 if exact else 64
fixed = dict(REPEAT=2, HEADS=2, MASK=2, CAUSAL=True, DIM=40, BM=size, BN=size, BD=64, WIDEN=False,
             PRECISION="ieee" if exact else "tf32")
if {function == "pool"}:
    fixed |= dict(POOL=True, NORMALISER=True, CHECK=True, BG=16)
own = dict.fromkeys(("query", "key", "value", "output", "mask"), "*{dtype}") | dict.fromkeys(("scale", "weight"), "fp32")
own |= dict.fromkeys(("selector", "pooled", "normaliser", "extremes", "received"), "*fp32")
names = kernel.arg_names
signature = {{name: "constexpr" if name in fixed else own.get(name, "i32") for name in names}}
source = ASTSource(kernel, signature, {{(names.index(name),): value for name, value in fixed.items()}})
made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(len(made.asm["cubin"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    assert int(made.stdout) > 1000


# ---- which path is taken


def test_a_choice_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv(fused.VARIABLE, "perhaps")
    with pytest.raises(ValueError, match="AIBA_FUSED must be one of auto, never, always; got 'perhaps'"):
        fused.choice()


def test_always_needs_the_interpreter_on_a_cpu(pipe, monkeypatch):
    monkeypatch.setenv(fused.VARIABLE, "always")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Triton is imported"):
        with capture(pipe, words=["bass"]):
            generate(pipe, "a bass", steps=1)


def test_a_kernel_that_cannot_be_launched_is_given_up_with_a_warning_and_the_maps_are_the_same(pipe, monkeypatch):
    with capture(pipe, words=["bass"], kinds=("cross", "self"), layers="mid_block.*") as plain:
        generate(pipe, "a bass", steps=1)
    tries = []

    def broken(*args, **kwargs):
        tries.append(1)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused, "serves", lambda call, chosen: not fused._broken)
    monkeypatch.setattr(fused, "pool", broken)
    monkeypatch.setattr(fused, "received", broken)
    monkeypatch.setattr(fused, "_broken", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(pipe, words=["bass"], kinds=("cross", "self"), layers="mid_block.*") as cap:
            generate(pipe, "a bass", steps=1)
    assert len(tries) == 1
    assert ["no compiler" in str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)] == [True]
    for name, array in cap.maps.items():
        np.testing.assert_array_equal(array, plain.maps[name])


# ---- every key in one pass


@given(attention(), st.booleans(), st.sampled_from([2**6, 2**9, 2**20]))
def test_all_keys_in_one_pass_are_the_softmax(inputs, mean, block):
    call, expected = read(inputs)
    if call.formula is None:
        assert inputs[0][0].ndim != 4
        return
    heads = expected.mean(1) if mean else expected
    selector = torch.rand(1, call.keys, 9, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dense.BLOCK, "cpu", block)
        patch.setattr(dense, "FEWEST", 2)
        for ours, theirs in (
            (dense.received(call, mean), heads.mean(-2)),
            (dense.every_key(call, mean), heads),
            (dense.largest(call, mean), heads.amax(-1, keepdim=True)),
            (dense.pool(call, selector, mean), heads @ (selector.double() if mean else selector[:, None].double())),
        ):
            np.testing.assert_allclose(ours[0], theirs, atol=1e-6)
            assert float(ours[1].error) <= call.allowed


@given(attention(), st.booleans(), st.data())
def test_what_groups_of_queries_attend_to(inputs, mean, data):
    call, expected = read(inputs)
    if call.formula is None:
        return
    batch, _, queries, _ = call.query.shape
    weights = torch.rand(batch, queries, 3, generator=torch.Generator().manual_seed(0))
    first = data.draw(st.integers(0, queries))
    weights[:, :first] = 0
    last = data.draw(st.integers(first, queries))
    weights[:, last:] = 0
    theirs = torch.einsum("bhqk,bqg->bhkg", expected, weights.double())
    made = dense.from_queries(call, weights, slice(first, last), mean)
    np.testing.assert_allclose(made, theirs.mean(1) if mean else theirs, atol=1e-5)


def test_a_query_without_a_key_attends_to_nothing():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4) for n in (3, 5, 5))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    for given_mask in (mask, torch.zeros(3, 5).masked_fill(~mask, -math.inf)):
        call = KERNEL.read(
            F.scaled_dot_product_attention,
            KERNEL.bind(None, (q, k, v), {"attn_mask": given_mask}),
            F.scaled_dot_product_attention(q, k, v, attn_mask=given_mask),
        )
        full, check = dense.every_key(call, False)
        np.testing.assert_allclose(full, torch.cat([part for _, part, _ in call.ask_keys()], -1), atol=1e-6)
        assert float(full[:, :, 1].abs().max()) == 0
        assert float(check.error) < 1e-6


@given(attention(), st.sampled_from(["scale", "keys", "values"]))
def test_a_misread_call_does_not_pass_the_check_of_the_one_pass(inputs, mistake):
    (q, k, v), options, _ = inputs
    output = F.scaled_dot_product_attention(q, k, v, **options)
    wrong = {"scale": (q * 1.7, k, v), "keys": (q, k.roll(1, -2), v), "values": (q, k, v.roll(1, -2))}[mistake]
    call = KERNEL.read(F.scaled_dot_product_attention, KERNEL.bind(None, wrong, options), output)
    if call.formula is None:
        return
    made = F.scaled_dot_product_attention(*wrong, **options)
    moved = float(deviation(made[..., 0], output[..., 0]))
    error = float(dense.received(call, True)[1].error)
    assert abs(error - moved) <= 2e-2 * moved + call.allowed


def test_the_fewest_calls_are_made(pipe):
    """Conditional rows alone; as few asks as the width allows; the attention that keys receive without any."""
    asked, sizes = [], {}
    true = F.scaled_dot_product_attention

    def counting(query, *args, **kwargs):
        asked.append(query.shape[0])
        return true(query, *args, **kwargs)

    read_call = ScaledDotProductAttention.read

    def counted(self, function, arguments, output):
        sizes["batch"] = arguments["query"].shape[0]
        return read_call(self, counting, arguments, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScaledDotProductAttention, "read", counted)
        with capture(pipe, words=["bass"]) as words:
            generate(pipe, "a bass", steps=2)
        assert sizes["batch"] == 2
        wide = [s for s in words.sites if s.captured and words.maps[s.name].sizes["word"] + 2 <= s.key_shape[-1]]
        assert wide
        assert asked == [1] * (2 * len(wide))
        asked.clear()
        with capture(pipe, kinds=("self",), branch="both") as both:
            generate(pipe, "a bass", steps=1)
    single = [site for site in both.sites if site.captured and site.key_shape[-2] < site.key_shape[-1]]
    assert asked == [2] * len(single)


@pytest.mark.parametrize(("dtype", "known"), [(torch.float32, False), (torch.float64, True), (torch.bfloat16, True)])
def test_the_formula_does_not_stand_for_a_kernel_that_rounds_products(dtype, known):
    q = torch.ones(1, 1, 2, 4, dtype=dtype)
    call = KERNEL.read(F.scaled_dot_product_attention, KERNEL.bind(None, (q, q, q), {}), q)
    assert call.known
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert call.known is known
        assert not known or not fused.serves(call, "never")
    finally:
        torch.set_float32_matmul_precision(before)


# ---- rows of the batch


@given(attention(), st.data())
def test_some_rows_alone_are_those_rows(inputs, data):
    call, expected = read(inputs)
    if call.narrow is None:
        assert inputs[0][0].ndim != 4
        return
    batch = call.query.shape[0]
    start = data.draw(st.integers(0, batch - 1))
    stop = data.draw(st.integers(start + 1, batch))
    some = call.narrow(start, stop)
    assert torch.equal(some.output, call.output[start:stop])
    full = torch.cat([part for _, part, _ in some.ask_keys()], -1).double()
    np.testing.assert_allclose(full, expected[start:stop], atol=tolerance(call))


# ---- checks of a whole forward together


def columns(answer, output):
    return Check("columns", torch.stack([answer, output]))


def test_checks_are_reduced_together_and_kept_apart():
    torch.manual_seed(0)
    log, expected = CheckLog(), {}
    for _ in range(3):
        for index, size in enumerate((4, 7, 4, 9)):
            output = torch.randn(1, 2, size)
            answer = output + torch.randn(1, 2, size) * 10.0**-index
            key = ("site", index)
            log.note(key, columns(answer, output))
            expected[key] = max(expected.get(key, 0.0), float(deviation(answer, output)))
        log.note(("given", 0), Check("error", torch.tensor(0.25)))
        slot = log.slot(torch.device("cpu"))
        slot.copy_(torch.tensor([0.5, 4.0]))
        log.note(("fused", 0), Check("extremes", slot))
        log.flush()
    found = dict(log.errors())
    assert found == pytest.approx({**expected, ("given", 0): 0.25, ("fused", 0): 0.125}, rel=1e-6)


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr("aiba_hooks.checks.WAITING", {"cpu": 100})
    log = CheckLog()
    for index in range(10):
        log.note(("site", index % 2), columns(torch.ones(1, 1, 10), torch.full((1, 1, 10), 2.0)))
        log.sums(("site", index % 2), torch.full((3,), float(index)))
    assert log._bytes <= 100
    assert dict(log.errors()) == {("site", 0): 0.5, ("site", 1): 0.5}
    assert {key: span for key, span, _ in log.row_sums()} == {("site", 0): (0.0, 8.0), ("site", 1): (1.0, 9.0)}


def test_rows_without_a_finite_sum_are_counted():
    log = CheckLog()
    log.sums(("a", 0), torch.tensor([1.0, math.nan, 0.5]))
    log.sums(("b", 0), torch.tensor([math.inf, math.nan, math.nan]))
    log.flush()
    log.sums(("a", 0), torch.tensor([0.75, math.nan, 2.0]))
    log.sums(("b", 0), torch.tensor([math.inf, math.nan, math.nan]))
    (_, span, broken), (_, (low, high), all_broken) = log.row_sums()
    assert (span, broken) == ((0.5, 2.0), 2)
    assert low > high
    assert all_broken == 6


def test_a_deviation_ignores_what_the_model_made_non_finite_and_nothing_else():
    output = torch.tensor([[1.0, math.nan, 4.0], [1.0, math.inf, 4.0], [1.0, 2.0, 4.0]])
    answer = torch.tensor([[1.0, 9.0, 2.0], [1.0, math.nan, 4.0], [1.0, math.nan, 4.0]])
    assert deviations(answer, output).tolist() == [0.5, 0.0, math.inf]


# ---- binding without inspect


def plain(a, b, c=3, *, d=4):
    """A function to bind."""


@given(st.integers(0, 5), st.sets(st.sampled_from("abcde")))
def test_binding_is_that_of_the_signature(count, names):
    args, kwargs = tuple(range(count)), {name: name for name in names}
    signature = inspect.signature(plain)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        with pytest.raises(TypeError, match=re.escape(str(error))):
            Kernel().bind(plain, args, kwargs)
        return
    bound.apply_defaults()
    ours = Kernel().bind(plain, args, kwargs)
    assert ours == dict(bound.arguments)
    assert list(ours) == list(bound.arguments)


@pytest.mark.parametrize("function", [lambda *a, **k: None, lambda a, /, b=1: None, lambda: None])
def test_signatures_that_need_inspect_are_left_to_it(function):
    arguments = (1,) if inspect.signature(function).parameters else ()
    bound = inspect.signature(function).bind(*arguments)
    bound.apply_defaults()
    assert Kernel().bind(function, arguments, {}) == dict(bound.arguments)


def test_values_are_written_once_and_the_check_column_every_time():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    templates, selector = [], torch.rand(1, 6, 20)
    for _ in range(2):
        v = torch.randn(1, 2, 6, 8)
        call = AttentionCall(
            "sdpa",
            q,
            k,
            v,
            F.scaled_dot_product_attention(q, k, v),
            lambda values: F.scaled_dot_product_attention(q, k, values),
        )
        pooled, check = call.pool(selector, None, templates)
        assert len(templates) == 3
        assert float(check.error) < 1e-5
        expected = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ selector
        np.testing.assert_allclose(pooled, expected, atol=1e-6)
