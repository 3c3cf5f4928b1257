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
    mask: Tensor            # [B, 1, Ta, Tp + Ta] what is added to the rows' scores: -inf where a token may not attend


def share_prefixes(tokens: np.ndarray, where: np.ndarray, like: Tensor) -> Shared | None:
    """Rows [B, T] that have the same tokens before their first True of `where` share them. None where that saves little.
    Its tensors are on the device of `like`, and the mask is of its dtype."""
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
    *parts, lengths = (torch.from_numpy(x).to(like.device) for x in parts)
    read = (torch.arange(Tp, device=like.device) < lengths[:, None])[:, None].expand(B, Ta, Tp)
    own = torch.ones(Ta, Ta, dtype=torch.bool, device=like.device).tril().expand(B, Ta, Ta)
    blocked = ~torch.cat((read, own), dim=2)[:, None]
    return Shared(*parts, like.new_zeros(blocked.shape).masked_fill(blocked, -torch.inf))
