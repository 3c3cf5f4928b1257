"""What must hold for every objective and every advantage, in any batch.

An invariant of objectives is a function of (objective, batch, generator), one of advantages of (advantage, rewards [P, G],
generator). It returns nothing where the invariant holds, and raises Broken where it does not. Its docstring is the sentence
that a report prints.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanorl.checks.cases import Batch, Rows, numbers, partition
from nanorl.ops import importance_ratio, selective_log_softmax, sequence_ratio
from nanorl.tabular import leaf, randn


class Broken(Exception):
    """An invariant does not hold; the message describes the counterexample."""


def expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise Broken(sentence)


def differentiate(f: Callable, batch: Rows) -> dict[str, Tensor]:
    """All that comes of a batch, by the names that reports use: the loss, its gradients and the metrics."""
    leaves = {name: leaf(getattr(batch, name)) for name in batch.leaves}
    loss, metrics = replace(batch, **leaves).call(f)
    gradients = torch.autograd.grad(loss, tuple(leaves.values()), materialize_grads=True)
    return {"the loss": loss.detach(), **{f"dL/d{name}": g for name, g in zip(leaves, gradients, strict=True)},
            **{f"the metric {name}": value for name, value in metrics.items()}}


def policy_term(f: Callable) -> Callable:
    """The objective less its terms that do not depend on A, such as KL and entropy: its loss less that with A = 0."""
    def objective(logp, old_logp, adv, mask, weights, **others):
        loss, metrics = f(logp, old_logp, adv, mask, weights, **others)
        return loss - f(logp, old_logp, torch.zeros_like(adv), mask, weights, **others)[0], metrics
    return objective


def change_gradients(results: dict[str, Tensor], change: Callable) -> dict[str, Tensor]:
    """The results of `differentiate` with another order, shape or content of the gradients."""
    return {name: change(x) if name.startswith("dL/") else x for name, x in results.items()}


def close(a: Tensor, b: Tensor, tol: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=tol, atol=tol, equal_nan=True)


def expect_same(found: dict[str, Tensor], expected: dict[str, Tensor], change: str, same: Callable = close) -> None:
    """Loss, gradients and metrics are as expected after a change to the batch, which `change` names."""
    for name, before in expected.items():
        was, now = numbers(before), numbers(found[name])
        expect(same(found[name], before), f"{change} turns {name} from {was} into {now}"
               + (f", which differs by {(found[name] - before).abs().max():.1g}" if now == was else ""))


def expect_gradient(f: Callable, batch: Batch, expected: Tensor, rho: Tensor) -> None:
    """dL/dlogp of the policy term is as expected at every token; the ratios rho [B, T] are for the message."""
    found = differentiate(policy_term(f), batch)["dL/dlogp"]
    wrong = ((found - expected).abs() > 1e-9 * (1 + expected.abs())) | found.isnan()
    for b, t in wrong.nonzero().tolist():
        adv = batch.adv.expand_as(rho)[b, t]
        raise Broken(f"a token with A = {adv:.3g}, ratio {rho[b, t]:.3g} and weight {batch.weights[b, t]:.3g} has "
                     f"dL/dlogp = {found[b, t]:.3g}, expected {expected[b, t]:.3g}")


def ratios(batch: Batch, ratio: str) -> Tensor:
    """Each token's importance ratio, its own or (ratio="sequence") that of its answer.       -> [B, T]"""
    logp, old = (x.masked_fill(~batch.mask, 0.0) for x in (batch.logp, batch.old_logp))
    return importance_ratio(logp, old) if ratio == "token" else sequence_ratio(logp, old, batch.mask).expand_as(logp)


# ---- The invariants of an objective ----


