"""What the theorems quantify over. Hypothesis draws shapes, scales and a seed; torch makes the tensors, in float64."""

from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from nanorl.ops import AGGREGATES, token_weights
from nanorl.tabular import num_prefixes

generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
scales = st.sampled_from([0.0, 0.01, 0.3, 1.0, 5.0, 30.0])
temperatures = st.floats(0.3, 3.0)
aggregates = st.sampled_from(AGGREGATES)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def logits(draw, holes=False):
    """[N, V]. With holes, some entries are -inf, but never all of a row."""
    N, V, g = draw(st.integers(1, 6)), draw(st.integers(2, 7)), draw(generators)
    z = draw(scales) * randn(g, N, V)
    if holes:
        hole = torch.rand(N, V, generator=g) < draw(st.sampled_from([0.2, 0.6, 1.0]))
        hole[torch.arange(N), torch.randint(V, (N,), generator=g)] = False
        z = z.masked_fill(hole, -torch.inf)
    return z


@st.composite
def scored_logits(draw, holes=False):
    """logits [N, V] and ids [N] of tokens that have a probability."""
    z = draw(logits(holes))
    return z, torch.multinomial((z > -torch.inf).double(), 1, generator=draw(generators)).squeeze(-1)


@st.composite
def logit_pairs(draw):
    """Two [N, V], anything from equal to far apart."""
    z = draw(logits())
    return z, z + draw(scales) * randn(draw(generators), *z.shape)


@st.composite
def policies(draw, count=1, V=(2, 4), T=(1, 3)):
    """Tables of nanorl/tabular.py of one shape [prefixes, V]; V and T are ranges."""
    V, T, g = draw(st.integers(*V)), draw(st.integers(*T)), draw(generators)
    scale = draw(st.sampled_from([0.01, 0.3, 1.0, 3.0]))
    tables = [scale * randn(g, num_prefixes(V, T), V) for _ in range(count)]
    return tables[0] if count == 1 else tables


@st.composite
def linear_problems(draw, rows=(0, 9)):
    """hidden [N, d], weight [V, d], ids [N], and a temperature."""
    N, d, V, g = draw(st.integers(*rows)), draw(st.integers(1, 5)), draw(st.integers(2, 7)), draw(generators)
    scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
    return randn(g, N, d), scale * randn(g, V, d), torch.randint(V, (N,), generator=g), draw(temperatures)


@st.composite
def rewards(draw, min_group=1):
    """[P, G], each row of its own kind: 0/1 verdicts, a few levels, real numbers, or all alike."""
    P, G, g = draw(st.integers(1, 4)), draw(st.integers(min_group, 8)), draw(generators)
    kinds = (torch.randint(2, (P, G), generator=g), torch.randint(-2, 3, (P, G), generator=g) / 10,
             randn(g, P, G), randn(g, P, 1).expand(P, G))
    return torch.stack([kinds[k][p].double() for p, k in enumerate(torch.randint(len(kinds), (P,), generator=g))])


@st.composite
def scored_rewards(draw):
    """rewards [P, G] and valid [P, G], with any number per row, zero included."""
    r, g = draw(rewards()), draw(generators)
    return r, torch.rand(r.shape, generator=g) < torch.rand(len(r), 1, generator=g)


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
    """mask [B, T] and prompt_index [B]: three labels with gaps, in no order, with any number of rows each."""
    mask, g = draw(masks()), draw(generators)
    return mask, torch.randint(-100, 100, (3,), generator=g)[torch.randint(3, (len(mask),), generator=g)]


@dataclass
class Batch:
    """Everything an objective takes: [B, T], but adv is [B, 1] and prompt_index [B]."""

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    entropy: Tensor
    adv: Tensor
    mask: Tensor
    weights: Tensor
    prompt_index: Tensor

    def rows(self, index) -> "Batch":
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})


@st.composite
def batches(draw, moves=(0.0, 0.1, 0.5, 2.0)):
    """The rows of one optimizer step, whose log-probs have moved away from the sampling policy's by one of `moves`."""
    (mask, prompt_index), g = draw(masked_prompts()), draw(generators)
    B, T = mask.shape
    logp, adv = -randn(g, B, T).abs(), randn(g, B, 1)
    adv[torch.rand(B, generator=g) < 0.2] = 0.0                 # groups without contrast
    return Batch(logp=logp, old_logp=logp + draw(st.sampled_from(moves)) * randn(g, B, T),
                 ref_logp=logp + draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) * randn(g, B, T),
                 entropy=randn(g, B, T).abs(), adv=adv, mask=mask, prompt_index=prompt_index,
                 weights=token_weights(mask, prompt_index, draw(aggregates), T).double())


def partition(generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
    """The rows 0 .. count-1 in some order, cut into parts anywhere."""
    cuts = torch.rand(count - 1, generator=generator) < 0.5
    return torch.randperm(count, generator=generator).tensor_split((cuts.nonzero().squeeze(-1) + 1).tolist())
