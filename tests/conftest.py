"""What every test shares: hypothesis's profiles, options, and which tests stay on one worker.

Fixtures of one kind of test belong beside those tests; what stands here is for all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent

# Directories whose modules start real processes once and look at them in many tests: a module is
# not spread over workers.
TOGETHER = frozenset({"system", "vm", "interop", "web"})

# Times vary on a loaded machine, and say nothing about a property. In CI the same examples are
# drawn each time, so that a change is judged by what it changes; people draw new ones.
hypothesis.settings.register_profile("default", max_examples=50, deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("long", max_examples=5_000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tagmem")
    group.addoption("--seed", type=int, default=None, help="simulate this world only")
    group.addoption("--rewrite", action="store_true", help="write scenario transcripts anew")


class Together(LoadScopeScheduling):
    """Spreads single tests over the workers, and whole modules where those belong together.

    xdist's own groups are marks that it writes into a test's name, which pytest 9.2 ignores.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        parts = module.split("/")
        return module if len(parts) > 2 and parts[1] in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int | None:
    """The one world that was asked for (`make sim SEED=…`), or None for all of them."""
    value: int | None = pytestconfig.getoption("--seed")
    return value


@pytest.fixture(scope="session")
def rewrite(pytestconfig: pytest.Config) -> bool:
    """True when transcripts are to be written anew (`make scenario REWRITE=1`), not compared."""
    return bool(pytestconfig.getoption("--rewrite"))
