"""How hard hypothesis tries, `ci` (the same examples every time) or HYPOTHESIS_PROFILE=deep, and the world of the scripts."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))       # train_*.py are importable, however pytest is started
os.environ.setdefault("OMP_NUM_THREADS", "1")               # each core has a worker; read when torch is imported

settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def forgotten(tmp_path_factory):
    """What a test imported from a folder of its own is forgotten afterwards: another's may have the same name."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path_factory.getbasetemp()) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory, worker_id):
    """A directory with one finished run of every script: made by the first worker that needs it, and copied by each."""
    from world import make_world
    base = tmp_path_factory.getbasetemp()
    made = (base if worker_id == "master" else base.parent) / "world"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            make_world(folder := tmp_path_factory.mktemp("unfinished"))
            folder.rename(made)
    return shutil.copytree(made, base / "copy")


@pytest.fixture
def inside(world, monkeypatch):
    """In that directory."""
    monkeypatch.chdir(world)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from browser import CHROMIUM, Browser
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
