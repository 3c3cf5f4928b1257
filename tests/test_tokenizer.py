"""The tokenizer loses no character, invents no special token, and agrees with BPE written out naively."""

import base64
import random
import re
import time
from collections import Counter
from itertools import pairwise

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tqdm import tqdm

from nanorl.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, train_bpe

quick = settings(max_examples=50, deadline=None)

CORPUS = (
    "Tom found 17 red apples, and Mia found 25. So there are 17 + 25 = 42 apples!\n\n"
    "  if under_score == 2024:  # \"quoted\" 2024-12-31\n\tcafé naïve straße Привет мир 日本語の文 🙂🙂\n"
    "What is 1000 plus 1000? It is 2000. <|user|> <|end|> <|bos|>  aaaaaaa  ababab\n"
) * 3
VOCAB_SIZE = 360
TOKENIZER = Tokenizer.train(CORPUS, VOCAB_SIZE)

# The engines of `re` and tiktoken class these characters alike. (All of Latin but four separators, superscripts and
# fractions; a wider alphabet would meet code points that only one of the two Unicode tables knows.)
latin = st.characters(max_codepoint=0x24F, exclude_characters="\x1c\x1d\x1e\x1f²³¹¼½¾")
agreed = latin | st.sampled_from("Жя中日の한🙂—“”…\u2028")
# Pieces of the corpus make long tokens likely, which single random characters do not.
pieces = st.sampled_from([*re.findall(PATTERN, CORPUS), *SPECIAL_TOKENS, "0", "10", "  ", "\n ", "\r\n", "_", "a", "b"])
rich_text = st.lists(pieces | st.text(max_size=3), max_size=30).map("".join)
agreed_text = st.lists(pieces | st.text(agreed, max_size=3), max_size=30).map("".join)
any_text = st.text() | rich_text
runs = st.lists(st.tuples(st.sampled_from("aabé日. \n"), st.integers(1, 9)), max_size=25).map(
    lambda parts: "".join(character * times for character, times in parts))
training_text = st.text("ab ", max_size=80) | st.text("abc _1\né", max_size=80) | st.text(agreed, max_size=40) | runs


# The definitions, written with no regard for speed.


def naive_merge(word, x, y):
    i = 0
    while i + 1 < len(word):
        if word[i] == x and word[i + 1] == y:
            word = [*word[:i], x + y, *word[i + 2:]]
        i += 1
    return word


