"""An engine as a model of lm-evaluation-harness (``--model rq_compile``), scored like transformers' models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    DEFAULT_MAX_LENGTH,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from rq_compile.checkpoint.tokenizer import check_known
from rq_compile.errors import UserError, reason
from rq_compile.evaluation.divergence import log_softmax
from rq_compile.evaluation.windows import MAX_LOGITS
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.answer import Answer, RequestRefused
from rq_compile.standalone.sampling import SamplingParams
from rq_compile.standalone.scheduler import SLOTS, Scheduler

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Scored = tuple[float, bool]
# Number of positions whose float64 log-probabilities are held at a time.
POSITIONS = 64
# Options that do not affect a greedy answer, and values of other options that change nothing.
WITHOUT_EFFECT = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


class EngineLM(TemplateLM):
    """The model arguments of ``--model_args``:

    ``engine``: the ``.onnx`` file. ``threads``: by default ONNX Runtime's choice. ``batch_size``: number of sequences that are
    scored or continued together; "auto" scores as many as keep the logits under 256 MiB, and continues 8. ``max_length``:
    positions of a sequence; by default the model's context length. ``max_gen_toks``: tokens to generate if a task does not say.
    ``prefix_token_id``: the token before a text without context; by default the token with which the tokenizer begins a text,
    otherwise the end-of-text token. The engine runs on the CPU.

    Generation is greedy. If the copies of each expert have one format, the scores of a request do not depend on the other
    requests in its batch, except for rounding.

    Raises:
        UserError: the engine cannot be loaded, is an encoder-decoder or has no tokenizer, or an argument is unknown.
    """

    def __init__(
        self,
        engine: str | Path,
        threads: int | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        device: str | None = None,  # the harness always passes this argument and the next,
        max_batch_size: int | None = None,  # which have no effect on a CPU
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise UserError(f"--model rq_compile has no argument {name}; leave it out of --model_args", 2)
        self._engine = Engine.load(Path(str(engine)), threads)
        if self._engine.encoder_decoder:
            raise UserError(f"{engine} is an encoder-decoder, which the harness cannot score here; give a decoder-only engine", 2)
        manifest = self._engine.manifest
        self._tokenizer = self._engine.tokenizer
        self._batch_size = _sequences(batch_size)
        self._max_gen_toks = int(max_gen_toks)
        self._max_length = int(max_length or manifest.context_length or DEFAULT_MAX_LENGTH)
        self._in_chat = False
        self._prefix = manifest.start_of_text if prefix_token_id is None else int(prefix_token_id)

    @property
    def eot_token_id(self) -> int:
        """
        Raises:
            UserError: the model has no end-of-text token.
        """
        ends = self._engine.manifest.end_of_text
        if not ends:
            raise UserError(f"{self._engine.path} has no end-of-text token; give prefix_token_id=ID in --model_args", 2)
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._prefix is None else self._prefix

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def batch_size(self) -> int | str:
        return self._batch_size or "auto"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. By default, they include the tokens around a text, unless the text itself begins with these or a chat
        template has written it."""
        if add_special_tokens is None:
            prefix = self._text(self.prefix_token_id)
            add_special_tokens = not self._in_chat and not (prefix and string.startswith(prefix))
        ids = self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        check_known(repr(string[:40]), np.asarray(ids), self._engine.manifest.vocabulary)
        return ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness's cache of requests."""
        tokenizer = self._engine.manifest.tokenizer
        return "" if tokenizer is None else tokenizer.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        """
        Raises:
            UserError: the engine has none, or another one is named.
        """
        if not chat_template:
            return ""
        if isinstance(chat_template, str):
            raise UserError(f"an engine has one chat template and no {chat_template!r}; leave the name out", 2)
        if self._engine.manifest.chat_template is None:
            raise UserError(f"{self._engine.path} has no chat template; leave --apply_chat_template out", 2)
        self._in_chat = True
        return (self._engine.path.parent / self._engine.manifest.chat_template.name).read_text(encoding="utf-8")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation. Without ``add_generation_prompt``, it ends within the last message.

        Raises:
            UserError: the template refuses the conversation.
        """
        last = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self._engine.chat_prompt(chat_history, **last)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """For each (key, context, continuation): the log-likelihood of the continuation in nats, and whether it is greedy.

        A context that is too long loses its beginning. Requests that differ only in their last token share a run; an empty
        continuation needs no run.

        Raises:
            UserError: a continuation does not fit in ``max_length``.
        """
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_key, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"the task scores a text of {len(continuation)} tokens, but max_length is {self.max_length}; "
                    "give a longer max_length in --model_args, or another task",
                    2,
                )
            if continuation:
                sharing[tuple([*context, *continuation][-(self.max_length + 1) : -1])].append(index)

        scores: list[Scored] = [(0.0, True)] * len(requests)
        progress = tqdm(total=sum(map(len, sharing.values())), disable=disable_tqdm, desc="Scoring")
        for batch in self._batches(list(sharing)):
            for sequence, logits in zip(batch, self._logits(batch), strict=True):
                for index in sharing[sequence]:
                    key, _context, continuation = requests[index]
                    scores[index] = _score(logits[len(sequence) - len(continuation) : len(sequence)], continuation)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, scores[index])
                progress.update(len(sharing[sequence]))
        progress.close()
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text in nats. A text longer than ``max_length`` is cut into disjoint windows. Each window
        follows as much of the preceding text as fits."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _greedy) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first stop string, the end of the text or ``max_gen_toks``.

        Raises:
            UserError: a task asks for sampling, beams or penalties, or for so many tokens that no prompt fits.
        """
        if not requests:
            return []
        scheduler = self._engine.scheduler(self._batch_size or SLOTS, self.max_length, max_waiting=len(requests))
        continuations = [self._continuation(scheduler, *request.args) for request in requests]
        running = dict(enumerate(continuations))
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        while running:
            scheduler.step()
            for number in [number for number, continuation in running.items() if continuation.has_ended()]:
                text = self._text_of(running.pop(number))
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                progress.update()
        progress.close()
        return [self._text_of(continuation) for continuation in continuations]

    def _continuation(self, scheduler: Scheduler, context: str, options: dict[str, Any]) -> _Continuation:
        tokens, until = self._greedy_options(options)
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - tokens) :]
        try:
            answer = scheduler.submit(prompt, SamplingParams(temperature=0, max_tokens=tokens))
        except RequestRefused as error:
            raise UserError(
                f"a request does not fit into the memory ({reason(error)}); give a lower batch_size or max_length in --model_args"
            ) from error
        return _Continuation(answer, until, partial(self.tok_decode, skip_special_tokens=False))

    def _text_of(self, continuation: _Continuation) -> str:
        return postprocess_generated_text(self.tok_decode(continuation.tokens), continuation.until, think_end_token=None)

    def _greedy_options(self, options: dict[str, Any]) -> tuple[int, list[str]]:
        """The maximum number of tokens to generate, and the stop strings."""
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        if options["do_sample"]:
            raise UserError("the task asks for sampling, but engines generate greedily; add --gen_kwargs do_sample=False", 2)
        for name, value in options.items():
            if name not in WITHOUT_EFFECT and NEUTRAL.get(name, ...) != value:
                raise UserError(f"the task uses {name}={value}, but engines only generate greedily; choose another task", 2)
        tokens = options["max_gen_toks"]
        if tokens >= self.max_length:
            raise UserError(
                f"{tokens} tokens to generate leave no room for a prompt in max_length {self.max_length}; "
                "add --gen_kwargs max_gen_toks=N",
                2,
            )
        ends = self._engine.manifest.end_of_text
        until = handle_stop_sequences(options["until"], eos=self._text(ends[0]) if ends else None)
        return tokens, [stop for stop in until if stop]

    def _text(self, token: int) -> str:
        return self.tok_decode([token], skip_special_tokens=False)

    def _batches(self, sequences: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Batches, longest sequences first: if memory is too small, this fails at once, and neighbours need little padding."""
        sequences.sort(key=len, reverse=True)
        start = 0
        while start < len(sequences):
            size = self._batch_size or max(1, MAX_LOGITS // (len(sequences[start]) * self._engine.manifest.vocabulary))
            yield sequences[start : start + size]
            start += size

    def _logits(self, sequences: list[tuple[int, ...]]) -> np.ndarray:
        """Logits fp32 ``[sequences, longest, vocabulary]``, padded on the right."""
        longest = max(map(len, sequences))
        ids = np.asarray([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], np.int64)
        mask = np.asarray([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences], np.int64)
        return self._engine.logits(ids, mask)


class _Continuation:
    """An answer up to the first of the strings ``until``."""

    def __init__(self, answer: Answer, until: list[str], decode: Callable[[list[int]], str]) -> None:
        self.tokens: list[int] = []
        self.until = until
        self._answer = answer
        self._decode = decode
        # A stop string spans at most as many tokens as it has bytes. The first tokens of a piece may decode differently in
        # context.
        self._reach = max((len(stop.encode()) for stop in until), default=0) + 2

    def has_ended(self) -> bool:
        """Take the tokens that have come. Whether there will be no more."""
        with suppress(TimeoutError):
            while (choice := self._answer.next(timeout=0)) is not None:
                self.tokens.append(choice.token)
                ending = self._decode(self.tokens[-self._reach :])
                if any(stop in ending for stop in self.until):
                    self._answer.cancel()
                    return True
            return True
        return False


def _score(logits: np.ndarray, targets: Sequence[int]) -> Scored:
    """The score of target tokens with logits ``[positions, vocabulary]``."""
    total, greedy = 0.0, True
    for start in range(0, len(targets), POSITIONS):
        piece, wanted = logits[start : start + POSITIONS], np.asarray(targets[start : start + POSITIONS])
        total += float(log_softmax(piece)[np.arange(len(wanted)), wanted].sum())
        greedy = greedy and bool((piece.argmax(axis=-1) == wanted).all())
    return total, greedy


def _sequences(batch_size: int | str) -> int | None:
    """
    Raises:
        UserError: it is neither a number nor "auto", for which the result is None.
    """
    if str(batch_size).split(":")[0] == "auto":
        return None
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"--batch_size {batch_size} is not a number of sequences; give 1 or more, or auto", 2)
    return int(batch_size)
