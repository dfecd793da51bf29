"""Serves the engine in this folder with Triton's python backend: text in, text out, token by token if requested.

Each request has its own thread and its own KV cache; all requests share one session and its weights.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import triton_python_backend_utils as backend

from .decoding import decode, open_session, until_end
from .limits import session_threads
from .text import TextStream, open_tokenizer

HERE = Path(__file__).absolute().parent


@dataclass(frozen=True)
class Request:
    """``prompt``: text, or token ids."""

    prompt: str | list[int]
    max_tokens: int
    stream: bool


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        threads, requests, self.longest = (
            int(parameters[name]["string_value"])
            for name in ("intra_op_thread_count", "concurrent_requests", "max_sequence_length")
        )
        engine = next(HERE.glob("*.onnx"))
        self.manifest = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
        self.session = open_session(engine, self.manifest, HERE / "librq_moe.so", session_threads(threads))
        file = self.manifest["tokenizer"]
        self.tokenizer = None if file is None else open_tokenizer(HERE / file["name"])
        # An engine that cannot run must fail to load, not fail at the first request.
        next(decode(self.session, self.manifest, [0]))
        self.free = BoundedSemaphore(requests)
        self.workers = ThreadPoolExecutor(requests)

    def execute(self, requests: list) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked = self.read(request)
            except ValueError as error:
                refuse(sender, str(error), backend.TritonError.INVALID_ARG)
                continue
            # Further requests wait in Triton's queue, where its limits and metrics apply.
            self.free.acquire()
            self.workers.submit(self.answer, asked, sender)

    def finalize(self) -> None:
        self.workers.shutdown()

    def read(self, request: Any) -> Request:
        """The parsed request, or a ValueError with a sentence for the client."""

        def given(name: str) -> Any:
            tensor = backend.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy().ravel()

        text, ids, max_tokens, stream = map(given, ("text_input", "input_ids", "max_tokens", "stream"))
        if (text is None) == (ids is None):
            raise ValueError("give either text_input or input_ids")
        try:
            prompt = text[0].decode() if text is not None else ids.tolist()
        except UnicodeDecodeError:
            raise ValueError("text_input is not UTF-8") from None
        return Request(prompt, 64 if max_tokens is None else int(max_tokens[0]), stream is not None and bool(stream[0]))

    def answer(self, request: Request, sender: Any) -> None:
        try:
            prompt = self.prompt_ids(request)
            tokens = until_end(decode(self.session, self.manifest, prompt), request.max_tokens, self.manifest["end_of_text"])
            wanted = takewhile(lambda _: not sender.is_cancelled(), tokens)
            for text, ids in self.pieces(wanted) if request.stream else [self.whole(list(wanted))]:
                sender.send(response(text, ids))
            sender.send(flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except ValueError as error:
            refuse(sender, str(error), backend.TritonError.INVALID_ARG)
        except Exception as error:  # only the failed request must end
            refuse(sender, f"the engine failed: {error}", backend.TritonError.INTERNAL)
        finally:
            self.free.release()

    def prompt_ids(self, request: Request) -> list[int]:
        """The prompt's token ids, or a ValueError with a sentence for the client."""
        if isinstance(request.prompt, list):
            ids = request.prompt
        elif self.tokenizer is None:
            raise ValueError("the engine has no tokenizer; give input_ids instead of text_input")
        else:
            ids = self.tokenizer.encode(request.prompt).ids
        vocabulary = self.manifest["vocabulary"]
        if not ids:
            raise ValueError("the prompt is empty; give at least one token to continue")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(f"the prompt has a token outside the vocabulary (0-{vocabulary - 1})")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}; ask for at least 1")
        if len(ids) + request.max_tokens > self.longest:
            raise ValueError(
                f"{len(ids)} tokens of the prompt and max_tokens {request.max_tokens} exceed max_sequence_length {self.longest}"
            )
        return ids

    def pieces(self, tokens: Iterator[int]) -> Iterator[tuple[str, list[int]]]:
        """Each token with the text that it completes, which is empty while a character is incomplete. Text that is still held
        back comes last, without a token."""
        if self.tokenizer is None:
            yield from (("", [token]) for token in tokens)
            return
        stream = TextStream(self.tokenizer)
        for token in tokens:
            yield stream.push(token), [token]
        if held := stream.end():
            yield held, []

    def whole(self, tokens: list[int]) -> tuple[str, list[int]]:
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens), tokens


def response(text: str, ids: list[int]) -> Any:
    return backend.InferenceResponse(
        [
            backend.Tensor("text_output", np.array([text.encode()], np.object_)),
            backend.Tensor("token_ids", np.array(ids, np.int64)),
        ]
    )


def refuse(sender: Any, message: str, code: int) -> None:
    failure = backend.InferenceResponse(error=backend.TritonError(message, code))
    sender.send(failure, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
