"""Whatever solver finds them, the leading directions hold what those of NumPy's SVD hold."""

import numpy as np
import pytest
import torch
from hypothesis import event, example, given

from lorap.ops import solvers
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS64


@pytest.mark.spec("solver.contract", "solver.gram")
@given(problem=own.problems())
@example(problem=own.Problem(np.diag([1.0, 1e-3, 1e-3]), np.ones(3), 2))
@example(problem=own.Problem(np.diag([1.0, 1e-4, 1e-6]), np.ones(3), 2))
def test_the_directions_hold_the_most(problem: own.Problem) -> None:
    A, r = problem.W * problem.scale, problem.rank
    basis, S = solvers.leading_directions(torch.from_numpy(A.copy()), r)
    U, shape = compare.as_array(basis), (A.shape[0], A.shape[1])
    S_printed = np.linalg.svd(A, compute_uv=False)
    event("gram" if r and solvers.gram(torch.from_numpy(A.copy()), r) else "svd")
    compare.spectral(
        "orthonormality of the directions",
        U.T @ U,
        np.eye(r),
        tolerances.orthonormality(shape, EPS64),
    )
    compare.squared_singular_values("singular values by a solver", S, S_printed, shape)
    lost = float(np.linalg.norm(A - U @ (U.T @ A)) ** 2)
    optimum = float(np.sum(S_printed[r:] ** 2))
    compare.within(
        "excess over the least squared error",
        max(lost - optimum, 0.0),
        tolerances.contract(optimum, float(np.linalg.norm(A)), shape),
    )
