"""Distillation: a small student learns to say what a large teacher would say, from the teacher's whole distribution.

    L = tau^2 / R  sum_bt m_bt D( p(.|y_b,<t) , q(.|y_b,<t) )       p teacher, q student, both softmax(logits / tau),
                                                                    R answers, m True on their tokens

    --on         whose answers y                --divergence     D
    data         somebody's demonstrations      forward          KL(p || q): the student must cover all that the teacher does
    teacher      the teacher's own              reverse          KL(q || p): the student must do nothing that it does not
    student      the student's own              jsd              beta KL(p || m) + (1-beta) KL(q || m), m = beta p + (1-beta) q

    python train_distill.py                                         the GRPO model into one of a quarter of its size
    python train_distill.py --on student --divergence reverse       on-policy: corrected where it goes wrong itself
    python train_distill.py --on data --tau 2 --top-k 8             soft targets, of which only the likeliest are kept

On its own answers, the student also chooses the prefixes that it is judged on. `--gradient token`, the usual choice, holds
each prefix fixed and looks away from that. `--gradient sequence` follows the KL of whole answers, E_q[ sum_t D_t ]:

    grad KL = E_q[ sum_t  grad D_t  +  ( sum_{s > t} D_s - b_t ) grad log q(y_t|y_<t) ]

A token has its part in the divergence that comes after it. The baseline b_t is the mean of that sum, at the same t, over the
other answers to the prompt.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch

from nanorl import run
from nanorl.batches import add_metrics, sum_over_ranks
from nanorl.data import render_records, response_batch, shift, shuffled_batch, training_records
from nanorl.heldout import answer_kl, before_and_after, evaluate_and_show, heldout_problems
from nanorl.ops import (cumulative_sum, entropy_from_logits, jensen_shannon, kl_divergence, leave_one_out,
                        selective_log_softmax, token_weights, with_tail)
from nanorl.rollout import collect, describe, right_or_reward, sample_and_grade
from nanorl.sample import Sampling
from nanorl.tasks import default_max_new_tokens


def token_divergence(student, teacher, *, divergence="forward", beta=None, tau=1.0, top_k=0):
    """D(p, q) at each token, p and q the softmax of logits / tau.       student, teacher logits [N, V] -> [N] in nats"""
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) / tau for x in (student, teacher))
    if 0 < top_k < teacher.shape[-1]:
        ids = teacher.topk(top_k, dim=-1).indices
        student, teacher = with_tail(student, ids), with_tail(teacher, ids)
    if divergence == "forward":
        d = kl_divergence(teacher, student)
    elif divergence == "reverse":
        d = kl_divergence(student, teacher)
    else:
        d = jensen_shannon(teacher, student, beta)
    return d


def objective(student, teacher, ids, mask, weights, *, gradient="token", group=1, divergence="forward",
              beta=None, tau=1.0, top_k=0):
    """The loss of some prompts' answers, and metrics as sums over tokens.

        L = tau^2 sum_bt w_bt D_bt   [ + sum_bt w_bt sg( sum_{s>t} D_bs - b_bt ) log q(y_bt|y_b,<t)   with gradient="sequence" ]

    student, teacher: logits [N, V] of the N tokens ids [N] where mask [B, T] is True; weights [B, T]. With the second term,
    rows are groups of `group` answers to a prompt, side by side, and of L only the gradient means something.

    tau^2 because the gradient in the logits is 1/tau of that in logits / tau, and p - q shrinks as 1/tau, too: so the strength
    of the lesson does not depend on tau.                                           (Hinton et al. 2015, section 2.1)
    """
    per_token = token_divergence(student, teacher, divergence=divergence, beta=beta, tau=tau, top_k=top_k)
    D = per_token.new_zeros(mask.shape).masked_scatter(mask, per_token)                     # [B, T]
    loss = tau**2 * (weights * D).sum()
    if gradient == "sequence":
        logp = torch.zeros_like(D).masked_scatter(mask, selective_log_softmax(student, ids))
        to_go = D.detach().sum(-1, keepdim=True) - cumulative_sum(D.detach())               # sum over s > t
        advantage = leave_one_out(to_go.view(-1, group, to_go.shape[1]).transpose(1, 2))    # [P, T, G]
        loss = loss + (weights * advantage.transpose(1, 2).reshape(to_go.shape) * logp).sum()
    metrics = {"divergence": D.sum(), "entropy": entropy_from_logits(student).sum()}
    return loss, {f"train/{name}": x.detach() for name, x in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class Config(run.PolicyConfig):
    out: str = ""               # directory of this run (default: runs/distill, or runs/distill-TASK)
    init: str = ""              # the student to begin with (default: a small one, pretrained and fine-tuned first)
    steps: run.Count = 60
    lr: run.Positive = 1e-3
    eval_every: run.Count = 20

    # teacher and answers
    teacher: str = ""           # run to learn from (default: runs/grpo, or runs/grpo-TASK, made first)
    task: str = "addition"      # addition, sums, sorting, reversal, countdown or code
    data: str = ""              # --on data: JSONL records {"prompt", "response"} instead of the task's demonstrations
    skip_long: bool = False     # leave out records that do not fit the model's context
    on: Literal["data", "teacher", "student"] = "teacher"    # whose answers: see the table above
    divergence: Literal["forward", "reverse", "jsd"] = "forward"    # see the table above
    gradient: Literal["token", "sequence"] = "token"    # sequence: of whole answers of the student, not token by token
    beta: run.Share | None = None    # jsd: near 0 it is a small multiple of forward, near 1 of reverse (default: 0.5)
    tau: run.Positive = 1.0     # temperature in D: above 1, unlikely tokens count more; answers are sampled at 1
    top_k: run.Natural = 0      # compare only the teacher's k likeliest tokens, and the others as one; 0 is all
    prompts: run.Count = 32     # P, prompts per step
    group: run.Count = 4        # G, answers per prompt; with --on data, P x G demonstrations
    max_new_tokens: run.Count | None = None    # an answer longer than this is cut (default: the task's own; addition 80)
    micro_batch: run.Count = 64  # rows in memory at a time, but at least one whole group
    eval_problems: run.Count = 500    # held-out problems

    def __post_init__(self):
        super().__post_init__()
        self.default("out", run.stage_dir("distill", self.task))
        self.default("max_new_tokens", default_max_new_tokens(self.task))
        self.require(self.divergence == "jsd" or self.beta is None, "divergence beta", "only --divergence jsd has a --beta")
        if self.divergence == "jsd":
            self.default("beta", 0.5)
            self.require(0 < self.beta < 1, "beta", "expected a number between 0 and 1; at the ends the divergence is 0")
        self.require(self.on == "data" or not self.data, "on data", "only --on data reads records")
        if self.gradient == "sequence":
            self.require((self.on, self.divergence) == ("student", "reverse"), "gradient on divergence",
                         "the gradient of whole answers is that of --on student --divergence reverse")
            self.require(self.tau == 1 and self.top_k == 0, "gradient tau top_k",
                         "whole answers have the KL of the policies as they sample: expected --tau 1 --top-k 0")
            self.require(self.group > 1, "gradient group", "its baseline is the other answers to a prompt, expected at least 2")


def make_student(cfg: Config) -> str:
    """The default student: a quarter of the default model, pretrained on the same text and fine-tuned on the task."""
    pretrained = run.ensure_stage(cfg, "pretrain", out="runs/pretrain-pico", preset="pico")
    return run.ensure_stage(cfg, "sft", out=run.stage_dir("sft-pico", cfg.task), init=pretrained, task=cfg.task)


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    device, checkpoint = run.pick_device(cfg), run.Run.check(cfg)
    task = run.choose_task(cfg.task)
    records = training_records(cfg.data, task) if cfg.on == "data" else []
    for typed in filter(None, (cfg.teacher, "" if checkpoint else cfg.init)):
        run.load_checkpoint(typed, "policy")
    teacher_run = cfg.teacher or run.ensure_stage(cfg, "grpo", task=cfg.task)
    start = checkpoint or run.load_checkpoint(cfg.init or make_student(cfg))
    tokenizer, (student, _) = run.tokenizer_from(start), run.policy_from(cfg, checkpoint, start, device)
    teacher = run.load_frozen(teacher_run, "policy", tokenizer, device)
    prompts = [tokenizer.render(problem.conversation) for problem in task.examples()]
    run.check_fits_context(prompts, task.response_limit(cfg.max_new_tokens), student, teacher)
    context = min(student.config.context, teacher.config.context)
    records, *demonstrations = render_records(records, tokenizer, context, cfg.data or str(task), "response",
                                              skip_long=cfg.skip_long)

    optimizer = run.Optimizers(student, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, student, optimizer, tokenizer, data=records or task.examples(), teacher=teacher)
    del start, checkpoint
    compiled = run.compile_models(cfg, device, student, teacher)
    sampling = Sampling(cfg.max_new_tokens, slots=16 * cfg.micro_batch, compile=compiled)
    loss = functools.partial(objective, gradient=cfg.gradient, group=cfg.group, divergence=cfg.divergence, beta=cfg.beta,
                             tau=cfg.tau, top_k=cfg.top_k)
    with run.autocast(device, cfg.dtype):
        heldout = heldout_problems(task, cfg.eval_problems, cfg.seed)
        teacher_answers = sample_and_grade(teacher, tokenizer, task, heldout, sampling, seed=run.derive(cfg.seed, "teacher"))
    teacher_value = float(right_or_reward(task, teacher_answers.rewards).nanmean())
    print(f"Distilling {teacher.num_parameters():,} parameters into {student.num_parameters():,}: {cfg.divergence} divergence "
          f"on answers of the {cfg.on} to {task}, on {device.type}. The {task.measured} of the teacher's samples is "
          f"{teacher_value:.3f}.")

    def evaluate_now() -> dict[str, float]:
        metrics = evaluate_and_show(out, task, sampling, reference=teacher)
        metrics["eval/reverse_kl"] = metrics.pop("eval/answer_kl")
        with run.autocast(device, cfg.dtype):
            metrics["eval/forward_kl"] = answer_kl(teacher, student, teacher_answers.rollout, 1.0, cfg.micro_batch)
        return metrics

    for step in out.steps():
        # 2. Evaluate: held-out problems, and how far student and teacher are apart, seen from either.
        if step % cfg.eval_every == 0:
            out.log(evaluate_now())

        # 3. Prefixes: demonstrations, or answers to fresh problems by the teacher or by the student as it is now.
        started = time.perf_counter()
        if cfg.on == "data":
            picks = shuffled_batch(len(records), cfg.prompts * cfg.group, step, cfg.seed)
            tokens, mask = (x.to(device) for x in response_batch(*demonstrations, picks, tokenizer.pad))
        else:
            with run.autocast(device, cfg.dtype):
                fresh = collect(student if cfg.on == "student" else teacher, tokenizer, task, sampling,
                                prompts=cfg.prompts, samples=cfg.group, seed=run.derive(cfg.seed, "rollout", step))
            tokens, mask = fresh.rollout.tokens, fresh.rollout.mask
            out.log(describe(fresh, "rollout"))
        out.log({"time/rollout_s": time.perf_counter() - started})

        # 4. Update: one pass of each model over the same tokens. A group stays together.
        started, totals = time.perf_counter(), {}
        rows = torch.arange(len(tokens), device=device)
        weights = token_weights(mask, rows, "sequence_sum")
        for groups in run.ranks.parts(rows.view(-1, cfg.group), max(1, cfg.micro_batch // cfg.group)):
            part = groups.flatten()
            T = 2 + int(mask[part].any(0).nonzero().max())              # mask[:, t] is about tokens[:, t+1]
            inputs, targets = shift(tokens[part, :T])
            m = mask[part, : T - 1]
            with run.autocast(device, cfg.dtype):
                with torch.no_grad():
                    teacher_logits = teacher.head(teacher.hidden_at(inputs, m)[0])          # [N, V]
                student_logits = student.head(student.hidden_at(inputs, m)[0])
            micro_loss, metrics = loss(student_logits, teacher_logits, targets[m], m, weights[part, : T - 1])
            micro_loss.backward()
            add_metrics(totals, metrics)
        totals = sum_over_ranks(totals)
        lr = cfg.lr * out.schedule(warmup=0.1, decay=0.5)
        grad_norm = optimizer.step(lr, grad_clip=1.0)

        # 5. Log: sums over tokens become means.
        totals = {name: total / mask.sum() for name, total in totals.items()}
        out.log(totals | {"train/grad_norm": grad_norm, "train/lr": lr, "time/update_s": time.perf_counter() - started},
                show=("train/divergence", "rollout/reward"))

    # 6. What the student has learned.
    out.finish(evaluate_now())
    print(before_and_after(out, task))
    print(f"  {'the teacher, sampled':37s} {teacher_value:8.3f}")


if __name__ == "__main__":
    main(run.parse(Config))
