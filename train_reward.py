"""Reward model: which of two responses would a reader choose?

    P(w > l | x) = sigma(r(x, w) - r(x, l))             Bradley and Terry 1952
    L = -1/N sum_n log P(w_n > l_n | x_n)               the likelihood of the choices, N pairs

r is one number, read at a response's last token by a scalar head on the fine-tuned model's trunk. Only differences are
learned: r means nothing between prompts, and its zero means nothing at all.

    python train_reward.py                              pairs of stories, from nothing: makes the stages before it first
    python train_reward.py --data mine.jsonl --out runs/mine        records {"prompt", "chosen", "rejected"}

How good can it be? Readers do not always choose what they like better, so no model agrees with all of them: the ceiling
is what the hidden reward itself would reach. Has it learned more than habits? Two baselines ignore the order of words: one
prefers the longer (or shorter) response, one has a weight for every word.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch

import train_sft
from nanorl import ranks, run
from nanorl.data import DATA, pair_batch, read_records, shuffled_batch
from nanorl.gpt import ScalarGPT
from nanorl.ops import bradley_terry, ranked_right
from nanorl.rollout import add_up, of_all_ranks
from nanorl.tasks import Stories

STORIES = str(DATA / "preferences.jsonl")


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = "runs/reward"
    steps: run.Count = 200
    lr: run.Positive = 2e-3
    eval_every: run.Count = 50

    data: str = ""              # JSONL records {"prompt", "chosen", "rejected"} (default: data/preferences.jsonl)
    batch: run.Count = 32       # pairs per step
    micro_batch: run.Count = 32  # pairs in memory at a time
    warmup: run.Share = 0.1     # of the steps: the learning rate rises
    decay: run.Share = 0.5      # of the steps: the learning rate falls to 0
    weight_decay: run.NonNegative = 0.1    # decoupled; gains are left alone
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm


def objective(chosen, rejected, weights):
    """Negative log-likelihood of the choices.       L = -sum_n w_n log sigma(r(w_n) - r(l_n))

    chosen, rejected: rewards [N]; weights [N], which add up to 1 over the whole step -> (loss, metrics that add up).
    """
    margin = chosen - rejected
    loss = (weights * bradley_terry(margin)).sum()
    return loss, {"train/loss": loss.detach(), "train/accuracy": (weights * ranked_right(margin)).sum(),
                  "train/margin": (weights * margin.detach()).sum()}


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def read_pairs(path):
    """The records of a file (by default the stories), which of them to train on and which are held out by the hash of their
    prompt, and how many are neither because both responses are the same: there is nothing to prefer."""
    path = path or STORIES
    records = read_records(path, ("prompt", "chosen", "rejected"))
    training, heldout = ([i for i in part if records[i]["chosen"] != records[i]["rejected"]]
                         for part in train_sft.split(records, path))
    if not training:
        raise ValueError(f"{path}: no record to train on whose chosen and rejected responses differ")
    return records, training, heldout, len(records) - len(training) - len(heldout)


def render_pairs(records, tokenizer, context, path):
    """Token ids of each record's prompt, chosen and rejected response."""
    prompts, chosen = train_sft.render(records, tokenizer, context, path or STORIES, "chosen")
    _, rejected = train_sft.render(records, tokenizer, context, path or STORIES, "rejected")
    return prompts, chosen, rejected


@run.says_why_it_stopped
def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        records, training, heldout, identical = read_pairs(cfg.data)
    stage = dict(out="runs/sft-stories", task="stories", **run.same(cfg))
    init = "" if checkpoint else cfg.init or run.ensure_stage(train_sft, **stage)
    with run.user_errors():
        start = checkpoint or run.load_checkpoint(init, "policy")
        tokenizer = run.tokenizer_from(start)
        model = run.scalar_model_from(start, device) if checkpoint else ScalarGPT(run.model_from(start, device)).to(device)
        prompts, chosen, rejected = render_pairs(records, tokenizer, model.config.context, cfg.data)

    # Muon needs fewer passes over a few thousand pairs than AdamW.
    optimizer = run.Optimizers(model, "muon", cfg.lr, cfg.weight_decay)
    out = run.Run(cfg, checkpoint, model, optimizer, tokenizer)
    del start, checkpoint
    run.prepare(cfg, device, model.trunk)
    pairs = [[records[i] for i in part] for part in (training, heldout)]
    hidden = hidden_margins(pairs[1]) if not cfg.data else None
    print(f"A reward model from {len(training):,} pairs of {cfg.data or 'stories'}, {cfg.batch} a step, on {device.type}. "
          f"{len(heldout):,} are held out; {identical} more have equal responses and are left out.")

    def rewards(picks):
        """Of the chosen and of the rejected responses of these pairs."""
        tokens, _, lengths = (x.to(device) for x in pair_batch(prompts, chosen, rejected, picks, tokenizer.pad))
        with run.autocast(device, cfg.dtype):
            return model.at_end(tokens, lengths).float().chunk(2)

    @torch.no_grad()
    def margins(picks):
        parts = [rewards(picks[i : i + cfg.micro_batch]) for i in range(0, len(picks), cfg.micro_batch)]
        return torch.cat([better - worse for better, worse in parts]).cpu()

    def worth(margin):
        return {"eval/pair_loss": float(bradley_terry(margin).mean()), "eval/margin": float(margin.mean()),
                "eval/calibration_error": calibration_error(margin), **agreement("model", margin, hidden)}

    for step in out.steps():
        # 2. Look at what it would choose by now.
        if heldout and step % cfg.eval_every == 0:
            out.log(worth(margins(heldout)))

        # 3. One step. Both responses of a pair stay together; the weights are the whole step's.
        picks, totals = [training[i] for i in shuffled_batch(len(training), cfg.batch, step, cfg.seed)], {}
        for part in ranks.parts(picks, cfg.micro_batch):
            better, worse = rewards(part)
            loss, metrics = objective(better, worse, torch.full_like(better, 1 / cfg.batch))
            loss.backward()
            add_up(totals, metrics)
        totals = of_all_ranks(totals)
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup, cfg.decay)
        grad_norm = optimizer.step(lr, cfg.grad_clip)

        # 4. Log.
        out.log(totals | {"train/grad_norm": grad_norm, "train/lr": lr},
                show={"loss": f"{totals['train/loss']:.3f}", "accuracy": f"{totals['train/accuracy']:.2f}"})

    # 5. What it is worth, beside the baselines and the ceiling. The held-out pairs with their margins go to samples.jsonl.
    final = {}
    if heldout:
        margin = margins(heldout)
        final = worth(margin) | agreement("words", word_margins(*pairs), hidden)
        final |= agreement("length", length_margins(*pairs), hidden)
        if hidden is not None:
            final["eval/agreement_ceiling_labels"] = float((hidden.abs() / Stories.label_temperature).sigmoid().mean())
        out.samples([{**record, "margin": m} for record, m in zip(pairs[1], margin.tolist(), strict=True)])
    out.finish(final)
    print(report(final, len(heldout)) + f"\nSaved in {cfg.out}.")


