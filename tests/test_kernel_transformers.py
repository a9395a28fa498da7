"""transformers: every model's maps equal its own eager ``output_attentions``, head by head, whichever function computed them."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    GptOssConfig,
    GptOssModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    MusicgenForConditionalGeneration,
    T5Config,
    T5Model,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from aiba_hooks import CheckColumnError, capture
from aiba_hooks.interception import ACTIVE, PATCHES
from aiba_hooks.testing import check_kernel
from aiba_plugins.kernels.transformers_interface import InterfaceAttention

REGISTERED = dict(AttentionInterface._global_mapping)
SDPA = F.scaled_dot_product_attention
LENGTHS = (6, 4)  # of two sequences, the second one padded


@pytest.fixture(autouse=True)
def _nothing_left():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models gain nothing from a second thread, and lose much where another process runs
    yield
    torch.set_num_threads(threads)
    assert AttentionInterface._global_mapping == REGISTERED
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert F.scaled_dot_product_attention is SDPA
    assert ACTIVE.get() == ()
    assert not PATCHES._table


def sharpened(model, factor=1.5):
    """Random weights give flat attention, which hides mistakes. Only what makes logits is scaled."""
    for name, parameter in model.named_parameters():
        if any(
            part in name for part in ("q_proj", "k_proj", ".q.", ".k.", "c_attn", "q_attn", "relative_attention_bias")
        ):
            parameter.data = parameter.data * factor
        if "relative_attention_bias" in name:
            parameter.data = torch.randn_like(parameter)
    return model.eval()


def ids(count, vocabulary=20, seed=0):
    return torch.randint(3, vocabulary, (2, count), generator=torch.Generator().manual_seed(seed))


def padding(count, length):
    mask = torch.ones(2, count, dtype=torch.long)
    mask[1, length:] = 0
    return mask


def bart():
    config = BartConfig(
        vocab_size=20,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
        init_std=0.3,
    )
    inputs = {
        "input_ids": ids(6),
        "attention_mask": padding(6, 4),
        "decoder_input_ids": ids(5, seed=1),
        "decoder_attention_mask": padding(5, 3),
    }
    return BartModel, config, inputs, ENCODER_DECODER("{part}.layers.{i}.self_attn", "decoder.layers.{i}.encoder_attn")


def t5():
    config = T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=4,
        d_ff=8,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
    )
    inputs = {"input_ids": ids(6), "attention_mask": padding(6, 4), "decoder_input_ids": ids(5, seed=1)}
    cross = "decoder.block.{i}.layer.1.EncDecAttention"
    return T5Model, config, inputs, ENCODER_DECODER("{part}.block.{i}.layer.0.SelfAttention", cross)


def gpt2():
    config = GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=16, add_cross_attention=True, initializer_range=0.3
    )
    inputs = {
        "input_ids": ids(6),
        "attention_mask": padding(6, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)),
        "encoder_attention_mask": padding(5, 3),
    }
    return GPT2Model, config, inputs, {"attentions": "h.{i}.attn", "cross_attentions": "h.{i}.crossattention"}


def decoder(model, config_class, **options):
    config = config_class(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        **options,
    )
    inputs = {"input_ids": ids(9), "attention_mask": padding(9, 6), "use_cache": False}
    return model, config, inputs, {"attentions": "layers.{i}.self_attn"}


def ENCODER_DECODER(self_attention, cross):
    return {
        "encoder_attentions": self_attention.replace("{part}", "encoder"),
        "decoder_attentions": self_attention.replace("{part}", "decoder"),
        "cross_attentions": cross,
    }


FAMILIES = {
    "bart": bart,
    "t5": t5,
    "gpt2": gpt2,
    "llama, grouped queries": lambda: decoder(LlamaModel, LlamaConfig),
    "mistral, sliding window": lambda: decoder(MistralModel, MistralConfig, sliding_window=3),
}
#: what torch's SDPA cannot do
EAGER_ONLY = {
    "gemma2, softcap": lambda: decoder(Gemma2Model, Gemma2Config, attn_logit_softcapping=2.0, sliding_window=4),
    "gpt_oss, sinks": lambda: decoder(
        GptOssModel, GptOssConfig, num_local_experts=2, num_experts_per_tok=2, sliding_window=4
    ),
}
CASES = [(name, implementation) for name in FAMILIES for implementation in ("sdpa", "eager")]
CASES += [(name, "eager") for name in EAGER_ONLY]
# not GPT-2 (transformers refuses it) nor T5 (its position bias has one row, and transformers' score_mod reads one per sequence)
CASES += [(name, "flex_attention") for name in ("bart", "llama, grouped queries", "mistral, sliding window")]
CASES += [("gemma2, softcap", "flex_attention")]


def build(family, implementation):
    model_class, config, inputs, layout = {**FAMILIES, **EAGER_ONLY}[family]()
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return sharpened(model_class(config)), inputs, layout


def reference(family, layout):
    """transformers' own probabilities: site name -> [B, H, Tq, Tk]."""
    model, inputs, _ = build(family, "eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    return {
        name.format(i=i): probabilities
        for field, name in layout.items()
        for i, probabilities in enumerate(output[field])
    }


