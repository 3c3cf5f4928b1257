"""Which divergence covers a teacher's modes, and how the loss of fine-tuning differs from that of pretraining.

C13  Forward KL covers, reverse KL seeks. For a teacher p that the student q cannot match:

         KL(p || q) = E_p[log p/q]        KL(q || p) = E_q[log q/p]

     Of all Gaussians, the first is smallest for the one with p's mean and variance. The second is at most -log w at a mode of
     weight w, and no less if the modes are far apart.

C14  The same holds in distillation: a small student covers with the forward KL on the teacher's answers, and seeks with the
     reverse KL on its own. If tokens do not see each other, the best a student q can do is

         KL(p || q) = sum_t H(p_t) - H(p),  p_t the marginals,        KL(q || p) = log 2  for one mode of two

C15  SFT is pretraining on other data: the loss is the same. With N_x tokens of prompts and N_y of responses,

         (N_x + N_y) L_all = N_x L_prompts + N_y L_responses

Coverage is the share of the teacher's answers that the student gives with at least a tenth of the teacher's probability, and
precision is the same with the two swapped. In C13, a student covers if its coverage is above 90 %; it seeks if its coverage is
not, but its precision is. The starts of the descent are random. C14 sums over all answers (experiments/distill.py). C15
fine-tunes the default model.

Change `WIDTH = 0.7` to `WIDTH = 1.2`: C13 holds only when a softmax of rank 2 learns two tokens of each context.
"""

import math
import sys
from pathlib import Path
from random import Random

import torch

import train_pretrain
import train_sft
from experiments.distill import WAYS, exact_loss, learn, shared, two_modes
from experiments.findings import Finding, load, main, mean_and_interval, panels, save, stage
from nanorl.data import DATA, random_windows, render_records, response_batch, shuffled_batch
from nanorl.files import read_text
from nanorl.heldout import total_loss
from nanorl.ops import entropy_from_logits, kl_divergence, log_softmax, logsumexp, token_weights
from nanorl.plot import PALETTE
from nanorl.run import Optimizers, generator, read_config, schedule
from nanorl.sample import token_log_probs
from nanorl.tabular import expectation, leaf, log_probs, randn, sequence_kl, sequence_probs
from nanorl.tasks import make_task

X = torch.linspace(-12, 12, 481, dtype=torch.float64)
WEIGHTS = torch.tensor([0.6, 0.4], dtype=torch.float64)     # of the two modes of C13 ...
WIDTH = 0.7                                                 # ... and how wide they are
COVERS = 0.9


def gaussian(mean, log_width):
    """Log-density on the grid, but for a constant that all rows share.       [S], [S] -> [S, 481]"""
    return -((X - mean[:, None]) / log_width[:, None].exp()).square() / 2 - log_width[:, None]


def mixture(m):
    """Log-density of WEIGHTS[0] N(-m, WIDTH^2) + WEIGHTS[1] N(m, WIDTH^2).       -> [481]"""
    means, widths = torch.tensor([[-m, m], [WIDTH, WIDTH]], dtype=X.dtype)
    return logsumexp(WEIGHTS.log()[:, None] + gaussian(means, widths.log()), dim=0)


def low_rank(A, B):
    """Logits of a softmax over V tokens in each of C contexts.       [S, C, rank], [S, rank, V] -> [S, C, V]"""
    return A @ B


def descend(teacher, student, parameters, forward, steps, lr):
    """What Adam finds for either divergence: parameters, the student's log-probabilities, and the divergence."""
    parameters = [leaf(x) for x in parameters]
    optimizer = torch.optim.Adam(parameters, lr)

    def divergence():
        q = student(*parameters)
        return kl_divergence(teacher, q) if forward else kl_divergence(q, teacher)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        divergence().sum().backward()
        optimizer.step()
    return [x.detach() for x in parameters], log_softmax(student(*parameters).detach()), divergence().detach()


def two_tokens(seed, contexts=12, V=12, noise=0.02):
    """Log-probs of a teacher with two likely tokens in each context.       -> [contexts, V]"""
    g = generator(seed, "C13", "teacher")
    picks = torch.stack([torch.randperm(V, generator=g)[:2] for _ in range(contexts)])
    return torch.full((contexts, V), noise / (V - 2)).double().scatter(1, picks, (1 - noise) / 2).log()


