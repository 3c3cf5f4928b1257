"""A talk says what the engine samples and the scorer scores, takes commands, and survives whatever is typed."""

import io
import math
import sys

import pytest
import torch

from nanorl import chat, run
from nanorl.decode import sampling_logits
from nanorl.sample import generate, token_log_probs


@pytest.fixture
def talk(world, monkeypatch, capsys):
    """Run the chat on lines from a pipe; returns what it prints and what it complains of."""
    monkeypatch.chdir(world)

    def talk(flags, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat.main(run.parse(chat.Config, [*flags.split(), "--device", "cpu"]))
        return capsys.readouterr()

    return talk


def sampled(folder, prompts, numbers, **how):
    """The same answers, straight from the engine; `numbers` are those of the lines."""
    checkpoint = run.load_checkpoint(folder)
    tokenizer, model = run.tokenizer_from(checkpoint), run.model_from(checkpoint, torch.device("cpu"))
    how = {"max_new_tokens": 140, "stop_ids": {tokenizer.end}} | how
    return tokenizer, model, [generate(model, [tokenizer.render(prompt)], seed=run.derive(0, number), **how)
                              for prompt, number in zip(prompts, numbers, strict=True)]


def test_every_line_is_answered_by_the_engine(talk):
    """In order, each by draws of its own, and in one line each; an empty line is not answered."""
    prompts = ["Say 3.", "Say 3.", "Say 11."]
    tokenizer, _, said = sampled("sft", prompts, [0, 1, 3])
    expected = [tokenizer.decode(each.responses()[0]) + ("" if each.finished[0] else " ...") for each in said]
    out, error = talk("sft", "Say 3.", "Say 3.", "", "Say 11.")
    first, second, third = (run.printable(text.replace("\n", "\\n")) for text in expected)
    assert out == "\n".join((first, second, "", third, "")) and not error


def test_commands_change_how_tokens_are_drawn(talk):
    """From the next line on; what makes no sense is one sentence, and everything stays as it was."""
    lines = ["/temperature 0", "Say 5.", "/max_new_tokens 2", "Say 5.", "/top_k -1", "/top_p 0", "/temperature nan", "/show",
             "/max_new_tokens 1e3", "Say 5.", "/quit", "Say 5."]
    tokenizer, _, [whole] = sampled("sft", ["Say 5."], [1], temperature=0.0)
    _, _, [cut] = sampled("sft", ["Say 5."], [3], temperature=0.0, max_new_tokens=2)
    out, error = talk("sft", *lines)
    short = tokenizer.decode(cut.responses()[0]) + " ..."
    assert [line for line in out.splitlines() if line] == [tokenizer.decode(whole.responses()[0]), short, short]
    assert len(out.splitlines()) == 10 and error.count("\n") == 5 and "Traceback" not in error
    for named in ("--top-k -1", "--top-p 0", "--temperature nan", "--show", "--max-new-tokens"):
        assert named in error


@pytest.mark.parametrize(("flags", "temperature"), [("", 1.0), ("--temperature 0.5", 0.5), ("--temperature 0", 1.0)])
def test_probabilities_and_entropies_are_the_scorers(flags, temperature, talk):
    how = {"temperature": float(flags.split()[1])} if flags else {}
    tokenizer, model, [said] = sampled("grpo", ["Say 7."], [0], **how)
    logp, entropy = (x[said.mask].tolist() for x in token_log_probs(model, said.tokens, said.mask, temperature=temperature))
    header, *lines, _ = talk(f"grpo --show probs {flags}", "Say 7.").out.splitlines()
    ids = said.tokens[0, said.prompt_lengths[0] : said.lengths[0]].tolist()
    assert header.split() == ["token", "probability", "entropy", "instead"] and len(lines) == len(ids)
    for line, token, log_p, H in zip(lines, ids, logp, entropy, strict=True):
        name = repr(tokenizer.decode([token]))
        assert line.strip().startswith(name)
        numbers = line.strip()[len(name) :].split()
        assert float(numbers[0]) == pytest.approx(math.exp(log_p), abs=6e-4)
        assert float(numbers[1]) == pytest.approx(H, abs=6e-4)
        assert name not in line.strip()[len(name) :]


@pytest.mark.parametrize("flags", ["", "--top-k 3", "--top-p 0.9"])
def test_the_alternatives_are_the_likeliest_other_tokens(flags, talk):
    """Of those that can be drawn, at most three, the likeliest first."""
    how = {flags[2:7].replace("-", "_"): float(flags.split()[1])} if flags else {}
    how |= {"top_k": int(how["top_k"])} if "top_k" in how else {}
    tokenizer, model, [said] = sampled("grpo", ["Say 7."], [0], **how)
    start, ids = int(said.prompt_lengths[0]), said.tokens[0].tolist()
    with torch.no_grad():
        logp = sampling_logits(model(said.tokens[:, :-1])[0, start - 1 :], 1.0, **how).log_softmax(-1)
    _, *lines, end = talk(f"grpo --show probs {flags}", "Say 7.").out.splitlines()
    assert end == ""
    for line, token, row in zip(lines, ids[start:], logp.tolist(), strict=True):
        others = sorted((i for i in range(len(row)) if i != token and row[i] > -math.inf), key=lambda i: -row[i])[:3]
        expected = "  ".join(f"{tokenizer.decode([i])!r} {math.exp(row[i]):.3f}" for i in others)
        assert line.endswith(expected)


def test_what_is_cut_off_is_no_alternative(talk):
    """With top-k 1 each token is certain and stands alone."""
    _, *lines, _ = talk("grpo --show probs --top-k 1", "Say 7.").out.splitlines()
    assert lines and all(line.split()[-2:] == ["1.000", "0.000"] for line in lines)


def test_a_pretrained_model_continues_the_line(talk):
    checkpoint = run.load_checkpoint("pretrain")
    tokenizer, model = run.tokenizer_from(checkpoint), run.model_from(checkpoint, torch.device("cpu"))
    said = generate(model, [[tokenizer.bos, *tokenizer.encode("Once upon")]], max_new_tokens=9, stop_ids={tokenizer.end},
                    seed=run.derive(0, 0))
    out = talk("pretrain --max-new-tokens 9", "Once upon").out
    assert out.startswith(run.printable(tokenizer.decode(said.responses()[0])))


def test_a_line_that_does_not_fit_is_a_sentence_and_the_talk_goes_on(talk):
    out, error = talk("sft --max-new-tokens 3", "x! " * 2000, "Say 1.", "y " * 100)
    assert error.count("\n") == 1 and "line 1: a prompt of 6003 tokens" in error
    assert [bool(line) for line in out.splitlines()] == [False, True, True]


PATHS = ["/usr/bin/env is a path", "//", "/", "/nothing", "/show me the way", "/temprature 0.5", "/quit smoking", "/Quit",
         " /quit", "/top_k 3 of them", "/seed 3", "/--temperature 0"]


@pytest.mark.parametrize("line", PATHS)
def test_a_line_that_begins_with_a_slash_and_is_no_command_is_a_prompt(line, talk):
    tokenizer, _, [said] = sampled("sft", [line], [0], max_new_tokens=9)
    out, error = talk("sft --max-new-tokens 9", line, "Say 1.")
    assert out.splitlines()[0] == run.printable(tokenizer.decode(said.responses()[0])) + ("" if said.finished[0] else " ...")
    assert len(out.splitlines()) == 2 and not error


@pytest.mark.parametrize("line", ["/quit", "/temperature 0", "/show probs", "/top_k -1"])
def test_raw_has_no_commands(line, talk):
    tokenizer, _, said = sampled("sft", [line, "Say 1."], [0, 1], max_new_tokens=9)
    out, error = talk("sft --raw --max-new-tokens 9", line, "Say 1.")
    expected = [tokenizer.decode(each.responses()[0]) + ("" if each.finished[0] else " ...") for each in said]
    assert out.splitlines() == [run.printable(text) for text in expected] and not error


@pytest.mark.parametrize("show", ["text", "probs"])
def test_every_line_of_a_pipe_gives_one_group_of_output(show, talk, monkeypatch):
    """Also blank lines, commands, what does not fit, and answers of several lines. A group is a line, or a table and an empty
    line."""
    monkeypatch.setattr("nanorl.tokenizer.Tokenizer.decode", lambda self, ids: "one\ntwo\n")
    lines = ["Say 1.", "", "   ", "/temperature 0", "/top_p 7", "x! " * 2000, "/etc/hosts", "Say 2."]
    out, _ = talk(f"sft --show {show} --max-new-tokens 3", *lines)
    if show == "text":
        answer = r"one\ntwo\n ..."
        assert out.removesuffix("\n").split("\n") == [answer, "", "", "", "", "", answer, answer]
    else:       # an empty group is an empty line alone
        tables = [part for part in out.split("\n\n") if "token" in part]
        assert len(tables) == 3 and all(len(table.strip("\n").splitlines()) == 4 for table in tables)
        assert out.count("\n") == 3 * 5 + 5


def test_the_terminal_gets_no_commands(talk, monkeypatch):
    """Control characters that a model says are replaced."""
    monkeypatch.setattr("nanorl.tokenizer.Tokenizer.decode", lambda self, ids: "\x1b[2Jboo\x07")
    out = talk("sft", "Say 1.").out
    assert "boo" in out and "\x1b" not in out and "\x07" not in out


def test_at_the_keyboard(world, monkeypatch, capsys):
    """A greeting, a prompt sign, and an end at the end of the input."""
    lines = iter(["Say 1.", "/temperature 0", "Say 2."])

    def keyboard(sign):
        assert sign == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.chdir(world)
    monkeypatch.setattr("builtins.input", keyboard)
    monkeypatch.setattr(sys, "stdin", Terminal())
    chat.main(run.parse(chat.Config, ["sft", "--device", "cpu"]))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and "/quit to leave" in out[0]


@pytest.mark.parametrize(("flags", "named"), [
    ("", "checkpoint"), ("nowhere", "nowhere"), ("reward", "policy"), ("sft --show all", "--show"),
    ("sft --top-p 2", "--top-p 2.0"), ("sft --temperature -1", "--temperature -1.0"),
    ("sft --device cuda", "--device cuda"), ("sft --seed -1", "--seed -1")])
def test_bad_input_is_one_sentence(flags, named, world, monkeypatch, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as exit:
        chat.main(run.parse(chat.Config, flags.split()))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and named in error
