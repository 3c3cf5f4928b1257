"""Other people's tokenizers: byte-level BPE from a tokenizer.json or a GGUF file, and back into a tokenizer.json.

Such a file holds a vocabulary, the merges that training made, a pattern that cuts text into pre-tokens, and added tokens.
tiktoken knows no merges: it joins the pair whose result has the lowest id. A file is read only where both come to the same.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from nanorl.errors import UserError
from nanorl.files import Prompt, parse_object, read_text
from nanorl.interop.templates import Template, end_of_turn, recognise
from nanorl.tokenizer import PATTERN, Tokenizer, make_encoding

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
          r"|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
# Digits are cut off one by one before GPT-2's pattern sees what is between them, so white space before a digit ends its text.
SMOLLM = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\s+(?!\S)", r"\s+(?![^\s\p{N}])")
# nanorl's PATTERN for the engine of `tokenizers`, whose \w is narrower than that of tiktoken's
NANORL = PATTERN.replace(r"[^\W\d_]", r"[\p{Alphabetic}\p{M}\p{Pc}\p{Join_Control}&&[^_]]").replace(
    r"[^\w\s]|_", r"[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\s]|_")


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

# name, as GGUF files have it: the pattern for tiktoken, and the steps of a tokenizer.json
PRE_TOKENIZERS = {
    "nanorl": (PATTERN, [_split(NANORL), BYTE_LEVEL]),
    "gpt-2": (GPT2, [BYTE_LEVEL | {"use_regex": True}]),
    "smollm": (SMOLLM, [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}]),
    "qwen2": (QWEN2, [_split(QWEN2), BYTE_LEVEL]),
    "llama-bpe": (LLAMA3, [_split(LLAMA3), BYTE_LEVEL]),
}

# A byte's printable stand-in in files: itself where it is a printable character, else one from U+0100 on. (GPT-2's encoder.py)
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
STAND_IN = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
BYTE = {character: byte for byte, character in STAND_IN.items()}

# `tokenizers` brings text into form NFC by the tables of Unicode 9. Combining characters that came later stay in their place:
# text is normalized from one of them to the next. (Most ranges are blocks that are new as a whole.)
LATER_MARKS = re.compile(
    "([\u07fd\u0890-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1aff\u1df6-\u1dfa\ua82c"
    "\U000105c0-\U000105ff\U00010d00-\U00010fff\U00011070\U0001133b\U00011380-\U000113ff\U0001145e\U00011800-\U00011bff"
    "\U00011d00-\U00011fff\U00016100-\U0001613f\U00016d40-\U00016d7f\U00016ff0\U00016ff1\U0001e030-\U0001e7df])")

LONGEST_SPACE = 100_000         # characters of white space in a row; before a million, tiktoken's engine overflows its stack
MERGE_WORK = 10 ** 8            # sum of squared token lengths, ten times that of the largest vocabularies in use


def to_bytes(text: str) -> bytes:
    """A token from its printable stand-in; KeyError names a character that stands for no byte."""
    return bytes(BYTE[character] for character in text)


def to_text(token: bytes) -> str:
    """The printable stand-in of a token."""
    return "".join(STAND_IN[byte] for byte in token)


def nfc(text: str) -> str:
    """Unicode's form NFC of a text, as `tokenizers` makes it."""
    return "".join(unicodedata.normalize("NFC", part) for part in LATER_MARKS.split(text))


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of somebody else's model: its own ids, pattern and chat template. Made by `read_tokenizer`."""

    def __init__(self, vocab: dict[str, int], special: dict[str, int], in_text: list[str], pre_tokenizer: str, normalize: bool,
                 template: dict[str, Any], bos: int, end: int, pad: int, stop_ids: list[int]):
        """vocab: ids of tokens in printable form; special: ids of added tokens; in_text: those of them that a text may contain,
        such as <think>; pre_tokenizer: a key of PRE_TOKENIZERS; normalize: whether text is first brought into form NFC."""
        self.name, self.ranks = None, {to_bytes(token): i for token, i in vocab.items()}
        self.special, self.in_text = special, in_text
        self.pre_tokenizer, self.normalize = pre_tokenizer, normalize
        self.template = Template(**template)
        self.bos, self.end, self.pad, self.stop_ids = bos, end, pad, set(stop_ids)
        ids = [*vocab.values(), *special.values()]
        self.vocab_size = 1 + max(ids)
        if any(type(i) is not int or i < 0 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("expected every token to have an id of its own, a whole number from 0 on")
        if self.vocab_size > 2 * len(ids):
            raise ValueError(f"{len(ids)} tokens with ids up to {max(ids)}; expected ids without so many holes")
        if any(type(i) is not int or not 0 <= i < self.vocab_size for i in (bos, end, pad, *stop_ids)):
            raise ValueError(f"begins, ends, pads and stops with the ids {[bos, end, pad, *stop_ids]!s:.80}; expected whole "
                             f"numbers from 0 to {self.vocab_size - 1}")
        # tiktoken must know all bytes: those without a token get ids that `encode` refuses
        self.missing = {byte for byte in range(256) if bytes([byte]) not in self.ranks}
        beyond = {bytes([byte]): self.vocab_size + i for i, byte in enumerate(self.missing)}
        self.encoding = make_encoding(pre_tokenizer, PRE_TOKENIZERS[pre_tokenizer][0], self.ranks | beyond, special)
        self.byte_lengths = {i: len(token) for token, i in self.ranks.items()}
        self.byte_lengths |= {special[token]: len(token.encode()) for token in in_text}
        longest_first = sorted(map(re.escape, in_text), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the arguments of the class."""
        return {"vocab": {to_text(token): i for token, i in self.ranks.items()}, "special": self.special,
                "in_text": self.in_text, "pre_tokenizer": self.pre_tokenizer, "normalize": self.normalize,
                "template": asdict(self.template), "bos": self.bos, "end": self.end, "pad": self.pad,
                "stop_ids": sorted(self.stop_ids)}

    def encode(self, text: str) -> list[int]:
        """Ordinary tokens, and the added ones that a text may contain. Special tokens in a text are text."""
        if len(text) > LONGEST_SPACE and any(len(space) > LONGEST_SPACE for space in re.findall(r"\s+", text)):
            raise UserError(f"a text with more than {LONGEST_SPACE} characters of white space in a row; expected fewer")
        ids = []
        for part in self._added.split(text):        # by turns text and an added token
            if part in self.in_text:
                ids.append(self.special[part])
                continue
            part = nfc(part) if self.normalize else part
            found = self.encoding.encode_ordinary(part)
            if max(found, default=0) >= self.vocab_size:
                lost = next(c for c in part if not self.missing.isdisjoint(c.encode(errors="replace")))
                raise UserError(f"the character {lost!r} (U+{ord(lost):04X}): the model's tokenizer has no token for it; "
                                "expected a text without it")
            ids += found
        return ids

    def render(self, prompt: Prompt) -> list[int]:
        """The context in which a response is sampled, by the model's chat template; a prompt is one message of the user's.

        The text between two special tokens is encoded as a whole, as in the model's own training.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = [i for token, text in self.template.render(messages)
               for i in ([self.special[token]] if token else []) + self.encode(text)]
        return ids or [self.bos]


# ---------------------------------------------------------------------------------------------------------------------
# Merges
# ---------------------------------------------------------------------------------------------------------------------


def implied_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, ...]]:
    """What each token of several bytes is joined from, in order of rank: the parts left after all merges of lower rank.

    They are two, but for a token that no text comes to.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            lowest = min(joined)
            if lowest >= rank:
                break
            i = joined.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1:
            merges.append(tuple(parts))
    return merges


def all_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that spell a token, in order of its rank and theirs, as files made from tiktoken's have them."""
    pairs = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    return sorted(((a, b) for a, b in pairs if a in ranks and b in ranks), key=lambda m: (ranks[m[0] + m[1]], ranks[m[0]]))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_tokenizer(directory: str | Path) -> PretrainedTokenizer:
    """The tokenizer of a model's directory: tokenizer.json, and with it, where they are there, tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja and generation_config.json (else config.json).

    UserError, one sentence, where a file is damaged or asks for something that nanorl does not do.
    """
    folder, where = Path(directory), str(Path(directory, "tokenizer.json"))

    def optional(name: str) -> dict[str, Any]:
        return parse_object(read_text(folder / name), str(folder / name), "an object") if (folder / name).exists() else {}

    file = parse_object(read_text(where), where, "a tokenizer")
    settings = optional("special_tokens_map.json") | optional("tokenizer_config.json")
    settings["stop_ids"] = (optional("generation_config.json") or optional("config.json")).get("eos_token_id") or []
    if (folder / "chat_template.jinja").exists():
        settings["chat_template"] = read_text(folder / "chat_template.jinja")
    with _malformed_as_sentence(where):
        return _tokenizer_from(file, settings)


