#!/usr/bin/env bash
# Run the tests of modeling, checkpoint and pipeline with another minor version of transformers.
# Usage: with_transformers.sh 4.57 [python]
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1
venv=.venv-$version
"${2:-python3}" -m venv "$venv"
# The pins that belong to the newest transformers do not hold here.
grep -vE '^(transformers|tokenizers|huggingface_hub|datasets)==' constraints.txt \
    >"$venv/constraints.txt"
"$venv/bin/pip" install --quiet --constraint "$venv/constraints.txt" torch
"$venv/bin/pip" install --quiet --constraint "$venv/constraints.txt" \
    --editable '.[test]' "transformers==$version.*"
"$venv/bin/python" -m pytest -m "not slow" tests/test_modeling.py tests/test_registration.py \
    tests/test_families.py tests/test_multimodal.py tests/test_checkpoint.py \
    tests/test_pipeline.py parity_tests/test_algorithm1.py
