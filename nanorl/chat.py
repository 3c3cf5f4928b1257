"""The command that talks to a model: it answers every line that you type.

    python -m nanorl.chat runs/grpo
    python -m nanorl.chat runs/sft --show probs --temperature 0.7
    echo "What is 347+585?" | python -m nanorl.chat runs/grpo

Each line is a prompt of its own: these models have never seen a conversation. A pretrained one has not seen a prompt either;
it continues the line. Where a run was trained on a task with turns, its environment answers what the model does, as with a
calculator, and the model goes on; an environment of your own does where you name it, --task FILE.py:NAME. While talking, these
lines change a flag or end the talk; --raw makes them prompts, like all others:

    /temperature 0.5    /top_k 10    /top_p 0.9    /max_new_tokens 50    /show probs    /quit

In a pipe, every line gives one line, in order: the answer, with \\n for line breaks of its own. It is empty after a command,
an empty line and one that cannot be answered. With --show probs it is a table and an empty line.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Annotated, Literal

import torch
from torch import Tensor

from nanorl import run
from nanorl.decode import sampling_logits
from nanorl.gpt import GPT
from nanorl.ops import entropy_from_logits, log_softmax
from nanorl.sample import generate
from nanorl.tasks import is_ours, make_task
from nanorl.tokenizer import Tokenizer
from nanorl.turns import Episodes

TopP = Annotated[float, run.Bound(lambda p: 0 < p <= 1, "a number above 0, at most 1")]


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: str             # run, checkpoint or pretrained model to talk to
    temperature: run.NonNegative = 1.0    # 0 is greedy
    top_k: run.Natural = 0      # draw from the k likeliest tokens; 0 is from all
    top_p: TopP = 1.0           # draw from the likeliest tokens that have this probability together
    max_new_tokens: run.Count = 140    # an answer longer than this is cut
    task: str = ""              # whose environment answers, if it has turns (default: the run's, but for FILE.py:NAME)
    show: Literal["text", "probs"] = "text"    # probs: each token with its probability, entropy and likeliest alternatives
    raw: bool = False           # no commands: every line is a prompt
    seed: run.Natural = 0       # of the answers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto takes cuda, then mps, then cpu


MAY_CHANGE = ("temperature", "top_k", "top_p", "max_new_tokens", "show")


def is_command(line: str) -> bool:
    """A slash, a name that is known, and at most one value. Any other line is a prompt, whatever it begins with."""
    name, *values = line.split() or [""]
    return line.startswith("/") and (line.strip() == "/quit" or (name[1:] in MAY_CHANGE and len(values) <= 1))


def changed(cfg: Config, command: str) -> Config:
    """The flags after a command like "/temperature 0.5"; as they were, and a sentence on stderr, when it makes no sense."""
    name, value = (*command[1:].split(), "")[:2]
    try:
        parsed = run.parse(Config, [cfg.checkpoint, f"--{name.replace('_', '-')}={value}"])
    except SystemExit:
        return cfg
    return replace(cfg, **{name: getattr(parsed, name)})


def at_the_keyboard() -> bool:
    return bool(sys.stdin and sys.stdin.isatty())


def prompts() -> Iterator[str]:
    """Lines from the keyboard or from a pipe, whatever bytes they hold."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if at_the_keyboard():
        with contextlib.suppress(EOFError):
            while True:
                yield input("> ")
    else:
        yield from (line.rstrip("\n") for line in sys.stdin or ())


@torch.no_grad()
def probabilities(model: GPT, tokens: Tensor, mask: Tensor, cfg: Config, tokenizer: Tokenizer) -> str:
    """A line for each token that was sampled: its probability, the entropy of the distribution that it was drawn from, and the
    likeliest alternatives. Greedily nothing is drawn; then the distribution is the model's own.       tokens [T], mask [T-1]"""
    logits = model.head(model.hidden(tokens[None, :-1])[0, mask])                           # [sampled, V]
    logits = sampling_logits(logits, cfg.temperature, cfg.top_k, cfg.top_p) if cfg.temperature else logits.float()
    logp, ids = log_softmax(logits), tokens[1:][mask]
    best_logp, best = (x[:, :4] for x in logp.sort(descending=True, stable=True))           # the token may be one of them
    table = (ids, logp.gather(-1, ids[:, None]).squeeze(-1), entropy_from_logits(logits), best, best_logp)
    lines = [f"{'token':>14}  probability  entropy  instead"]
    for token, log_p, entropy, others, others_log_p in zip(*(x.tolist() for x in table), strict=True):
        alternatives = [(i, x) for i, x in zip(others, others_log_p, strict=True) if i != token and x > -math.inf][:3]
        instead = "  ".join(f"{shown(tokenizer, i)} {math.exp(x):.3f}" for i, x in alternatives)
        numbers = f"{math.exp(log_p):11.3f}  {abs(entropy):7.3f}"                               # of a certain token, -0.0
        lines.append(f"{shown(tokenizer, token):>14}  {numbers}  {instead}".rstrip())
    return "\n".join(lines)


def shown(tokenizer: Tokenizer, token: int) -> str:
    return repr(tokenizer.decode([token]))


@run.user_errors_as_sentences
def main(cfg: Config) -> None:
    device = run.find_device(cfg.device)
    checkpoint = run.load_checkpoint(cfg.checkpoint, "policy")
    tokenizer, model = run.tokenizer_from(checkpoint), run.model_from(checkpoint, device)
    pretrained = "text" in checkpoint["config"]         # only train_pretrain.py has that flag
    trained = checkpoint["config"].get("task") or ""
    task = make_task(cfg.task or (trained if is_ours(trained) else "addition"), needs_verifier=False)
    piped = not at_the_keyboard()
    if not piped:
        print(f"{cfg.checkpoint} {'continues' if pretrained else 'answers'} what you write. /quit to leave; "
              f"{', '.join('/' + name for name in MAY_CHANGE)} change how.")

    for number, line in enumerate(prompts()):
        text = ""
        if is_command(line) and not cfg.raw:
            if line.strip() == "/quit":
                break
            cfg = changed(cfg, line)
        elif line.strip():
            ids = [tokenizer.bos, *tokenizer.encode(line)] if pretrained else tokenizer.render(line)
            limit = max(1, min(cfg.max_new_tokens, model.config.context - len(ids)))
            turns = {}
            if task.max_actions > 1:        # its environment answers
                problem = replace(task.draw(Random(run.derive(cfg.seed, number))), prompt=line)
                turns = {"observe": Episodes(task, tokenizer, [problem], [[]]).observe,
                         "max_episode_tokens": max(1, min(task.max_episode_tokens, model.config.context - len(ids)))}
            try:
                said = generate(model, [ids], max_new_tokens=limit, temperature=cfg.temperature, top_k=cfg.top_k,
                                top_p=cfg.top_p, stop_ids=tokenizer.stop_ids, seed=run.derive(cfg.seed, number), **turns)
                if cfg.show == "probs":
                    text = probabilities(model, said.tokens[0], said.mask[0], cfg, tokenizer) + "\n" * piped
                else:
                    text = tokenizer.decode(said.responses()[0]) + ("" if said.finished[0] else " ...")
                    text = text.replace("\n", r"\n") if piped else text
            except (ValueError, FloatingPointError) as e:       # the line does not fit the context; logits that are not finite
                print(f"line {number + 1}: {e}", file=sys.stderr)
        if text or piped:
            print(run.printable(text), flush=True)


if __name__ == "__main__":
    try:
        main(run.parse(Config))
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stdout = None               # the reader has gone: nothing to flush
        raise SystemExit(130) from None
