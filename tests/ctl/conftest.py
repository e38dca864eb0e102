import shutil
import tempfile
from pathlib import Path

import pytest

from tests.ctl.stand import Stand


@pytest.fixture
def short_path():
    """A folder whose path leaves room for the names of unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ctl"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def stand(tmp_path, short_path):
    with Stand(tmp_path, short_path) as made:
        yield made
