"""How well a checkpoint answers held-out problems, by several ways of spending tokens on them:

    python -m nanorl.evaluate runs/sft runs/grpo                                   several runs side by side
    python -m nanorl.evaluate runs/sft --method sample power --alpha 2 4           several methods
    python -m nanorl.evaluate runs/sft --out search.json --plot search.png         kept and drawn

--method            what the answer is
greedy              the most likely token, always
sample              one answer at --temperature
low_temperature     one answer at temperature 1/alpha, for each --alpha: what power is to be compared with
direct, worked      one answer whose first tokens are forced, so that it blurts or works
majority            the most frequent of n answers; a tie is settled by a fair draw
weighted            the same, but each answer's vote weighs its probability
best_of_n           the best of n answers, by each --scorer; by the verifier it is pass@n
power               one answer from p(y)^alpha / Z, for each --alpha, by Metropolis-Hastings: after n steps of the chain
"""

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from nanorl import run
from nanorl.gpt import GPT, ScalarGPT
from nanorl.plot import draw_search, pyplot
from nanorl.rollout import answer, check_room, choose_task, heldout_problems, learned_rewards, load_reward_model
from nanorl.search import autocorrelation, best_of_n, doublings, opening, power_sample, vote_value
from nanorl.tasks import Problem, Task, answer_room
from nanorl.tokenizer import Tokenizer

Way = Literal["direct", "worked"]
Method = Literal["greedy", "sample", "low_temperature", "direct", "worked", "majority", "weighted", "best_of_n", "power"]
ROWS = 1024     # answers in memory at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    runs: tuple[str, ...]       # runs, or checkpoints, to compare
    method: tuple[Method, ...] = ("greedy", "sample", "majority", "best_of_n")    # see the table above
    task: str = ""              # what to ask (default: what the first run was trained on, or else addition)
    difficulty: run.Natural = 0  # of the task, 0 is its own default
    data: str = ""              # JSONL records {"prompt", "answer"}, whose held-out ones are asked instead
    problems: run.Count = 300   # held-out problems
    n: run.Count = 16           # answers to each of them, where a method wants more than one
    temperature: run.Positive = 1.0    # of all methods that do not say otherwise
    max_new_tokens: run.Count | None = None    # an answer longer than this is cut, and wrong (default: the task's)
    scorer: tuple[Literal["verifier", "logprob", "reward"], ...] = ("verifier",)    # who chooses the best of n
    reward_model: str = ""      # run of train_reward.py, for --scorer reward
    alpha: tuple[run.Positive, ...] = (2.0, 4.0)    # powers
    proposal: tuple[Literal["base", "tempered"], ...] = ("base",)    # power: new ends from the model, or at temperature 1/alpha
    steps: run.Count = 128      # power: steps of each chain
    chains: run.Count = 2       # power: chains for each problem
    seed: run.Natural = 0       # of the problems and of the answers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto takes cuda, then mps, then cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # of matrix products; auto is bfloat16 on cuda
    compile: bool | None = None  # compile the decoding step; by default on cuda only
    out: str = ""               # JSON file for the table and the settings
    plot: str = ""              # PNG of accuracy against tokens; needs matplotlib


@dataclass
class Row:
    """A line of the table."""

    run: str
    method: str
    n: int              # answers, or steps of the chain
    accuracy: float     # or the hidden reward
    low: float          # its 95 % confidence interval, over problems
    high: float
    tokens: float       # sampled per problem


@dataclass
class Answers:
    """n answers to each of P problems."""

    rewards: Tensor     # [P, n]
    tokens: Tensor      # [P, n] sampled or forced
    logp: Tensor        # [P, n] log p(y) of what was sampled, in nats
    learned: Tensor     # [P, n] what the reward model says of them; zeros without one
    ballots: list[list[str | None]]


