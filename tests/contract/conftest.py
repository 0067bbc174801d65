"""The bench of the contract suite: shared by its whole session."""

import pytest

from tests.contract.bench import Bench


@pytest.fixture(scope="session")
def bench(model, tmp_path_factory):
    return Bench(model, tmp_path_factory.mktemp("contract"))
