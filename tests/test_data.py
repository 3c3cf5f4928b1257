"""Files are read whole or refused in one sentence; padding, masks and batches lose nothing and repeat nothing."""

import json
from collections import Counter
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl.data import (consecutive_windows, pad, random_windows, response_mask, shift, shuffled_batch, training_records,
                         which_fit)
from nanorl.errors import UserError
from nanorl.files import read_records, read_text
from nanorl.pairs import read_pairs, split_pairs
from nanorl.tasks import is_heldout

quick = settings(max_examples=50, deadline=None)
KEYS = ("prompt", "response")
BOS = 99
good = json.dumps({"prompt": "a", "response": "b"})


def refusal(read, path, *args) -> str:
    """The one sentence of the ValueError, which begins with the file."""
    with pytest.raises(ValueError) as error:
        read(path, *args)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) - len(str(path)) < 250, text
    return text.removeprefix(str(path))


# ---- Files ----


@pytest.fixture
def file(tmp_path):
    """A function that writes bytes or text to a file and returns its path."""
    def write(content: bytes | str):
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


def test_text_comes_back_as_it_is(file):
    """Line ends of any kind, white space at both ends, and U+2028 stay; only a byte order mark goes."""
    text = "\n a\r\nb\rc\x01\u2028é🙂\ufeff \n"
    assert read_text(file(text)) == text
    assert read_text(file(b"\xef\xbb\xbf" + text.encode())) == text


@pytest.mark.parametrize(("content", "mention"), [
    (b"", "empty"),
    (b" \r\n\t", "empty"),
    (b"\xef\xbb\xbf", "empty"),
    (b"abc\xffdef", "byte 3 is 0xff"),
    ("text".encode("utf-16"), "byte 3 is 0x00"),
    (b"text\0" + b"x" * (1 << 21), "byte 4 is 0x00"),
    (b"x" * (1 << 21) + b"\0", "is 0x00"),
    (b"\xf0\x9f\x99", "not UTF-8"),                             # a file cut inside of a character
    (b"\xed\xa0\x80", "not UTF-8"),                             # half of a surrogate pair is no character
])
@pytest.mark.parametrize("read", [read_text, lambda path: read_records(path, "demonstrations")])
def test_what_is_no_text_is_refused_in_one_sentence(file, content, mention, read):
    assert mention in refusal(read, file(content))


def test_what_is_no_file_is_refused_in_one_sentence(tmp_path):
    assert "no such file" in refusal(read_text, tmp_path / "nowhere")
    assert "no such file" in refusal(read_text, tmp_path / "nowhere" / "deeper")
    assert "not a file" in refusal(read_text, tmp_path)


