"""rollouts.jsonl: its numbers are what the objective says of its inputs, and what the models say of its tokens."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from world import GRPO, SCRIPTS, start

import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
from nanorl import run
from nanorl.family import ALGORITHMS, KL_TERMS
from nanorl.ops import clipped_away, importance_ratio
from nanorl.sample import generate, token_log_probs
from nanorl.tasks import make_task
from nanorl.view_data import numbers, watch_groups

pytestmark = pytest.mark.usefixtures("inside")
FAMILY = ["grpo", "grpo-full", "stale", "masked", "reinforce"]
KEEPS = [*FAMILY, "ppo", "rlhf", "lora", "dpo", "refreshed", "online", "group"]
FLAGS = GRPO + " --steps 1 --eval-problems 1 --epochs 2 --minibatches 2 --lr 2e-2 --keep-groups 3 --no-selfcheck"
TOLERANCE = {"rtol": 2e-4, "atol": 1e-8}        # of a gradient of what was rounded to six digits


def config(out):
    return json.loads(Path(out, "config.json").read_text())


def answers(out):
    """(group, answer, pass) for each time that a kept answer was trained on."""
    return [(group, answer, one) for group in run.read_lines(Path(out, "rollouts.jsonl")) for answer in group["answers"]
            for one in answer["passes"]]


def row(values):
    return torch.tensor(values)[None]


def old_logp(one):
    return row(one["logp"]) - row(one["ratio"]).log()


def family_gradient(cfg, one, objective):
    """dL/dlogp of an answer, from what the file says that it was trained on."""
    kl = KL_TERMS[cfg["kl"] or "k3"]
    logp = row(one["logp"]).requires_grad_()
    old = logp.detach() if set(one["ratio"]) == {1.0} else old_logp(one)
    reference = row(one["reference"]) if "reference" in one else None
    loss, _ = objective(logp, old, row(one["advantage"]), row(one["mask"]), row(one["weight"]), ref_logp=reference,
                        entropy=row(one["entropy"]), ratio=cfg["ratio"], bound=cfg["bound"], clip_low=cfg["clip_low"],
                        clip_high=cfg["clip_high"], kl_coef=cfg["kl_coef"], kl=kl.estimator, kl_in=kl.place,
                        entropy_coef=cfg["entropy_coef"])
    return torch.autograd.grad(loss, logp)[0]


def assert_gradients(out, gradient):
    found = answers(out)
    for _, _, one in found:
        torch.testing.assert_close(row(one["gradient"]), gradient(one), **TOLERANCE)
    assert any(one["gradient"] != [0.0] * len(one["gradient"]) for _, _, one in found)


# ---- the numbers ----


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_gradient_is_autograds_of_the_objective_on_the_inputs_in_the_file(algo, tmp_path):
    """Two passes of two updates each, with a rate that moves ratios out of the band."""
    start(train_grpo, f"{FLAGS} --algo {algo}", tmp_path / "run")
    cfg, found = config(tmp_path / "run"), answers(tmp_path / "run")
    assert_gradients(tmp_path / "run", lambda one: family_gradient(cfg, one, train_grpo.objective))
    assert {one["update"] for _, _, one in found} == {0, 1, 2, 3}
    for _, answer, _ in found:
        assert [one["update"] // 2 for one in answer["passes"]] == [0, 1], "once in each pass, in order"


@pytest.mark.parametrize("name", FAMILY)
def test_the_gradient_has_kl_and_all_the_other_terms(name):
    assert_gradients(name, lambda one: family_gradient(config(name), one, train_grpo.objective))


def test_a_modified_objective_is_shown_as_it_is(tmp_path, monkeypatch):
    """The README's mistake: a clip without a minimum. Its gradient is in the file, and is not that of GRPO."""
    def mistaken(logp, old_logp, adv, mask, weights, *, clip_low, clip_high, **_):
        surrogate = importance_ratio(logp, old_logp).clamp(1 - clip_low, 1 + clip_high) * adv
        return -(weights * surrogate).masked_fill(~mask, 0.0).sum(), {}

    right = train_grpo.objective
    monkeypatch.setattr(train_grpo, "objective", mistaken)
    start(train_grpo, FLAGS, tmp_path / "run")
    cfg = config(tmp_path / "run")
    assert_gradients(tmp_path / "run", lambda one: family_gradient(cfg, one, mistaken))
    assert not all(torch.allclose(row(one["gradient"]), family_gradient(cfg, one, right))
                   for _, _, one in answers(tmp_path / "run"))


