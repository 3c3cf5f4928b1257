"""The evaluation says what it means: its intervals cover, its votes are averages, and its rows fit together."""

import io
import json
import math
import random
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from world import seal_rewards, write_records

from nanorl import chat, evaluate, run
from nanorl.errors import UserError
from nanorl.evaluate import interval, vote
from nanorl.heldout import heldout_problems
from nanorl.rollout import sample_and_grade
from nanorl.sample import Sampling
from nanorl.search import Answers, majority_vote
from nanorl.tasks import TASKS, Problem, Task, final_answer, is_heldout

# ---- Intervals ----


@pytest.mark.math
def test_wilsons_interval_of_eight_in_ten():
    """The number of the textbooks; and 0 of 10 and 10 of 10 are no points."""
    assert interval(torch.tensor([1.0] * 8 + [0.0] * 2)) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(torch.zeros(10)) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(torch.ones(10)) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.math
@pytest.mark.parametrize("p", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_the_interval_covers_the_truth_as_often_as_it_says(p):
    """Exactly, over all outcomes of 60 problems: near 95 %, on average over p close by it."""
    n, cover = 60, 0.0
    for near in (0.9 * p, p, 1.05 * p):
        for k in range(n + 1):
            low, high = interval(torch.tensor([1.0] * k + [0.0] * (n - k)))
            cover += (low <= near <= high) * math.comb(n, k) * near**k * (1 - near) ** (n - k) / 3
    assert 0.93 <= cover <= 0.985


@pytest.mark.math
def test_means_over_several_answers_count_as_the_coin_flips_of_their_variance():
    """100 problems, each a mean of 16 flips of the same coin, are 1,600 flips: the interval is a quarter as wide; where all
    answers to a problem agree, they are 100."""
    flips = torch.tensor([[float((7 * i + 11 * j) % 5 < 2) for j in range(16)] for i in range(100)])
    independent = torch.rand(100, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    low, high = interval(independent.double().mean(-1))
    wide = interval(torch.tensor([1.0] * 40 + [0.0] * 60))
    assert (high - low) / (wide[1] - wide[0]) == pytest.approx(0.25, rel=0.2)
    same = flips[:, :1].expand(100, 16).double().mean(-1)
    assert interval(same) == interval(flips[:, 0])


@pytest.mark.math
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_and_stays_a_share(values):
    values = torch.tensor(values, dtype=torch.float64)
    low, high = interval(values)
    assert 0 <= low <= values.mean() + 1e-9 and values.mean() - 1e-9 <= high <= 1
    low, high = interval(100 * values, shares=False)
    assert low <= 100 * values.mean() + 1e-6 and 100 * values.mean() - 1e-6 <= high


@pytest.mark.math
@pytest.mark.parametrize("count", [5, 12, 60])
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (100.0, 0.0), (2.0, -1.0), (0.01, 1e4)])
def test_the_interval_of_rewards_of_any_size_covers_their_mean(count, scale, shift):
    """Near 95 %, for few problems as for many: of 2,000 draws from a normal distribution, within four standard errors."""
    drawn = shift + scale * torch.randn(2000, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    covered = [low <= shift <= high for low, high in (interval(values, shares=False) for values in drawn)]
    assert 0.93 <= sum(covered) / 2000 <= 0.97
    low, high = interval(drawn[0], shares=False)
    plain = interval((drawn[0] - shift) / scale, shares=False)
    assert (low, high) == pytest.approx([shift + scale * end for end in plain], rel=1e-6)


@pytest.mark.math
def test_one_reward_says_nothing_about_others_and_equal_ones_are_a_point():
    assert interval(torch.tensor([7.0]), shares=False) == (-math.inf, math.inf)
    assert interval(torch.full((9,), -3.0), shares=False) == (-3.0, -3.0)


# ---- Votes ----


def answers(ballots, right, logp=None):
    """One problem, answered like this; who votes "a" is right if `right` says so."""
    rewards = torch.tensor([[float(vote in right) for vote in ballots]])
    return Answers(rewards, torch.ones_like(rewards), torch.tensor([logp or [0.0] * len(ballots)]), [ballots], None)


@pytest.mark.math
def test_a_vote_of_one_is_an_answer_and_of_all_the_majority():
    found = answers(["a", "b", "a", None, "c", "a", "b", "a"], {"a"})
    assert float(vote(found, 1, False)) == 0.5 and float(vote(found, 8, False)) == 1.0
    assert float(vote(found, 2, False)) == pytest.approx((0.5 + 1 + 0.5 + 0.5) / 4)      # ab, a-, ca, ba
    assert float(vote(found, 3, False)) == pytest.approx((1 + 0.5) / 2)                   # aba, -ca; two are left over


@pytest.mark.math
def test_over_all_orders_disjoint_votes_are_the_mean_over_all_subsets():
    ballots, right = ["a", "a", "b", "c", None], {"a"}
    everyone = [float(vote(answers(list(order), right), 2, False)) for order in permutations(ballots)]
    pairs = [(x, y) for i, x in enumerate(ballots) for y in ballots[i + 1 :]]
    worth = [sum(w in right for w in winners) / len(winners) if (winners := majority_vote(pair)) else 0.0 for pair in pairs]
    assert sum(everyone) / len(everyone) == pytest.approx(sum(worth) / len(worth))


@pytest.mark.math
def test_a_weighted_vote_weighs_probabilities():
    """Not log-probabilities, and each vote by itself: also one whose answers are all unlikely has a likeliest."""
    found = answers(["a", "b", "b", "c"], {"a"}, [-1.0, -3.0, -3.0, -900.0])
    assert float(vote(found, 4, True)) == 1.0 and float(vote(found, 4, False)) == 0.0
    assert float(vote(answers(["a", "b", "b"], {"a"}, [-1.0, -1.5, -1.5]), 3, True)) == 0.0
    assert float(vote(answers(["b", "b", "a", "b"], {"a"}, [-1.0, -1.0, -900.0, -905.0]), 2, True)) == 0.5


# ---- The command ----

SMALL = "--problems 6 --max-new-tokens 12 --device cpu --data wanted.jsonl --n 6 --steps 3 --chains 2"
EVERYTHING = "--method greedy sample low_temperature majority weighted best_of_n power --scorer verifier logprob reward"


def evaluated(flags, out):
    evaluate.main(run.parse(evaluate.Config, [*flags.split(), "--out", str(out)]))
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def result(world, tmp_path_factory):
    """The rows of the tiny models, by (run, method, n)."""
    flags = f"sft grpo {SMALL} {EVERYTHING} --reward-model reward --proposal base tempered"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        found = evaluated(flags, tmp_path_factory.mktemp("rows") / "out.json")
    return {(row["run"], row["method"], row["n"]): row for row in found["rows"]}


def test_the_rows_fit_together(result):
    """A vote of one, the best of one and a sample are the same; a verifier's choice never gets worse; tokens add up."""
    methods = {"greedy", "sample", "temperature 1/2", "temperature 1/4", "majority", "weighted", "best by verifier",
               "best by logprob", "best by reward", *(f"power {a}, {q}" for a in (2, 4) for q in ("base", "tempered"))}
    assert {method for _, method, _ in result} == methods and {name for name, _, _ in result} == {"sft", "grpo"}
    for name in ("sft", "grpo"):
        sample = result[name, "sample", 1]
        for method in ("majority", "weighted", "best by verifier", "best by logprob", "best by reward"):
            assert [n for r, m, n in result if (r, m) == (name, method)] == [1, 2, 4, 6]
            assert result[name, method, 1]["value"] == pytest.approx(sample["value"])
            for n in (1, 2, 4, 6):
                assert result[name, method, n]["tokens"] == pytest.approx(n * sample["tokens"])
        assert result[name, "majority", 2]["value"] == pytest.approx(sample["value"], abs=0.2)
        passed = [result[name, "best by verifier", n]["value"] for n in (1, 2, 4, 6)]
        assert passed == sorted(passed)
        for power in ("power 2, base", "power 4, tempered"):
            assert [n for r, m, n in result if (r, m) == (name, power)] == [0, 1, 2, 3]
            tokens = [result[name, power, n]["tokens"] for n in (0, 1, 2, 3)]
            assert tokens == sorted(tokens) and tokens[0] < tokens[3]
    for row in result.values():
        assert 0 <= row["low"] <= row["value"] + 1e-9 and row["value"] - 1e-9 <= row["high"] <= 1 and row["tokens"] >= 1


def test_every_method_reads_rewards_through_the_gate(result, inside, tmp_path, monkeypatch):
    seal_rewards(monkeypatch)
    found = evaluated(f"grpo {SMALL} {EVERYTHING} --reward-model reward --proposal base tempered", tmp_path / "out.json")
    assert found["rows"] == [row for (name, _, _), row in result.items() if name == "grpo"]


def test_greedy_is_what_the_scripts_call_greedy(result, inside):
    task, checkpoint = run.choose_task("addition", "wanted.jsonl"), run.load_checkpoint("grpo")
    problems = list(dict.fromkeys(heldout_problems(task, 6, 0)))
    plain = sample_and_grade(run.model_from(checkpoint, torch.device("cpu")), run.tokenizer_from(checkpoint), task, problems,
                             Sampling(12, temperature=0.0))
    assert result["grpo", "greedy", 1]["value"] == pytest.approx(float(plain.rewards.mean()))


def test_a_problem_that_is_drawn_twice_is_asked_once(inside, tmp_path, capsys):
    """Two held-out records are two problems, however many are drawn: their interval is that of two."""
    records = [{"prompt": f"Say {i}.", "answer": "x"} for i in range(99)]
    heldout = [record for record in records if is_heldout(record["prompt"])][:2]
    write_records(tmp_path / "two.jsonl", [record for record in records if not is_heldout(record["prompt"])] + heldout)
    flags = "grpo --problems 50 --max-new-tokens 12 --device cpu --method greedy --split heldout"
    flags += f" --data {tmp_path / 'two.jsonl'}"
    [row] = evaluated(flags, tmp_path / "out.json")["rows"]
    assert "2 held-out problems" in capsys.readouterr().out and row["high"] - row["low"] > 0.5


@pytest.mark.parametrize("rows, flags, asked", [
    (range(99), "", "99 problems"), (range(99), "--split all", "99 problems"), (range(99), "--problems 40", "40 problems"),
    (range(99), "--split heldout", "12 held-out problems"), (range(99), "--split train", "87 training problems"),
    ([2, 5, 8], "", "3 problems"), ([2, 5, 8], "--split heldout --problems 9", "3 held-out problems"),
    ([0, 1], "", "2 problems"), ([0], "", "1 problems"), ([0, 2, 0, 2, 1], "", "3 problems"), (range(700), "", "700 problems")])
def test_a_file_of_ones_own_is_asked_row_by_row(rows, flags, asked, inside, tmp_path, capsys):
    """All of it, or a split; few rows, rows of one split, rows that repeat, more than an evaluation of a task asks."""
    write_records(tmp_path / "mine.jsonl", ({"prompt": f"Say {n}.", "answer": "x"} for n in rows))
    flags += f" --data {tmp_path / 'mine.jsonl'} --method greedy --max-new-tokens 9 --device cpu"
    evaluated(f"sft {flags}", tmp_path / "out.json")
    assert capsys.readouterr().out.startswith(f"{asked} of {tmp_path / 'mine.jsonl'}, on cpu.")


@pytest.mark.parametrize("runs, asked", [("grpo", "12 held-out problems"), ("sft grpo", "12 held-out problems"),
                                         ("sft", "99 problems")])
def test_of_a_file_that_a_run_was_trained_on_the_held_out_rows_are_asked(runs, asked, inside, tmp_path, capsys, monkeypatch):
    """Unless --split says otherwise; by whatever path the file is named."""
    monkeypatch.setattr(evaluate.Evaluation, "measure", lambda self: None)
    evaluated(f"{runs} --data ./wanted.jsonl --method greedy --max-new-tokens 9 --device cpu", tmp_path / "out.json")
    evaluated(f"{runs} --data wanted.jsonl --split all --method greedy --max-new-tokens 9 --device cpu", tmp_path / "out.json")
    found = [line for line in capsys.readouterr().out.splitlines() if "problems of" in line]
    assert found == [f"{asked} of ./wanted.jsonl, on cpu.", "99 problems of wanted.jsonl, on cpu."]


def test_a_file_says_what_can_hardly_be_right_before_it_is_asked(inside, tmp_path, capsys):
    rows = [("Say 1.", "so\n1"), ("Say 2.", "x"), ("Say 2.", "y"), ("Say 3.", "a long and winding answer")]
    write_records(tmp_path / "mine.jsonl", ({"prompt": prompt, "answer": answer} for prompt, answer in rows))
    evaluated(f"sft --data {tmp_path / 'mine.jsonl'} --method greedy --max-new-tokens 16 --device cpu", tmp_path / "out.json")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and all("mine.jsonl, line " in line for line in warnings)
    for part in ("all of these lines", "keep one", "--max-new-tokens 16; raise it"):
        assert any(part in line for line in warnings)


class Signed(Task):
    """Say the letter x: 1 if right, -1 if wrong."""

    name = "signed"

    def draw(self, rng):
        return Problem(f"Say {rng.randrange(99)}.", "x")

    def verify(self, problem, response):
        return 1 if final_answer(response) == problem.answer else -1


class Length(Signed):
    name = "length"

    def verify(self, problem, response):
        return len(response)


def test_a_task_of_ones_own_is_measured_by_what_is_right(inside, tmp_path, monkeypatch, capsys):
    """By every method, the rows are those of the same problems with rewards 0 and 1."""
    monkeypatch.setitem(TASKS, "signed", Signed)
    flags = "--problems 12 --max-new-tokens 12 --device cpu --n 4 --steps 2 --method greedy sample majority best_of_n power"
    found = evaluated(f"grpo --task signed {flags}", tmp_path / "signed.json")
    write_records(tmp_path / "same.jsonl", (vars(problem) for problem in heldout_problems(Signed(), 12, 0)))
    plain = evaluated(f"grpo {flags} --data {tmp_path / 'same.jsonl'}", tmp_path / "plain.json")
    assert found["rows"] == plain["rows"] and capsys.readouterr().out.count("| accuracy |") == 2
    assert any(0 < row["value"] < 1 for row in found["rows"])


def test_where_nothing_is_right_rewards_are_measured_and_votes_are_refused(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "length", Length)
    flags = "grpo --task length --problems 6 --max-new-tokens 12 --device cpu --n 4"
    rows = evaluated(f"{flags} --method sample best_of_n", tmp_path / "out.json")["rows"]
    said = capsys.readouterr()
    assert "| reward |" in said.out.replace("  ", "") and "accuracy" not in said.out
    assert "warning: the mean reward is measured, no accuracy: no answer to length is right or wrong" in said.err
    assert rows[0]["value"] > 1 and rows[0]["low"] < rows[0]["value"] < rows[0]["high"]
    assert [row["value"] for row in rows[1:]] == sorted(row["value"] for row in rows[1:])
    with pytest.raises(SystemExit):
        evaluated(f"{flags} --method majority", tmp_path / "out.json")
    assert "--method majority: no answer to length is right or wrong, for its class names no" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_file_alone_or_beside_others(inside, tmp_path, capsys):
    random.seed(5), torch.manual_seed(5)
    flags = f"{SMALL} --method sample power"
    both = evaluated(f"sft grpo {flags}", tmp_path / "a.json")
    again, other = (evaluated(f"grpo {flags} --seed {seed}", tmp_path / f"{seed}.json") for seed in (0, 1))
    alone = [row for row in both["rows"] if row["run"] == "grpo"]
    assert again["rows"] == alone and other["rows"] != alone
    said = capsys.readouterr().out
    for part in ("| grpo | sample", "6 held-out problems", "of the proposals accepted", "log p has an autocorrelation of"):
        assert part in said


def test_ways_of_answering_are_elicited_from_any_model(inside, tmp_path):
    """The tiny models know no sums, but their answers begin as they must, and what is forced counts as a token."""
    found = evaluated("sft --task addition --problems 3 --method direct worked sample --max-new-tokens 2 --n 2 --device cpu",
                      tmp_path / "out.json")
    direct, worked, sample = found["rows"]
    assert 1 <= sample["tokens"] <= 2 < worked["tokens"] + 1 <= 4 and 2 <= direct["tokens"] <= 3


def test_stories_are_measured_by_their_hidden_reward(inside, tmp_path, capsys):
    found = evaluated("sft --task stories --problems 3 --n 2 --method greedy sample best_of_n --scorer reward --device cpu "
                      "--reward-model reward --max-new-tokens 9", tmp_path / "out.json")
    assert all(row["value"] < 0 for row in found["rows"]) and "hidden reward" in capsys.readouterr().out


def test_the_figure_has_a_line_for_each_method(inside, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    evaluated(f"sft grpo {SMALL} --method greedy majority power --plot {tmp_path / 'search.png'}", tmp_path / "out.json")
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == [f"{name}: {method}" for name in ("sft", "grpo")
                      for method in ("greedy", "majority", "power 2, base", "power 4, base")]
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("named", ["{}/theirs.py:Task", "guess-/../../../../../../../../../..{}/theirs.py:Task"])
def test_a_program_that_a_checkpoint_names_is_not_run_unasked(named, inside, tmp_path, monkeypatch, capsys):
    """By no command, and whatever it is called."""
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    checkpoint = run.load_checkpoint("sft")
    checkpoint["config"] |= {"task": named.format(tmp_path), "data": ""}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit) as exit:
        evaluate.main(run.parse(evaluate.Config, [str(tmp_path)]))
    assert exit.value.code == 2 and "theirs.py:Task; say what to ask, with --task or --data" in capsys.readouterr().err
    evaluate.main(run.parse(evaluate.Config, [str(tmp_path), *["--data", "wanted.jsonl", "--method", "greedy"]]))
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 1."))
    chat.main(run.parse(chat.Config, [str(tmp_path)]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("flag, value", [("task", 5), ("data", ["x"]), ("verifier", {"x": 1})])
def test_flags_in_a_checkpoint_that_are_no_texts_are_refused(flag, value, inside, tmp_path):
    checkpoint = run.load_checkpoint("sft")
    checkpoint["config"][flag] = value
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"not a sound checkpoint .its --{flag} is .*, expected a text"):
        run.load_checkpoint(tmp_path)


@pytest.mark.parametrize(("flags", "named"), [
    ("", "runs"), ("nowhere", "nowhere"), ("reward", "policy"), ("sft --method best", "--method"),
    ("sft --alpha 2 0", "--alpha 2.0 0.0"), ("sft --n 0", "--n 0"), ("sft --steps x", "--steps"),
    ("sft --task chess", "--task chess"), ("sft --task stories --method majority", "--method majority"),
    ("sft --task addition-99", "--task addition-99"), ("sft --task addition --scorer reward", "--reward-model"),
    ("sft --task addition --reward-model reward", "--scorer"), ("sft --out nowhere/x.json", "nowhere"),
    ("sft --plot .", "file"), ("sft --alpha 2", "low_temperature or power"),
    ("sft --method worked --scorer logprob", "best_of_n"), ("sft --method greedy majority --steps 9", "expected power"),
    ("sft --method low_temperature --proposal base", "expected power"),
    ("sft --task addition --max-new-tokens 9999", "--max-new-tokens 9999"), ("sft --device cuda", "--device cuda"),
    ("sft --task addition --scorer reward --reward-model sft", "reward model"), ("sft --data nothing.jsonl", "nothing.jsonl"),
    ("sft --data wanted.jsonl --method worked", "wanted.jsonl"), ("sft --temperature nan", "--temperature nan"),
    ("grpo", "say what to ask"), ("sft --task addition --temperature 1e-60 --max-new-tokens 9", "nan or inf"),
    ("sft --task addition --method low_temperature --alpha 1e-320 --max-new-tokens 9", "--alpha 1e-320")])
def test_bad_input_is_one_sentence(flags, named, inside, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as exit:
        evaluate.main(run.parse(evaluate.Config, flags.split()))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and named in error and len(error) < 500, error
