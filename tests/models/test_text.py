"""The word-level text encoder: prompt weights as ComfyUI writes them, and what they do."""

import pytest
import torch

from retort.models.text import LENGTH, UNKNOWN, VOCABULARY, TextEncoder, WordTokenizer, weighted_spans


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a blue seven", [("a blue seven", 1.0)]),
        ("a (blue) seven", [("a ", 1.0), ("blue", 1.1), (" seven", 1.0)]),
        ("((blue))", [("blue", 1.1 * 1.1)]),
        ("(blue:1.3)", [("blue", 1.3)]),
        ("(a (blue:1.2) seven:1.4)", [("a ", 1.4), ("blue", 1.2), (" seven", 1.4)]),
        ("open (blue", [("open ", 1.0), ("blue", 1.0)]),
        ("", []),
    ],
)
def test_weights(prompt, spans):
    found = weighted_spans(prompt)
    assert [t for t, _ in found] == [t for t, _ in spans]
    assert [w for _, w in found] == pytest.approx([w for _, w in spans])


def test_tokens_are_words_digits_and_commas():
    ids, weights = WordTokenizer().encode("A (Bold:1.2) 7, sparkling")
    assert ids[1:6] == [VOCABULARY["a"], VOCABULARY["bold"], VOCABULARY["seven"], VOCABULARY[","], UNKNOWN]
    assert weights[1:4] == [1.0, 1.2, 1.0]
    assert len(ids) == len(weights) == LENGTH
    assert len(WordTokenizer().encode("seven " * 40)[0]) == LENGTH


def test_a_weight_of_one_changes_nothing_and_zero_gives_the_empty_prompt():
    torch.manual_seed(0)
    encoder, tokenizer = TextEncoder().eval(), WordTokenizer()
    ids, weights = tokenizer.encode("a blue seven")
    plain, pooled = encoder.encode(ids, weights)
    batched, _ = encoder(torch.tensor([ids, tokenizer.encode("")[0]]))
    assert torch.equal(plain[0], batched[0]) and pooled.shape == (1, 128)
    nothing, _ = encoder.encode(ids, [0.0] * LENGTH)
    assert torch.allclose(nothing[0], batched[1])
    twice, _ = encoder.encode(ids, [1.0, 1.0, 2.0] + [1.0] * (LENGTH - 3))
    assert torch.allclose(twice[0, 2] - batched[1, 2], 2 * (batched[0, 2] - batched[1, 2]), atol=1e-5)
    assert torch.equal(twice[0, 3], batched[0, 3])
