"""What `python -m nanorl.view` shows: some groups of a training step, kept whole in rollouts.jsonl, with what the update saw at
each token and what it did to it. Kept are steps that begin with an evaluation, and the last.

A line is a group, a prompt with its answers. Its lists have one entry for each token of the prompt or of the answer, stop token
included. What an environment said between two actions belongs to the answer, but has no log-probs, and `mask` is false there.
Numbers have six significant digits; null stands for one that is not finite or does not exist.

    step, group                         the group is counted within the rollout
    prompt, prompt_ids, prompt_tokens   its text, and each token's id and text
    metrics                             of this group alone, where a loss compares whole answers: a pair's margin, ...
    answers
      text, ids, tokens
      reward, parts, labels             what was paid, for what; right or wrong, worked or direct; chosen or rejected; ...
      finished                          false: truncated
      sampled                           log-prob when it was sampled
      before, after                     log-prob before the first optimizer step of this training step, and after the last
      passes                            one for each time that the answer was trained on in this step; none: it was left out
        update                          in which optimizer step of this training step
        logp, entropy                   by the policy that this optimizer step begins with
        ratio                           exp(logp - old_logp), of each token, whatever ratio the loss uses
        advantage, weight, mask
        gradient                        dL/dlogp, retained from the backward pass of the run. Where it is negative, descent
                                        raises the log-prob. What an entropy bonus adds does not come through logp.
        held                            an advantage and a weight, but no gradient: the bound took it. A KL term hides this
        ...                             what else a script has: reference, its log-prob; value and returns (PPO); a token's part
                                        of the implicit reward (group losses)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanorl.rollout import has_contrast, right_or_reward, score_rollout
from nanorl.run import Run, autocast, ranks
from nanorl.sample import Rollout
from nanorl.tasks import Task


def keep_now(out: Run) -> int:
    """How many groups of this step are kept."""
    return out.cfg.keep_groups if out.step % out.cfg.eval_every == 0 or out.step == out.cfg.steps - 1 else 0


def watch_groups(out: Run, task: Task, rollout: Rollout, rewards: Tensor, parts: dict[str, Tensor]) -> "WatchedGroups":
    """The first groups of a rollout whose rewards [P, G], the task's, differ, then the first of the others. `parts`: further
    numbers of each answer, [P, G] or [B] each."""
    contrast = has_contrast(rewards).tolist()
    right = right_or_reward(task, rewards).flatten().tolist() if task.right_reward is not None else None
    total, named = numbers(rewards.flatten()), {name: numbers(x.flatten()) for name, x in parts.items()}

    def describe(row: int, text: str) -> dict[str, Any]:
        labels = [{1.0: "right", 0.0: "wrong"}.get(right[row], "not scored")] if right else []
        labels += [style] if task.verifiable and (style := task.style(text)) else []
        return {"reward": total[row], "parts": {name: part[row] for name, part in named.items()}, "labels": labels}

    return WatchedGroups(out, rollout, sorted(range(len(contrast)), key=lambda p: not contrast[p])[: keep_now(out)], describe)


def watch_pairs(out: Run, rollout: Rollout, pairs: Tensor, rewards: Tensor | None) -> "WatchedGroups":
    """The first pairs of a step: rows of a rollout, chosen and rejected [N, 2]. `rewards` by row, where a judge gave some."""
    chosen, given = set(pairs[:, 0].tolist()), None if rewards is None else numbers(rewards.flatten())

    def describe(row: int, text: str) -> dict[str, Any]:
        return {"reward": given and given[row], "parts": {}, "labels": ["chosen" if row in chosen else "rejected"]}

    return WatchedGroups(out, rollout, rollout.prompt_index[pairs[: keep_now(out), 0]].tolist(), describe)


def numbers(x: Tensor) -> list[float | bool | None]:
    """Six significant digits of each; of bools, the bools."""
    return [v if type(v) is bool else float(f"{v:.6g}") if math.isfinite(v) else None for v in x.tolist()]


class WatchedGroups:
    """The groups of one training step: `add` each micro-batch before its backward pass, `write` after the last update."""

    def __init__(self, out: Run, rollout: Rollout, groups: list[int], describe: Callable[[int, str], dict[str, Any]]):
        """groups: which of rollout.prompt_index, none where nothing is to be kept. describe(row, text) -> reward, parts and
        labels of that answer."""
        self.out, self.groups, self.describe = out, groups, describe
        self.group_of = rollout.prompt_index.tolist() if groups else []
        self.rows = [row for p in groups for row, q in enumerate(self.group_of) if q == p]
        self.rollout = Rollout(**{name: x[self.rows] for name, x in vars(rollout).items()}) if groups else None
        self.before = self._score()
        self.added: list[tuple[int, dict[int, int], Tensor, dict[str, Tensor]]] = []
        self.metrics: dict[int, dict[str, float | None]] = {}

    def add(self, update: int, rows: Tensor, logp: Tensor, entropy: Tensor, *, old: Tensor | None = None,
            alone: Callable[[int], dict[str, Tensor]] | None = None, **columns: Tensor | None) -> None:
        """Before the backward pass of a micro-batch: `rows` of the rollout, with log-probs [R, T-1] that have a gradient.

        old: the log-probs that the ratio is to. columns: what else is known of each token, [R, T-1], or [R, 1] where it is the
        answer's; None is skipped. alone(k): the metrics of the micro-batch's k-th group alone.
        """
        found = {k: self.rows.index(row) for k, row in enumerate(rows.tolist()) if row in self.rows} if self.groups else {}
        if not found:
            return
        logp.retain_grad()
        columns = {"entropy": entropy, "ratio": None if old is None else (logp - old).exp()} | columns
        self.added.append((update, found, logp, {name: x.detach().expand_as(logp) for name, x in columns.items()
                                                 if x is not None}))
        for k, p in enumerate(dict.fromkeys(self.group_of[row] for row in rows.tolist()) if alone else ()):
            if p in self.groups:
                with torch.no_grad():
                    values = alone(k)
                self.metrics[p] = dict(zip((name.removeprefix("train/") for name in values),
                                           numbers(torch.stack([x.float() for x in values.values()])), strict=True))

    def write(self) -> None:
        """After the last optimizer step: score the answers again, and add a line for each group to rollouts.jsonl."""
        if not self.groups:
            return
        after, passes = self._score(), {}
        for theirs, metrics in ranks.gathered((self._passes(), self.metrics)):
            self.metrics |= metrics
            for i, more in theirs.items():
                passes[i] = sorted(passes.get(i, []) + more, key=lambda one: one["update"])
        part, decode = self.rollout.to("cpu"), self.out.tokenizer.decode
        sampled = part.logp.masked_fill(~part.mask, torch.nan)
        texts = [decode(ids) for ids in part.responses()]
        for p in self.groups:
            answers = []
            for i, row in enumerate(self.rows):
                if self.group_of[row] == p:
                    places, ids = self._places(i), part.tokens[i, : part.lengths[i]].tolist()
                    prompt, ids = ids[: places.start + 1], ids[places.start + 1 :]
                    answers.append({"text": texts[i], **self.describe(row, texts[i]), "finished": part.finished[i].item(),
                                    "ids": ids, "tokens": [decode([id]) for id in ids],
                                    "sampled": numbers(sampled[i, places]), "before": numbers(self.before[i, places]),
                                    "passes": passes.get(i, []), "after": numbers(after[i, places])})
            self.out.rollouts([{"group": p, "prompt": decode(prompt), "prompt_ids": prompt,
                                "prompt_tokens": [decode([id]) for id in prompt], "metrics": self.metrics.get(p, {}),
                                "answers": answers}])

    def _score(self) -> Tensor | None:
        """Log-probs of the kept rows under the policy as it is now."""
        if not self.groups:
            return None
        cfg = self.out.cfg
        with autocast(self.rollout.tokens.device, cfg.dtype):
            logp = score_rollout(self.out.model, self.rollout, cfg.temperature, cfg.micro_batch)
        return logp.masked_fill(~self.rollout.mask, torch.nan).cpu()

    def _places(self, i: int) -> slice:
        """Where the kept answer's tokens are in a row of log-probs."""
        return slice(int(self.rollout.prompt_lengths[i]) - 1, int(self.rollout.lengths[i]) - 1)

    def _passes(self) -> dict[int, list[dict[str, Any]]]:
        """What this process has added of each kept answer."""
        passes = {}
        for update, found, logp, columns in self.added:
            gradient = torch.zeros_like(logp) if logp.grad is None else logp.grad     # None: the loss does not depend on it
            columns = {"logp": logp.detach(), **columns, "gradient": gradient}
            if "advantage" in columns:
                columns["held"] = (columns["advantage"] * columns["weight"] != 0) & columns["mask"] & (gradient == 0)
            columns = {name: x.cpu() for name, x in columns.items()}
            for k, i in found.items():
                lists = {name: numbers(x[k, self._places(i)]) for name, x in columns.items()}
                passes.setdefault(i, []).append({"update": update, **lists})
        return passes
