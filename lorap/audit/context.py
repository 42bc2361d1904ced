"""What all comparisons of an audit share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorap.audit.forward import Compute, Runs
from lorap.audit.record import Record
from lorap.audit.sizes import Plan
from lorap.checkpoint.reader import CheckpointReader
from lorap_reference import llama


@dataclass(frozen=True)
class Context:
    """An audit.

    Attributes
    ----------
    reader, stored : CheckpointReader
        Of the original and of the compressed model.
    record : Record
    plan : Plan
    shape : llama.LlamaShape
    compute : Compute
        Of the forwards behind the checkpoint.
    """

    reader: CheckpointReader
    stored: CheckpointReader
    record: Record
    plan: Plan
    shape: llama.LlamaShape
    compute: Compute


def embedded(context: Context, ids: NDArray[np.int64]) -> Runs:
    """Return the calibration samples (N, L) before the first layer."""
    embeddings = context.reader.load(context.reader.family.embedding)[""]
    return Runs(embeddings, ids, context.shape, context.compute)