def interval(values: Tensor, share: bool = True) -> tuple[float, float]:
    """95 % confidence interval of the mean of one value per problem.       [P]

    For shares, Wilson's: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), which never leaves [0, 1] and is no point
    where all is right. Where the values are means over several answers, n is the number of coin flips of their variance.
    Anything else is mean +- z std / sqrt(n).                                       (Wilson 1927; Brown et al. 2001)
    """
    n, mean, variance, z = len(values), float(values.double().mean()), float(values.double().var(correction=0)), 1.96
    if not share:
        half = z * (variance / n) ** 0.5
        return mean - half, mean + half
    if variance > 0:
        n *= mean * (1 - mean) / variance
    centre, half = mean + z**2 / (2 * n), z * (mean * (1 - mean) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


def vote(answers: Answers, n: int, weighted: bool) -> Tensor:
    """The accuracy of a vote of n, averaged over as many disjoint votes as there are answers for.       -> [P]"""
    weights = (answers.logp - answers.logp.amax(-1, keepdim=True)).exp() if weighted else torch.ones_like(answers.logp)
    parts = [slice(i, i + n) for i in range(0, answers.rewards.shape[1] - n + 1, n)]
    return torch.tensor([
        sum(vote_value(ballots[part], values[part], weight[part]) for part in parts) / len(parts)
        for ballots, values, weight in zip(answers.ballots, answers.rewards.tolist(), weights.tolist(), strict=True)])


@dataclass
class Evaluation:
    """One run, asked the problems by every method."""

    cfg: Config
    task: Task
    problems: list[Problem]
    name: str
    model: GPT
    tokenizer: Tokenizer
    reward_model: ScalarGPT | None
    how: dict           # max_new_tokens and compile, for `generate`
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, method: str, n: int, values: Tensor, tokens: Tensor) -> None:
        """A row, from one value and one count of tokens for each problem."""
        low, high = interval(values, self.task.verifiable)
        self.rows.append(Row(self.name, method, n, float(values.double().mean()), low, high, float(tokens.double().mean())))

    def ask(self, samples: int, temperature: float, way: Way | None, title: str) -> Answers:
        """`samples` answers to each problem, few problems at a time: their caches take memory."""
        parts, size = [], max(1, ROWS // samples)
        for i in tqdm(range(0, len(self.problems), size), desc=title, leave=False):
            asked = self.problems[i : i + size]
            begun = [opening(self.task, self.tokenizer, problem, way) if way else [] for problem in asked]
            found = answer(self.model, self.tokenizer, self.task, asked, samples=samples, openings=begun,
                           temperature=temperature, seed=run.derive(self.cfg.seed, "evaluate", i), **self.how)
            said, shape = found.rollout, found.rewards.shape
            tokens = said.lengths - said.prompt_lengths + torch.tensor([len(ids) for ids in begun]).to(
                said.lengths.device).repeat_interleave(samples)
            learned = learned_rewards(self.reward_model, said, 64) if self.reward_model else torch.zeros(len(said.tokens))
            ballots = [self.task.ballot(text) if done else None
                       for text, done in zip(found.texts, said.finished.tolist(), strict=True)]
            parts.append(Answers(found.rewards, *(x.cpu().view(shape) for x in (tokens, said.logp.sum(-1), learned)),
                                 [ballots[p * samples : (p + 1) * samples] for p in range(len(asked))]))
        return Answers(*(torch.cat([getattr(part, name) for part in parts])
                         for name in ("rewards", "tokens", "logp", "learned")),
                       [ballots for part in parts for ballots in part.ballots])

    def walk(self, alpha: float, proposal: str, title: str) -> None:
        """Power sampling: a row for 0, 1, 2, 4, ... steps, and a note on how the chains have moved."""
        cfg, C = self.cfg, self.cfg.chains
        marks, size, moved, tried, traces = [0, *doublings(cfg.steps)], max(1, ROWS // C), 0, 0, []
        values, tokens = ({mark: [] for mark in marks} for _ in range(2))
        for i in range(0, len(self.problems), size):
            asked, trace = self.problems[i : i + size], []
            chains = power_sample(self.model, [self.tokenizer.render(problem.prompt) for problem in asked], alpha=alpha,
                                  steps=cfg.steps, temperature=1.0 if proposal == "base" else 1 / alpha, chains=C,
                                  stop_ids={self.tokenizer.end}, seed=run.derive(cfg.seed, title, i), **self.how)
            for step, now in enumerate(tqdm(chains, desc=title, total=cfg.steps + 1, leave=False)):
                moved, tried = moved + int(now.accepted.sum()), tried + int(now.proposed.sum())
                trace.append(now.logp.cpu().view(len(asked), C))
                if step in marks:
                    texts = [self.tokenizer.decode(ids) for ids in now.rollout.responses()]
                    rewards = self.task.grades([problem for problem in asked for _ in range(C)], texts,
                                               now.rollout.finished.tolist())
                    values[step].append(torch.tensor(rewards).view(len(asked), C).mean(-1))
                    tokens[step].append(now.sampled.cpu().double().view(len(asked), C).mean(-1))
            traces.append(torch.stack(trace))
        for mark in marks:
            self.add(title, mark, torch.cat(values[mark]), torch.cat(tokens[mark]))
        rho = autocorrelation(torch.cat(traces, dim=1)[cfg.steps // 2 :])
        remembered = ", ".join(f"{float(rho[k]):.2f} after {k}" for k in doublings(len(rho)) if k < len(rho))
        self.notes.append(f"{self.name}, {title}: {moved / max(tried, 1):.0%} of the proposals accepted; autocorrelation of "
                          f"log p over the second half of the steps: {remembered or 'none'}")

    def measure(self) -> None:
        """Fill the rows: one or several for each method."""
        cfg = self.cfg
        sample = functools.cache(lambda: self.ask(cfg.n, cfg.temperature, None, "sample"))      # shared by what chooses

        def alone(method: str, found: Answers) -> None:
            self.add(method, 1, found.rewards.double().mean(-1), found.tokens.double().mean(-1))

        for method in cfg.method:
            match method:
                case "greedy":
                    alone(method, self.ask(1, 0.0, None, method))
                case "sample":
                    alone(method, sample())
                case "low_temperature":
                    for alpha in cfg.alpha:
                        alone(f"temperature 1/{alpha:g}", self.ask(cfg.n, 1 / alpha, None, f"temperature 1/{alpha:g}"))
                case "direct" | "worked":
                    alone(method, self.ask(cfg.n, cfg.temperature, method, method))
                case "majority" | "weighted":
                    for n in doublings(cfg.n):
                        self.add(method, n, vote(sample(), n, method == "weighted"), n * sample().tokens.double().mean(-1))
                case "best_of_n":
                    found = sample()
                    for scorer in cfg.scorer:
                        scores = {"verifier": found.rewards, "logprob": found.logp, "reward": found.learned}[scorer]
                        for n in doublings(cfg.n):
                            self.add(f"best by {scorer}", n, best_of_n(scores, found.rewards, n),
                                     n * found.tokens.double().mean(-1))
                case "power":
                    for alpha in cfg.alpha:
                        for proposal in cfg.proposal:
                            self.walk(alpha, proposal, f"power {alpha:g}, {proposal}")


def table(rows: list[Row], measured: str) -> str:
    """Markdown, and aligned for the eye."""
    cells = [["run", "method", "n", measured, "95 % interval", "tokens per problem"]]
    cells += [[r.run, r.method, str(r.n), f"{r.accuracy:.3f}", f"{r.low:.3f} to {r.high:.3f}", f"{r.tokens:,.0f}"]
              for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(cfg: Config) -> None:
    with run.user_errors():
        device = run.find_device(cfg.device)
        for path in filter(None, (cfg.out, cfg.plot)):
            if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{path}: not a file that can be written; expected one in a directory that exists")
        if cfg.plot:
            pyplot()                # or a sentence, before any work
        checkpoints = {path: run.load_checkpoint(path, "policy") for path in cfg.runs}
        trained = checkpoints[cfg.runs[0]]["config"]
        name = cfg.task or trained.get("task", "addition")
        difficulty = cfg.difficulty or (0 if cfg.task else trained.get("difficulty", 0))
        task = choose_task(name, difficulty, cfg.data, needs_verifier=False)
        comparing = {"majority", "weighted", "direct", "worked"}.intersection(cfg.method)
        if comparing and not task.verifiable:
            raise ValueError(f"--method {min(comparing)}: no answer to {task.name} is right or wrong; expected another method")
        if ("reward" in cfg.scorer) != bool(cfg.reward_model):
            raise ValueError(f"--scorer {' '.join(cfg.scorer)} --reward-model {cfg.reward_model}: the one needs the other")
        problems = heldout_problems(task, cfg.problems, cfg.seed)
        how = dict(max_new_tokens=cfg.max_new_tokens or answer_room(name), compile=run.wants_compile(cfg, device))
        evaluations = []
        for path, checkpoint in checkpoints.items():
            tokenizer, model = run.tokenizer_from(checkpoint), run.model_from(checkpoint, device)
            reward_model = load_reward_model(cfg.reward_model, tokenizer, device) if cfg.reward_model else None
            ways = [None, *({"direct", "worked"} & set(cfg.method))]
            check_room(model, [tokenizer.render(problem.prompt) + (opening(task, tokenizer, problem, way) if way else [])
                               for problem in problems for way in ways], how["max_new_tokens"])
            evaluations.append(Evaluation(cfg, task, problems, path, model, tokenizer, reward_model, how))

    for evaluation in evaluations:
        with run.autocast(device, cfg.dtype):
            evaluation.measure()
    rows, notes = ([each for evaluation in evaluations for each in getattr(evaluation, name)] for name in ("rows", "notes"))
    measured = "accuracy" if task.verifiable else "hidden reward"
    print(f"{cfg.problems} held-out problems of {task.name}, on {device.type}.\n\n{table(rows, measured)}")
    print("".join(f"\n{note}." for note in notes))
    with run.user_errors():
        if cfg.out:
            kept = {"settings": asdict(cfg), "task": task.name, "rows": [asdict(row) for row in rows], "chains": notes}
            run.write_atomically(Path(cfg.out), lambda f: f.write((json.dumps(kept, indent=1) + "\n").encode()))
        if cfg.plot:
            draw_search([asdict(row) for row in rows], measured, Path(cfg.plot))


if __name__ == "__main__":
    main(run.parse(Config))
