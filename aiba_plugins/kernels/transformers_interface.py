"""transformers' attention functions: everything that its models look up in ``ALL_ATTENTION_FUNCTIONS``, and their eager default.

An attention function takes (module, query [B, H, Tq, D], key [B, Hk, Tk, D], value [B, Hk, Tk, D], attention_mask, ...) and
returns (output [B, Tq, H, D], weights or None). It is looked up

- in the class-wide mapping of ``AttentionInterface``: sdpa, flex, FlashAttention and what users register;
- in the mapping of a modeling file's own instance;
- as ``eager_attention_forward``, a global of every modeling file.

Models that compute attention inline (transformers 5.23: BARK, SpeechT5, VITS, BLOOM and some 80 more) have no function to
intercept; the coverage audit names them. GPT-2's own ``_upcast_and_reordered_attn`` is one, as its method returns the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from aiba_hooks.kernel import Kernel
from aiba_hooks.specs import hookimpl
from aiba_plugins.kernels.arguments import first, like, refuse

if TYPE_CHECKING:
    from torch import Tensor

    from aiba_hooks.calls import AttentionCall

#: what every attention function is called with, in order; some name them otherwise
_LEADING = ("module", "query", "key", "value", "attention_mask")
#: what no second call may have: it would append to them
_CACHES = ("past_key_value", "past_key_values")


class InterfaceAttention(Kernel):
    """Functions of transformers' attention interface. The kernel's name says which one ran."""

    name = "transformers"

    def places(self, modules: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
        library = sys.modules.get("transformers.modeling_utils")
        interface = getattr(library, "AttentionInterface", None)
        if interface is None:
            return
        files = [f for f in _files(modules) if any(isinstance(value, interface) for value in vars(f).values())]
        local = [value for f in files for value in vars(f).values() if isinstance(value, interface)]
        registries = [interface._global_mapping]
        registries += [mapping for own in local for mapping in (type(own)._global_mapping, own._local_mapping)]
        for mapping in {id(mapping): mapping for mapping in registries}.values():
            for name, function in mapping.items():
                yield mapping, name, function
        for file in files:
            for name, value in vars(file).items():
                if name.endswith("eager_attention_forward") and callable(value):
                    yield file, name, value

    def bind(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """As it was called: what users register may take (*args, **kwargs), so that a signature does not say what is what."""
        return {"args": args, "kwargs": kwargs}

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall

        name = f"{self.name}:{function.__name__}"
        args, kwargs = list(arguments["args"]), dict(arguments["kwargs"])
        if kwargs.get("cache") is not None:
            refuse(
                name,
                "attention with a paged cache (continuous batching)",
                "Run model.generate(...) while it is captured",
            )
        kwargs.update({cache: None for cache in _CACHES if cache in kwargs})
        names = self._names(function)
        _, query, key, value = (args[i] if i < len(args) else kwargs[names[i]] for i in range(4))
        dropout = 0.0
        if "dropout" in kwargs:
            dropout, kwargs["dropout"] = kwargs["dropout"], 0.0
        elif "dropout" in names[: len(args)]:
            dropout, args[names.index("dropout")] = args[names.index("dropout")], 0.0
        result = first(output)

        def again(values: Tensor) -> Tensor:
            if len(args) > 3:
                answer = function(*args[:3], values, *args[4:], **kwargs)
            else:
                answer = function(*args, **{**kwargs, names[3]: values})
            return _heads_first(first(answer), query)

        return AttentionCall(
            kernel=name,
            # a learned query may have one row for the whole batch
            query=query.expand(result.shape[0], *query.shape[1:]),
            key=key,
            value=value,
            output=_heads_first(result, query),
            again=again,
            dropout=float(dropout or 0.0),
            restore=lambda edited: like(output, edited.transpose(1, 2).reshape(result.shape)),
        )

    def _names(self, function: Callable[..., Any]) -> list[str]:
        """What the function calls its positional arguments: module, query, key, value, ..."""
        kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        named = [p.name for p in self._signature(function).parameters.values() if p.kind in kinds]
        return [*named, *_LEADING[len(named) :]]


class UpcastAttention(Kernel):
    """GPT-2's method for ``reorder_and_upcast_attn``, which DecisionTransformer and ImageGPT copy. It returns the weights."""

    name = "transformers:_upcast_and_reordered_attn"

    def places(self, modules: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
        from aiba_hooks.interception import classes_of

        method = "_upcast_and_reordered_attn"
        for cls in classes_of(modules):
            if method in vars(cls):
                yield cls, method, vars(cls)[method]

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall

        _, weights = output
        layer = arguments["self"].attn_dropout
        return AttentionCall.from_probabilities(self.name, weights, layer.p if layer.training else 0.0)


def _files(modules: Sequence[Any]) -> list[Any]:
    """The Python modules that define the classes of the target."""
    from aiba_hooks.interception import classes_of

    names = dict.fromkeys(cls.__module__ for cls in classes_of(modules))
    return [sys.modules[name] for name in names if name in sys.modules]


def _heads_first(output: Tensor, query: Tensor) -> Tensor:
    """[B, Tq, H, D], or [B, Tq, H·D], as [B, H, Tq, D]."""
    if output.ndim == 3:
        output = output.unflatten(-1, (query.shape[1], -1))
    return output.transpose(1, 2)


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [InterfaceAttention(), UpcastAttention()]
