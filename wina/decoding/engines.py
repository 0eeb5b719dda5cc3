"""What runs a token through a model: a trimmed step where it is recognised, else its forward."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wina.decoding.forms import UnrecognisedError
from wina.decoding.head import AUTO, head_dtype, rounded_head
from wina.decoding.tables import look
from wina.decoding.writer import Program, StateShape, decoder_of, write_program
from wina.errors import ConfigError, PatchStateError
from wina.kernels import cpu
from wina.kernels.program import bind
from wina.kernels.quantization import QuantizedWeight
from wina.patch import is_patched, patch_of
from wina.switches import dense_in_this_thread, padded_batch

# Relative error of logits that two implementations of one model may have.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CACHE_STEP = 64
# Tokens in the cache while an engine is verified: more than a window, so that it shows.
_VERIFIED_CONTEXT = 20
_MOST_VERIFIED_CONTEXT = 1100
# One thread at a time looks at models and verifies an engine; others run them meanwhile.
_LOOKING = threading.RLock()


class Engine(ABC):
    """Feeds tokens to a model one after another and keeps what they leave behind.

    Attributes:
        name: ``"trimmed"`` or ``"transformers"``.
        reason: why this engine serves.
        text: what stands for the text that it is at.
    """

    name: str
    reason: str
    text: object = None

    @abstractmethod
    def start(self, input_ids: Tensor, attention_mask: Tensor | None, length: int) -> Tensor:
        """Begin anew with a prompt.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S] or None.
            length: tokens that prompt and continuation have together, at most.

        Returns:
            Logits of the next token [B, vocabulary], float32.
        """

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, vocabulary] float32 after one more token of each sequence [B]."""


