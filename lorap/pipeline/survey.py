"""A look at a model that is to be compressed: spectra, activations, similarities."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorap.checkpoint.reader import CheckpointReader, open_checkpoint, read_config
from lorap.config import CompressionConfig, Sublayer
from lorap.errors import UsageError
from lorap.ops.mgaa import cumulative_energy
from lorap.pipeline.factors import factorise
from lorap.pipeline.forward import Batch, Samples
from lorap.pipeline.inspection import check_weight
from lorap.pipeline.measure import observe
from lorap.pipeline.on_disk import decoder_of, load_samples
from lorap.pipeline.progress import Progress
from lorap.pipeline.statistics import INPUT_OF, Input, InputStatistics, Wanted
from lorap.pipeline.streaming import read_ahead
from lorap.runtime import choose_device, choose_dtype, versions

ENERGIES = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Shares of the energy for which effective ranks are told; 0.8 is that of the paper's Table 1."""

POINTS = 64
"""Ranks at which a spectrum is told."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, told at some of its ranks.

    Attributes
    ----------
    count : int
        Singular values in all.
    ranks : tuple of int
        Ascending; the last one is `count`.
    singular_values : tuple of float
        The one of that rank.
    energies : tuple of float
        Share of the squared singular values that the rank retains.
    effective_ranks : dict
        By share of the energy (``ENERGIES``), the least rank that retains it.
    """

    count: int
    ranks: tuple[int, ...]
    singular_values: tuple[float, ...]
    energies: tuple[float, ...]
    effective_ranks: dict[float, int]

    @classmethod
    def of(cls, singular_values: Tensor) -> Spectrum:
        """Return what is told of all singular values.

        Parameters
        ----------
        singular_values : (k,)
            Descending, at least one.
        """
        values = singular_values.double().tolist()
        retained = cumulative_energy(singular_values)
        points = min(POINTS, len(values))
        ranks = tuple(round(at * len(values) / points) for at in range(1, points + 1))
        return cls(
            count=len(values),
            ranks=ranks,
            singular_values=tuple(values[rank - 1] for rank in ranks),
            energies=tuple(retained[rank - 1] for rank in ranks),
            effective_ranks={
                # The last share is 1 within rounding.
                share: min(bisect.bisect_left(retained, share) + 1, len(values))
                for share in ENERGIES
            },
        )

    def rank_share(self, energy: float) -> float:
        """Return the effective rank as a share of all ranks.

        Parameters
        ----------
        energy : float
            One of ``ENERGIES``.
        """
        return self.effective_ranks[energy] / self.count

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "count": self.count,
            "rank_shares": {f"{energy:g}": self.rank_share(energy) for energy in ENERGIES},
            "ranks": list(self.ranks),
            "singular_values": list(self.singular_values),
            "energies": list(self.energies),
        }


@dataclass(frozen=True)
class LayerSurvey:
    """What is found in a layer.

    Attributes
    ----------
    index : int
    svd : dict
        By role (``q`` to ``down``), the spectrum of the weight.
    awsvd : dict
        Likewise, of the weight times the norms of its input features (Eq. 7); empty without
        calibration data, as is what follows.
    norms : dict
        By input of the linears, the norms of its features over the tokens (Eq. 5).
    outliers : dict
        By input of the linears, the largest norm of a feature over the median one; None where that
        is 0.
    similarities : dict
        By sub-layer, the mean cosine of the residual stream before and after it.
    """

    index: int
    svd: dict[str, Spectrum]
    awsvd: dict[str, Spectrum]
    norms: dict[Input, Tensor] = field(compare=False)
    outliers: dict[Input, float | None]
    similarities: dict[Sublayer, float]


