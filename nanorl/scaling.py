"""How reward grows with compute: a sigmoid in the logarithm of compute, with intervals.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)                                  (ScaleRL, Khatri et al. 2025, eq. 1)

R0 the reward at the start, A the ceiling, C_mid the compute at which half of the way is done, B how steep it is. Given C_mid
and B, the curve is linear in R0 and A, so that least squares over a grid of the two leaves nothing to a starting point:

    S(C_mid, B) = min over R0, A of sum_i (R_i - R(C_i))^2,        a profile: the smallest sum of squares that is left

Whatever follows from a parameter pair with S <= S_min (1 + t^2 / (n - 4)), t the 97.5 % quantile of Student's t with n - 4
degrees of freedom, is inside of the 95 % interval. Where the data end before the bend, steep curves with a low ceiling and flat
ones with a high ceiling fit equally well, and the interval of the ceiling says so: it is open above. All of that is for a
sigmoid with noise of one size; of a curve that is none, the interval knows nothing (experiments/scaling.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STEEP = (0.2, 20.0)     # the B that are considered
BEYOND = 100.0          # C_mid is sought up to so many times the compute of the last point
GRID = (96, 64)         # cells: C_mid, B


def saturation(compute: Tensor, midpoint: Tensor, steepness: Tensor) -> Tensor:
    """1 / (1 + (C_mid / C)^B): 0 without compute, 1/2 at C_mid, 1 in the limit.       [N], [K], [K] -> [K, N]"""
    return torch.sigmoid(steepness[:, None] * (compute.log() - midpoint[:, None].log()))


def line(s: Tensor, reward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of R = mean(R) + slope (s - mean(s)).       [K, n], [n] -> mean(s), slope, sum (s - mean(s))^2 [K, 1]"""
    middle = s.mean(-1, keepdim=True)
    spread = (s - middle).square().sum(-1, keepdim=True).clamp(min=1e-30)
    return middle, ((s - middle) * reward).sum(-1, keepdim=True) / spread, spread


def quantile_of_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; within 1 % from three degrees of freedom on.  (Abramowitz and Stegun 1964, 26.7.5)"""
    z, n = 1.959964, freedom
    return (z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3))


@dataclass(frozen=True)
class Fit:
    """Every cell (C_mid, B) that fits the data well enough."""

    compute: Tensor         # [n] the data
    reward: Tensor          # [n]
    midpoint: Tensor        # [K] C_mid
    steepness: Tensor       # [K] B
    squares: Tensor         # [K] S(C_mid, B)
    most: float             # the S that an interval allows
    open: bool              # the cells go on beyond the grid: there is no upper end to C_mid, or no lower one to B

    def interval(self, values: Tensor) -> tuple[float, float, float]:
        """What the best cell says, and the smallest and the largest of all.       [K]"""
        return float(values[self.squares.argmin()]), float(values.min()), float(values.max())

    def predict(self, compute: float) -> tuple[float, float, float]:
        """R at `compute`, and its 95 % interval; 0 gives the floor R0, inf the ceiling A.

        In each cell, R(C) is a regression line at s = saturation(C), and its profile interval is
        +- sqrt((most - S) (1/n + (s - mean(s_i))^2 / sum_i (s_i - mean(s_i))^2)).
        """
        middle, slope, spread = line(saturation(self.compute, self.midpoint, self.steepness), self.reward)
        away = saturation(torch.tensor([compute], dtype=torch.float64), self.midpoint, self.steepness) - middle     # [K, 1]
        value = self.reward.mean() + slope * away
        half = ((self.most - self.squares[:, None]) * (1 / len(self.reward) + away.square() / spread)).sqrt()
        high = torch.inf if self.open and compute == torch.inf else float((value + half).max())
        return float(value[self.squares.argmin()]), float((value - half).min()), high

    @property
    def reaches_the_bend(self) -> bool:
        """Whether the data go on beyond C_mid, wherever in its interval that is."""
        return not self.open and bool(self.midpoint.max() <= self.compute.max())


def fit(compute: Tensor, reward: Tensor) -> Fit:
    """The sigmoid of reward against compute, by least squares.       [n], [n]

    ValueError for fewer than six points, or where nothing was spent or nothing changed.
    """
    compute, reward = compute.double(), reward.double()
    if len(compute) < 6:
        raise ValueError(f"{len(compute)} points are too few for a sigmoid, which has four parameters; expected at least six")
    if not (compute > 0).any() or reward.max() == reward.min():
        raise ValueError("nothing to fit; expected rewards that change while compute grows")
    limits = [torch.stack((compute[compute > 0].min() / BEYOND, compute.max() * BEYOND)).log(),
              torch.tensor(STEEP, dtype=torch.float64).log()]
    box, freedom = limits, len(reward) - 4
    while True:                     # the grid closes in on the cells that fit, until they fill it
        axes = [torch.linspace(*ends.tolist(), count, dtype=torch.float64).exp() for ends, count in zip(box, GRID, strict=True)]
        midpoint, steepness = torch.cartesian_prod(*axes).T                                 # [cells] each
        s = saturation(compute, midpoint, steepness)                                        # [cells, n]
        middle, slope, _ = line(s, reward)
        squares = (reward - reward.mean() - slope * (s - middle)).square().sum(-1)
        most = float(squares.min()) * (1 + quantile_of_t(freedom)**2 / freedom)
        inside = squares <= most
        midpoint, steepness, squares = midpoint[inside], steepness[inside], squares[inside]
        last, box = box, []
        for cells, limit, axis in zip((midpoint, steepness), limits, axes, strict=True):
            margin = 8 * (axis[1] / axis[0]).log()
            box.append(torch.stack((cells.min().log() - margin, cells.max().log() + margin)).clamp(*limit))
        if all(new.diff() >= 0.8 * old.diff() for new, old in zip(box, last, strict=True)):
            break
    return Fit(compute, reward, midpoint, steepness, squares, most,
               open=bool(box[0][1] == limits[0][1] or box[1][0] == limits[1][0]))
