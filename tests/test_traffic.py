import pytest

from wina.bench.traffic import CARDS, calls, count


def test_counts_of_a_square_projection() -> None:
    row = count("Llama-3-8B", "sparse_linear", "o", 4096, (4096,), CARDS[1])
    assert row.dense_bytes == 4096 * 4096 * 2
    assert row.kept_bytes == row.dense_bytes // 2
    assert row.loads == row.dense_bytes // 16
    # x and thresholds, output, 8 partial sums written and read
    assert row.other_bytes == 4096 * 6 + 4096 * 2 + 2 * 8 * 4096 * 4
    assert row.programs == 512
    assert 0 < row.issue_share < 1


@pytest.mark.parametrize("card", CARDS, ids=lambda on: on.card.name)
def test_gate_up_writes_no_partial_sums(card) -> None:
    row = count("Llama-3-8B", "sparse_gate_up", "gate and up", 4096, (14336, 14336), card)
    assert row.k_splits == 1
    assert row.other_bytes == 4096 * (2 + 4 + 4) + 14336 * 2


def test_a_group_reads_x_once_and_its_weights_as_one() -> None:
    group = count("", "sparse_group", "q, k and v", 4096, (4096, 1024, 1024), CARDS[1])
    whole = count("", "sparse_linear", "", 4096, (6144,), CARDS[1])
    assert (group.dense_bytes, group.programs) == (whole.dense_bytes, whole.programs)
    # two more threshold vectors
    assert group.other_bytes == whole.other_bytes + 2 * 4096 * 4


@pytest.mark.parametrize(("weights", "row"), [("int8", 4096 + 64), ("int4", 2048 + 64)])
def test_integer_weights_are_counted_with_their_scales(weights: str, row: int) -> None:
    found = count("", "sparse_linear", "o", 4096, (4096,), CARDS[2], weights)
    assert found.dense_bytes == 4096 * row
    assert [call[2] for call in calls(weights)[:3]] == ["q", "k, v", "o"]
