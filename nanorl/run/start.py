"""How a run starts: the stages before it, made where they are missing, and the models that they left."""

import copy
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, NamedTuple

import torch

from nanorl.data import render_prompts, which_fit
from nanorl.errors import UserError
from nanorl.gpt import GPT, ScalarGPT
from nanorl.lora import adapt
from nanorl.run import ranks
from nanorl.run.checkpoint import adapted_from, digest, load_checkpoint, load_frozen, model_from, tokenizer_from
from nanorl.run.device import generator, pick_device
from nanorl.run.directory import Run
from nanorl.run.flags import PolicyConfig, RunConfig, flag_of, parse, read_config
from nanorl.tasks import FileTask, Records, Task, make_task, use_reward
from nanorl.tokenizer import Tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
INHERITED = ("seed", "device", "dtype", "compile", "quiet")     # the flags that a run hands to the stages it has to make first


def choose_task(name: str, data: str = "", *, needs_verifier: bool = True, seed: int = 0, verifier: str | None = None,
                reward: str = "") -> Task:
    """The task of this name, or the questions of a file, ready to judge answers. The seed decides on the order of a file's rows
    in training; `verifier` and `reward` are the flags."""
    try:
        judge = verifier or ("none" if reward else "exact")
        task = Records(data, verifier=judge) if data else make_task(name, needs_verifier)
        task.start_verifier()
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None
    task.seed = seed
    if reward:
        use_reward(task, reward)
    for _ in islice(task.graded_examples(), 4):     # are its rewards numbers? Fails before minutes are spent on other stages
        pass
    return task


def warn(sentences: list[str]) -> None:
    for sentence in sentences if ranks.rank() == 0 else ():
        print(f"warning: {sentence}", file=sys.stderr)


def cut_answers(task: Task, tokenizer: Tokenizer, max_new_tokens: int) -> list[str]:
    """A warning of a file's answers that take more tokens than a response may have."""
    rows = zip(task.places, task.problems, strict=True) if isinstance(task, FileTask) else ()
    cut = [place for place, problem in rows
           if len(tokenizer.render_response(task.direct(problem, None))) > max_new_tokens]
    return [f"{task.where(cut)}: right responses have more than --max-new-tokens {max_new_tokens}; raise it"] if cut else []


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def stage_dir(stage: str, task: str) -> str:
    """The default directory of a stage: runs/sft, runs/sft-sorting, runs/sft-addition-4; runs/sft-NAME with FILE.py:NAME."""
    return f"runs/{stage}" if task == "addition" else f"runs/{stage}-{task.rpartition(':')[2]}"


def find_script(name: str) -> ModuleType:
    """The training script of this name, imported: from the folder of the running script, else from the checkout."""
    places = [str(Path(sys.argv[0]).resolve().parent), str(CHECKOUT)]
    spec = PathFinder.find_spec(name, places)
    if spec is None:
        raise UserError(f"{name}.py: needed to make the stage before this one, and neither in {places[0]} nor in {places[1]}; "
                        "copy it beside this script, or name a finished run with --init")
    if name not in sys.modules:
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def ensure_stage(cfg: RunConfig, stage: str, **flags: Any) -> str:
    """Run the script of a stage, unless its run is complete: with `flags`, what `cfg` hands on, and else its defaults.

    Returns the directory of the stage's run.
    """
    script = find_script(f"train_{stage}")
    wanted = script.Config(**{name: getattr(cfg, name) for name in INHERITED}, **flags)
    out, defaults = Path(wanted.out), script.Config()
    typed = {"out": wanted.out} | {flag: value for flag, value in flags.items() if value != getattr(defaults, flag)}
    command = f"python {script.__name__}.py " + " ".join(f"{flag_of(flag)} {value}" for flag, value in typed.items())
    made = read_config(out) if (out / "config.json").exists() else {}
    for flag in ("task", "data", "init"):
        if made and made.get(flag) != getattr(wanted, flag, None):
            raise UserError(f"{out}: made with --{flag} {made.get(flag)!r}, not {getattr(wanted, flag, None)!r}; use it with "
                            f"--init {out}, or move it away")
    if (out / "ckpt.pt").exists():
        found = load_checkpoint(out)
        if found["step"] >= found["config"]["steps"]:
            print(f"Starting from {out} (seed {found['config']['seed']}, {found['step']} steps).")
            return wanted.out
    if made:
        print(f"{out} is not finished. Continuing it first: {command} --resume")
        wanted = parse(script.Config, ["--out", wanted.out, "--resume", *(["--quiet"] if cfg.quiet else [])])
    else:
        print(f"{out} is not there yet. Making it first: {command}")
    script.main(wanted)
    return wanted.out


# ---------------------------------------------------------------------------------------------------------------------
# The prologue
# ---------------------------------------------------------------------------------------------------------------------


