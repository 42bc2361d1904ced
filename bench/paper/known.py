"""Values that the papers print, as far as they are at hand, in the columns of our tables.

The bodies of LoRAP's Tables 1, 3 to 8 and 14 to 17 and the values in its figures are not at hand;
of those, what its text says stands in the studies. Accuracies are shares.
"""

from __future__ import annotations

from typing import Any

from lorap.evaluation import PAPER_METRICS

Row = dict[str, Any]

DENSE, LORAP = "dense", "LoRAP"
"""Names of two rows of tables of methods."""


_TABLE_2 = """\
0.0 -   dense       12.62  22.14  73.18  78.35  72.99  67.01  67.45  41.38  42.40  63.25
0.2 no  LLM-Pruner  19.09  34.21  57.06  75.68  66.80  59.83  60.94  36.52  40.00  56.69
0.2 no  LoRAPrune   20.67  34.12  57.98  75.11  65.81  59.90  62.14  34.59  39.98  56.50
0.2 no  LoRAP       15.69  25.86  71.93  76.44  69.98  65.90  60.56  38.48  40.40  60.53
0.2 yes LLM-Pruner  17.58  30.11  64.62  77.20  68.80  63.14  64.31  36.77  39.80  59.23
0.2 yes LoRAPrune   16.80  28.75  65.62  79.31  70.00  62.76  65.87  37.69  39.14  60.05
0.2 yes LoRAShear       -      -  70.17  76.89  68.69  65.83  64.11  38.77  39.97  60.63
0.2 yes LoRAP       16.35  27.06  72.94  76.93  70.90  65.75  64.31  39.93  41.20  61.71
0.5 no  LLM-Pruner 112.44 255.38  52.32  59.63  35.64  53.20  33.50  27.22  33.40  42.13
0.5 no  LoRAPrune  121.96 260.14  51.78  56.90  36.76  53.80  33.82  26.93  33.10  41.87
0.5 no  LoRAP       56.96  87.71  57.80  63.82  46.96  57.30  40.36  27.73  36.80  47.25
0.5 yes LLM-Pruner  38.12  66.35  60.28  69.31  47.06  53.43  45.96  29.18  35.60  48.69
0.5 yes LoRAPrune   30.12  50.30  61.88  71.53  47.86  55.01  45.13  31.62  34.98  49.71
0.5 yes LoRAShear       -      -  62.12  71.80  48.01  56.29  47.68  32.26  34.61  50.39
0.5 yes LoRAP       30.90  48.84  63.00  69.64  54.42  58.41  51.94  32.00  35.80  52.17
"""
"""Ratio, tuned, method; WikiText2, PTB, and in percent BoolQ, PIQA, HellaSwag, WinoGrande, ARC-e,
ARC-c, OBQA and their mean."""


def _table_2() -> tuple[Row, ...]:
    names = ("WikiText2", "PTB", *PAPER_METRICS, "mean of tasks")
    rows = []
    for line in _TABLE_2.splitlines():
        ratio, tuned, method, *values = line.split()
        row: Row = {"ratio": float(ratio), "tuned": tuned.strip("-"), "method": method}
        for name, value in zip(names, values, strict=True):
            if value != "-":
                share = 1 if name in ("WikiText2", "PTB") else 100
                row[f"paper: {name}"] = float(value) / share
        rows.append(row)
    return tuple(rows)


TABLE_2 = _table_2()
"""Table 2 of LoRAP (LLaMA-7B), whole."""

FIGURE_6: tuple[Row, ...] = (
    {"ratio": 0.0, "paper: WikiText2": 12.62, "paper: PTB": 22.14},
    {"ratio": 0.2, "paper: WikiText2": 15.69, "paper: PTB": 25.86},
    {"ratio": 0.5, "paper: WikiText2": 56.96, "paper: PTB": 87.71},
)
"""LLaMA-7B, those of Table 2; the values in Fig. 6 are not at hand."""

SEEDS: tuple[Row, ...] = (
    {"ratio": 0.2, "seed": "mean", "paper: WikiText2": 15.734},
    {"ratio": 0.2, "seed": "deviation", "paper: WikiText2": 0.073},
    {"ratio": 0.5, "seed": "mean", "paper: WikiText2": 49.116},
    {"ratio": 0.5, "seed": "deviation", "paper: WikiText2": 0.947},
)
"""App. A.2, ten seeds."""

FACTORS = {"llama-7b": 1.04052, "llama-13b": 1.02586, "llama-30b": 1.01329}
"""Ratio_l / Ratio_s of Table 13, by the formula of App. C.1."""

PARAMETERS = {
    0.2: 5.4430e9,
    0.3: 4.7957e9,
    0.4: 4.1473e9,
    0.5: 3.5004e9,
}
"""Of LLaMA-7B by the ratio of the layers, by the formulas of the authors' code (lihuang258/LoRAP at
commit 4e34b7f)."""

_MGAA_COLUMNS = ("paper: WikiText2", "paper: PTB", "paper: C4", "paper: mean of tasks")
_MGAA = {
    0.2: {
        "PCA": (8.75, 15.17, 14.17, 58.44),
        "PCA, between": (8.31, 14.55, 13.08, 58.99),
        "PCA, within": (8.15, 12.86, 12.61, 59.02),
        "PCA, both": (7.65, 12.15, 11.37, 60.36),
        "joint, both": (7.42,),
    },
    0.3: {
        "PCA": (11.49, 22.11, 20.37, 54.35),
        "PCA, between": (10.63, 20.71, 18.36, 55.45),
        "PCA, within": (10.56, 17.51, 17.54, 55.87),
        "PCA, both": (9.61, 17.18, 15.99, 57.12),
        "joint, both": (9.14,),
    },
    0.4: {
        "PCA": (18.17, 39.94, 34.73, 49.17),
        "PCA, between": (15.89, 35.27, 30.09, 50.21),
        "PCA, within": (16.68, 35.12, 31.10, 50.30),
        "PCA, both": (14.46, 30.27, 26.33, 52.31),
        "joint, both": (13.09,),
    },
    0.5: {
        "PCA": (33.21, 80.07, 68.76, 42.33),
        "PCA, between": (24.54, 66.86, 50.22, 44.59),
        "PCA, within": (29.48, 70.15, 59.43, 44.54),
        "PCA, both": (22.02, 58.57, 43.33, 47.55),
        "joint, both": (20.58,),
    },
}
_MGAA_ALPHA = {
    0.10: 29.63,
    0.20: 26.58,
    0.25: 25.54,
    0.30: 24.88,
    0.35: 24.54,
    0.40: 24.58,
    0.45: 25.09,
    0.50: 25.70,
}
MGAA_ALPHAS = tuple(_MGAA_ALPHA)
"""Of MGAA's table of alphas."""

MGAA: tuple[Row, ...] = (
    {"ratio": 0.0, "method": DENSE, "alpha": ""}
    | dict(zip(_MGAA_COLUMNS, (5.68, 8.80, 7.24, 0.6632), strict=True)),
    *(
        {"ratio": ratio, "method": method, "alpha": ""}
        | {
            name: value / 100 if name.endswith("tasks") else value
            for name, value in zip(_MGAA_COLUMNS, values, strict=False)
        }
        for ratio, methods in _MGAA.items()
        for method, values in methods.items()
    ),
    *(
        {"ratio": 0.5, "method": "PCA, between", "alpha": alpha, "paper: WikiText2": value}
        for alpha, value in _MGAA_ALPHA.items()
    ),
)
"""LLaMA-1-7B, perplexity at 2048 tokens (arXiv 2507.03294)."""
