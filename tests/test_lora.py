"""Adapters: what they compute, what they leave alone, and what a run with them saves and reads."""

import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import DISTILL, DPO, GRPO, GROUP, PPO, SFT, cut_final_line, metrics, same_parameters, start

import train_distill
import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
import train_sft
from nanorl import export, run
from nanorl.gpt import GPT, GPTConfig
from nanorl.lora import LoRALinear, adapt, has_adapters, linear_layers, merged
from nanorl.sample import generate, token_log_probs

CPU = torch.device("cpu")
V, RANK, ALPHA = 13, 2, 3.0
SHAPE = dict(vocab_size=V, context=32, layers=2, width=16, heads=4, kv_heads=2)
exact = {"rtol": 0, "atol": 1e-12}


def tiny(seed=0, dtype=torch.float64, **changes) -> GPT:
    return GPT(GPTConfig(**SHAPE | changes), torch.Generator().manual_seed(seed)).to(dtype)


def ids(rows, columns, seed):
    return torch.randint(V, (rows, columns), generator=torch.Generator().manual_seed(seed))


def adapted(base, seed=1, rank=RANK, trained=True) -> GPT:
    generator = torch.Generator().manual_seed(seed)
    model = adapt(base, rank, ALPHA, generator)
    for layer in linear_layers(model.blocks) if trained else ():
        torch.nn.init.normal_(layer.b, generator=generator)
    return model


