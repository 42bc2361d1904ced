"""Data for calibration and evaluation: reading a source, and choosing samples from it."""

from lorap.data.calibration import Calibration, calibration_from_ids, load_calibration
from lorap.data.instructions import Instruction
from lorap.data.sources import (
    NAMED_SOURCES,
    HubSource,
    NamedSource,
    TextRows,
    TokenIds,
    read_source,
)

__all__ = [
    "NAMED_SOURCES",
    "Calibration",
    "HubSource",
    "Instruction",
    "NamedSource",
    "TextRows",
    "TokenIds",
    "calibration_from_ids",
    "load_calibration",
    "read_source",
]
