"""Bad input ends in one sentence that names it, with exit code 2 and no traceback, and nothing is written over.

A case is a script, its flags, and what the sentence has to name.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from world import DPO, PRETRAIN, SCRIPTS, cut_final_line, metrics, start, write_records

import train_distill
import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_reward
import train_sft
from nanorl import run
from nanorl.files import read_records, read_text
from nanorl.run.checkpoint import CHECKPOINT_FIELDS
from nanorl.tasks import TASKS, Problem, Task, final_answer, is_heldout
from nanorl.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("inside")
ALL = (train_pretrain, train_sft, train_reward, train_dpo, train_group_dpo, train_grpo, train_ppo, train_distill)


def refused(capsys, script, argv):
    """The one sentence with which the script refuses `argv`, having changed nothing."""
    files = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path().rglob("*")}
    with pytest.raises(SystemExit) as exit:
        script.main(run.parse(script.Config, [*argv, *([] if "--out" in argv else ["--out", "new"]), "--quiet"]))
    error = capsys.readouterr().err
    assert exit.value.code == 2, error
    assert error.count("\n") == 1 and len(error) < 600 and "Traceback" not in error, error
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path().rglob("*")} == files
    return error


# ---- flags ----


@pytest.mark.parametrize(("flags", "named"), [
    ("--stepz 3", "--stepz"), ("--step 3", "--step"), ("3", "3"), ("--steps", "--steps"), ("--steps 1.5", "--steps"),
    ("--steps 0", "--steps 0"), ("--lr -1", "--lr -1.0"), ("--lr nan", "--lr nan"), ("--lr fast", "--lr"),
    ("--seed -1", "--seed -1"), ("--device cuda", "--device cuda"), ("--dtype float8", "--dtype"),
    ("--eval-every 0", "--eval-every 0"), ("--save-every inf", "--save-every"),
    ("--quiet=yes", "--quiet"), ("--resume --out nowhere", "nowhere"), ("--out text.txt", "text.txt")])
@pytest.mark.parametrize("script", ALL, ids=lambda script: script.__name__)
def test_a_bad_flag_that_every_script_has_is_refused(script, flags, named, capsys):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert named in refused(capsys, script, flags.split())


BAD = [
    (train_pretrain, "--text missing.txt", "missing.txt"), (train_pretrain, "--text empty.txt", "empty.txt"),
    (train_pretrain, "--text .", "not a file"), (train_pretrain, "--text binary.txt", "not UTF-8"),
    (train_pretrain, "--text tiny.txt", "tiny.txt"), (train_pretrain, "--vocab-size 100", "261"),
    (train_pretrain, "--tokenizer gpt3", "gpt3"), (train_pretrain, "--tokenizer text.txt", "text.txt, line 1"),
    (train_pretrain, "--length 1000", "--length 1000"), (train_pretrain, "--preset huge", "--preset"),
    (train_sft, "--data missing.jsonl", "missing.jsonl"), (train_sft, "--data bad.jsonl --init pretrain", "bad.jsonl, line 2"),
    (train_sft, "--task cooking --init pretrain", "cooking"), (train_sft, "--task addition-99 --init pretrain", "addition-99"),
    (train_sft, "--init nowhere", "nowhere"), (train_sft, "--init text.txt", "text.txt"),
    (train_sft, "--data letters.jsonl --task cooking", "--task cooking"),
    *((train_sft, f"{flag} {'x' * 300}", "xxx: ") for flag in ("--out", "--init", "--data")),
    (train_sft, "--data long.jsonl --init pretrain", "long.jsonl, line 1: 504 tokens; expected"),
    (train_pretrain, "--init pretrain --preset mini", "--preset mini"), (train_pretrain, "--out text.txt/new", "text.txt"),
    (train_grpo, "--init sft --data one.jsonl", "one.jsonl"), (train_grpo, "--init nowhere", "nowhere"),
    (train_grpo, "--group 1 --init sft", "--group 1"),
    (train_grpo, "--minibatches 1000 --init sft", "--minibatches 1000"), (train_grpo, "--temperature 0", "--temperature 0.0"),
    (train_grpo, "--clip-low 2", "--clip-low"), (train_grpo, "--algo magic", "--algo"),
    (train_grpo, "--max-new-tokens 1000 --init sft", "--max-new-tokens 1000"),
    (train_grpo, "--advantage best", "--advantage"), (train_grpo, "--init sft --data bad.jsonl", "bad.jsonl, line 2"),
    (train_grpo, "--device tpu", "--device"), (train_grpo, "--out sft", "sft"),
    (train_grpo, "--out nowhere --resume", "nowhere"), (train_grpo, "--stale 40 --init sft", "--stale 40"),
    *((train_grpo, flags, named) for flags, named in [
        ("--algo cispo --clip-low 0.1", "--bound truncate --clip-low 0.1"),
        ("--algo sapo --clip-high 0.1", "--bound soft --clip-high 0.1"),
        ("--algo reinforce --clip-high 0.3", "--bound none --clip-high 0.3"),
        ("--cap 5", "--cap 5"), ("--kl k2", "--kl k2: requires --kl-coef"),
        ("--refresh-reference 5", "--refresh-reference 5: requires --kl-coef"), ("--kl-coef 0.1 --kl k1", "'k1'"),
        ("--kl-coef 0.1 --kl k3_reward", "'k3_reward'"),
        ("--ratio none", "--ratio none --bound clip"), ("--ratio sequence --aggregate token_mean", "--aggregate token_mean"),
        ("--bound mask --clip-low 9", "--clip-low 9.0"), ("--bound mask --clip-high -0.5", "--clip-high -0.5"),
        ("--bound truncate --clip-high 0", "--clip-high 0.0"),
        ("--algo raft --overlong 0.2", "--overlong 0.2"), ("--kl-coef 0.1 --kl k1_reward", "--advantage zscore"),
        ("--init sft --likelihood-coef 0.1 --data heldout.jsonl", "heldout.jsonl: the train split is empty"),
        ("--clip-high inf --bound mask", "--clip-high inf"),
        ("--advantage positive --kl-coef 0.1 --kl k1_reward", "--advantage positive"),
        ("--algo raft --group 1 --groups drop", "--group 1"),
        ("--task stories", "no verifier"), ("--overlong 2", "--overlong 2.0"),
        ("--task calculator --overlong 0.1", "--overlong 0.1"),
        ("--skip --kl-coef 0.1", "--skip True --kl-coef"), ("--skip --entropy-coef 0.1", "--entropy-coef 0.1"),
        ("--init sft --likelihood-coef 0.1 --data longanswers.jsonl", "longanswers.jsonl, line ")]),
    *((train_reward, flags, named) for flags, named in [
        ("--data missing.jsonl", "missing.jsonl"), ("--data bad.jsonl", "bad.jsonl, line 1"),
        ("--init sft --data longpairs.jsonl", "longpairs.jsonl, line 1: "), ("--data same.jsonl", "same.jsonl"),
        ("--init reward --data pairs.jsonl", "reward model"), ("--data heldoutpairs.jsonl", "heldoutpairs.jsonl"),
        ("--batch 0", "--batch 0"), ("--lr nan", "--lr nan")]),
    *((train_dpo, flags, named) for flags, named in [
        ("--data same.jsonl", "same.jsonl"), ("--loss orpo", "--loss"), ("--loss slic --beta 0.1", "--beta 0.1"),
        ("--label-noise 0.1", "--label-noise 0.1"), ("--gamma 1", "--gamma 1.0"), ("--delta 1", "--delta 1.0"),
        ("--loss simpo --refresh-reference 3", "--refresh-reference 3"), ("--judge hidden", "--judge hidden"),
        ("--online --data pairs.jsonl", "--data pairs.jsonl"), ("--online --judge verifier", "--judge verifier"),
        ("--online --task addition --judge model", "--judge model"), ("--task addition", "--task addition"),
        ("--task cooking", "--task cooking"), ("--init reward --data pairs.jsonl", "reward model"), ("--beta 0", "--beta 0.0"),
        ("--loss kto --batch 1", "--batch 1"),
        ("--init sft --reward-model sft", "holds a policy"), ("--init sft --reward-model nowhere", "nowhere"),
        ("--online --init nowhere", "nowhere"), ("--data pairs.jsonl --reward-model reward", "--reward-model reward"),
        ("--init sft --data pairs.jsonl --max-new-tokens 999", "--max-new-tokens 999")]),
    *((train_group_dpo, flags, named) for flags, named in [
        ("--group 1", "--group 1"), ("--margin 2", "only --loss hinge"), ("--loss hinge --margin 0", "--margin 0.0"),
        ("--task stories", "no verifier"), ("--data one.jsonl", "one.jsonl"), ("--init reward", "reward model"),
        ("--loss triplet", "--loss"), ("--init sft --data wanted.jsonl --max-new-tokens 999", "--max-new-tokens 999")]),
    *((train_ppo, flags, named) for flags, named in [
        ("--reward-model reward", "--reward-model reward"), ("--kl-target 3", "--kl-target 3.0"),
        ("--minibatches 1000", "--minibatches 1000"), ("--task stories", "no verifier"), ("--gamma 2", "--gamma 2.0"),
        ("--reward human", "--reward"), ("--reward model --reward-model sft --init sft", "holds a policy"),
        ("--reward model --reward-model nowhere", "nowhere"), ("--reward model --init nowhere", "nowhere"),
        ("--init reward", "reward model"), ("--lam nan", "--lam nan"),
        ("--init sft --data wanted.jsonl --max-new-tokens 999", "--max-new-tokens 999"),
        ("--value-clip 0", "--value-clip 0.0")]),
    *((train_distill, flags, named) for flags, named in [
        ("--teacher nowhere", "nowhere"), ("--teacher reward", "reward model"), ("--init nowhere", "nowhere"),
        ("--init reward --teacher sft", "reward model"), ("--beta 0.5", "only --divergence jsd"), ("--tau 0", "--tau 0.0"),
        ("--divergence jsd --beta 1", "--beta 1.0"), ("--gradient sequence", "--gradient sequence --on teacher"),
        ("--gradient sequence --on student --divergence reverse --tau 2", "--tau 2.0"),
        ("--gradient sequence --on student --divergence reverse --top-k 3", "--top-k 3"),
        ("--gradient sequence --on student --divergence reverse --group 1", "--group 1"), ("--top-k -1", "--top-k -1"),
        ("--data letters.jsonl", "--on teacher"), ("--on data --data missing.jsonl", "missing.jsonl"),
        ("--on data --data heldout.jsonl --init sft --teacher sft", "heldout.jsonl"), ("--on nobody", "--on"),
        ("--on data --data long.jsonl --init sft --teacher sft", "long.jsonl, line 1: "), ("--task stories", "no verifier"),
        ("--init sft --teacher sft --max-new-tokens 999", "--max-new-tokens 999")]),
]


@pytest.fixture(scope="module")
def bad_files(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        Path("empty.txt").write_text("\n")
        Path("tiny.txt").write_text("a b")
        Path("binary.txt").write_bytes(b"\xff\xfe")
        Path("bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
        heldout = [f"Say {i}." for i in range(99) if is_heldout(f"Say {i}.")]
        write_records(Path("heldout.jsonl"), ({"prompt": prompt, "answer": "x", "response": "x"} for prompt in heldout))
        asked = [{"prompt": f"Say {i}.", "answer": "x"} for i in range(99)]
        write_records(Path("longanswers.jsonl"), (record | {"response": "b " * 500} for record in asked))
        Path("one.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
        Path("long.jsonl").write_text(json.dumps({"prompt": "a " * 500, "response": "b"}) + "\n")
        write_records(Path("same.jsonl"), [{"prompt": "a", "chosen": "b", "rejected": "b"}])
        write_records(Path("longpairs.jsonl"), [{"prompt": "a " * 500, "chosen": "b", "rejected": "c"}])
        write_records(Path("heldoutpairs.jsonl"), ({"prompt": prompt, "chosen": "x", "rejected": "y"} for prompt in heldout))


@pytest.mark.parametrize(("script", "flags", "named"), BAD)
def test_bad_flags_and_files_of_a_script_are_refused(script, flags, named, bad_files, capsys):
    assert named in refused(capsys, script, flags.split())


class Broken(Task):
    """A verifier that says something else than a number where the answer is wrong."""

    name, value = "broken", "wrong"

    def draw(self, rng):
        return Problem(f"Say {rng.randrange(99)}.", "x")

    def verify(self, problem, response):
        return 1.0 if final_answer(response) == problem.answer else self.value


@pytest.mark.parametrize("value", [{}, "wrong", float("nan"), [0.0]], ids=str)
@pytest.mark.parametrize("script", [train_grpo, train_ppo, train_group_dpo, train_sft, train_distill],
                         ids=lambda script: script.__name__)
def test_a_reward_that_is_no_number_is_refused_before_any_stage_is_made(script, value, capsys, monkeypatch):
    monkeypatch.setitem(TASKS, "broken", type("Own", (Broken,), {"value": value}))
    error = refused(capsys, script, ["--task", "broken", "--device", "cpu"])
    for part in ("task broken: the reward of", "'Say ", repr(value), "expected a finite number, True or False"):
        assert part in error


@pytest.mark.parametrize("script", [train_grpo, train_ppo, train_group_dpo], ids=lambda script: script.__name__)
@pytest.mark.parametrize("file, split", [("heldout.jsonl", "train"), ("one.jsonl", "heldout")])
def test_a_file_without_rows_to_train_on_or_to_evaluate_with_is_refused(script, file, split, bad_files, capsys):
    error = refused(capsys, script, ["--data", file, "--device", "cpu"])
    assert f"{file}: the {split} split is empty: one prompt in ten is held out by its hash, here" in error


STAGES = [(train_pretrain, "missing.txt tiny.txt", "--text"), (train_sft, "missing.jsonl bad.jsonl heldout.jsonl", "--data"),
          (train_reward, "missing.jsonl bad.jsonl same.jsonl", "--data"),
          (train_dpo, "missing.jsonl bad.jsonl heldoutpairs.jsonl", "--data"), (train_grpo, "bad.jsonl one.jsonl", "--data"),
          (train_ppo, "bad.jsonl one.jsonl", "--data"),
          (train_ppo, "sft", "--reward model --reward-model"), (train_distill, "missing.jsonl bad.jsonl", "--on data --data"),
          (train_group_dpo, "missing.jsonl bad.jsonl heldout.jsonl", "--data")]


@pytest.mark.parametrize(("script", "files", "flags"), STAGES)
def test_a_file_is_checked_before_the_stages_before_are_made(script, files, flags, bad_files, capsys):
    """No --init: all of them would have to be made first. Nothing is made, and the sentence names the file."""
    for file in files.split():
        assert file in refused(capsys, script, [*flags.split(), file])
    assert not Path("runs").exists()


PROMPT, NO_ROOM, ANSWER = {"prompt": "Say 1." + " x" * 500}, {"prompt": "Say 1." + " x" * 115}, {"response": "x" * 300,
                                                                                               "chosen": "x" * 300}
MADE = "--steps 1 --device cpu --init"


@pytest.mark.parametrize(("script", "flags", "fitting"), [
    (train_sft, f"{MADE} pretrain --max-new-tokens 40 --data letters.jsonl", ()),
    (train_reward, f"{MADE} sft --data pairs.jsonl", (NO_ROOM,)),
    (train_dpo, f"{MADE} sft --max-new-tokens 40 --data pairs.jsonl", ()),
    (train_distill, f"{MADE} sft --on data --teacher grpo --eval-problems 3 --data letters.jsonl", (NO_ROOM,)),
    *((script, f"{MADE} sft --prompts 3 --eval-problems 3 --max-new-tokens 40 --data wanted.jsonl", (ANSWER,))
      for script in (train_grpo, train_ppo, train_group_dpo))])
def test_rows_that_are_too_long_are_named_by_their_lines_and_can_be_left_out(script, flags, fitting, tmp_path, capsys):
    """Two of a hundred rows, in a file with blank lines: the prompt, what is to be sampled after it, or a response. Without
    them, the run is that of the file without them."""
    *flags, data = flags.split()
    records = [json.loads(line) for line in Path(data).read_text().splitlines()]
    start(script, " ".join([*flags, data]), tmp_path / "plain")
    for n, long in enumerate((PROMPT, NO_ROOM, ANSWER)):
        rows = [json.dumps(record) for record in records]
        first, second = (json.dumps(record | long) for record in records[:2])
        Path("mixed.jsonl").write_text("\n".join(["", "", *rows[:2], first, *rows[2:77], second, *rows[77:]]))
        if long in fitting:
            start(script, " ".join([*flags, "mixed.jsonl"]), tmp_path / str(n))
            continue
        capsys.readouterr()
        error = refused(capsys, script, [*flags, "mixed.jsonl"])
        assert "mixed.jsonl, line 5: " in error and "; line 81: " in error and "--skip-long" in error and "more;" not in error
        start(script, " ".join([*flags, "mixed.jsonl", "--skip-long"]), tmp_path / str(n))
        assert re.search(r"Left out 2 of \d+ records of mixed\.jsonl", capsys.readouterr().out)
        assert metrics(tmp_path / str(n)) == metrics(tmp_path / "plain")


def test_every_row_too_long_is_refused_also_with_skip_long(bad_files, capsys):
    flags = f"{MADE} pretrain --skip-long --data long.jsonl"
    assert "long.jsonl, line 1: " in refused(capsys, train_sft, flags.split())
    flags = f"{MADE} sft --skip-long --max-new-tokens 999 --data wanted.jsonl"
    error = refused(capsys, train_grpo, flags.split())
    assert "--max-new-tokens 999" in error and "and 96 more" in error


def test_golds_that_no_response_can_have_are_named_by_their_lines(capsys):
    golds = ["x", " ", "y" * 300, "Answer: 7 or Answer: 8", "a\nb", "\t"]
    write_records(Path("golds.jsonl"), [{"prompt": f"Say {i}.", "answer": golds[i % 6]} for i in range(60)])
    error = refused(capsys, train_grpo, [*MADE.split(), "sft", "--data", "golds.jsonl"])
    assert "golds.jsonl, line 2: ' '; line 3: 'yyy" in error
    assert "; line 4: 'Answer: 7 or Answer: 8'; and 37 more; expected" in error


# ---- text and records ----


TEXTS = {
    "one character": (b"a", "1 held out"),
    "a word": (b"word", "tokens to train on"),
    "blanks": (b" \n\t\r\n", "empty"),
    "only a byte order mark": (b"\xef\xbb\xbf", "empty"),
    "a NUL": (b"text\0more", "byte 4 is 0x00"),
    "invalid UTF-8": (b"abc\xff", "byte 3 is 0xff"),
    "half a character": (b"abc\xf0\x9f\x99", "not UTF-8"),
    "UTF-16": ("text".encode("utf-16"), "0x00"),
    "a surrogate": (b"\xed\xa0\x80", "not UTF-8"),
    "an archive": (b"PK\x03\x04\0\0", "0x00"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_bad_text_is_refused(name, capsys):
    content, named = TEXTS[name]
    Path("bad.txt").write_bytes(content)
    error = refused(capsys, train_pretrain, ["--text", "bad.txt"])
    assert "bad.txt" in error and named in error


def test_a_sparse_gigabyte_is_refused_at_once(capsys):
    with open("hole.txt", "wb") as f:
        f.truncate(1 << 30)
    assert "byte 0 is 0x00" in refused(capsys, train_pretrain, ["--text", "hole.txt"])
    os.remove("hole.txt")


def test_what_is_no_file_is_refused(capsys):
    for name in ("nowhere", "nowhere/deeper", "sft", "/dev/null"):
        assert name in refused(capsys, train_pretrain, ["--text", name])
        assert name in refused(capsys, train_sft, ["--data", name, "--init", "pretrain"])


GOOD = '{"prompt": "a", "response": "b"}'
RECORDS = {
    "not JSON": ("hello", "not readable as JSON"),
    "half an object": ('{"prompt": "a"', "not readable as JSON"),
    "two objects": (GOOD + GOOD, "not readable as JSON"),
    "single quotes": (GOOD.replace('"', "'"), "not readable as JSON"),
    "a comma too many": ('{"prompt": "a", "response": "b",}', "not readable as JSON"),
    "a list": ('["a", "b"]', "list"),
    "a string": ('"a"', "str"),
    "null": ("null", "NoneType"),
    "a number": ("3", "int"),
    "NaN": ("NaN", "float"),
    "an array over all lines": ("[" + GOOD + ",", "not readable as JSON"),
    "no response": ('{"prompt": "a"}', "'response'"),
    "no prompt": ('{"response": "a"}', "'prompt'"),
    "no key": ("{}", "'prompt'"),
    "another case": ('{"Prompt": "a", "response": "b"}', "'prompt'"),
    "empty response": ('{"prompt": "a", "response": ""}', "non-empty"),
    "empty prompt": ('{"prompt": "", "response": "a"}', "non-empty"),
    "null response": ('{"prompt": "a", "response": null}', "is null (NoneType)"),
    "a number as response": ('{"prompt": "a", "response": 3}', "'response' is 3 (int)"),
    "a list as prompt": ('{"prompt": ["a"], "response": "b"}', "a"),
    "messages": ('{"messages": [{"role": "user", "content": "a"}]}', "'prompt'"),
    "true": ('{"prompt": true, "response": "b"}', "is true (bool)"),
    "a key twice": ('{"prompt": "a", "prompt": "b", "response": "c"}', "twice"),
    "half a surrogate pair": ('{"prompt": "a\\ud800", "response": "b"}', "surrogate"),
    "a million digits": ('{"prompt": "a", "response": ' + "9" * 1_000_000 + "}", "not readable as JSON"),
    "a million digits elsewhere": ('{"prompt": "a", "response": "b", "n": ' + "9" * 10**6 + "}", "not readable as JSON"),
    "deep nesting": ('{"prompt": ' + "[" * 100_000, "not readable as JSON"),
    "a raw NUL": ('{"prompt": "a\0", "response": "b"}', "0x00"),
    "a raw tab": ('{"prompt": "a\t", "response": "b"}', "not readable as JSON"),
    "a bad escape": ('{"prompt": "\\x", "response": "b"}', "not readable as JSON"),
    "too long for the context": (json.dumps({"prompt": "a " * 500, "response": "b"}), "context"),
    "a long answer": (json.dumps({"prompt": "a", "response": "b " * 500}), "context"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record_is_refused_with_its_line(name, capsys):
    """The bad line is the third, and the sentence says so."""
    line, named = RECORDS[name]
    Path("bad.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    error = refused(capsys, train_sft, ["--data", "bad.jsonl", "--init", "pretrain"])
    assert "bad.jsonl" in error and named in error
    assert "line 3" in error or "0x00" in error


def test_records_that_only_look_bad_are_read(tmp_path):
    """A byte order mark, CRLF, blank lines, further keys, and U+2028, U+0085 and an escaped NUL inside of a string."""
    path, strange = tmp_path / "fine.jsonl", "a\u2028b\u0085c\0d\x1f"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n".encode() + json.dumps({"prompt": strange, "response": "é", "id": 7},
                     ensure_ascii=False).replace("\0", "\\u0000").encode() + b"\n  \n" + GOOD.encode())
    assert [r["prompt"] for r in read_records(path, "demonstrations")] == ["a", strange, "a"]
    path.write_text("a\u2028b\r\n")
    assert read_text(path) == "a\u2028b\r\n"


# ---- tokenizers ----


def rank_lines():
    return Tokenizer.train("a tiny text, a tiny text", 270).state_dict()["ranks"].splitlines()


TOKENIZERS = {
    "empty": (lambda lines: [], "line 1"),
    "unsorted": (lambda lines: lines[::-1], "line 1"),
    "a duplicate": (lambda lines: [*lines, lines[0].split()[0] + f" {len(lines)}"], "line 1"),
    "a byte is missing": (lambda lines: [f"{line.split()[0]} {i}" for i, line in enumerate(lines[1:])], "byte 0"),
    "a gap": (lambda lines: lines[:5] + lines[6:], "line 6"),
    "no rank": (lambda lines: [lines[0].split()[0]], "line 1"),
    "not base64": (lambda lines: ["!!! 0"], "line 1"),
    "a rank of letters": (lambda lines: [lines[0].split()[0] + " x"], "line 1"),
    "three words": (lambda lines: [lines[0] + " 0"], "line 1"),
    "a negative rank": (lambda lines: ["AA== -1"], "line 1"),
    "JSON": (lambda lines: ['{"model": {"vocab": {}}}'], "line 1"),
    "a million digits": (lambda lines: ["AA== " + "9" * 10**6], "line 1"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_bad_tokenizer_file_is_refused_with_its_line(name, capsys):
    change, named = TOKENIZERS[name]
    Path("bad.tiktoken").write_text("\n".join(change(rank_lines())) + "\n")
    error = refused(capsys, train_pretrain, ["--text", "text.txt", "--tokenizer", "bad.tiktoken"])
    assert "bad.tiktoken" in error and named in error


# ---- checkpoints ----


class Exploding:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def without(key):
    return lambda c: {name: part for name, part in c.items() if name != key}


def with_weight(change):
    """A checkpoint whose first matrix is changed."""
    def changed(checkpoint):
        name = next(name for name, x in checkpoint["model"].items() if x.ndim == 2)
        return checkpoint | {"model": checkpoint["model"] | {name: change(checkpoint["model"][name].clone())}}
    return changed


def with_gpt(**flags):
    return lambda c: c | {"gpt": c["gpt"] | flags}


CHATML_WITHOUT_TOKENS = {"vocab": {"a": 0}, "special": {"x": 1}, "in_text": [], "pre_tokenizer": "gpt-2", "normalize": False,
                         "template": {"family": "chatml"}, "bos": 1, "end": 1, "pad": 1, "stop_ids": [1]}
CHECKPOINTS = {
    "code": (lambda c: c | {"state": {"x": Exploding()}}, "not a sound checkpoint"),
    "a tensor": (lambda c: torch.zeros(3), "Tensor"),
    "a list": (lambda c: [c], "list"),
    "bare weights": (lambda c: c["model"], "format"),
    "an older version": (lambda c: c | {"format": 0}, "found 0"),
    "a future version": (lambda c: c | {"format": 2}, "found 2"),
    "no version": (without("format"), "found None"),
    **{f"no {key}": (without(key), f"'{key}'") for key in CHECKPOINT_FIELDS},
    "a step of words": (lambda c: c | {"step": "3"}, "'step'"),
    "weights in a list": (lambda c: c | {"model": [1]}, "'model'"),
    "a nan weight": (with_weight(lambda x: x.fill_(torch.nan)), "nan"),
    "an inf weight": (with_weight(lambda x: x.fill_(-torch.inf)), "inf"),
    "a weight of another shape": (with_weight(lambda x: x[:-1]), "has the shape"),
    "a weight that is none": (with_weight(lambda x: 1), "ckpt.pt"),
    "no weights": (lambda c: c | {"model": {}}, "its 0 weights"),
    "a weight too many": (lambda c: c | {"model": c["model"] | {"x": torch.ones(2)}}, "its x has the shape"),
    "another width": (with_gpt(width=32), "has the shape"),
    "more layers": (with_gpt(layers=5), "has the shape None"),
    "a million layers": (with_gpt(layers=10**6), "expected several weights a layer"),
    "a context without end": (with_gpt(context=2**40), "a context of at most 1048576"),
    "odd heads": (with_gpt(heads=5), "heads=5"),
    "no layers": (with_gpt(layers=0), "layers=0"),
    "words for a width": (with_gpt(width="wide"), "ckpt.pt"),
    "another architecture": (lambda c: c | {"gpt": {"n_embd": 768}}, "n_embd"),
    "other positions": (with_gpt(positions="alibi"), "alibi"),
    "another tokenizer": (lambda c: c | {"tokenizer": Tokenizer.train("other", 270).state_dict()}, "tokenizer of"),
    "no such tokenizer": (lambda c: c | {"tokenizer": {"name": "gpt3"}}, "gpt3"),
    "half a tokenizer": (lambda c: c | {"tokenizer": {"ranks": "AA== 0"}}, "byte 1"),
    "a tokenizer of tensors": (lambda c: c | {"tokenizer": {"ranks": torch.ones(3)}}, "ckpt.pt"),
    "a template of tokens that are not there": (lambda c: c | {"tokenizer": CHATML_WITHOUT_TOKENS}, "<|im_start|>"),
    "an empty tokenizer": (lambda c: c | {"tokenizer": {}}, "tokenizer"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_unsound_checkpoint_is_refused_and_runs_no_code(name, capsys):
    change, named = CHECKPOINTS[name]
    Path("bad").mkdir(exist_ok=True)
    torch.save(change(run.load_checkpoint("sft")), "bad/ckpt.pt")
    error = refused(capsys, train_grpo, ["--init", "bad", "--data", "wanted.jsonl"])
    assert "bad/ckpt.pt" in error and named in error
    assert not Path("owned").exists()


@pytest.mark.parametrize("length", [0, 1, 100, 5_000, -1000, -1])
def test_a_truncated_checkpoint_is_refused(length, capsys):
    Path("bad").mkdir(exist_ok=True)
    Path("bad/ckpt.pt").write_bytes(Path("sft/ckpt.pt").read_bytes()[:length])
    assert "bad/ckpt.pt" in refused(capsys, train_grpo, ["--init", "bad", "--data", "wanted.jsonl"])


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04", b"\0" * 1000],
                         ids=["text", "pickle", "zip", "NUL"])
def test_a_file_that_is_no_checkpoint_is_refused(content, capsys):
    Path("bad.pt").write_bytes(content)
    assert "bad.pt" in refused(capsys, train_sft, ["--init", "bad.pt"])
    assert "bad.pt" in refused(capsys, train_ppo, ["--init", "sft", "--reward", "model", "--reward-model", "bad.pt"])


def test_a_teacher_of_another_tokenizer_is_refused(capsys):
    start(train_pretrain, PRETRAIN.replace("--vocab-size 300", "--vocab-size 301") + " --steps 1", "foreign")
    error = refused(capsys, train_distill, ["--init", "sft", "--teacher", "foreign"])
    assert "foreign" in error and "another tokenizer" in error


def test_a_reward_model_of_another_tokenizer_is_refused(capsys):
    checkpoint = run.load_checkpoint("reward")
    *lines, a, b = [line.split()[0] for line in checkpoint["tokenizer"]["ranks"].splitlines()]
    ranks = "".join(f"{token} {rank}\n" for rank, token in enumerate([*lines, b, a]))
    torch.save(checkpoint | {"tokenizer": {"ranks": ranks}}, "bad.pt")
    argv = [*DPO.replace("--data pairs.jsonl", "--online").split(), "--reward-model", "bad.pt"]
    assert "another tokenizer" in refused(capsys, train_dpo, argv)


# ---- runs that somebody has touched ----


def with_flag(name, value):
    return "config.json", lambda content: json.dumps(json.loads(content) | {name: value}).encode()


def changed(content, **parts):
    """A checkpoint's bytes with other parts."""
    buffer = io.BytesIO()
    torch.save(torch.load(io.BytesIO(content), weights_only=True) | parts, buffer)
    return buffer.getvalue()


