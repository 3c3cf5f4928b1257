"""Direct preference optimisation: learn from pairs without a reward model and without sampling.

    L = 1/N sum_n f(m_n),    m = r(x, w) - r(x, l)      w the chosen response, l the rejected one, N pairs

A language model is its own reward model: RL with a KL penalty beta to a reference ends in
pi*(y|x) = ref(y|x) e^{r(x,y) / beta} / Z(x), so r = beta log(pi*/ref) + beta log Z(x), and Z cancels between two responses
to one prompt. The relatives differ in the *implicit reward* r, and in what they ask of the margin m:

    --loss    r(x, y)                     f(m)
    dpo       beta log(pi/ref)            -log sigma(m)                                 Rafailov et al. 2023, eq. 7
    cdpo      beta log(pi/ref)            -(1-e) log sigma(m) - e log sigma(-m)         Mitchell 2023; e is --label-noise
    ipo       log(pi/ref) / |y|           (m - 1/(2 beta))^2                            Azar et al. 2023, eq. 17, which has sums
    slic      log pi                      max(0, delta - m); --nll-coef 0.1             Zhao et al. 2023; c on SFT's target
    simpo     beta log(pi) / |y|          -log sigma(m - gamma)                         Meng et al. 2024, eq. 6
    kto       beta log(pi/ref)            1 - [sigma(r(w) - beta z) + sigma(beta z - r(l))] / 2    Ethayarajh et al. 2024

log pi is of the whole response and |y| its length in tokens, the stop token included. --nll-coef c adds -c log pi(w)/|w| to
any row. But for kto, only the margin is driven: the chosen response's own log-probability may fall, as long as the rejected
one's falls faster. Watch train/chosen_logp; --nll-coef holds it up. Where r is per token, Z cancels only between equal lengths.

kto judges each response alone, chosen ones as desirable and rejected ones as undesirable, lambda = 1 for both. Each compares
with the reference point z = max(0, mean log(pi/ref)), a constant: the mean is over the responses of the step, each after the
prompt of another pair.

    python train_dpo.py                                     pairs of stories, from nothing
    python train_dpo.py --refresh-reference 25 --out runs/idpo      iterative: the policy becomes its own reference
    python train_dpo.py --online --out runs/odpo            fresh pairs from the policy, judged by runs/reward
    python train_dpo.py --online --task addition --out runs/vdpo    ... judged by a verifier
    python train_dpo.py --data mine.jsonl --out runs/mine           records {"prompt", "chosen", "rejected"}
"""

import copy
import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from nanorl import run
from nanorl.batches import add_metrics, sum_over_ranks
from nanorl.data import render_records, shuffled_batch
from nanorl.heldout import before_and_after, evaluate_and_show, show_responses
from nanorl.ops import bradley_terry, ranked_right
from nanorl.pairs import PAIRS, pair_rollout, read_pairs, reference_point, split_pairs
from nanorl.rollout import collect, describe, learned_rewards
from nanorl.sample import Sampling, token_log_probs
from nanorl.tasks import default_max_new_tokens, make_task
from nanorl.view_data import watch_pairs

# What each loss uses, and its value where no flag gives one.
LOSSES = {"dpo": {"beta": 0.3, "nll_coef": 0.0},
          "cdpo": {"beta": 0.3, "nll_coef": 0.0, "label_noise": 0.1},
          "ipo": {"beta": 5.0, "nll_coef": 0.0},
          "slic": {"delta": 1.0, "nll_coef": 0.1},
          "simpo": {"beta": 10.0, "nll_coef": 0.0, "gamma": 1.0},
          "kto": {"beta": 0.3, "nll_coef": 0.0}}
REFERENCE_FREE = ("slic", "simpo")


