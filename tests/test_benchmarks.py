"""What nanorl is held against does the same work, and the benchmark measures what it says."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import reduce
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from world import ROOT

import benchmarks.__main__ as command
import nanorl.gpt
from benchmarks import checks, memory, peers, plain, profile
from benchmarks.__main__ import INSIDE, Benchmark, Config, Row, forward_flops, model_of, plain_of, settled
from benchmarks.measure import Stopwatch, inside, median_ratio, race
from nanorl.gpt import GPT
from nanorl.lora import adapt
from nanorl.ops import entropy_from_logits, selective_log_softmax
from train_grpo import objective

CPU = torch.device("cpu")


def tiny():
    torch.manual_seed(0)
    return plain.GPT2(vocab_size=11, context=16, layers=2, width=8, heads=2).double()


def test_the_plain_llama_is_our_architecture():
    """Of the same weights, the same logits, read at once and token by token."""
    ours, theirs = model_of(11, CPU, layers=2, width=16, heads=2), plain_of(11, CPU, layers=2, width=16, heads=2)["plain Llama"]
    names = [("embedding", "tokens"), ("attention_norm", "norm1"), ("mlp_norm", "norm2"), ("attention.", ""), ("mlp.", "")]
    theirs.load_state_dict({reduce(lambda name, pair: name.replace(*pair), names, name): weight
                            for name, weight in ours.state_dict().items()})
    tokens = torch.randint(11, (3, 9))
    torch.testing.assert_close(theirs(tokens)[0], ours(tokens), rtol=1e-4, atol=1e-5)
    _, past = theirs(tokens[:, :8])
    torch.testing.assert_close(theirs(tokens[:, 8:], past)[0], ours(tokens)[:, 8:], rtol=1e-4, atol=1e-5)


def test_the_plain_model_gives_the_same_logits_with_its_cache_and_without():
    model, tokens = tiny(), torch.randint(11, (3, 9))
    whole, past = model(tokens)[0], None
    for t in range(9):
        logits, past = model(tokens[:, t : t + 1], past)
        torch.testing.assert_close(logits[:, 0], whole[:, t])


def test_the_plain_model_looks_back_only():
    model, tokens = tiny(), torch.randint(11, (3, 9))
    changed = tokens.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(model(tokens)[0][:, :5], model(changed)[0][:, :5])


def test_plain_and_ours_compute_the_same():
    logits, ids = torch.randn(4, 11, dtype=torch.float64), torch.randint(11, (4,))
    torch.testing.assert_close(plain.token_log_probs(logits, ids), selective_log_softmax(logits.float(), ids))
    torch.testing.assert_close(plain.entropy(logits), entropy_from_logits(logits.float()))


def test_the_plain_step_of_grpo_has_the_gradient_of_ours():
    """On answers of one length, of the same model: only the way there differs."""
    model, tokens, adv = tiny().float(), torch.randint(11, (6, 9)), torch.randn(6)
    logp = plain.token_log_probs(model(tokens[:, :-1])[0], tokens[:, 1:])[:, 3:]
    mask = torch.ones_like(logp, dtype=torch.bool)
    objective(logp, logp.detach(), adv[:, None], mask, mask / mask.sum(-1, keepdim=True) / 6)[0].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    class Keep:
        def step(self):
            self.found = [p.grad.clone() for p in model.parameters()]

        def zero_grad(self, set_to_none):
            pass

    optimizer = Keep()
    plain.grpo_step(model, optimizer, tokens, 4, adv, micro_batch=4)
    norm = torch.nn.utils.get_total_norm(expected).clamp(min=1.0)
    for found, grad in zip(optimizer.found, expected, strict=True):
        torch.testing.assert_close(found, grad / norm, rtol=1e-3, atol=1e-6)


def test_a_race_counts_rounds_in_turn_after_one_to_warm_up():
    calls = []
    rounds = race({"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}, CPU, 0.0)
    assert calls == ["a", "b"] * 4 and [len(times) for times in rounds.values()] == [3, 3]
    assert min(rounds["b"]) >= 0.01 > max(rounds["a"])
    assert median_ratio([4.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == 2.0


def test_the_profile_tells_products_from_attention_and_the_rest():
    x, q = torch.randn(512, 512), torch.randn(8, 4, 256, 32)
    work = {"matrix products": lambda: [x @ x for _ in range(10)], "other operators": lambda: [x.exp() for _ in range(200)],
            "attention": lambda: [torch.nn.functional.scaled_dot_product_attention(q, q, q) for _ in range(10)]}
    for kind, f in work.items():
        f()
        shares = inside(f, CPU)
        assert shares.keys() == work.keys() and 1 >= sum(shares.values()) >= shares[kind] > 0.7


def test_a_stopwatch_keeps_every_part():
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch("a"):
            time.sleep(0.01)
        with watch("b"):
            pass
    assert {part: len(times) for part, times in watch.seconds.items()} == {"a": 2, "b": 2}
    assert min(watch.seconds["a"]) >= 0.01 > max(watch.seconds["b"])


def test_peak_memory_is_what_is_needed_at_once():
    """In a process that gives freed memory back: 64 MB, twice after one another, and both together."""
    code = ("import torch; from benchmarks.measure import peak_memory; f = lambda: torch.ones(2**24).sum(); "
            "g = lambda: (f(), f()); h = lambda: torch.ones(2**24) + torch.ones(2**24); "
            "h(); print(*(peak_memory(x, torch.device('cpu')) for x in (f, g, h)))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
                            capture_output=True, text=True)
    if "None" in result.stdout:
        pytest.skip("nobody counts here")
    one, twice, both = (int(x) / 2**26 for x in result.stdout.split())
    assert one == pytest.approx(1, abs=0.1) and twice == pytest.approx(1, abs=0.1) and both == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(("V", "shape"), [(11, {}), (40, {"tie_embeddings": True})])
def test_the_flops_of_a_forward_pass_are_those_of_its_products(V, shape):
    """By PyTorch's counter: a trunk over whole sequences, and the head at some of their positions. (It counts all of attention,
    of which causality leaves half.)"""
    model, B, T, scored = model_of(V, CPU, layers=2, width=16, heads=2, **shape), 3, 8, 5
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(nanorl.gpt, "fused_attention", nanorl.gpt.attention)
        model.head(model.hidden(torch.zeros(B, T, dtype=torch.int64)).flatten(0, 1)[:scored])
    other_half = B * T * 2 * model.config.layers * model.config.width * T
    assert forward_flops(model, B * T, scored, T) == counter.get_total_flops() - other_half


@pytest.mark.parametrize(("flops", "moved", "least"), [(10, 0, 0.01), (0, 40, 0.02), (10, 40, 0.02), (30, 40, 0.03)])
def test_the_roofline_is_the_slower_of_computing_and_moving(monkeypatch, flops, moved, least):
    """At 1,000 FLOP/s and 2,000 bytes/s; of 0.05 seconds, the share that could not be saved."""
    monkeypatch.setattr(command, "race", lambda *_: {"plain": [0.01, 0.01, 0.02], "nanorl": [0.05, 0.05, 0.04]})
    bench = Benchmark(Config(smoke=True), CPU, {"float32 FLOP/s": 1e3, "bytes/s": 2e3}, [])
    bench.run("pretrain", "nothing", {"plain": lambda: None, "nanorl": lambda: None}, 7, flops, moved)
    plain, ours, *_ = bench.rows
    assert plain.share is None and ours.share == pytest.approx(least / 0.05)
    assert ours.rate == pytest.approx(7 / 0.05) and ours.ratio == pytest.approx(0.2)


def test_results_are_written_as_rows_come(tmp_path):
    out = tmp_path / "results.json"
    bench = Benchmark(Config(out=str(out)), CPU, {}, [])
    for number in range(1, 4):
        bench.add(Row("memory", "x", "nanorl", memory=1.0))
        assert len(json.loads(out.read_text())["rows"]) == number


def test_nothing_is_begun_when_there_is_no_time_left(capsys):
    bench = Benchmark(Config(), CPU, {}, [], end=time.perf_counter() + 1000)
    works = bench.in_time("atoms", [1, 2, 3])
    assert next(works) == 1 and 990 < bench.left() < 1000
    bench.end = time.perf_counter() + 80
    assert list(works) == [] and "2 of 3 left out" in capsys.readouterr().out
    assert Benchmark(Config(), CPU, {}, []).left() is None


def test_a_gpu_is_checked_first_and_its_results_are_kept():
    cuda, cpu = (settled(Config(), torch.device(kind)) for kind in ("cuda", "cpu"))
    assert cuda.only == ("checks", *cpu.only) and cuda.seconds < cpu.seconds
    assert cuda.out.endswith("benchmarks/results/cuda.json") and not cpu.out
    chosen = Config(only=("grpo",), seconds=2.0, out="mine.json")
    assert settled(chosen, torch.device("cuda")) == chosen


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    """Each is a line and stands in the file; the exit code is 1."""
    findings = [checks.Finding("this", "1", "2", False), checks.Finding("that", "2", "2", True)]
    monkeypatch.setattr(command, "run_checks", lambda device, compile: iter(findings))
    with pytest.raises(SystemExit) as exit:
        command.main(Config(only=("checks",), device="cpu", out=str(tmp_path / "out.json")))
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 1 and "FAILED: this" in lines[-1]
    assert ["FAILED" in line for line in lines if line.startswith("checks")] == [True, False]
    assert [x["ok"] for x in json.loads((tmp_path / "out.json").read_text())["checks"]] == [False, True]


@pytest.mark.parametrize(("limit", "found"), [(60, "KeyError"), (0.01, "still at work")])
def test_a_check_that_crashes_or_hangs_has_failed(limit, found, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "limit_on", lambda device, seconds: seconds)
    monkeypatch.setitem(checks.CHECKS, "unknown", checks.Check((), None, limit))       # to its process, too
    [finding] = checks.check_in_a_process("unknown", CPU, tmp_path, 1)
    assert not finding.ok and found in finding.found


def test_tokens_are_compared_up_to_the_first_that_differs():
    def answers(*rows):
        return SimpleNamespace(responses=lambda: [list(row) for row in rows])

    assert checks.equal_tokens(answers("abcd", "xy"), answers("abcd", "xy")) == 1
    assert checks.equal_tokens(answers("abcd", "xy"), answers("axcd", "xyz")) == 3 / 5


@pytest.mark.slow
def test_the_checks_hold_on_a_cpu(tmp_path):
    """All but those that compile."""
    command = [sys.executable, "-m", "benchmarks", "--only", "checks", "--no-compile", "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("checks")]
    assert result.returncode == 0 and len(lines) == 13 and all(" ok " in line for line in lines), result.stdout


@pytest.mark.slow
def test_the_whole_benchmark_runs(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--no-compile", "--device", "cpu", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kept = json.loads(out.read_text())
    assert {row["group"] for row in kept["rows"]} == {"pretrain", "generate", "grpo", "atoms", "memory", "learn"}
    assert kept["machine"]["torch"] == torch.__version__ and all(x > 0 for x in kept["ceilings"].values())
    for row in kept["rows"]:
        measured = "memory" if row["group"] == "memory" else "share" if row["work"].startswith(INSIDE) else "seconds"
        assert row[measured] >= 0 and (measured != "seconds" or row[measured] > 0)
        assert row["ratio"] is None or row["ratio"] > 0


# ---- Beside transformers and TRL ----


def test_without_trl_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        command.main(Config(peers=True, out="unused.json"))
    assert exit.value.code == 2 and "--peers: needs transformers and TRL" in capsys.readouterr().err


def test_micro_batches_are_full_of_whole_groups():
    """TRL's batches are; so both have as many rows in memory."""
    for work in peers.works(smoke=False):
        assert work.rows == 0 or (work.prompts * work.group % work.rows == 0 and work.rows % work.group == 0), work


