"""Small tokenizers of the kinds used by published models, trained on a few texts."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = "The quick brown fox jumps over the lazy dog. In the beginning there was text, and the text was tokens.\n" * 20


def byte_level(vocabulary: int = 300, texts: tuple[str, ...] = (TEXT,)) -> Tokenizer:
    """Like GPT-2: bytes as letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama 2: a space is ``▁``, and a character without a token is encoded as its bytes, ``<0x0A>``."""
    special = ["<unk>", "<s>", "</s>"]
    letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    words = ["▁t", "he", "▁the", "▁a"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def unigram() -> Tokenizer:
    """Like T5 and XLNet: the most likely segmentation of words that begin with ``▁``."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """Like BERT: the longest piece first."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback, "unigram": unigram, "word piece": word_piece}
