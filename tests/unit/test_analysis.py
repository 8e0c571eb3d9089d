"""The disagreement factor against independent calculations."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from sdp_llm.plan import Plan, analyze, make_plan
from sdp_llm.plan.analysis import disagreement, is_connected

PLANS = [
    make_plan(n, num_free + 2, owners_per_block=p, strategy=strategy, seed=seed)
    for strategy in ("balanced", "cyclic", "random")
    for n, num_free, p in [(2, 4, 1), (4, 6, 2), (4, 5, 3), (6, 10, 3), (8, 10, 4), (8, 4, 2)]
    for seed in (0, 1)
]
DISCONNECTED = make_plan(4, 4, owner_sets=[[0, 1], [2, 3], [0, 1], [2, 3]])
CONNECTED = make_plan(4, 4, owner_sets=[[0, 1], [2, 3], [1, 2], [0, 3]])
UNEVEN = make_plan(3, 3, owner_sets=[[0, 1, 2], [0, 1], [2]])


def _walk(plan: Plan) -> np.ndarray:
    """Transition matrix of the walk: a free block of this rank, then an owner of that block."""
    walk = np.zeros((plan.world_size, plan.world_size))
    for rank in range(plan.world_size):
        blocks = [block for block in plan.free_blocks if plan.owns(rank, block)]
        for block in blocks:
            for owner in plan.owner_sets[block]:
                walk[rank, owner] += 1 / len(blocks) / len(plan.owner_sets[block])
    return walk


@pytest.mark.parametrize("plan", [*PLANS, DISCONNECTED, CONNECTED])
def test_bounds(plan: Plan) -> None:
    analysis = analyze(plan)
    assert analysis.lam >= analysis.lam_lower_bound - 1e-12
    if len(set(analysis.load)) == 1:
        assert analysis.lam <= 1 + 1e-12
        assert analysis.connected == (analysis.lam < 1 - 1e-9)
    else:
        assert analysis.spectral_gap is None


@pytest.mark.parametrize("plan", [*PLANS, DISCONNECTED, CONNECTED])
def test_spectral_gap_is_that_of_the_walk(plan: Plan) -> None:
    analysis = analyze(plan)
    if analysis.spectral_gap is None:
        assert len(set(analysis.load)) > 1
        return
    eigenvalues = np.sort(np.linalg.eigvals(_walk(plan)).real)
    assert eigenvalues[-1] == pytest.approx(1.0)
    assert analysis.spectral_gap == pytest.approx(1.0 - eigenvalues[-2], abs=1e-9)


def test_spectral_gap_is_checked_on_some_plans() -> None:
    assert sum(analyze(plan).spectral_gap is not None for plan in PLANS) >= 10


def _deviations(
    rng: np.random.Generator, gram_root: np.ndarray, size: int, share: float
) -> np.ndarray:
    """Gradients (ranks, size) whose deviations have the Gram matrix `share * root root^T`."""
    n = gram_root.shape[0]
    basis, _ = np.linalg.qr(rng.standard_normal((size, n)))  # orthonormal columns
    return np.sqrt(share) * gram_root @ basis.T + rng.standard_normal(size)  # plus a common part


@pytest.mark.parametrize("sizes", [[1] * 8, [1, 5, 2, 3, 1, 4, 2, 9]])
def test_inequality_holds_and_is_tight(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    n, plan = 4, make_plan(4, 8, owners_per_block=2, strategy="random", seed=3)
    lam = analyze(plan, sizes).lam
    total = sum(sizes[block] for block in plan.free_blocks)
    shares = [sizes[block] / total for block in plan.free_blocks]

    def both_sides(gram_root: np.ndarray) -> tuple[float, float]:
        error = deviation = 0.0
        for block, share in zip(plan.free_blocks, shares, strict=True):
            gradients = _deviations(rng, gram_root, 16, share)
            mean = gradients.mean(axis=0)
            masked = gradients[list(plan.owner_sets[block])].mean(axis=0)
            error += float(((masked - mean) ** 2).sum())
            deviation += float(((gradients - mean) ** 2).sum()) / n
        return error, deviation

    for _ in range(50):
        error, deviation = both_sides(rng.standard_normal((n, n)))
        assert error <= lam * deviation * (1 + 1e-9)
    # All deviation along the worst direction: equality.
    vectors = np.array(
        [
            [plan.owns(i, b) / len(plan.owner_sets[b]) - 1 / n for i in range(n)]
            for b in plan.free_blocks
        ]
    )
    worst = np.linalg.eigh(vectors.T @ (np.array(shares)[:, None] * vectors))[1][:, -1]
    error, deviation = both_sides(np.outer(worst, np.eye(n)[0]))
    assert error == pytest.approx(lam * deviation)


def test_worst_case_factor_is_the_tight_one_for_arbitrary_gradients() -> None:
    analysis = analyze(UNEVEN)
    assert analysis.worst_case_factor == pytest.approx(2.0)  # one owner of three
    # Only rank 2 deviates, only in the block that it owns alone.
    gradients = np.array([0.0, 0.0, 1.0])
    error = (gradients[2] - gradients.mean()) ** 2
    # Equality needs the deviation to be constant on the owners and on the others.
    deviation = ((gradients - gradients.mean()) ** 2).mean()
    assert error == pytest.approx(analysis.worst_case_factor * deviation)


def test_lower_bound_is_the_factor_of_independent_noise() -> None:
    plan, n = UNEVEN, 3
    # E||a - mean||^2 = 1/p - 1/n and E||g_i - mean||^2 = 1 - 1/n for unit noise.
    factors = [
        (1 / len(plan.owner_sets[b]) - 1 / n) / (1 - 1 / n)  # per block
        for b in plan.free_blocks
    ]
    weighted = (factors[0] * 2 + factors[1] * 3) / 5
    assert analyze(plan, [7, 2, 3]).lam_lower_bound == pytest.approx(weighted)


def test_small_plans_by_hand() -> None:
    # Two orthogonal directions of deviation, each seen by half of the blocks.
    analysis = analyze(CONNECTED)
    assert analysis.lam == pytest.approx(0.5)
    assert analysis.lam_lower_bound == pytest.approx(1 / 3)
    assert analysis.spectral_gap == pytest.approx(0.5)
    assert analysis.load == (2, 2, 2, 2)
    assert analysis.distinct_owner_sets == 4
    assert analysis.coverage == Fraction(1, 2)
    assert analyze(DISCONNECTED).lam == pytest.approx(1.0)
    assert analyze(DISCONNECTED).distinct_owner_sets == 2
    assert not analyze(DISCONNECTED).connected


def test_uneven_plan_has_no_gap() -> None:
    analysis = analyze(UNEVEN)
    assert analysis.spectral_gap is None
    assert analysis.owned_share_min == analysis.owned_share_max == Fraction(2, 3)
    assert analysis.coverage == Fraction(1, 2)


def test_shares_count_pinned_blocks() -> None:
    analysis = analyze(make_plan(2, 4, owner_sets=[[0, 1], [0], [0, 1], [0]]))
    assert (analysis.owned_share_min, analysis.owned_share_max) == (Fraction(1, 2), Fraction(1))
    assert analysis.load == (2, 0)


def test_unequal_blocks_weigh_by_their_parameters() -> None:
    assert analyze(CONNECTED, [3, 3, 1, 1]).lam == pytest.approx(0.75)
    # Every rank still owns 4 of 8 parameters, so the walk weighted by them has a gap.
    assert analyze(CONNECTED, [3, 3, 1, 1]).spectral_gap == pytest.approx(0.25)
    assert analyze(CONNECTED, [3, 1, 1, 1]).spectral_gap is None


@pytest.mark.parametrize("n", [1, 4])
def test_full_coverage_is_plain_data_parallelism(n: int) -> None:
    analysis = analyze(make_plan(n, 5, coverage=Fraction(1)))
    assert analysis.lam == 0.0
    assert analysis.lam_lower_bound == 0.0
    assert analysis.spectral_gap == 1.0
    assert analysis.connected
    assert analysis.worst_case_factor == 0.0
    assert analysis.distinct_owner_sets == 1


def test_no_free_blocks() -> None:
    analysis = analyze(make_plan(4, 2, coverage=Fraction(1)))
    assert analysis.lam == analysis.lam_lower_bound == analysis.worst_case_factor == 0.0
    assert analysis.spectral_gap is None
    assert analysis.connected
    assert analysis.load == (0, 0, 0, 0)
    assert analysis.coverage == analysis.owned_share_min == 1


def test_more_blocks_than_ranks_use_the_smaller_matrix_with_the_same_result() -> None:
    sets = [(0, 1), (1, 2), (0, 2), (0, 1), (2,)]
    merged = disagreement([(0, 1), (1, 2), (0, 2), (2,)], 3, [2, 1, 1, 1])
    assert disagreement(sets, 3, [1] * 5) == pytest.approx(merged)
    assert disagreement([(0,), (1, 2)], 3, [1, 1]) == pytest.approx(1.25)


def test_connection_goes_through_other_ranks() -> None:
    assert is_connected([(0, 1), (2, 3), (1, 2)], 4)
    assert not is_connected([(0, 1), (2, 3), (0, 1)], 4)
    assert not is_connected([(0, 1, 2)], 4)
    assert is_connected([], 1)


@pytest.mark.parametrize("numel", [[1, 1], [1, 0, 1]])
def test_block_sizes_must_fit_the_plan(numel: list[int]) -> None:
    with pytest.raises(ValueError, match="block_numel"):
        analyze(UNEVEN, numel)