def test_held_are_the_tokens_that_the_clip_has_left_without_a_gradient(tmp_path):
    start(train_grpo, f"{FLAGS} --lr 0.05 --prompts 8 --keep-groups 8", tmp_path / "run")
    held = 0
    for _, _, one in answers(tmp_path / "run"):
        low, high = clipped_away(row(one["ratio"]), row(one["advantage"]), 0.2, 0.2)
        assert row(one["held"]).equal(low | high)
        held += sum(one["held"])
    assert held and any(one["advantage"][0] == 0 for _, _, one in answers(tmp_path / "run"))


@pytest.mark.parametrize("name", ["ppo", "lora", "rlhf"])
def test_the_gradient_of_ppo(name):
    def gradient(one):
        logp, value = row(one["logp"]).requires_grad_(), row(one["value"])
        loss, _ = train_ppo.objective(logp, old_logp(one), row(one["advantage"]), row(one["mask"]), row(one["weight"]),
                                      values=value, old_values=value, returns=row(one["returns"]), entropy=row(one["entropy"]))
        return torch.autograd.grad(loss, logp)[0]

    assert_gradients(name, gradient)


def test_returns_and_values_are_the_critics():
    """With lam 1 and no KL penalty, what is left to be earned at any token of an answer is its reward. A critic starts at 0."""
    for group, answer, one in answers("ppo"):
        assert one["returns"] == pytest.approx([answer["reward"]] * len(answer["ids"]), abs=1e-5)
        assert (set(one["value"]) == {0.0}) == (group["step"] == 0)


def test_a_loss_that_does_not_depend_on_the_log_probs_has_a_gradient_of_0(tmp_path, monkeypatch):
    """Such as that of the critic alone: it trains, and nothing stops it."""
    monkeypatch.setattr(train_ppo, "objective", lambda *_, values, returns, **__: ((values - returns).square().mean(), {}))
    start(train_ppo, SCRIPTS["ppo"][1] + " --steps 1", tmp_path / "run")
    found = answers(tmp_path / "run")
    assert found and all(one["gradient"] == [0.0] * len(answer["ids"]) for _, answer, one in found)


@pytest.mark.parametrize("name", ["dpo", "refreshed", "online"])
def test_the_gradient_and_the_margin_of_a_pair(name):
    """The reference's log-prob of a response is what its implicit reward, in the file, leaves of its own."""
    cfg, kept = config(name), run.read_lines(Path(name, "rollouts.jsonl"))
    scale = 1.0 if cfg["loss"] == "ipo" else cfg["beta"]
    for group in kept:
        m, pair = group["metrics"], {answer["labels"][0]: answer for answer in group["answers"]}
        logp = [row(pair[label]["passes"][0]["logp"]).requires_grad_() for label in ("chosen", "rejected")]
        lengths = [torch.tensor([x.shape[1]]) for x in logp]
        sums = [x.sum(-1) for x in logp]
        references = [(x - r / scale * (n if cfg["loss"] == "ipo" else 1)).detach()
                      for x, r, n in zip(sums, (m["chosen_reward"], m["rejected_reward"]), lengths, strict=True)]
        loss, metrics = train_dpo.objective(*sums, *references, *lengths, torch.tensor([1 / cfg["batch"]]), loss=cfg["loss"],
                                            beta=cfg["beta"], nll_coef=cfg["nll_coef"])
        if name != "online":        # there, the weight is 1 / the number of pairs that are no ties
            for label, gradient in zip(("chosen", "rejected"), torch.autograd.grad(loss, logp), strict=True):
                torch.testing.assert_close(row(pair[label]["passes"][0]["gradient"]), gradient, rtol=1e-3, atol=1e-7)
        assert float(metrics["train/margin"]) * cfg["batch"] == pytest.approx(m["margin"], abs=1e-4)
        assert m["chosen_logp"] == pytest.approx(sum(pair["chosen"]["passes"][0]["logp"]), abs=1e-4)
        assert [x["reward"] is None for x in pair.values()] == [name != "online"] * 2
        assert [x["sampled"][0] is None for x in pair.values()] == [name != "online"] * 2
    assert len(kept) == 8 or (name == "online" and kept)
    assert any(group["metrics"]["margin"] for group in kept) == (name != "refreshed"), "a fresh reference is the policy"