@given(st.lists(st.dictionaries(st.sampled_from([*KEYS, "more"]), st.text(st.characters(exclude_categories=["Cs"]),
       min_size=1), min_size=3), max_size=5), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n \t\n"]))
@quick
def test_records_come_back_as_they_were_written(tmp_path_factory, records, ascii_only, end):
    """Any characters in any string, escaped or raw: lines end at \\n only. Blank lines and other keys do no harm."""
    path = tmp_path_factory.mktemp("records") / "file"
    path.write_bytes((end.join(json.dumps(r, ensure_ascii=ascii_only) for r in records) + end + good).encode())
    found = read_records(path, "demonstrations")
    assert [record.source for record in found] == [*records, json.loads(good)]
    assert found == [{key: record.source[key] for key in KEYS} for record in found]


def test_separators_inside_a_string_end_no_line(file):
    """Raw U+2028, U+2029, U+0085, and an escaped NUL, form feed and newline: `splitlines` would cut at most of them."""
    text = "a\u2028b\u2029c\x85d\x00e\x0cf\ng"
    for ascii_only in (False, True):
        line = json.dumps({"prompt": text, "response": "x"}, ensure_ascii=ascii_only)
        assert read_records(file(f"{line}\n{line}"), "demonstrations") == [{"prompt": text, "response": "x"}] * 2


def test_an_array_of_records_is_read_like_its_lines(file):
    """However it is laid out; a line that is a list of its own makes no array of the file."""
    records = [{"prompt": "a\u2028", "response": "é"}, {"prompt": "[1]", "response": "]", "n": [{}]}]
    for indent in (None, 0, 4):
        for end in ("", "\n", "\n\n \t"):
            found = read_records(file(end + json.dumps(records, indent=indent) + end), "demonstrations")
            assert [record.source for record in found] == records
    assert ", line 1: list; line 2: list; expected" in refusal(read_records, file(f"[{good}]\n[{good}]"), "demonstrations")


@pytest.mark.parametrize(("text", "mention"), [
    (f"[\n{good},\n{good}\n", ", line 4: not readable as JSON (Expecting ',' delimiter"),
    (f"[\n{good}\n{good}\n]", ", line 3: not readable as JSON (Expecting ',' delimiter"),
    (f"[\n{good},\n]", ", line 3: not readable as JSON"),
    (f"[\n{good},\n{{'prompt': 1}}]", ", line 3: not readable as JSON"),
    ('[{"prompt": "a", "response": 1}, {"prompt": "a"}, 7]',
     ", record 1: 'response' is 1 (int); record 2: no 'response', but 'prompt'; record 3: int"),
    ("[[]]", ", record 1: list"),
])
def test_a_bad_array_is_refused_where_it_is_bad(file, text, mention):
    assert mention in refusal(read_records, file(text), "demonstrations")


def test_the_first_three_bad_records_are_named_by_their_lines(file):
    """Physical lines, blank ones too, as an editor counts them; and how many more there are."""
    content = f'\n\n{good}\n7\n\n{{"prompt": true, "response": "b"}}\n{good}\n{{}}\nx\n' + "null\n" * 1000
    assert refusal(read_records, file(content), "demonstrations") == (
        ", line 4: int; line 6: 'prompt' is true (bool); line 8: no 'prompt'; and 1,001 more; expected an object with prompt, "
        "response: non-empty texts; docs/your-data.md has more")


@pytest.mark.parametrize(("value", "shown"), [
    (72, "72 (int)"), (7.5, "7.5 (float)"), (None, "null (NoneType)"), (False, "false (bool)"),
    (["72", "72.0"], '["72", "72.0"] (list)'), ([{"role": "user", "content": "ü"}], '[{"role": "user", "content": "ü'),
    ({}, "{} (dict)"), ("", '"" (str)'), ([], "[] (list)"), (float("nan"), "NaN (float)")])
def test_a_value_of_another_type_is_shown_as_it_was_typed(value, shown, file):
    content = json.dumps({"prompt": "a", "response": value})
    assert f"'response' is {shown[:40]}" in refusal(read_records, file(content), "demonstrations")


@pytest.mark.parametrize(("reserve", "long"), [
    (0, ["line 1: 12 tokens", "line 4: 4 tokens + 9"]),
    (7, ["line 1: 12 tokens", "line 3: 4 tokens + --max-new-tokens 7", "line 4: 4 tokens + 9"])])
def test_records_that_do_not_fit_are_named_or_left_out(reserve, long, capsys):
    """A context of ten. A prompt that fills it is at fault by itself; else the flag is named where it asks for most."""
    prompts, responses = [[0] * 12, [0] * 2, [0] * 4, [0] * 4], [[0], [0] * 3, [0] * 2, [0] * 9]
    places = [f"line {number}" for number in (1, 2, 3, 4)]
    with pytest.raises(UserError) as error:
        which_fit([prompts, responses], places, "a.jsonl", 10, reserve)
    assert str(error.value).startswith(f"a.jsonl, {'; '.join(long)}; expected") and "--skip-long" in str(error.value)
    fitting = [i for i in range(4) if not any(text.startswith(places[i]) for text in long)]
    assert which_fit([prompts, responses], places, "a.jsonl", 10, reserve, skip_long=True) == fitting
    assert f"Left out {len(long)} of 4 records of a.jsonl" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: 2 tokens"):
        which_fit([[[0] * 2]], places, "a.jsonl", 1, skip_long=True)
    assert which_fit([[], []], [], "a.jsonl", 10) == [] and not capsys.readouterr().out


@pytest.mark.parametrize(("line", "mention"), [
    ("not json", "not readable as JSON"),
    ('{"prompt": "a"', "not readable as JSON"),
    ('{"prompt": "a\x01", "response": "b"}', "not readable as JSON"),       # JSON wants control characters escaped
    (good + good, "not readable as JSON"),
    (f"{good}\r{good}", "not readable as JSON"),
    ("[" * 100_000, "not readable as JSON"),
    ('{"prompt":' * 100_000, "not readable as JSON"),
    ('{"prompt": ' + "1" * 1_000_000 + "}", "not readable as JSON"),        # Python refuses to convert that many digits
    ('{"prompt": ' + "1" * 4_000 + "}", "'prompt' is 1111"),
    ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", "'prompt' is [[[["),
    ("null", "NoneType"),
    ('["prompt", "response"]', "list"),
    ('"prompt response"', "str"),
    ("1e999", "float"),
    ('{"prompt": "a"}', "no 'response'"),
    ('{"Prompt": "a", "response": "b"}', "no 'prompt', but 'Prompt', 'response'"),
    ('{"prompt": null, "response": "b"}', "'prompt' is null (NoneType)"),
    ('{"prompt": 7, "response": "b"}', "'prompt' is 7 (int)"),
    ('{"prompt": ["a"], "response": "b"}', "'prompt' is"),
    ('{"prompt": "a", "response": ""}', "'response' is \"\" (str)"),
    ('{"prompt": "a", "response": "b", "response": NaN}', "twice"),
])
def test_a_bad_record_is_refused_in_one_sentence_with_its_line(file, line, mention):
    """Blank lines count, and so does a byte order mark's line; the sentence says what was expected."""
    for before, number in (("", 1), (f"{good}\n\n{good}\r\n", 4), (f"\ufeff{good}\n", 2)):
        text = refusal(read_records, file(f"{before}{line}\n{good}\n"), "demonstrations")
        assert text.startswith(f", line {number}: ") and mention in text and "expected" in text


# ---- From sequences to tensors ----

sequences = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=6)


@given(sequences, st.integers(0, 9))
@quick
def test_pad_keeps_every_sequence_on_the_left(rows, pad_id):
    tokens, lengths = pad(rows, pad_id)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(rows), max(map(len, rows)))
    for row, sequence in zip(tokens.tolist(), rows, strict=True):
        assert row == sequence + [pad_id] * (len(row) - len(sequence))
    assert lengths.tolist() == [len(sequence) for sequence in rows]


@given(sequences)
@quick
def test_shift_pairs_each_token_with_the_next(rows):
    inputs, targets = shift(pad(rows)[0])
    assert inputs.shape == targets.shape
    for row, (x, y) in zip(rows, zip(inputs.tolist(), targets.tolist(), strict=True), strict=True):
        assert list(zip(x, y, strict=True))[: len(row) - 1] == list(pairwise(row))


@given(sequences, st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=6, max_size=6), st.integers(0, 3))
@quick
def test_the_mask_covers_exactly_the_response(prompts, responses, extra):
    """The targets under the mask are the response, whole and in order: with any ids, the padding's too, and under any
    amount of padding. An empty response has an empty mask.
    """
    responses = responses[: len(prompts)]
    tokens, lengths = pad([p + r for p, r in zip(prompts, responses, strict=True)])
    tokens = torch.nn.functional.pad(tokens, (0, extra))
    mask = response_mask(torch.tensor([len(p) for p in prompts]), lengths, tokens.shape[1])
    targets = shift(tokens)[1]
    assert mask.dtype == torch.bool and mask.shape == targets.shape
    assert [target[where].tolist() for target, where in zip(targets, mask, strict=True)] == responses


# ---- Batches ----


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(2, 20))
@quick
def test_consecutive_windows_predict_every_token_once(text, width):
    """The targets of all windows, put end to end, are the text. Each begins with a BOS; all but the last are full."""
    windows, lengths = consecutive_windows(torch.tensor(text), BOS, width)
    targets = [row[1:length].tolist() for row, length in zip(windows, lengths.tolist(), strict=True)]
    assert list(chain(*targets)) == text
    assert (windows[:, 0] == BOS).all() and (lengths[:-1] == width).all() and lengths.max() <= width


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 2**32))
@quick
def test_random_windows_are_stretches_of_the_text(width, longer, seed):
    """BOS and width - 1 neighbours, from anywhere up to the very end; a text of exactly width - 1 tokens is enough."""
    ids = torch.arange(100, 100 + width - 1 + longer)
    windows = random_windows(ids, BOS, 50, width, torch.Generator().manual_seed(seed))
    assert windows.shape == (50, width) and (windows[:, 0] == BOS).all()
    if width > 1:
        starts = windows[:, 1]
        assert torch.equal(windows[:, 1:], starts[:, None] + torch.arange(width - 1))
        assert starts.min() >= 100 and windows.max() <= ids[-1]