@dataclass(frozen=True)
class Survey:
    """What is found in a model.

    Attributes
    ----------
    model : str
        As the user named it.
    calibration : dict or None
        Source, samples, length, seed and fingerprint of the ids.
    layers : tuple of LayerSurvey
        Ascending.
    versions : dict
    """

    model: str
    calibration: dict[str, Any] | None
    layers: tuple[LayerSurvey, ...]
    versions: dict[str, str]

    def mean_rank_shares(self, energy: float) -> dict[str, dict[str, float]]:
        """Return effective ranks as shares, their mean over the layers: Table 1 of the paper.

        Parameters
        ----------
        energy : float
            One of ``ENERGIES``.

        Returns
        -------
        dict
            By ``svd`` and ``awsvd``, by role.
        """
        found: dict[str, dict[str, float]] = {}
        for method in ("svd", "awsvd"):
            spectra = [getattr(layer, method) for layer in self.layers]
            if spectra[0]:
                found[method] = {
                    role: sum(one[role].rank_share(energy) for one in spectra) / len(spectra)
                    for role in spectra[0]
                }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``lorap inspect --json`` prints them: all but the norms."""
        return {
            "model": self.model,
            "calibration": self.calibration,
            "mean_rank_shares": {
                f"{energy:g}": self.mean_rank_shares(energy) for energy in ENERGIES
            },
            "layers": [
                {
                    "layer": layer.index,
                    "svd": {role: one.to_dict() for role, one in layer.svd.items()},
                    "awsvd": {role: one.to_dict() for role, one in layer.awsvd.items()} or None,
                    "outliers": layer.outliers or None,
                    "similarities": layer.similarities or None,
                }
                for layer in self.layers
            ],
            "versions": self.versions,
        }


def inspect_checkpoint(
    model: str | Path,
    *,
    calibration: str | None = None,
    layers: Sequence[int] | None = None,
    field: str | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    activations: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Look at a model before it is compressed, one layer in memory at a time.

    Parameters
    ----------
    model : str or Path
        A local folder or a hub name.
    calibration : str, optional
        A source as ``lorap compress`` takes it. Without one, the weights alone are looked at.
    layers : sequence of int, optional
        Decoder layers to look at; all by default. With calibration data those before them are run.
    field, samples, seqlen, seed, batch_size, activations, dtype : optional
        Of the calibration and its forwards, as for ``lorap compress``.
    device : {"auto", "cpu", "cuda"}
    revision : str, optional
        Of a model on the hub.
    progress : callable, optional
        Called with the layers done and the layers in all; first with 0.

    Raises
    ------
    UsageError
        If anything given cannot be used, or has no effect.
    LorapError
        If weights or activations are not finite, or the hub cannot be reached.
    """
    of_data = {
        "field": field,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "batch_size": batch_size,
        "activations": activations,
        "dtype": dtype,
    }
    given = {name: value for name, value in of_data.items() if value is not None}
    if calibration is None and given:
        name, value = next(iter(given.items()))
        raise UsageError(f"{name} {value}: has no effect without calibration data")
    given.pop("field", None)
    # Low rank everywhere, so that every matrix has a spectrum by its inputs.
    config = CompressionConfig(mha="awsvd", ffn="awsvd", device=device, **given)  # type: ignore[arg-type]
    place, kind = choose_device(config.device), choose_dtype(config.dtype)
    # What configuration and data show wrong, before the weights are fetched.
    model_config = read_config(model, revision=revision)
    chosen = _chosen_layers(layers, int(model_config.num_hidden_layers))
    about = None
    drawn: Samples | None = None
    if calibration is not None:
        found = load_samples(calibration, model, model_config, config, field, revision)
        drawn = Samples(found.input_ids, batch_size=config.batch_size)
        about = {
            "source": found.source,
            "samples": found.input_ids.shape[0],
            "seqlen": found.input_ids.shape[1],
            "seed": config.seed,
            "fingerprint": found.fingerprint,
        }
    reader = open_checkpoint(model, revision=revision)
    return Survey(
        model=str(model),
        calibration=about,
        layers=tuple(_layers(reader, place, kind, config, drawn, chosen, progress)),
        versions=versions(),
    )


def _chosen_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong or not layers:
        got = wrong[0] if wrong else "none"
        raise UsageError(f"layers: expected layers from 0 to {count - 1}, got {got}")
    return sorted(set(layers))


def _layers(
    reader: CheckpointReader,
    device: torch.device,
    dtype: torch.dtype | None,
    config: CompressionConfig,
    samples: Samples | None,
    chosen: Sequence[int],
    progress: Progress | None,
) -> Iterator[LayerSurvey]:
    decoder = decoder_of(reader, device, dtype)
    family = decoder.family
    names = {**family.attention, **family.ffn}
    linears: dict[Input, str] = {}
    for role, name in names.items():
        linears.setdefault(INPUT_OF[role], family.dense_name(name))
    wanted = {kind: Wanted(name, frozenset({"squares"})) for kind, name in linears.items()}
    batches: list[Batch] = []
    passed = chosen
    if samples is not None:
        batches = decoder.embed(samples, decoder.store(samples, config))
        passed = range(chosen[-1] + 1)
    tell = progress or (lambda done, total: None)
    tell(0, len(passed))
    for done, (index, original) in enumerate(read_ahead(decoder.tensors, passed), 1):
        for name, tensor in original.items():
            check_weight(f"layers.{index}.{name}", tensor)
        inputs: Mapping[Input, InputStatistics] = {}
        similarities: dict[Sublayer, float] = {}
        if batches:
            layer = decoder.build(decoder.compressed_config(None), index, original)
            inputs, similarities = observe(
                layer, index, family, wanted if index in chosen else {}, batches, similarity=True
            )
            del layer
        if index in chosen:
            weights = decoder.split(original)
            svd, awsvd = {}, {}
            for role, name in names.items():
                weight, given = weights[f"{name}.weight"], inputs.get(INPUT_OF[role])
                spectrum = factorise(weight, None, 0, "svd", config).singular_values
                svd[role] = Spectrum.of(spectrum)
                if given is not None:
                    spectrum = factorise(weight, given, 0, "awsvd", config).singular_values
                    awsvd[role] = Spectrum.of(spectrum)
            norms = {kind: found.norms for kind, found in inputs.items()}
            outliers = {kind: outlier_ratio(values) for kind, values in norms.items()}
            yield LayerSurvey(index, svd, awsvd, norms, outliers, similarities)
        tell(done, len(passed))


def outlier_ratio(norms: Tensor) -> float | None:
    """Return how far the most active input feature is above the others.

    Parameters
    ----------
    norms : (d_in,)
        Of the input features over the tokens, Eq. (5).

    Returns
    -------
    float or None
        The largest norm over the median, of an even number the mean of the middle two; None where
        that is 0.
    """
    values = norms.double()
    median = float(values.quantile(0.5))
    return float(values.max()) / median if median else None
