"""Policies small enough to enumerate: an expectation is an exact sum over every sequence, with no sampling noise.

A policy over sequences of T tokens from a vocabulary of V is a table with one logit vector per prefix,

    pi(y) = prod_t softmax(logits[prefix y_<t])[y_t]        logits [N, V], N = 1 + V + ... + V^(T-1) prefixes, float64

whose rows are numbered like a V-ary heap: the empty prefix is row 0, and appending token a to the prefix of row k gives
the prefix of row kV + a + 1. Every function is differentiable in its logits. Constants ("samples", to a training
objective) are detached by the caller: expectation(logits.detach(), loss) lets no gradient flow through the sampling.
Values are in nats.
"""

import torch
from torch import Tensor

from nanorl.ops import kl_divergence, log_softmax, selective_log_softmax


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    """A copy of x to differentiate with respect to."""
    return x.detach().clone().requires_grad_()


def num_prefixes(V: int, T: int) -> int:
    """N = 1 + V + ... + V^(T-1): the rows of a table for sequences of T tokens."""
    return sum(V**t for t in range(T))


def horizon(logits: Tensor) -> int:
    """T, from the shape of the table.       [N, V] -> int"""
    T = 0
    while num_prefixes(logits.shape[1], T) < len(logits):
        T += 1
    assert num_prefixes(logits.shape[1], T) == len(logits), f"{tuple(logits.shape)} is not one row for each prefix"
    return T


def sequences(V: int, T: int) -> Tensor:
    """Every sequence, in the order of numbers written in base V.       -> [V^T, T] int64"""
    return torch.cartesian_prod(*[torch.arange(V)] * T).view(V**T, T)


def prefix_rows(tokens: Tensor, V: int) -> Tensor:
    """The table's row that each token was drawn from.       tokens [B, T] -> [B, T]"""
    rows = torch.zeros_like(tokens)
    for t in range(1, tokens.shape[1]):
        rows[:, t] = V * rows[:, t - 1] + tokens[:, t - 1] + 1
    return rows


def log_probs(logits: Tensor) -> Tensor:
    """log pi(y_t | y_<t) of every token of every sequence.       [N, V] -> [V^T, T]"""
    tokens = sequences(logits.shape[1], horizon(logits))
    return selective_log_softmax(logits[prefix_rows(tokens, logits.shape[1])], tokens)


def sequence_probs(logits: Tensor) -> Tensor:
    """pi(y) = prod_t pi(y_t | y_<t), in the order of `sequences`.       [N, V] -> [V^T]"""
    return log_probs(logits).sum(-1).exp()


def expectation(logits: Tensor, values: Tensor) -> Tensor:
    """E_{y ~ pi}[f(y)] = sum_y pi(y) f(y).       logits [N, V], values f [V^T, ...] -> [...]"""
    return torch.tensordot(sequence_probs(logits), values, dims=1)


def sequence_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = E_{y ~ p}[log p(y) / q(y)] of whole sequences.       [N, V], [N, V] -> []

    Its gradient in p also sees that p chooses its own prefixes; that of `fixed_prefix_kl` does not.
    """
    return expectation(p, (log_probs(p) - log_probs(q)).sum(-1))


def fixed_prefix_kl(sampler: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """E_{y ~ sampler}[sum_t KL(p(.|y_<t) || q(.|y_<t))], the sampler a constant.       [N, V] each -> []

    With sampler = p its value is sequence_kl(p, q): the chain rule of the divergence.
    """
    V = p.shape[1]
    rows = prefix_rows(sequences(V, horizon(p)), V)                                         # [V^T, T]
    return expectation(sampler.detach(), kl_divergence(p, q)[rows].sum(-1))


def reward_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """grad E_{y ~ pi}[r(y)], exact: what a policy gradient estimates.       [N, V], rewards [V^T] -> [N, V]"""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(expectation(logits, rewards), logits)[0]


def regularised_optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """pi*(y) = ref(y) e^{r(y) / beta} / Z: the maximum of E_pi[r] - beta KL(pi || ref).       [N, V], [V^T] -> [V^T]

    For any pi, E_pi[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*).           (Rafailov et al. 2023, eq. 4)
    """
    return log_softmax(log_probs(reference).sum(-1) + rewards / beta).exp()
