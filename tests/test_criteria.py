import pytest
import torch

from wina.criteria import CRITERIA
from wina.errors import ConfigError
from wina.registry import create

SPECS = ["magnitude", "l2-norm", "l1-norm", "norm-power:0.5", "random"]


def test_every_criterion_is_listed_here() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(CRITERIA)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constants_are_finite_float32(spec: str, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 17).to(dtype)
    c = create(CRITERIA, spec).constants([weight], torch.Generator().manual_seed(0))
    assert c.shape == (17,)
    assert c.dtype == torch.float32
    assert c.isfinite().all()
    assert (c >= 0).all()


def test_formulas() -> None:
    weight = torch.tensor([[3.0, 0.0], [4.0, 2.0]])

    def constants(spec: str) -> list[float]:
        return create(CRITERIA, spec).constants([weight], torch.Generator()).tolist()

    assert constants("magnitude") == [1, 1]
    assert constants("l2-norm") == pytest.approx([5, 2])
    assert constants("l1-norm") == pytest.approx([7, 2])
    assert constants("norm-power:2") == pytest.approx([25, 4])


def test_random_is_seeded() -> None:
    weight = torch.randn(4, 30)
    random = create(CRITERIA, "random")
    a, b, other = (
        random.constants([weight], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


def test_exponent_out_of_range() -> None:
    with pytest.raises(ConfigError, match="exponent"):
        create(CRITERIA, "norm-power:-1")