def check_fits_context(prompts: list[list[int]], limit: tuple[int, str], *models: GPT | ScalarGPT | None,
                       texts: list[str] | None = None) -> None:
    """UserError when these prompts and responses up to the `limit`, a `Task.response_limit`, do not fit the context of each of
    these models. Skips None. It shows the longest of the `texts` of these prompts."""
    tokens, said_by = limit
    (longest, i), context = max((len(ids), i) for i, ids in enumerate(prompts)), min(m.config.context for m in models if m)
    if longest + tokens > context:
        shown = f", as {texts[i][:40]!r}" if texts else ""
        raise UserError(f"{said_by} {tokens}: with prompts of up to {longest} tokens{shown}, the model's "
                        f"context of {context} has room for {max(0, context - longest)}")


def trainable_copy(cfg: PolicyConfig, model: GPT, purpose: str) -> GPT:
    """A model to train, which begins as this one: a copy, or with --lora-rank adapters of their own beside the same weights."""
    if cfg.lora_rank:
        return adapt(model, cfg.lora_rank, cfg.lora_alpha, generator(cfg.seed, "lora", purpose))
    return copy.deepcopy(model).requires_grad_(True)


def policy_from(cfg: PolicyConfig, checkpoint: dict[str, Any] | None, initial: dict[str, Any],
                device: torch.device) -> tuple[GPT, GPT | None]:
    """The policy, as this run's checkpoint has it, else as `initial`; and with --lora-rank, the model without the adapters."""
    if not cfg.lora_rank:
        return model_from(checkpoint or initial, device), None
    if checkpoint:
        moved = {"base": cfg.init} if cfg.init else {}
        return adapted_from(checkpoint | {"lora": checkpoint["lora"] | moved}, device)
    base = model_from(initial, device)
    policy = trainable_copy(cfg, base, "policy")
    policy.lora = {"rank": cfg.lora_rank, "alpha": cfg.lora_alpha, "base": initial["path"], "sha256": digest(base)}
    return policy, base


class Start(NamedTuple):
    """What a run starts from."""

    device: torch.device
    checkpoint: dict[str, Any] | None   # of this run, where it is resumed
    tokenizer: Tokenizer
    policy: GPT                         # with the weights of that checkpoint, else of --init
    reference: GPT | None               # --init itself, whose weights are constants; with --lora-rank the policy shares them
    reward_model: ScalarGPT | None


def begin(cfg: RunConfig, stage: str, *, task: Task | None = None, reference: bool = False,
          reward_model: str | None = None) -> Start:
    """Check that the run can be written and that what the flags name exists, then load the models.

    Where --init is not given, it is the run of `stage` (on the same task), made first where it is missing. With
    `reference`, --init is loaded once more as the reference model. A resumed run does without --init where it needs no
    reference, or has one in its checkpoint: then `Run` gives the model its weights. reward_model: the run of one, "" for
    runs/reward, made first where it is missing, None for none. All must have room for the prompts of `task`.
    """
    device, checkpoint = pick_device(cfg), Run.check(cfg)
    if task:
        next(task.training_problems(Random(0), 0)), task.choose(Random(0), "heldout", 1)    # fails before minutes are spent
        warn(task.warnings())
    initial = checkpoint
    if reward_model:
        load_checkpoint(reward_model, "reward model")       # before minutes are spent on another stage
    if not checkpoint or (reference and not cfg.lora_rank and "reference" not in checkpoint["state"]):
        same_task = {"task": cfg.task} if stage == "sft" else {}
        initial = load_checkpoint(cfg.init or ensure_stage(cfg, stage, **same_task), "policy")
    if reward_model == "":
        reward_model = ensure_stage(cfg, "reward")
    weights = checkpoint or initial
    tokenizer, (policy, base) = tokenizer_from(weights), policy_from(cfg, checkpoint, initial, device)
    if reference and not base:
        base = model_from(initial, device).requires_grad_(False)
    start = Start(device, checkpoint, tokenizer, policy, base if reference else None,
                  load_frozen(reward_model, "reward model", tokenizer, device) if reward_model else None)
    if task:
        asked = [problem.conversation for problem in task.examples()]
        places = task.places if isinstance(task, FileTask) else ["problem"] * len(asked)
        prompts, limit = render_prompts(tokenizer, asked, places, str(task)), task.response_limit(cfg.max_new_tokens)
        if isinstance(task, FileTask):
            context = min(model.config.context for model in (start.policy, start.reward_model) if model)
            task.keep(which_fit([prompts], task.places, task.name, context, *limit, skip_long=cfg.skip_long))
            print(f"{task.name}: {len(task.rows('train')):,} rows to train on; {len(task.rows('heldout')):,} are held out, by "
                  "the hash of their prompt, to evaluate with.")
        else:
            check_fits_context(prompts, limit, start.policy, start.reward_model)
        warn(cut_answers(task, tokenizer, cfg.max_new_tokens))
    return start
