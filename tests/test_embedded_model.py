"""The text generator keeps its promises; the embedded model is the one that its record states."""

import itertools
import json
import math
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

from bench import grammar
from bench.train_embedded import (
    CALIBRATION_CHARACTERS,
    CALIBRATION_SEED,
    HELDOUT_CHARACTERS,
    HELDOUT_SEED,
    VOCABULARY,
    fresh_paragraphs,
    ngram_perplexities,
)

DEMO = Path(str(files("lorap") / "demo"))
PARAGRAPHS = tuple(grammar.corpus(7, 3000))
SENTENCES = tuple(
    sentence for text in PARAGRAPHS for sentence in re.findall(r"[A-Z][^.?!\"]*[.?!]", text)
)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEMO / "embedded.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def chunks(tokenizer: Any) -> torch.Tensor:
    text = "\n\n".join(_lines("heldout.txt"))
    ids = tokenizer(text, verbose=False)["input_ids"]
    count = len(ids) // 128
    return torch.tensor(ids[: 128 * count]).view(count, 128)


def _lines(name: str) -> list[str]:
    return (DEMO / name).read_text(encoding="utf-8").splitlines()


def _continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=2)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_seed_fixes_the_text() -> None:
    assert list(grammar.corpus(3, 50)) == list(grammar.corpus(3, 50))
    assert list(grammar.corpus(3, 50)) != list(grammar.corpus(4, 50))


def test_paragraphs_are_single_lines_of_a_few_hundred_words() -> None:
    words = {word for text in PARAGRAPHS for word in re.findall(r"[A-Za-z]+", text)}
    assert 300 <= len(words) <= 800
    assert all(20 <= len(text.split()) <= 120 and "\n" not in text for text in PARAGRAPHS)
    assert len(set(PARAGRAPHS)) > 0.99 * len(PARAGRAPHS)


@pytest.mark.parametrize(
    ("pattern", "sign"),
    [
        (r"(\d+) plus (\d+) is (\d+)", 1),
        (r"(\d+) minus (\d+) is (\d+)", -1),
        (r"(\d+) [a-z]+ and (\d+) [a-z]+ make (\d+) pieces", 1),
        (r'What is (\d+) plus (\d+)\?" asked \w+\. "(\d+),', 1),
    ],
)
def test_sums_are_right(pattern: str, sign: int) -> None:
    found = re.findall(pattern, " ".join(PARAGRAPHS))
    assert len(found) > 50
    assert all(int(a) + sign * int(b) == int(c) for a, b, c in found)


def test_verbs_agree_with_a_distant_subject() -> None:
    number = {form: i for pair in grammar.CREATURES for i, form in enumerate(pair)}
    verbs = {form: i for pair in grammar.ACTIONS for i, form in enumerate(pair)}
    relations = {form: i for pair in grammar.RELATIONS for i, form in enumerate(pair)}
    adjectives = "|".join(grammar.ADJECTIVES)
    subject = re.compile(rf"The (?:(?:{adjectives}) )?({'|'.join(number)}) (?:that|with|near) ")
    checked = attracted = 0
    for sentence in SENTENCES:
        match = subject.match(sentence)
        if match is None:
            continue
        words = re.findall(r"\w+", sentence)
        main = [i for i, word in enumerate(words) if word in verbs]
        expected = number[match[1]]
        assert main
        assert all(verbs[words[i]] == expected for i in main), sentence
        checked += 1
        attracted += any(number.get(word, expected) != expected for word in words[: main[0]])
        for before, noun, word in zip(words, words[1:], words[2:], strict=False):
            if before == "the" and noun in number and word in relations:
                assert relations[word] == number[noun], sentence
    assert checked > 300
    assert attracted > 0.3 * checked


def test_pronouns_fit_their_person() -> None:
    pronouns = {person.name: (person.subject, person.possessive) for person in grammar.PEOPLE}
    text = " ".join(PARAGRAPHS)
    lost = re.findall(r"([A-Z]\w+)(?:,[^,.]+,)? lost (her|his) ", text)
    lives = re.findall(r"Where does ([A-Z]\w+) live\? (She|He) lives", text)
    assert len(lost) > 50
    assert len(lives) > 50
    assert all(pronouns[name][1] == word for name, word in lost)
    assert all(pronouns[name][0] == word.lower() for name, word in lives)


def test_answers_repeat_what_was_said() -> None:
    colours = "|".join(grammar.COLOURS)
    checked = 0
    for text in PARAGRAPHS:
        for thing, colour in re.findall(rf"colour was the (\w+)\? It was ({colours})\.", text):
            assert f"{colour} {thing}" in text.partition("What colour was")[0]
            checked += 1
        verses = re.findall(r'sang [^"]*"([^"]+)\."', text)
        if verses:
            assert len(verses) == 2
            assert verses[0] == verses[1]
            checked += 1
    assert checked > 100