def test_our_step_beside_peers_trains_on_every_token(monkeypatch):
    seen = []

    def seeing(*args):
        seen.append((args[3].sum().item(), args[4].sum().item()))
        return objective(*args)

    monkeypatch.setattr(peers, "objective", seeing)
    work = peers.works(smoke=True)[-1]
    peers.our_step(work)()
    tokens, weights = map(sum, zip(*seen, strict=True))
    assert len(seen) == 2 and tokens == work.prompts * work.group * work.new and weights == pytest.approx(1)


def test_the_figure_is_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"work": "tiny", "who": who, "ratio": ratio} for who, ratio in (("TRL", None), ("nanorl", 2.0))]
    (tmp_path / "peers.json").write_text(json.dumps({"rows": rows}))
    peers.draw(tmp_path / "peers.json", tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_race_beside_peers_runs(tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "peers.json"
    command.main(Config(peers=True, smoke=True, compile=False, out=str(out)))
    rows = json.loads(out.read_text())["rows"]
    assert [row["who"] for row in rows] == ["transformers", "nanorl", "TRL", "nanorl", "TRL", "nanorl"]
    assert all(row["seconds"] > 0 for row in rows[:4]) and all(row["memory"] > 0 for row in rows[4:])


# ---- The profile of a step ----


def test_the_profile_of_a_step_has_every_part():
    cfg = memory.Config(prompts=2, group=2, prompt=5, answer=4, micro_batch=2, rank=2)
    table = profile.table(memory.GPTConfig(64, layers=1, width=16, heads=2), cfg)
    rows = [line.split(" | ") for line in table.splitlines()[4:]]
    assert [row[0].removeprefix("| ") for row in rows] == list(profile.PARTS) and all(len(row) == 5 for row in rows)
    assert all(float(cell.split(" s, ")[0]) >= 0 for row in rows[:5] for cell in row[1:])


# ---- The memory of real models ----


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("model", memory.MODELS)
def test_what_a_block_keeps_of_a_token_is_what_autograd_saves(model, adapters):
    """At a narrower width, to one part in a hundred: beside it there are numbers, such as one for each head and norm."""
    real = memory.MODELS[model]
    config = replace(real, vocab_size=32, layers=1, width=16 * real.heads, head_dim=16 if real.head_dim is None else 32,
                     mlp_width=512)
    net, tokens = GPT(config), torch.randint(32, (2, 40))
    net = adapt(net, 4, 8.0) if adapters else net
    own = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *net.buffers())}
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        net.blocks[0](net.embedding(tokens), net.rope[:40].unbind(-3)).sum()
    found = sum(size for at, (size, _) in saved.items() if at not in own)
    assert found / 80 == pytest.approx(memory.saved_per_token(config, 4 if adapters else 0, bfloat16=False), rel=0.01)


def test_the_table_of_memory_is_that_of_the_docs():
    assert memory.table(memory.Config()) in (ROOT / "docs/real-models.md").read_text()
