"""Direct preference optimisation: learn from pairs without a reward model and without sampling.

    L = 1/N sum_n f(m_n),    m = r(x, w) - r(x, l)      w the chosen response, l the rejected one, N pairs

A language model is its own reward model: RL with a KL leash to a reference ends in pi*(y|x) = ref(y|x) e^{r(x,y)/beta} / Z(x),
so r = beta log(pi/ref) + beta log Z, and Z cancels between two responses to one prompt. The relatives differ in the
*implicit reward* r and in f:

    --loss    r(x, y)                       f(m)
    dpo       beta log(pi/ref)              -log sigma(m)                                   Rafailov et al. 2023, eq. 7
    cdpo      beta log(pi/ref)              -(1-e) log sigma(m) - e log sigma(-m)           Mitchell 2023; e: --label-noise
    ipo       log(pi/ref) / |y|             (m - 1/(2 beta))^2                              Azar et al. 2023, eq. 17, per token
    slic      log pi                        max(0, delta - m) - lambda log pi(w) / |w|      Zhao et al. 2023, eq. 3
    simpo     beta log(pi) / |y|            -log sigma(m - gamma)                           Meng et al. 2024, eq. 6

    python train_dpo.py                                     pairs of stories, from nothing
    python train_dpo.py --refresh-reference 30 --out runs/idpo      iterative: the policy becomes its own reference
    python train_dpo.py --online --judge model --out runs/odpo      fresh pairs from the policy, judged by runs/reward
    python train_dpo.py --online --judge verifier --task addition --out runs/vdpo
    python train_dpo.py --data mine.jsonl --out runs/mine           records {"prompt", "chosen", "rejected"}

Only the margin is driven. The chosen response's own log-probability may fall, as long as the rejected one's falls faster:
watch train/chosen_logp. --nll-coef holds it up.
"""

import copy
import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch

import train_reward
import train_sft
from nanorl import run
from nanorl.data import pair_batch, read_pairs, response_mask, shuffled_batch
from nanorl.ops import bradley_terry, ranked_right
from nanorl.rollout import (
    add_up,
    before_and_after,
    check_room,
    collect,
    describe,
    evaluate,
    judge,
    show_answers,
)
from nanorl.sample import token_log_probs
from nanorl.search import best_of
from nanorl.tasks import TASKS, Task, answer_room, make_task

TOY = train_reward.TOY
# What each loss looks at, and its value where no flag gives one.
LOSSES = {"dpo": {"beta": 0.3}, "cdpo": {"beta": 0.3, "label_noise": 0.1}, "ipo": {"beta": 5.0},
          "slic": {"delta": 1.0, "nll_coef": 0.1}, "simpo": {"beta": 10.0, "gamma": 1.0}}
REFERENCE_FREE = ("slic", "simpo")


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = "runs/dpo"
    steps: run.Count = 100
    lr: run.Positive = 3e-4
    eval_every: run.Count = 25

    data: str = TOY             # JSONL records {"prompt", "chosen", "rejected"}
    batch: run.Count = 32       # pairs per step
    micro_batch: run.Count = 32  # pairs in memory at a time
    warmup: run.Share = 0.1     # of the steps: the learning rate rises
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm

    loss: Literal[*LOSSES] = "dpo"    # a row of the table above
    beta: run.Positive | None = None    # the leash: nats that a point of reward is worth (not in slic)
    label_noise: run.Share | None = None    # cdpo: how often a label is taken to be wrong
    delta: run.NonNegative | None = None    # slic: the margin to reach, in nats
    gamma: run.NonNegative | None = None    # simpo: the margin to reach
    nll_coef: run.NonNegative | None = None    # weight of the chosen response's loss per token, lambda (default: 0; slic 0.1)
    refresh_reference: run.Count | None = None    # steps after which the policy becomes the reference

    online: bool = False        # sample fresh pairs from the policy instead of reading them
    judge: Literal["hidden", "model", "verifier"] | None = None    # online: what prefers one of two (default: model; verifier)
    reward_model: str = ""      # a run of train_reward.py, to judge or to watch (default, with --judge model: runs/reward)
    task: str = "stories"       # whose prompts are answered, online and in the evaluation
    max_new_tokens: run.Count | None = None    # an answer longer than this is cut (default: 80; stories 140)
    temperature: run.Positive = 1.0    # of the policy: sampled with it, scored with it
    eval_problems: run.Count = 200    # held-out prompts
    best_of: run.Natural = 16   # answers per prompt for best-of-n before training, to compare with; 0 is off

    def __post_init__(self):
        """Fill what was left open from the loss's row, and refuse what contradicts itself."""
        def expect(holds, flag, sentence):
            if not holds:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: {sentence}")

        own = {"nll_coef": 0.0} | LOSSES[self.loss]
        for flag in ("beta", "label_noise", "delta", "gamma", "nll_coef"):
            if flag in own and getattr(self, flag) is None:
                object.__setattr__(self, flag, own[flag])
            expect(flag in own or getattr(self, flag) is None, flag, f"--loss {self.loss} does not look at it")
        expect(not self.refresh_reference or self.loss not in REFERENCE_FREE, "refresh_reference",
               f"--loss {self.loss} has no reference")
        expect(self.online or self.judge is None, "judge", "expected --online beside it; pairs from a file are judged already")
        expect(not self.online or self.data == TOY, "data", "with --online, pairs are sampled; leave one of the two out")
        verifiable = TASKS.get(self.task, Task).verifiable
        if self.online and self.judge is None:
            object.__setattr__(self, "judge", "verifier" if verifiable else "model")
        expect(self.judge is None or (self.judge == "verifier") == verifiable, "judge",
               f"expected {'verifier' if verifiable else 'hidden or model'} with --task {self.task}")
        expect(self.online or not verifiable, "task", "it has no pairs to read; expected stories, or --online beside it")
        object.__setattr__(self, "max_new_tokens", self.max_new_tokens or answer_room(self.task))


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


