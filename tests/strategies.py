"""What the theorems quantify over, in addition to nanorl/checks/cases.py. Hypothesis draws shapes, scales and a seed;
torch makes the tensors, in float64."""

import torch
from hypothesis import strategies as st

from nanorl.checks.cases import generators, rewards
from nanorl.tabular import num_prefixes, randn

scales = st.sampled_from([0.0, 0.01, 0.3, 1.0, 5.0, 30.0])
temperatures = st.floats(0.3, 3.0)
poisons = st.sampled_from([torch.nan, torch.inf, -torch.inf])


@st.composite
def policies(draw, count=1, V=(2, 4), T=(1, 3)):
    """Tables of nanorl/tabular.py of one shape [prefixes, V]; V and T are ranges."""
    V, T, g = draw(st.integers(*V)), draw(st.integers(*T)), draw(generators)
    scale = draw(st.sampled_from([0.01, 0.3, 1.0, 3.0]))
    tables = [scale * randn(g, num_prefixes(V, T), V) for _ in range(count)]
    return tables[0] if count == 1 else tables


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
def linear_problems(draw, rows=(0, 9)):
    """hidden [N, d], weight [V, d], ids [N], and a temperature."""
    N, d, V, g = draw(st.integers(*rows)), draw(st.integers(1, 5)), draw(st.integers(2, 7)), draw(generators)
    scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
    return randn(g, N, d), scale * randn(g, V, d), torch.randint(V, (N,), generator=g), draw(temperatures)


@st.composite
def scored_rewards(draw):
    """rewards [P, G] and valid [P, G], with any number per row, zero included."""
    r, g = draw(rewards()), draw(generators)
    return r, torch.rand(r.shape, generator=g) < torch.rand(len(r), 1, generator=g)