def naive_train(text, vocab_size):
    """Count every pair of every pre-token anew before every merge."""
    words = [[bytes([byte]) for byte in word.encode()] for word in re.findall(PATTERN, text)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size:
        count = Counter(pair for word in words for pair in pairwise(word))
        if not count or max(count.values()) < 2:
            break
        x, y = min(count, key=lambda pair: (-count[pair], pair))
        assert x + y not in ranks, "two merges spell the same bytes"
        ranks[x + y] = len(ranks)
        words = [naive_merge(word, x, y) for word in words]
    return ranks


def naive_encode(ranks, text):
    """In each pre-token, merge the adjacent pair of the lowest rank (the leftmost of equals) until none is left."""
    ids = []
    for word in re.findall(PATTERN, text):
        word = [bytes([byte]) for byte in word.encode()]
        while candidates := [(ranks[x + y], i) for i, (x, y) in enumerate(pairwise(word)) if x + y in ranks]:
            _, i = min(candidates)
            word[i:i + 2] = [word[i] + word[i + 1]]
        ids += [ranks[token] for token in word]
    return ids


def spelled(tokenizer, ids):
    """The byte string of each ordinary id."""
    return [tokenizer.encoding.decode_single_token_bytes(i) for i in ids]


# Splitting and training


@given(any_text)
@quick
def test_the_pattern_takes_in_every_character(text):
    assert "".join(re.findall(PATTERN, text)) == text
    only_bytes = tiktoken.Encoding("bytes", pat_str=PATTERN, special_tokens={},
                                   mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    assert bytes(only_bytes.encode_ordinary(text)) == text.encode()


def test_the_pattern_takes_in_every_code_point_in_both_engines():
    """Random text is unlikely to meet the one category that a wrong pattern drops; all of Unicode does."""
    everything = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert "".join(re.findall(PATTERN, everything)) == everything
    assert TOKENIZER.decode(TOKENIZER.encode(everything)) == everything


@given(training_text, st.integers(256, 290))
@quick
def test_training_equals_counting_everything_anew_before_each_merge(text, vocab_size):
    assert list(train_bpe(text, vocab_size).items()) == list(naive_train(text, vocab_size).items())


def test_training_on_the_corpus_equals_counting_everything_anew():
    assert list(TOKENIZER.ranks.items()) == list(naive_train(CORPUS, VOCAB_SIZE - len(SPECIAL_TOKENS)).items())


def test_ties_go_to_the_smaller_pair_of_byte_strings():
    """Every pair occurs twice: (a, b) before (b, c) before (d, e), and then (ab, c) before (d, e)."""
    assert list(train_bpe("de1abc2de3abc", 259))[256:] == [b"ab", b"abc", b"de"]


@pytest.mark.parametrize("alphabet", ["ACGT", "天地玄黃宇宙洪荒日月盈昃辰宿列張", "+-*/=<>"])
def test_a_long_word_costs_what_its_merges_change(alphabet):
    """300,000 characters without a space, in a second; counting the word anew at each merge took a minute."""
    text, started = "".join(random.Random(0).choices(alphabet, k=300_000)), time.process_time()
    assert len(train_bpe(text, 507, quiet=True)) == 507 and time.process_time() - started < 15


def test_the_progress_bar_counts_tokens_and_can_be_turned_off(monkeypatch, capsys):
    """It appears after a second; here at once."""
    monkeypatch.setattr("nanorl.tokenizer.tqdm", lambda **options: tqdm(**options | {"delay": 0, "mininterval": 0}))
    Tokenizer.train(CORPUS, VOCAB_SIZE)
    n_ranks = VOCAB_SIZE - len(SPECIAL_TOKENS)
    error = capsys.readouterr().err
    assert f" 256/{n_ranks} " in error and f" {n_ranks}/{n_ranks} " in error
    Tokenizer.train(CORPUS, VOCAB_SIZE, quiet=True)
    assert capsys.readouterr().err == ""


@given(training_text | rich_text)
@quick
def test_training_is_deterministic(text):
    assert list(train_bpe(text, 290).items()) == list(train_bpe(text, 290).items())


@given(training_text | st.text("019 a.", max_size=60))
@quick
def test_no_digit_is_ever_merged(text):
    ranks = train_bpe(text * 2, 300)
    assert all(len(token) == 1 for token in ranks if re.search(rb"\d", token))


def test_training_stops_when_no_pair_occurs_twice():
    assert len(train_bpe("", 1000)) == len(train_bpe("abcdef", 1000)) == 256
    assert list(train_bpe("abab", 1000))[256:] == [b"ab"]


def test_vocab_size_counts_the_special_tokens():
    n_ranks = VOCAB_SIZE - len(SPECIAL_TOKENS)
    assert TOKENIZER.vocab_size == VOCAB_SIZE and list(TOKENIZER.ranks.values()) == list(range(n_ranks))
    specials = [TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.user, TOKENIZER.assistant, TOKENIZER.end]
    assert specials == list(range(n_ranks, VOCAB_SIZE))
    assert TOKENIZER.decode(specials) == "<|pad|><|bos|><|user|><|assistant|><|end|>"


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 260, expected at least 261"):
        Tokenizer.train("some text", 260)
    Tokenizer.train("some text", 261)


# Encoding and decoding


@given(any_text)
@quick
def test_decoding_undoes_encoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(agreed_text)
@quick
def test_encoding_equals_lowest_rank_first_merging(text):
    assert TOKENIZER.encode(text) == naive_encode(TOKENIZER.ranks, text)


@given(st.text("ab", min_size=20, max_size=80), st.text("ab ", max_size=40))
@quick
def test_encoding_equals_lowest_rank_first_merging_where_merges_compete(training, text):
    """With two letters most pairs overlap another pair, so that the order of the merges decides."""
    tokenizer = Tokenizer(train_bpe(training, 280))
    assert tokenizer.encode(text) == naive_encode(tokenizer.ranks, text)


@given(any_text)
@quick
def test_digits_are_single_tokens(text):
    tokens = spelled(TOKENIZER, TOKENIZER.encode(text))
    assert [t for t in tokens if re.search(rb"\d", t)] == [d.encode() for d in re.findall("[0-9]", text)]


@given(any_text)
@quick
def test_num_bytes_is_the_length_in_utf8(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.num_bytes(ids) == len(text.encode())
    assert TOKENIZER.num_bytes([*TOKENIZER.render(text), TOKENIZER.pad, TOKENIZER.end]) == len(text.encode())


@given(st.lists(st.integers(0, VOCAB_SIZE - 1)))
@quick
def test_every_id_decodes(ids):
    """Whatever a model samples is shown: cut characters as U+FFFD, special tokens by name."""
    expected = b"".join(spelled(TOKENIZER, ids)).decode(errors="replace")
    assert TOKENIZER.decode(ids) == expected


def test_a_cut_character_decodes_to_the_replacement_character():
    assert TOKENIZER.decode([ord("a"), 0xC3]) == "a\ufffd"


@pytest.mark.parametrize("run", [" ", "\n", "a", "!", "é", "7"])
def test_a_run_of_a_million_equal_characters_encodes(run):
    """Look-ahead in the pattern would overflow the stack of tiktoken's regex engine here."""
    text = run * 1_000_000 + "x"
    assert TOKENIZER.num_bytes(TOKENIZER.encode(text)) == len(text.encode())


# Special tokens and the boundary between prompt and response


@given(st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=3)).map("".join))
@quick
def test_special_names_in_text_are_never_special_tokens(text):
    ids = TOKENIZER.encode(text)
    assert all(i < TOKENIZER.pad for i in ids)
    assert TOKENIZER.decode(ids) == text


@given(any_text, any_text)
@quick
def test_render_adds_the_special_tokens_and_nothing_else(prompt, response):
    ids = TOKENIZER.render(prompt) + TOKENIZER.render_response(response)
    special = [TOKENIZER.bos, TOKENIZER.user, TOKENIZER.assistant, TOKENIZER.end]
    assert [i for i in ids if i >= TOKENIZER.pad] == special                # one bos, one end, no pad
    assert ids[:2] == special[:2] and ids[-1] == special[-1]
    boundary = ids.index(TOKENIZER.assistant)
    assert TOKENIZER.decode(ids[2:boundary]) == prompt and TOKENIZER.decode(ids[boundary + 1:-1]) == response


@given(rich_text, rich_text, rich_text)
@quick
def test_the_ids_of_a_prompt_do_not_depend_on_its_response(prompt, one, other):
    n = len(TOKENIZER.render(prompt))
    rows = [TOKENIZER.render(prompt) + TOKENIZER.render_response(response) for response in (one, other)]
    assert rows[0][:n] == rows[1][:n] == TOKENIZER.render(prompt)


def test_an_empty_prompt_renders():
    assert TOKENIZER.render("") == [TOKENIZER.bos, TOKENIZER.user, TOKENIZER.assistant]
    assert TOKENIZER.render_response("") == [TOKENIZER.end]


# Files and checkpoints


def same(one, other):
    return (one.state_dict(), one.vocab_size, one.pad, one.end) == (
        other.state_dict(), other.vocab_size, other.pad, other.end) and one.encode(CORPUS) == other.encode(CORPUS)


def test_a_saved_tokenizer_loads_as_itself(tmp_path):
    (tmp_path / "ranks.tiktoken").write_text(TOKENIZER.state_dict()["ranks"])
    assert same(Tokenizer.load(tmp_path / "ranks.tiktoken"), TOKENIZER)
    assert same(Tokenizer.load(str(tmp_path / "ranks.tiktoken")), TOKENIZER)
    assert same(Tokenizer.from_state(TOKENIZER.state_dict()), TOKENIZER)


def test_what_a_checkpoint_keeps_is_a_file_that_tiktoken_reads(tmp_path):
    (tmp_path / "ranks.tiktoken").write_text(TOKENIZER.state_dict()["ranks"])
    assert load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken")) == TOKENIZER.ranks


def edited(line, replacement):
    """The rank file of TOKENIZER with one line (counted from 1) replaced, or left out where the replacement is None."""
    lines = TOKENIZER.state_dict()["ranks"].splitlines()
    lines[line - 1:line] = [] if replacement is None else [replacement]
    return "\n".join(lines) + "\n"


def encoded(token):
    return base64.b64encode(token).decode()


IN_ORDER = "(0, 1, 2, ... in order)"
MALFORMED = {
    "one field": (edited(9, "CA=="), "line 9: expected `base64(token) rank`, got 'CA=='"),
    "three fields": (edited(9, "CA== 8 8"), "line 9: expected `base64"),
    "not base64": (edited(300, "?? 299"), "line 300: expected `base64"),
    "bad padding": (edited(300, "CA= 299"), "line 300: expected `base64"),
    "no token": (edited(300, " 299"), "line 300: expected `base64"),
    "no number": (edited(300, "CA== x"), "line 300: expected `base64"),
    "blank line": (edited(300, ""), "line 300: expected `base64"),
    "empty file": ("", "line 1: expected `base64"),
    "binary file": ("\x00\ufffd\x01", "line 1: expected `base64"),
    "duplicate token": (edited(300, encoded(b"a") + " 299"), "line 300: expected a new token, got b'a' again"),
    "duplicate rank": (edited(300, encoded(b"new token") + " 298"), f"line 300: expected rank 299 {IN_ORDER}, got 298"),
    "gap": (edited(300, None), f"line 300: expected rank 299 {IN_ORDER}, got 300"),
    "not from 0": (edited(1, None), f"line 1: expected rank 0 {IN_ORDER}, got 1"),
    "negative rank": (edited(1, "AA== -1"), f"line 1: expected rank 0 {IN_ORDER}, got -1"),
    "missing byte": (edited(98, encoded(b"new token") + " 97"), "each of the 256 bytes, byte 97 has none"),
}


@pytest.mark.parametrize("text, message", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_rank_file_is_refused_by_file_and_line(tmp_path, text, message):
    path = tmp_path / "ranks.tiktoken"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_state({"ranks": text})
    assert str(error.value).startswith("the checkpoint's tokenizer") and message in str(error.value)


def test_bytes_that_are_no_text_are_refused_at_their_line(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(b"AA== 0\n\xff\xfe\x00 1\n")
    with pytest.raises(ValueError, match="line 2: expected `base64"):
        Tokenizer.load(path)


def test_a_missing_rank_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the rank file .*nowhere\.tiktoken: No such file"):
        Tokenizer.load(tmp_path / "nowhere.tiktoken")
    with pytest.raises(ValueError, match="cannot read the rank file"):
        Tokenizer.load(tmp_path)                                            # a folder


# Named encodings


@pytest.fixture
def gpt2(monkeypatch):
    """A stand-in for the downloaded file: GPT-2's pattern, a special token and a hole (262) among its ids."""
    ranks = {bytes([255 - i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"42": 259}
    special = {"<|end|>": 260, "<|endoftext|>": 261, "<|x|>": 263}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    base = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: base)
    return base


def test_a_named_encoding_keeps_its_ids_and_ours_follow(gpt2):
    tokenizer = Tokenizer.named("gpt2")
    text = "the cat's 42 <|endoftext|> <|end|>\n  the end"
    assert tokenizer.encode(text) == gpt2.encode_ordinary(text)             # its ranks and its pattern
    assert (tokenizer.pad, tokenizer.end, tokenizer.vocab_size) == (gpt2.n_vocab, gpt2.n_vocab + 4, gpt2.n_vocab + 5)
    assert tokenizer.decode([261]) == "<|endoftext|>"
    assert tokenizer.num_bytes([261, 258, tokenizer.end]) == len(" the")
    assert gpt2._special_tokens["<|end|>"] == 260, "tiktoken's own object, which it caches, must stay as it was"


def test_every_id_of_a_named_encoding_decodes(gpt2):
    """Also the ids that it leaves unused, and the one whose name is also ours."""
    tokenizer = Tokenizer.named("gpt2")
    assert tokenizer.decode([262, 260, tokenizer.end]) == "<|unused_262|><|unused_260|><|end|>"
    assert all(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))


def test_a_named_encoding_is_kept_by_name(gpt2):
    tokenizer = Tokenizer.named("gpt2")
    assert tokenizer.state_dict() == {"name": "gpt2"}
    assert Tokenizer.from_state({"name": "gpt2"}).encode("the cat's 42") == tokenizer.encode("the cat's 42")


def test_an_unknown_encoding_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^unknown encoding 'gpt7', expected one of .*gpt2") as error:
        Tokenizer.named("gpt7")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("failure", [OSError, ConnectionError, ValueError, RuntimeError])
def test_an_encoding_that_cannot_be_fetched_is_refused_in_one_sentence(monkeypatch, failure):
    def get_encoding(name):
        raise failure("Max retries exceeded\nand more lines")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(ValueError) as error:
        Tokenizer.named("gpt2")
    assert str(error.value).startswith(f"cannot fetch the encoding 'gpt2' ({failure.__name__}): go online once")
    assert "\n" not in str(error.value)
