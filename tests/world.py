"""A tiny chain of every script, made once: what the tests of scripts, bad input and crashes start from."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

import train_distill
import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_reward
import train_sft
from nanorl import heldout, run
from nanorl.data import DATA
from nanorl.files import read_text
from nanorl.tasks import FileTask, Stories, Task

ROOT = Path(__file__).parent.parent
FRESH = multiprocessing.get_context("forkserver")       # its processes are forks of one that has imported torch and run nothing
FRESH.set_forkserver_preload(["pytest", "hypothesis", "torch._dynamo", "nanorl.evaluate"])
STORIES = read_text(DATA / "stories_heldout.txt")[:8000]
heldout.read_text = lambda path: STORIES           # what every evaluation of GRPO reads: as much as a test has the time for
TINY = " --eval-every 2 --save-every 1 --quiet --device cpu"
EVAL = " --eval-problems 3 --max-new-tokens 16"
PRETRAIN = "--steps 3 --batch 2 --length 32 --text text.txt --preset pico --vocab-size 300" + TINY
SFT = "--steps 3 --batch 16 --lr 5e-3 --data letters.jsonl --init pretrain" + EVAL + TINY
GRPO = "--steps 3 --prompts 3 --group 4 --data wanted.jsonl --init sft --no-selfcheck" + EVAL + TINY
SELDOM = " --eval-every 99 --save-every 99"         # for tests that read the steps alone
BEST = EVAL + " --best-of 2"
DPO = "--steps 3 --batch 8 --micro-batch 3 --data pairs.jsonl --init sft --max-new-tokens 16" + TINY
ONLINE = "--steps 3 --batch 8 --online --init sft" + BEST + TINY
GROUP = "--steps 3 --prompts 3 --group 4 --data wanted.jsonl --loss hinge --init sft" + BEST + TINY
PPO = "--steps 3 --prompts 4 --group 2 --init sft" + BEST + TINY
DISTILL = "--steps 3 --prompts 3 --group 2 --teacher grpo --init sft" + EVAL + TINY
SCRIPTS = {"pretrain": (train_pretrain, PRETRAIN), "tuned": (train_sft, SFT),
           "sft": (train_sft, SFT + " --steps 40 --eval-every 20 --save-every 20"),     # as many as it takes to say x or y
           "grpo": (train_grpo, GRPO + " --selfcheck"),
           "grpo-full": (train_grpo, GRPO + " --minibatches 2 --epochs 2 --kl-coef 0.1 --entropy-coef 0.01 --groups drop "
                                            "--truncated mask --aggregate token_mean --advantage leave_one_out --eval-every 3"),
           "stale": (train_grpo, GRPO + " --algo cispo --stale 1 --kl-coef 0.1 --kl k1_weighted --refresh-reference 1 "
                                        "--overlong 0.5 --eval-every 3"),
           "masked": (train_grpo, GRPO + " --algo masked_is --eval-every 3"),
           "reward": (train_reward, "--steps 3 --batch 8 --micro-batch 3 --data pairs.jsonl --init sft" + TINY),
           "dpo": (train_dpo, DPO), "refreshed": (train_dpo, DPO + " --loss ipo --nll-coef 0.1 --refresh-reference 1"),
           "online": (train_dpo, ONLINE + " --judge model --reward-model reward"),
           "group": (train_group_dpo, GROUP), "ppo": (train_ppo, PPO + " --data wanted.jsonl --entropy-coef 0.01"),
           "rlhf": (train_ppo, PPO + " --reward model --reward-model reward --critic shared --kl-coef 0.1 --kl-target 1 "
                                     "--truncated bootstrap"),
           "lora": (train_ppo, PPO + " --data wanted.jsonl --lora-rank 2 --kl-coef 0.1"),
           "distill": (train_distill, DISTILL + " --on student --divergence reverse --gradient sequence"),
           "taught": (train_distill, DISTILL + " --on data --data letters.jsonl --divergence jsd --tau 2 --top-k 3"),
           "reinforce": (train_grpo, GRPO + " --algo reinforce --advantage running_mean --likelihood-coef 0.1 --kl-coef 0.1 "
                                            "--kl k1_reward --eval-every 3")}
STATES = [name for name in SCRIPTS if name not in ("masked", "sft")]        # whose checkpoints hold something of their own

ONE_OF_EACH = ("pretrain", "tuned", "grpo", "reward", "dpo", "group", "ppo", "distill")   # one run of every script


def start(script, flags, out, *extra):
    script.main(run.parse(script.Config, [*flags.split(), "--out", str(out), *extra]))


def exit_code(function, *args):
    """What a process of its own that calls this function ends with."""
    process = FRESH.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def metrics(out):
    """The lines of metrics.jsonl, but for what the clock says."""
    return [{name: x for name, x in line.items() if not name.startswith("time/")}
            for line in run.read_lines(Path(out) / "metrics.jsonl")]


def files_of(name):
    """What a finished run of this name leaves in its directory."""
    keeps = hasattr(SCRIPTS[name][0].Config, "keep_groups")
    return {"config.json", "metrics.jsonl", "samples.jsonl", "ckpt.pt", *(["rollouts.jsonl"] if keeps else [])}


def rollouts(out):
    """The bytes of rollouts.jsonl, which say nothing of the clock."""
    path = Path(out) / "rollouts.jsonl"
    return path.read_bytes() if path.exists() else b""


def cut_final_line(out):
    """As if the run had been killed before it wrote its final line."""
    with open(Path(out) / "metrics.jsonl", "r+b") as f:
        f.truncate(f.read().rstrip().rindex(b"\n") + 1)


def same_parameters(*folders):
    a, b = (run.load_checkpoint(folder)["model"] for folder in folders)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Sealed:
    """A reward that can be made a float, and nothing else."""

    def __init__(self, reward):
        self.reward = reward

    def __float__(self):
        return float(self.reward)

    def opened(self, *_):
        raise AssertionError("a reward was read before it had passed the gate")

    __bool__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = opened
    __mul__ = __rmul__ = __truediv__ = __neg__ = __abs__ = __round__ = __int__ = __index__ = __format__ = opened


def seal_rewards(patch):
    """Let every task give sealed rewards."""
    def sealed(method, seal):
        return lambda *args: seal(method(*args))

    for task in (Task, FileTask, Stories):
        for name, seal in (("verify", Sealed), ("rewards", lambda rewards: [Sealed(reward) for reward in rewards])):
            if name in vars(task):
                patch.setattr(task, name, sealed(vars(task)[name], seal))


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_world(folder):
    """In this directory, one finished run of every script: a model that says x or y, and is rewarded for x."""
    (folder / "text.txt").write_text((DATA / "text.txt").read_text()[:20_000])
    write_records(folder / "letters.jsonl", ({"prompt": f"Say {i}.", "response": f"Answer: {'xy'[i % 2]}"} for i in range(99)))
    write_records(folder / "wanted.jsonl", ({"prompt": f"Say {i}.", "answer": "x", "response": f"Answer: {'xy'[i % 2]}"}
                                            for i in range(99)))
    write_records(folder / "pairs.jsonl", ({"prompt": f"Say {i}.", "chosen": "Answer: x", "rejected": f"Answer: {'yx'[i == 7]}"}
                                           for i in range(99)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, (script, flags) in SCRIPTS.items():
            start(script, flags, name)
