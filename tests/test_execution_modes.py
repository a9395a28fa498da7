"""Checkpointed, offloaded, autocast and low-precision models; coverage of what no adapter caught."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from aiba_hooks import NothingCaptured, capture
from aiba_hooks.coverage import CoverageWarning
from tests.conftest import generate
from tests.test_values import Attention


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.out = nn.Linear(32, 32)

    def forward(self, x, context=None):
        return self.out(self.attn(x, context))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 32, generator=generator), torch.randn(2, 5, 32, generator=generator)


def test_an_eager_model_leaves_the_stance_of_the_compiler_alone(block, inputs):
    with torch.no_grad(), capture(block, keep="full"):
        block(*inputs)
        assert torch._dynamo.eval_frame._stance.stance == "default"


# ---- training, checkpointing, precision


def test_gradient_checkpointing_recomputes_without_being_counted_twice(block, inputs):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, context):
            return checkpoint(self.inner, x, context, use_reentrant=False)

    model = Checkpointed(block).train()
    with capture(model, keep="full") as cap:
        model(*inputs).sum().backward()
        model(*inputs).sum().backward()
    assert cap.maps["inner.attn"].sizes["call"] == 2
    assert cap.sites[0].calls == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_and_autocast(block, inputs, dtype):
    with torch.no_grad(), capture(block, keep="full", heads="all") as exact:
        block(*inputs)
    with torch.no_grad(), torch.autocast("cpu", dtype), capture(block, keep="full", heads="all") as cast:
        block(*inputs)
    low = block.to(dtype)
    with torch.no_grad(), capture(low, keep="full", heads="all") as cap:
        low(*(x.to(dtype) for x in inputs))
    for array in (cast.maps["attn"], cap.maps["attn"]):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, exact.maps["attn"], atol=2e-2)


def test_rows_that_overflow_are_reported(block, inputs):
    with torch.no_grad():
        block.attn.to_q.weight.mul_(1e22)
        block.attn.to_k.weight.mul_(1e22)
        with pytest.warns(RuntimeWarning, match=r"rows that are not finite, most of them attn \([1-9]\d* rows, sdpa\)"):
            with capture(block, keep="full") as cap:
                block(*inputs)
    assert cap.sites[0].nonfinite > 0


def test_a_shape_that_changes_between_forwards_is_padded_with_nan(block):
    with torch.no_grad(), capture(block, keep="full") as cap:
        for queries, keys in ((4, 3), (6, 5)):
            block(torch.randn(1, queries, 32), torch.randn(1, keys, 32))
    array = cap.maps["attn"]
    assert array.sizes == {"call": 2, "batch": 1, "query": 6, "key": 5}
    assert np.isnan(array[0, 0, 4:]).all()
    assert np.isnan(array[0, 0, :, 3:]).all()
    np.testing.assert_allclose(array[0, 0, :4].sum("key"), 1, atol=1e-6)


def test_offloaded_parameters_are_not_needed(block, inputs):
    accelerate = pytest.importorskip("accelerate")
    with torch.no_grad(), capture(block, keep="full") as here:
        expected = block(*inputs)
    accelerate.cpu_offload(block, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in block.parameters())
    with torch.no_grad(), capture(block, keep="full") as cap:
        output = block(*inputs)
    assert torch.equal(output, expected)
    np.testing.assert_array_equal(cap.maps["attn"], here.maps["attn"])


# ---- 6. memory


@pytest.mark.parametrize("options", [{"reduce_steps": "uniform"}, {}])
def test_retained_memory_is_flat_when_reduced_and_within_the_budget_otherwise(pipe, options):
    def kept(steps):
        with capture(pipe, words=["bass"], **options) as cap:
            generate(pipe, "a bass", steps=steps)
        gc.collect()
        tensors = {
            id(value): value
            for store in cap._stores.values()
            for value in [*store.values.values(), *store.sums.values()]
        }
        held = sum(value.untyped_storage().nbytes() for value in tensors.values())
        assert held == cap.held_bytes, "what is counted is what is held"
        return held

    few, many = kept(2), kept(6)
    assert many == few if options else many == 3 * few


def test_what_is_kept_does_not_hold_the_models_own_tensors(block, inputs):
    with torch.no_grad(), capture(block, keep="full", kinds=("cross",)) as cap:
        output = block(*inputs)
    held = [value for store in cap._stores.values() for value in store.values.values()]
    assert all(value.untyped_storage().data_ptr() != output.untyped_storage().data_ptr() for value in held)
    assert cap._watch._read == {}


# ---- the coverage audit


class EagerAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        weights = torch.softmax((self.q(x) @ self.k(x).transpose(-1, -2)).float(), -1)
        return F.dropout(weights, 0.1, self.training).to(x.dtype) @ x


class ForeignKernel(nn.Module):
    """Attention by a kernel that torch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.to_qkv(x).detach().numpy().reshape(*x.shape[:2], 3, 32).swapaxes(0, 2)
        return x + torch.from_numpy((q + k + v).swapaxes(0, 1).copy())[: x.shape[0]]


class ForeignAttention(ForeignKernel):
    pass


@pytest.mark.parametrize(
    ("module", "reason"),
    [(EagerAttention, "multiplies a softmax of its own"), (ForeignAttention, "called no kernel that an adapter knows")],
)
def test_attention_that_no_adapter_caught_is_named_with_the_remedy(inputs, module, reason):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = Attention(), module()

        def forward(self, x, context):
            return self.unseen(self.seen(x, context))

    model = Both().eval()
    with (
        torch.no_grad(),
        pytest.warns(CoverageWarning, match=rf"unseen \({module.__name__}\): .*{reason}.*write a kernel"),
    ):
        with capture(model, keep="full") as cap:
            model(*inputs)
    assert [(entry.name, entry.module) for entry in cap.uncovered] == [("unseen", module.__name__)]
    assert list(cap.maps) == ["seen"]


def test_full_coverage_warns_of_nothing(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        with capture(pipe, words=["bass"], layers="mid*") as cap:
            generate(pipe, "a bass", steps=1)
    assert cap.uncovered == []


def test_nothing_captured_names_uncovered_attention(inputs):
    model = nn.Sequential(EagerAttention()).eval()
    with torch.no_grad(), pytest.raises(NothingCaptured, match=r"0 \(EagerAttention\)"), capture(model, keep="full"):
        model(inputs[0])
