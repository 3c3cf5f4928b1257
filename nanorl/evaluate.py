"""How well a checkpoint answers held-out problems, with several ways to spend tokens on them:

    python -m nanorl.evaluate runs/sft runs/grpo                                   several runs side by side
    python -m nanorl.evaluate runs/sft --method sample power --alpha 2 4           several methods
    python -m nanorl.evaluate runs/sft --out search.json --plot search.png         kept and drawn

--method            what the answer is
greedy              always the most likely token
sample              one answer at --temperature: the mean over --n of them
low_temperature     one answer at temperature 1/alpha, for each --alpha: the baseline for power
direct, worked      one answer whose first tokens are forced, so that it is given directly or worked out
majority            the most frequent of n answers; ties are broken at random
weighted            the same, with votes weighted by the probability of the answer
best_of_n           the best of n answers, by each --scorer; with the verifier it is pass@n
power               one answer from p(y)^alpha / Z, for each --alpha, after n steps of Metropolis-Hastings
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from nanorl import run
from nanorl.errors import UserError
from nanorl.gpt import GPT, ScalarGPT
from nanorl.heldout import heldout_problems
from nanorl.plot import check_can_draw, draw_search
from nanorl.rollout import right_or_reward
from nanorl.sample import Sampling
from nanorl.scaling import quantile_of_t
from nanorl.search import (ROWS, Answers, Style, autocorrelation, best_of_n, doublings, opening, power_sample,
                           sample_answers, vote_value)
from nanorl.tasks import FileTask, Problem, Task, default_max_new_tokens, grade, is_ours
from nanorl.tokenizer import Tokenizer

Method = Literal["greedy", "sample", "low_temperature", "direct", "worked", "majority", "weighted", "best_of_n", "power"]

SPLITS = {"all": "problems", "train": "training problems", "heldout": "held-out problems"}

# Flags that only some methods use: the default, and those methods.
ONLY_SOME = {"scorer": (("verifier",), {"best_of_n"}), "alpha": ((2.0, 4.0), {"low_temperature", "power"}),
             "proposal": (("base",), {"power"}), "steps": (128, {"power"}), "chains": (2, {"power"})}


@dataclass(frozen=True, kw_only=True)
class Config(run.DeviceConfig):
    runs: tuple[str, ...]       # runs, checkpoints or pretrained models to compare
    method: tuple[Method, ...] = ("greedy", "sample", "majority", "best_of_n")    # see the table above
    task: str = ""              # the problems to answer (default: the task of the first run, or else addition)
    data: str = ""              # JSON records to answer instead, such as {"prompt", "answer"} or {"question", "answer"}
    verifier: run.VerifierName | None = None    # of --data (default: the first run's, or exact)
    reward: str = ""            # FILE.py:NAME, a function (prompt, response, record) -> number, that judges instead
    split: Literal[*SPLITS] | None = None    # by the prompt's hash (default: heldout; all of data that no run has seen)
    problems: run.Count | None = None    # how many at most; duplicates are dropped (default: 300; of data, every row)
    n: run.Count = 16           # answers per problem; methods with one answer are averaged over all n
    temperature: run.Positive = 1.0    # for all methods that do not set their own
    max_new_tokens: run.Count | None = None    # an answer longer than this is cut, and wrong (default: the task's)
    scorer: tuple[Literal["verifier", "logprob", "reward"], ...] | None = None    # picks the best of n (default: verifier)
    reward_model: str = ""      # a run of train_reward.py, for --scorer reward
    alpha: tuple[run.Positive, ...] | None = None    # powers (default: 2 and 4)
    proposal: tuple[Literal["base", "tempered"], ...] | None = None    # power: proposals at temperature 1 (default) or 1/alpha
    steps: run.Count | None = None    # power: steps of each chain (default: 128)
    chains: run.Count | None = None    # power: chains for each problem (default: 2)
    out: str = ""               # JSON file for the table and the settings
    plot: str = ""              # PNG of accuracy against tokens; needs matplotlib

    def __post_init__(self):
        """Fill in the flags that were not given, and refuse those that no method uses."""
        for flag, (value, methods) in ONLY_SOME.items():
            self.require(getattr(self, flag) is None or methods & set(self.method), f"method {flag}",
                         f"none of these methods uses it; expected {' or '.join(sorted(methods))}")
            self.default(flag, value)
        self.require(("reward" in self.scorer) == bool(self.reward_model), "scorer reward_model",
                     "--scorer reward and --reward-model go together; give both or neither")
        run.check_judge(self)
        self.require(all(1 / alpha < math.inf for alpha in self.alpha), "alpha",
                     "the temperature 1/alpha is not finite; expected numbers above 1e-300")


@dataclass
class Row:
    """A row of the table."""

    run: str
    method: str
    n: int              # answers, or steps of the chain
    value: float        # accuracy; or the reward, hidden or not, where the task calls no answer right
    low: float          # its 95 % confidence interval, over problems
    high: float
    tokens: float       # sampled per problem
    lenient: float | None = None    # accuracy whatever the format, where the verifier can tell


def interval(values: Tensor, shares: bool = True) -> tuple[float, float]:
    """95 % confidence interval of the mean of one value per problem.       [P]

    For shares, Wilson's, which never leaves [0, 1] and keeps a width even if all answers are right:

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)                   (Wilson 1927; Brown et al. 2001)

    with n = P coin flips; values that are means over several answers vary less, like n = P p(1-p) / Var(values) coin flips.
    For anything else, mean +- t std / sqrt(P), t by Student's distribution; for one value, anything.
    """
    n, mean, variance, z = len(values), float(values.double().mean()), float(values.double().var(correction=0)), 1.96
    if not shares:
        half = quantile_of_t(n - 1) * (variance / (n - 1)) ** 0.5 if n > 1 else math.inf
        return mean - half, mean + half
    if variance > 0:
        n *= mean * (1 - mean) / variance
    centre, half = mean + z**2 / (2 * n), z * (mean * (1 - mean) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


def vote(answers: Answers, n: int, weighted: bool) -> Tensor:
    """The accuracy of a vote of n: the mean over as many disjoint votes as there are answers for.       -> [P]

    Weighted votes are in proportion to the probability with which the answer was sampled.
    """
    values = []
    for ballots, right, logp in zip(answers.ballots, answers.values.tolist(), answers.logp.double(), strict=True):
        parts = [slice(i, i + n) for i in range(0, len(ballots) - n + 1, n)]
        worth = [vote_value(ballots[part], right[part], torch.softmax(logp[part], 0).tolist() if weighted else None)
                 for part in parts]
        values.append(sum(worth) / len(worth))
    return torch.tensor(values)


@dataclass
class Evaluation:
    """One run, evaluated on the problems with every method."""

    cfg: Config
    task: Task
    problems: list[Problem]
    name: str
    model: GPT
    tokenizer: Tokenizer
    reward_model: ScalarGPT | None
    sampling: Sampling  # all but its temperature
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)      # on how the chains moved

    def add(self, method: str, n: int, values: Tensor, tokens: Tensor, lenient: Tensor | None = None) -> None:
        """Add a row, from values and token counts: one per problem, or several, which are averaged. An answer that could not
        be scored has no part in the mean."""
        values, tokens = (x.double().view(len(self.problems), -1) for x in (values, tokens))
        values = values.nanmean(-1)
        values = values[~values.isnan()]
        if not len(values):
            raise UserError(f"{self.name}, {method}: none of the answers could be scored")
        low, high = interval(values, self.task.right_reward is not None)
        self.rows.append(Row(self.name, method, n, float(values.mean()), low, high, float(tokens.mean()),
                             None if lenient is None else float(lenient.double().mean())))

    def answers(self, purpose: str, samples: int, temperature: float, style: Style | None = None) -> Answers:
        return sample_answers(self.model, self.tokenizer, self.task, self.problems,
                              replace(self.sampling, temperature=temperature), samples=samples, seed=self.cfg.seed,
                              purpose=purpose, style=style, reward_model=self.reward_model, quiet=False)

    @functools.cached_property
    def sampled(self) -> Answers:
        """The answers that votes and scorers choose from."""
        return self.answers("sample", self.cfg.n, self.cfg.temperature)

    def alone(self, method: str, found: Answers) -> None:
        """Add the row of a method with one answer: the mean over all that were sampled."""
        self.add(method, 1, found.values, found.tokens, found.lenient)

    def choose(self, method: str, values: Callable[[int], Tensor]) -> None:
        """Add rows for 1, 2, 4, ... of the sampled answers: values(n) [P] is the result of the vote or the scorer on n."""
        if unscored := int(self.sampled.values.isnan().sum()):
            raise UserError(f"--method {method}: {unscored} of {self.sampled.values.numel()} answers could not be scored, so "
                            "that none is the best; expected --method greedy or sample")
        for n in doublings(self.cfg.n):
            self.add(method, n, values(n), n * self.sampled.tokens.double().mean(-1))

    def walk(self, alpha: float, proposal: str) -> None:
        """Power sampling: add rows after 0, 1, 2, 4, ... steps, and a note."""
        if self.task.max_actions > 1:
            raise UserError(f"--method power: {self.task} has turns, and a chain proposes one answer; expected another method")
        cfg, title, size = self.cfg, f"power {alpha:g}, {proposal}", max(1, ROWS // self.cfg.chains)
        rewards, tokens = ({step: [] for step in (0, *doublings(cfg.steps))} for _ in range(2))
        traces, moved, tried = [], 0, 0
        for i in range(0, len(self.problems), size):
            part, trace = self.problems[i : i + size], []
            asked = [problem for problem in part for _ in range(cfg.chains)]
            chains = power_sample(self.model, [self.tokenizer.render(problem.conversation) for problem in part], alpha=alpha,
                                  steps=cfg.steps, chains=cfg.chains, temperature=1.0 if proposal == "base" else 1 / alpha,
                                  max_new_tokens=self.sampling.max_new_tokens, stop_ids=self.tokenizer.stop_ids,
                                  seed=run.derive(cfg.seed, title, i))
            for step, now in enumerate(tqdm(chains, desc=title, total=cfg.steps + 1, leave=False)):
                moved, tried = moved + int(now.accepted.sum()), tried + int(now.proposed.sum())
                trace.append(now.logp.cpu().view(len(part), cfg.chains))
                if step in rewards:
                    texts = [self.tokenizer.decode(ids) for ids in now.rollout.responses()]
                    rewards[step] += grade(self.task, asked, texts, now.rollout.finished.tolist()).rewards
                    tokens[step] += now.sampled.tolist()
            traces.append(torch.stack(trace))
        for step in rewards:
            self.add(title, step, right_or_reward(self.task, torch.tensor(rewards[step])), torch.tensor(tokens[step]))
        self.notes.append(f"{self.name}, {title}: {moved / max(tried, 1):.0%} of the proposals accepted")
        if cfg.chains > 1:
            rho = autocorrelation(torch.cat(traces, dim=1)[cfg.steps // 2 :]).tolist()
            self.notes[-1] += ("; over the second half of the steps, log p has an autocorrelation of "
                               + ", ".join(f"{rho[k]:.2f} after {k}" for k in doublings(len(rho) - 1)))

    def measure(self) -> None:
        """Add the rows, one or more for each method."""
        cfg = self.cfg
        for method in cfg.method:
            match method:
                case "greedy":
                    self.alone(method, self.answers(method, 1, 0.0))
                case "sample":
                    self.alone(method, self.sampled)
                case "low_temperature":
                    for alpha in cfg.alpha:
                        name = f"temperature 1/{alpha:g}"
                        self.alone(name, self.answers(name, cfg.n, 1 / alpha))
                case "direct" | "worked":
                    self.alone(method, self.answers(method, cfg.n, cfg.temperature, style=method))
                case "majority" | "weighted":
                    self.choose(method, functools.partial(vote, self.sampled, weighted=method == "weighted"))
                case "best_of_n":
                    found = self.sampled
                    scores = {"verifier": found.values, "logprob": found.logp, "reward": found.learned}
                    for scorer in cfg.scorer:
                        self.choose(f"best by {scorer}", functools.partial(best_of_n, scores[scorer], found.values))
                case "power":
                    for alpha, proposal in itertools.product(cfg.alpha, cfg.proposal):
                        self.walk(alpha, proposal)


def table(rows: list[Row], measured: str) -> str:
    """The table in Markdown, with aligned columns."""
    cells = [["run", "method", "n", measured, "95 % interval", "tokens per problem", "lenient"]]
    cells += [[r.run, r.method, str(r.n), f"{r.value:.3f}", f"{r.low:.3f} to {r.high:.3f}", f"{r.tokens:,.0f}",
               "" if r.lenient is None else f"{r.lenient:.3f}"] for r in rows]
    if all(r.lenient is None for r in rows):
        cells = [line[:-1] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def load_runs(cfg: Config) -> list[Evaluation]:
    """Check everything that can be wrong with flags and files (UserError), then load the runs."""
    device = run.find_device(cfg.device)
    for path in filter(None, (cfg.out, cfg.plot)):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: cannot be written; expected a file in a directory that exists")
    if cfg.plot:
        check_can_draw(Path(cfg.plot))
    checkpoints = {path: run.load_checkpoint(path, "policy") for path in cfg.runs}
    trained = checkpoints[cfg.runs[0]]["config"]
    before = trained.get("task") or "addition"
    own = trained.get("data") or ("" if is_ours(before) else before)
    if own and not cfg.task and not cfg.data:
        raise UserError(f"{cfg.runs[0]}: was trained on {own}; say what to ask, with --task or --data")
    name = cfg.task or (before if is_ours(before) else "addition")
    verifier = cfg.verifier or (trained.get("verifier") if cfg.data and not cfg.reward else None)
    task = run.choose_task(name, cfg.data, needs_verifier=False, verifier=verifier, reward=cfg.reward)
    if comparing := {"majority", "weighted", "direct", "worked"}.intersection(cfg.method):
        task.require_right(f"--method {min(comparing)}:")
    run.warn(task.warnings())
    practised = {Path(checkpoint["config"].get("data") or "").resolve() for checkpoint in checkpoints.values()}
    cfg.default("split", "all" if cfg.data and Path(cfg.data).resolve() not in practised else "heldout")
    cfg.default("problems", len(task.examples()) if isinstance(task, FileTask) else 300)
    # Without duplicates, which would count as independent.
    problems = list(dict.fromkeys(heldout_problems(task, cfg.problems, cfg.seed, cfg.split)))
    sampling = Sampling(cfg.max_new_tokens or default_max_new_tokens(name), compile=run.wants_compile(cfg, device))
    evaluations = []
    for path, checkpoint in checkpoints.items():
        tokenizer, model = run.tokenizer_from(checkpoint), run.model_from(checkpoint, device)
        reward_model = run.load_frozen(cfg.reward_model, "reward model", tokenizer, device) if cfg.reward_model else None
        styles = [None, *({"direct", "worked"} & set(cfg.method))]
        prompts = [tokenizer.render(problem.conversation) + (opening(task, tokenizer, problem, style) if style else [])
                   for problem in problems for style in styles]
        asked = [problem.prompt for problem in problems for _ in styles]
        run.check_fits_context(prompts, task.response_limit(sampling.max_new_tokens), model, reward_model, texts=asked)
        run.warn(run.cut_answers(task, tokenizer, sampling.max_new_tokens))
        evaluations.append(Evaluation(cfg, task, problems, path, model, tokenizer, reward_model, sampling))
    return evaluations


@run.user_errors_as_sentences
def main(cfg: Config) -> None:
    try:
        evaluations = load_runs(cfg)
        task, problems, device = evaluations[0].task, evaluations[0].problems, evaluations[0].model.head.weight.device
        for evaluation in evaluations:
            with run.autocast(device, cfg.dtype):
                evaluation.measure()
        rows = [row for evaluation in evaluations for row in evaluation.rows]
        notes = [note for evaluation in evaluations for note in evaluation.notes]
        try:
            if cfg.out:
                kept = {"settings": asdict(cfg), "task": str(task), "rows": [asdict(row) for row in rows], "chains": notes}
                run.write_atomically(Path(cfg.out), lambda f: f.write((json.dumps(kept, indent=1) + "\n").encode()))
            if cfg.plot:
                draw_search([asdict(row) for row in rows], task.measured, Path(cfg.plot))
        finally:                # what was measured is shown, even if it cannot be written
            print(f"{len(problems)} {SPLITS[cfg.split]} of {task}, on {device.type}.\n\n{table(rows, task.measured)}")
            print("".join(f"\n{note}." for note in notes))
    except (FloatingPointError, OSError) as e:
        raise UserError(str(e)) from None


if __name__ == "__main__":
    try:
        main(run.parse(Config))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