def objective(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, weights, *, loss="dpo", beta=0.1,
              label_noise=0.0, delta=1.0, gamma=1.0, nll_coef=0.0):
    """The loss of some pairs, and metrics that add up.       L = sum_n w_n [ f(m_n) - nll_coef log pi(w_n) / |w_n| ]

    chosen, rejected: log pi of whole responses [N], and the reference's; their lengths in tokens [N]; weights [N], which
    add up to 1 over the whole step. log 2 where policy and reference agree, for dpo and cdpo.
    """
    assert not (ref_chosen.requires_grad or ref_rejected.requires_grad), "the reference is a constant: detach it"

    def implicit_reward(logp, ref_logp, length):
        return {"dpo": lambda: beta * (logp - ref_logp), "cdpo": lambda: beta * (logp - ref_logp),
                "ipo": lambda: (logp - ref_logp) / length, "slic": lambda: logp, "simpo": lambda: beta * logp / length}[loss]()

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
    total = (weights * pair).sum()
    means = {"loss": pair, "chosen_logp": chosen, "rejected_logp": rejected, "chosen_reward": reward_chosen,
             "rejected_reward": reward_rejected, "margin": margin, "accuracy": ranked_right(margin)}
    return total, {f"train/{name}": (weights * x.detach()).sum() for name, x in means.items()}


def loss_of(cfg):
    """`objective` with the flags of a run."""
    flags = {"loss": cfg.loss, **{flag: getattr(cfg, flag) for flag in {"nll_coef": 0.0} | LOSSES[cfg.loss]}}
    return functools.partial(objective, **flags)


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def response_log_probs(model, tokens, prompt_lengths, lengths, temperature=1.0):
    """log pi of whole responses and their lengths, the stop token included.       [B, T], [B], [B] -> [B], [B]"""
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
    logp, _ = token_log_probs(model, tokens, mask, temperature=temperature)
    return logp.sum(-1), mask.sum(-1)


def judged_pairs(rollout, scores):
    """The two answers to each prompt as a pair, the better one first; ties are left out, and counted.

    scores [P, 2] -> (tokens [2N, T], prompt_lengths [2N], lengths [2N]), ties
    """
    decided = (scores[:, 0] != scores[:, 1]).nonzero().squeeze(-1).to(rollout.tokens.device)
    better = scores.argmax(-1).to(rollout.tokens.device)[decided]
    rows = torch.cat((2 * decided + better, 2 * decided + 1 - better))
    return (rollout.tokens[rows], rollout.prompt_lengths[rows], rollout.lengths[rows]), len(scores) - len(decided)