def read_gguf_tokenizer(reader: Any, where: str) -> PretrainedTokenizer:
    """The tokenizer of a GGUF file, from a gguf.GGUFReader; `where` names it in the errors."""
    with _malformed_as_sentence(where):
        get = {name.removeprefix("tokenizer."): field.contents() for name, field in reader.fields.items()
               if name.startswith("tokenizer.")}.get
        kind, pre, tokens = get("ggml.model"), get("ggml.pre"), list(enumerate(get("ggml.tokens")))
        if kind != "gpt2" or pre not in PRE_TOKENIZERS:
            raise ValueError(f"a tokenizer {kind!s:.40} with the pre-tokenizer {pre!s:.40}; expected gpt2 with one of "
                             f"{', '.join(PRE_TOKENIZERS)}")
        kinds = dict(enumerate(get("ggml.token_type")))            # 1: ordinary, 3: control, 4: user-defined, 5: an unused row
        file = {"added_tokens": [{"content": token, "id": i, "special": kinds[i] == 3} for i, token in tokens
                                 if kinds[i] in (3, 4)],
                "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre][1]}, "decoder": BYTE_LEVEL,
                "model": {"vocab": {token: i for i, token in tokens if kinds[i] == 1}, "merges": get("ggml.merges"),
                          "ignore_merges": pre == "llama-bpe"}}
        settings = {f"{role}_token": dict(tokens).get(get(f"ggml.{name}_token_id"))
                    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
        if get("ggml.add_bos_token"):
            file["post_processor"] = _puts_first(settings["bos_token"], get("ggml.bos_token_id"))
        return _tokenizer_from(file, settings | {"chat_template": get("chat_template"), "stop_ids": []})


def _tokenizer_from(file: dict[str, Any], settings: dict[str, Any]) -> PretrainedTokenizer:
    """A tokenizer from a tokenizer.json and what the files beside it say; some exception where it is none."""
    model, added, normalizer = file["model"], file["added_tokens"], file.get("normalizer")
    kind, decoder = model.get("type", "BPE"), file["decoder"]["type"]
    more = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if kind != "BPE" or decoder != "ByteLevel" or more:
        raise ValueError(f"a model {kind!s:.40} with {', '.join([*more, 'the decoder '])}{decoder!s:.40}; expected a byte-"
                         "level BPE, as Qwen, SmolLM2 and Llama 3 have it")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"the normalizer {normalizer!s:.80}; expected none, or NFC")
    for token in added:
        normalized = normalizer and token.get("normalized") and not token["special"]
        if normalized or any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"the added token {token['content']!r:.40} is normalized or takes in its neighbours; expected one "
                             "that is found as it is")
        if not token["content"] or re.search("[\ud800-\udfff]", token["content"]):
            raise ValueError(f"the added token {token['content']!r:.40}; expected characters")
    special = {token["content"]: token["id"] for token in added}
    vocab = {token: i for token, i in model["vocab"].items() if special.get(token) != i}
    strange = [token for token in vocab if not token or not set(token) <= BYTE.keys()]
    if strange or not vocab or len(special) < len(added):
        raise ValueError(f"{len(vocab)} tokens, of which {strange[:1]!s:.40} stand for no bytes, and {len(added)} added ones "
                         f"with {len(special)} names; expected a byte-level BPE")

    steps = [step for step in (file.get("post_processor") or {}).get("processors", [file.get("post_processor")]) if step]
    first = next((step["single"][0] for step in steps if step["type"] == "TemplateProcessing"), {})
    start = first["SpecialToken"]["id"] if "SpecialToken" in first else ""
    jinja = settings.get("chat_template")
    if isinstance(jinja, list):
        jinja = {each["name"]: each["template"] for each in jinja}["default"]
    template = recognise(jinja, special, start)
    bos, eos, pad = (special.get(name["content"] if isinstance(name, dict) else name)
                     for name in map(settings.get, ("bos_token", "eos_token", "pad_token")))
    size, stops = 1 + max((vocab | special).values()), settings["stop_ids"]
    stops = [i for i in (stops if isinstance(stops, list) else [stops]) if i < size]      # no id beyond is ever sampled
    stops += [eos] if eos is not None else []
    if template.family == "plain" and not stops:
        raise ValueError("names no eos_token; expected the special token that ends an answer")
    end = stops[-1] if template.family == "plain" else special[end_of_turn(template.family)]
    text_begins = special[start] if start else special.get("<|endoftext|>", end if bos is None else bos)
    in_text = [token["content"] for token in added if not token["special"]]
    tokenizer = PretrainedTokenizer(vocab, special, in_text, _known(file["pre_tokenizer"]), bool(normalizer), asdict(template),
                                    text_begins, end, end if pad is None else pad, sorted({end, *stops}))
    _check_merges(tokenizer.ranks, [m.split(" ") if isinstance(m, str) else m for m in model["merges"]],
                  bool(model.get("ignore_merges")))
    return tokenizer


