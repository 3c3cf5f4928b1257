"""What one step of each script is: its real `main`, and the same step written out row by row and token by token.

A script takes a few steps from a tiny checkpoint. Its optimizer is replaced by plain gradient descent, because the
first step of AdamW is nearly the sign of the gradient and would hide a wrong scale. Everything runs in float64. What the script
samples is recorded, and the reference repeats each step on the recorded answers, one at a time, with the model's logits and
what is written in this file: there is no padding, no mask, no micro-batch and no helper of nanorl.ops or nanorl.rollout in it.
Both must end at the same parameters and have the same metrics.
"""

import dataclasses
import json
import math
from collections import defaultdict
from functools import cache, partial
from itertools import chain
from statistics import fmean, pstdev, pvariance
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from world import metrics, write_records

import train_distill
import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_reward
import train_sft
from nanorl import run
from nanorl.batches import minibatches
from nanorl.data import pad, random_windows, response_mask, shuffled_batch
from nanorl.files import read_text
from nanorl.gpt import GPT, GPTConfig, ScalarGPT
from nanorl.lora import adapt
from nanorl.run.checkpoint import FORMAT
from nanorl.tasks import grade, is_heldout
from nanorl.tokenizer import Tokenizer

pytestmark = [pytest.mark.usefixtures("inside"), pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")]

CPU = torch.device("cpu")
STEPS = 40                  # a run would take so many: the learning rate still rises in the few that are taken
SHORT = 12                  # so many where it also falls at the end: 8 of them show both
SOME = 1.5                  # a temperature at which the tiny policy says different things
LIMIT = 12                  # tokens of an answer: at that temperature, some are cut

COMMON = f"--steps {STEPS} --eval-every 1000 --quiet --device cpu"
SAMPLING = f"--max-new-tokens {LIMIT} --temperature {SOME}"
FEW = "--eval-problems 1"
NO_BEST = "--best-of 0"
UNCHECKED = "--no-selfcheck"
ROWS = "--micro-batch"
ADAPTERS = []               # the flags that a test of adapters gives to each script


class Enough(Exception):
    """The run has taken as many steps as the test wants."""


class Descent(torch.optim.Optimizer):
    """x <- x - lr * gradient, in place of AdamW and of Muon. A script that samples nothing ends after `wanted` updates."""

    wanted = math.inf

    def __init__(self, params, lr, **_):
        super().__init__(params, {"lr": lr})
        self.taken = 0

    @torch.no_grad()
    def step(self):
        if self.taken == Descent.wanted:
            raise Enough
        self.taken += 1
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    x -= group["lr"] * x.grad


class Answer(NamedTuple):
    """A response: ids[start:] were sampled, its stop token included if it has finished."""

    ids: list[int]
    start: int
    prompt: int             # which of the step's prompts
    finished: bool
    reward: float
    sampled: list[float]    # log-probs at which its tokens were drawn
    text: str

    @property
    def response(self):
        return self.ids[self.start :]


def answers(experience):
    """The rows of a rollout."""
    r, G = experience.rollout, experience.rewards.shape[1]
    return [Answer(ids[:end], start, row // G, finished, reward, logp[start - 1 : end - 1], text)
            for row, (ids, start, end, finished, reward, logp, text) in enumerate(zip(
                r.tokens.tolist(), r.prompt_lengths.tolist(), r.lengths.tolist(), r.finished.tolist(),
                experience.rewards.flatten().tolist(), r.logp.tolist(), experience.texts, strict=True))]


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)     # what would be float32 on any device, too
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Let a script take a few updates. Returns the rollouts that it drew, the metrics of its steps and its checkpoint."""
    monkeypatch.setattr(train_grpo, "read_text", lambda path: "Once upon a time there was a fox.", raising=False)

    def play(script, steps, flags, samples=True):
        rollouts, original = [], getattr(script, "collect", None)

        def collect(model, tokenizer, task, sampling, **kwargs):
            if len(rollouts) == steps:
                raise Enough
            experience = original(model, tokenizer, task, sampling, **kwargs)
            rollouts.append(answers(experience))
            for a in rollouts[-1]:
                problem = experience.problems[a.prompt]
                assert a.ids[: a.start] == tokenizer.render(problem.prompt)
                assert a.text == tokenizer.decode(a.response[:-1] if a.finished else a.response)
                assert [a.reward] == grade(task, [problem], [a.text], [a.finished]).rewards
            return experience

        monkeypatch.setattr(torch.optim, "AdamW", Descent)
        monkeypatch.setattr(torch.optim, "Muon", Descent)
        monkeypatch.setattr(Descent, "wanted", math.inf if samples else steps)
        if samples:
            monkeypatch.setattr(script, "collect", collect)
        typed = [*COMMON.split(), "--save-every", str(steps), *flags.split(), *ADAPTERS, "--out", str(tmp_path / "run")]
        with pytest.raises(Enough):
            script.main(run.parse(script.Config, typed))
        lines = metrics(tmp_path / "run")
        assert len(lines) == steps
        return rollouts, lines, run.load_checkpoint(tmp_path / "run")

    return play


# ---------------------------------------------------------------------------------------------------------------------
# What every reference is made of
# ---------------------------------------------------------------------------------------------------------------------


saved = cache(run.load_checkpoint)


def load(path):
    return run.model_from(saved(path), CPU)


class BesideBA(torch.nn.Module):
    """A model with W + (alpha / R) B A in place of each W of its blocks, written out. It trains A, B and a scalar head."""

    def __init__(self, model, adapters, trunk=""):
        super().__init__()
        self.model, self.adapters = model.requires_grad_(False), adapters
        self.prefix, self.scalar = trunk, dict(model.scalar.named_parameters(prefix="scalar")) if trunk else {}

    def forward(self, tokens):
        weights = dict(self.model.named_parameters()) | self.scalar
        for name, (a, b) in self.adapters.items():
            weights[f"{self.prefix}{name}.weight"] = weights[f"{self.prefix}{name}.weight"] + 3 / 2 * b @ a
        return torch.func.functional_call(self.model, weights, (tokens,))

    def parameters(self):
        return [*(x for ab in self.adapters.values() for x in ab), *self.scalar.values()]

    def state_dict(self):
        return {f"{self.prefix}{name}.{which}": x for name, ab in self.adapters.items()
                for which, x in zip("ab", ab, strict=True)} | self.scalar


def to_train(purpose="policy", head=False, adapters=None):
    """The policy as a script begins to train it, or with a scalar head a critic. Adapters begin as the seed says, B at 0."""
    if not ADAPTERS:
        return ScalarGPT(load("policy")) if head else load("policy")
    if adapters is None:
        fresh = adapt(load("policy"), 2, 3.0, run.generator(0, "lora", purpose))
        adapters = {name: (layer.a, layer.b) for name, layer in fresh.named_modules() if hasattr(layer, "b")}
    model = ScalarGPT(load("policy")) if head else load("policy")
    ours = BesideBA(model, adapters, "trunk." if head else "")
    for x in ours.parameters():
        x.requires_grad_()
    return ours


def read(model, answer, temperature=1.0):
    """Of each token of a response, one after the other: its log-prob, and the log-probs of the whole vocabulary."""
    ids, start = answer[:2]
    log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0] / temperature, dim=-1)
    return [(log_p[i - 1, ids[i]], log_p[i - 1]) for i in range(start, len(ids))]


def log_probs(model, answer, temperature=1.0):
    """The log-probs of a response's tokens, as numbers."""
    with torch.no_grad():
        return [float(logp) for logp, _ in read(model, answer, temperature)]


def cross_entropy(model, rows, temperature=1.0):
    """The mean over all tokens of these rows, not over rows."""
    losses = [-logp for row in rows for logp, _ in read(model, row, temperature)]
    return sum(losses) / len(losses)


def entropy(log_p):
    return -(log_p.exp() * log_p).sum()


def k1(logp, other):
    return logp - other


def k2(logp, other):
    return (logp - other) ** 2 / 2


def k3(logp, other):
    return torch.exp(torch.as_tensor(other - logp)) - 1 - (other - logp)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def bradley_terry(margin):
    return -torch.log(torch.sigmoid(margin))


def rank(margin):
    """1 where the order is right, 0 where it is not. A tie of equal policies is decided by rounding: nan."""
    return math.nan if abs(margin) < 1e-9 else float(margin > 0)


def rate(lr, step, warmup, decay=0.0):
    """The learning rate rises over the first share `warmup` of the steps and falls over the last share `decay`, if there is
    one: those runs are short."""
    steps = SHORT if decay else STEPS
    return lr * min(1.0, (step + 1) / (warmup * steps), (steps - step) / (decay * steps) if decay else 1.0)


def descend(models, loss, lr):
    """One update, the gradient scaled to a norm of 1 where it is longer. Returns the norm that it had."""
    if not isinstance(loss, torch.Tensor):          # of nothing
        return 0.0
    parameters = list(dict.fromkeys(p for model in models for p in model.parameters()))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None))
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                p -= lr * g * min(1.0, 1.0 / (norm + 1e-6))
    return norm


