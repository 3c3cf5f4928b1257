"""How reward grows with compute: a sigmoid in the logarithm of compute, with confidence intervals.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)                                  (ScaleRL, Khatri et al. 2025, eq. 1)

R0 is the reward at the start, A the ceiling, C_mid the compute at the midpoint between them, B the steepness. Given C_mid and
B, the curve is linear in R0 and A, so least squares over a grid of the two does not depend on a starting point:

    S(C_mid, B) = min over R0, A of sum_i (R_i - R(C_i))^2,        the profile sum of squares

The 95 % interval contains all values that follow from a pair with S <= S_min (1 + t^2 / (n - 4)), where t is the 97.5 %
quantile of Student's t with n - 4 degrees of freedom. If the data end before the bend, steep curves with a low ceiling and flat
ones with a high ceiling fit equally well, and the interval of the ceiling shows it: it is open above. All of this assumes a
sigmoid with noise of constant size; if the true curve is not a sigmoid, the interval may miss it (experiments/scaling.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STEEP = (0.2, 20.0)     # the range of B
BEYOND = 100.0          # C_mid is searched from a hundredth of the first point's compute to a hundred times the last one's
GRID = torch.linspace(0, 1, 17, dtype=torch.float64)    # where to try B between two bounds


def saturation(compute: Tensor, midpoint: Tensor, steepness: Tensor) -> Tensor:
    """1 / (1 + (C_mid / C)^B): 0 without compute, 1/2 at C_mid, 1 in the limit.       [n], [...], [...] -> [..., n]"""
    return torch.sigmoid(steepness[..., None] * (compute.log() - midpoint[..., None].log()))


def line(s: Tensor, reward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of R = mean(R) + slope (s - mean(s)).       [.., n], [n] -> mean(s), slope, sum (s - mean(s))^2 [.., 1]"""
    middle = s.mean(-1, keepdim=True)
    spread = (s - middle).square().sum(-1, keepdim=True).clamp(min=1e-30)
    return middle, ((s - middle) * reward).sum(-1, keepdim=True) / spread, spread


def squares_left(compute: Tensor, reward: Tensor, midpoint: Tensor, steepness: Tensor) -> Tensor:
    """S(C_mid, B).       [n], [n], [...], [...] -> [...]"""
    s = saturation(compute, midpoint, steepness)
    middle, slope, _ = line(s, reward)
    return (reward - reward.mean() - slope * (s - middle)).square().sum(-1)


def best_steepness(compute: Tensor, reward: Tensor, midpoint: Tensor) -> Tensor:
    """For each C_mid the B with the smallest S, found on finer and finer grids.       [n], [n], [M] -> [M]"""
    low, high = (torch.full_like(midpoint, b).log() for b in STEEP)
    for _ in range(7):
        grid = low[:, None] + (high - low)[:, None] * GRID                                  # [M, len(GRID)]
        at = squares_left(compute, reward, midpoint[:, None].expand_as(grid), grid.exp()).argmin(-1, keepdim=True)
        low, high = (grid.gather(-1, (at + i).clamp(0, len(GRID) - 1)).squeeze(-1) for i in (-1, 1))
    return ((low + high) / 2).exp()


def edge(compute: Tensor, reward: Tensor, midpoint: Tensor, steepness: Tensor, limit: float, most: float) -> Tensor:
    """For each C_mid, how far B can move from its best value towards `limit` before S exceeds `most`.       -> [M]"""
    inside, outside = steepness.log(), torch.full_like(steepness, limit).log()
    for _ in range(40):
        middle = (inside + outside) / 2
        fits = squares_left(compute, reward, midpoint, middle.exp()) <= most
        inside, outside = torch.where(fits, middle, inside), torch.where(fits, outside, middle)
    return inside.exp()