def tensors(output):
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_full_maps_equal_the_models_own_eager_attentions(family, implementation):
    model, inputs, layout = build(family, implementation)
    # flex is compiled where it is called; a capture of a compiled model runs eagerly, and so does this test
    stance = torch.compiler.set_stance("force_eager" if implementation == "flex_attention" else "default")
    with stance, torch.no_grad():
        plain = model(**inputs)
        with capture(model, keep="full", kinds=("cross", "self", "joint", "unknown"), heads="all") as cap:
            captured = model(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(captured), strict=True))
    expected = reference(family, layout)
    assert {site.name for site in cap.sites} == set(expected)
    assert cap.uncovered == []
    function = (
        "eager_attention_forward" if implementation == "eager" else f"{implementation.split('_')[0]}_attention_forward"
    )
    valid = inputs["attention_mask"].bool()
    for site in cap.sites:
        assert (site.kernel, site.calls) == (f"transformers:{function}", 1)
        ours, theirs = cap.maps[site.name].values[0], expected[site.name].numpy()
        if theirs.shape[2] == valid.shape[1]:
            # what padding attends to is nobody's business: the implementations mask it differently
            keep = valid[:, None, :, None].numpy()
            ours, theirs = ours * keep, theirs * keep
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert theirs.std() > 0.02, "too flat to tell"


def test_what_was_tested_is_what_it_says(monkeypatch):
    """The families above do use causal masks, padding, grouped queries, a window, softcapping and sinks."""
    for family, key_heads in (("bart", 4), ("llama, grouped queries", 2)):
        model, inputs, _ = build(family, "sdpa")
        with torch.no_grad(), capture(model, keep="full", kinds=("self",)) as cap:
            model(**inputs)
        assert cap.sites[0].key_shape[1] == key_heads
        assert cap.sites[0].query_shape[1] == 4
    maps = reference("mistral, sliding window", {"attentions": "{i}"})["0"][0, 0]
    assert maps[8, 5] == 0 < maps[8, 6] and maps[5, 6] == 0
    sinks = reference("gpt_oss, sinks", {"attentions": "{i}"})["0"].sum(-1)
    assert sinks.min() < 0.9
    padded = reference("bart", {"cross_attentions": "{i}"})["0"]
    assert padded[1, :, :, 4:].abs().max() < 1e-6 < padded[0, :, :, 4:].max()


def test_row_sums_below_one_are_reported_for_sinks_and_are_no_error():
    model, inputs, _ = build("gpt_oss, sinks", "eager")
    with torch.no_grad(), capture(model, keep="full", kinds=("self",)) as cap:
        model(**inputs)
    assert all(site.row_sum[0] < 0.9 and site.row_sum[1] < 1 + 1e-5 and site.check < 1e-5 for site in cap.sites)