def mean_of(seen):
    """What was seen of each token or pair, as a step's metrics: means; of ratios, also how far they are from 1."""
    how = {"ratio_max": partial(max, 1.0), "ratio_min": partial(min, 1.0)}
    return {f"train/{name}": how[name](*map(float, x)) if name in how else fmean(map(float, x)) for name, x in seen.items()}


def agree(model, state, start):
    """The parameters are the reference's, to a millionth of how far it has gone from where it started."""
    ours, moved = model.state_dict(), start.state_dict()
    assert ours.keys() == state.keys()
    error, distance = (math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in a))
                       for a, b in ((ours, state), (ours, moved)))
    assert distance > 0 and error < 1e-6 * distance, (error, distance)


def logged(line, expected):
    """These are the step's metrics of training, all of them, to a millionth. One that is nan depends on rounding."""
    found = {name: x for name, x in line.items() if name.startswith("train/")}
    found |= {name: x for name, x in expected.items() if math.isnan(x)}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


def described(line, batch):
    """The metrics of a rollout that can be read off its answers."""
    groups = groups_of(batch)
    expected = {"reward": fmean(a.reward for a in batch), "length": fmean(len(a.response) for a in batch),
                "truncated": fmean(not a.finished for a in batch)}
    if not line.get("rollout/resampled"):       # else tokens of other answers, too
        expected["tokens"] = sum(len(a.response) for a in batch)
    if len(groups[0]) > 1:
        expected["distinct"] = fmean(len({a.text for a in group}) for group in groups)
        expected["no_contrast"] = fmean(len({a.reward for a in group}) == 1 for group in groups)
    if "rollout/hidden_reward" in line:         # a reward without right and wrong
        expected["hidden_reward"] = expected.pop("reward")
        expected.pop("no_contrast", None)
    else:
        for name, right in (("length_correct", True), ("length_wrong", False)):
            if lengths := [len(a.response) for a in batch if (a.reward == 1) == right]:
                expected[name] = fmean(lengths)
    expected = {f"rollout/{name}": x for name, x in expected.items()}
    assert {name: line[name] for name in expected} == pytest.approx(expected)


def groups_of(batch):
    groups = defaultdict(list)
    for answer in batch:
        groups[answer.prompt].append(answer)
    return list(groups.values())


def row_order(step, count, epochs, parts):
    """The rows of each update: every pass takes all of them once, in an order of its own."""
    updates = [rows.tolist() for rows in minibatches(0, step, count, epochs, parts)]
    passes = [list(chain(*updates[i : i + parts])) for i in range(0, len(updates), parts)]
    assert all(sorted(rows) == list(range(count)) for rows in passes) and len(set(map(tuple, passes))) == epochs
    return updates


