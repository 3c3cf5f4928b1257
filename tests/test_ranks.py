"""On two processes, a run is what it is on one: the same answers, and the same gradients, up to rounding."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from world import ONE_OF_EACH, ROOT, SCRIPTS, files_of, metrics, rollouts, start

from nanorl import run
from nanorl.run import optimizer, ranks
from nanorl.decode import uniforms

pytestmark = pytest.mark.usefixtures("inside")
ALL = [*ONE_OF_EACH, "online", "grpo-full", "taught", "lora"]

DRIVER = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from test_ranks import keep_gradients
from world import SCRIPTS, start
from nanorl.run import Run

real = Run.save

def main(name, flags, out, last):
    def save(self):
        real(self)
        if self.step == last:
            raise SystemExit(0)         # on every process, as after a signal

    Run.save = save
    keep_gradients(out)
    try:
        start(SCRIPTS[name][0], flags, out)
    except SystemExit as e:
        assert e.code == 0, e.code

for job in {jobs!r}:
    main(*job)
"""


def keep_gradients(out, patch=setattr):
    """The gradients of a run's first optimizer step, summed over the processes, go to the file OUT.pt."""
    real = getattr(optimizer._sum_gradients, "real", optimizer._sum_gradients)

    def keep(parameters):
        real(parameters)
        if ranks.rank() == 0 and not Path(f"{out}.pt").exists():
            torch.save([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters], f"{out}.pt")

    keep.real = real
    patch(optimizer, "_sum_gradients", keep)


def on_two_processes(tmp_path, jobs, agents=(["--standalone", "--nproc-per-node", "2"],)):
    """Jobs are (name of a script's run, flags, out, the step after which it is stopped); an agent is what torchrun is told."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), jobs=[(name, flags, str(out), last) for name, flags, out, last in jobs]))
    started = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *flags, str(driver)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for flags in agents]
    for agent in started:
        errors = agent.communicate(timeout=600)[1]
        assert agent.returncode == 0, errors[-3000:]


def assert_same_run(out, name):
    """Metrics and parameters of a run on one process, to what rounding, and Muon's bfloat16, leave of them after its steps.

    Of a gradient that is 0 but for rounding, AdamW makes a step of full size: one weight in a thousand may be further off.
    """
    found, expected = metrics(out), metrics(name)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for a, b in zip(found, expected, strict=True):
        for key in a:
            tied = a["step"] == 0 and key == "eval/pair_accuracy"       # of margins that are 0 but for rounding
            assert tied or a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), (name, a["step"], key)
    a, b = (run.load_checkpoint(folder)["model"] for folder in (out, name))
    for key in a:
        assert a[key].isfinite().all() and ((a[key] - b[key]).abs() > 3e-3).float().mean() <= 1e-3, key


def assert_same_groups(out, name):
    """The groups that were kept of the first step, to rounding, with all passes in order, whichever process had them."""
    found, expected = ([json.loads(line) for line in rollouts(folder).splitlines() if b'"step": 0,' in line]
                       for folder in (out, name))
    assert [group["group"] for group in found] == [group["group"] for group in expected]
    for a, b in zip((answer for group in found for answer in group["answers"]),
                    (answer for group in expected for answer in group["answers"]), strict=True):
        assert a["ids"] == b["ids"] and len(a["passes"]) == len(b["passes"])
        for one, other in zip(a["passes"], b["passes"], strict=True):
            assert one["update"] == other["update"] and one.keys() == other.keys()
            assert one["logp"] == pytest.approx(other["logp"], abs=0.05) and one["mask"] == other["mask"]
            assert one["update"] or one["gradient"] == pytest.approx(other["gradient"], rel=1e-2, abs=1e-6)
    for group, other in zip(found, expected, strict=True):
        assert group["metrics"] == pytest.approx(other["metrics"], abs=1e-3)


@pytest.mark.slow      # two minutes
def test_every_script_does_on_two_processes_what_it_does_on_one(tmp_path):
    """From its first step to its last: the same prompts, answers and rewards, one set of files; and the gradient of the first
    step is that of one process, to rounding."""
    on_two_processes(tmp_path, [(name, SCRIPTS[name][1], tmp_path / name, None) for name in ALL])
    for name in ALL:
        assert_same_run(tmp_path / name, name)
        assert_same_groups(tmp_path / name, name)
        with pytest.MonkeyPatch.context() as patch:
            keep_gradients(tmp_path / f"{name}-alone", patch.setattr)
            script, flags = SCRIPTS[name]
            start(script, flags + " --steps 1" * ("--stale" not in flags), tmp_path / f"{name}-alone")
        together, alone = (torch.load(tmp_path / f"{name}{how}.pt") for how in ("", "-alone"))
        largest = max(float(g.abs().max()) for g in alone)
        assert largest > 0
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest)
        assert {p.name for p in (tmp_path / name).iterdir()} == files_of(name)


@pytest.mark.slow
def test_two_machines_are_two_processes(tmp_path):
    """Two agents of torchrun that meet at an address, as on two machines, with one process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"localhost:{free.getsockname()[1]}"
    agents = [["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run",
               "--rdzv-endpoint", meet] for rank in range(2)]
    on_two_processes(tmp_path, [("grpo-full", SCRIPTS["grpo-full"][1], tmp_path / "grpo-full", None)], agents)
    assert_same_run(tmp_path / "grpo-full", "grpo-full")
    assert {p.name for p in (tmp_path / "grpo-full").iterdir()} == files_of("grpo-full")


