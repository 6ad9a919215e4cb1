"""Tests marked ``slow`` run with ``pytest --slow`` and are skipped, with a reason, without."""

from collections.abc import Iterator
from functools import cache
from multiprocessing import forkserver

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes or gigabytes")


@pytest.fixture(scope="session", autouse=True)
def speed_measured_once() -> Iterator[None]:
    """Every command that samples first measures the machine, for a fifth of a second; one
    measurement does for all of them that a process of tests calls."""
    from sgm.inference import estimate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "matmul_rate", cache(estimate.matmul_rate))
        yield


@pytest.fixture(scope="module")
def new_fork_server() -> None:
    """Have the next process forked off a server of its own: one that other tests began has not
    imported what these processes need, and each would do that for itself."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes or gigabytes: pytest --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