def drawn_from(policy, batch, temperature):
    """The log-probs at which a rollout was sampled are the policy's, as it was then, at this temperature."""
    for answer in batch:
        assert answer.sampled == pytest.approx(log_probs(policy, answer, temperature), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Where the scripts start: files of ragged records, and tiny models that say this and that
# ---------------------------------------------------------------------------------------------------------------------

REPLIES = ("Answer: x", "So. Answer: x", "Answer: y", "Happy. A. B.", "no")
ASKED = [f"Say {'it again, ' * (i % 3)}{i}." for i in range(60)]


def save(folder, name, model, tokenizer):
    torch.save({"format": FORMAT, "step": 1, "config": {}, "gpt": dataclasses.asdict(model.config),
                "tokenizer": tokenizer.state_dict(), "model": model.state_dict(), "optimizer": [], "state": {}},
               folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    write_records(folder / "said.jsonl", ({"prompt": x, "response": REPLIES[i % 5]} for i, x in enumerate(ASKED)))
    write_records(folder / "wanted.jsonl", ({"prompt": x, "answer": "x", "response": REPLIES[i % 5]}
                                            for i, x in enumerate(ASKED)))
    write_records(folder / "pairs.jsonl", ({"prompt": x, "chosen": REPLIES[i % 5], "rejected": REPLIES[(i * i + 1) % 5]}
                                           for i, x in enumerate(ASKED)))
    (folder / "text.txt").write_text(" ".join(ASKED + list(REPLIES)) * 3)

    tokenizer = Tokenizer.train(" ".join(REPLIES) * 9, 300)
    config = GPTConfig(tokenizer.vocab_size, layers=2, width=32, heads=2)
    policy, teacher, judge = (GPT(config, torch.Generator().manual_seed(i)) for i in range(3))
    for model, replies in ((policy, REPLIES), (teacher, REPLIES[1:])):
        adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(70):
            prompts = [tokenizer.render(prompt) for prompt in ASKED[step % 5 :: 5]]
            said = [tokenizer.render_response(replies[(i + step) % len(replies)]) for i in range(len(prompts))]
            tokens, lengths = pad([x + y for x, y in zip(prompts, said, strict=True)])
            mask = response_mask(torch.tensor([len(x) for x in prompts]), lengths, tokens.shape[1])
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens[:, :-1])[mask], tokens[:, 1:][mask]).backward()
            adam.step()
    judge = ScalarGPT(judge)
    torch.nn.init.normal_(judge.scalar.weight, generator=torch.Generator().manual_seed(3))
    for name, model in {"policy": policy, "teacher": teacher, "judge": judge}.items():
        save(folder, name, model, tokenizer)
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Supervised: pretraining, fine-tuning, the reward model
# ---------------------------------------------------------------------------------------------------------------------


def learned_from(path, *keys):
    """The records of a file that are not held out and have something to choose, as prompts and responses in tokens."""
    tokenizer, rows = run.tokenizer_from(saved("policy")), []
    for record in map(json.loads, read_text(path).splitlines()):
        if not is_heldout(record["prompt"]) and (len(keys) == 1 or record[keys[0]] != record[keys[1]]):
            prompt = tokenizer.render(record["prompt"])
            rows.append([(prompt + tokenizer.render_response(record[key]), len(prompt)) for key in keys])
    return rows


def test_pretraining_descends_the_mean_loss_of_all_tokens_of_a_step(play):
    _, lines, end = play(train_pretrain, 8, f"--steps {SHORT} --init policy --text text.txt --lr 0.5 --batch 2 --accumulate 3 "
                                            "--length 16", samples=False)
    model, tokenizer = load("policy"), run.tokenizer_from(saved("policy"))
    text = read_text("text.txt")
    ids = torch.tensor(tokenizer.encode(text[: int(0.95 * len(text))]))
    for step, line in enumerate(lines):
        windows = random_windows(ids, tokenizer.bos, 6, 16, run.generator(0, "batch", step)).tolist()
        loss, lr = cross_entropy(model, [(window, 1) for window in windows]), rate(0.5, step, 0.1, 0.5)
        norm = descend([model], loss, lr)
        logged(line, {"train/loss": float(loss), "train/grad_norm": norm, "train/lr": lr})
    agree(model, end["model"], load("policy"))


def test_fine_tuning_descends_the_mean_loss_of_all_response_tokens_of_a_step(play):
    _, lines, end = play(train_sft, 8, f"--steps {SHORT} --init policy --data said.jsonl --batch 7 {ROWS} 2 --lr 0.1 "
                                       f"--max-new-tokens {LIMIT}", samples=False)
    model, records = to_train(), learned_from("said.jsonl", "response")
    for step, line in enumerate(lines):
        rows = [records[i][0] for i in shuffled_batch(len(records), 7, step, seed=0)]
        loss, lr = cross_entropy(model, rows), rate(0.1, step, 0.1, 0.5)
        norm = descend([model], loss, lr)
        logged(line, {"train/loss": float(loss), "train/grad_norm": norm, "train/lr": lr})
    agree(model, end["model"], to_train())


def test_the_reward_model_descends_the_mean_loss_of_choices_read_at_last_tokens(play):
    _, lines, end = play(train_reward, 8, f"--steps {SHORT} --init policy --data pairs.jsonl --batch 7 {ROWS} 2 --lr 0.5",
                         samples=False)
    model, start = ScalarGPT(load("policy")), ScalarGPT(load("policy"))
    pairs = learned_from("pairs.jsonl", "chosen", "rejected")
    for step, line in enumerate(lines):
        picked = [pairs[i] for i in shuffled_batch(len(pairs), 7, step, seed=0)]
        margins = [model(torch.tensor([chosen]))[0, -1] - model(torch.tensor([rejected]))[0, -1]
                   for (chosen, _), (rejected, _) in picked]
        loss, lr = sum(bradley_terry(m) for m in margins) / len(margins), rate(0.5, step, 0.1, 0.5)
        seen = {"loss": [loss], "margin": margins, "accuracy": [0.5 if step == 0 else rank(float(m)) for m in margins]}
        logged(line, mean_of(seen) | {"train/grad_norm": descend([model], loss, lr), "train/lr": lr})
    agree(model, end["model"], start)