def _check_merges(ranks: dict[bytes, int], merges: list[list[str]], ignore_merges: bool) -> None:
    """ValueError unless these merges give what the ids alone give. ignore_merges: a pre-token that is a token needs none."""
    if sum(len(token) ** 2 for token in ranks) > MERGE_WORK:
        raise ValueError(f"tokens of up to {max(map(len, ranks))} bytes; expected words and parts of words")
    listed = [tuple(map(to_bytes, merge)) for merge in merges]
    if ignore_merges and listed == all_merges(ranks):
        return
    for number, (found, wanted) in enumerate(zip_longest(listed, implied_merges(ranks)), start=1):
        if found != wanted:
            raise ValueError(f"merge {number} is {found!s:.60}, the ids ask for {wanted!s:.60}; expected each token of several "
                             "bytes to come about by its own merge, in the order of ids")


@contextmanager
def _malformed_as_sentence(where: str) -> Iterator[None]:
    """What is wrong, missing or of another type in this file becomes a UserError."""
    try:
        yield
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{where}: not as a tokenizer's file should be ({type(e).__name__}: {e!s:.80})") from None


def _known(spec: dict[str, Any]) -> str:
    """The name in PRE_TOKENIZERS of what a tokenizer.json asks for."""
    steps = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    steps = [{"use_regex": True} | step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step for step in steps]
    for name, (_, known) in PRE_TOKENIZERS.items():
        if steps == known:
            return name
    raise ValueError(f"the pre-tokenizer {json.dumps(steps):.200} is none that nanorl knows; expected that of Qwen, SmolLM2, "
                     "Llama 3 or GPT-2")