def weights_with(model) -> dict:
    """W + (alpha / R) B A of every layer that has adapters, by the name of W, so that autograd sees the sum."""
    return {f"{name}.weight": layer.weight + ALPHA / RANK * layer.b @ layer.a
            for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


shapes = st.fixed_dictionaries({}, optional={"kv_heads": st.sampled_from((1, 4)), "tie_embeddings": st.just(True),
                                             "qk_norm": st.just(True), "positions": st.sampled_from(("learned", "none"))})


# ---- What they compute ----


@given(shapes, st.integers(0, 100))
@settings(max_examples=15)
def test_fresh_adapters_change_nothing(shape, seed):
    """To the bit: B = 0."""
    base = tiny(seed, **shape)
    model, tokens = adapted(base, seed, trained=False), ids(2, 9, seed)
    assert torch.equal(model(tokens), base(tokens))
    assert torch.equal(model(tokens), tiny(seed, **shape)(tokens))


@given(shapes, st.integers(0, 100))
@settings(max_examples=15)
def test_adapters_are_a_matrix_BA_added_to_W_and_so_are_their_gradients(shape, seed):
    base = tiny(seed, **shape)
    model, tokens = adapted(base, seed), ids(2, 9, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7                                # A and B of q, k, v, out, gate, up, down in two blocks
    plain = torch.func.functional_call(base, weights_with(model), (tokens,))
    torch.testing.assert_close(model(tokens), plain, **exact)
    assert (model(tokens) - base(tokens)).abs().max() > 1e-3
    ours, theirs = (torch.autograd.grad(logits.square().sum(), trained) for logits in (model(tokens), plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(shapes, st.integers(0, 100))
@settings(max_examples=15)
def test_a_merged_model_is_a_plain_one_with_the_same_logits(shape, seed):
    """And merging has changed nothing in the model that was merged, to the bit."""
    base = tiny(seed, **shape)
    model, tokens = adapted(base, seed), ids(2, 9, seed)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    plain = merged(model)
    assert not has_adapters(plain) and plain.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(plain(tokens), model(tokens), **exact)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(base(tokens), tiny(seed, **shape)(tokens))


def test_adapters_have_as_many_numbers_as_they_should_and_W_is_not_copied():
    base = tiny()
    model = adapted(base)
    theirs = {x.data_ptr() for x in base.parameters()}
    own = [p for p in model.parameters() if p.data_ptr() not in theirs]
    assert sum(p.numel() for p in own) == RANK * sum(sum(layer.weight.shape) for layer in linear_layers(base.blocks))
    assert theirs < {x.data_ptr() for x in model.parameters()}
    assert {id(p) for p in own} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_bias_stays():
    """Of layers that have one."""
    base = tiny()
    for block in base.blocks:
        block.attention.q.bias = torch.nn.Parameter(torch.randn(16, dtype=torch.float64))
    model, tokens = adapted(base), ids(2, 9, seed=3)
    torch.testing.assert_close(merged(model)(tokens), model(tokens), **exact)
    torch.testing.assert_close(adapted(base, trained=False)(tokens), base(tokens), **exact)
    assert not any(name.endswith("bias") for name in run.trained_state(model))


def test_training_moves_the_adapters_and_nothing_else():
    """The frozen weights stay to the bit, and the optimizer keeps moments of adapters only."""
    base = tiny(dtype=torch.float32, tie_embeddings=True)
    model, tokens = adapted(base, trained=False), ids(4, 9, seed=4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = run.Optimizers(model, "adamw", 1e-2)
    for _ in range(3):
        (-token_log_probs(model, tokens)[0].mean()).backward()
        optimizer.step(1e-2, grad_clip=1.0)
    trained = run.trained_state(model)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) != (name in trained), name
    assert all(name.endswith((".a", ".b")) for name in trained) and len(trained) == 28
    moments = [x for state in optimizer.state_dict()[0]["state"].values() for x in state.values() if x.ndim]
    assert sum(x.numel() for x in moments) == 2 * sum(x.numel() for x in trained.values())


# ---- Sampling ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compile", [False, True])
def test_sampling_is_from_merged_weights(compile, dtype):
    """The tokens and log-probs are those of the merged model, also after an update; no step computes B A x, and nothing of the
    policy has changed."""
    base, how = tiny(dtype=torch.float32), dict(max_new_tokens=6, stop_ids={5}, samples_per_prompt=3, seed=7)
    model, prompts = adapted(base), [[1, 2, 3], [4]]
    with patch.object(torch, "compile", lambda step, **_: step), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for seed in (2, 3):
            for layer in linear_layers(model.blocks):
                torch.nn.init.normal_(layer.b, generator=torch.Generator().manual_seed(seed))
            before = {name: x.clone() for name, x in model.state_dict().items()}
            plain = GPT(model.config)
            plain.load_state_dict(merged(model).state_dict())
            with patch.object(LoRALinear, "forward", side_effect=AssertionError):
                out = generate(model, prompts, **how, compile=compile)
            wanted = generate(plain, prompts, **how, compile=compile)
            assert torch.equal(out.tokens, wanted.tokens) and torch.equal(out.logp, wanted.logp)
            assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
            if dtype == torch.float32:
                scored, _ = token_log_probs(model, out.tokens, out.mask)
                torch.testing.assert_close(scored, out.logp, rtol=0, atol=1e-5)


def test_blocks_with_adapters_compile_to_one_graph_and_those_without_to_another():
    """For every layer, number of rows and length; each once more where no gradient is asked for."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    base = tiny(dtype=torch.float32, layers=3)
    model = adapted(base)
    torch._dynamo.reset()
    with patch.object(torch, "compile", partial(torch.compile, backend=count)):
        for policy in (model, base):
            run.compile_for_training(policy)
            policy.compiled = False             # of the head there is a graph, too
    for rows, columns in ((5, 9), (3, 7), (6, 12)):
        tokens = ids(rows, columns, seed=rows)
        model.hidden(tokens).sum().backward()
        with torch.no_grad():
            base.hidden(tokens)
    assert len(graphs) == 2
    torch._dynamo.reset()


# ---- Runs ----

RUNS = {"tuned": (train_sft, SFT.replace("--init pretrain", "--init sft")), "dpo": (train_dpo, DPO),
        "group": (train_group_dpo, GROUP), "grpo": (train_grpo, GRPO + " --kl-coef 0.1"), "distill": (train_distill, DISTILL),
        "separate": (train_ppo, PPO + " --data wanted.jsonl"),
        "shared": (train_ppo, PPO + " --data wanted.jsonl --critic shared")}
LORA = " --steps 2 --lora-rank 2"


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_holds_adapters_and_what_they_adapt_is_as_it_was(name, tmp_path):
    """Also where a critic has adapters beside the same weights. Read as any other checkpoint is, it is the policy, merged."""
    script, flags = RUNS[name]
    base = run.model_from(run.load_checkpoint("sft"), CPU)
    start(script, flags + LORA, tmp_path / "run")
    checkpoint = run.load_checkpoint(tmp_path / "run")
    assert checkpoint["model"].keys() == {f"{layer.removesuffix('weight')}{part}" for layer, x in base.state_dict().items()
                                          if "blocks" in layer and x.ndim == 2 for part in "ab"}
    assert any(name.endswith(".b") and x.abs().max() > 0 for name, x in checkpoint["model"].items())
    assert checkpoint["lora"]["base"] == "sft"
    if critic := checkpoint["state"].get("critic"):
        assert {name for name in critic if not name.endswith((".a", ".b"))} == {"scalar.weight", "scalar.bias"}
        ours = checkpoint["model"]["blocks.0.mlp.up.b"]
        assert torch.equal(critic["trunk.blocks.0.mlp.up.b"], ours) == (name == "shared")
    read, policy = run.model_from(checkpoint, CPU), adapt(base, 2, 32.0)
    policy.load_state_dict(checkpoint["model"], strict=False)
    assert not has_adapters(read)
    for (name, x), (other, y) in zip(read.named_parameters(), merged(policy).named_parameters(), strict=True):
        assert name == other and torch.equal(x, y)


@pytest.mark.usefixtures("inside")
def test_a_run_goes_on_from_one_with_adapters_as_from_any_other(tmp_path):
    """With adapters of its own, whose base is the merged policy, or with all weights."""
    start(train_sft, RUNS["tuned"][1] + LORA, tmp_path / "first")
    onward = GRPO.replace("--init sft", f"--init {tmp_path / 'first'}") + " --steps 2"
    start(train_grpo, onward + " --lora-rank 3 --kl-coef 0.1", tmp_path / "second")
    start(train_grpo, onward, tmp_path / "whole")
    first, second, whole = (run.model_from(run.load_checkpoint(tmp_path / name), CPU) for name in ("first", "second", "whole"))
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert not torch.equal(first.embedding.weight, whole.embedding.weight)
    layers = zip(linear_layers(first.blocks), linear_layers(second.blocks), strict=True)
    assert 0 < max(float((a.weight - b.weight).detach().abs().max()) for a, b in layers) < 0.1
    assert metrics(tmp_path / "second")[0]["train/kl"] < 1e-6      # the reference is where it began


@pytest.mark.usefixtures("inside")
def test_a_pretrained_model_is_a_base_and_a_run_of_adapters_is_exported_merged(tmp_path):
    export.main(export.Config(checkpoint="sft", directory=str(tmp_path / "pretrained")))
    start(train_grpo, GRPO.replace("--init sft", f"--init {tmp_path / 'pretrained'}") + LORA, tmp_path / "run")
    cut_final_line(tmp_path / "run")
    start(train_grpo, "--resume --quiet", tmp_path / "run")
    export.main(export.Config(checkpoint=str(tmp_path / "run"), directory=str(tmp_path / "merged")))
    ours, theirs = (run.model_from(run.load_checkpoint(tmp_path / name), CPU) for name in ("run", "merged"))
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("change", ["another", "gone"])
def test_adapters_are_refused_beside_another_base(change, tmp_path, capsys):
    """By --resume, and by whatever reads the run."""
    shutil.copytree("sft", tmp_path / "base")
    script, flags = RUNS["grpo"]
    start(script, flags.replace("--init sft", f"--init {tmp_path / 'base'}") + LORA, tmp_path / "run")
    cut_final_line(tmp_path / "run")
    if change == "another":
        checkpoint = torch.load(tmp_path / "base" / "ckpt.pt")
        checkpoint["model"]["norm.weight"][0] += 1e-6
        torch.save(checkpoint, tmp_path / "base" / "ckpt.pt")
    else:
        shutil.rmtree(tmp_path / "base")
    with pytest.raises(SystemExit) as exit:
        start(script, "--resume --quiet", tmp_path / "run")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert ("belong to other weights than those of" if change == "another" else "neither a run") in error
    with pytest.raises(run.UserError, match="base"):
        run.model_from(run.load_checkpoint(tmp_path / "run"), CPU)


@pytest.mark.usefixtures("inside")
def test_the_base_of_a_run_may_move(tmp_path):
    """--init says where it is now, and the next checkpoint remembers it."""
    script, flags = RUNS["tuned"]
    shutil.copytree("sft", tmp_path / "base")
    start(script, flags.replace("--init sft", f"--init {tmp_path / 'base'}") + LORA, tmp_path / "run")
    cut_final_line(tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "moved")
    start(script, f"--resume --quiet --steps 3 --init {tmp_path / 'moved'}", tmp_path / "run")
    assert run.load_checkpoint(tmp_path / "run")["lora"]["base"] == str(tmp_path / "moved")


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(("change", "mention"), [
    (lambda lora: {name: x for name, x in lora.items() if name != "base"}, "its 'base' is None, expected a str"),
    (lambda lora: lora | {"rank": "2"}, "its 'rank' is '2', expected a int"),
    (lambda lora: lora | {"rank": 0}, "zero"),
    (lambda lora: lora | {"rank": 3}, "q.a has the shape (2, "),
    (lambda lora: lora | {"alpha": torch.inf}, "alpha is inf")])
def test_damaged_adapters_are_refused(change, mention, tmp_path):
    checkpoint = run.load_checkpoint("lora")
    torch.save(checkpoint | {"lora": change(checkpoint["lora"])}, tmp_path / "ckpt.pt")
    with pytest.raises(run.UserError) as error:
        run.load_checkpoint(tmp_path)
    assert mention in str(error.value)


@pytest.mark.usefixtures("inside")
def test_adapters_are_not_their_own_base(tmp_path):
    """Neither at once nor by way of others: a file that says so would be read without end."""
    checkpoint = run.load_checkpoint("lora")
    for name, base in (("itself", "itself"), ("there", "back"), ("back", "there")):
        (tmp_path / name).mkdir()
        torch.save(checkpoint | {"lora": checkpoint["lora"] | {"base": str(tmp_path / base)}}, tmp_path / name / "ckpt.pt")
    for name in ("itself", "there"):
        with pytest.raises(run.UserError, match="their own base"):
            run.model_from(run.load_checkpoint(tmp_path / name), CPU)


@pytest.mark.parametrize(("script", "flags", "mention"), [
    (train_sft, "--lora-alpha 16", "--lora-alpha 16.0: requires --lora-rank"),
    (train_grpo, "--lora-rank 4 --kl-coef 0.1 --refresh-reference 5", "--lora-rank 4 --refresh-reference 5: "),
    (train_dpo, "--lora-rank 4 --refresh-reference 5", "--lora-rank 4 --refresh-reference 5: "),
    (train_distill, "--lora-rank -1", "--lora-rank -1: expected")])
def test_flags_that_contradict_each_other_are_refused(script, flags, mention, capsys):
    with pytest.raises(SystemExit) as exit:
        run.parse(script.Config, flags.split())
    assert exit.value.code == 2 and mention in capsys.readouterr().err


# ---- Weights that are constants, in bfloat16 ----


@pytest.mark.usefixtures("inside")
def test_constants_are_in_bfloat16_where_products_are_and_the_run_is_the_same(tmp_path, monkeypatch):
    """To the bit: that is what autocast would round them to."""
    script, flags = RUNS["separate"]
    flags += " --steps 1 --epochs 1 --best-of 0 --kl-coef 0.1 --dtype bfloat16 --reward-model reward --reward model"
    flags = flags.replace(" --data wanted.jsonl", "")
    for name in ("whole", "lora"):
        extra = " --lora-rank 2" if name == "lora" else ""
        start(script, flags + extra, tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(run.directory, "round_frozen", lambda *_: None)
            start(script, flags + extra, tmp_path / f"{name} in float32")
        assert metrics(tmp_path / name) == metrics(tmp_path / f"{name} in float32")
        assert same_parameters(tmp_path / name, tmp_path / f"{name} in float32")


def test_only_constants_are_rounded_and_embeddings_only_where_they_lose_nothing():
    for tied in (False, True):
        for published in (torch.float32, torch.bfloat16):
            base = tiny(dtype=torch.float32, tie_embeddings=tied).to(published).float()
            model, tokens = adapted(base), ids(2, 9, seed=5)
            with torch.autocast("cpu", torch.bfloat16):
                before = model(tokens), base(tokens)
            run.device.round_frozen(model, "bfloat16")
            with torch.autocast("cpu", torch.bfloat16):
                after = model(tokens), base(tokens)
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
            for name, x in model.named_parameters():
                half = x.ndim == 2 and not name.endswith((".a", ".b")) and (
                    published == torch.bfloat16 or "blocks" in name or (name == "head.weight" and not tied))
                assert x.dtype == (torch.bfloat16 if half else torch.float32), name
            assert {p.data_ptr() for p in base.parameters()} < {p.data_ptr() for p in model.parameters()}
            run.device.round_frozen(trained := tiny(dtype=torch.float32), "bfloat16")
            assert all(p.dtype == torch.float32 for p in trained.parameters())
