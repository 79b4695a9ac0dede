from __future__ import annotations

from collections.abc import Iterator

import pytest
from cohere_platform import CoherePlatform


@pytest.fixture
def server() -> Iterator[CoherePlatform]:
    with CoherePlatform(state_seconds=0.01, dataset_seconds=0.01) as platform:
        yield platform
    assert platform.violations == []