def test_the_gradient_and_the_margin_of_a_group():
    """The hinge's: the implicit reward of an answer is the sum of its tokens'."""
    cfg, kept = config("group"), run.read_lines(Path("group/rollouts.jsonl"))
    for group in kept:
        tokens = [row(answer["passes"][0]["implicit_reward"]).requires_grad_() for answer in group["answers"]]
        won = torch.tensor([["right" in answer["labels"] for answer in group["answers"]]])
        loss, metrics = train_group_dpo.objective(torch.cat([x.sum(-1) for x in tokens])[None], won, torch.ones(1),
                                                  loss="hinge", margin=cfg["margin"])
        assert {name: float(metrics[f"train/{name}"]) for name in group["metrics"]} == pytest.approx(group["metrics"], abs=1e-5)
        for x, answer in zip(torch.autograd.grad(loss, tokens), group["answers"], strict=True):
            torch.testing.assert_close(row(answer["passes"][0]["gradient"]), cfg["beta"] * x / cfg["prompts"], **TOLERANCE)
    assert any(group["metrics"]["active"] for group in kept)


@pytest.mark.parametrize("name", ["grpo", "grpo-full", "stale", "ppo", "dpo", "online", "group"])
def test_log_probs_are_the_models_before_and_after_the_step(name):
    """In the first step, those of --init; after the last, those of the checkpoint. And they differ."""
    kept = run.read_lines(Path(name, "rollouts.jsonl"))
    models = {folder: run.model_from(run.load_checkpoint(folder), torch.device("cpu")) for folder in ("sft", name)}

    def scored(folder, group, answer):
        tokens = torch.tensor([group["prompt_ids"] + answer["ids"]])
        with torch.no_grad():
            logp, _ = token_log_probs(models[folder], tokens, temperature=config(name)["temperature"])
        return logp[0, len(group["prompt_ids"]) - 1 :]

    last = max(group["step"] for group in kept)
    assert {group["step"] for group in kept} == ({2} if name == "stale" else {0, 2})
    moved = 0.0
    for group in kept:
        for answer in group["answers"]:
            before, after = torch.tensor(answer["before"]), torch.tensor(answer["after"])
            for one in answer["passes"][:1]:
                assert one["update"] or torch.allclose(torch.tensor(one["logp"]), before, rtol=0, atol=1e-4)
            if group["step"] == 0:
                torch.testing.assert_close(before, scored("sft", group, answer), rtol=0, atol=1e-4)
            if group["step"] == last:
                torch.testing.assert_close(after, scored(name, group, answer), rtol=0, atol=1e-4)
                moved += float((after - before).abs().sum())
    assert moved > 1e-3


# ---- what is kept ----


@pytest.mark.parametrize("name", KEEPS)
def test_whole_groups_with_a_number_for_each_token(name):
    cfg, kept = config(name), run.read_lines(Path(name, "rollouts.jsonl"))
    tokenizer = run.tokenizer_from(run.load_checkpoint(name))
    for group in kept:
        assert len(group["answers"]) == cfg.get("group", 2) and tokenizer.decode(group["prompt_ids"]) == group["prompt"]
        assert "".join(group["prompt_tokens"]) == group["prompt"]
        for answer in group["answers"]:
            lists = [answer["tokens"], answer["sampled"], answer["before"], answer["after"]]
            lists += [x for one in answer["passes"] for x in one.values() if isinstance(x, list)]
            assert {len(x) for x in lists} == {len(answer["ids"])}
            assert answer["finished"] == (answer["ids"][-1] in tokenizer.stop_ids)
            assert "".join(answer["tokens"][: -1 if answer["finished"] else None]) == answer["text"]
    for step in {group["step"] for group in kept}:
        assert len([group for group in kept if group["step"] == step]) <= cfg["keep_groups"]


def test_what_a_reward_model_says_is_kept_beside_the_tasks_reward():
    """In the first step no KL is charged yet: what an answer that has ended earns at its last token is the learned reward."""
    found = answers("rlhf")
    assert all(answer["parts"].keys() == {"learned reward"} and answer["labels"] == [] for _, answer, _ in found)
    ended = [(answer, one) for group, answer, one in found if group["step"] == 0 and answer["finished"]]
    assert ended
    for answer, one in ended:
        assert one["returns"][-1] == pytest.approx(answer["parts"]["learned reward"], abs=1e-5) != answer["reward"]


def test_answers_that_were_left_out_have_no_pass():
    """--groups drop and --truncated mask: nothing was computed for them, and the log-probs after the step are there."""
    kept = run.read_lines(Path("grpo-full/rollouts.jsonl"))
    dropped = [group for group in kept if len({answer["reward"] for answer in group["answers"]}) == 1]
    assert all(answer["passes"] == [] and answer["after"] for group in dropped for answer in group["answers"])
    assert all(len(answer["passes"]) == 2 for group in kept for answer in group["answers"]
               if group not in dropped and answer["finished"])