def quantile_of_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to within 1 %.       (Abramowitz and Stegun 1964, 26.7.5; 1 and 2 in closed form)"""
    if freedom < 3:
        return {1: 12.7062, 2: 4.3027}[freedom]
    z, n = 1.959964, freedom
    return (z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3))


@dataclass(frozen=True)
class Fit:
    """A grid of pairs (C_mid, B), the cells, that covers the region that fits the data well enough."""

    compute: Tensor         # [n] the data
    reward: Tensor          # [n]
    midpoint: Tensor        # [K] C_mid
    steepness: Tensor       # [K] B
    squares: Tensor         # [K] S(C_mid, B)
    most: float             # the largest S inside the interval
    open_below: bool        # the region extends to arbitrarily small C_mid or B: the floor is unknown
    open_above: bool        # it extends to arbitrarily large C_mid or small B: the ceiling is unknown

    def interval(self, values: Tensor) -> tuple[float, float, float]:
        """The value of the best cell, and the smallest and the largest of all cells.       values [K]"""
        return float(values[self.squares.argmin()]), float(values.min()), float(values.max())

    def predict(self, compute: float) -> tuple[float, float, float]:
        """R at `compute`, and its 95 % interval; 0 gives the floor R0, inf the ceiling A.

        In each cell, R(C) is a regression line at s = saturation(C), and its profile interval is
        +- sqrt((most - S) (1/n + (s - mean(s_i))^2 / sum_i (s_i - mean(s_i))^2)).
        """
        middle, slope, spread = line(saturation(self.compute, self.midpoint, self.steepness), self.reward)
        at = torch.tensor([compute], dtype=torch.float64)
        away = saturation(at, self.midpoint, self.steepness) - middle                       # [K, 1]
        value = self.reward.mean() + slope * away
        half = ((self.most - self.squares[:, None]).clamp(min=0) * (1 / len(self.reward) + away.square() / spread)).sqrt()
        low, high = float((value - half).min()), float((value + half).max())
        if (self.open_below and compute == 0) or (self.open_above and compute == torch.inf):
            outward = slope if compute else -slope
            low, high = -torch.inf if (outward < 0).any() else low, torch.inf if (outward > 0).any() else high
        return float(value[self.squares.argmin()]), low, high

    @property
    def reaches_the_bend(self) -> bool:
        """Whether the data extend beyond C_mid, wherever in its interval C_mid lies."""
        return not self.open_above and bool(self.midpoint.max() <= self.compute.max())


def fit(compute: Tensor, reward: Tensor) -> Fit:
    """Fit the sigmoid of reward against compute by least squares.       [n], [n]

    ValueError for fewer than six points, or if all compute is zero or all rewards are equal.
    """
    compute, reward = compute.double(), reward.double()
    if len(compute) < 6:
        raise ValueError(f"{len(compute)} points are too few to fit the four parameters of a sigmoid; expected at least six")
    if not (compute > 0).any() or reward.max() == reward.min():
        raise ValueError("nothing to fit; expected rewards that change while compute grows")
    limits = torch.stack((compute[compute > 0].min() / BEYOND, compute.max() * BEYOND)).log()
    box, freedom = limits, len(reward) - 4
    while True:                     # shrink the box of midpoints to those that fit with their best B, until they fill it
        midpoint = torch.linspace(*box.tolist(), 64, dtype=torch.float64).exp()
        steepness = best_steepness(compute, reward, midpoint)
        squares = squares_left(compute, reward, midpoint, steepness)
        most = float(squares.min()) * (1 + quantile_of_t(freedom)**2 / freedom)
        inside = midpoint[squares <= most].log()
        margin = 2 * (box[1] - box[0]) / 63
        last, box = box, torch.stack((inside.min() - margin, inside.max() + margin)).clamp(*limits)
        if box.diff() >= 0.8 * last.diff():
            break
    midpoint, steepness = midpoint[squares <= most], steepness[squares <= most]
    low, high = (edge(compute, reward, midpoint, steepness, limit, most) for limit in STEEP)
    grid = torch.cat((low[:, None] * (high / low)[:, None] ** GRID, steepness[:, None]), dim=1)     # [M, len(GRID) + 1]
    midpoint, steepness = midpoint[:, None].expand_as(grid).flatten(), grid.flatten()
    flat = bool(steepness.min() <= 1.001 * STEEP[0])
    return Fit(compute, reward, midpoint, steepness, squares_left(compute, reward, midpoint, steepness), most,
               open_below=flat or bool(box[0] == limits[0]), open_above=flat or bool(box[1] == limits[1]))