def objective(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, weights, *, loss="dpo", beta=0.3,
              label_noise=0.1, delta=1.0, gamma=1.0, nll_coef=0.0, reference_point=0.0):
    """The loss of some pairs, and metrics that add up.       L = sum_n w_n [ f(m_n) - nll_coef log pi(w_n) / |w_n| ]

    chosen, rejected: log pi of whole responses [N]; ref_chosen, ref_rejected: the reference's; their lengths in tokens [N];
    weights [N], which add up to 1 over the whole step. reference_point: kto's z of the whole step, in nats.
    """
    assert not (ref_chosen.requires_grad or ref_rejected.requires_grad), "the reference is a constant: detach it"

    def implicit_reward(logp, ref_logp, length):
        if loss == "ipo":
            return (logp - ref_logp) / length
        if loss == "slic":
            return logp
        if loss == "simpo":
            return beta * logp / length
        return beta * (logp - ref_logp)

    reward_chosen = implicit_reward(chosen, ref_chosen, chosen_length)                      # [N]
    reward_rejected = implicit_reward(rejected, ref_rejected, rejected_length)
    margin = reward_chosen - reward_rejected
    if loss == "dpo":
        pair = bradley_terry(margin)
    elif loss == "cdpo":
        pair = (1 - label_noise) * bradley_terry(margin) + label_noise * bradley_terry(-margin)
    elif loss == "ipo":
        pair = (margin - 1 / (2 * beta)).square()
    elif loss == "slic":
        pair = torch.relu(delta - margin)
    elif loss == "kto":
        z = beta * reference_point
        pair = 1 - (torch.sigmoid(reward_chosen - z) + torch.sigmoid(z - reward_rejected)) / 2
    else:
        pair = bradley_terry(margin - gamma)
    if nll_coef:
        pair = pair - nll_coef * chosen / chosen_length
    metrics = {"loss": pair, "chosen_logp": chosen, "rejected_logp": rejected, "chosen_reward": reward_chosen,
               "rejected_reward": reward_rejected, "margin": margin, "accuracy": ranked_right(margin)}
    return (weights * pair).sum(), {f"train/{name}": (weights * x.detach()).sum() for name, x in metrics.items()}


def judged_pairs(scores):
    """Of two answers to each prompt, rows 2p and 2p+1: the better one's row and the worse one's. Ties are left out, and
    prompts of which an answer could not be scored (nan).       scores [P, 2] -> [N, 2]"""
    decided = ((scores[:, 0] != scores[:, 1]) & ~scores.isnan().any(-1)).nonzero().squeeze(-1)
    best = scores[decided].argmax(-1)
    return torch.stack((2 * decided + best, 2 * decided + 1 - best), dim=1)


