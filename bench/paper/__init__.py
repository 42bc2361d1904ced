"""The tables and figures of LoRAP (arXiv 2404.09695) and MGAA (arXiv 2507.03294) as commands.

``python -m bench.paper NAME --model MODEL``; ``--list`` says what there is.

A study (:mod:`bench.paper.studies`) is a table: cells, each a measurement
(:mod:`bench.paper.measures`) with its arguments, and the rows that the paper prints
(:mod:`bench.paper.known`). :mod:`bench.paper.runner` measures the cells that are not stored yet,
:mod:`bench.paper.printing` puts both side by side.
"""
