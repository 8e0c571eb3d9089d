"""Means with their errors, and straight lines through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; ``error`` is its standard error, None for a single seed."""

    value: float
    error: float | None
    count: int

    def __str__(self) -> str:
        return self.text()

    def text(self, sign: str = "") -> str:
        """Three decimals and the error, such as ``4.123 ± 0.004``.

        :param sign: "+" to show it also where the value is positive.
        """
        value = f"{self.value:{sign}.3f}"
        return value if self.error is None else f"{value} ± {self.error:.3f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean and its standard error, from the sample's standard deviation over n - 1.

    :raises ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values = []: there must be at least one")
    middle = sum(values) / n
    if n == 1:
        return Mean(middle, None, 1)
    variance = sum((value - middle) ** 2 for value in values) / (n - 1)
    return Mean(middle, math.sqrt(variance / n), n)


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Mean | None:
    """The mean of values minus others, paired by seed; None without a common seed."""
    paired = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    return mean(paired) if paired else None


@dataclass(frozen=True)
class Fit:
    """A linear model fitted by least squares.

    Attributes:
        names: of the coefficients.
        values: the coefficients.
        errors: their standard errors, from the scatter of the residuals.
        scatter: standard deviation of the residuals over their degrees of freedom.
        count: points.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    scatter: float
    count: int


def fit(columns: Mapping[str, Sequence[float]], targets: Sequence[float]) -> Fit | None:
    """Fit ``targets`` by the columns; None where there are not more points than coefficients.

    :param columns: by name, one number per point; a constant is a column of ones.
    """
    matrix = np.array(list(columns.values()), dtype=np.float64).T
    goal = np.asarray(targets, dtype=np.float64)
    freedom = len(goal) - len(columns)
    if freedom < 1 or np.linalg.matrix_rank(matrix) < len(columns):
        return None
    values, *_ = np.linalg.lstsq(matrix, goal, rcond=None)
    residuals = goal - matrix @ values
    variance = float(residuals @ residuals) / freedom
    errors = np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)) * variance)
    return Fit(
        tuple(columns),
        tuple(values.tolist()),
        tuple(errors.tolist()),
        math.sqrt(variance),
        len(goal),
    )
