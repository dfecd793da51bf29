"""Continuous batching: sequences of different lengths share every step of a model; they join and leave between steps.

One step of the scheduler runs pieces of prompts, each alone, and then one decoding step for all sequences whose prompt is done
(Orca, https://www.usenix.org/conference/osdi22/presentation/yu; the pieces of prompts: Sarathi, arXiv 2308.16369). A request is
admitted only if the cache has room for its prompt and its longest answer, so that no answer ends for lack of memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import Condition

import numpy as np

from .answer import Answer, AnswerFailed, Listener, QueueFull, RequestRefused
from .batch import Batch
from .prefix_cache import PrefixCache
from .sampling import Sampler, SamplingParams
from .step_model import Steps

SLOTS = 8
# Used if a model does not state its context length.
MAX_LENGTH = 4096
# A cache that does not hold a sequence of this length is not worth starting with.
LEAST_LENGTH = 64
# Tokens of prompts that run between two decoding steps.
PROMPT_PIECE = 128
# Requests that wait for a slot, for each slot.
WAITING_PER_SLOT = 16
CLOSED = "the model was unloaded before the answer was complete; send the request again"


class _Sequence:
    """A request while it is being answered. ``tokens``: its prompt and its answer so far."""

    def __init__(self, answer: Answer, ends: frozenset[int]) -> None:
        self.answer = answer
        self.tokens = list(answer.prompt_ids)
        self.longest = len(self.tokens) + answer.max_tokens
        self._ends = ends
        self._sampler = Sampler(answer.params, answer.prompt_ids)

    @property
    def ended(self) -> bool:
        return self.answer.finish_reason is not None

    def take(self, logits: np.ndarray) -> None:
        """Choose the next token from ``logits [vocabulary]``, which may end the answer."""
        try:
            choice = self._sampler.choose(logits)
        except ArithmeticError as error:
            self.answer.end("error", f"the engine failed: {error}")
            return
        if choice.token in self._ends:
            self.answer.end("stop")
            return
        self.tokens.append(choice.token)
        self.answer.put(choice)
        if len(self.tokens) == self.longest:
            self.answer.end("length")


@dataclass
class _Group:
    """Sequences that share their decoding steps. ``rows``: those of the batch; None for one that is read again."""

    batch: Batch
    rows: list[_Sequence | None]


class Scheduler:
    """Answers requests with one model. ``submit`` and answers can be used in any thread; the steps run in one thread, which calls
    ``run``, or ``step`` repeatedly.

    A sequence whose logits would depend on the others in a step (``Steps.shares_steps``) takes its steps alone.
    """

    def __init__(
        self,
        model: Steps,
        slots: int = SLOTS,
        max_length: int = MAX_LENGTH,
        prompt_piece: int = PROMPT_PIECE,
        cache_tokens: int | None = None,
        max_waiting: int | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        """``slots``: sequences that are answered at the same time. ``max_length``: tokens of a prompt with its answer.
        ``prompt_piece``: tokens of prompts that run between two decoding steps.

        ``cache_tokens`` bounds the slots in use times the longest sequence that one of them may become; default: ``slots`` times
        ``max_length``. ``max_waiting``: requests that may wait for a slot; default: 16 for each slot. ``prefix_bytes``: for the
        caches of sequences that have ended, which are kept for prompts that begin with the same tokens.
        """
        self.slots = slots
        self.cache_tokens = slots * max_length if cache_tokens is None else cache_tokens
        self.max_length = min(max_length, self.cache_tokens)
        self.max_waiting = WAITING_PER_SLOT * slots if max_waiting is None else max_waiting
        self._piece = prompt_piece
        self._model = model
        self._prefixes = PrefixCache(model.cache, prefix_bytes if model.reuses_prefixes else 0)
        self._changed = Condition()
        self._closed = False
        self._runs = False
        self._waiting: deque[_Sequence] = deque()
        self._reading: deque[_Sequence] = deque()  # in a slot, with a prompt that is not yet in the cache
        self._prompt = Batch(model)  # that of the first of them
        self._spare: list[Batch] = []  # one whose memory the next prompt can take
        self._groups: dict[Hashable, _Group] = {}

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, listener: Listener | None = None) -> Answer:
        """Ask for the continuation of ``prompt_ids``. A ``listener`` gets the tokens in place of who iterates over the answer.

        Raises:
            RequestRefused: the prompt is empty or has a token outside the vocabulary, or the request is too long.
            QueueFull: too many requests wait.
            AnswerFailed: the scheduler is closed.
        """
        answer = Answer(prompt_ids, params, self._most_tokens(prompt_ids, params), listener)
        sequence = _Sequence(answer, params.ends(self._model.end_of_text))
        with self._changed:
            if self._closed:
                raise AnswerFailed(CLOSED)
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already; send the request again later")
            self._waiting.append(sequence)
            self._changed.notify()
        return answer

    def run(self) -> None:
        """Take steps while there is something to do, until ``close`` is called."""
        self._runs = True
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self.busy)
                    if self._closed:
                        return
                self.step()
        finally:
            with self._changed:
                self._closed, self._runs = True, False
                self._end_all()

    def close(self) -> None:
        """End all answers with an error; where ``run`` is at work, after its current step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            if not self._runs:
                self._end_all()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._groups)

    @property
    def running(self) -> int:
        """Slots in use. Ask in the thread that takes the steps."""
        return len(self._in_slots())

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def step(self) -> None:
        """Run pieces of prompts, and then one decoding step for all other sequences in slots."""
        self._end_cancelled()
        self._admit()
        self._regroup(self._read_prompts())
        for group in self._groups.values():
            self._decode(group)

    def _most_tokens(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """The most tokens of the answer."""
        if len(prompt_ids) == 0:
            raise RequestRefused("the prompt is empty; give at least one token to continue")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._model.vocabulary:
            raise RequestRefused(f"the prompt has a token outside the vocabulary (0-{self._model.vocabulary - 1})")
        if len(prompt_ids) + (params.max_tokens or 1) > self.max_length:
            raise RequestRefused(
                f"{len(prompt_ids)} tokens of the prompt and max_tokens {params.max_tokens or 1} exceed the longest sequence, "
                f"{self.max_length}; shorten the prompt or ask for fewer tokens"
            )
        return params.max_tokens or self.max_length - len(prompt_ids)

    def _in_slots(self) -> list[_Sequence]:
        decoding = [sequence for group in self._groups.values() for sequence in group.rows]
        return [sequence for sequence in (*self._reading, *decoding) if sequence is not None and not sequence.ended]

    def _end_cancelled(self) -> None:
        with self._changed:
            for sequence in (*self._waiting, *self._in_slots()):
                if sequence.answer.cancelled:
                    sequence.answer.end("cancelled")
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.ended)

    def _admit(self) -> None:
        """Give slots to waiting requests in the order in which they came, while the cache has room for the first of them."""
        with self._changed:
            running = self._in_slots()
            while self._waiting and len(running) < self.slots:
                running.append(self._waiting[0])
                if len(running) * max(sequence.longest for sequence in running) > self.cache_tokens:
                    return
                self._reading.append(self._waiting.popleft())

    def _read_prompts(self) -> list[tuple[Batch, _Sequence]]:
        """Run up to ``prompt_piece`` tokens of prompts, or one piece. Returns the sequences that can be decoded from now on, each
        with its cache."""
        arrived: list[tuple[Batch, _Sequence]] = []
        room = self._piece
        while self._reading:
            sequence = self._reading[0]
            if len(self._prompt) == 0 and not sequence.ended:
                known, cache = self._prefixes.longest(sequence.tokens)
                sequence.answer.cached_tokens = known
                self._prompt.begin(sequence.longest, known, cache)
            start = self._prompt.columns
            left = len(sequence.tokens) - start
            piece = left if self._model.whole_prompts else min(left, self._piece)
            if not sequence.ended:
                if piece > room < self._piece:
                    break
                room -= piece
                logits = self._read(sequence, start, piece)
                if logits is not None and piece < left:
                    continue
                if logits is not None:
                    sequence.take(logits)
            self._reading.popleft()
            prompt, self._prompt = self._prompt, self._spare.pop() if self._spare else Batch(self._model)
            if not sequence.ended and not self._reads_again(sequence, prompt.columns):
                arrived.append((prompt, sequence))
        return arrived

    def _read(self, sequence: _Sequence, start: int, count: int) -> np.ndarray | None:
        """The logits after ``count`` tokens of ``sequence`` from ``start``; None if the engine failed, which ends the answer."""
        try:
            return self._prompt.step(np.array([sequence.tokens[start : start + count]], np.int64))[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            sequence.answer.end("error", f"the engine failed: {error}")
            return None

    def _reads_again(self, sequence: _Sequence, cached: int) -> bool:
        """Whether the sequence, of which ``cached`` tokens are in the cache, is computed again (see ``decoding.decode``)."""
        if cached != self._model.recomputed_beyond:
            return False
        self._reading.append(sequence)
        return True

    def _regroup(self, arrived: list[tuple[Batch, _Sequence]]) -> None:
        """Remove from the groups the sequences that have left their slots, and add those that have ``arrived``."""
        joining: dict[Hashable, list[tuple[Batch, _Sequence]]] = {}
        for prompt, sequence in arrived:
            joining.setdefault(self._group_of(sequence), []).append((prompt, sequence))
        for key in dict.fromkeys((*self._groups, *joining)):
            group, new = self._groups.get(key) or _Group(Batch(self._model), []), joining.get(key, [])
            self._keep_prefixes(group)
            kept = {row: sequence for row, sequence in enumerate(group.rows) if sequence is not None and not sequence.ended}
            if len(kept) == len(group.rows) and not new:
                continue
            sequences = [*kept.values(), *(sequence for _, sequence in new)]
            longest = max((sequence.longest for sequence in sequences), default=0)
            order = group.batch.arrange(list(kept), [prompt for prompt, _ in new], longest)
            group.rows = [sequences[place] for place in order]
            self._groups[key] = group
            if not sequences:
                del self._groups[key]
        self._spare = [prompt for prompt, _ in arrived[:1]] or self._spare

    def _keep_prefixes(self, group: _Group) -> None:
        """Keep the caches of sequences that have ended."""
        if self._prefixes.most_bytes == 0:
            return
        for row, sequence in enumerate(group.rows):
            if sequence is not None and sequence.ended and sequence.answer.error is None:
                self._prefixes.keep(sequence.tokens[: group.batch.lengths[row]], group.batch.cache_of(row))

    def _group_of(self, sequence: _Sequence) -> Hashable:
        if not self._model.shares_steps:
            return id(sequence)
        beyond = self._model.recomputed_beyond
        return beyond is not None and len(sequence.tokens) - 1 > beyond

    def _decode(self, group: _Group) -> None:
        """One step of a group."""
        try:
            ids = [[sequence.tokens[-1]] for sequence in group.rows if sequence is not None]
            logits = group.batch.step(np.array(ids, np.int64))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            for sequence in group.rows:
                if sequence is not None:
                    sequence.answer.end("error", f"the engine failed: {error}")
            return
        for row, sequence in enumerate(group.rows):
            if sequence is None:
                continue
            sequence.take(logits[row])
            if not sequence.ended and self._reads_again(sequence, group.batch.lengths[row]):
                group.rows[row] = None

    def _end_all(self) -> None:
        for sequence in (*self._waiting, *self._in_slots()):
            sequence.answer.end("error", CLOSED)
        self._waiting.clear()
        self._reading.clear()
        self._groups.clear()
