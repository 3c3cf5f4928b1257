"""Byte-level BPE: the trainer by hand, the encoder by tiktoken.

    text  --PATTERN-->  pre-tokens  --UTF-8-->  bytes  --merges, lowest rank first-->  ids

A vocabulary is a numbered list of byte strings. Its first 256 are the single bytes, so any text can be written and no
token is ever "unknown"; each later one joins two earlier ones. The number is called the rank: it is the token's id and
its priority at once. Training chooses the merges (`train_bpe`), encoding replays them, and tiktoken does that in Rust.

Special tokens stand after the ranks. No text encodes to one, whatever it says: `render` and `render_response` add them.
"""

import base64
import heapq
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from nanorl.errors import UserError
from nanorl.files import Prompt

# No merge crosses a pre-token: a word and its leading space, a run of symbols likewise, ONE digit, a run of whitespace.
# The branches take in every character between them, for tiktoken silently drops text that no branch matches. There is
# no look-ahead such as GPT-2's \s+(?!\S): it makes tiktoken's regex engine panic on a run of a million spaces.
# Training splits with Python's `re`, encoding with a Rust engine, and their Unicode tables differ here and there: a
# combining accent is a letter only to Rust, a superscript two only to Python. That costs merges, never characters.
PATTERN = r" ?[^\W\d_]+| ?(?:[^\w\s]|_)+|\d|\s+"

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")


def train_bpe(text: str, vocab_size: int, quiet: bool = False) -> dict[bytes, int]:
    """Learn the ranks of a byte-level BPE.         (Sennrich et al. 2016, alg. 1; on bytes: Radford et al. 2019, GPT-2)

        repeat   (x, y) = argmax  sum_w n_w * #{adjacent (x, y) in w};    replace every x y by the new token xy

    w runs over the distinct pre-tokens and n_w is how often each occurs. Ties go to the smaller pair of byte strings,
    so the same text always gives the same ranks. `vocab_size` counts bytes and merges, no special tokens; fewer come
    back when no pair occurs twice any more. A digit is a pre-token of its own, so it has no neighbour to merge with.

    All words stand in one linked list, and a merge costs what it changes, however long a word is; the progress bar appears
    after a second, unless `quiet`. No two merges spell the same bytes: inside a longer word, xy has been split just as xy
    alone would be, and that split is unique.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokens = list(ranks)

    words, EDGE = Counter(re.findall(PATTERN, text)), 255               # no UTF-8 text has a byte 255
    joined = b"\xff".join([b"", *(word.encode() for word in words), b""])
    token = np.frombuffer(joined, np.uint8).astype(np.int64)            # at each place, the rank of the token there
    before, after = np.arange(len(token)) - 1, np.arange(len(token)) + 1        # the places of its neighbours
    times = np.array([0, *words.values(), 0])[np.cumsum(token == EDGE)]         # n_w of the word around it

    heap = []       # (-count, pair, its places), the smallest first: the tie rule comes for free

    def push(at: np.ndarray) -> None:
        """Sort these places by the pair that begins there, and put each pair that occurs twice into the heap."""
        at = at[(token[at] != EDGE) & (token[after[at]] != EDGE)]
        pairs = token[at] << 32 | token[after[at]]
        order = pairs.argsort(kind="stable")
        at, first = at[order], np.flatnonzero(np.diff(pairs[order], prepend=-1))
        for places, count in zip(np.split(at, first[1:]), np.add.reduceat(times[at], first).tolist(), strict=False):
            if count >= 2:
                x, y = token[places[0]], token[after[places[0]]]
                heapq.heappush(heap, (-count, (tokens[x], tokens[y]), places))

    push(before[1:])                                                    # all but the last, which has no neighbour
    with tqdm(desc="tokenizer", total=vocab_size, initial=256, disable=quiet, delay=1, leave=False) as bar:
        while heap and len(tokens) < vocab_size:
            # All places of a pair are there once its later token is: from then on, other merges can only take some away.
            negative, (x, y), at = heapq.heappop(heap)
            at = at[(token[at] == ranks[x]) & (token[after[at]] == ranks[y])]
            if times[at].sum() < -negative:
                push(at)                                                # with the count of today
                continue
            at = without_overlaps(at, after)
            taken = after[at]
            token[at], token[taken] = len(tokens), -1
            after[at] = after[taken]
            before[after[at]] = at
            ranks[x + y] = len(tokens)
            tokens.append(x + y)
            push(np.union1d(before[at], at))
            bar.update()
    return ranks


def without_overlaps(at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of the places where a pair begins, in order, those to merge from the left: in x x x x every second one."""
    index, overlaps = np.arange(len(at)), np.append(False, after[at[:-1]] == at[1:])
    return at[(index - np.maximum.accumulate(np.where(overlaps, 0, index))) % 2 == 0]


