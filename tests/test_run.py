"""Flags, checkpoints, optimizers and the directory of a run."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl import run
from nanorl.gpt import GPT, GPTConfig
from nanorl.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = "runs/test"
    steps: run.Count = 4
    lr: run.Positive = 1e-3
    eval_every: run.Count = 2

    share: run.Share = 0.5      # some share, 100 % at most
    kind: Literal["a", "b"] = "a"    # some kind


VOCAB = 261         # 256 bytes and 5 special tokens


def refused(capsys, argv):
    """The one sentence on stderr with which `argv` is refused."""
    with pytest.raises(SystemExit) as exit:
        run.parse(Config, argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def tiny_model(seed=0):
    return GPT(GPTConfig(VOCAB, context=16, layers=1, width=16, heads=2), torch.Generator().manual_seed(seed))


# ---- flags ----


@pytest.mark.parametrize("argv, named", [
    (["--stepz", "3"], "--stepz"), (["--step", "3"], "--step"), (["--steps", "x"], "--steps"), (["--steps", "0"], "--steps 0"),
    (["--steps", "1.5"], "--steps"), (["--lr", "-1"], "--lr -1.0"), (["--lr", "nan"], "--lr nan"),
    (["--lr", "inf"], "--lr inf"),
    (["--share", "1.1"], "--share 1.1"), (["--kind", "c"], "--kind"), (["--seed", "-1"], "--seed -1"), (["3"], "3"),
    (["--device", "tpu"], "--device"), (["--resume", "--out", "nowhere"], "nowhere")])
def test_a_bad_flag_is_refused_in_one_sentence_that_names_it(capsys, argv, named):
    assert named in refused(capsys, argv)


def test_flags_have_the_types_of_the_dataclass():
    cfg = run.parse(Config, ["--steps", "7", "--kind", "b", "--no-compile", "--quiet", "--share", "1"])
    assert (cfg.steps, cfg.kind, cfg.compile, cfg.quiet, cfg.share) == (7, "b", False, True, 1.0)
    assert run.parse(Config, []).compile is None


def test_help_explains_every_flag_by_its_comment(capsys):
    with pytest.raises(SystemExit) as exit:
        run.parse(Config, ["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "some share, 100 % at most (default: 0.5)" in text
    for flag in ("--out", "--init", "--resume", "--steps", "--lr", "--save-every", "--eval-every", "--seed", "--device",
                 "--dtype", "--compile", "--no-compile", "--quiet"):
        assert flag in text


def test_a_device_that_is_not_there_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--device cuda"):
            run.pick_device(Config(device="cuda"))
    assert run.pick_device(Config(device="cpu")).type == "cpu"


@pytest.mark.parametrize("triton", [False, True])
def test_compiling_is_the_default_on_cuda_where_there_is_triton(triton, monkeypatch):
    monkeypatch.setattr("nanorl.run.device.find_spec", lambda name: triton or None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert run.wants_compile(Config(), cuda) == triton and not run.wants_compile(Config(), cpu)
    for asked in (False, True):
        assert run.wants_compile(Config(compile=asked), cuda) == run.wants_compile(Config(compile=asked), cpu) == asked


def test_in_float32_nothing_rounds_products_and_afterwards_all_is_as_before():
    x, precision = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(KeyError), run.in_float32(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
                torch.testing.assert_close(x @ x, (x.double() @ x.double()).float())
                raise KeyError
            assert (x @ x).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)


# ---- randomness ----


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 100))
def test_every_seed_purpose_and_step_has_its_own_stream(seed, other, step, later):
    names = {(seed, "a", step), (seed, "b", step), (seed, "a", later), (other, "a", step)}
    assert len({run.derive(*name) for name in names}) == len(names)
    assert all(0 <= run.derive(*name) < 2**63 for name in names)


# ---- schedule and optimizer ----


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_the_schedule_rises_stays_and_falls_within_0_and_1(steps, warmup, decay):
    values = [run.schedule(step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < v <= 1 for v in values)
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)
    if warmup == decay == 0:
        assert set(values) == {1.0}


@pytest.mark.parametrize("kind, lr", [("adamw", 1e-6), ("muon", 1e-5)])
def test_a_small_step_reaches_the_weights(kind, lr):
    """At least 99 % of the float32 weights with a gradient change; in bfloat16 most would not."""
    model = tiny_model()
    optimizer = run.Optimizers(model, kind, lr)
    tokens = torch.arange(30).view(2, 15)
    model(tokens).logsumexp(-1).sum().backward()
    before = [(p, p.detach().clone(), p.grad != 0) for p in model.parameters()]
    optimizer.step(lr, grad_clip=1e9)
    changed = sum(int((p.detach() != old)[moved].sum()) for p, old, moved in before)
    assert changed >= 0.99 * sum(int(moved.sum()) for _, _, moved in before)


def test_weight_decay_shrinks_matrices_and_leaves_gains_alone():
    model = tiny_model()
    optimizer = run.Optimizers(model, "adamw", lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.norm.weight.grad[0] = 1e-12         # a gradient that is not zero, or no step would be taken
    optimizer.step(0.1, grad_clip=1e9)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5))
        elif name != "norm.weight":
            assert torch.equal(p.detach(), before[name])


def test_a_gradient_of_exactly_zero_takes_no_step_in_spite_of_momentum():
    model = tiny_model()
    optimizer = run.Optimizers(model, "adamw", lr=0.1)
    model(torch.arange(5)[None]).logsumexp(-1).sum().backward()
    optimizer.step(0.1, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    (0.0 * model(torch.arange(5)[None]).sum()).backward()
    assert optimizer.step(0.1, 1.0) == 0
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_gradient_is_clipped_to_its_bound_and_the_norm_before_it_is_returned():
    model = tiny_model()
    optimizer = run.Optimizers(model, "adamw", lr=1.0)
    (100 * model(torch.arange(5)[None])).logsumexp(-1).sum().backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    seen = {}
    optimizer.optimizers[0].register_step_pre_hook(
        lambda *_: seen.update(norm=math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))))
    assert float(optimizer.step(1.0, grad_clip=0.5)) == pytest.approx(norm, rel=1e-4)
    assert seen["norm"] == pytest.approx(0.5, rel=1e-3)


# ---- checkpoints ----


@given(st.recursive(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(), st.lists), st.sampled_from(
       [math.nan, math.inf, -math.inf]), st.booleans())
def test_one_number_that_is_none_is_found_wherever_it_stands(x, bad, as_tensor):
    run.check_finite({"a": x, "b": [x, (torch.ones(2), torch.ones(2, dtype=torch.long))]})
    bad = torch.tensor([[1.0, bad]]) if as_tensor else bad
    with pytest.raises(FloatingPointError, match=r"^b\.1\.c "):
        run.check_finite({"a": x, "b": [x, {"c": bad}]})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_names_its_tensor_and_moves_nothing(bad):
    model = tiny_model()
    optimizer = run.Optimizers(model, "muon", lr=0.1)
    model(torch.arange(5)[None]).logsumexp(-1).sum().backward()
    model.head.weight.grad[0, 0] = bad
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"the gradient of head\.weight holds"):
        optimizer.step(0.1, 1.0)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_gradient_too_large_to_measure_is_refused():
    """Every entry is finite, their norm is not: clipped by it, all of them would be 0 or nan."""
    model = tiny_model()
    optimizer = run.Optimizers(model, "adamw", lr=0.1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e38)
    with pytest.raises(FloatingPointError, match="too large"):
        optimizer.step(0.1, 1.0)


# ---- the directory of a run ----


def open_run(tmp_path, **flags):
    cfg = Config(out=str(tmp_path / "r"), quiet=True, **flags)
    model = tiny_model()
    optimizer = run.Optimizers(model, "adamw", cfg.lr)
    checkpoint = run.Run.check(cfg)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    return run.Run(cfg, checkpoint, model, optimizer, Tokenizer.train("a tiny text", VOCAB))


def train(out, crash_after=None):
    for step in out.steps():
        out.samples([{"text": f"sample {step}"}])
        out.log({"train/x": step * 1.5})
        if step == crash_after:
            raise RuntimeError("power cut")
    out.finish({"eval/x": 1.0})


def metrics_of(out):
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in out.metrics()]


@pytest.mark.parametrize("crash_after, save_every", [(0, 1), (2, 2), (3, 3), (3, 1)])
def test_a_crashed_run_resumes_to_the_same_lines(tmp_path, crash_after, save_every):
    whole = open_run(tmp_path / "whole", steps=5, save_every=save_every)
    train(whole)
    broken = open_run(tmp_path / "broken", steps=5, save_every=save_every)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, crash_after)
    with open(broken.out / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "to')                                  # a torn line
    train(open_run(tmp_path / "broken", steps=5, save_every=save_every, resume=True))
    assert metrics_of(broken) == metrics_of(whole)
    assert (broken.out / "samples.jsonl").read_text() == (whole.out / "samples.jsonl").read_text()
    assert [line["step"] for line in whole.metrics()] == [0, 1, 2, 3, 4, 5]


def test_a_finished_run_knows_it_and_keeps_its_files(tmp_path):
    train(open_run(tmp_path))
    files = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises(SystemExit) as exit:
        run.script(lambda cfg: pytest.fail("it began again"))(Config(out=str(tmp_path / "r"), quiet=True, resume=True))
    assert exit.value.code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == files


def test_a_run_that_lost_only_its_last_line_is_not_finished(tmp_path):
    out = open_run(tmp_path)
    with pytest.raises(RuntimeError):
        for step in out.steps():
            out.log({"train/x": step})
        raise RuntimeError("before the final line")
    again = open_run(tmp_path, resume=True)
    assert list(again.steps()) == []
    again.finish({"eval/x": 1.0})
    assert [line["step"] for line in again.metrics()] == [0, 1, 2, 3, 4]


def test_a_used_directory_is_refused_and_left_alone(tmp_path):
    train(open_run(tmp_path))
    files = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises(ValueError, match="--resume"):
        open_run(tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == files


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "r").write_text("mine")
    with pytest.raises(ValueError, match="not a directory"):
        open_run(tmp_path)
    assert (tmp_path / "r").read_text() == "mine"


def test_resume_takes_its_flags_from_the_run_and_refuses_others(tmp_path, capsys):
    out = open_run(tmp_path, steps=3, share=0.25)
    train(out)
    cfg = run.parse(Config, ["--out", str(out.out), "--resume"])
    assert (cfg.steps, cfg.share, cfg.resume) == (3, 0.25, True)
    assert "--share 0.5" in refused(capsys, ["--out", str(out.out), "--resume", "--share", "0.5"])


def test_ctrl_c_finishes_the_step_saves_and_leaves(tmp_path):
    out = open_run(tmp_path, steps=4, save_every=100)
    with pytest.raises(SystemExit) as exit:
        for step in out.steps():
            if step == 1:
                os.kill(os.getpid(), 2)
            out.log({"train/x": step})
    assert exit.value.code == 130
    assert run.load_checkpoint(out.out)["step"] == 2
    again = open_run(tmp_path, steps=4, save_every=100, resume=True)
    assert list(again.steps()) == [2, 3]


def test_metrics_are_one_json_object_a_line_with_its_step(tmp_path):
    out = open_run(tmp_path, steps=2)
    train(out)
    lines = (out.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert json.loads((out.out / "config.json").read_text())["steps"] == 2


def test_what_a_model_says_cannot_command_the_terminal(tmp_path, capsys):
    out = open_run(tmp_path)
    out.cfg = dataclasses.replace(out.cfg, quiet=False)
    out.say("a\x1b[2J\x07b\x9bc\ré\n\tz")
    assert capsys.readouterr().out == "a\ufffd[2J\ufffdb\ufffdc\ufffdé\n\tz\n"


def test_a_checkpoint_read_twice_gives_two_models_that_share_nothing(tmp_path):
    """Or a reference would move with its policy."""
    out = open_run(tmp_path, steps=1)
    train(out)
    checkpoint = run.load_checkpoint(out.out)
    a, b = (run.model_from(checkpoint, torch.device("cpu")) for _ in "ab")
    for x, y, saved in zip(a.parameters(), b.parameters(), checkpoint["model"].values(), strict=True):
        assert len({x.data_ptr(), y.data_ptr(), saved.data_ptr()}) == 3


def test_on_cuda_deterministic_is_strict_and_attention_is_never_cudnns(monkeypatch):
    """Strict: an operator that has no deterministic kernel is an error, and attention's backward pass takes its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for asked in (True, False):
            run.pick_device(Config(device="cuda", deterministic=asked))
            assert torch.are_deterministic_algorithms_enabled() == asked
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
