"""How decoders name their parts: what differs between architectures, as data.

A form is recognised by names and then verified by numbers (:mod:`wina.decoding.engines`), so a
model that uses the names for another formula decodes through its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass


class UnrecognisedError(Exception):
    """Why no decode step can be written for a model, in words for the user."""


@dataclass(frozen=True)
class LayerForm:
    """x += after(attention(before(x))), then the same with the MLP; a norm that is None is none.

    Attributes:
        before_attention, after_attention, before_mlp, after_mlp: RMS norms of a decoder layer.
        attention, mlp: its other children.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None
    attention: str = "self_attn"
    mlp: str = "mlp"

    @property
    def children(self) -> set[str]:
        """Names of all parts."""
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return {self.attention, self.mlp, *(name for name in norms if name)}


LAYER_FORMS = (
    LayerForm("input_layernorm", None, "post_attention_layernorm", None),
    LayerForm("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
              "post_feedforward_layernorm"),
    LayerForm(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)  # fmt: skip


@dataclass(frozen=True)
class AttentionForm:
    """Names of an attention's projections.

    Attributes:
        inputs: query, key and value, or one projection of all three in that order.
        output: the last projection.
        norms: optional RMS norms of queries and keys.
    """

    inputs: tuple[str, ...]
    output: str
    norms: tuple[str, str] = ("q_norm", "k_norm")


ATTENTION_FORMS = (
    AttentionForm(("q_proj", "k_proj", "v_proj"), "o_proj"),
    AttentionForm(("qkv_proj",), "o_proj"),
)


@dataclass(frozen=True)
class MlpForm:
    """Names of a gated MLP's projections: down(act(gate(x))·up(x)).

    Attributes:
        inputs: gate and up, or one projection of both in that order.
        output: down.
        activation: child that is the activation.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str


MLP_FORMS = (
    MlpForm(("gate_proj", "up_proj"), "down_proj", "act_fn"),
    MlpForm(("w1", "w3"), "w2", "act_fn"),
    MlpForm(("gate_up_proj",), "down_proj", "activation_fn"),
)

# Where models keep numbers: the first attribute that is there and not None.
EPS = ("variance_epsilon", "eps")
SOFTCAP = ("attn_logit_softcapping",)
RESIDUAL_FACTOR = ("residual_multiplier",)
LOGITS_FACTOR = ("logit_scale",)
LOGITS_DIVISOR = ("logits_scaling",)
LOGITS_SOFTCAP = ("final_logit_softcapping",)
USES_ROPE = ("use_rope",)


def first_of(owner: object, names: tuple[str, ...], default: float) -> float:
    """The value of the first of these attributes that is there and not None."""
    for name in names:
        value = getattr(owner, name, None)
        if value is not None:
            return float(value)
    return default
