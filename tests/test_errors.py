"""What is printed survives any console, and is printed after it was written."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from world import GRPO, PRETRAIN, SFT, start, write_records

import train_grpo
import train_pretrain
import train_sft
from nanorl import chat, checks, evaluate, plot, run
from nanorl.checks.__main__ import main as check
from nanorl.errors import UserError, refuse

pytestmark = pytest.mark.usefixtures("inside")
CONSOLES = [("cp1252", "Ж漢字"), *([("utf-8", "\udcff")] if os.name == "posix" else [])]     # a byte, no UTF-8
EVALUATE = "--problems 5 --method greedy --max-new-tokens 16 --device cpu"


ENCODINGS = pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])


@pytest.fixture
def console(monkeypatch):
    """A function that opens a console of an encoding, strict as Python makes it; returns what it gets."""
    def opened(encoding):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace"))
        return out
    return opened


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(("encoding", "name"), CONSOLES)
def test_every_command_prints_what_the_user_named(name, encoding, console, tmp_path, monkeypatch):
    """Texts, data, runs, files of results, pictures: in their names is what the console lacks."""
    out = console(encoding)
    for file in ("text.txt", "letters.jsonl", "wanted.jsonl"):
        shutil.copy(file, tmp_path / (name + file))
    monkeypatch.chdir(tmp_path)
    start(train_pretrain, PRETRAIN.replace("text.txt", f"{name}text.txt"), f"{name}p", "--no-quiet")
    start(train_sft, SFT.replace("letters", f"{name}letters") + f" --init {name}p", f"{name}s", "--no-quiet")
    start(train_grpo, GRPO.replace("wanted", f"{name}wanted") + f" --steps 1 --init {name}s", f"{name}g", "--no-quiet")
    evaluate.main(run.parse(evaluate.Config, [f"{name}s", "--data", f"{name}wanted.jsonl", "--out", f"{name}.json",
                                              *EVALUATE.split()]))
    assert json.loads(Path(f"{name}.json").read_text())["settings"]["data"] == f"{name}wanted.jsonl"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 1.\nЖ\n"))
    chat.main(run.parse(chat.Config, [f"{name}g", "--device", "cpu", "--max-new-tokens", "3"]))
    pytest.importorskip("matplotlib")
    plot.main([f"{name}g", f"{name}s", "--out", f"{name}.png"])
    assert b"\x89PNG" in Path(f"{name}.png").read_bytes()
    assert f"{name}text.txt".encode(encoding, "backslashreplace") in out.getvalue()


@ENCODINGS
def test_help_and_errors_of_a_script_of_ones_own(encoding, console, tmp_path, monkeypatch):
    """Its docstring, its flags' comments and what was typed hold anything."""
    source = Path(train_sft.__file__).read_text(encoding="utf-8").replace('"""Supervised', '"""Ж 漢 Supervised', 1)
    (tmp_path / "mine.py").write_text(source.replace("# records per step", "# ≤ 64 Ж"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import mine
    out = console(encoding)
    for argv in (["--help"], ["--Ж"], ["--data", "Ж.jsonl"], ["--init", "Ж"], ["--task", "\udcff"]):
        with pytest.raises(SystemExit) as exit:
            mine.main(run.parse(mine.Config, argv))
        assert exit.value.code == (0 if argv == ["--help"] else 2)
    assert "Ж 漢 Supervised".encode(encoding, "backslashreplace") in out.getvalue()


@ENCODINGS
def test_a_report_of_checks_names_anything(encoding, console, tmp_path):
    (tmp_path / "Ж漢.py").write_text("def objective(*args, ref_logp=None, entropy=None):\n    raise ValueError('Ж \\udcff')\n",
                                    encoding="utf-8")
    console(encoding)
    with pytest.raises((SystemExit, ValueError)) as error:
        check([f"{tmp_path / 'Ж漢.py'}:objective", "--examples", "1"])
    assert not isinstance(error.value, UnicodeError) and checks


@pytest.mark.parametrize("name", ["$x$", r"$\foo$", "a$", "_mine", "\udcff", "a\x1b[2J"])
def test_a_run_of_any_name_is_in_the_legend_as_it_is_called(name, tmp_path, monkeypatch):
    """No formula is made of it, and matplotlib hides no label that begins with "_"."""
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt
    if name == "\udcff" and os.name != "posix":
        pytest.skip("no such names here")
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    for folder in (name, "other"):
        Path(folder).mkdir()
        write_records(Path(folder, "metrics.jsonl"), [{"step": step, "train/entropy": 1.0} for step in range(3)])
    plot.main([name, "other", "--out", "curves.png"])
    shown = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert len(shown) == 2 and shown[1].startswith("other: ")
    expected = {"\udcff": r"\udcff", "a\x1b[2J": "a\ufffd[2J"}.get(name, name)
    assert shown[0].replace(r"\$", "$").strip().startswith(expected + ": ")


def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch):
    """A console that is gone costs the table, not the file."""
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("gone")

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(SystemExit):
        evaluate.main(run.parse(evaluate.Config, ["sft", "--data", "wanted.jsonl", "--out", str(tmp_path / "r.json"),
                                                  *EVALUATE.split()]))
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["method"] == "greedy"


def test_what_was_measured_is_shown_even_if_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_atomically", full)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(run.parse(evaluate.Config, ["sft", "--data", "wanted.jsonl", "--out", str(tmp_path / "r.json"),
                                                  *EVALUATE.split()]))
    out, error = capsys.readouterr()
    assert exit.value.code == 2 and "No space left" in error and "| greedy" in out


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, "; and 1 more"), (5000, "; and 4,997 more")])
def test_three_faults_are_named_and_the_others_counted(count, more):
    with pytest.raises(UserError) as error:
        refuse("a.jsonl", [f"line {i}: bad" for i in range(1, count + 1)], "good ones")
    named = "; ".join(f"line {i}: bad" for i in range(1, min(count, 3) + 1))
    assert str(error.value) == f"a.jsonl, {named}{more}; expected good ones"