def test_comparisons_are_consistent() -> None:
    checked = 0
    for text in PARAGRAPHS:
        for order, (most, least, _) in grammar.ORDERS.items():
            name = r"(\w+)(?:,[^,.]+,)?"
            pairs = re.findall(rf"{name} is {order} than (\w+)(?: too)?\.", text)
            if pairs:
                above, below = {a for a, _ in pairs}, {b for _, b in pairs}
                assert set(re.findall(rf"(\w+) is the {most}\.", text)) <= above - below
                assert set(re.findall(rf"The {least} is (\w+)\.", text)) <= below - above
                checked += 1
    assert checked > 100


def test_facts_never_change() -> None:
    text = " ".join(PARAGRAPHS)
    for pattern in (r"capital of (\w+) is (\w+)", r"(\w+), who lives in (\w+),"):
        found = set(re.findall(pattern, text))
        assert len(found) == len({key for key, _ in found}) >= 8


def test_committed_texts_come_from_the_generator_and_are_disjoint() -> None:
    heldout, calibration = _lines("heldout.txt"), _lines("calibration.txt")
    assert heldout == fresh_paragraphs(HELDOUT_SEED, HELDOUT_CHARACTERS, frozenset())
    assert calibration == fresh_paragraphs(
        CALIBRATION_SEED, CALIBRATION_CHARACTERS, frozenset(heldout)
    )
    assert not set(heldout) & set(calibration)


def test_ngram_perplexities_by_hand() -> None:
    rows, chunk = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1, 1]])
    p0, p1 = 3 / (4 + VOCABULARY), 3 / (4 + VOCABULARY)
    p_after_0, p_after_1 = (2 + p1) / 3, (0 + p1) / 2
    unigram, bigram = ngram_perplexities(rows, chunk)
    assert p0 == p1
    assert unigram == pytest.approx(1 / p1)
    assert bigram == pytest.approx((p_after_0 * p_after_1) ** -0.5)


def test_size_and_dtype(record: dict[str, Any]) -> None:
    paths = list((DEMO / "model").iterdir())
    assert sum(path.stat().st_size for path in paths) <= 4_000_000
    assert {path.name for path in paths} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with safe_open(DEMO / "model" / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert 1_000_000 <= sum(tensor.numel() for tensor in tensors) <= 2_000_000
    assert record["parameters"] == sum(tensor.numel() for tensor in tensors)


def test_queries_are_grouped(model: Any) -> None:
    assert 1 < model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.vocab_size == VOCABULARY


def test_perplexity_is_the_recorded_one(
    record: dict[str, Any], model: Any, chunks: torch.Tensor
) -> None:
    total = 0.0
    with torch.inference_mode():
        for batch in chunks[:, None]:
            logs = model(input_ids=batch).logits[:, :-1].log_softmax(-1)
            total -= logs.gather(-1, batch[:, 1:, None]).double().sum().item()
    perplexity = math.exp(total / (chunks.shape[0] * 127))
    assert record["heldout_tokens"] == chunks.numel()
    assert perplexity == pytest.approx(record["heldout_perplexity"], rel=0.005)


def test_perplexity_is_far_below_ngrams(
    record: dict[str, Any], tokenizer: Any, chunks: torch.Tensor
) -> None:
    perplexity = record["heldout_perplexity"]
    assert perplexity < record["bigram_perplexity"] / 2
    assert record["bigram_perplexity"] < record["unigram_perplexity"] / 2
    text = "\n\n".join(_lines("calibration.txt"))
    rows = torch.tensor([tokenizer(text, verbose=False)["input_ids"]])
    unigram, bigram = ngram_perplexities(rows, chunks)
    assert perplexity < bigram / 2
    assert unigram == pytest.approx(record["unigram_perplexity"], rel=0.05)


def test_tokenizer_gives_the_text_back(tokenizer: Any) -> None:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8") + "Ünknown ☃\tsigns"
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The capital of France is", " Paris."),
        ("Greek is old. The capital of Norway is", " Oslo."),
        ("Olga, a pilot from Oslo, travelled to Italy. She speaks", " Norwegian, but in Rome"),
        ("Tom had a red drum. Tom gave the drum to Mia. Who has the drum now?", " Mia has the"),
        ("The dog near the gates that sees the cows", " waits slowly. It is"),
        ("The dogs near the gate that see the cow", "s wait in the rain. They are"),
    ],
)
def test_model_continues(model: Any, tokenizer: Any, prompt: str, expected: str) -> None:
    assert _continuation(model, tokenizer, prompt, 14).startswith(expected)


def test_generated_text_uses_the_words_of_the_grammar(model: Any, tokenizer: Any) -> None:
    words = set(itertools.chain(*(re.findall(r"\w+", text) for text in PARAGRAPHS)))
    made = re.findall(r"\w+", _continuation(model, tokenizer, "Anna lost her red kite", 100))[:-1]
    assert len(made) > 30
    assert sum(word in words for word in made) >= 0.97 * len(made)


@pytest.mark.slow
def test_training_again_gives_the_recorded_perplexity() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.train_embedded", "--check", str(DEMO)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ratio" in done.stdout