def c13(smoke):
    starts, seeds, steps = (4, 2, 5) if smoke else (30, 10, 1000)
    rows, held, curves = [], {}, {"x": X[::4]}
    for m in (2.5, 1.5):
        g, p = generator(0, "C13"), mixture(m)
        begin, label = (3 * randn(g, starts), 0.5 * randn(g, starts)), f"modes {2 * m / WIDTH:.0f} widths apart"
        for name in ("forward", "reverse"):
            (mean, log_width), log_q, kl = descend(p, gaussian, begin, name == "forward", steps, 0.3)
            i, P = kl.argmin(), log_softmax(p).exp()
            found = torch.tensor([[shared(P, q), shared(q, P)] for q in log_q.exp()])       # [starts, 2]
            rows.append({"student": "a Gaussian", "teacher": label, "KL": name, "coverage": float(found[i, 0]),
                         "precision": float(found[i, 1]), "nats": float(kl[i]), "mean": float(mean[i]),
                         "width": float(log_width[i].exp()), "runs that cover": float((found[:, 0] > COVERS).double().mean())})
            if m == 2.5:
                curves |= {"teacher": P[::4] / (X[1] - X[0]), name: log_q[i, ::4].exp() / (X[1] - X[0])}
        moments = {"mean": float(WEIGHTS @ torch.tensor([-m, m], dtype=X.dtype)),
                   "width": (WIDTH**2 + 4 * m**2 * float(WEIGHTS.prod()))**0.5}
        forward, reverse = rows[-2:]
        lawful = reverse["nats"] <= -math.log(WEIGHTS.max()) and all(abs(forward[x] - moments[x]) < 1e-2 for x in moments)
        held[f"a Gaussian learns {label}"] = (lawful and forward["coverage"] > COVERS > reverse["coverage"]
                                              and reverse["precision"] > COVERS)

    teachers = torch.stack([two_tokens(seed) for seed in range(seeds)])
    p = teachers.exp() / teachers.shape[1]                  # contexts are equally likely
    for rank, label in ((2, "rank 2"), (12, "full rank")):
        begin = [0.2 * torch.stack([randn(generator(seed, "C13", name), *shape) for seed in range(seeds)])
                 for name, shape in (("A", (12, rank)), ("B", (rank, 12)))]
        found = {}
        for name in ("forward", "reverse"):
            _, log_q, kl = descend(teachers, low_rank, begin, name == "forward", steps, 0.05)
            q = log_q.exp() / teachers.shape[1]
            found[name] = torch.tensor([[shared(*each), shared(*each[::-1])] for each in zip(p, q, strict=True)])
            coverage, precision = found[name].mean(0).tolist()
            rows.append({"student": f"a softmax of {label}", "teacher": "two tokens", "KL": name, "coverage": coverage,
                         "precision": precision, "nats": float(kl.mean()), "mean": None, "width": None,
                         "runs that cover": float((found[name][:, 0] > COVERS).double().mean())})
        covers, leaves, precise = (mean_and_interval(found[name][:, i])
                                   for name, i in (("forward", 0), ("reverse", 0), ("reverse", 1)))
        held[f"a softmax of {label} learns two tokens of each context"] = (covers[1] > COVERS > leaves[2]
                                                                           and precise[1] > COVERS)
    far, near, low, full = rows[1::2]
    return Finding("C13", "Forward KL covers, reverse KL seeks.", held,
                   f"the Gaussian with the smallest reverse KL covers {far['coverage']:.0%} of modes {2 * 2.5 / WIDTH:.1f} "
                   f"widths apart (but {far['runs that cover']:.0%} of the starts end in another minimum, which covers both), "
                   f"and {near['coverage']:.0%} of modes {2 * 1.5 / WIDTH:.1f} widths apart. With reverse KL, a softmax of "
                   f"rank 2 leaves {1 - low['coverage']:.0%} out, one of full rank, which can represent the teacher, "
                   f"{1 - full['coverage']:.1%}", rows, curves)


def learn_any(way, teacher, seed, steps=400):
    """`learn` of experiments/distill.py for a student whose tokens see those before them: any table."""
    z = randn(generator(seed, "student"), *teacher.shape)
    for _ in range(steps):
        z = leaf(z)
        z = z - torch.autograd.grad(exact_loss(z, teacher, **way), z)[0]
    return z.detach()


