"""What a user's files say: text, JSON, and records in the shapes that people have.

Bad files raise UserError with one sentence that names the file, the line and what was expected.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from nanorl.errors import UserError, refuse


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file."""
    try:
        if not Path(path).is_file():
            raise UserError(f"{path}: {'not a' if Path(path).exists() else 'no such'} file; expected a UTF-8 text file")
        with open(path, "rb") as f:
            content = f.read(1 << 20)
            if b"\0" not in content:    # else a binary file, or a hole of a gigabyte: no need to read it all
                content += f.read()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if b"\0" in content:
        raise UserError(f"{path}: not text (byte {content.index(0)} is 0x00); expected a UTF-8 text file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start} is 0x{e.object[e.start]:02x})") from None
    if not text.strip():
        raise UserError(f"{path}: empty; expected text")
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise UserError("the same key twice in one object")
    return record


def _read_json(text: str | bytes) -> Any:
    """The value, or the exception that says why there is none."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as e:
        return e


def parse_object(text: str | bytes, where: str, expected: str) -> dict[str, Any]:
    """The JSON object in `text`, in which no key stands twice. UserError names `where` the text is and what was `expected`."""
    record = _read_json(text)
    if fault := fault_of(record):
        raise UserError(f"{where}: {fault}; expected {expected}")
    return record


def _rows(text: str) -> list[tuple[str, Any]]:
    """The places and values of a JSON array, or else of each line that is not blank."""
    whole = _read_json(text) if text.lstrip().startswith("[") else None
    if isinstance(whole, list):
        return [(f"record {number}", row) for number, row in enumerate(whole, start=1)]
    if whole is not None and getattr(whole, "msg", "") != "Extra data":        # else it is lines of lists
        return [(f"line {getattr(whole, 'lineno', 1)}", whole)]
    return [(f"line {number}", _read_json(line)) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Records: the shapes that people have, and the one that nanorl reads them as
#
#     problems         {"prompt", "answer"}               an answer may be a number
#     programs         {"prompt", "answer"}               the answer is tests: `assert f(3) == 4`, one a line, or a list of them
#     demonstrations   {"prompt", "response"}
#     pairs            {"prompt", "chosen", "rejected"}
#
# For each of these columns a file has one key: that of KEYS which most of its records have. `instruction` has its `input` added
# after a blank line. A prompt is a text, or messages {"role", "content"} of which the user's is the last; whatever
# else is said may be a text, or one message of the assistant's.
#
#     {"messages": [...]}         demonstrations, one for each message of the assistant's, whose prompt is all that came before
#                                 it; or a problem, whose answer is the assistant's last message, or the record's own
#     {"chosen": [...], ...}      whole conversations, which differ in their last message only
# ---------------------------------------------------------------------------------------------------------------------

Message = dict[str, str]            # {"role": "system", "user" or "assistant", "content": text}
Prompt = str | list[Message]
Kind = Literal["problems", "programs", "demonstrations", "pairs"]

PROMPTS = ("prompt", "question", "problem", "instruction")
KEYS = {"problems": {"prompt": PROMPTS, "answer": ("answer", "solution", "response", "completion", "output")},
        "programs": {"prompt": (*PROMPTS, "text"), "answer": ("tests", "test_list", "answer")},
        "demonstrations": {"prompt": PROMPTS, "response": ("response", "completion", "output", "answer", "solution")},
        "pairs": {"prompt": PROMPTS, "chosen": ("chosen",), "rejected": ("rejected",)}}


class Record(dict):
    """A record in nanorl's shape."""

    place = ""                      # in the file: "line 7", or "record 7" of an array
    source: dict[str, Any]          # the object that stood there


class Fault(Exception):
    """What is wrong with a record."""


def fault_of(record: Any) -> str:
    """Why this is no JSON object, or ""."""
    if isinstance(record, Exception):
        return f"not readable as JSON ({str(record).replace('line 1 column', 'column'):.100})"
    return "" if isinstance(record, dict) else type(record).__name__