# ---------------------------------------------------------------------------------------------------------------------
# Preferences: pairs and groups
# ---------------------------------------------------------------------------------------------------------------------


def pair_loss(loss, policy, reference, chosen, rejected, seen, *, beta=0.0, label_noise=0.0, delta=0.0, gamma=0.0, nll=0.0,
              z=0.0):
    """The loss of one pair, and what is seen of it."""
    def implicit(row):
        logp, length = sum(x for x, _ in read(policy, row, SOME)), len(row[0]) - row[1]
        ref = sum(log_probs(reference, row, SOME))
        r = {"ipo": (logp - ref) / length, "slic": logp, "simpo": beta * logp / length}.get(loss, beta * (logp - ref))
        return r, logp, length

    (r_chosen, logp, length), (r_rejected, rejected_logp, _) = implicit(chosen), implicit(rejected)
    m = r_chosen - r_rejected
    f = {"dpo": lambda: bradley_terry(m),
         "cdpo": lambda: (1 - label_noise) * bradley_terry(m) + label_noise * bradley_terry(-m),
         "ipo": lambda: (m - 1 / (2 * beta)) ** 2,
         "slic": lambda: max(delta - m, 0 * m),
         "kto": lambda: (torch.sigmoid(beta * z - r_chosen) + torch.sigmoid(r_rejected - beta * z)) / 2,
         "simpo": lambda: bradley_terry(m - gamma)}[loss]() - nll * logp / length
    for name, x in {"loss": f, "chosen_logp": logp, "rejected_logp": rejected_logp, "chosen_reward": r_chosen,
                    "rejected_reward": r_rejected, "margin": m, "accuracy": rank(float(m))}.items():
        seen[name].append(x)
    return f


PAIRS = {
    "dpo": ("", {"beta": 0.3}),
    "cdpo": ("--label-noise 0.2 --beta 0.5", {"beta": 0.5, "label_noise": 0.2}),
    "ipo": ("--nll-coef 0.2 --refresh-reference 2", {"beta": 5.0, "nll": 0.2}),
    "slic": ("", {"delta": 1.0, "nll": 0.1}),
    "simpo": ("--beta 2 --gamma 0.5", {"beta": 2.0, "gamma": 0.5}),
    "kto": ("--beta 0.5 --refresh-reference 2", {"beta": 0.5}),
}


def kto_reference_point(policy, reference, pairs):
    """The mean log(pi/ref) of all responses, each after the prompt of the next pair; at least 0."""
    drifts = []
    for pair, ((next_ids, next_start), _) in zip(pairs, (*pairs[1:], pairs[0]), strict=True):
        for ids, start in pair:
            row = ([*next_ids[:next_start], *ids[start:]][: policy.config.context], next_start)
            drifts.append(sum(log_probs(policy, row, SOME)) - sum(log_probs(reference, row, SOME)))
    return max(0.0, fmean(drifts))


@pytest.mark.parametrize("loss", PAIRS)
def test_dpo_descends_the_mean_loss_of_pairs_of_a_file(loss, play):
    flags, choices = PAIRS[loss]
    _, lines, end = play(train_dpo, 4, f"--loss {loss} {flags} --init policy --data pairs.jsonl --batch 5 {ROWS} 2 "
                                       f"--lr 0.2 {SAMPLING} {NO_BEST}", samples=False)
    policy, reference = to_train(), load("policy")
    pairs = learned_from("pairs.jsonl", "chosen", "rejected")
    for step, line in enumerate(lines):
        if "refresh" in flags and step == 2:
            reference.load_state_dict(policy.state_dict())
        seen, lr = defaultdict(list), rate(0.2, step, 0.1)
        batch = [pairs[i] for i in shuffled_batch(len(pairs), 5, step, seed=0)]
        if loss == "kto":
            choices = choices | {"z": kto_reference_point(policy, reference, batch)}
            seen["reference_point"].append(choices["z"])
        losses = [pair_loss(loss, policy, reference, *pair, seen, **choices) for pair in batch]
        logged(line, mean_of(seen) | {"train/grad_norm": descend([policy], sum(losses) / 5, lr), "train/lr": lr})
    agree(policy, end["model"], to_train())


@pytest.mark.parametrize("judge", ("hidden", "model"))
def test_online_dpo_descends_the_mean_loss_of_the_pairs_that_a_judge_has_decided(judge, play):
    flags = f"--online --judge {judge} --refresh-reference 1" + (judge == "model") * " --reward-model judge"
    rollouts, lines, end = play(train_dpo, 2, f"{flags} --init policy --batch 6 {ROWS} 2 --lr 0.3 {SAMPLING} {FEW} {NO_BEST}")
    policy, reference, reward_model = load("policy"), load("policy"), load("judge")
    ties = []
    for step, (line, batch) in enumerate(zip(lines, rollouts, strict=False)):
        drawn_from(policy, batch, SOME)
        if step:
            reference.load_state_dict(policy.state_dict())
        seen, losses, lr = defaultdict(list), [], rate(0.3, step, 0.1)
        for group in groups_of(batch):
            if judge == "model":
                with torch.no_grad():
                    scores = [float(reward_model(torch.tensor([a.ids]))[0, -1].float()) for a in group]
            else:
                scores = [a.reward for a in group]
            if scores[0] != scores[1]:
                better = scores.index(max(scores))
                losses.append(pair_loss("dpo", policy, reference, group[better], group[1 - better], seen, beta=0.3))
        ties.append(1 - len(losses) / 6)
        described(line, batch)
        assert line["rollout/ties"] == pytest.approx(ties[-1])
        norm = descend([policy], sum(losses) / len(losses), lr)
        logged(line, mean_of(seen) | {"train/grad_norm": norm, "train/lr": lr})
    assert 0 < max(ties) < 1
    agree(policy, end["model"], load("policy"))


