"""Rows that begin alike, as the samples of one prompt do, so that the model reads what they share once (GPT.hidden_at)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARE_BELOW = 0.9       # share prefixes only if at most this part of the tokens is left to read: sharing costs something, too


class Shared(NamedTuple):
    """Rows [B, T] that begin alike, as one sequence of N = P Tp + B Ta tokens: P prefixes, then what each row has from its
    first wanted token on. Both are padded on the right, to Tp and Ta tokens."""

    tokens: Tensor          # [1, N]
    positions: Tensor       # [1, N] of these tokens in their rows
    wanted: Tensor          # [M] which of these N were asked for
    prefix: Tensor          # [B] the prefix of each row
    lengths: Tensor         # [B] its length
    widths: tuple[int, int]     # Tp, Ta

    def to(self, device: torch.device) -> "Shared":
        return Shared(*(x.to(device) for x in self[:-1]), self.widths)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of the rows' tokens, -inf where they may not attend.       [B, 1, Ta, Tp + Ta]"""
        B, (Tp, Ta), device = len(self.prefix), self.widths, self.prefix.device
        held = (torch.arange(Tp, device=device) < self.lengths[:, None])[:, None].expand(B, Ta, Tp)
        own = torch.ones(Ta, Ta, dtype=torch.bool, device=device).tril().expand(B, Ta, Ta)
        blocked = ~torch.cat((held, own), dim=2)[:, None]
        return torch.zeros(blocked.shape, dtype=dtype, device=device).masked_fill(blocked, -torch.inf)


def share_prefixes(tokens: np.ndarray, where: np.ndarray) -> Shared | None:
    """Rows [B, T] that have the same tokens before their first True of `where` share them. None where that saves little."""
    B, T = tokens.shape
    lengths = where.argmax(1)                                                               # [B], 0 of a row without a True
    if not lengths.any():
        return None
    row, at = where.nonzero()                                                               # [M] each
    rows: dict[bytes, int] = {}
    first = [rows.setdefault(tokens[b, :n].tobytes(), b) for b, n in enumerate(lengths)]    # the first row that begins so
    readers, prefix = np.unique(first, return_inverse=True)                                 # [P], [B]
    P, Tp, Ta = len(readers), int(lengths.max()), int((at - lengths[row]).max(initial=0)) + 1
    if P * Tp + B * Ta > SHARE_BELOW * B * T:
        return None
    after = np.minimum(lengths[:, None] + np.arange(Ta), T - 1)                             # [B, Ta]
    parts = (np.append(tokens[readers, :Tp], np.take_along_axis(tokens, after, 1))[None],
             np.append(np.tile(np.arange(Tp), P), after)[None], P * Tp + row * Ta + at - lengths[row], prefix, lengths)
    return Shared(*map(torch.from_numpy, parts), (Tp, Ta))
