"""The formula sheet: every equation that a training objective is made of, one function each.

Tensors in, tensors out. Nothing here knows a model, draws a random number or writes into its arguments. Values are in
nats. B sequences, T tokens, V vocabulary entries, P prompts, G samples per prompt; a mask is boolean and True marks a
token that counts. Half-precision inputs are computed in float32; float64 stays float64. Constants of an objective (old
log-probs, advantages) must arrive detached: the functions assert it.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------------
# Probability
# ---------------------------------------------------------------------------------------------------------------------


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


NO_FLOAT64 = {"mps"}        # devices


def _widest(x: Tensor) -> Tensor:
    """In float64, or float32 on a device without it."""
    return x.float() if x.device.type in NO_FLOAT64 else x.double()


def _below_maximum(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(x - m, m) with m = max_i x_i, kept as a dimension of 1: e^{x - m} cannot overflow.

    m is a constant: whatever is subtracted here and added again later has a gradient that cancels. A row of only -inf
    has no maximum to subtract, for -inf - -inf is nan.
    """
    x = _at_least_float32(x)
    m = x.detach().amax(dim, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0.0)
    return x - m, m


def logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """log sum_i e^{x_i}, over `dim`.

        LSE(x) = m + log sum_i e^{x_i - m},   m = max_i x_i

    Entries of -inf count as zero probability. Returns x's shape without `dim`.
    """
    x, m = _below_maximum(x, dim)
    return (m + x.exp().sum(dim, keepdim=True).log()).squeeze(dim)


def log_softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """log p_i = z_i - LSE(z), over `dim`: log-probabilities of the softmax. Same shape as `logits`, in nats.

    d log p_a / d z_i = 1[i = a] - p_i, the score of a token: it sums to zero over i. The maximum m is taken off first
    and never added again, so logits of 10^4 lose no digits: log p_i = (z_i - m) - log sum_j e^{z_j - m}.
    """
    z, _ = _below_maximum(logits, dim)
    return z - z.exp().sum(dim, keepdim=True).log()