def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    toy = cfg.online or cfg.data == TOY
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        task = make_task(cfg.task, verifiable=False)
        records, identical = ([], 0) if cfg.online else read_pairs(cfg.data)
        training, heldout = ([], []) if cfg.online else train_sft.split(records, cfg.data)
        if cfg.reward_model:
            run.load_checkpoint(cfg.reward_model)
    init = cfg.init or run.ensure_stage(train_sft, out=run.stage_dir("sft", cfg.task, 0), task=cfg.task, **run.same(cfg))
    reward_path = cfg.reward_model
    if cfg.judge == "model" and not reward_path:
        reward_path = run.ensure_stage(train_reward, out="runs/reward", **run.same(cfg))
    with run.user_errors():
        initial = run.load_checkpoint(init)
        tokenizer = run.tokenizer_from(initial)
        policy = run.model_from(checkpoint or initial, device)
        start = run.model_from(initial, device).requires_grad_(False)
        reward_model = None
        if reward_path:
            reward_model = run.scalar_model_from(run.load_checkpoint(reward_path), device).requires_grad_(False)
        prompts, chosen = train_sft.render(records, tokenizer, policy.config.context, cfg.data, "chosen")
        _, rejected = train_sft.render(records, tokenizer, policy.config.context, cfg.data, "rejected")
        asked = [tokenizer.render(problem.prompt) for problem in task.examples()] if toy else prompts
        check_room(policy, asked, cfg.max_new_tokens)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer)
    reference = start
    if cfg.refresh_reference:
        reference = copy.deepcopy(start)
        if "reference" in out.state:
            reference.load_state_dict(out.state["reference"])
    del initial, checkpoint
    compiled = run.wants_compile(cfg, device)
    if compiled:
        for model in (policy, start, reference):
            run.compile_blocks(model)
    loss = loss_of(cfg)
    sampling = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, compile=compiled)
    source = f"fresh pairs, judged by {cfg.judge}" if cfg.online else f"{len(training):,} pairs of {cfg.data}"
    print(f"{cfg.loss} on {source}, {cfg.batch} a step, on {device.type}."
          + (f" {len(heldout):,} are held out; {identical} more have equal responses and are left out." if records else ""))

    def score(model, batch):
        """log pi of the N chosen responses, then of the rejected ones, and their lengths: four of [N]."""
        with run.autocast(device, cfg.dtype):
            logp, length = response_log_probs(model, *(x.to(device) for x in batch), cfg.temperature)
        return *logp.chunk(2), *length.chunk(2)

    def from_file(picks):
        """Pairs of the file, `micro_batch` at a time.       -> [(batch, which pairs)]"""
        parts = [picks[i : i + cfg.micro_batch] for i in range(0, len(picks), cfg.micro_batch)]
        return [(pair_batch(prompts, chosen, rejected, part, tokenizer.pad), part) for part in parts]

    # The file's responses under a reference that never changes are scored once: [pairs, 2].
    fixed = torch.zeros(len(records), 2, device=device)
    precomputed = bool(records) and not cfg.refresh_reference and cfg.loss not in REFERENCE_FREE
    if precomputed:
        with torch.no_grad():
            for batch, part in from_file(training + heldout):
                fixed[part] = torch.stack(score(reference, batch)[:2], dim=1)

    def compare(batch, part, count):
        """Loss and metrics of a few of `count` pairs."""
        if precomputed:
            ref_logps = fixed[part].unbind(1)
        else:
            with torch.no_grad():
                ref_logps = score(reference, batch)[:2]
        better, worse, *lengths = score(policy, batch)
        return loss(better, worse, *ref_logps, *lengths, torch.full_like(better, 1 / count))

    def look():
        metrics, totals = {}, {}
        with run.autocast(device, cfg.dtype):
            if not toy:
                train_sft.show_responses(out, policy, tokenizer, (heldout or training)[:4], records, prompts, cfg)
            else:
                metrics, experience = evaluate(policy, tokenizer, task, problems=cfg.eval_problems, seed=cfg.seed,
                                               reference=start, reward_model=reward_model, size=cfg.micro_batch, **sampling)
                show_answers(out, experience)
            if toy and cfg.best_of and out.step == 0:
                metrics["eval/best_of_n"] = best_of(policy, tokenizer, task, samples=cfg.best_of, problems=cfg.eval_problems,
                                                    seed=cfg.seed, reward_model=reward_model, **sampling)[cfg.best_of]
        with torch.no_grad():
            for batch, part in from_file(heldout):
                add_up(totals, compare(batch, part, len(heldout))[1])
        return metrics | {f"eval/pair_{name}": totals[f"train/{name}"] for name in ("loss", "accuracy") if totals}

    for step in out.steps():
        # 2. Look at what it writes by now, and how it ranks held-out pairs.
        if step % cfg.eval_every == 0:
            out.log(look())
        if cfg.refresh_reference and step and step % cfg.refresh_reference == 0:
            reference.load_state_dict(policy.state_dict())
            out.state["reference"] = reference.state_dict()

        # 3. Pairs: the next of the file, or two fresh answers to each prompt, of which a judge prefers one.
        started = time.perf_counter()
        if cfg.online:
            with run.autocast(device, cfg.dtype):
                fresh = collect(policy, tokenizer, task, prompts=cfg.batch, samples=2,
                                seed=run.derive(cfg.seed, "rollout", step), **sampling)
                scores = judge(reward_model, fresh.rollout, cfg.micro_batch) if cfg.judge == "model" else fresh.rewards
            pairs, ties = judged_pairs(fresh.rollout, scores.view(-1, 2))
            count = cfg.batch - ties
            parts = [([x[torch.cat((rows, rows + count))] for x in pairs], None)
                     for rows in torch.arange(count).split(cfg.micro_batch)] if count else []
            out.log({f"rollout/{name}": value for name, value in describe(fresh).items()} | {"rollout/ties": ties / cfg.batch})
        else:
            parts = from_file([training[i] for i in shuffled_batch(len(training), cfg.batch, step, cfg.seed)])
            count = cfg.batch

        # 4. Update. Both responses of a pair stay together; micro-batches add up to the step.
        totals = {}
        for batch, part in parts:
            micro_loss, metrics = compare(batch, part, count)
            micro_loss.backward()
            add_up(totals, metrics)
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup)
        if parts:
            totals["train/grad_norm"] = optimizer.step(lr, cfg.grad_clip)

        # 5. Log.
        out.log(totals | {"train/lr": lr, "time/update_s": time.perf_counter() - started},
                show={name: f"{totals[f'train/{name}']:.2f}" for name in ("loss", "accuracy", "chosen_logp") if totals})

    # 6. What it was good for.
    final = look()
    out.finish(final)
    print(f"\n{'held out':30s}   before    after\n" + before_and_after(out.metrics()[0], final) + f"\nSaved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