def group_loss(loss, rewards, won, margin):
    """The loss of a group with winners and losers, and D, by how much the ones are ahead of the others."""
    W, L = ([r for r, w in zip(rewards, won, strict=True) if w == kind] for kind in (True, False))
    D = sum(W) / len(W) - sum(L) / len(L)
    if loss in ("pairs", "scaled"):
        scale = math.sqrt(len(W) * len(L)) if loss == "scaled" else 1.0
        return sum(bradley_terry((i - j) / scale) for i in W for j in L), D
    return bradley_terry(D) if loss == "mean" else max(margin - D, 0 * D), D


@pytest.mark.parametrize("loss", ("pairs", "scaled", "mean", "hinge"))
def test_group_dpo_descends_the_mean_loss_of_groups(loss, play):
    rollouts, lines, end = play(train_group_dpo, 2, f"--loss {loss} --init policy --data wanted.jsonl --prompts 5 "
                                                    f"--group 4 {ROWS} 8 --beta 0.4 --lr 1 {SAMPLING} {FEW} {NO_BEST}"
                                                    + (loss == "hinge") * " --margin 0.3")
    policy, reference = to_train(), load("policy")
    for step, (line, batch) in enumerate(zip(lines, rollouts, strict=False)):
        drawn_from(policy, batch, SOME)
        described(line, batch)
        seen, total, lr = defaultdict(list), 0.0, rate(1.0, step, 0.05)
        for group in groups_of(batch):
            rewards, won = [], [a.reward == 1 for a in group]
            for answer in group:
                r = 0.0
                for (logp, log_p), ref in zip(read(policy, answer, SOME), log_probs(reference, answer, SOME), strict=True):
                    r = r + 0.4 * (logp - ref)
                    seen["entropy"].append(entropy(log_p))
                    seen["kl"].append(k3(logp, ref))
                rewards.append(r)
            if 0 < sum(won) < len(won):
                f, D = group_loss(loss, rewards, won, 0.3)
                total = total + f / 5
                seen["margin"].append(D)
                if loss == "hinge":
                    seen["active"].append(D < 0.3)
        seen["loss"].append(total)
        assert "margin" in seen
        logged(line, mean_of(seen) | {"train/grad_norm": descend([policy], total, lr), "train/lr": lr})
    assert any(line["rollout/no_contrast"] > 0 for line in lines)       # some group has no margin to average
    agree(policy, end["model"], to_train())


# ---------------------------------------------------------------------------------------------------------------------
# Policy gradients
# ---------------------------------------------------------------------------------------------------------------------


def weight(aggregate, answer, counted):
    """How much each token of an answer counts in an update, of which `counted` are the answers that count."""
    tokens = {"token_mean": sum(len(a.response) for a in counted),
              "sequence_mean": len(counted) * len(answer.response),
              "prompt_mean": len(groups_of(counted)) * sum(len(a.response) for a in counted if a.prompt == answer.prompt),
              "sequence_sum": len(counted),
              "constant": len(counted) * LIMIT}
    return 1 / tokens[aggregate]


def advantage(kind, group, i, baseline, spread):
    """How much better the i-th of these rewards is than others."""
    r, others = group[i], group[:i] + group[i + 1 :]
    return {"reward": r - baseline,
            "positive": 1.0,
            "center": r - fmean(group),
            "leave_one_out": r - fmean(others),
            "zscore": (r - fmean(group)) / (pstdev(group) + 1e-6),
            "zscore_batch": (r - fmean(group)) / (spread + 1e-6)}[kind]


def clipped(rho, A, low, high):
    """min(rho A, clip(rho) A), and whether the gain is cut off below or above."""
    below, above = A < 0 and rho < 1 - low, A > 0 and rho > 1 + high
    return (1 - low) * A if below else (1 + high) * A if above else rho * A, below, above


GRPO = SimpleNamespace(advantage="zscore", ratio="token", bound="clip", aggregate="sequence_mean", groups="all",
                       clip_low=0.2, clip_high=0.2, overlong=0.0, kl=None, kl_in="loss", kl_coef=0.0, refresh=None,
                       entropy_coef=0.0, likelihood_coef=0.0, truncated="train", baseline_decay=0.0, skip=False,
                       epochs=1, minibatches=1, stale=0, lr=1.0)


def credited(c, batch, old, ref, baseline):
    """The advantage of each answer of a rollout, or None where it is not trained on; and the mean reward."""
    R, kept = {}, {}
    for b, a in enumerate(batch):
        R[b] = a.reward
        if c.overlong:
            R[b] += min(0.0, max(-1.0, (LIMIT - c.overlong * LIMIT - len(a.response)) / (c.overlong * LIMIT)))
        if c.kl_in == "reward":
            R[b] -= c.kl_coef * sum(k1(x, y) for x, y in zip(old[b], ref[b], strict=True))
        group = [other.reward for other in batch if other.prompt == a.prompt]
        kept[b] = not ((c.groups == "drop" and max(group) == min(group)) or (c.truncated == "mask" and not a.finished)
                       or (c.advantage == "positive" and a.reward <= 0))
    members = {b: [i for i, other in enumerate(batch) if other.prompt == a.prompt] for b, a in enumerate(batch)}
    group = {b: [R[i] for i in members[b]] for b in R}
    spread = math.sqrt(fmean((R[b] - fmean(group[b])) ** 2 for b in R if kept[b])) if any(kept.values()) else 0.0
    A = [advantage(c.advantage, group[b], members[b].index(b), baseline, spread) if kept[b] else None for b in R]
    return A, fmean(R.values())


