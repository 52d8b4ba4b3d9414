import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from stages import STAGES  # noqa: E402


@pytest.fixture(params=STAGES, ids=lambda stage: stage.name)
def stage(request):
    """Every stage in turn."""
    return request.param
