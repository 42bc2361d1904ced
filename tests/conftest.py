"""What all tests share."""

import signal
from collections.abc import Iterator
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