def test_random_windows_begin_everywhere_alike():
    """Eight places, 8,000 windows: the first and the last place included (chi-square, 7 degrees of freedom, 99.9 %)."""
    windows = random_windows(torch.arange(10), BOS, 8000, 4, torch.Generator().manual_seed(0))
    counts = Counter(windows[:, 1].tolist())
    assert sorted(counts) == list(range(8))
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 24.3


def test_random_windows_follow_their_generator_alone():
    """The same generator state gives the same batch, the next batch differs, and the global state has no say."""
    ids, batches = torch.arange(1000), []
    for state in (0, 1):
        torch.manual_seed(state)
        generator = torch.Generator().manual_seed(7)
        batches.append([random_windows(ids, BOS, 8, 16, generator) for _ in range(2)])
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][0], batches[0][1])


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**40))
@quick
def test_every_epoch_is_a_permutation(count, batch, seed):
    """Batches put end to end and cut into epochs of `count`: each holds every record once, also where a batch runs
    over the border of two epochs or is larger than all of them."""
    steps = -(-4 * count // batch)
    picks = list(chain(*(shuffled_batch(count, batch, step, seed) for step in range(steps))))
    assert len(picks) == steps * batch
    for epoch in range(len(picks) // count):
        assert sorted(picks[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 50), st.integers(1, 8), st.integers(0, 40), st.integers(0, 2**40))
@quick
def test_a_batch_is_a_function_of_seed_and_position(count, batch, step, seed):
    """The end-to-end stream of records is one, whatever the batch size; so a resumed run starts at any step."""
    singles = [shuffled_batch(count, 1, position, seed)[0] for position in range(step * batch, (step + 1) * batch)]
    assert shuffled_batch(count, batch, step, seed) == singles


def test_epochs_and_seeds_are_shuffled_anew():
    orders = [tuple(shuffled_batch(20, 20, step, seed)) for seed in range(5) for step in range(5)]
    assert len(set(orders)) == 25 and tuple(range(20)) not in orders


# ---- What is trained on ----


def test_what_is_held_out_is_not_trained_on(tmp_path):
    """Of a file of demonstrations, only the records of the training split; of pairs, only those that differ."""
    records = [{"prompt": f"Say {i}.", "response": "x", "chosen": "a", "rejected": "ab"[i % 3 > 0]} for i in range(60)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    demonstrations = training_records(str(tmp_path / "records.jsonl"), None)
    assert [r["prompt"] for r in demonstrations] == [r["prompt"] for r in records if not is_heldout(r["prompt"])]
    assert 40 < len(demonstrations) < 60

    training, heldout, identical = split_pairs(read_pairs(path := str(tmp_path / "records.jsonl")), path)
    different = [i for i, r in enumerate(records) if r["chosen"] != r["rejected"]]
    assert sorted(training + heldout) == different and identical == 20
    assert all(is_heldout(records[i]["prompt"]) == (i in heldout) for i in different)
