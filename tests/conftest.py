"""How hard hypothesis tries: `ci`, the same examples every time, or with HYPOTHESIS_PROFILE=deep many and new ones."""

import os
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))       # train_*.py are importable, however pytest is started

settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
