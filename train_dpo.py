"""Direct preference optimisation: learn from pairs without a reward model and without sampling.

    L = 1/N sum_n f(m_n),    m = r(x, w) - r(x, l)      w the chosen response, l the rejected one, N pairs

A language model is its own reward model: RL with a KL penalty beta to a reference ends in
pi*(y|x) = ref(y|x) e^{r(x,y) / beta} / Z(x), so r = beta log(pi*/ref) + beta log Z(x), and Z cancels between two responses
to one prompt. The relatives differ in the *implicit reward* r, and in what they ask of the margin m:

    --loss    r(x, y)                     f(m)
    dpo       beta log(pi/ref)            -log sigma(m)                                 Rafailov et al. 2023, eq. 7
    cdpo      beta log(pi/ref)            -(1-e) log sigma(m) - e log sigma(-m)         Mitchell 2023; e is --label-noise
    ipo       log(pi/ref) / |y|           (m - 1/(2 beta))^2                            Azar et al. 2023, eq. 17, there of sums
    slic      log pi                      max(0, delta - m); --nll-coef 0.1             Zhao et al. 2023, there of SFT's target
    simpo     beta log(pi) / |y|          -log sigma(m - gamma)                         Meng et al. 2024, eq. 6

log pi is of the whole response and |y| its length in tokens, the stop token included. --nll-coef c adds -c log pi(w)/|w| to
any row. Only the margin is driven: the chosen response's own log-probability may fall, as long as the rejected one's falls
faster. Watch train/chosen_logp; --nll-coef holds it up. Where r is per token, Z cancels only between equal lengths.

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

import train_reward
import train_sft
from nanorl import ranks, run
from nanorl.data import pair_batch, response_mask, shuffled_batch
from nanorl.ops import bradley_terry, ranked_right
from nanorl.rollout import (
    Room,
    add_up,
    before_and_after,
    check_room,
    choose_task,
    collect,
    describe,
    evaluate,
    learned_rewards,
    load_reward_model,
    of_all_ranks,
    show_answers,
)
from nanorl.sample import token_log_probs
from nanorl.search import best_of_n_curve
from nanorl.tasks import default_max_new_tokens, make_task

# What each loss looks at, and its value where no flag gives one.
LOSSES = {"dpo": {"beta": 0.3, "nll_coef": 0.0},
          "cdpo": {"beta": 0.3, "nll_coef": 0.0, "label_noise": 0.1},
          "ipo": {"beta": 5.0, "nll_coef": 0.0},
          "slic": {"delta": 1.0, "nll_coef": 0.1},
          "simpo": {"beta": 10.0, "nll_coef": 0.0, "gamma": 1.0}}
REFERENCE_FREE = ("slic", "simpo")


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = "runs/dpo"
    steps: run.Count = 100
    lr: run.Positive = 2e-4
    eval_every: run.Count = 25

    data: str = ""              # JSONL records {"prompt", "chosen", "rejected"} (default: data/preferences.jsonl)
    batch: run.Count = 32       # pairs per step
    micro_batch: run.Count = 32  # pairs in memory at a time
    sample_rows: run.Count = 1024    # answers sampled at a time, but at least all of one prompt; the others wait
    warmup: run.Share = 0.1     # of the steps: the learning rate rises
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm

    loss: Literal[*LOSSES] = "dpo"    # a row of the table above
    beta: run.Positive | None = None    # implicit reward per nat (default: 0.3; simpo 10); ipo: 1/(2 beta) is its margin (5)
    label_noise: run.Share | None = None    # cdpo: how often a label is taken to be wrong (default: 0.1)
    delta: run.NonNegative | None = None    # slic: the margin to reach, in nats (default: 1)
    gamma: run.NonNegative | None = None    # simpo: the margin to reach (default: 1)
    nll_coef: run.NonNegative | None = None    # weight of the chosen response's loss per token (default: 0; slic 0.1)
    refresh_reference: run.Count | None = None    # every so many steps the policy becomes the reference (default: never)

    online: bool = False        # sample fresh pairs from the policy instead of reading them
    judge: Literal["hidden", "model", "verifier"] | None = None    # online: who prefers (default: model or verifier)
    reward_model: str = ""      # a run of train_reward.py: judges with --judge model (default: runs/reward), else only logged
    task: str = "stories"       # stories, or with --online also addition, sums, sorting, reversal, countdown or code
    max_new_tokens: run.Count | None = None    # an answer longer than this is cut (default: 80; code 120; stories 140)
    temperature: run.Positive = 1.0    # of the policy: sampled with it, scored with it
    eval_problems: run.Count = 200    # held-out prompts to answer (not with --data)
    best_of: run.Natural = 16   # answers to each of them for best-of-n before training, to compare with; 0 is off

    def __post_init__(self):
        """Fill what was left open from the loss's row, and refuse what contradicts itself."""
        for flag in ("beta", "label_noise", "delta", "gamma", "nll_coef"):
            if flag in LOSSES[self.loss]:
                self.default(flag, LOSSES[self.loss][flag])
            self.expect(flag in LOSSES[self.loss] or getattr(self, flag) is None, f"loss {flag}",
                        "that loss does not look at it")
        self.expect(not self.refresh_reference or self.loss not in REFERENCE_FREE, "loss refresh_reference",
                    "that loss has no reference")
        verifiable = make_task(self.task, needs_verifier=False).verifiable
        self.expect(self.online or not verifiable, "task", "it has no pairs to read; expected --online beside it, or stories")
        self.expect(self.online or self.judge is None, "judge",
                    "pairs from a file are judged already; expected --online beside it")
        self.expect(not (self.online and self.data), "data", "with --online, pairs are sampled; leave one of the two out")
        self.expect(not (self.data and self.reward_model), "reward_model", "it knows stories; leave it out with --data")
        if self.online:
            self.default("judge", "verifier" if verifiable else "model")
            self.expect((self.judge == "verifier") == verifiable, "judge",
                        f"expected {'verifier' if verifiable else 'hidden or model'} with --task {self.task}")
        self.default("max_new_tokens", default_max_new_tokens(self.task))


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