def contract(f: Callable, batch: Rows, generator: torch.Generator) -> None:
    """it returns a pair (loss, metrics): a scalar that depends on logp, and a dict of detached scalars"""
    out = replace(batch, **{name: leaf(getattr(batch, name)) for name in batch.leaves}).call(f)
    expect(isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict),
           f"it returned a {type(out).__name__}, expected a pair (loss, metrics)")
    loss, metrics = out
    expect(isinstance(loss, Tensor) and loss.shape == (),
           f"the loss is a {type(loss).__name__} of shape {[*getattr(loss, 'shape', [])]}, expected a scalar tensor")
    expect(loss.requires_grad, f"the loss has no gradient: something detaches it from {batch.leaves[0]}")
    expect(loss.dtype == torch.float64, f"the loss is {loss.dtype} although all arguments are float64: something converts")
    for name, value in metrics.items():
        expect(isinstance(value, Tensor) and value.shape == () and not value.requires_grad,
               f"the metric {name!r} is not a detached scalar tensor")


NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


def poison(f: Callable, batch: Batch, generator: torch.Generator, values: tuple[float, ...] = NOT_FINITE) -> None:
    """masked positions affect neither loss nor metrics nor gradients, even if they hold nan or inf"""
    expected = change_gradients(differentiate(f, batch), lambda g: g.masked_fill(~batch.mask, 0.0))
    for value in values:
        dirty = replace(batch, **{name: getattr(batch, name).masked_fill(~batch.mask, value)
                                  for name in ("logp", "old_logp", "ref_logp", "entropy")})
        expect_same(differentiate(f, dirty), expected, same=torch.equal,
                    change=f"{value} in log-probs and entropies where the mask is False ({batch})")


def padding(f: Callable, batch: Batch, generator: torch.Generator, same: Callable = close) -> None:
    """extra columns of padding change nothing"""
    fills = {"logp": 1.0, "old_logp": 1.0, "ref_logp": 1.0, "entropy": 1.0, "mask": False, "weights": 0.0}
    if batch.adv.shape[1] > 1:
        fills["adv"] = 1.0
    padded = replace(batch, **{name: torch.nn.functional.pad(getattr(batch, name), (0, 2), value=fill)
                               for name, fill in fills.items()})
    narrow = change_gradients(differentiate(f, padded), lambda g: g[:, :-2])
    expect_same(narrow, differentiate(f, batch), f"padding by two columns ({batch})", same)


def purity(f: Callable, batch: Rows, generator: torch.Generator) -> None:
    """it does not write into its arguments, and gives the same loss when called again"""
    inputs = replace(batch, **{name: leaf(x) if name in batch.leaves else x.clone() for name, x in vars(batch).items()})
    versions = {name: x._version for name, x in vars(inputs).items()}
    first, second = (inputs.call(f)[0].detach() for _ in range(2))
    for name, x in vars(inputs).items():
        expect(x._version == versions[name] and torch.equal(x, getattr(batch, name)), f"it writes into {name}")
    expect(torch.equal(first, second), f"the same batch has the loss {first:.6g} and then {second:.6g}")


def micro_batches(f: Callable, batch: Rows, generator: torch.Generator) -> None:
    """losses, gradients and metrics of any micro-batches add up to those of the whole step"""
    def merged(name: str, values: list[Tensor]) -> Tensor:
        if name.startswith("dL/"):
            return torch.cat(values)
        values = torch.stack(values)
        return values.max() if name.endswith("_max") else values.min() if name.endswith("_min") else values.sum()

    parts = partition(generator, len(batch))
    results, whole = [differentiate(f, batch.rows(rows)) for rows in parts], differentiate(f, batch)
    together = {name: merged(name, [result[name] for result in results]) for name in whole}
    expect_same(together, change_gradients(whole, lambda g: g[torch.cat(parts)]),
                f"splitting into micro-batches of {', '.join(str(len(rows)) for rows in parts)} ({batch})")


def permutation(f: Callable, batch: Rows, generator: torch.Generator, same: Callable = close) -> None:
    """the order of the answers does not matter"""
    order = torch.randperm(len(batch), generator=generator)
    expect_same(differentiate(f, batch.rows(order)), change_gradients(differentiate(f, batch), lambda g: g[order]),
                f"taking the answers in the order {order.tolist()} ({batch})", same)


