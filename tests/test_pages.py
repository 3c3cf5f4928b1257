"""Every command of README, CONTRIBUTING and docs runs: as it is written, with small sizes and small files appended."""

import importlib
import io
import itertools
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from world import ROOT, TINY, write_records

from nanorl import run
from nanorl.interop import write_pretrained

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RL = TINY + " --steps 1 --eval-problems 3 --max-new-tokens 16"
SMALL = {"train_pretrain": TINY + " --steps 2 --batch 2 --length 32 --preset pico --vocab-size 300",
         "train_sft": RL + " --batch 4",
         "train_grpo": RL + " --prompts 3 --group 4",
         "train_reward": TINY + " --steps 2 --batch 4 --data pairs.jsonl",
         "train_dpo": TINY + " --steps 2 --batch 4 --best-of 2 --eval-problems 3 --max-new-tokens 16",
         "train_group_dpo": RL + " --prompts 3 --group 4 --best-of 2",
         "train_ppo": RL + " --prompts 4 --group 2 --best-of 2",
         "train_distill": RL + " --prompts 3 --group 2",
         "nanorl.evaluate": " --problems 3 --max-new-tokens 16 --n 2 --task addition --device cpu",
         "nanorl.export": "",
         "nanorl.chat": " --max-new-tokens 16 --device cpu"}
WITHOUT = {"train_grpo": ("--task", "--data", " --data mine.jsonl"), "train_dpo": ("--online", "", " --data pairs.jsonl")}
ELSEWHERE = {"git": "by hand", "pip": ".ci/run", "ruff": ".ci/run", "pytest": ".ci/run", "torchrun": "test_ranks.py",
             "python -m tests.mutants": "test_docs.py", "python -m benchmarks": "test_benchmarks.py",
             "python -m experiments": "test_experiments.py, test_claims.py", "python -m nanorl.chat smollm2": "test_interop.py",
             "python train_grpo.py --init smollm2": "experiments/real_model.py",
             "python -m nanorl.evaluate smollm2": "experiments/real_model.py",
             "python -m nanorl.checks theirs.py": "test_foreign.py"}


def commands():
    """The commands in fenced blocks, and those in sentences that are written out, without a RUN or FILE to be filled in."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        lines = [line for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
        sentences = re.sub(r"```.*?```", "", text, flags=re.S)
        lines += [line for line in re.findall(r"`((?:python|torchrun) [^`]+)`", sentences)
                  if not re.search(r"\b(RUN|DIR|FILE)\b|nanorl\.\w+$", line)]
        found += [" ".join(line.partition("  #")[0].split()) for line in lines
                  if re.match(r"(python|torchrun|pytest|pip|git|ruff|cp) ", line)]
    return list(dict.fromkeys(found))


def small(name, command):
    """The flags that make this command small."""
    first, second, flags = WITHOUT.get(name, ("", "", ""))
    flags = SMALL.get(name, "") + ("" if {first, second} & {*command.split()} else flags)
    return flags.split() + (["--steps", "2"] if "power" in command else [])


def python_of(page, part):
    """The block of Python on this page that holds this part."""
    [block] = [block for block in re.findall(r"^```python\n(.*?)^```", (ROOT / f"docs/{page}.md").read_text(), re.M | re.S)
               if part in block]
    return block


@pytest.fixture
def fresh(world, tmp_path, monkeypatch):
    """A folder with the scripts, files of one's own, and tiny runs in place of the stages that a script would make first."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, tmp_path)
    shutil.copy("train_grpo.py", "mine.py")
    for name, file in (("text.txt", "book.txt"), ("wanted.jsonl", "mine.jsonl"), ("pairs.jsonl", "pairs.jsonl")):
        shutil.copy(world / name, file)
    for name in ("pretrain", "sft", "grpo", "reward"):
        shutil.copytree(world / name, Path("runs", name))
    checkpoint = run.load_checkpoint(world / "sft")
    write_pretrained(run.model_from(checkpoint, torch.device("cpu")), run.tokenizer_from(checkpoint), Path("models/Qwen3-0.6B"),
                     torch.float32)
    Path("my_reward.py").write_text(python_of("your-data", "def score"))
    Path("my_task.py").write_text(python_of("your-data", "class Doubling"))
    Path("phone.py").write_text(python_of("turns", "class Phone"))
    Path("gsm8k.py").write_text(python_of("real-models", "gsm8k = Records"))
    for file in ("train.jsonl", "test.jsonl"):
        write_records(Path(file), ({"question": f"{file}: {n}?", "answer": f"#### {n}"} for n in range(9)))
    for module in ("nanorl.run", "nanorl.run.start"):
        monkeypatch.setattr(f"{module}.ensure_stage", lambda cfg, stage, **flags: f"runs/{stage}")


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith((*ELSEWHERE, "cp "))])
def test_the_command_runs(command, fresh, monkeypatch, tmp_path):
    program, *flags = shlex.split(command)[1:]
    if program == "-m":
        program, *flags = flags
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 1.\n"))
    for flag, value in itertools.pairwise(["", *flags]):
        if value.startswith("runs/") and flag != "--out" and not Path(value).exists():
            shutil.copytree("runs/grpo", value)         # what a command before has made
    name = program.removesuffix(".py")
    try:
        if name in SMALL:
            flags += small(name, command)
            if name.startswith("train_") and "--out" not in flags:
                flags += ["--out", str(tmp_path / "out")]
            module = importlib.import_module(name)
            module.main(run.parse(module.Config, flags))
        else:
            for script in ("train_grpo", "train_dpo"):                          # nanorl.checks imports the copy
                monkeypatch.delitem(sys.modules, script, raising=False)
            importlib.import_module("nanorl.checks.__main__" if name == "nanorl.checks" else name).main(flags)
    except SystemExit as exit:
        assert not exit.code


