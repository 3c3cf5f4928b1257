"""How hard hypothesis tries, `ci` (the same examples every time) or HYPOTHESIS_PROFILE=deep, and the world of the scripts."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))       # train_*.py are importable, however pytest is started

settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A directory with one finished run of every script."""
    from world import make_world
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def inside(world, monkeypatch):
    """In that directory."""
    monkeypatch.chdir(world)
