"""What all tests share."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A run started in the background inherits these as ignored, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def loud_transformers() -> Iterator[None]:
    """Give transformers its warnings and bars back, which a command has silenced."""
    yield
    # Not sooner: modules of tests say first that there is no hub.
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_warning()
    logging.enable_progress_bar()


@pytest.fixture
def ids_file(tmp_path: Path) -> str:
    """Write the token ids that many tests calibrate with, 8 rows of 16, and return the file."""
    import numpy as np

    from tests.tiny_models import token_ids

    np.save(tmp_path / "ids.npy", token_ids(8, 16).numpy())
    return str(tmp_path / "ids.npy")