# ---------------------------------------------------------------------------------------------------------------------
# What margins r(chosen) - r(rejected) of held-out pairs are worth
# ---------------------------------------------------------------------------------------------------------------------


def agreement(name, margin, hidden=None):
    """Share of pairs that margins [N] rank like the labels; where hidden margins [N] are known, also like those, and like those
    that exceed one label temperature."""
    def share(right):
        return float(right.mean()) if len(right) else 0.5

    metrics = {f"eval/agreement_{name}_labels": share(ranked_right(margin))}
    if hidden is not None:
        right = ranked_right(margin * hidden)
        metrics[f"eval/agreement_{name}_hidden"] = share(right[hidden != 0])
        metrics[f"eval/agreement_{name}_clear"] = share(right[hidden.abs() > Stories.label_temperature])
    return metrics


def calibration_error(margin, bins=10):
    """How far predicted and actual preference are apart: |mean confidence - accuracy| in bins of confidence, weighted by
    size. Confidence is sigma(|margin|), the probability of the response that the model prefers.       [N] -> float"""
    confidence, right = margin.abs().sigmoid(), ranked_right(margin)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    parts = [index == b for b in range(bins) if (index == b).any()]
    return sum(abs(float(confidence[part].mean() - right[part].mean())) * int(part.sum()) for part in parts) / len(margin)


def hidden_margins(records):
    """By how much the hidden reward prefers what was chosen.       -> [N]"""
    reward = Stories().hidden_reward
    return torch.tensor([reward(r["prompt"], r["chosen"]) - reward(r["prompt"], r["rejected"]) for r in records])


def length_margins(training, heldout):
    """Longer is better, or shorter, whichever the training pairs say. In characters.       -> [N]"""
    def margins(records):
        return torch.tensor([float(len(record["chosen"]) - len(record["rejected"])) for record in records])

    return margins(heldout) * (1 if ranked_right(margins(training)).mean() >= 0.5 else -1)


def word_margins(training, heldout):
    """A weight for every word, fitted by logistic regression to the differences in word counts.       -> [N]

    The penalty on weights is the one, of five, that does best on the last fifth of the training pairs.
    """
    def count(record, key):
        return Counter(re.findall(r"\w+|[^\w\s]", record[key].lower()))

    words = sum((count(record, key) for record in training for key in ("chosen", "rejected")), Counter())
    vocabulary = {word: i for i, (word, _) in enumerate(words.most_common(5000))}

    def differences(records):
        x = torch.zeros(len(records), len(vocabulary), dtype=torch.float64)
        for row, record in zip(x, records, strict=True):
            for key, sign in (("chosen", 1.0), ("rejected", -1.0)):
                for word, times in count(record, key).items():
                    if word in vocabulary:
                        row[vocabulary[word]] += sign * times
        return x

    def fit(x, penalty):
        w = torch.zeros(len(vocabulary), dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = bradley_terry(x @ w).mean() + penalty * w.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        return w.detach()

    x, cut = differences(training), len(training) * 4 // 5
    best = max((10.0**-k for k in range(1, 6)), key=lambda penalty: ranked_right(x[cut:] @ fit(x[:cut], penalty)).mean())
    return differences(heldout) @ fit(x, best)


RANKERS = {"model": "the reward model", "words": "word counts", "length": "length", "ceiling": "the hidden reward itself"}


def report(metrics, count):
    """Who ranks pairs like whom, as a table."""
    lines = [f"{f'{count} held-out pairs ranked like ...':38s} the labels  hidden reward  clear pairs"]
    for name, label in RANKERS.items():
        cells = (metrics.get(f"eval/agreement_{name}_{column}") for column in ("labels", "hidden", "clear"))
        lines.append(f"  {label:35s}" + "".join("            -" if x is None else f"{x:13.3f}" for x in cells))
    return "\n".join(lines) if count else "No pair is held out."


if __name__ == "__main__":
    main(run.parse(Config))