def test_gpt2s_own_upcast_attention():
    expected = reference("gpt2", {"attentions": "h.{i}.attn"})
    model_class, config, inputs, _ = gpt2()
    config.reorder_and_upcast_attn = True
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = sharpened(model_class(config))
    before = modeling_gpt2.GPT2Attention._upcast_and_reordered_attn
    with torch.no_grad(), capture(model, keep="full", kinds=("self",), heads="all") as cap:
        assert modeling_gpt2.GPT2Attention._upcast_and_reordered_attn is not before
        model(**inputs)
    assert modeling_gpt2.GPT2Attention._upcast_and_reordered_attn is before
    assert {site.kernel for site in cap.sites} == {"transformers:_upcast_and_reordered_attn"}
    for name, probabilities in expected.items():
        np.testing.assert_allclose(cap.maps[name].values[0], probabilities, atol=1e-5)


# ---- MusicGen, generating


@pytest.fixture(scope="module")
def musicgen():
    from transformers import EncodecConfig, MusicgenConfig, MusicgenDecoderConfig

    text = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=4)
    audio = EncodecConfig(
        sampling_rate=16,
        num_filters=2,
        hidden_size=8,
        codebook_size=16,
        codebook_dim=8,
        upsampling_ratios=[2, 1],
        num_lstm_layers=1,
        target_bandwidths=[0.128],
    )
    music = MusicgenDecoderConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=8,
        num_codebooks=4,
        max_position_embeddings=32,
        initializer_factor=0.5,
        pad_token_id=16,
        bos_token_id=16,
    )
    config = MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=music)
    torch.manual_seed(0)
    return MusicgenForConditionalGeneration(config).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_musicgens_maps_equal_its_eager_attentions(musicgen, implementation):
    decoder = sharpened(musicgen.decoder, 1.0)
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    inputs = {
        "input_ids": torch.randint(0, 16, (8, 7), generator=torch.Generator().manual_seed(2)),
        "encoder_hidden_states": text,
        "encoder_attention_mask": padding(5, 3),
        "use_cache": False,
    }
    with torch.no_grad():
        decoder.set_attn_implementation("eager")
        eager = decoder(**inputs, output_attentions=True)
        decoder.set_attn_implementation(implementation)
        plain = decoder(**inputs)
        with capture(decoder, keep="full", kinds=("cross", "self"), heads="all") as cap:
            captured = decoder(**inputs)
    assert torch.equal(plain.logits, captured.logits)
    assert len(cap.sites) == 4
    for i in range(2):
        layer = f"model.decoder.layers.{i}"
        np.testing.assert_allclose(cap.maps[f"{layer}.self_attn"].values[0], eager.attentions[i], atol=1e-5)
        np.testing.assert_allclose(cap.maps[f"{layer}.encoder_attn"].values[0], eager.cross_attentions[i], atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generating_with_a_cache_is_captured_and_unchanged(musicgen, implementation):
    """One query a forward, keys from the cache: what is asked again never reaches the cache."""
    inputs = {"input_ids": ids(5), "attention_mask": padding(5, 3)}
    musicgen.decoder.set_attn_implementation(implementation)

    def generate():
        torch.manual_seed(0)
        with torch.no_grad():
            return musicgen.generate(**inputs, max_new_tokens=6, do_sample=False, guidance_scale=3.0)

    plain = generate()
    with capture(musicgen.decoder, keep="full", kinds=("cross", "self", "unknown")) as cap:
        captured = generate()
    assert torch.equal(plain, captured)
    cross = cap.maps["model.decoder.layers.0.encoder_attn"]
    assert cross.sizes["key"] == 5
    assert cross.sizes["batch"] == 4  # two prompts, with and without guidance
    own = cap.maps["model.decoder.layers.1.self_attn"].isel(batch=0, query=0)
    # transformers runs the first position twice
    assert own.notnull().sum("key").values.tolist() == [1, *range(1, own.sizes["call"])]
    np.testing.assert_allclose(own.sum("key"), 1, atol=1e-5)


# ---- the interface


class Calling(nn.Module):
    """Looks its function up the way the modeling files do, in a file with an interface of its own."""

    def __init__(self, file, name, **options):
        super().__init__()
        self.file, self.name, self.options = file, name, options
        self.is_causal = False

    def forward(self, q, k, v, mask=None):
        return self.look_up()(self, q, k, v, mask, **self.options)[0]

    def look_up(self):
        return (
            self.file.eager_attention_forward if self.name == "eager" else self.file.ALL_ATTENTION_FUNCTIONS[self.name]
        )


@pytest.fixture
def file(monkeypatch):
    """A modeling file of someone's own, with a mapping of its own."""
    made = types.ModuleType("somebodys_modeling_file")
    made.ALL_ATTENTION_FUNCTIONS = AttentionInterface()
    made.eager_attention_forward = modeling_llama.eager_attention_forward
    made.Calling = type("Calling", (Calling,), {"__module__": made.__name__})
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def qkv(heads=4, kv_heads=4, queries=5, keys=7, dim=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, queries, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def by_hand(q, k, scale=None):
    return (q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def wrapped(*args, **kwargs):
    """As transformers' documentation writes them."""
    return REGISTERED["sdpa"](*args, **kwargs)


def renamed(layer, q_states, k_states, v_states, mask, dropout=0.0, scaling=None, **kwargs):
    """Other names, and heads and channels joined in the output."""
    output, weights = REGISTERED["sdpa"](layer, q_states, k_states, v_states, mask, dropout=dropout, scaling=scaling)
    return output.flatten(2), weights


@pytest.mark.parametrize("function", [wrapped, renamed])
@pytest.mark.parametrize("mapping", ["local", "global"])
def test_functions_that_users_register_are_captured_and_restored(file, monkeypatch, function, mapping):
    if mapping == "local":
        file.ALL_ATTENTION_FUNCTIONS["mine"] = function
    else:
        monkeypatch.setitem(AttentionInterface._global_mapping, "mine", function)
    module = file.Calling(file, "mine", scaling=0.3)
    q, k, v = qkv()
    plain = module(q, k, v)
    with capture(module, keep="full", heads="all") as cap:
        assert file.ALL_ATTENTION_FUNCTIONS["mine"] is not function
        assert torch.equal(module(q, k, v), plain)
    assert file.ALL_ATTENTION_FUNCTIONS["mine"] is function
    (site,) = cap.sites
    assert site.kernel == f"transformers:{function.__name__}"
    np.testing.assert_allclose(cap.maps[""].values[0], by_hand(q, k, 0.3), atol=1e-6)


def test_an_eager_function_imported_by_value_is_captured_and_every_name_is_restored(file):
    eager = modeling_llama.eager_attention_forward
    module = file.Calling(file, "eager", scaling=0.3)
    module.num_key_value_groups = 2
    q, k, v = qkv(kv_heads=2)
    with capture(module, keep="full", heads="all") as cap:
        assert file.eager_attention_forward is not eager
        module(q, k, v)
    assert file.eager_attention_forward is eager
    assert modeling_llama.eager_attention_forward is eager
    np.testing.assert_allclose(cap.maps[""].values[0], by_hand(q, k.repeat_interleave(2, 1), 0.3), atol=1e-6)


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_dropout_is_off_in_the_second_call(file, how):
    module = file.Calling(file, "eager", scaling=0.3, dropout=0.5).train()
    module.num_key_value_groups = 1
    if how == "position":
        module.forward = types.MethodType(
            lambda self, q, k, v: self.file.eager_attention_forward(self, q, k, v, None, 0.3, 0.5)[0], module
        )
    q, k, v = qkv()
    torch.manual_seed(1)
    plain = [module(q, k, v), torch.rand(2)]
    torch.manual_seed(1)
    with capture(module, keep="full", heads="all") as cap:
        captured = [module(q, k, v), torch.rand(2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    np.testing.assert_allclose(cap.maps[""].values[0], by_hand(q, k, 0.3), atol=1e-6)


def test_a_learned_query_of_one_row_has_maps_for_the_whole_batch(file):
    module = file.Calling(file, "sdpa")
    q, k, v = qkv(batch=1)
    with capture(module, keep="full", heads="all") as cap:
        module(q, k, v)
    np.testing.assert_allclose(cap.maps[""].values[0], by_hand(q, k), atol=1e-6)


def test_keys_that_a_causal_call_crops_have_no_attention(file):
    """SDPA's wrapper drops the keys behind the last query where it relies on the causal flag."""
    module = file.Calling(file, "sdpa")
    module.is_causal = True
    q, k, v = qkv()
    with capture(module, keep="full", heads="all") as cap:
        module(q, k, v)
    logits = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~torch.ones(5, 7).tril().bool(), float("-inf"))
    np.testing.assert_allclose(cap.maps[""].values[0], logits.softmax(-1), atol=1e-6)


def test_flash_attention_is_read_through_the_interface(file, monkeypatch):
    """Its signature, by softmax: keyword-only bits of it (sliding_window, softcap, s_aux) reach the second call."""
    import inspect

    seen = []

    def fake(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
        seen.append((dropout, scaling, sliding_window, kwargs))
        logits = query @ key.transpose(-1, -2) * scaling
        near = (torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]).abs() <= sliding_window
        return (logits.masked_fill(~near, float("-inf")).softmax(-1) @ value).transpose(1, 2), None

    real = inspect.signature(REGISTERED["flash_attention_2"]).parameters
    assert set(inspect.signature(fake).parameters) <= set(real)
    assert {"softcap", "s_aux", "is_causal", "cache"} <= set(real)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", fake)
    module = file.Calling(file, "flash_attention_2", scaling=0.3, sliding_window=3, softcap=None, s_aux=None)
    q, k, v = qkv()
    with capture(module, keep="full", heads="all") as cap:
        module(q, k, v)
    near = (torch.arange(7) - torch.arange(5)[:, None]).abs() <= 3
    expected = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~near, float("-inf")).softmax(-1)
    np.testing.assert_allclose(cap.maps[""].values[0], expected, atol=1e-6)
    assert seen == [(0.0, 0.3, 3, {"softcap": None, "s_aux": None})] * len(seen)


def test_a_cache_is_never_passed_on(file, monkeypatch):
    module = file.Calling(file, "sdpa", cache=None, past_key_values=object())
    given = []

    def spy(*args, **kwargs):
        given.append(kwargs.get("past_key_values"))
        return REGISTERED["sdpa"](*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", spy)
    with capture(module, keep="full"):
        module(*qkv())
    assert given[0] is module.options["past_key_values"]
    assert len(given) > 1
    assert set(given[1:]) == {None}
    module = file.Calling(file, "sdpa", cache=types.SimpleNamespace(update=None))
    with (
        pytest.raises(
            NotImplementedError, match="attention with a paged cache .continuous batching. cannot be captured"
        ),
        capture(module, keep="full"),
    ):
        module(*qkv())


def test_a_function_that_is_not_linear_in_its_values_is_an_error(file, monkeypatch):
    def normalised(module, query, key, value, attention_mask, **kwargs):
        output, _ = REGISTERED["sdpa"](module, query, key, F.normalize(value, dim=-1), attention_mask)
        return output, None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", normalised)
    module = file.Calling(file, "sdpa")
    with pytest.raises(CheckColumnError, match="transformers:normalised"), capture(module, keep="full"):
        module(*qkv())


def test_an_edited_output_goes_back_in_the_functions_format(file):
    module = file.Calling(file, "sdpa")
    q, k, v = qkv()
    for function in (REGISTERED["sdpa"], renamed):
        output = function(module, q, k, v, None)
        call = InterfaceAttention().read(function, {"args": (module, q, k, v, None), "kwargs": {}}, output)
        edited = call.restore(call.again(2 * v))
        assert isinstance(edited, tuple)
        assert edited[1] is None
        torch.testing.assert_close(edited[0], 2 * output[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_adapter_conforms(file, implementation):
    module = file.Calling(file, implementation)
    module.num_key_value_groups = 2
    q, k, v = qkv(kv_heads=2)

    def run():
        return module.look_up()(module, q, k, v, None, scaling=0.3, dropout=0.0)

    expected = by_hand(q, k.repeat_interleave(2, 1), 0.3)
    check_kernel(InterfaceAttention(), run, probabilities=expected, modules=[module])
