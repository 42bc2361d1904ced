"""A real trained LLaMA: stories260K, where its files are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorap
from bench.sampling import sample_ids

SHARED = Path(os.environ.get("LORAP_SHARED", Path(__file__).parents[2] / "shared"))
MODEL = SHARED / "models" / "stories260K"

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"stories260K is not at {MODEL} (LORAP_SHARED names its parent)"
)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ids")
    ids = sample_ids(AutoModelForCausalLM.from_pretrained(MODEL), 96, 128, seed=0).numpy()
    np.save(folder / "calibration.npy", ids[:64].astype(np.uint16))
    np.save(folder / "evaluation.npy", ids[64:].astype(np.int32))
    return folder


def test_compress_reload_generate_evaluate(sampled: Path, tmp_path: Path) -> None:
    evaluation = str(sampled / "evaluation.npy")
    perplexities = [lorap.evaluate_perplexity(str(MODEL), evaluation).perplexity]
    for ratio in (0.1, 0.2, 0.5):
        output = tmp_path / str(ratio)
        report = lorap.compress_checkpoint(
            MODEL,
            output,
            lorap.CompressionConfig(ratio=ratio, samples=64),
            calibration=str(sampled / "calibration.npy"),
        )
        assert report["achieved_ratio"] == pytest.approx(ratio, abs=0.011)
        perplexities.append(lorap.evaluate_perplexity(str(output), evaluation).perplexity)

        model = AutoModelForCausalLM.from_pretrained(output)
        tokenizer = AutoTokenizer.from_pretrained(output)
        prompt = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False)
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        cached = model.generate(**prompt, **options, pad_token_id=0)
        uncached = model.generate(**prompt, **options, pad_token_id=0, use_cache=False)
        assert torch.equal(cached, uncached)
        assert tokenizer.decode(cached[0]).startswith("Once upon a time")
    dense, at_10, at_20, at_50 = perplexities
    # 3.4 over many sequences; these are 32.
    assert 2.5 < dense < 4.5
    # Compression costs, more of it more; and even half of the model is far from chance (512).
    assert dense < at_10 < at_20 < at_50 < 256
    assert at_10 < 2 * dense
    assert at_20 < 4 * dense


def test_text_of_a_book_as_calibration(tmp_path: Path) -> None:
    books = SHARED / "data" / "public-domain-books.txt"
    if not books.is_file():
        pytest.skip(f"the books are not at {books}")
    report = lorap.compress_checkpoint(
        MODEL,
        tmp_path / "out",
        lorap.CompressionConfig(ratio=0.2, samples=16),
        calibration=str(books),
    )
    assert report["calibration"]["samples"] == 16
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
