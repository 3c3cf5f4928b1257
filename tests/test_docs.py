"""What the pages say exists, exists; and their code runs."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS

from nanorl.ops import log_softmax

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "experiments/README.md", *sorted((ROOT / "docs").glob("*.md"))]
WALK = (ROOT / "docs/walk.md").read_text()


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.M):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            to = (page.parent / file).resolve() if file else page
            assert to.exists(), target
            assert not anchor or anchor in anchors(to), target


def test_every_fault_can_be_put_in():
    """What a mutant changes stands in its file exactly once; the table and the README know how many there are."""
    assert [m.fault for m in MUTANTS if (ROOT / m.file).read_text().count(m.old) != 1] == []
    table = re.findall(r"^\| (.*?) \| \S+:\d+ \|", (ROOT / "docs/mutants.md").read_text(), re.M)
    assert sorted(table) == sorted(m.fault for m in MUTANTS) and f"{len(MUTANTS)} faults" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_smoke_of_the_mutation_run():
    command = [sys.executable, "-m", "tests.mutants", "--only", "GRPO's loss is maximised"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "1 of 1 killed" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\[`([\w.]+)`\]\(\.\./", WALK))))
def test_every_function_that_the_walk_links_to_is_in_that_file(name):
    file = re.search(rf"\[`{re.escape(name)}`\]\(\.\./([\w/]+)\.py\)", WALK)[1]
    module, *rest = name.split(".")
    assert file.split("/")[-1] == module
    found = importlib.import_module(file.replace("/", "."))
    for part in rest:
        found = getattr(found, part)


def test_the_table_of_log_probs_is_what_the_functions_give():
    rows = re.findall(r"^\| \w+ \| ([-\d.]+) \| ([-\d.]+) \| ([-\d.]+) \|$", WALK, re.M)
    z, p, logp = torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64).T
    assert len(z) == 4
    torch.testing.assert_close(log_softmax(z), logp, rtol=0, atol=5e-5)
    torch.testing.assert_close(log_softmax(z).exp(), p, rtol=0, atol=5e-5)


@pytest.mark.parametrize("number", range(1, 22))
def test_the_code_of_each_step_runs(number):
    section = re.search(rf"^## {number}\. .*?(?=^## |\Z)", WALK, re.M | re.S)[0]
    for block in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(compile(block, f"docs/walk.md, step {number}", "exec"), {})
