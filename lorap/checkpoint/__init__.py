"""Reading the original checkpoint and writing the compressed one."""

from lorap.checkpoint.card import model_card
from lorap.checkpoint.files import CARD, REPORT, REPORT_PAGE
from lorap.checkpoint.reader import (
    CheckpointReader,
    StoredTensor,
    fetch_tokenizer_files,
    open_checkpoint,
    read_config,
)
from lorap.checkpoint.writer import CheckpointWriter, check_output

__all__ = [
    "CARD",
    "REPORT",
    "REPORT_PAGE",
    "CheckpointReader",
    "CheckpointWriter",
    "StoredTensor",
    "check_output",
    "fetch_tokenizer_files",
    "model_card",
    "open_checkpoint",
    "read_config",
]