def test_groups_with_contrast_come_first(tmp_path):
    start(train_grpo, GRPO + " --keep-groups 99 --prompts 8 --steps 2", tmp_path / "all")
    start(train_grpo, GRPO + " --keep-groups 3 --prompts 8 --steps 2", tmp_path / "some")
    every, some = (run.read_lines(tmp_path / name / "rollouts.jsonl") for name in ("all", "some"))
    for step in (0, 1):
        groups = [group for group in every if group["step"] == step]
        contrast = [len({answer["reward"] for answer in group["answers"]}) > 1 for group in groups]
        assert len(groups) == 8 and contrast == sorted(contrast, reverse=True)
        for those in ([g["group"] for g, c in zip(groups, contrast, strict=True) if c == wanted] for wanted in (True, False)):
            assert those == sorted(those)
        assert [group for group in some if group["step"] == step] == groups[:3]


def test_parts_of_rewards_and_answers_that_could_not_be_scored():
    """What is not a number is null, and such an answer is neither right nor wrong."""
    cfg = SimpleNamespace(keep_groups=9, eval_every=1, steps=9, temperature=1.0, micro_batch=9, dtype="auto")
    out = SimpleNamespace(cfg=cfg, step=0, model=(model := run.model_from(run.load_checkpoint("sft"), torch.device("cpu"))))
    rollout = generate(model, [[1, 2]] * 2, max_new_tokens=2, stop_ids={0}, samples_per_prompt=2)
    rewards, part = torch.tensor([[1.0, torch.nan], [0.0, 1 / 3]]), torch.tensor([[0.5, torch.nan], [2.0, 3.0]])
    watched = watch_groups(out, make_task("addition"), rollout, rewards, {"format": part, "reward": part + 1})
    assert watched.groups == [1, 0]
    assert [watched.describe(row, "Answer: 3") for row in range(4)] == [
        {"reward": 1.0, "parts": {"format": 0.5, "reward": 1.5}, "labels": ["right", "direct"]},
        {"reward": None, "parts": {"format": None, "reward": None}, "labels": ["not scored", "direct"]},
        {"reward": 0.0, "parts": {"format": 2.0, "reward": 3.0}, "labels": ["wrong", "direct"]},
        {"reward": 0.333333, "parts": {"format": 3.0, "reward": 4.0}, "labels": ["wrong", "direct"]}]


def test_zero_keeps_nothing_and_changes_nothing(tmp_path):
    start(train_grpo, GRPO + " --keep-groups 0", tmp_path / "run")
    assert not (tmp_path / "run/rollouts.jsonl").exists()
    names = ("metrics.jsonl", "samples.jsonl")
    a, b = ([[{k: v for k, v in line.items() if not k.startswith("time/")} for line in run.read_lines(Path(out, name))]
             for name in names] for out in ("grpo", tmp_path / "run"))
    assert a == b


@pytest.mark.parametrize("name", ["grpo-full", "ppo", "refreshed"])
def test_a_resumed_run_has_the_file_of_one_that_was_left_alone(name, tmp_path):
    """Also where a kill has torn a line, or came between the file and the checkpoint."""
    script, flags = SCRIPTS[name]
    whole = Path(name, "rollouts.jsonl").read_bytes()
    real = run.Run.save

    def save(self):
        real(self)
        if self.step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "save", save)
        start(script, flags, tmp_path / "run")
    ahead = whole[len(kept := (tmp_path / "run/rollouts.jsonl").read_bytes()) :]
    assert whole.startswith(kept) and kept and ahead
    (tmp_path / "run/rollouts.jsonl").write_bytes(kept + ahead[:-100])
    start(script, "--resume --quiet", tmp_path / "run")
    assert (tmp_path / "run/rollouts.jsonl").read_bytes() == whole


def test_a_file_that_is_there_is_a_run_that_is_there(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy("grpo/rollouts.jsonl", tmp_path / "run")
    with pytest.raises(SystemExit) as exit:
        start(train_grpo, GRPO, tmp_path / "run")
    assert exit.value.code == 2 and "holds a run already" in capsys.readouterr().err


def test_numbers_are_rounded_and_null_where_they_are_not_finite():
    assert numbers(torch.tensor([1 / 3, torch.nan, torch.inf, 0.0], dtype=torch.float64)) == [0.333333, None, None, 0.0]
    assert numbers(torch.tensor([True, False])) == [True, False]