def token_objective(c, A, logp, log_p, old, ref, log_s, seen):
    """What one token adds to the objective, before its weight."""
    rho = torch.exp(logp - old) if log_s is None else torch.exp(log_s)
    seen["ratio_max"].append(rho)
    seen["ratio_min"].append(rho)
    if c.bound == "clip":
        J, below, above = clipped(rho, A, c.clip_low, c.clip_high)
        seen["clipped_low"].append(below)
        seen["clipped_high"].append(above)
    elif c.bound == "truncate":
        J = min(float(rho), 5.0) * A * logp
        seen["capped"].append(rho > 5)
    elif c.bound == "mask":
        J = rho * A if 1 / 8 <= rho <= 8 else 0.0
        seen["masked"].append(not 1 / 8 <= rho <= 8)
    elif c.bound == "soft":
        tau = 1.0 if A > 0 else 1.05
        J = 4 / tau * A / (1 + torch.exp(tau * (1 - rho)))
    else:
        J = A * logp if c.ratio == "none" else A * rho
    if c.kl_coef:
        seen["kl"].append(k3(logp, ref))
        if c.kl_in != "reward":
            J = J - c.kl_coef * (torch.exp(logp - old) if c.kl_in == "weighted" else 1.0) * c.kl(logp, ref)
    seen["entropy"].append(entropy(log_p))
    return J + c.entropy_coef * entropy(log_p)


def grpo(c, policy, rollouts, lines, demonstrations=()):
    """GRPO and its relatives, step after step."""
    reference, queue, baselines = load("policy"), [], []
    for step, (line, fresh) in enumerate(zip(lines, rollouts, strict=False)):
        if c.refresh and step and step % c.refresh == 0:
            reference.load_state_dict(policy.state_dict())
        drawn_from(policy, fresh, SOME)
        described(line, fresh)
        assert c.groups != "resample" or line["rollout/no_contrast"] == 0
        queue.append((fresh, [log_probs(policy, a, SOME) for a in fresh]))
        if len(queue) <= c.stale:
            logged(line, {})
            continue
        batch, old = queue.pop(0)
        ref = [log_probs(reference, a, SOME) for a in batch]
        past = [(c.baseline_decay ** (len(baselines) - i), x) for i, x in enumerate(baselines)] if c.baseline_decay else []
        baseline = sum(w * x for w, x in past) / sum(w for w, _ in past) if past else 0.0
        A, mean = credited(c, batch, old, ref, baseline)
        baselines.append(mean)

        seen, lr, norms, nll = defaultdict(list), rate(c.lr, step, 0.05), [], []
        updates = row_order(step, len(batch), c.epochs, c.minibatches)
        for update, rows in enumerate(updates, start=step * c.epochs * c.minibatches):
            kept = [b for b in rows if A[b] is not None]
            counted, J = [batch[b] for b in kept], 0.0
            for b in kept:
                if c.skip and abs(A[b]) < 1e-9:
                    continue
                tokens, log_s = read(policy, batch[b], SOME), None
                if c.ratio == "sequence":
                    log_s = sum(logp - x for (logp, _), x in zip(tokens, old[b], strict=True)) / len(tokens)
                w = weight(c.aggregate, batch[b], counted)
                for t, (logp, log_p) in enumerate(tokens):
                    J = J + w * token_objective(c, A[b], logp, log_p, old[b][t], ref[b][t], log_s, seen)
                    seen["mismatch_kl"].append(k3(torch.tensor(batch[b].sampled[t]), old[b][t]))
            if c.likelihood_coef:
                picks = shuffled_batch(len(demonstrations), len(groups_of(batch)), update, seed=0)
                nll.append(cross_entropy(policy, [demonstrations[i][0] for i in picks], SOME))
                J = J - c.likelihood_coef * nll[-1]
            norms.append(descend([policy], -J, lr))
        if nll:
            seen["demonstration_loss"] = nll
        logged(line, mean_of(seen) | {"train/grad_norm_max": max(norms), "train/lr": lr})


FAMILY = {
    "grpo": ("--algo grpo", {}, ()),
    "dr_grpo": ("--algo dr_grpo --minibatches 3 --kl-coef 0.3 --kl k2 --entropy-coef 0.05",
                {"advantage": "center", "aggregate": "constant", "minibatches": 3, "kl": k2, "kl_coef": 0.3,
                 "entropy_coef": 0.05, "lr": 2.0}, ("clipped_low", "clipped_high")),
    "dapo": ("--algo dapo --minibatches 2 --epochs 2 --truncated mask --kl-coef 0.1",
             {"aggregate": "prompt_mean", "groups": "resample", "clip_high": 0.28, "overlong": 0.2, "minibatches": 2,
              "epochs": 2, "truncated": "mask", "kl": k3, "kl_coef": 0.1}, ("clipped_low", "clipped_high")),
    "cispo": ("--algo cispo --stale 1 --kl-coef 0.2 --kl k1_weighted --refresh-reference 2 --minibatches 2 "
              "--aggregate token_mean",
              {"bound": "truncate", "aggregate": "token_mean", "stale": 1, "kl": k1, "kl_coef": 0.2, "kl_in": "weighted",
               "refresh": 2, "minibatches": 2, "lr": 2.0}, ("capped",)),
    "gspo": ("--algo gspo --epochs 2", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "epochs": 2},
             ("clipped_low", "clipped_high")),
    "masked_is": ("--algo masked_is --minibatches 2 --epochs 2",
                  {"advantage": "center", "bound": "mask", "aggregate": "token_mean", "minibatches": 2, "epochs": 2},
                  ("masked",)),
    "sapo": ("--algo sapo --epochs 2", {"bound": "soft", "epochs": 2}, ()),
    "scale_rl": ("--algo scale_rl --minibatches 2 --truncated mask",
                 {"advantage": "zscore_batch", "bound": "truncate", "aggregate": "prompt_mean", "groups": "drop",
                  "truncated": "mask", "minibatches": 2}, ()),
    "raft": ("--algo raft", {"advantage": "positive", "ratio": "none", "bound": "none", "aggregate": "token_mean"}, ()),
    "reinforce": ("--algo reinforce --advantage running_mean --kl-coef 0.1 --kl k1_reward --overlong 0.5 --likelihood-coef 0.2 "
                  "--epochs 2",
                  {"advantage": "reward", "ratio": "none", "bound": "none", "aggregate": "sequence_sum", "baseline_decay": 0.9,
                   "kl_coef": 0.1, "kl_in": "reward", "overlong": 0.5, "likelihood_coef": 0.2, "epochs": 2}, ()),
    "rloo": ("--algo rloo --ratio token --skip --minibatches 2",
             {"advantage": "leave_one_out", "bound": "none", "aggregate": "sequence_sum", "skip": True, "minibatches": 2}, ()),
}