class OwnForward(Engine):
    """The model's own forward with transformers' cache."""

    name = "transformers"

    def __init__(self, model: Any, reason: str) -> None:
        self.model = model
        self.reason = reason
        self._cache: Any = None
        self._mask: Tensor | None = None

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, length: int) -> Tensor:
        """See :meth:`Engine.start`."""
        self._cache = _new_cache(self.model)
        self._mask = attention_mask
        if attention_mask is None or not is_patched(self.model):
            return self._forward(input_ids)
        lengths = attention_mask.sum(1).tolist()
        with padded_batch(self.model, lengths, input_ids.shape[1], "left"):
            return self._forward(input_ids)

    def step(self, tokens: Tensor) -> Tensor:
        """See :meth:`Engine.step`."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None])

    def _forward(self, input_ids: Tensor) -> Tensor:
        extra = {}
        if self._mask is not None:
            positions = (self._mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
            extra = {"attention_mask": self._mask, "position_ids": positions}
        with torch.no_grad():
            output = self.model(
                input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **extra
            )
        logits: Tensor = output.logits[:, -1].float()
        return logits


@dataclass(frozen=True)
class _Ready:
    """A program and the memory that it writes to.

    Attributes:
        keys_and_values: of each layer, in turn.
        states: of cut-offs that follow the text; the dense step has others.
    """

    program: Program
    keys_and_values: list[Tensor]
    states: list[Tensor]
    length: int
    sparse: Callable[[int, int, Tensor | None], Tensor]
    dense: Callable[[int, int, Tensor | None], Tensor]


class Trimmed(Engine):
    """One native operator a token, over a static cache; the prompt runs through the model itself.

    Weights are those of the model, not copies, but for a head that is read rounded. Cast, move,
    patch or restore the model, and the engine must be made anew.
    """

    name = "trimmed"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reason = "its layers were recognised, and its logits are the model's"
        self._head: QuantizedWeight | None = None
        self._ready: _Ready | None = None
        self._position = 0
        self._control = patch_of(model).control if is_patched(model) else None

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, length: int) -> Tensor:
        """See :meth:`Engine.start`.

        Raises:
            PatchStateError: the model was patched or restored since the engine was made.
        """
        if self._control is not (patch_of(self.model).control if is_patched(self.model) else None):
            raise PatchStateError(
                "the model was sparsified or restored since: make another wina.Decoder"
            )
        self.reserve(length)
        cache = _new_cache(self.model)
        with torch.no_grad():
            output = self.model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.fill([(layer.keys, layer.values) for layer in cache.layers], input_ids.shape[1])
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See :meth:`Engine.step`."""
        return self.advance(int(tokens[0]))[None]

    def advance(self, token: int, times: Tensor | None = None) -> Tensor:
        """Logits [vocabulary] after a token; ``times`` as of a decode step's program."""
        ready = self._ready
        assert ready is not None
        sparse = self._control is None or self._control.enabled
        run = ready.sparse if sparse else ready.dense
        logits = run(token, self._position, times)
        self._position += 1
        return logits

    @property
    def code(self) -> Tensor:
        """The instructions of a step, see :mod:`wina.kernels.program`."""
        assert self._ready is not None
        return self._ready.program.code

    def reserve(self, length: int) -> None:
        """Make room for so many tokens: caches and tables grow, rounded up."""
        if self._ready is not None and self._ready.length >= length:
            return
        length = -(-length // _CACHE_STEP) * _CACHE_STEP
        with _LOOKING:
            seen = look(self.model, decoder_of(self.model), length)
        program = write_program(self.model, seen, self._head)
        like = self.model.get_input_embeddings().weight
        caches = [shape.zeros(length, like) for shape in program.caches]
        is_state = [isinstance(shape, StateShape) for shape in program.caches]
        others = [c.clone() if own else c for c, own in zip(caches, is_state, strict=True)]
        sparse, dense = (
            bind(program.code, program.numbers, constants, memory, program.outputs)
            for constants, memory in (
                (program.constants, caches), (program.dense_constants, others),
            )
        )  # fmt: skip
        keys_and_values = [c for c, own in zip(caches, is_state, strict=True) if not own]
        states = [c for c, own in zip(caches, is_state, strict=True) if own]
        self._ready = _Ready(program, keys_and_values, states, length, sparse, dense)

    def fill(self, layers: Sequence[tuple[Tensor, ...]], count: int) -> None:
        """Take over keys and values of ``count`` tokens, of a window's last ones where it has one.

        Args:
            layers: (keys, values) of each layer, [1, kv heads, count or fewer, head size].
            count: tokens so far.
        """
        assert self._ready is not None
        flat = [tensor for pair in layers for tensor in pair]
        for cache, tensor in zip(self._ready.keys_and_values, flat, strict=True):
            cache[:, count - tensor.shape[2] : count] = tensor[0]
        for state in self._ready.states:
            state.zero_()
        self._position = count

    def round_head(self, dtype: str) -> None:
        """From now on read the head in a format of :data:`wina.kernels.quantization.FORMATS`."""
        assert self._ready is not None
        self._head = rounded_head(self.model, dtype)
        length, self._ready = self._ready.length, None
        self.reserve(length)
        self.reason += f"; its head is read in {dtype}, {self._head.bytes / 2**20:.0f} MiB more"

    def verify(self) -> None:
        """Compare one token with the model's own forward, both dense, after a random context.

        Raises:
            UnrecognisedError: the logits differ.
        """
        self.reserve(_VERIFIED_CONTEXT + 1)
        assert self._ready is not None
        windows = [layer.sliding_window for layer in _new_cache(self.model).layers
                   if getattr(layer, "sliding_window", None)]  # fmt: skip
        count = max([_VERIFIED_CONTEXT, *(w + 3 for w in windows if w < _MOST_VERIFIED_CONTEXT)])
        count = min(count, most_positions(self.model) - 1)
        self.reserve(count + 1)
        vocabulary = self._ready.program.outputs
        prompt = torch.arange(_VERIFIED_CONTEXT)[None] * 7919 % vocabulary
        token = vocabulary // 2
        alone = dense_in_this_thread(self.model) if self._control else nullcontext()
        with _LOOKING, torch.no_grad(), alone:
            known = _new_cache(self.model)
            self.model(prompt, past_key_values=known, use_cache=True, logits_to_keep=1)
            # Repeated to fill a window: keys and values are as large as a text's.
            given = [
                tuple(t[:, :, torch.arange(count) % t.shape[2]] for t in (layer.keys, layer.values))
                for layer in known.layers
            ]
            cache = _new_cache(self.model)
            for index, (keys, values) in enumerate(given):
                cache.update(keys, values, index)
            self.fill(given, count)
            want = self.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            got = self.advance(token)
        wanted = want.logits[0, -1].float()
        error = float((got - wanted).norm() / wanted.norm())
        if not error <= _TOLERANCE[self.model.dtype]:
            raise UnrecognisedError(
                "its parts have known names, but logits differ from the model's own by "
                f"{error:.1e} of their norm"
            )


def most_positions(model: Any) -> int:
    """How many tokens a model can see, prompt and continuation together."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def choose_engine(model: Any, rows: int = 1, head: str = AUTO) -> Engine:
    """The trimmed engine where it serves a model, else the model's own forward and why.

    Args:
        model: a causal language model of transformers, dense or sparsified.
        rows: sequences at once.
        head: how the trimmed engine reads the head, see :func:`wina.decoding.head.head_dtype`.

    Raises:
        ConfigError: no such format of a head.
    """
    rounded = head_dtype(model, head)
    refusal = _refusal(model, rows)
    if refusal is None:
        engine = Trimmed(model)
        try:
            engine.verify()
        except UnrecognisedError as error:
            refusal = str(error)
        except (AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
            # A model may use the names of a form for things of another shape.
            refusal = f"it could not be run as recognised: {type(error).__name__}: {error}"
        else:
            if rounded is not None:
                engine.round_head(rounded)
            return engine
    return OwnForward(model, refusal)


def _refusal(model: Any, rows: int) -> str | None:
    """What can be said before looking at a model's parts."""
    if rows != 1:
        return f"{rows} sequences at once; the trimmed step takes one"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if model.dtype not in cpu.DTYPES:
        return f"no kernel for {model.dtype}"
    if is_patched(model) and patch_of(model).control.observer is not None:
        return "realised sparsity is being measured"
    return _hooked(model) or cpu.load()


def _hooked(model: Any) -> str | None:
    """The module that somebody looks at or has changed, in words: a native step passes it by."""
    ours = {handle.id for handle in patch_of(model).hooks} if is_patched(model) else set()
    for name, module in model.named_modules():
        if "forward" in module.__dict__:
            return f"the forward of {name or 'the model'} was replaced"
        for number, hook in (*module._forward_hooks.items(), *module._forward_pre_hooks.items()):
            # transformers' own collect hidden states when they are asked for, which nobody does.
            theirs = str(getattr(hook, "__module__", "")).startswith("transformers.")
            if number not in ours and not theirs:
                return f"{name or 'the model'} has a forward hook"
    return None


def check_length(model: Any, prompt: int, new_tokens: int) -> int:
    """Tokens of prompt and continuation together.

    Raises:
        ConfigError: the model cannot see so many.
    """
    most = most_positions(model)
    if prompt + new_tokens > most:
        raise ConfigError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones are {prompt + new_tokens}; the "
            f"model sees {most} at most: shorten the prompt or max_new_tokens"
        )
    return prompt + new_tokens


def _new_cache(model: Any) -> Any:
    import transformers

    return transformers.DynamicCache(config=model.config)
