"""docs/peers.md says what the checks find in TRL's losses; with TRL installed, that they still find it."""

import re
import runpy

import pytest
from world import ROOT

from experiments.peers import DPO, GRPO, MATTERS, accumulation, dpo_report, grpo_report

PAGE = (ROOT / "docs/peers.md").read_text(encoding="utf-8")


def table(heading):
    """The cells of the rows of the first table after a heading."""
    lines = PAGE.split(f"## {heading}\n")[1].split("\n\n## ")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| ")][1:]


def test_everything_that_is_broken_is_explained_and_nothing_else():
    """Also which losses there are: all of GRPOTrainer and of DPOTrainer."""
    explained = {(cells[0], cells[1]) for cells in table("What is broken, and when it matters")}
    found = {("entropy_coef" if "entropy_coef" in cells[0] else cells[0], what)
             for cells in (*table("GRPO"), *table("DPO")) for what in cells[-1].split(", ") if what}
    assert explained == found == MATTERS.keys()
    assert [cells[0] for cells in table("DPO")] == [*DPO] and len(table("GRPO")) == len(GRPO)


@pytest.mark.parametrize("script", ["trl_grpo_alone.py", "trl_dpo_alone.py"])
def test_what_breaks_is_derived_again_in_thirty_lines_without_nanorl(script, capsys):
    text = (ROOT / "experiments" / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30 and "import nanorl" not in text and "from nanorl" not in text
    pytest.importorskip("trl")
    runpy.run_path(str(ROOT / "experiments" / script))
    printed = [re.findall(r"-?\d+\.\d+(?:e-\d+)?", line) for line in capsys.readouterr().out.splitlines()]
    if "grpo" in script:
        assert len({*printed[0]}) == 1 and printed[1] != printed[2]
    else:
        assert float(printed[0][2]) > 0 and float(printed[1][2]) > 0 and printed[2] != printed[3]


@pytest.mark.parametrize("loss, options, found", [("cispo", {}, {"weighted_score"}), ("cispo", {"epsilon_high": 5.0}, set()),
                                                  ("bnpo", {}, {"accumulation"}), ("vespo", {}, set())])
def test_a_loss_of_grpo_is_what_the_page_says(loss, options, found):
    pytest.importorskip("trl")
    assert grpo_report(loss, "token", options, examples=4).broken.keys() == found
    assert (accumulation(loss, **options) is None) == ("accumulation" not in found)


@pytest.mark.parametrize("loss", ["sigmoid", "discopop", "nca_pair", "sft"])
def test_a_loss_of_dpo_is_what_the_page_says(loss):
    pytest.importorskip("trl")
    assert dpo_report(loss, examples=12).broken.keys() == {what for name, what in MATTERS if name == loss}
