"""What an algorithm is free to choose, measured exactly by enumeration instead of judged."""

from collections.abc import Callable

import torch

from nanorl.checks.invariants import Broken, close, numbers, policy_term
from nanorl.ops import token_weights
from nanorl.tabular import fixed_prefix_kl, leaf, log_probs, randn, reward_gradient, sequence_kl, sequence_probs, sequences


def advantage_bias(advantage: Callable, G: int = 3) -> str:
    """How E[1/G sum_i A_i grad log pi(y_i)], one group at a time, relates to grad E[r], on a bandit with three arms."""
    pi, r = leaf(torch.tensor([[0.0, 0.5, 1.0]]).double()), torch.tensor([0.0, 0.1, 1.0]).double()
    groups = sequences(3, G)                                                                # [3^G, G]
    logp, adv = log_probs(pi).squeeze(-1)[groups], torch.cat([advantage(r[group][None]) for group in groups])
    ours = torch.autograd.grad((logp.sum(-1).exp().detach() * (adv * logp).mean(-1)).sum(), pi)[0]
    factors = (ours / reward_gradient(pi, r)).flatten()
    if close(factors, factors.mean().expand_as(factors), 1e-6):
        c = float(factors.mean())
        why = ", unbiased" if abs(c - 1) < 1e-6 else f" = (G-1)/G at G = {G}" if abs(c - (G - 1) / G) < 1e-6 else ""
        return f"advantage: the expected gradient is {c:.4f} of the true one{why}"
    return (f"advantage: the expected gradient is not proportional to the true one; on a bandit with three arms its components "
            f"are {numbers(factors)} of it (G = {G})")


def length_bias(f: Callable, aggregate: str | None) -> str:
    """How the expected gradient with these weights, or f's, relates to the true one, where answers have one token or two."""
    pi, r = leaf(torch.zeros(3, 2).double()), torch.tensor([0.0, 0.0, 1.0, 0.5]).double()
    mask = torch.tensor([[True, False], [True, False], [True, True], [True, True]])         # token 0 ends an answer
    logp, pairs, total = log_probs(pi), sequences(4, 2), 0.0
    for pair in pairs:
        weights = mask[pair].double()
        if aggregate is not None:
            weights = token_weights(mask[pair], torch.zeros(2, dtype=torch.int64), aggregate, max_new_tokens=2).double()
        adv = (r[pair] - r[pair].flip(0))[:, None]                                          # each relative to the other
        old = logp[pair].detach()
        loss, _ = policy_term(f)(logp[pair], old, adv, mask[pair], weights, ref_logp=old, entropy=torch.zeros_like(old))
        total = total + loss / len(pairs)
    first, second = (-torch.autograd.grad(total, pi)[0] / reward_gradient(pi, r))[[0, 2], 0]
    whose = "its own weights" if aggregate is None else f"aggregate {aggregate}"
    return (f"{whose}: where answers have one token or two, the expected gradient is {first:.3f} of the true one "
            f"at the first token and {second:.3f} at the second"
            + ("" if close(first, second, 1e-6) else ": the lengths of answers change its direction"))


def divergence(f: Callable) -> str:
    """the gradient of the KL term is that of a KL divergence, or of a sum of several (by enumeration)"""
    g = torch.Generator().manual_seed(0)
    pi, ref = leaf(randn(g, 4, 3)), randn(g, 4, 3)                                           # two tokens out of three
    logp, ref_logp = log_probs(pi), log_probs(ref)
    mask, adv = torch.ones(logp.shape, dtype=torch.bool), torch.zeros(len(logp), 1).double()
    prob = sequence_probs(pi.detach())[:, None].expand(logp.shape)
    loss, _ = f(logp, logp.detach(), adv, mask, prob, ref_logp=ref_logp, entropy=torch.zeros_like(ref_logp))
    found = torch.autograd.grad(loss, pi)[0]
    candidates = {"KL(pi || ref), each prefix held fixed": fixed_prefix_kl(pi, pi, ref),
                  "KL(ref || pi), each prefix held fixed": fixed_prefix_kl(pi, ref, pi),
                  "KL(pi || ref) of whole answers": sequence_kl(pi, ref)}
    exact = torch.stack([torch.autograd.grad(value, pi)[0].flatten() for value in candidates.values()])
    shares = torch.linalg.lstsq(exact.T, found.flatten()[:, None]).solution.flatten()
    rest = (found.flatten() - shares @ exact).norm()
    if (shares > -1e-9).all() and (shares > 1e-9).any() and rest < 1e-6 * found.norm():
        terms = [f"{c:.4g} times that of {name}" for c, name in zip(shares, candidates, strict=True) if c > 1e-9]
        return f"KL term: its expected gradient is {' plus '.join(terms)}"
    raise Broken("the expected gradient of the term with ref_logp is that of no KL divergence, nor of a sum of several: it "
                 "does not pull the policy towards the reference")