RUNS = {
    "no JSON": (("config.json", lambda content: content[:50]), "config.json"),
    "a list": (("config.json", lambda content: b"[]"), "list"),
    "steps of words": (with_flag("steps", "many"), "steps is 'many'"),
    "half a step": (with_flag("steps", 1.5), "steps is 1.5"),
    "a negative rate": (with_flag("lr", -1), "lr is -1"),
    "a true rate": (with_flag("lr", True), "lr is True"),
    "no such loss": (with_flag("loss", "orpo"), "loss is"),
    "a seed of null": (with_flag("seed", None), "seed is None"),
    "a directory of 3": (with_flag("init", 3), "init is 3"),
    "a line of garbage": (("metrics.jsonl", lambda content: b"garbage\n" + content), "metrics.jsonl, line 1"),
    "garbage in the middle of a run": (("metrics.jsonl", lambda content: b"garbage\n" + content), "metrics.jsonl, line 1"),
    "a line without a step": (("metrics.jsonl", lambda content: content + b"{}\n"), "metrics.jsonl, line 4"),
    "a step of words in a line": (("metrics.jsonl", lambda content: content + b'{"step": "x"}\n'), "metrics.jsonl, line 4"),
    "garbage in the samples": (("samples.jsonl", lambda content: content + b"\xff\n"), "samples.jsonl, line"),
    "another optimizer": (("ckpt.pt", lambda content: changed(content, optimizer=[])), "its optimizer"),
    "an empty checkpoint": (("ckpt.pt", lambda content: b""), "ckpt.pt"),
    "half a checkpoint": (("ckpt.pt", lambda content: content[:-9999]), "ckpt.pt"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_somebody_has_touched_is_not_resumed(name, capsys):
    """... and resumed: the sentence names the file, and the rest of the run is as it was."""
    (file, change), named = RUNS[name]
    shutil.rmtree("touched", ignore_errors=True)
    shutil.copytree("dpo", "touched")
    cut_final_line("touched")
    if "middle" in name:
        Path("touched/ckpt.pt").write_bytes(changed(Path("dpo/ckpt.pt").read_bytes(), step=1))
    path = Path("touched", file)
    path.write_bytes(change(path.read_bytes()))
    error = refused(capsys, train_dpo, ["--out", "touched", "--resume"])
    assert file in error and named in error


@pytest.mark.parametrize(("script", "name"), [(train_group_dpo, "grpo"), (train_sft, "dpo"), (train_ppo, "grpo"),
                                              (train_dpo, "reward"), (train_grpo, "pretrain")])
def test_a_run_is_not_resumed_by_another_script(script, name, capsys):
    assert "another script" in refused(capsys, script, ["--out", name, "--resume"])


def test_a_run_whose_checkpoint_is_gone_is_not_begun_anew(capsys):
    shutil.rmtree("touched", ignore_errors=True)
    shutil.copytree("dpo", "touched")
    Path("touched/ckpt.pt").unlink()
    assert "ckpt.pt is gone" in refused(capsys, train_dpo, ["--out", "touched", "--resume"])
    Path("touched/config.json").unlink()
    assert "holds a run already" in refused(capsys, train_dpo, [*DPO.split(), "--out", "touched"])


def test_two_processes_do_not_write_one_run(capsys):
    shutil.rmtree("touched", ignore_errors=True)
    shutil.copytree("dpo", "touched")
    cut_final_line("touched")
    code = "import fcntl; f = open('touched/config.json', 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "1\n"
    assert "another process" in refused(capsys, train_dpo, ["--out", "touched", "--resume"])
    other.communicate("\n")
    start(train_dpo, "--resume --quiet", "touched")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_used_directory_is_never_written_over(name, capsys):
    script, flags = SCRIPTS[name]
    assert name in refused(capsys, script, [*flags.split(), "--out", name])
