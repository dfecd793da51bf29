"""A loaded engine that takes and returns text, and is compared with its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq_compile.api.arguments import File, Progress, Texts, contents, opened, silent
from rq_compile.engine.paths import manifest_path
from rq_compile.errors import UserError
from rq_compile.runtime.engine import Engine as _Engine
from rq_compile.standalone.sampling import Choice, SamplingParams

if TYPE_CHECKING:
    from rq_compile.architectures.model import Model
    from rq_compile.evaluation.schema import Bench, Evaluation
    from rq_compile.runtime.language_model import LanguageModel
    from rq_compile.standalone.chat_template import Messages
    from rq_compile.standalone.prefix_cache import PrefixCache


class Engine(_Engine):
    """A loaded engine: ``logits``, ``generate`` and ``loads`` take token ids, ``stream`` takes text, and ``chat`` takes a
    conversation; ``evaluate`` and ``bench``."""

    def stream(
        self,
        prompt: str,
        max_tokens: int = 64,
        on_token: Callable[[int], None] | None = None,
        *,
        sampling: SamplingParams | None = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> Iterator[str]:
        """Continue ``prompt`` and yield the new text piece by piece; a piece never ends inside a character.

        ``sampling``: how tokens are chosen and which strings end the text; by default, as the checkpoint's
        ``generation_config.json`` says (``default_sampling``). ``on_token`` is called with the id of every new token, before its
        text is yielded, and ``on_choice`` also with the log probabilities that ``sampling`` asks for.

        Raises:
            UserError: the engine has no tokenizer, or the prompt is empty.
            SamplingError: ``sampling`` names a token outside the vocabulary.
        """
        ids = self.tokenizer.encode(prompt).ids
        # After a prompt that decodes to itself the continuation does, too: with the space that its first word begins with.
        follows = not self.encoder_decoder and self.tokenizer.decode(ids) == prompt

        def chosen(choice: Choice) -> None:
            if on_token is not None:
                on_token(choice.token)
            if on_choice is not None:
                on_choice(choice)

        yield from self._stream(ids, ids if follows else (), max_tokens, sampling, chosen)

    def chat(
        self,
        messages: Messages,
        max_tokens: int = 512,
        *,
        sampling: SamplingParams | None = None,
        on_choice: Callable[[Choice], None] | None = None,
        prefix_cache: PrefixCache | None = None,
        **variables: Any,
    ) -> Iterator[str]:
        """Answer the conversation ``messages`` (``{"role": "user", "content": "..."}``) and yield the answer piece by piece.

        ``variables`` are further variables of the model's chat template, for example ``tools``. With a ``prefix_cache`` of this
        engine, the next turn of a conversation reads only its new tokens. The rest is as in ``stream``.

        Raises:
            UserError: the engine has no tokenizer or no chat template, or the template refuses the conversation.
            SamplingError: ``sampling`` names a token outside the vocabulary.
        """
        ids = self.chat_ids(messages, **variables)
        yield from self._stream(ids, (), max_tokens, sampling, on_choice or silent, prefix_cache)

    def _stream(
        self,
        ids: list[int],
        before: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams | None,
        on_choice: Callable[[Choice], None],
        prefix_cache: PrefixCache | None = None,
    ) -> Iterator[str]:
        from rq_compile.standalone.text import TextStream

        sampling = sampling or self.default_sampling
        text = TextStream(self.tokenizer, before, sampling.stop)
        for choice in self.choices(ids, max_tokens, sampling=sampling, prefix_cache=prefix_cache):
            on_choice(choice)
            if piece := text.push(choice.token):
                yield piece
            if text.stopped is not None:
                return
        if rest := text.end():
            yield rest

    def evaluate(
        self, reference: Model | File, texts: Texts, *, sequence_length: int = 256, progress: Progress | None = None
    ) -> Evaluation:
        """Perplexity, agreement, KL and LIS on held-out ``texts``, compared with the checkpoint ``reference`` in transformers.

        Raises:
            UserError: the engine was not compiled from the reference, or a text is too short.
        """
        from rq_compile.evaluation.evaluate import evaluate
        from rq_compile.evaluation.windows import cut
        from rq_compile.runtime.reference import Reference
        from rq_compile.targets.preflight import check_same_model

        model = opened(reference)
        check_same_model(self.manifest.plan, model, self.path)
        windows = [
            cut(name, text.read(), self.tokenizer, sequence_length, self.manifest.vocabulary)
            for name, text in contents(texts, model).items()
        ]
        return evaluate(self, Reference.load(model, self.threads), windows, reference_name=model.name, progress=progress)

    def bench(
        self,
        against: File | None = None,
        *,
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        rounds: int = 5,
        progress: Progress | None = None,
    ) -> Bench:
        """Tokens per second of prefill and decoding at batch 1, alternating with ``against``: another engine, or a checkpoint,
        which transformers runs in fp32. The ranks of an engine run a prompt each, and the speed is that of all together.

        Raises:
            UserError: see ``load`` and ``open``; or ``against`` does not run in as many processes as the engine.
        """
        from rq_compile.evaluation.bench import bench

        other = None if against is None else _language_model(Path(against), self.threads)
        if other is not None and self.ranks is not getattr(other, "ranks", None):
            raise UserError(
                f"{self.path} and {against} cannot be timed together, because only one of them runs in several processes; "
                "run bench on each by itself",
                2,
            )
        return bench(
            self,
            other,
            names=(self.path.name, Path(against).name if against is not None else ""),
            weights_sha256=self.manifest.weights.sha256,
            vocabulary=self.manifest.vocabulary,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=self.threads,
            ranks=self.ranks,
            progress=progress,
        )


def _language_model(path: Path, threads: int | None) -> LanguageModel:
    if path.suffix == ".onnx" or manifest_path(path).is_file():
        return Engine.load(path, threads)
    from rq_compile.runtime.reference import Reference

    return Reference.load(opened(path), threads)