def _puts_first(token: str, token_id: int) -> dict[str, Any]:
    """The post_processor of a tokenizer.json that puts this special token before every text."""
    first, text, second = ({kind: {"id": name, "type_id": type_id}} for kind, name, type_id in (
        ("SpecialToken", token, 0), ("Sequence", "A", 0), ("Sequence", "B", 1)))
    return {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second],
            "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> dict[str, Any]:
    """Write the tokenizer.json and tokenizer_config.json with which transformers encodes and renders the same.

    Returns what generation_config.json should say of token ids.
    """
    template, in_text, pre_tokenizer, normalize = Template("nanorl"), [], "nanorl", False
    if isinstance(tokenizer, PretrainedTokenizer):
        template, in_text = tokenizer.template, tokenizer.in_text
        pre_tokenizer, normalize = tokenizer.pre_tokenizer, tokenizer.normalize
    elif tokenizer.name:
        raise UserError(f"the encoding {tokenizer.name}: has no counterpart in a tokenizer.json; expected a tokenizer that "
                        "nanorl trained or read")
    merges = implied_merges(tokenizer.ranks)
    if unreached := any(len(merge) > 2 for merge in merges):
        merges = all_merges(tokenizer.ranks)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    file = {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": name, "special": name not in in_text} | plain
                             for name, i in sorted(tokenizer.special.items(), key=lambda item: item[1])],
            "normalizer": {"type": "NFC"} if normalize else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre_tokenizer][1]},
            "post_processor": _puts_first(template.start, tokenizer.bos) if template.start else None, "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": unreached,
                      # outside the vocabulary, added tokens would be numbered anew from its end on
                      "vocab": {to_text(token): i for token, i in tokenizer.ranks.items()} | tokenizer.special,
                      "merges": [[to_text(a), to_text(b)] for a, b in merges]}}
    names = {i: name for name, i in tokenizer.special.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "bos_token": names[tokenizer.bos], "eos_token": names[tokenizer.end], "pad_token": names[tokenizer.pad]}
    config |= {"chat_template": jinja} if (jinja := template.jinja()) else {}
    for name, content in (("tokenizer.json", file), ("tokenizer_config.json", config)):
        Path(directory, name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return {"bos_token_id": tokenizer.bos, "eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad}