def objective(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, weights, *, loss="dpo", beta=0.3,
              label_noise=0.1, delta=1.0, gamma=1.0, nll_coef=0.0):
    """The loss of some pairs, and metrics that add up.       L = sum_n w_n [ f(m_n) - nll_coef log pi(w_n) / |w_n| ]

    chosen, rejected: log pi of whole responses [N]; ref_chosen, ref_rejected: the reference's; their lengths in tokens [N];
    weights [N], which add up to 1 over the whole step.
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
    else:
        pair = bradley_terry(margin - gamma)
    if nll_coef:
        pair = pair - nll_coef * chosen / chosen_length
    metrics = {"loss": pair, "chosen_logp": chosen, "rejected_logp": rejected, "chosen_reward": reward_chosen,
               "rejected_reward": reward_rejected, "margin": margin, "accuracy": ranked_right(margin)}
    return (weights * pair).sum(), {f"train/{name}": (weights * x.detach()).sum() for name, x in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def judged_pairs(scores):
    """Of two answers to each prompt, rows 2p and 2p+1: the rows of the better and of the worse ones. Ties are left out.

    scores [P, 2] -> [N], [N]
    """
    decided = (scores[:, 0] != scores[:, 1]).nonzero().squeeze(-1)
    best = scores[decided].argmax(-1)
    return 2 * decided + best, 2 * decided + 1 - best


@run.says_why_it_stopped
def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        task = choose_task(cfg.task, "", needs_verifier=False)
        records, training, heldout, identical = [], [], [], 0
        if not cfg.online:
            records, training, heldout, identical = train_reward.read_pairs(cfg.data)
        if cfg.init:
            run.load_checkpoint(cfg.init, "policy")
        if cfg.reward_model:
            run.load_checkpoint(cfg.reward_model, "reward model")
    init = cfg.init or run.ensure_stage(train_sft, out=run.stage_dir("sft", cfg.task), **run.same(cfg, "task"))
    reward_path = cfg.reward_model
    if cfg.judge == "model" and not reward_path:
        reward_path = run.ensure_stage(train_reward, out="runs/reward", **run.same(cfg))
    with run.user_errors():
        initial = run.load_checkpoint(init, "policy")
        tokenizer = run.tokenizer_from(initial)
        policy = run.model_from(checkpoint or initial, device)
        start = run.model_from(initial, device).requires_grad_(False)
        reward_model = load_reward_model(reward_path, tokenizer, device) if reward_path else None
        prompts, chosen, rejected = train_reward.render_pairs(records, tokenizer, policy.config.context, cfg.data)
        asked = prompts if cfg.data else [tokenizer.render(problem.prompt) for problem in task.examples()]
        for model in filter(None, (policy, reward_model)):
            check_room(model, asked, cfg.max_new_tokens)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer)
    with run.user_errors():
        out.started_from(initial_policy=start, reward_model=reward_model)
    reference = start
    if cfg.refresh_reference:
        reference = copy.deepcopy(start)
        if "reference" in out.state:
            reference.load_state_dict(out.state["reference"])
    del initial, checkpoint
    compiled = run.prepare(cfg, device, *{policy, start, reference})
    sampling = dict(slots=cfg.sample_rows, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, compile=compiled)
    loss = functools.partial(objective, **{flag: getattr(cfg, flag) for flag in ("loss", *LOSSES[cfg.loss])})
    source = f"fresh pairs, judged by the {cfg.judge}" if cfg.online else f"{len(training):,} pairs of {cfg.data or task.name}"
    print(f"{cfg.loss} on {source}, {cfg.batch} a step, on {device.type}."
          + (f" {len(heldout):,} are held out; {identical} more have equal responses and are left out." if records else ""))

    def log_probs(model, tokens, prompt_lengths, lengths):
        """log pi of N chosen responses, of the N rejected ones behind them, and their lengths: four of [N]."""
        mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
        with run.autocast(device, cfg.dtype):
            logp, _ = token_log_probs(model, tokens, mask, temperature=cfg.temperature)
        return *logp.sum(-1).chunk(2), *mask.sum(-1).chunk(2)

    @torch.no_grad()
    def ask(model, batch):
        """The batch with a reference's log-probs of its responses behind it; zeros where the loss has no reference."""
        if cfg.loss in REFERENCE_FREE:
            return *batch, *torch.zeros(len(batch[-1]), device=device).chunk(2)
        return *batch, *log_probs(model, *batch)[:2]

    def from_file(picks):
        """Pairs of the file, `micro_batch` at a time, and which they are."""
        for i in range(0, len(picks), cfg.micro_batch):
            part = picks[i : i + cfg.micro_batch]
            yield [x.to(device) for x in pair_batch(prompts, chosen, rejected, part, tokenizer.pad)], part

    # The initial policy never changes: it is asked once about every pair that is compared with it.        [pairs, 2]
    fixed = torch.zeros(len(records), 2, device=device)
    for batch, part in from_file(heldout if cfg.refresh_reference else training + heldout):
        fixed[part] = torch.stack(ask(start, batch)[3:], dim=1)

    def pair_loss(tokens, prompt_lengths, lengths, ref_chosen, ref_rejected, count):
        """Loss and metrics of a few of `count` pairs."""
        better, worse, *response_lengths = log_probs(policy, tokens, prompt_lengths, lengths)
        return loss(better, worse, ref_chosen, ref_rejected, *response_lengths, torch.full_like(better, 1 / count))

    def look():
        metrics, totals = {}, {}
        with run.autocast(device, cfg.dtype):
            if cfg.data:
                train_sft.show_responses(out, policy, tokenizer, (heldout or training)[:4], records, prompts, cfg)
            else:
                metrics, experience = evaluate(policy, tokenizer, task, problems=cfg.eval_problems, seed=cfg.seed,
                                               reference=start, reward_model=reward_model,
                                               room=Room(cfg.micro_batch), **sampling)
                show_answers(out, experience)
                if cfg.best_of and out.step == 0:
                    curve = best_of_n_curve(policy, tokenizer, task, samples=cfg.best_of, problems=cfg.eval_problems,
                                            seed=cfg.seed, reward_model=reward_model, **sampling)
                    metrics["eval/best_of_n"] = curve[cfg.best_of]
        with torch.no_grad():
            for batch, part in from_file(heldout):
                add_up(totals, pair_loss(*batch, *fixed[part].unbind(1), len(heldout))[1])
        return metrics | {f"eval/pair_{name}": totals[f"train/{name}"] for name in ("loss", "accuracy") if totals}

    for step in out.steps():
        # 2. Look at what it writes by now, and how it ranks held-out pairs.
        if step % cfg.eval_every == 0:
            out.log(look())
        if cfg.refresh_reference and step and step % cfg.refresh_reference == 0:
            reference.load_state_dict(policy.state_dict())
            out.state["reference"] = reference.state_dict()

        # 3. Pairs: the next of the file, or two fresh answers to each prompt, of which a judge prefers one.
        started, count = time.perf_counter(), cfg.batch
        if cfg.online:
            with run.autocast(device, cfg.dtype):
                fresh = collect(policy, tokenizer, task, prompts=cfg.batch, samples=2,
                                seed=run.derive(cfg.seed, "rollout", step), **sampling)
                rollout, scores = fresh.rollout, fresh.rewards
                if cfg.judge == "model":
                    scores = learned_rewards(reward_model, rollout, Room(cfg.micro_batch)).view(-1, 2)
            better, worse = (rows.to(device) for rows in judged_pairs(scores))
            count = len(better)
            mine = (ranks.parts(rows, cfg.micro_batch) for rows in (better, worse))
            parts = [torch.cat(rows) for rows in zip(*mine, strict=True)]
            batches = (ask(reference, (rollout.tokens[rows], rollout.prompt_lengths[rows], rollout.lengths[rows]))
                       for rows in parts)
            out.log({f"rollout/{name}": value for name, value in describe(fresh).items()})
            out.log({"rollout/ties": 1 - count / cfg.batch, "rollout/tokens": int(rollout.mask.sum()),
                     "time/rollout_s": time.perf_counter() - started})
            started = time.perf_counter()
        else:
            picks = [training[i] for i in shuffled_batch(len(training), cfg.batch, step, cfg.seed)]
            batches = (ask(reference, batch) if cfg.refresh_reference else (*batch, *fixed[part].unbind(1))
                       for batch, part in from_file(ranks.share(picks)))

        # 4. Update. Both responses of a pair stay together; micro-batches add up to the step.
        totals = {}
        for batch in batches:
            micro_loss, metrics = pair_loss(*batch, count)
            micro_loss.backward()
            add_up(totals, metrics)
        totals = of_all_ranks(totals)
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup)
        if totals:
            totals["train/grad_norm"] = optimizer.step(lr, cfg.grad_clip)

        # 5. Log.
        out.log(totals | {"train/lr": lr, "time/update_s": time.perf_counter() - started},
                show={name: f"{totals[f'train/{name}']:.2f}" for name in ("loss", "accuracy", "chosen_logp") if totals})

    # 6. What it was good for.
    final = look()
    out.finish(final)
    print(before_and_after("held out", out.metrics()[0], final) + f"\nSaved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
