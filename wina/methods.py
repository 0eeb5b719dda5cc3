"""Methods: published names for combinations of criterion, allocation, correction and the like.

A method is a row here; what it does stands in ``criteria/``, ``allocation/``, ``selectors/``,
``refinement/``, ``corrections/`` and ``rotation/``. What a method has to compute before it can
decide is said by its parts (:attr:`Method.needs`); at run time all of them cost one threshold per
channel, and what their selector, correction and rotation add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from wina.allocation import ALLOCATIONS
from wina.corrections import CORRECTIONS, NO_CORRECTION
from wina.needs import Needs, most
from wina.refinement import NO_REFINEMENT, REFINEMENTS
from wina.registry import Registry, create
from wina.rotation import NO_ROTATION
from wina.selectors import SELECTORS

# Projections whose columns WINA's rotation makes orthogonal; the fused ones hold them.
_ORTHOGONAL_ROLES = ("k_proj", "gate_proj", "qkv_proj", "gate_up_proj")


@dataclass(frozen=True)
class Method:
    """A named choice of parts, each a spec of its registry.

    Attributes:
        criterion: of every projection that ``criteria`` does not name.
        allocation: the policy.
        source: paper and what it is.
        dense: whether it drops nothing.
        selector: where the cut-off comes from.
        refinement: what improves the thresholds of all projections together afterwards.
        correction: what is added for the channels that are left out.
        rotation: what :func:`wina.rotate` must have done to the model; its products, two
            [hidden, hidden] a layer, are read for every token unless its basis is shared.
        criteria: criterion by role, where a method treats projections differently.
        gate_mask: whether |act(gate(x))| decides for a gated MLP: which rows of up and which
            columns of down are read. No kernel skips rows; it can be evaluated only.
    """

    criterion: str
    allocation: str
    source: str
    dense: bool = False
    selector: str = "threshold"
    correction: str = NO_CORRECTION
    refinement: str = NO_REFINEMENT
    rotation: str = NO_ROTATION
    criteria: Mapping[str, str] = field(default_factory=dict)
    gate_mask: bool = False

    def criterion_of(self, role: str) -> str:
        """The criterion of a projection, by the last part of its name."""
        return self.criteria.get(role, self.criterion)

    @property
    def needs(self) -> Needs:
        """What its allocation, its selector, its refinement and its correction have to compute."""
        weighs = create(SELECTORS, self.selector).weighs_tokens
        return most(
            Needs.GRADIENTS if weighs else Needs.NOTHING,
            create(ALLOCATIONS, self.allocation).needs,
            create(REFINEMENTS, self.refinement).needs,
            create(CORRECTIONS, self.correction).needs,
        )


METHODS: Registry[Method] = Registry("method")

METHODS.register("dense")(Method("magnitude", "uniform", "nothing is dropped", dense=True))
METHODS.register("wina")(Method("l2-norm", "uniform", "|x|·‖W‖₂, arXiv 2505.19427"))
METHODS.register("teal")(Method("magnitude", "uniform", "|x|, arXiv 2408.14690"))
METHODS.register("teal-greedy")(
    Method("magnitude", "greedy:step=0.05", "TEAL with its block-wise greedy allocation")
)
METHODS.register("wina-greedy")(
    Method("l2-norm", "greedy:step=0.025", "WINA with TEAL's greedy allocation, as in its paper")
)
METHODS.register("wina-paper")(
    Method(
        "magnitude",
        "greedy:step=0.025",
        "WINA as in its paper's experiments: rotated, |x|·‖W‖₂ on k and gate, |x| elsewhere, top-k",
        selector="topk",
        rotation="orthogonal",
        criteria=dict.fromkeys(_ORTHOGONAL_ROLES, "l2-norm"),
    )
)
METHODS.register("larosa")(
    Method(
        "magnitude",
        "uniform",
        "|x| of hidden states in their principal components, top-k, arXiv 2507.01299",
        selector="topk",
        rotation="pca",
    )
)
METHODS.register("cats")(
    Method(
        "magnitude",
        "gated",
        "|act(gate(x))| selects rows of up and columns of down, all else dense, arXiv 2404.08763",
        gate_mask=True,
    )
)
# 0.025 of a weight is the twentieth of its budget at 50 % that the paper's uniform recipe gives to
# the rank (ρ = 0.95); here it comes on top of the channels, and is counted as extra bytes.
METHODS.register("r-sparse")(
    Method(
        "l2-norm",
        "uniform",
        "|x|·‖W‖₂ and the weight's leading singular vectors for the rest, arXiv 2504.19449",
        correction="weight-svd:share=0.025",
    )
)
METHODS.register("scap")(
    Method(
        "magnitude",
        "uniform",
        "|x − μ|, μ the mode of a projection's inputs, arXiv 2412.07174",
        correction="mode",
    )
)
METHODS.register("was")(
    Method("l1-norm", "growing", "|x|·‖W‖₁, block budgets growing with depth, EMNLP 2025 main 57")
)
METHODS.register("wisparse")(
    Method("norm-power:0.5", "uniform", "|x|·‖W‖₂^α with α = 0.5, arXiv 2602.14452")
)
METHODS.register("wina-fisher")(
    Method(
        "norm-power:0.5",
        "fisher",
        "|x|·‖W‖₂^½ after arXiv 2505.19427 and 2602.14452, bytes spent on the projections and the "
        "tokens where the loss asks for them",
        selector="importance",
    )
)
METHODS.register("wina-plus")(
    replace(
        METHODS["wina-fisher"],
        source="the best: wina-fisher, its thresholds and constants of outputs learned by KL",
        refinement="learned",
    )
)
METHODS.register("random")(Method("random", "uniform", "random channels, a lower bound"))