def test_every_command_is_run_here_or_is_known_to_run_elsewhere():
    for command in commands():
        assert command.startswith((*ELSEWHERE, "cp ", "python train_", "python -m nanorl.")), command


def test_the_mistake_of_the_readme_changes_nothing_at_ratio_1_and_is_named_by_the_checks(tmp_path, monkeypatch, capsys):
    """Its output is that of the README, line by line."""
    readme, script = (ROOT / "README.md").read_text(), (ROOT / "train_grpo.py").read_text()
    old, new = re.search(r"```diff\n-(.*)\n\+(.*)\n```", readme).groups()
    assert script.count(old) == 1
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(script.replace(old, new))
    monkeypatch.syspath_prepend(tmp_path)
    right, wrong = (importlib.import_module(name).objective for name in ("train_grpo", "mine"))
    old_logp, adv, mask = -torch.rand(4, 5), torch.randn(4, 1), torch.ones(4, 5, dtype=torch.bool)
    gradients = []
    for objective in (right, wrong):
        logp = old_logp.clone().requires_grad_()
        objective(logp, old_logp, adv, mask, torch.full((4, 5), 0.05))[0].backward()
        gradients.append(logp.grad)
    torch.testing.assert_close(*gradients)
    monkeypatch.delitem(sys.modules, "mine")
    with pytest.raises(SystemExit):
        importlib.import_module("nanorl.checks.__main__").main(["mine.py:objective", "--clip", "0.2", "0.2"])
    printed = capsys.readouterr().out.splitlines()
    shown = re.search(r"^```\n(holds .*?)^```", readme, re.M | re.S)[1].splitlines()
    assert [line for line in shown if line not in printed] == ["..."]
    assert sum(line.startswith("BROKEN") for line in printed) == 2


def test_the_reward_function_and_the_tasks_of_the_page_work_as_printed(fresh, monkeypatch):
    """The function is short, and does what its docstring says; both tasks are trained on."""
    assert Path("my_reward.py").read_text().count("\n") <= 15
    monkeypatch.syspath_prepend(Path.cwd())
    score = importlib.import_module("my_reward").score
    assert score("2+2?", "It is 4", {"answer": "2+2=4\n#### 4"}) == {"right": 2.0, "brief": -0.03}
    assert score("2+2?", "5", {"answer": 4})["right"] == 0.0 and score("2+2?", "4", {"answer": "none"}) is None
    write_records(Path("mine.jsonl"), ({"question": f"What is {n}+{n}?", "answer": 2 * n} for n in range(60)))
    Path("my_sums.py").write_text(python_of("your-data", "sums = Records").replace("You are careful.", ""))
    for task in ("my_task.py:Doubling", "my_sums.py:sums"):
        for script, init in (("train_sft", "pretrain"), ("train_grpo", "sft")):
            module = importlib.import_module(script)
            flags = f"--task {task} --init runs/{init} --out {task[:-3]}/{script}{SMALL[script]}"
            module.main(run.parse(module.Config, flags.split()))
