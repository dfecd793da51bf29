"""Load an engine in ONNX Runtime: logits, generation with the KV cache, and the rows each slot received.

In an engine of several ranks, all ranks call the same method at the same time, each with its own sequences, of which a rank may
have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from rq_compile.engine.manifest import Manifest
from rq_compile.engine.paths import graph_of_rank, stem_of
from rq_compile.errors import UserError, reason
from rq_compile.runtime.files import read_manifest
from rq_compile.runtime.rank_session import RankSession, met, threads_of_a_rank
from rq_compile.runtime.session import session_of
from rq_compile.standalone.batch import cache_bytes, fitting_tokens
from rq_compile.standalone.decoding import ALL, decode, inputs_of, until_end
from rq_compile.standalone.limits import free_memory
from rq_compile.standalone.prefix_cache import PrefixCache
from rq_compile.standalone.sampling import GREEDY, Choice, Sampler, SamplingParams
from rq_compile.standalone.scheduler import LEAST_LENGTH, MAX_LENGTH, PROMPT_PIECE, SLOTS, Scheduler
from rq_compile.standalone.step_model import EngineSteps, reuses_prefixes
from rq_compile.standalone.text import open_tokenizer

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

    from rq_compile.planning.schema import LayerPlan
    from rq_compile.standalone.chat_template import ChatTemplate, Messages

    Session: TypeAlias = onnxruntime.InferenceSession | RankSession


class Engine:
    """A compiled engine. Create it with :meth:`load`."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None) -> None:
        self.path = path
        self.manifest = manifest
        self.ranks = met(path, manifest)
        self.threads = threads or (threads_of_a_rank(self.ranks) if self.ranks else None)

    @classmethod
    def load(cls, path: Path, threads: int | None = None) -> Self:
        """Load the engine at ``path`` to run on ``threads`` threads; default: see ``session_threads`` and ``threads_of_a_rank``.

        Raises:
            UserError: a file of the engine is missing or has another size than its manifest says, or ONNX Runtime does not have
                the engine's execution provider or refuses the graph, or the engine needs other processes than there are.
        """
        engine = cls(path, read_manifest(path), threads)
        engine._session  # noqa: B018 - a graph that does not load must be reported here, not at the first token
        return engine

    @property
    def rank(self) -> int:
        """The number of this process among those that run the engine; the first, 0, prints."""
        return self.ranks.rank if self.ranks else 0

    @property
    def encoder_decoder(self) -> bool:
        return self.manifest.encoder_decoder

    @property
    def decoder_start(self) -> int | None:
        return self.manifest.decoder_start

    @property
    def counts_rows(self) -> bool:
        """Whether ``counted_logits`` and ``loads`` work. Lowerings with one node per MoE layer (``cuda``) hide their slots."""
        return bool(self.manifest.slot_offsets)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer, with truncation and padding off.

        Raises:
            UserError: the checkpoint had none.
        """
        if self.manifest.tokenizer is None:
            raise UserError(f"{self.path} has no tokenizer; compile it from a checkpoint that has a tokenizer.json")
        return open_tokenizer(stem_of(self.path).parent / self.manifest.tokenizer.name)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The template that turns a conversation into a prompt; None if the checkpoint had none.

        Raises:
            UserError: the engine's template was damaged.
        """
        if self.manifest.chat_template is None:
            return None
        from rq_compile.standalone.chat_template import ChatTemplate, ChatTemplateError

        path = stem_of(self.path).parent / self.manifest.chat_template.name
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), self.manifest.special_tokens)
        except (ChatTemplateError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a chat template: {reason(error)}; copy it again or compile again", 2) from error

    def chat_ids(self, messages: Messages, **variables: Any) -> list[int]:
        """The token ids of ``chat_prompt``.

        Raises:
            UserError: also if the engine has no tokenizer.
        """
        return self.tokenizer.encode(self.chat_prompt(messages, **variables), add_special_tokens=False).ids

    def chat_prompt(self, messages: Messages, **variables: Any) -> str:
        """The prompt for a conversation, with its special tokens. ``variables``: see ``ChatTemplate.render``.

        Raises:
            UserError: the engine has no chat template, or the template refuses the conversation.
        """
        if self.chat_template is None:
            raise UserError(f"{self.path} has no chat template, as base models have none; use generate --prompt", 2)
        from rq_compile.standalone.chat_template import ChatTemplateError

        try:
            return self.chat_template.render(messages, **variables)
        except ChatTemplateError as error:
            raise UserError(
                f"the chat template of {self.path} refuses it: {reason(error)}; correct the conversation", 2
            ) from error

    @cached_property
    def default_sampling(self) -> SamplingParams:
        """How tokens are chosen unless a request says otherwise, from the checkpoint's ``generation_config.json``."""
        return SamplingParams(**self.manifest.sampling.model_dump())

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, decoder_input_ids: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits fp32 ``[batch, sequence, vocabulary]`` of int64 ids ``[batch, sequence]``.

        ``attention_mask`` (int64, 1 = token, 0 = padding) defaults to all ones. An encoder-decoder engine returns the
        logits of ``decoder_input_ids``. A rank among several may have an empty batch.
        """
        feeds = self._feeds(input_ids, attention_mask, decoder_input_ids)
        return self._run(self._session, ["logits"], feeds)[0]

    def counted_logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, decoder_input_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As :meth:`logits`, and the rows of each slot, from the tokens of all ranks: layer name -> int64 ``[slots]``. Padding
        counts as rows.

        Raises:
            UserError: the engine's lowering does not count them, or its graph has other slots than its manifest's plan.
        """
        if not self.counts_rows:
            raise UserError(
                f"{self.path} does not count the rows of its slots (lowering {self.manifest.lowering}); "
                "use the same plan compiled with --lowering native",
                2,
            )
        feeds = self._feeds(input_ids, attention_mask, decoder_input_ids)
        layers = self.manifest.slot_offsets
        outputs = self._run(self._counting_session, ["logits", *layers.values()], feeds)
        rows = {layer: np.diff(offsets.astype(np.int64)) for layer, offsets in zip(layers, outputs[1:], strict=True)}
        if self.ranks:
            rows = self._of_all_slots(self.ranks.gather(rows))
        for layer in self.manifest.plan.layers:
            if len(rows[layer.name]) != len(layer.slots):
                raise UserError(
                    f"{self.path} and its manifest differ in the slots of layer {layer.index} ({len(rows[layer.name])} and "
                    f"{len(layer.slots)}); copy both again or compile again",
                    2,
                )
        return outputs[0], rows

    def loads(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, decoder_input_ids: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Rows of each slot for these tokens: layer name -> int64 ``[slots]``. Padding counts as rows, so do not pass any."""
        return self.counted_logits(input_ids, attention_mask, decoder_input_ids)[1]

    def generate(
        self, prompt_ids: Sequence[int], max_tokens: int, *, stop: bool = True, sampling: SamplingParams = GREEDY
    ) -> Iterator[int]:
        """Yield up to ``max_tokens`` tokens after ``prompt_ids``, up to but without a token that ends the text.

        ``stop``: whether a token can end the text. ``sampling``: how tokens are chosen; by default, the most likely ones. Its
        ``stop`` strings and its ``max_tokens`` have no effect here.

        Raises:
            SamplingError: ``sampling`` names a token outside the vocabulary.
            UserError: the prompt is empty or holds an id outside the vocabulary.
        """
        for choice in self.choices(prompt_ids, max_tokens, stop=stop, sampling=sampling):
            yield choice.token

    def prefix_cache(self, most_bytes: int | None = None) -> PrefixCache:
        """For ``choices`` and ``chat``: keeps up to ``most_bytes``; default: the cache of one sequence of the model's context
        length. It stays empty if a token's cache could depend on what follows (see ``reuses_prefixes``)."""
        manifest = self.manifest.model_dump(include={"cache", "plan", "prefill_chunk", "recomputed_beyond"})
        most = most_bytes or cache_bytes(manifest["cache"], 1, self.manifest.context_length or MAX_LENGTH)
        return PrefixCache(manifest["cache"], most if reuses_prefixes(manifest) else 0)

    def choices(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        stop: bool = True,
        sampling: SamplingParams = GREEDY,
        prefix_cache: PrefixCache | None = None,
    ) -> Iterator[Choice]:
        """As ``generate``, with the log probabilities that ``sampling`` asks for.

        ``prefix_cache``: of this engine. Of a prompt that begins like a sequence in it, only the rest is read; it then keeps the
        cache of this sequence, too.

        Raises:
            SamplingError: ``sampling`` names a token outside the vocabulary.
            UserError: the prompt is empty or holds an id outside the vocabulary.
        """
        if len(prompt_ids) == 0:
            raise UserError("the prompt is empty (0 tokens); give at least one token to continue", 2)
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.manifest.vocabulary:
            raise UserError(f"the prompt has a token outside the vocabulary; give ids of 0 to {self.manifest.vocabulary - 1}", 2)
        sampling.check_tokens(self.manifest.vocabulary)
        sampler = Sampler(sampling, prompt_ids)
        last = Choice(-1)

        def choose(logits: np.ndarray) -> int:
            nonlocal last
            last = sampler.choose(logits)
            return last.token

        if self.encoder_decoder:
            tokens = self._decode_without_cache(np.asarray([prompt_ids], dtype=np.int64), choose)
        else:
            said = self.manifest.model_dump(include={"cache", "prefill_chunk", "recomputed_beyond"})
            tokens = decode(self._session, said, prompt_ids, choose, prefix_cache)
        try:
            for _ in until_end(tokens, max_tokens, sampling.ends(self.manifest.end_of_text) if stop else ()):
                yield last
        finally:
            self.wait()

    def wait(self) -> None:
        """Take part in the steps of the other ranks until none has tokens left. For a rank that has nothing to generate while
        others have; alone, this does nothing."""
        if isinstance(self._session, RankSession):
            self._session.wait()

    def scheduler(
        self,
        slots: int = SLOTS,
        max_length: int | None = None,
        prompt_piece: int = PROMPT_PIECE,
        max_waiting: int | None = None,
        reuse_prefixes: bool = False,
    ) -> Scheduler:
        """A scheduler, whose sequences share the steps of this engine.

        ``slots``: sequences that are answered at the same time. ``max_length``: tokens of a prompt with its answer; default: the
        model's context length. ``prompt_piece``: tokens of prompts that run between two decoding steps. ``max_waiting``:
        requests that may wait for a slot. The cache takes up to half of the memory that is free now. ``reuse_prefixes``: whether
        the caches of sequences that have ended are kept for prompts that begin with the same tokens: as many as there are slots,
        in up to a quarter of that memory.

        Raises:
            UserError: the engine is an encoder-decoder or has several ranks, or the cache does not fit into the memory.
        """
        if self.encoder_decoder:
            raise UserError(f"{self.path} is an encoder-decoder, which cannot share steps; use a decoder-only engine", 2)
        if isinstance(self._session, RankSession):
            raise UserError(
                f"{self.path} runs in {len(self.manifest.ranks)} processes, which cannot share a scheduler; use an engine of one "
                "process, or generate on every rank",
                2,
            )
        steps = EngineSteps(self._session, self.manifest.model_dump())
        length = max_length or self.manifest.context_length or MAX_LENGTH
        memory = free_memory() // 2
        for_prefixes = memory // 4 if reuse_prefixes else 0
        fitting = fitting_tokens(steps.cache, slots, memory - for_prefixes)
        if fitting < min(length, LEAST_LENGTH):
            raise UserError(
                f"there is no memory for the caches of {slots} sequences of {self.path}; use fewer slots, or free some memory"
            )
        kept = min(for_prefixes, cache_bytes(steps.cache, slots, length))
        return Scheduler(steps, slots, length, prompt_piece, min(fitting, slots * length), max_waiting, kept)

    def _decode_without_cache(self, prompt: np.ndarray, choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        decoded = [self.decoder_start or 0]
        while True:
            token = choose(self.logits(prompt, decoder_input_ids=np.asarray([decoded], dtype=np.int64))[0, -1])
            yield token
            decoded.append(token)

    def _feeds(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, decoder_input_ids: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        input_ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(input_ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        feeds = {"input_ids": input_ids, "attention_mask": mask, "logits_to_keep": np.array([ALL], np.int64)}
        if self.encoder_decoder:
            if decoder_input_ids is None:
                raise ValueError("an encoder-decoder engine needs decoder_input_ids")
            return {**feeds, "decoder_input_ids": np.asarray(decoder_input_ids, dtype=np.int64)}
        batch = input_ids.shape[0]
        past = {tensor.past: tensor.empty(batch) for tensor in self.manifest.cache}
        return {**feeds, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0), **past}

    def _run(self, session: Session, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One step; a rank without tokens takes part in that of the others."""
        scored = feeds.get("decoder_input_ids", feeds["input_ids"])
        if isinstance(session, RankSession) and not scored.size:
            nothing = np.zeros((*scored.shape, self.manifest.vocabulary), np.float32)
            _, *counted = session.stand_by(outputs) or [nothing, *self._no_offsets(outputs[1:])]
            return [nothing, *counted]
        return session.run(outputs, self._accepted(session, feeds))

    @staticmethod
    def _accepted(session: Session, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``feeds`` without inputs that the exported graph does not use (for example, of a model without position ids)."""
        names = inputs_of(session)
        return {name: value for name, value in feeds.items() if name in names}

    def _no_offsets(self, outputs: Sequence[str]) -> list[np.ndarray]:
        slots = {self.manifest.slot_offsets[layer.name]: self._own_slots(layer).sum() for layer in self.manifest.plan.layers}
        return [np.zeros(slots[name] + 1, np.int32) for name in outputs]

    def _own_slots(self, layer: LayerPlan, rank: int | None = None) -> np.ndarray:
        """bool ``[slots]``: which slots of the layer are on ``rank``, by default this one."""
        return np.array([slot.rank for slot in layer.slots]) == (self.rank if rank is None else rank)

    def _of_all_slots(self, of_ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        rows = {layer.name: np.zeros(len(layer.slots), np.int64) for layer in self.manifest.plan.layers}
        for layer in self.manifest.plan.layers:
            for rank, counted in enumerate(of_ranks):
                rows[layer.name][self._own_slots(layer, rank)] = counted[layer.name]
        return rows

    @cached_property
    def _session(self) -> Session:
        return self._open()

    @cached_property
    def _counting_session(self) -> Session:
        return self._open(list(self.manifest.slot_offsets.values()))

    def _open(self, outputs: Sequence[str] = ()) -> Session:
        """A session with ``outputs`` in addition to those of the graph."""
        graph = graph_of_rank(self.path, self.ranks.rank) if self.ranks else self.path
        session = session_of(self.path, graph, self.manifest, self.threads, outputs)
        return RankSession(session, self.manifest, self.ranks) if self.ranks else session
