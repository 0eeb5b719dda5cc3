"""All of the budget on the two projections that a gate can switch off."""

from __future__ import annotations

from collections.abc import Mapping

from wina.allocation.base import ALLOCATIONS, Allocation, Problem
from wina.errors import ConfigError
from wina.mlp import GATED_FORMS


@ALLOCATIONS.register("gated")
class Gated(Allocation):
    """The same sparsity for up and down of every gated MLP; all else is dense (CATS)."""

    def allocate(self, problem: Problem) -> Mapping[str, float]:
        """The budget of the model, spent on up and down."""
        roles = {role for form in GATED_FORMS for role in (form.up, form.down)}
        found = {unit.name: 0.0 for unit in problem.units}
        chosen = [u for u in problem.units if all(p.role in roles for p in u.projections)]
        total = sum(unit.weights for unit in problem.units)
        weights = sum(unit.weights for unit in chosen)
        if problem.sparsity * total > 0.95 * weights:
            raise ConfigError(
                f"a sparsity of {problem.sparsity:g} is out of reach: up and down of gated MLPs "
                f"hold {weights / total:.3g} of the weights, of which 0.95 may be dropped"
            )
        return {**found, **{u.name: problem.sparsity * total / weights for u in chosen}}