def reinforce(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """at ratio 1 the gradient is that of REINFORCE, -weight A at each token"""
    no_advantage(f, batch.on_policy(), generator)
    expect_gradient(f, batch.on_policy(), -batch.weights * batch.adv, torch.ones_like(batch.logp))


def direction(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """a small step makes good answers likelier: sum weight A logp rises"""
    z = leaf(randn(generator, *batch.mask.shape, 3))
    ids = torch.randint(3, batch.mask.shape, generator=generator)
    scale = (batch.weights * batch.adv).abs().sum()
    if scale == 0:
        return
    logp = selective_log_softmax(z, ids)
    loss, _ = replace(batch, logp=logp, old_logp=logp.detach(), ref_logp=logp.detach()).call(policy_term(f))
    (g,) = torch.autograd.grad(loss, z)
    before, after = ((batch.weights * batch.adv * selective_log_softmax(x, ids)).sum() for x in (z, z - 1e-3 / scale * g))
    expect(after > before, f"a small step down the loss changes sum weight A logp by {float((after - before).detach()):.3g}, "
                           f"expected a rise ({batch})")


def no_advantage(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """answers with A = 0 have no gradient, exactly, but that of a KL term"""
    batch = replace(batch.at_reference(), adv=torch.zeros_like(batch.adv))
    g = differentiate(f, batch)["dL/dlogp"]
    # A KL term is 0 for every policy that is its own reference. Where it has a gradient there, as k1 has, the loss does not
    # change when both move: its slope along a random way of the policy is the opposite of that along the reference's.
    way, h = randn(generator, *g.shape), 1e-4
    up, down = (replace(batch, ref_logp=batch.ref_logp + step * way).call(f)[0] for step in (h, -h))
    expect(not g.any() or ((g * way).sum() + (up - down) / (2 * h)).abs() < 1e-4 * (g * way).sum().abs(),
           f"with A = 0 everywhere dL/dlogp is {numbers(g[g != 0])} ({batch})")


def slope(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """the gradient is the slope of the loss (finite differences in float64)"""
    smooth = torch.autograd.gradcheck(lambda logp: replace(batch, logp=logp).call(policy_term(f))[0], leaf(batch.logp),
                                      eps=1e-7, atol=1e-4, rtol=1e-3, raise_exception=False)
    expect(smooth, f"dL/dlogp is not the slope of the loss ({batch}); if the ratio is a weight without a gradient, "
                   "say detached_weight=True (--detached-weight)")


def weighted_score(f: Callable, batch: Batch, generator: torch.Generator, ratio: str = "token") -> None:
    """with a detached weight c, L = -sum weight c A logp, and no gradient flows through c; of tokens 0 <= c <= ratio, of
    answers c >= 0 is the same at each token"""
    batch = batch.at_reference()
    found, rho = differentiate(policy_term(f), batch), importance_ratio(batch.logp, batch.old_logp)
    loss, grad_logp = found["the loss"], found["dL/dlogp"]
    first_order = (grad_logp * batch.logp).sum()
    expect(close(loss, first_order, 1e-7), f"the loss is {loss:.3g}, but sum dL/dlogp logp is {first_order:.3g}: a gradient "
                                           f"flows through more than the log-probs ({batch})")
    used = batch.mask & (batch.weights * batch.adv != 0)
    c = -grad_logp / (batch.weights * batch.adv)
    most, expected = rho, "each between 0 and its ratio"
    if ratio == "sequence":
        most, expected = c.masked_fill(~used, torch.inf).amin(-1, keepdim=True).expand_as(c), "one for each answer, at least 0"
    expect(not ((c < 0) | (c > most * (1 + 1e-9) + 1e-9))[used].any(),
           f"the weights c are {numbers(c[used])} at ratios {numbers(rho[used])}, expected {expected}")


def flat_region(f: Callable, batch: Batch, generator: torch.Generator, clip: tuple[float, float], ratio: str) -> None:
    """the gradient is 0 exactly where the ratio is beyond the clip range in A's favour, elsewhere -weight ratio A"""
    low, high = clip
    near = [side * math.log(edge) for edge in (max(1 - low, 1e-3), 1 + high) for side in (0.99, 1.01)]     # the band's edges
    for case in (batch, *(replace(batch, old_logp=batch.logp - log_ratio) for log_ratio in near)):
        rho = ratios(case, ratio)
        flat = ((case.adv > 0) & (rho > 1 + high)) | ((case.adv < 0) & (rho < 1 - low))
        expect_gradient(f, case.at_reference(), (-case.weights * rho * case.adv).masked_fill(flat, 0.0), rho)


def pessimism(f: Callable, batch: Batch, generator: torch.Generator, clip: tuple[float, float], ratio: str) -> None:
    """the loss is never below the unclipped one, -sum weight ratio A"""
    unclipped = -(batch.weights * ratios(batch, ratio) * batch.adv).sum()
    loss = differentiate(policy_term(f), batch.at_reference())["the loss"]
    expect(not loss < unclipped - 1e-9 * (1 + unclipped.abs()),
           f"the loss is {loss:.3g} and without clipping it would be {unclipped:.3g} ({batch})")


def unbounded(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """every token that counts has a gradient, whatever its ratio (no invariant: it tells whether there is a clip to check)"""
    for log_ratio in (-3.0, 3.0):           # far enough, and not so far that the slope of a soft clip rounds to 0
        g = differentiate(policy_term(f), replace(batch.at_reference(), old_logp=batch.logp - log_ratio))["dL/dlogp"]
        expect(bool(g[batch.mask & (batch.weights * batch.adv != 0)].all()), f"a token has none ({batch})")


def entropy_term(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """the entropy bonus weighs tokens as the rest of the loss does: dL/dentropy = -c weight, c > 0"""
    g, w = differentiate(f, batch)["dL/dentropy"], batch.weights
    if not w.any():
        return
    c = float(-(g * w).sum() / w.square().sum())
    expect(c > 0 and close(g, -c * w),
           f"dL/dentropy is {numbers(g[batch.mask])} at weights {numbers(w[batch.mask])}, expected -c weight")


# ---- The invariants of an advantage ----


def same_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """groups whose rewards are all equal get 0"""
    a = advantage(r[:, :1].expand(r.shape).clone())
    expect(not (a.abs() > 1e-6).any(), f"{r.shape[1]} rewards of {r[0, 0]:.3g} each get {numbers(a[0])}")


def shifted_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """adding a constant to a group's rewards changes nothing"""
    a, shifted = advantage(r), advantage(r + 3.0)
    expect(close(shifted, a, 1e-4), f"rewards {numbers(r[0])} get {numbers(a[0])}, and with 3 added {numbers(shifted[0])}")


def scaled_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """doubling large rewards doubles the advantages, or leaves them unchanged"""
    r = 1000.0 * r                      # large, so that the eps of a z-score does not matter
    a, doubled = advantage(r), advantage(2.0 * r)
    expect(close(doubled, 2 * a, 1e-4) or close(doubled, a, 1e-4),
           f"rewards {numbers(r[0])} get {numbers(a[0])}, and doubled {numbers(doubled[0])}")


def reordered_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """reordering a group reorders its advantages"""
    order = torch.randperm(r.shape[1], generator=generator)
    a, reordered = advantage(r), advantage(r[:, order])
    expect(close(reordered, a[:, order], 1e-5),
           f"rewards {numbers(r[0])} get {numbers(a[0])}, in the order {order.tolist()} {numbers(reordered[0])}")


OBJECTIVE_INVARIANTS = (contract, poison, padding, purity, micro_batches, permutation, reinforce, direction, no_advantage,
                        slope, weighted_score, flat_region, pessimism, entropy_term)
ADVANTAGE_INVARIANTS = (same_rewards, shifted_rewards, scaled_rewards, reordered_rewards)