def parse_ranks(text: str, source: str) -> dict[bytes, int]:
    """Read a rank file, `base64(token) rank` on each line in order of rank; `source` names it in the errors."""
    ranks = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise UserError(f"{source}, line {number}: expected `base64(token) rank`, got {line[:60]!r}") from None
        if rank != number - 1:
            raise UserError(f"{source}, line {number}: expected rank {number - 1} (0, 1, 2, ... in order), got {rank}")
        if token in ranks:
            raise UserError(f"{source}, line {number}: expected a new token, got {token!r} again, which is line "
                             f"{ranks[token] + 1}")
        ranks[token] = rank
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(f"{source}: expected a token for each of the 256 bytes, byte {byte} has none")
    return ranks


def make_encoding(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    """tiktoken's encoder and decoder of a vocabulary. Unused ids, which an untrained model samples as well, decode, too."""
    used = {*ranks.values(), *special.values()}
    holes = {f"<|unused_{i}|>": i for i in range(max(used)) if i not in used}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special | holes)


class Tokenizer:
    """Text to ids and back. Ids run from 0 to vocab_size - 1; pad, bos, user, assistant and end are the last five."""

    def __init__(self, ranks: dict[bytes, int], name: str | None = None, pattern: str = PATTERN,
                 base_special: dict[str, int] | None = None):
        """Made by `train`, `load`, `named` or `from_state`; the last three arguments describe a named encoding."""
        special = dict(base_special or {})
        first = 1 + max(chain(ranks.values(), special.values()))
        self.name, self.ranks = name, ranks
        self.vocab_size = first + len(SPECIAL_TOKENS)
        self.pad, self.bos, self.user, self.assistant, self.end = range(first, self.vocab_size)
        self.stop_ids = {self.end}                                      # each of them ends an answer
        self.special = special | dict(zip(SPECIAL_TOKENS, range(first, self.vocab_size), strict=True))
        self.encoding = make_encoding(f"nanorl-{name or 'bpe'}", pattern, ranks, self.special)
        self.byte_lengths = {rank: len(token) for token, rank in ranks.items()}

    @classmethod
    def train(cls, text: str, vocab_size: int, quiet: bool = False) -> "Tokenizer":
        """Learn a vocabulary of at most `vocab_size` ids, the five special tokens included: 512 gives 507 ranks."""
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"vocab_size is {vocab_size}, expected at least {smallest}: 256 bytes, 5 special tokens")
        return cls(train_bpe(text, vocab_size - len(SPECIAL_TOKENS), quiet))

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """One of tiktoken's encodings (gpt2, cl100k_base, ...) with its own pattern and ids; our specials follow."""
        if name not in (names := tiktoken.list_encoding_names()):
            raise UserError(f"unknown encoding {name!r}, expected one of {', '.join(names)}")
        try:
            base = tiktoken.get_encoding(name)
        except Exception as error:                                      # whatever the HTTP client raises comes through
            raise UserError(f"cannot fetch the encoding {name!r} ({type(error).__name__}): go online once, set "
                             "TIKTOKEN_CACHE_DIR to a folder with its file, or train a tokenizer instead") from error
        # extending an encoding through these private fields is the way that tiktoken's README shows
        return cls(base._mergeable_ranks, name, base._pat_str, base._special_tokens)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a rank file in tiktoken's format. UserError where it is none, or was made with another pattern than PATTERN: the
        file does not hold it, and ids would not be those of its encoding."""
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read the rank file {path}: {error.strerror}") from None
        tokenizer = cls(parse_ranks(text, str(path)))
        texts = [token.decode("utf-8", "ignore") for token in tokenizer.ranks]
        never = [rank for rank, text in enumerate(texts)       # training splits with `re`, encoding not always where it does
                 if len(re.findall(PATTERN, text)) > 1 and len(tokenizer.encode(text)) > 1]
        if never:
            raise UserError(f"{path}, line {never[0] + 1}: {texts[never[0]]!r} and {len(never) - 1} others can never occur, "
                            "as their pattern is not nanorl's and the file does not hold it; expected a tiktoken name, as gpt2")
        return tokenizer

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps: {"name": ...} of a named encoding, or {"ranks": the text of the rank file}."""
        if self.name:
            return {"name": self.name}
        return {"ranks": "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())}

    @classmethod
    def from_state(cls, state: dict[str, str]) -> "Tokenizer":
        """The inverse of `state_dict`, also of a tokenizer that came with somebody else's model."""
        if "vocab" in state:
            from nanorl.interop.tokenizers import PretrainedTokenizer       # it imports this module
            return PretrainedTokenizer(**state)
        if "name" in state:
            return cls.named(state["name"])
        return cls(parse_ranks(state.get("ranks", ""), "the checkpoint's tokenizer"))

    def encode(self, text: str) -> list[int]:
        """Ordinary tokens only: "<|end|>" in a user's text is seven characters, never the special token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Special ids show by name, and bytes that are no valid UTF-8 (a character cut in two) as U+FFFD."""
        return self.encoding.decode(ids)

    def num_bytes(self, ids: list[int]) -> int:
        """UTF-8 bytes that the ordinary tokens stand for, the denominator of bits per byte; special tokens count 0."""
        return sum(self.byte_lengths.get(i, 0) for i in ids)

    def render(self, prompt: Prompt) -> list[int]:
        """The context in which a response is sampled:  <|bos|> <|user|> prompt <|assistant|>

        Of a conversation, the earlier turns come first:  <|bos|> <|user|> question <|assistant|> answer <|end|> <|user|> ...

        With `render_response` this is the one place where special tokens are added. Prompt and response are encoded
        apart, never as one string: a merge across their boundary would make tokens that are half prompt and half
        response, so that training would see ids the sampler, which starts after the prompt, can never produce.
        """
        turns, ids = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, [self.bos]
        for turn in turns:
            if turn["role"] == "system":
                raise UserError("a system message; expected none: the models that nanorl trained know none, pretrained ones do")
            ids += [self.user] if turn["role"] == "user" else [self.assistant]
            ids += self.encode(turn["content"]) if turn["role"] == "user" else self.render_response(turn["content"])
        return [*ids, self.assistant]

    def render_observation(self, text: str) -> list[int]:
        """What stands between two responses of a conversation:  <|user|> text <|assistant|>"""
        user = {"role": "user", "content": ""}
        answered = [*self.render([user]), *self.render_response("")]
        whole = self.render([user, {"role": "assistant", "content": ""}, {"role": "user", "content": text}])
        if whole[: len(answered)] != answered:
            raise UserError("this tokenizer has no chat template; expected one, which tells observations from answers")
        return whole[len(answered) :]

    def render_response(self, response: str) -> list[int]:
        """What the model is to say after `render`:  response <|end|>"""
        return [*self.encode(response), self.end]