@pytest.mark.parametrize("name", FAMILY)
def test_grpo_and_its_relatives_ascend_their_objective(name, play):
    flags, choices, shown = FAMILY[name]
    c = SimpleNamespace(**vars(GRPO) | choices)
    steps = 4 if c.stale else 3 if c.baseline_decay else 2
    flags += f" --init policy --data wanted.jsonl --prompts 4 --group 4 --lr {c.lr} {ROWS} 3"
    rollouts, lines, end = play(train_grpo, steps, f"{flags} {SAMPLING} {FEW} {UNCHECKED}")
    policy = to_train()
    grpo(c, policy, rollouts, lines, learned_from("said.jsonl", "response"))
    agree(policy, end["model"], to_train())
    for metric in shown if not ADAPTERS else ():            # whose B begins at 0: they have hardly moved
        assert any(line.get(f"train/{metric}", 0) > 0 for line in lines), metric


# ---- PPO: a critic, rewards per token ----


def critic_of(policy, shared):
    """With a trunk of its own, or a head on the policy's."""
    if not shared:
        return to_train("critic", head=True)
    return to_train(head=True, adapters=policy.adapters) if ADAPTERS else ScalarGPT(policy)


def values_of(critic, answer):
    """What the critic says of the state in which each token was chosen, and of the state after the last one."""
    return list(critic(torch.tensor([answer.ids]))[0, answer.start - 1 :])


def credit(answer, reward, ended, old, ref, values, kl_coef, gamma, lam):
    """The advantage and the return of each token, from the last one back."""
    n, A, credits = len(old), 0.0, []
    for t in reversed(range(n)):
        r = -kl_coef * (old[t] - ref[t]) + (reward if t == n - 1 and ended else 0.0)
        following = values[t + 1] if t < n - 1 or not ended else 0.0        # after an answer that has ended comes nothing
        A = r + gamma * following - values[t] + gamma * lam * A
        credits.append((A, A + values[t]))
    return credits[::-1]


PPO = {
    "verifier": ("--critic separate --data wanted.jsonl --gamma 0.9 --lam 0.8 --entropy-coef 0.05 --value-clip 0.05 "
                 "--clip-low 0.1 --clip-high 0.3 --kl-coef 0.1",
                 dict(shared=False, learned=False, bootstrap=False, gamma=0.9, lam=0.8, entropy_coef=0.05, value_clip=0.05,
                      value_coef=0.5, clip_low=0.1, clip_high=0.3, kl_coef=0.1, kl_target=None)),
    "learned reward": ("--critic shared --reward model --reward-model judge --truncated bootstrap --value-coef 0.2 "
                       "--kl-target 0.5",
                       dict(shared=True, learned=True, bootstrap=True, gamma=1.0, lam=1.0, entropy_coef=0.0, value_clip=0.5,
                            value_coef=0.2, clip_low=0.2, clip_high=0.2, kl_coef=0.1, kl_target=0.5)),
}


@pytest.mark.parametrize("name", PPO)
def test_ppo_ascends_its_objective_with_policy_and_critic(name, play):
    flags, choices = PPO[name]
    c = SimpleNamespace(**choices)
    flags += f" --init policy --prompts 3 --group 4 --epochs 2 --minibatches 2 --lr 1 {ROWS} 3"
    rollouts, lines, end = play(train_ppo, 3 if c.kl_target else 2, f"{flags} {SAMPLING} {FEW} {NO_BEST}")
    policy, reference, judge = to_train(), load("policy"), load("judge")
    critic, kl_coef = critic_of(policy, c.shared), c.kl_coef
    for step, (line, batch) in enumerate(zip(lines, rollouts, strict=False)):
        drawn_from(policy, batch, SOME)
        described(line, batch)
        with torch.no_grad():
            rewards = [float(judge(torch.tensor([a.ids]))[0, -1]) if c.learned else a.reward for a in batch]
            values = [[float(v) for v in values_of(critic, a)] for a in batch]
        old, ref = ([log_probs(model, a, SOME) for a in batch] for model in (policy, reference))
        credits = [credit(a, rewards[b], a.finished or not c.bootstrap, old[b], ref[b], values[b], kl_coef, c.gamma, c.lam)
                   for b, a in enumerate(batch)]
        flat = [A for row in credits for A, _ in row]
        mean, std = fmean(flat), pstdev(flat)

        seen, lr, norms = defaultdict(list), rate(1.0, step, 0.05), []
        for rows in row_order(step, len(batch), 2, 2):
            J, count = 0.0, sum(len(batch[b].response) for b in rows)
            for b in rows:
                now = values_of(critic, batch[b])
                for t, (logp, log_p) in enumerate(read(policy, batch[b], SOME)):
                    A, R = credits[b][t]
                    rho, V, V_old = torch.exp(logp - old[b][t]), now[t], values[b][t]
                    gain, below, above = clipped(rho, (A - mean) / (std + 1e-8), c.clip_low, c.clip_high)
                    near = min(max(V, V_old - c.value_clip), V_old + c.value_clip)
                    value_loss = max((V - R) ** 2, (near - R) ** 2) / 2
                    J = J + (gain - c.value_coef * value_loss + c.entropy_coef * entropy(log_p)) / count
                    for metric, x in {"ratio_max": rho, "ratio_min": rho, "clipped_low": below, "clipped_high": above,
                                      "value_loss": value_loss, "value_clipped": abs(V - V_old) > c.value_clip,
                                      "entropy": entropy(log_p)}.items():
                        seen[metric].append(x)
            norms.append(descend([policy, critic], -J, lr))
        returns = [R for row in credits for _, R in row]
        answer_kl = fmean(sum(k1(x, y) for x, y in zip(old[b], ref[b], strict=True)) for b in range(len(batch)))
        logged(line, mean_of(seen) | {"train/grad_norm_max": max(norms), "train/lr": lr, "train/kl_coef": kl_coef,
                                      "train/answer_kl": answer_kl,
                                      "train/explained_variance": 1 - pvariance(flat) / pvariance(returns)})
        if c.kl_target:
            kl_coef *= 1 + 0.1 * min(0.2, max(-0.2, answer_kl / c.kl_target - 1))
        if c.learned:
            assert line["rollout/learned_reward"] == pytest.approx(fmean(rewards), rel=1e-6)
    agree(policy, end["model"], to_train())
    if not c.shared:
        agree(critic, end["state"]["critic"], to_train("critic", head=True))
    for metric in ("clipped_low", "clipped_high", "value_clipped") if not ADAPTERS else ():
        assert any(line[f"train/{metric}"] > 0 for line in lines), metric


