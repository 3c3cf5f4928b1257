"""The random batches and rewards that an objective is checked with, and how to make one smaller.

Hypothesis draws shapes, scales and a seed; torch makes the tensors, in float64.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from nanorl.ops import AGGREGATES, token_weights
from nanorl.tabular import randn

try:
    from hypothesis import strategies as st
except ImportError:
    sentence = "nanorl.checks needs hypothesis; install it with: pip install hypothesis"
    # While `python -m` imports this package, sys.argv[0] is "-m": then the sentence alone, without a traceback.
    raise (SystemExit(sentence) if sys.argv[0] == "-m" else ImportError(sentence)) from None

generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
aggregates = st.sampled_from(AGGREGATES)


@st.composite
def rewards(draw, min_group=1):
    """[P, G], each row of its own kind: 0/1 verdicts, a few levels, real numbers, or all equal."""
    P, G, g = draw(st.integers(1, 4)), draw(st.integers(min_group, 8)), draw(generators)
    kinds = (torch.randint(2, (P, G), generator=g), torch.randint(-2, 3, (P, G), generator=g) / 10,
             randn(g, P, G), randn(g, P, 1).expand(P, G))
    return torch.stack([kinds[k][p].double() for p, k in enumerate(torch.randint(len(kinds), (P,), generator=g))])


@st.composite
def masks(draw, kinds=("empty", "full", "run", "scattered")):
    """[B, T] bool, each row of its own kind."""
    B, T, g = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(generators)
    t, edges = torch.arange(T), torch.randint(T, (B, 2), generator=g).sort().values
    rows = {"empty": torch.zeros(B, T, dtype=torch.bool),
            "full": torch.ones(B, T, dtype=torch.bool),
            "run": (edges[:, :1] <= t) & (t <= edges[:, 1:]),
            "scattered": torch.rand(B, T, generator=g) < 0.5}
    return torch.stack([rows[kinds[k]][b] for b, k in enumerate(torch.randint(len(kinds), (B,), generator=g))])


@st.composite
def masked_prompts(draw):
    """mask [B, T] and prompt_index [B]: three labels, not consecutive and in any order, each with any number of rows."""
    mask, g = draw(masks()), draw(generators)
    return mask, torch.randint(-100, 100, (3,), generator=g)[torch.randint(3, (len(mask),), generator=g)]


def numbers(x: Tensor) -> str:
    """The first six numbers of a tensor."""
    return ", ".join(f"{v:.3g}" for v in x.flatten().tolist()[:6]) + (", ..." if x.numel() > 6 else "")


class Rows:
    """The arguments of a function, each a tensor with a row for each of B answers or pairs."""

    leaves: tuple[str, ...] = ()        # those to differentiate with respect to
    width = 1                           # the number of positions

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def rows(self, index: Tensor) -> Self:
        return replace(self, **{name: x[index] for name, x in vars(self).items()})

    def positions(self, index: Tensor) -> Self:
        """Some of the T positions, where a tensor has them: adv may be [B, 1]."""
        return replace(self, **{name: x[:, index] for name, x in vars(self).items() if x.shape[1:] == index.shape})


@dataclass
class Batch(Rows):
    """The arguments of an objective: [B, T], but adv is [B, 1]."""

    logp: Tensor
    old_logp: Tensor
    adv: Tensor
    mask: Tensor
    weights: Tensor
    ref_logp: Tensor
    entropy: Tensor

    leaves = ("logp", "entropy")

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def call(self, f: Callable) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics), from the call that train_grpo.py makes."""
        return f(self.logp, self.old_logp, self.adv, self.mask, self.weights, ref_logp=self.ref_logp, entropy=self.entropy)

    def __str__(self) -> str:
        (B, T), count = self.mask.shape, int(self.mask.sum())
        return (f"{B} answer{'s' * (B > 1)} with {T} position{'s' * (T > 1)}, of which {count} count{'s' * (count == 1)}, "
                f"A = {numbers(self.adv)}")

    def at_reference(self) -> "Batch":
        """The same batch with the policy still equal to its reference, where a KL term is 0."""
        return replace(self, ref_logp=self.logp)

    def on_policy(self) -> "Batch":
        """The same batch with the policy still equal to its sampler and its reference."""
        return replace(self, old_logp=self.logp, ref_logp=self.logp)