def value_of(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise Fault(f"no {key!r}" + (f", but {', '.join(map(repr, record)):.60}" if record else ""))
    return record[key]


def as_text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Fault(f"{key!r} is {json.dumps(value, ensure_ascii=False):.40} ({type(value).__name__})")
    if re.search("[\ud800-\udfff]", value):
        raise Fault(f"{key!r} holds half of a surrogate pair")
    return value


def are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def as_messages(key: str, value: Any) -> list[Message]:
    """A conversation: perhaps a system message, then user and assistant by turns."""
    if not are_messages(value):
        raise Fault(f"{key!r} is {json.dumps(value, ensure_ascii=False):.40} ({type(value).__name__}), expected messages")
    messages = []
    for i, message in enumerate(value, start=1):
        if not {"role", "content"} <= message.keys():
            raise Fault(f"{key!r}, message {i}: {json.dumps(message, ensure_ascii=False):.40}; expected a role and a content")
        role, before = message["role"], messages[-1]["role"] if messages else ""
        if role not in {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]:
            raise Fault(f"{key!r}, message {i}: its role is {json.dumps(role):.40} after {before or 'nothing'}; expected user "
                        "and assistant by turns, perhaps after one system message")
        messages.append({"role": role, "content": as_text(f"{key}, message {i}", message["content"])})
    return messages


def as_prompt(key: str, value: Any) -> Prompt:
    if not are_messages(value):
        return as_text(key, value)
    messages = as_messages(key, value)
    if messages[-1]["role"] != "user":
        raise Fault(f"{key!r} is {len(messages)} messages; expected the last one to be the user's")
    return messages[0]["content"] if len(messages) == 1 else messages


def as_said(key: str, value: Any) -> str:
    """What the assistant says: a text, or one message."""
    if are_messages(value) and len(value) == 1 and value[0].get("role") == "assistant":
        value = value[0].get("content")
    return as_text(key, value)


def as_answer(key: str, value: Any) -> str:
    """A gold answer: also a number, or a list of tests."""
    if type(value) in (int, float):
        return str(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = "\n".join(value)
    return as_said(key, value)


def first_question(prompt: Prompt) -> str:
    """The user's first message: what decides on which side of the split a conversation is, all of it."""
    return prompt if isinstance(prompt, str) else next(m["content"] for m in prompt if m["role"] == "user")


def from_messages(record: dict[str, Any], kind: Kind, answer: str) -> list[dict[str, Any]]:
    messages = as_messages("messages", value_of(record, "messages"))
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if kind == "demonstrations":
        if not spoken:
            raise Fault("'messages' has none of the assistant's")
        return [{"prompt": as_prompt("messages", messages[:i]), "response": messages[i]["content"]} for i in spoken]
    end = len(messages) - (messages[-1]["role"] == "assistant")
    if not answer and end == len(messages):
        raise Fault("'messages' do not end with the assistant's answer, and there is no 'answer'")
    return [{"prompt": as_prompt("messages", messages[:end]),
             "answer": as_answer(answer, value_of(record, answer)) if answer else messages[-1]["content"]}]


def from_pair(record: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A pair of texts, of single messages, or of whole conversations."""
    found = {"prompt": as_prompt(prompt, record[prompt])} if prompt in record else {}
    before = []
    for key in ("chosen", "rejected"):
        value = value_of(record, key)
        if are_messages(value) and (len(value) > 1 or "prompt" not in found):
            messages = as_messages(key, value)
            if messages[-1]["role"] != "assistant":
                raise Fault(f"{key!r} is {len(messages)} messages; expected the last one to be the assistant's")
            before.append(as_prompt(key, messages[:-1]))
            value = messages[-1]["content"]
        found[key] = as_said(key, value)
    if before and (len(before) == 1 or before[0] != before[1]):
        raise Fault("'chosen' and 'rejected' differ before their last messages")
    if before and isinstance(found.setdefault("prompt", before[0]), str) and isinstance(before[0], list):
        found["prompt"] = before[0]         # a prompt beside whole conversations repeats their last question
    if "prompt" not in found:
        raise Fault("no 'prompt'" + f", but {', '.join(map(repr, record)):.60}")
    return found


def recognise(rows: list[tuple[str, Any]], kind: Kind, source: str, optional: tuple[str, ...] = ()) -> tuple[list[Record], str]:
    """The records of a file, and a sentence that says what was read as what where the keys are not those of the shape itself.
    UserError names the first records that cannot be read.

    rows: places and JSON values; `optional` columns may be missing and are then "".
    """
    times = Counter(key for _, row in rows if isinstance(row, dict) for key in row)
    keys = {column: max(names, key=times.__getitem__) for column, names in KEYS[kind].items()}      # the first, where they tie
    missing = {column for column, key in keys.items() if not times[key]}
    talks = times["messages"] and missing and kind in ("problems", "demonstrations")
    if kind == "pairs" and any(are_messages(row["chosen"]) for _, row in rows if isinstance(row, dict) and "chosen" in row):
        optional = (*optional, "prompt")        # whole conversations hold it
    said = [*KEYS[kind]][1]
    read = as_said if kind == "demonstrations" else as_answer
    records, faults = [], []
    for place, row in rows:
        try:
            if fault := fault_of(row):
                raise Fault(fault)
            if talks:
                found = from_messages(row, kind, "" if "answer" in missing else keys.get("answer", ""))
            elif kind == "pairs":
                found = [from_pair(row, keys["prompt"])]
            else:
                prompt = as_prompt(keys["prompt"], value_of(row, keys["prompt"]))
                if keys["prompt"] == "instruction" and isinstance(prompt, str) and row.get("input"):
                    prompt += "\n\n" + as_text("input", row["input"])
                unsaid = said in missing and said in optional
                found = [{"prompt": prompt, said: "" if unsaid else read(keys[said], value_of(row, keys[said]))}]
        except Fault as fault:
            faults.append(f"{place}: {fault}")
            continue
        for each in found:
            records.append(Record(each))
            records[-1].place, records[-1].source = place, row
    if faults:
        columns = ", ".join(column for column in KEYS[kind] if column not in optional)
        refuse(source, faults, f"an object with {columns}: non-empty texts; docs/your-data.md has more")
    if not talks and all(key == column or column in missing for column, key in keys.items()):
        return records, ""
    shown = "messages" if talks else ", ".join(f"{column} is {key!r}" for column, key in keys.items() if column not in missing)
    return records, f"{source}: {len(records):,} {kind}; {shown}."


def read_records(path: str | Path, kind: Kind, optional: tuple[str, ...] = ()) -> list[Record]:
    """The records of a file in the shape of this kind (above, with the names that are recognised; a line on the
    screen says which were): JSON objects, one a line or all in one array. No key may stand twice. Blank lines are skipped.

    Lines end at "\\n" only: a string may well contain other separators, such as U+2028.
    """
    records, recognised = recognise(_rows(read_text(path)), kind, str(path), optional)
    if recognised:
        print(recognised)
    return records