def c14(smoke):
    seeds, steps, teacher = 2 if smoke else 10, 5 if smoke else 400, two_modes()
    p, log_p, rows, found = sequence_probs(teacher), log_probs(teacher).sum(-1), [], {}
    modes = torch.tensor([0, len(p) - 1])           # 000 and 111
    ways = {label: way for label, way in WAYS.items() if way["on"] != "data"}       # nobody has demonstrated anything here
    for kind, method in (("blind", learn), ("any table", learn_any)):
        for label, way in ways.items():
            students = [method(way, teacher, seed, steps) for seed in range(seeds)]
            answers = [sequence_probs(student) for student in students]
            row = {"modes hit": torch.tensor([int((q[modes] >= p[modes] / 10).sum()) for q in answers]),
                   "coverage": torch.tensor([shared(p, q) for q in answers]),
                   "precision": torch.tensor([shared(q, p) for q in answers]),
                   "E_q[log p]": torch.stack([expectation(student, log_p) for student in students]),
                   "KL(p || q)": torch.stack([sequence_kl(teacher, student) for student in students]),
                   "KL(q || p)": torch.stack([sequence_kl(student, teacher) for student in students])}
            found[kind, label] = row
            rows.append({"student": kind, "way": label, **{name: float(x.double().mean()) for name, x in row.items()}})
    forward, _, token, sequence = ways
    marginals = torch.stack([p.view(2, 2, 2).sum([d for d in range(3) if d != t]) for t in range(3)])
    law = float(entropy_from_logits(marginals.log()).sum() - entropy_from_logits(p.log()))
    off = max(float((found["blind", forward]["KL(p || q)"] - law).abs().max()),
              float((found["blind", sequence]["KL(q || p)"] - math.log(2)).abs().max()))

    def differ(kind, reverse):
        a, b = found[kind, forward], found[kind, reverse]
        closer = b["E_q[log p]"].min() > a["E_q[log p]"].max()
        return bool((a["modes hit"] == 2).all() and (b["modes hit"] == 1).all() and closer)

    covering, _, fixed, seeking = rows[:4]
    return Finding("C14", "A student distilled with forward KL covers; one distilled with reverse KL on its own answers seeks.",
                   {"the gradient is that of whole answers": off < 0.01 and differ("blind", sequence),
                    "each prefix is held fixed": differ("blind", token),
                    "the student can hold both modes": differ("any table", sequence)},
                   f"forward KL: {covering['modes hit']:.1f} modes of 2, and the teacher's log p of the student's answers is "
                   f"{covering['E_q[log p]']:.1f} nats. Reverse KL of whole answers: {seeking['modes hit']:.1f} and "
                   f"{seeking['E_q[log p]']:.1f}; with each prefix held fixed: {fixed['modes hit']:.1f} and "
                   f"{fixed['E_q[log p]']:.1f}. The KLs match the closed forms to {off:.0e} ({seeds} seeds)", rows)


def loss_and_gradient(model, objective, tokens, mask=None):
    """An objective of the mean token that counts, and its gradient in all weights as one vector."""
    logp, _ = token_log_probs(model, tokens, mask)
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    loss, _ = objective(logp, mask, token_weights(mask, torch.arange(len(tokens)), "token_mean"))
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def same_loss(init, smoke):
    """Whether SFT's loss and gradient on windows of text, a BOS as the prompt, are pretraining's bit by bit; and how far both
    are from the mean of prompts' and responses' where the first half of each window is a prompt."""
    model, tokenizer = load(init)
    ids = torch.tensor(tokenizer.encode(read_text(DATA / "text.txt")[:20_000]))
    windows = random_windows(ids, tokenizer.bos, 4 if smoke else 16, 32, generator(0, "C15"))
    rows = range(len(windows))
    tokens, mask = response_batch(windows[:, :1].tolist(), windows[:, 1:].tolist(), rows, tokenizer.pad)
    pairs = zip(loss_and_gradient(model, train_pretrain.objective, windows),
                loss_and_gradient(model, train_sft.objective, tokens, mask), strict=True)
    identical = all(torch.equal(a, b) for a, b in pairs)
    tokens, mask = response_batch(windows[:, :16].tolist(), windows[:, 16:].tolist(), rows, tokenizer.pad)
    everything, responses, prompts = (loss_and_gradient(model.double(), train_sft.objective, tokens, m)
                                      for m in (torch.ones_like(mask), mask, ~mask))
    share = mask.double().mean()
    off = max(float((whole - share * y - (1 - share) * x).abs().max())
              for whole, x, y in zip(everything, prompts, responses, strict=True))
    return identical, off, float(everything[0]), float(responses[0])


def fine_tune(init, records, heldout, seed, steps, batch, every):
    """The loss on held-out responses every few steps of train_sft.py's loop, nats per token."""
    lr, (model, tokenizer) = train_sft.Config().lr, load(init)
    optimizer, path = Optimizers(model, "adamw", lr), []
    for step in range(steps + 1):
        if step % every == 0:
            path.append(total_loss(model, *heldout) / int(heldout[1].sum()))
        if step < steps:
            picks = shuffled_batch(len(records[0]), batch, step, seed)
            tokens, mask = response_batch(*records, picks, tokenizer.pad)
            weights = token_weights(mask, torch.arange(batch), "token_mean")
            train_sft.objective(token_log_probs(model, tokens, mask)[0], mask, weights)[0].backward()
            optimizer.step(lr * schedule(step, steps, warmup=0.1, decay=0.5), grad_clip=1.0)
    return path