@dataclass
class OwnBatch(Batch):
    """Of an objective that makes its weights itself. adv is [B, 1], or [B, T] where each token has its own."""

    prompt_index: Tensor        # [B]

    def call(self, f: Callable) -> tuple[Tensor, dict[str, Tensor]]:
        return f(self.logp, self.old_logp, self.adv, self.mask, self.weights, ref_logp=self.ref_logp, entropy=self.entropy,
                 prompt_index=self.prompt_index)


@st.composite
def batches(draw, moves=(0.0, 0.1, 0.5, 2.0), own=False, adv_of_tokens=False):
    """The rows of one optimizer step, whose log-probs have moved away from the sampling policy's by one of `moves`."""
    (mask, prompt_index), g = draw(masked_prompts()), draw(generators)
    B, T = mask.shape
    logp, adv = -randn(g, B, T).abs(), randn(g, B, 1)
    adv[torch.rand(B, generator=g) < 0.2] = 0.0                 # groups whose rewards are all equal
    batch = Batch(logp=logp, old_logp=logp + draw(st.sampled_from(moves)) * randn(g, B, T),
                  ref_logp=logp + draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) * randn(g, B, T),
                  entropy=randn(g, B, T).abs(), adv=adv, mask=mask,
                  weights=token_weights(mask, prompt_index, draw(aggregates), T).double())
    if adv_of_tokens:
        batch.adv = adv * randn(g, B, T)
    return OwnBatch(**vars(batch), prompt_index=prompt_index) if own else batch


@dataclass
class Pairs(Rows):
    """The arguments of a preference objective: log-probs and lengths of whole responses, [N]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    weights: Tensor

    leaves = ("chosen", "rejected")

    def call(self, f: Callable) -> tuple[Tensor, dict[str, Tensor]]:
        return f(**vars(self))

    def first(self, **changed: Tensor) -> Self:
        """The first pair alone, with weight 1."""
        return replace(self.rows(slice(0, 1)), weights=torch.ones(1).double(), **changed)

    def exchanged(self) -> Self:
        """The same responses, the other one chosen."""
        return Pairs(self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.rejected_length, self.chosen_length,
                     self.weights)

    def __str__(self) -> str:
        return (f"log-probs {numbers(self.chosen)} chosen and {numbers(self.rejected)} rejected, of the reference "
                f"{numbers(self.ref_chosen)} and {numbers(self.ref_rejected)}, lengths {numbers(self.chosen_length)} and "
                f"{numbers(self.rejected_length)}")


@st.composite
def pairs(draw):
    """The pairs of one optimizer step; the policy has moved away from the reference by little or much."""
    N, g = draw(st.integers(1, 4)), draw(generators)
    length, move = torch.randint(1, 13, (2, N), generator=g), draw(st.sampled_from([0.01, 0.3, 1.0, 3.0]))
    logp = -randn(g, 2, N).abs() * length
    weights = torch.rand(N, generator=g).double()
    return Pairs(*logp, *(logp + move * randn(g, 2, N)), *length, weights / weights.sum())


@dataclass
class Trajectories(Rows):
    """The arguments of an estimator of advantages: [B, T], the mask of each row one run."""

    rewards: Tensor
    values: Tensor
    mask: Tensor

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def __str__(self) -> str:
        return (f"rewards {numbers(self.rewards[self.mask])} and values {numbers(self.values[self.mask])} in "
                f"{len(self)} x {self.width} positions")


@st.composite
def trajectories(draw):
    mask, g = draw(masks(("empty", "full", "run"))), draw(generators)
    return Trajectories(randn(g, *mask.shape), randn(g, *mask.shape), mask)


def partition(generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
    """The rows 0 .. count-1 in random order, split at random places."""
    cuts = torch.rand(count - 1, generator=generator) < 0.5
    return torch.randperm(count, generator=generator).tensor_split((cuts.nonzero().squeeze(-1) + 1).tolist())


def smaller_cases(case: Rows | Tensor) -> Iterator[Rows | Tensor]:
    """A batch without one of its rows or one of its positions; rewards [P, G] without a group or a sample."""
    def all_but_one(count: int, at_least: int = 1) -> Tensor:
        return ~torch.eye(count, dtype=torch.bool)[:count if count > at_least else 0]

    if isinstance(case, Rows):
        yield from (case.rows(kept) for kept in all_but_one(len(case)))
        yield from (case.positions(kept) for kept in all_but_one(case.width))
    else:
        yield from (case[kept] for kept in all_but_one(len(case)))
        yield from (case[:, kept] for kept in all_but_one(case.shape[1], at_least=2))
