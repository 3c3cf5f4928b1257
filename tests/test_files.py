"""The shapes that records come in, and what they are read as."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl.errors import UserError
from nanorl.files import KEYS, read_records

quick = settings(max_examples=50, deadline=None)

USER, SAID = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
MORE, THEN = {"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6"}

# kind, a record as people have it, what it is read as
SHAPES = [
    ("demonstrations", {"prompt": "p", "response": "r"}, [{"prompt": "p", "response": "r"}]),
    ("demonstrations", {"prompt": "p", "completion": "r"}, [{"prompt": "p", "response": "r"}]),
    ("demonstrations", {"question": "p", "answer": "r"}, [{"prompt": "p", "response": "r"}]),
    ("demonstrations", {"problem": "p", "solution": "r", "level": 3}, [{"prompt": "p", "response": "r"}]),
    ("demonstrations", {"instruction": "p", "input": "i", "output": "r"}, [{"prompt": "p\n\ni", "response": "r"}]),
    ("demonstrations", {"instruction": "p", "input": "", "output": "r"}, [{"prompt": "p", "response": "r"}]),
    ("demonstrations", {"instruction": "p", "output": "r"}, [{"prompt": "p", "response": "r"}]),
    ("demonstrations", {"prompt": [USER], "completion": [SAID]}, [{"prompt": USER["content"], "response": "4"}]),
    ("demonstrations", {"prompt": [SYSTEM, USER], "completion": [SAID]}, [{"prompt": [SYSTEM, USER], "response": "4"}]),
    ("demonstrations", {"messages": [USER, SAID]}, [{"prompt": USER["content"], "response": "4"}]),
    ("demonstrations", {"prompt": "an id", "messages": [USER, SAID]}, [{"prompt": USER["content"], "response": "4"}]),
    ("demonstrations", {"messages": [SYSTEM, USER, SAID, MORE, THEN]},
     [{"prompt": [SYSTEM, USER], "response": "4"}, {"prompt": [SYSTEM, USER, SAID, MORE], "response": "6"}]),
    ("demonstrations", {"messages": [USER, SAID, MORE]}, [{"prompt": USER["content"], "response": "4"}]),
    ("problems", {"prompt": "p", "answer": "r"}, [{"prompt": "p", "answer": "r"}]),
    ("problems", {"prompt": "p", "answer": 18}, [{"prompt": "p", "answer": "18"}]),
    ("problems", {"prompt": "p", "answer": 2.5}, [{"prompt": "p", "answer": "2.5"}]),
    ("problems", {"question": "p", "answer": "2+2=4\n#### 4"}, [{"prompt": "p", "answer": "2+2=4\n#### 4"}]),
    ("problems", {"problem": "p", "solution": r"\boxed{4}", "answer": "4"}, [{"prompt": "p", "answer": "4"}]),
    ("problems", {"instruction": "p", "output": "4"}, [{"prompt": "p", "answer": "4"}]),
    ("problems", {"prompt": [SYSTEM, USER], "answer": "4"}, [{"prompt": [SYSTEM, USER], "answer": "4"}]),
    ("problems", {"messages": [USER, SAID]}, [{"prompt": USER["content"], "answer": "4"}]),
    ("problems", {"messages": [USER, SAID, MORE], "answer": 6}, [{"prompt": [USER, SAID, MORE], "answer": "6"}]),
    ("programs", {"prompt": "p", "tests": "assert f(1) == 2"}, [{"prompt": "p", "answer": "assert f(1) == 2"}]),
    ("programs", {"text": "p", "code": "c", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]},
     [{"prompt": "p", "answer": "assert f(1) == 2\nassert f(2) == 3"}]),
    ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b"}, [{"prompt": "p", "chosen": "a", "rejected": "b"}]),
    ("pairs", {"question": "p", "chosen": "a", "rejected": "b"}, [{"prompt": "p", "chosen": "a", "rejected": "b"}]),
    ("pairs", {"prompt": [SYSTEM, USER], "chosen": [SAID], "rejected": [THEN]},
     [{"prompt": [SYSTEM, USER], "chosen": "4", "rejected": "6"}]),
    ("pairs", {"prompt": USER["content"], "chosen": [USER, SAID], "rejected": [USER, THEN]},
     [{"prompt": USER["content"], "chosen": "4", "rejected": "6"}]),
    ("pairs", {"chosen": [USER, SAID, MORE, THEN], "rejected": [USER, SAID, MORE, SAID]},
     [{"prompt": [USER, SAID, MORE], "chosen": "6", "rejected": "4"}]),
]


@pytest.mark.parametrize("layout", ["lines", "array", "pretty array"])
@pytest.mark.parametrize("kind, record, expected", SHAPES, ids=[f"{kind} {'+'.join(record)}" for kind, record, _ in SHAPES])
def test_a_record_is_read_in_the_shape_that_people_have(kind, record, expected, layout, tmp_path, capsys):
    """Twice the same record, in each layout of a file; what is read under another name is said in one line."""
    path = tmp_path / "mine.json"
    path.write_text("\n".join(map(json.dumps, [record, record])) if layout == "lines"
                    else json.dumps([record, record], indent=2 if layout == "pretty array" else None))
    found = read_records(path, kind)
    assert found == expected * 2 and [each.source for each in found] == [record] * len(found)
    said = capsys.readouterr().out
    own_names = set(expected[0]) <= set(record) or record.keys() == {"chosen", "rejected"}
    assert (said == "") == own_names and said.count("\n") == bool(said)
    assert not said or said.startswith(f"{path}: {len(found)} {kind}; ")


def test_a_file_has_the_keys_that_most_records_have(tmp_path):
    """One record without them is the fault that is named, not all the others."""
    path = tmp_path / "mine.jsonl"
    others = [{"question": "b", "answer": "c"}, {"question": "d", "answer": "e"}]
    path.write_text("\n".join(map(json.dumps, [{"prompt": "a"}, *others])))
    with pytest.raises(UserError, match=r"mine\.jsonl, line 1: no 'question', but 'prompt'; expected"):
        read_records(path, "problems")


REFUSED = [
    ("demonstrations", {"messages": []}, "'messages' is \\[\\] \\(list\\), expected messages"),
    ("demonstrations", {"messages": "hi"}, "'messages' is \"hi\" \\(str\\)"),
    ("demonstrations", {"messages": [USER]}, "none of the assistant's"),
    ("demonstrations", {"messages": [SAID]}, "its role is \"assistant\" after nothing"),
    ("demonstrations", {"messages": [USER, USER, SAID]}, "message 2: its role is \"user\" after user"),
    ("demonstrations", {"messages": [USER, {"role": "tool", "content": "x"}]}, "its role is \"tool\" after user"),
    ("demonstrations", {"messages": [USER, {"role": "assistant", "content": None}]}, "'messages, message 2' is null"),
    ("demonstrations", {"messages": [USER, {"role": "assistant"}]}, "expected a role and a content"),
    ("demonstrations", {"messages": [{"role": ["user"], "content": "x"}]}, "its role is "),
    ("demonstrations", {"prompt": [USER, SAID], "response": "x"}, "is 2 messages; expected the last one to be the user"),
    ("problems", {"messages": [USER]}, "do not end with the assistant's answer, and there is no 'answer'"),
    ("problems", {"prompt": "p", "answer": True}, "'answer' is true \\(bool\\)"),
    ("problems", {"prompt": "p", "answer": ["4", 4]}, "'answer' is \\[\"4\", 4\\] \\(list\\)"),
    ("pairs", {"chosen": "a", "rejected": "b"}, "no 'prompt'"),
    ("pairs", {"chosen": [USER, SAID], "rejected": [MORE, THEN]}, "differ before their last messages"),
    ("pairs", {"chosen": [USER, SAID], "rejected": "b"}, "differ before their last messages"),
    ("pairs", {"chosen": [USER], "rejected": [USER]}, "expected the last one to be the assistant's"),
    ("pairs", {"prompt": "p", "chosen": "a"}, "no 'rejected', but 'prompt', 'chosen'"),
]


@pytest.mark.parametrize("kind, record, says", REFUSED)
def test_what_is_no_such_shape_is_refused_with_its_line(kind, record, says, tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"mine.jsonl, line 1: .*{says}") as error:
        read_records(tmp_path / "mine.jsonl", kind)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["user", "assistant"]),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.sampled_from(["role", "content", "messages"]), inner, max_size=3), max_leaves=8)


@quick
@given(st.sampled_from([*KEYS]), st.lists(st.dictionaries(st.sampled_from(
    ["prompt", "question", "messages", "answer", "response", "chosen", "rejected", "input", "instruction"]), values),
    max_size=3))
def test_any_json_is_read_or_refused_in_one_sentence(tmp_path_factory, kind, records):
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n \n")
    try:
        for record in read_records(path, kind):
            assert all(isinstance(value, str) and value for key, value in record.items() if key != "prompt")
    except UserError as e:
        assert "\n" not in str(e)