@dataclass(frozen=True, kw_only=True)
class Config(run.PolicyConfig):
    out: str = "runs/dpo"
    steps: run.Count = 100
    lr: run.Positive = 2e-4
    eval_every: run.Count = 25

    # pairs
    data: str = ""              # JSONL records {"prompt", "chosen", "rejected"} (default: data/preferences.jsonl)
    skip_long: bool = False     # leave out records that do not fit the model's context
    batch: run.Count = 32       # pairs per step
    micro_batch: run.Count = 32  # pairs, of two rows each, in memory at a time
    online: bool = False        # sample fresh pairs from the policy instead of reading them
    judge: Literal["hidden", "model", "verifier"] | None = None    # online: who prefers (default: model or verifier)
    reward_model: str = ""      # a run of train_reward.py: judges with --judge model (default: runs/reward), else only logged
    task: str = "stories"       # stories, or with --online also addition, sums, sorting, reversal, countdown or code
    max_new_tokens: run.Count | None = None    # an answer longer than this is truncated (default: 80; code 120; stories 140)
    temperature: run.Positive = 1.0    # of the policy: sampled with it, scored with it
    eval_problems: run.Count = 200    # held-out prompts to answer (not with --data)
    keep_groups: run.Natural = 4    # pairs kept in rollouts.jsonl, in steps with an evaluation and the last; 0 is off
    best_of: run.Natural = 16   # answers per held-out prompt for best-of-n before training, to compare with; 0 is off

    # the algorithm
    loss: Literal[*LOSSES] = "dpo"    # a row of the table above
    beta: run.Positive | None = None    # implicit reward per nat (default: 0.3; simpo 10); ipo: 1/(2 beta) is its margin (5)
    label_noise: run.Share | None = None    # cdpo: how often a label is taken to be wrong (default: 0.1)
    delta: run.NonNegative | None = None    # slic: the margin to reach, in nats (default: 1)
    gamma: run.NonNegative | None = None    # simpo: the margin to reach (default: 1)
    nll_coef: run.NonNegative | None = None    # weight of the chosen response's loss per token (default: 0; slic 0.1)
    refresh_reference: run.Count | None = None    # every so many steps the policy becomes the reference (default: never)

    def __post_init__(self):
        """Fill the flags that were not given from the loss's row, and refuse those that contradict each other."""
        super().__post_init__()
        for flag in ("beta", "label_noise", "delta", "gamma", "nll_coef"):
            if flag in LOSSES[self.loss]:
                self.default(flag, LOSSES[self.loss][flag])
            self.require(flag in LOSSES[self.loss] or getattr(self, flag) is None, f"loss {flag}", "that loss does not use it")
        self.require(not self.refresh_reference or self.loss not in REFERENCE_FREE, "loss refresh_reference",
                     "that loss has no reference")
        task = make_task(self.task, needs_verifier=False)
        self.require(task.max_actions == 1, "task", "has turns, pairs are of single answers; use train_grpo.py or train_ppo.py")
        self.require(self.online or not task.verifiable, "task", "has no pairs to read; requires --online, or expected stories")
        self.require(self.online or self.judge is None, "judge", "pairs from a file are judged already; requires --online")
        self.require(not (self.online and self.data), "data", "with --online, pairs are sampled; leave one of the two out")
        self.require(not (self.data and self.reward_model), "reward_model", "it knows stories; leave it out with --data")
        self.require(self.loss != "kto" or self.batch > 1, "loss batch", "z needs another pair's prompt; expected 2 or more")
        if self.online:
            self.default("judge", "verifier" if task.verifiable else "model")
            self.require((self.judge == "verifier") == task.verifiable, "judge",
                         f"expected {'verifier' if task.verifiable else 'hidden or model'} with --task {self.task}")
        self.default("max_new_tokens", default_max_new_tokens(self.task))


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    task = run.choose_task(cfg.task, needs_verifier=False)
    records = [] if cfg.online else read_pairs(cfg.data)
    reward_model = cfg.reward_model if cfg.reward_model or cfg.judge == "model" else None
    device, checkpoint, tokenizer, policy, initial_policy, reward_model = run.begin(
        cfg, "sft", task=None if cfg.data else task, reference=True, reward_model=reward_model)
    records, prompts, chosen, rejected = render_records(
        records, tokenizer, policy.config.context, cfg.data or PAIRS, "chosen", "rejected",
        reserve=cfg.max_new_tokens if cfg.data else 0, skip_long=cfg.skip_long)
    training, heldout, identical = split_pairs(records, cfg.data) if records else ([], [], 0)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    reference = copy.deepcopy(initial_policy) if cfg.refresh_reference else initial_policy
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer, data=records or task.examples(), initial_policy=initial_policy,
                  refreshed_reference=reference if cfg.refresh_reference else None, reward_model=reward_model)
    del checkpoint
    compiled = run.compile_models(cfg, device, *{policy, initial_policy, reference})
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, slots=32 * cfg.micro_batch, compile=compiled)
    loss = functools.partial(objective, loss=cfg.loss, beta=cfg.beta, label_noise=cfg.label_noise, delta=cfg.delta,
                             gamma=cfg.gamma, nll_coef=cfg.nll_coef)
    source = f"fresh pairs, judge: {cfg.judge}" if cfg.online else f"{len(training):,} pairs of {cfg.data or str(task)}"
    print(f"{cfg.loss} on {source}, {cfg.batch} a step, on {device.type}."
          + (f" {len(heldout):,} are held out; {identical} more have equal responses and are left out." if records else ""))

    def score(model, rollout, rows):
        """log pi and entropy at the tokens of these responses, and which tokens they are: three of [R, T-1]."""
        T = int(rollout.lengths[rows].max())
        mask = rollout.mask[rows, : T - 1]
        with run.autocast(device, cfg.dtype):
            return *token_log_probs(model, rollout.tokens[rows, :T], mask, temperature=cfg.temperature), mask

    @torch.no_grad()
    def reference_log_probs(model, rollout, pairs):
        """A reference's log pi of the chosen and rejected responses, [N, 2]; zeros where the loss has no reference."""
        if cfg.loss in REFERENCE_FREE:
            return torch.zeros(pairs.shape, device=device)
        return score(model, rollout, pairs.T.flatten())[0].sum(-1).view(2, -1).T

    def from_file(picks):
        """These pairs of the file as a rollout, and the rows of their chosen and rejected responses, [N, 2]."""
        return [x.to(device) for x in pair_rollout(prompts, chosen, rejected, picks, tokenizer.pad)]

    # The initial policy's log-probs of the pairs that are compared with it: with --refresh-reference, the held-out ones.
    reference_cache = torch.zeros(len(records), 2, device=device)
    parts = run.ranks.parts(heldout if cfg.refresh_reference else training + heldout, cfg.micro_batch)
    for picks in tqdm(parts, "scoring pairs", delay=1, leave=False, disable=cfg.quiet or run.ranks.rank() > 0):
        reference_cache[picks] = reference_log_probs(initial_policy, *from_file(picks))
    reference_cache = run.ranks.summed(reference_cache)

    def kto_z(rollout, pairs, ref_model):
        """The reference point of kto on these pairs."""
        def log_ratio(rollout):
            logp, ref_logp = (score(model, rollout, slice(None))[0].sum(-1) for model in (policy, ref_model))
            return logp - ref_logp

        return reference_point(log_ratio, rollout, pairs, policy.config.context, 2 * cfg.micro_batch)

    def pair_loss(rollout, pairs, references, count, z, watched=None):
        """Loss and metrics of a few of `count` pairs."""
        rows = pairs.T.flatten()                                    # the chosen, then the rejected ones
        logp, entropy, mask = score(policy, rollout, rows)
        sums = *logp.sum(-1).chunk(2), *references.unbind(1), *mask.sum(-1).chunk(2)            # six of [N]
        if watched:
            watched.add(0, rows, logp, entropy, mask=mask,
                        alone=lambda k: loss(*(x[k : k + 1] for x in sums), logp.new_ones(1), reference_point=z)[1])
        return loss(*sums, torch.full_like(sums[0], 1 / count), reference_point=z)

    def evaluate_now():
        metrics, totals = {}, {}
        if cfg.data:
            show_responses(out, [records[i]["prompt"] for i in (heldout or training)[:4]])
        else:
            metrics = evaluate_and_show(out, task, sampling, reference=initial_policy, reward_model=reward_model)
        z = kto_z(*from_file(heldout), initial_policy) if cfg.loss == "kto" and heldout else 0.0
        with torch.no_grad():
            for picks in run.ranks.parts(heldout, cfg.micro_batch):
                add_metrics(totals, pair_loss(*from_file(picks), reference_cache[picks], len(heldout), z)[1])
        totals = sum_over_ranks(totals)
        return metrics | {f"eval/pair_{name}": totals[f"train/{name}"] for name in ("loss", "accuracy") if totals}

    for step in out.steps():
        # 2. Evaluate: what does it write by now, and how does it rank held-out pairs?
        if step % cfg.eval_every == 0:
            out.log(evaluate_now())
        out.refresh("refreshed_reference", cfg.refresh_reference)

        # 3. Pairs [N, 2]: the next of the file, or two fresh answers to each prompt, of which a judge prefers one.
        started = time.perf_counter()
        if cfg.online:
            with run.autocast(device, cfg.dtype):
                fresh = collect(policy, tokenizer, task, sampling, prompts=cfg.batch, samples=2,
                                seed=run.derive(cfg.seed, "rollout", step))
                rollout, scores = fresh.rollout, fresh.rewards
                if cfg.judge == "model":
                    scores = learned_rewards(reward_model, rollout, cfg.micro_batch).view(-1, 2)
                    run.check_finite(scores, "a reward of the model")
            pairs = judged_pairs(scores).to(device)
            out.log(describe(fresh, "rollout"))
            out.log({"rollout/ties": 1 - len(pairs) / cfg.batch, "time/rollout_s": time.perf_counter() - started})
        else:
            picks = torch.tensor([training[i] for i in shuffled_batch(len(training), cfg.batch, step, cfg.seed)])
            (rollout, pairs), scores = from_file(picks), None
        watched = watch_pairs(out, rollout, pairs, scores)          # for nanorl.view: a few, in a few steps

        # 4. Update. Both responses of a pair stay together; micro-batches add up to the step.
        started, totals = time.perf_counter(), {}
        z = kto_z(rollout, pairs, reference) if cfg.loss == "kto" else 0.0
        for part in run.ranks.parts(pairs, cfg.micro_batch):
            if cfg.online or cfg.refresh_reference:
                references = reference_log_probs(reference, rollout, part)
            else:
                references = reference_cache[picks[part[:, 0].cpu()]]      # the chosen rows come first: row n is pair n
            micro_loss, metrics = pair_loss(rollout, part, references, len(pairs), z, watched)
            micro_loss.backward()
            add_metrics(totals, metrics)
        totals = sum_over_ranks(totals)
        lr = cfg.lr * out.schedule(warmup=0.1)
        if totals:
            totals["train/grad_norm"] = optimizer.step(lr, grad_clip=1.0)
        watched.write()

        # 5. Log.
        out.log(totals | ({"train/reference_point": z} if cfg.loss == "kto" else {})
                | {"train/lr": lr, "time/update_s": time.perf_counter() - started},
                show=("train/loss", "train/accuracy", "train/chosen_logp"))

    # 6. Held-out prompts and pairs, before and after.
    out.finish(evaluate_now())
    print(before_and_after(out) + f"\nSaved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
