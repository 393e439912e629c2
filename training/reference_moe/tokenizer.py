"""The reference model's vocabulary: pairs of bytes merged (BPE), learnt from the training texts.

    python -c "from training.reference_moe.tokenizer import train_tokenizer as t; print(t({'en': 'a'}, 257))"

Sennrich, Haddow and Birch 2016, on bytes: whatever text comes, there is no unknown token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
BYTES = 256
# Of each domain: enough for some thousand merges, and no language outweighs another.
LEARNT_FROM_CHARACTERS = 1_000_000
# What is tokenized at a time.
BLOCK_CHARACTERS = 1 << 16


def train_tokenizer(texts: Mapping[str, str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Learn a tokenizer of `vocabulary` tokens, END (id 0) and all bytes included, from texts by domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:LEARNT_FROM_CHARACTERS] for text in texts.values()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> UInt16[np.ndarray, "T"]:
    """Token ids of a text, however long it is."""
    parts = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(list(_blocks(text)))]
    return np.concatenate([np.array(part, np.uint16) for part in parts])


def _blocks(text: str) -> Iterator[str]:
    """A text in pieces that end behind a line where there is one."""
    start = 0
    while start < len(text):
        end = start + BLOCK_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