@pytest.mark.slow
def test_a_run_goes_from_two_processes_to_one_and_back(tmp_path):
    """Stopped on two and resumed on one, and the other way round: either way it is the run that was never stopped."""
    script, flags = SCRIPTS["grpo-full"]
    with pytest.MonkeyPatch.context() as patch:
        save = run.Run.save

        def save_and_stop(self):
            save(self)
            if self.step == 2:
                raise SystemExit(0)

        patch.setattr(run.Run, "save", save_and_stop)
        with pytest.raises(SystemExit):
            start(script, flags, tmp_path / "one-two")
    on_two_processes(tmp_path, [("grpo-full", flags, tmp_path / "two-one", 1),
                                ("grpo-full", "--resume --quiet", tmp_path / "one-two", None)])
    shutil.copytree(tmp_path / "two-one", tmp_path / "again")
    for out in ("two-one", "again"):
        start(script, "--resume --quiet", tmp_path / out)
    assert metrics(tmp_path / "two-one") == metrics(tmp_path / "again")
    for out in ("two-one", "one-two"):
        assert_same_run(tmp_path / out, "grpo-full")


def test_one_process_is_alone():
    x = torch.arange(5)
    assert (ranks.rank(), ranks.count()) == (0, 1) and ranks.gathered(3) == [3]
    assert ranks.summed(x) is x and torch.equal(ranks.share(x), x)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_shares_are_a_partition_and_uniforms_know_their_row(n, monkeypatch):
    """Each row belongs to one process, whose uniforms for it are those of one process alone."""
    monkeypatch.setattr(ranks, "count", lambda: n)
    parts, numbers = [], []
    for r in range(n):
        monkeypatch.setattr(ranks, "rank", lambda r=r: r)
        parts += ranks.share(list(range(10)))
        assert [x for part in ranks.parts(torch.arange(10), 2) for x in part.tolist()] == ranks.share(list(range(10)))
        assert ranks.parts(torch.arange(r), 2) == []           # fewer rows than processes: the last have none
        mine = torch.arange(10).tensor_split(n)[r]
        numbers.append(uniforms(7, len(mine), 4, first=int(mine[0])))
    assert sorted(parts) == list(range(10)) and torch.equal(torch.cat(numbers), uniforms(7, 10, 4))