def selective_log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(ids) = z_ids - LSE(z), without a log-probability for every other token.

    logits [..., V], ids [...] int64 -> [...] in nats.
    """
    z, _ = _below_maximum(logits, -1)
    return z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - z.exp().sum(-1).log()


def entropy_from_logits(logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """H = -sum_i p_i log p_i of the softmax, with 0 log 0 = 0.       logits [..., V] -> [...] in nats, within [0, log V]

    dH/dz_i = -p_i (log p_i + H). `chunk_size` rows are treated at a time: the values are the same for any size, the
    temporaries are smaller.
    """
    if chunk_size is not None:
        rows = logits.reshape(-1, logits.shape[-1]).split(chunk_size)
        return torch.cat([entropy_from_logits(chunk) for chunk in rows]).reshape(logits.shape[:-1])
    log_p = log_softmax(logits)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_i p_i log(p_i / q_i), exact.       [..., V], [..., V] -> [...] in nats

    Never negative, zero only where p = q, and +inf where q gives zero probability to something that p does not.
    """
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, 0 < beta < 1.       [..., V], [..., V] -> [...] in nats

        JSD_beta(p || q) = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1-beta) q     (Agarwal et al. 2023, eq. 1)

    Between 0 and the entropy of a coin of bias beta, at most log 2, even where p and q share nothing; symmetric at beta = 1/2.
    For small beta it is about beta KL(p || q), for beta near 1 about (1 - beta) KL(q || p).
    """
    log_p, log_q = (log_softmax(logits) for logits in (p_logits, q_logits))
    log_m = logsumexp(torch.stack((log_p + math.log(beta), log_q + math.log1p(-beta))), dim=0)
    return beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m)


def with_tail(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of the k tokens `ids`, and of all others as one.       [..., V], [..., k] int64 -> [..., k + 1] in nats

    A distribution again, so that a divergence of two of them is one: never negative, and never more than that of all V
    tokens. Without the tail it would be neither. The ids are distinct within a row, and k < V.
    """
    log_p = log_softmax(logits)
    others = log_p.scatter(-1, ids, -torch.inf)
    return torch.cat((log_p.gather(-1, ids), logsumexp(others)[..., None]), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Kullback-Leibler divergence from samples                                        (Schulman 2020, "Approximating KL Divergence")
#
# Tokens are sampled from the first policy; r = log(second / first). As values, k1 and k3 have the mean KL(first ||
# second) exactly and k2 has it nearly. As loss terms, with nothing flowing through the sampling, they differ:
# the gradient of k1 has mean zero, k2 follows KL(first || second) and k3 follows KL(second || first), each with the
# prefix held fixed.
# ---------------------------------------------------------------------------------------------------------------------


def kl_k1(logp: Tensor, other: Tensor) -> Tensor:
    """k1 = -r = log(first / second): unbiased, of either sign.       [...], [...] -> [...] in nats"""
    return _at_least_float32(logp) - _at_least_float32(other)


def kl_k2(logp: Tensor, other: Tensor) -> Tensor:
    """k2 = r^2 / 2: never negative; its mean differs from the KL at third order in r.       [...], [...] -> [...]"""
    return kl_k1(logp, other).square() / 2


def kl_k3(logp: Tensor, other: Tensor) -> Tensor:
    """k3 = e^r - 1 - r: unbiased and never negative.       [...], [...] -> [...] in nats

    expm1 keeps e^r - 1 accurate near r = 0, where k3 is about r^2 / 2.
    """
    r = -kl_k1(logp, other)
    return torch.expm1(r) - r


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """A coefficient that keeps the KL near a target.                                  (Ziegler et al. 2019, section 2.2)

        c <- c (1 + 0.1 clip(kl / target - 1, -0.2, 0.2))
    """
    return kl_coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


# ---------------------------------------------------------------------------------------------------------------------
# Advantages: rewards [P, G] -> [P, G], each row compared with its own mean. `valid` [P, G] is False for a sample that
# could not be scored; it enters no mean and gets advantage 0.
# ---------------------------------------------------------------------------------------------------------------------


def center(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """A_i = r_i - mean(r).       [P, G] -> [P, G]       (the baseline of Dr. GRPO, Liu et al. 2025)

    Because r_i is part of its own mean, the expected policy gradient is (G-1)/G times the true one. Rows sum to zero;
    a row of equal rewards gives exactly zero.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    r = _widest(rewards).masked_fill(~valid, 0.0)
    mean = r.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    # Rounding can leave equal rewards a hair off their mean, and zscore would blow that hair up: decide by comparison.
    highest = r.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    lowest = r.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    return (r - mean).masked_fill(~valid | (highest <= lowest), 0.0).to(_at_least_float32(rewards).dtype)


def zscore(rewards: Tensor, eps: float = 1e-6, valid: Tensor | None = None) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps), population std.       [P, G] -> [P, G]     (GRPO, Shao et al. 2024, 4.1.2)

    Unchanged when rewards are shifted, and (up to eps) when they are scaled; |A_i| <= sqrt(G-1). For 0/1 rewards with
    pass rate p: +sqrt((1-p)/p) and -sqrt(p/(1-p)), so groups near p = 0 or 1 weigh more than the true gradient says.
    """
    count = rewards.shape[-1] if valid is None else valid.sum(-1, keepdim=True).clamp(min=1)
    a = center(_widest(rewards), valid)
    std = (a.square().sum(-1, keepdim=True) / count).sqrt()
    return (a / (std + eps)).to(_at_least_float32(rewards).dtype)


def zscore_batch(rewards: Tensor, eps: float = 1e-6, valid: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """A_i = (r_i - mean(r)) / (std + eps), the mean its group's, the std one for the whole step.       [P, G] -> [P, G]

        std = sqrt( mean_i (r_i - mean(r))^2 ) over the answers of all groups                (ScaleRL, Khatri et al. 2025)

    `kept` [P, G] is False for answers that are not trained on: they count in their group's mean, but not in the std.
    Unlike z-scores of each group, these leave the groups' weights as `center` has them.
    """
    a = center(_widest(rewards), valid)
    kept = valid if kept is None else kept
    std = masked_mean(a.square(), torch.ones_like(a, dtype=torch.bool) if kept is None else kept).sqrt()
    return (a / (std + eps)).to(_at_least_float32(rewards).dtype)


def leave_one_out(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """A_i = r_i - mean_{j != i} r_j = G/(G-1) (r_i - mean(r)).       [P, G] -> [P, G]       (Kool et al. 2019)

    The baseline does not contain r_i, so the expected policy gradient is the true one. A lone sample has nothing to be
    compared with and gets 0.
    """
    count = rewards.shape[-1] if valid is None else valid.sum(-1, keepdim=True)
    a = center(_widest(rewards), valid)
    count = torch.as_tensor(count, dtype=a.dtype, device=a.device)
    return (a * count / (count - 1).clamp(min=1)).to(_at_least_float32(rewards).dtype)


def overlong_penalty(lengths: Tensor, limit: int, buffer: float) -> Tensor:
    """What an answer pays for its length, shortly before the limit.                     (DAPO, Yu et al. 2025, eq. 13)

        0  if L <= limit - buffer,        (limit - buffer - L) / buffer  up to the limit,        -1  beyond

    lengths [...] in tokens -> [...] within [-1, 0], to be added to the reward. buffer > 0.
    """
    return ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float,
        bootstrap: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.                                       (Schulman et al. 2015, eq. 16)

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}          return_t = A_t + V_t

    rewards, values, mask [B, T] -> (advantages, returns), [B, T] each, 0 where mask is False. values[:, t] belongs to the
    state that chooses tokens[:, t+1]. Only True positions are steps, and t + 1 is the next of them: what an environment says
    between two actions neither discounts nor decays. V after the last step is `bootstrap` [B]: 0 where the answer was scored,
    because a scored answer has ended, and the critic's value only where it was not. lam = 1 gives (discounted) rewards-to-go
    minus V; lam = 0 gives delta. All are constants.
    """
    bootstrap = values.new_zeros(len(values)) if bootstrap is None else bootstrap
    inputs = (rewards, values, bootstrap)
    assert not any(x.requires_grad for x in inputs), "advantages are constants: detach their inputs"
    rewards, values, bootstrap = map(_at_least_float32, inputs)
    order = (~mask).byte().argsort(dim=-1, stable=True)                                     # the steps first, in their order
    rewards, values, mask = (x.gather(-1, order) for x in (rewards, values, mask))
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    after, goes_on = (F.pad(x[:, 1:], (0, 1)) for x in (values, mask))
    after = torch.where(goes_on, after, bootstrap[:, None])                                # V_{t+1}
    advantages, count = (rewards + gamma * after - values).masked_fill(~mask, 0.0), 1
    while count < values.shape[1]:      # each entry sums `count` deltas from t on; adding the next `count` doubles that
        advantages = advantages + (gamma * lam) ** count * F.pad(advantages[:, count:], (0, count))
        count *= 2
    advantages = advantages.masked_fill(~mask, 0.0)
    return tuple(torch.zeros_like(x).scatter(-1, order, x) for x in (advantages, advantages + values))


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / (std + eps) over the True positions alone, 0 elsewhere.       [B, T], [B, T] -> [B, T]

    Of the whole step, never of a micro-batch. Values that are all equal, or a single one, give exactly 0.
    """
    values, zeros = _widest(x[mask]), torch.zeros_like(_at_least_float32(x))
    if len(values) == 0 or values.max() == values.min():
        return zeros
    a = values - values.mean()
    return zeros.masked_scatter(mask, (a / (a.square().mean().sqrt() + eps)).to(zeros.dtype))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max( (V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2 ) / 2.       [...] each -> [...]     (PPO's code, 2017)

    Pessimistic, like the clipped surrogate: the gradient is zero where V has moved further than `clip` from where it was and
    is nearer to R than a smaller step would have been. clip = inf is the squared error.
    """
    assert not (old_values.requires_grad or returns.requires_grad), "old values and returns are constants: detach them"
    clipped = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Policy-gradient surrogates: per token, to be MAXIMISED. Mask, weight and sign are the objective's.
# ---------------------------------------------------------------------------------------------------------------------


def importance_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """rho = pi(a|s) / pi_old(a|s) = e^{logp - old_logp}.       [...], [...] -> [...]

    Its mean over samples of pi_old is 1. Where both policies are the same it is 1 and its gradient is the score.
    """
    assert not old_logp.requires_grad, "old log-probs are constants: detach them"
    return (_at_least_float32(logp) - _at_least_float32(old_logp)).exp()


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """The length-normalised ratio of whole answers.                              (GSPO, Zheng et al. 2025, eq. 7)

        s = ( pi(y|x) / pi_old(y|x) )^{1/|y|} = exp( mean_t log rho_t ),   the mean over the row's mask

    logp, old_logp, mask [B, T] -> [B, 1]. An empty row has ratio 1.
    """
    assert not old_logp.requires_grad, "old log-probs are constants: detach them"
    log_ratio = (_at_least_float32(logp) - _at_least_float32(old_logp)).masked_fill(~mask, 0.0)
    return (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()


def clipped_surrogate(logp: Tensor, old_logp: Tensor, adv: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """PPO's pessimistic surrogate.                                               (Schulman et al. 2017, eq. 7)

        J = min( rho A, clip(rho, 1 - clip_low, 1 + clip_high) A ),   rho = e^{logp - old_logp}

    logp, old_logp [B, T] nats; adv [B, T] or [B, 1] -> [B, T]. J <= rho A everywhere. The gradient is zero exactly
    where rho has already left the band in A's favour: A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low.
    That removes the incentive to move further; it does not bound the policy. With max in place of min, the flat region would be
    where rho has left the band against A: what went too far would be pushed on, and what went wrong would not be corrected.
    """
    assert not adv.requires_grad, "advantages are constants: detach them"
    ratio = importance_ratio(logp, old_logp)
    return torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)


def clipped_away(ratio: Tensor, adv: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where the clipped surrogate has lost its gradient.                         (Schulman et al. 2017, eq. 7)

        low:  rho < 1 - clip_low and A < 0          high:  rho > 1 + clip_high and A > 0

    ratio rho [B, T]; adv [B, T] or [B, 1] -> (low, high), bool [B, T] each.
    """
    return (ratio < 1 - clip_low) & (adv < 0), (ratio > 1 + clip_high) & (adv > 0)


def truncated_surrogate(logp: Tensor, old_logp: Tensor, adv: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling with a detached weight.            (CISPO, MiniMax 2025, eq. 4-5; IMPALA's rho-bar)

        J = sg( min(rho, cap) ) A log pi

    logp, old_logp [B, T] nats; adv [B, T] or [B, 1] -> [B, T]. Nothing flows through the weight, so that every token
    keeps a gradient, min(rho, cap) A times its score, however far the policy has moved. Only J's gradient means anything.
    """
    assert not adv.requires_grad, "advantages are constants: detach them"
    return importance_ratio(logp.detach(), old_logp).clamp(max=cap) * adv * _at_least_float32(logp)


def masked_surrogate(logp: Tensor, old_logp: Tensor, adv: Tensor, low: float, high: float) -> Tensor:
    """Importance sampling that leaves out tokens whose ratio has left a band, whatever the sign of A.

        J = rho A  where low <= rho <= high,  else 0

    logp, old_logp [B, T] nats; adv [B, T] or [B, 1] -> [B, T]. Masking drops the gradient where clipping caps the value:
    a token with A < 0 and a huge ratio, which clipping lets through, is left out here. low = 0, high = inf is plain
    importance sampling.
    """
    assert not adv.requires_grad, "advantages are constants: detach them"
    ratio = importance_ratio(logp.detach(), old_logp)
    outside = (ratio < low) | (ratio > high)
    # Blank before exp(): the gradient of a huge ratio would be 0 * inf = nan.
    return importance_ratio(logp.masked_fill(outside, 0.0), old_logp.masked_fill(outside, 0.0)).masked_fill(outside, 0.0) * adv


def soft_surrogate(logp: Tensor, old_logp: Tensor, adv: Tensor, tau_positive: float = 1.0,
                   tau_negative: float = 1.05) -> Tensor:
    """A clip without an edge: a token counts the less, the further its ratio is from 1.       (SAPO, Gao et al. 2025)

        J = 4/tau sigma(tau (rho - 1)) A,   tau = tau_positive where A > 0, else tau_negative

    logp, old_logp [B, T] nats; adv [B, T] or [B, 1] -> [B, T]. With s = sigma(tau (rho - 1)), the gradient is 4 s (1 - s) times
    that of rho A: all of it at rho = 1, and less on both sides, whatever the sign of A. It falls faster where tau is larger.
    """
    assert not adv.requires_grad, "advantages are constants: detach them"
    # A ratio of e^20 has no gradient left, and that of a larger one would be 0 * inf = nan.
    ratio = importance_ratio(torch.minimum(logp, old_logp + 20), old_logp)
    tau = torch.full_like(ratio, tau_negative).masked_fill(adv > 0, tau_positive)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * adv


# ---------------------------------------------------------------------------------------------------------------------
# Preferences
# ---------------------------------------------------------------------------------------------------------------------


def log_sigmoid(x: Tensor) -> Tensor:
    """log 1/(1 + e^{-x}): the log-softmax of x against 0, finite for any finite x.       [...] -> [...]"""
    return log_softmax(torch.stack((x, torch.zeros_like(x)), dim=-1))[..., 0]


def bradley_terry(margin: Tensor) -> Tensor:
    """-log P(w > l) = -log sigma(r_w - r_l): the loss of a preference.       (Bradley and Terry 1952)

    margin r_w - r_l [...] -> [...] in nats; log 2 at a tie. Its gradient is -sigma(-margin): 1/2 at a tie, 1 where the
    order is badly wrong, 0 where it is surely right. Only the difference of rewards matters.
    """
    return -log_sigmoid(margin)


def ranked_right(margin: Tensor) -> Tensor:
    """1 where the preferred one has the higher reward, 1/2 at a tie, else 0: a coin decides ties.       [...] -> [...]"""
    return ((margin > 0).float() + (margin >= 0).float()) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Masks and weights
# ---------------------------------------------------------------------------------------------------------------------


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """sum of x where mask, whatever x holds elsewhere (0 * inf would be nan).       [...], [...] -> []"""
    return x.masked_fill(~mask, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """mean of x where mask; 0 for an empty mask.       [...], [...] -> []"""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


# A new way is a name here and a branch in token_weights: `--aggregate` and nanorl.checks read this tuple. tests/test_ops.py
# judges it by its sums and limits, `weight` in tests/test_steps.py is the naive reference of a whole step.
AGGREGATES = ("token_mean", "sequence_mean", "prompt_mean", "sequence_sum", "constant")


def token_weights(mask: Tensor, prompt_index: Tensor, how: str, max_new_tokens: int | None = None) -> Tensor:
    """How much each token counts: loss = -(weights * surrogate).sum().       mask [B, T], prompt_index [B] -> [B, T]

        token_mean     1 / N               every token of the step alike          (DAPO's code)
        sequence_mean  1 / (R |y|)         every answer alike: a token of a long answer counts less      (GRPO)
        prompt_mean    1 / (P N_p)         every prompt alike, its tokens alike          (DAPO as printed)
        sequence_sum   1 / R               the sum over an answer's tokens: the true policy gradient     (REINFORCE)
        constant       1 / (R L_max)       the same up to a constant, L_max = max_new_tokens     (Dr. GRPO)

    N tokens, R rows and P prompts with at least one True, |y| tokens of a row, N_p tokens of a prompt. Make the
    weights once for all rows of an optimizer step: then any split into micro-batches or devices adds up to the same
    gradient. A fully masked row counts nowhere. The result is float32.
    """
    if how == "constant" and max_new_tokens is None:
        raise ValueError("token_weights: how='constant' needs max_new_tokens")
    length = mask.sum(-1, keepdim=True)                                                     # [B, 1]
    rows = (length > 0).sum()
    if how == "token_mean":
        count = length.sum()
    elif how == "sequence_mean":
        count = rows * length
    elif how == "prompt_mean":
        prompts, index = prompt_index.unique(return_inverse=True)
        tokens = length.new_zeros(len(prompts)).index_add(0, index, length.squeeze(-1))     # [P]
        count = (tokens > 0).sum() * tokens[index, None]
    elif how == "sequence_sum":
        count = rows
    elif how == "constant":
        count = rows * max_new_tokens
    else:
        raise ValueError(f"token_weights: how={how!r} is none of {', '.join(AGGREGATES)}")
    return mask / count.clamp(min=1)


def cumulative_sum(x: Tensor) -> Tensor:
    """The sums of the first 1, 2, ... entries of the last dimension.       [..., n] -> [..., n]

    torch.cumsum, also under strict determinism: PyTorch lists it as having no deterministic kernel on CUDA for floats.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return x.cumsum(-1)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


# ---------------------------------------------------------------------------------------------------------------------
# The one kernel: log-probs and entropies straight from hidden states, without all logits in memory
# ---------------------------------------------------------------------------------------------------------------------


def _chunk_log_softmax(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log_softmax(hidden weight^T / temperature), and memory of its size to write into.       [n, d], [V, d] -> [n, V] twice

    The same sums as `log_softmax`, in place: of a vocabulary's width, every temporary costs as much as the product itself.
    """
    z = (hidden @ weight.T).to(dtype).div_(temperature)
    z -= z.amax(-1, keepdim=True)
    scratch = z.exp()
    z -= scratch.sum(-1, keepdim=True).log_()
    return z, scratch


def _chunk_scores(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The log-probs of ids and the entropies.       [n, d], [V, d], [n] -> [n], [n]"""
    log_p, p = _chunk_log_softmax(hidden, weight, temperature, dtype)                       # [n, V]
    entropy = -torch.exp(log_p, out=p).mul_(log_p).sum(-1)
    return log_p.gather(-1, ids[:, None]).squeeze(-1), entropy


def _chunk_gradient(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, entropy: Tensor, g_logp: Tensor,
                    g_entropy: Tensor | None) -> Tensor:
    """The gradient of the loss in hidden weight^T, from those in the log-probs and the entropies.       -> [n, V]

        d logp / dz = onehot - p          dH / dz = -p (log p + H)
    """
    log_p, p = _chunk_log_softmax(hidden, weight, temperature, entropy.dtype)
    g_logp, grad_z = g_logp[:, None], torch.exp(log_p, out=p).neg_()
    if g_entropy is None:
        grad_z *= g_logp
    else:
        grad_z *= log_p.add_(entropy[:, None]).mul_(g_entropy[:, None]).add_(g_logp)
    grad_z.scatter_add_(-1, ids[:, None], g_logp)
    return grad_z.div_(temperature).to(hidden.dtype)


@functools.cache
def _compiled(f: Callable) -> Callable:
    """For any number of rows: what follows the product becomes a pass or two over its logits."""
    return torch.compile(f, dynamic=True)


class _LinearLogProbs(torch.autograd.Function):
    """See linear_log_probs. The backward pass computes the logits again instead of keeping them."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, chunk_size, compile):
        scores, dtype = (_compiled(_chunk_scores) if compile else _chunk_scores), _at_least_float32(hidden).dtype
        weight = weight.to(hidden.dtype)        # in here, so that its gradient is not rounded to that
        logp, entropy = (hidden.new_empty(len(ids), dtype=dtype) for _ in range(2))
        for start in range(0, len(ids), chunk_size):
            rows = slice(start, start + chunk_size)
            logp[rows], entropy[rows] = scores(hidden[rows], weight, ids[rows], temperature, dtype)
        ctx.save_for_backward(hidden, weight, ids, entropy)
        ctx.temperature, ctx.chunk_size, ctx.compile = temperature, chunk_size, compile
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, ids, entropy = ctx.saved_tensors
        gradient = _compiled(_chunk_gradient) if ctx.compile else _chunk_gradient
        grad_logp = torch.zeros_like(entropy) if grad_logp is None else grad_logp
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for start in range(0, max(1, len(ids)), ctx.chunk_size):        # the gradient of no tokens is 0
            rows = slice(start, start + ctx.chunk_size)
            grad_z = gradient(hidden[rows], weight, ids[rows], ctx.temperature, entropy[rows], grad_logp[rows],
                              None if grad_entropy is None else grad_entropy[rows])
            grad_hidden[rows] = grad_z @ weight
            if ctx.needs_input_grad[1]:     # else the head is a constant, as with adapters
                part = grad_z.T @ hidden[rows]
                grad_weight = part.to(entropy.dtype) if grad_weight is None else grad_weight.add_(part)
        return grad_hidden, grad_weight, None, None, None, None


def rows_of_logits(vocab_size: int) -> int:
    """How many rows of logits to hold at a time: as many as make 8 million logits, but at least 128 and at most 1024."""
    return min(1024, max(128, 2**23 // vocab_size))


def linear_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, chunk_size: int | None = None,
                     compile: bool = False) -> tuple[Tensor, Tensor]:
    """Log-prob of `ids` and entropy, straight from hidden states: z = hidden weight^T / temperature.

        logp_n = z_{n, ids_n} - LSE(z_n)          H_n = -sum_i p_{n,i} log p_{n,i}

    hidden [N, d], weight [V, d], ids [N] -> (logp [N], entropy [N]) in nats, both differentiable in hidden and weight.
    The [N, V] logits are what fills a GPU's memory, not the model: here only [chunk_size, V] of them exist at a time,
    forward and backward, at the price of computing them twice. Any chunk size gives the same values; by default it is that of
    `rows_of_logits`. `compile` fuses what is done to them.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    chunk_size = chunk_size or rows_of_logits(len(weight))
    return _LinearLogProbs.apply(hidden, weight, ids, temperature, chunk_size, compile)