def c15(smoke):
    seeds, steps, batch, every, count = (2, 2, 4, 1, 8) if smoke else (4, 150, 32, 15, 128)
    init = read_config(Path(stage("sft", smoke)))["init"] or train_pretrain.Config().out
    identical, off, everything, responses = same_loss(init, smoke)

    (model, tokenizer), task, rng = load(init), make_task("addition"), Random(0)
    unseen = []
    for problem in [task.problem(rng, "heldout") for _ in range(count)]:
        respond = task.work if rng.random() < task.worked_share else task.direct
        unseen.append({"prompt": problem.prompt, "response": respond(problem, rng)})
    (_, x, y), (_, *new) = (render_records(records, tokenizer, model.config.context, task.name, "response")
                   for records in (task.demonstrations(batch * steps), unseen))
    heldout = response_batch(*new, range(count), tokenizer.pad)
    masks = {"responses": (x, y), "everything": ([a[:1] for a in x], [a[1:] + b for a, b in zip(x, y, strict=True)])}
    paths = {name: torch.tensor([fine_tune(init, records, heldout, seed, steps, batch, every) for seed in range(seeds)])
             for name, records in masks.items()}
    rows = []
    for i in range(steps // every + 1):
        gap, low, high = mean_and_interval(paths["everything"][:, i] / paths["responses"][:, i] - 1)
        rows.append({"step": i * every, **{f"trained on {name}": float(path[:, i].mean()) for name, path in paths.items()},
                     "relative gap": gap, "low": low, "high": high})
    gaps, last = [row["relative gap"] for row in rows], rows[-1]
    return Finding("C15", "SFT is pretraining on other data: the loss is the same.",
                   {"every token counts": identical and off < 1e-6,
                    "prompts are masked": abs(responses / everything - 1) < 1e-6,
                    "prompts are masked, judged by the loss on held-out responses": max(-last["low"], last["high"]) < 0.02},
                   f"with a mask of ones, loss and gradient are {'' if identical else 'not '}pretraining's bit by bit; with "
                   f"prompts masked the loss is {responses:.2f} nats instead of {everything:.2f}, and the prompts' part makes "
                   f"up the difference to {off:.0e}. With the prompts in the loss, the loss on held-out responses differs by "
                   f"{min(gaps):+.1%} to {max(gaps):+.1%} during training, and by {last['relative gap']:+.1%} ("
                   f"{last['low']:+.1%} to {last['high']:+.1%}) after {steps} steps ({seeds} seeds)",
                   rows)


def draw(findings, path):
    figure, axes = panels(3)

    curves = findings["C13"].curves
    axes[0].fill_between(curves["x"], curves["teacher"], color="0.85", label="teacher")
    for name, colour in (("forward", PALETTE[0]), ("reverse", PALETTE[1])):
        axes[0].plot(curves["x"], curves[name], color=colour, label=f"smallest {name} KL")
    axes[0].set(title="one Gaussian for two modes", xlabel="x", ylabel="density", xlim=(-8, 8), ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)

    rows = [row for row in findings["C14"].rows if row["student"] == "blind"][::-1]
    for name, shift, colour in (("coverage", 0.2, PALETTE[0]), ("precision", -0.2, PALETTE[1])):
        bars = axes[1].barh([i + shift for i in range(len(rows))], [row[name] for row in rows], height=0.38, color=colour)
        axes[1].bar_label(bars, [name if row is rows[0] else "" for row in rows], label_type="center", color="white")
    axes[1].set(title="a student that cannot hold both modes", xlabel="share of the answers", xlim=(0, 1))
    axes[1].set_yticks(range(len(rows)), [row["way"].replace(", ", ",\n", 1) for row in rows], fontsize=8)

    rows = findings["C15"].rows
    steps, gap, low, high = ([row[name] for row in rows] for name in ("step", "relative gap", "low", "high"))
    axes[2].plot(steps, gap, color=PALETTE[0], marker="o", markersize=3)
    axes[2].fill_between(steps, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
    axes[2].axhline(0, color="0.6", linewidth=0.8, linestyle="--")
    axes[2].yaxis.set_major_formatter("{x:+.0%}")
    axes[2].set(title="prompts in the loss, too", xlabel="step of fine-tuning",
                ylabel="loss on held-out responses,\nrelative to prompts masked")
    save(figure, path)


CLAIMS = (c13, c14, c15)

if __name__ == "__main__":
    main(sys.modules[__name__])