# ---------------------------------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------------------------------


def with_tail(log_p, ids):
    """The log-probs of these tokens, and of all others together."""
    others = [i for i in range(len(log_p)) if i not in ids]
    return torch.cat((log_p[ids], torch.logsumexp(log_p[others], 0)[None]))


DISTILL = {
    "data": ("--on data --data said.jsonl --divergence jsd --beta 0.3 --tau 2 --top-k 3",
             dict(divergence="jsd", beta=0.3, tau=2.0, top_k=3)),
    "teacher": ("--on teacher --tau 1.5", dict(divergence="forward", tau=1.5)),
    "student": ("--on student --divergence reverse", dict(divergence="reverse")),
    "sequence": ("--on student --divergence reverse --gradient sequence", dict(divergence="reverse", sequence=True)),
}


def token_divergence(student, teacher, divergence, beta=None, tau=1.0, top_k=0):
    """D(p, q) at one token, p the teacher's and q the student's distribution at temperature tau."""
    q, p = (torch.log_softmax(log_p / tau, -1) for log_p in (student, teacher))
    if top_k:
        likeliest = p.argsort(descending=True)[:top_k].tolist()
        q, p = with_tail(q, likeliest), with_tail(p, likeliest)
    if divergence == "jsd":
        m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return kl(p, q) if divergence == "forward" else kl(q, p)


@pytest.mark.parametrize("name", DISTILL)
def test_distillation_descends_the_mean_divergence_of_answers(name, play):
    flags, choices = DISTILL[name]
    flags += f" --steps {SHORT} --init policy --teacher teacher --prompts 4 --group 3 {ROWS} 7 --lr 0.5"
    rollouts, lines, end = play(train_distill, 8 if name == "data" else 2, f"{flags} --max-new-tokens {LIMIT} {FEW}",
                                samples=name != "data")
    student, teacher, said = to_train(), load("teacher"), learned_from("said.jsonl", "response")
    sequence, tau = choices.pop("sequence", False), choices.get("tau", 1.0)
    for step, line in enumerate(lines):
        if name == "data":
            groups = [[said[i][0]] for i in shuffled_batch(len(said), 12, step, seed=0)]
        else:
            drawn_from(teacher if name == "teacher" else student, rollouts[step], 1.0)
            described(line, rollouts[step])
            groups = groups_of(rollouts[step])
        seen, loss, lr = defaultdict(list), 0.0, rate(0.5, step, 0.1, 0.5)
        for group in groups:
            tokens = [read(student, answer) for answer in group]
            with torch.no_grad():
                taught = [read(teacher, answer) for answer in group]
            D = [[token_divergence(q, p, **choices) for (_, q), (_, p) in zip(x, y, strict=True)]
                 for x, y in zip(tokens, taught, strict=True)]
            to_go = [[sum(map(float, row[t + 1 :])) for t in range(max(map(len, D)))] for row in D]
            for b, row in enumerate(tokens):
                loss = loss + tau**2 * sum(D[b]) / 12
                for t, (logp, log_p) in enumerate(row):
                    seen["divergence"].append(D[b][t])
                    seen["entropy"].append(entropy(log_p))
                    if sequence:
                        others = fmean(to_go[i][t] for i in range(len(group)) if i != b)
                        loss = loss + (to_go[b][t] - others) * logp / 12
        norm = descend([student], loss, lr)
        logged(line, mean_of(seen) | {"train/grad_norm": norm, "train/lr": lr})
    agree(student, end["model"], to_train())


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


ADAPTED = {
    "fine-tuning": test_fine_tuning_descends_the_mean_loss_of_all_response_tokens_of_a_step,
    "pairs": partial(test_dpo_descends_the_mean_loss_of_pairs_of_a_file, "dpo"),
    "groups": partial(test_group_dpo_descends_the_mean_loss_of_groups, "mean"),
    "kl in the reward": partial(test_grpo_and_its_relatives_ascend_their_objective, "reinforce"),
    "a critic of its own": partial(test_ppo_ascends_its_objective_with_policy_and_critic, "verifier"),
    "a shared critic": partial(test_ppo_ascends_its_objective_with_policy_and_critic, "learned reward"),
    "distillation": partial(test_distillation_descends_the_mean_divergence_of_answers, "student"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_with_adapters_a_script_takes_the_step_of_its_objective_in_A_and_B(name, play, monkeypatch):
    """The same steps, with W + (alpha / R) B A written out; what is sampled comes from merged weights."""
    monkeypatch.setitem(globals(), "ADAPTERS", ["--lora-rank", "2", "--lora-alpha", "3"])
    ADAPTED[name](play)
