"""Serves the engine in this folder with Triton's python backend: text in, text out, token by token if requested.

All requests share one session and, through the scheduler, each of its steps. A thread for each request sends its answer.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Event, Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as backend

from .batch import fitting_tokens
from .decoding import decode, open_session
from .limits import free_memory, session_threads
from .sampling import SamplingParams
from .scheduler import Answer, AnswerFailed, Scheduler
from .step_model import EngineSteps
from .text import TextStream, open_tokenizer

HERE = Path(__file__).absolute().parent
# Requests that are accepted beside those in slots, so that a slot that becomes free is used at once.
NEXT = 8
# Seconds between two looks at whether a client that waits for a slot has gone.
PATIENCE = 1.0
# Seconds between two looks at whether the model is being unloaded.
WATCH = 1.0
# The parameters of config.pbtxt and their values where an older one lacks them.
PARAMETERS = {
    "intra_op_thread_count": 0,
    "concurrent_requests": 8,
    "max_sequence_length": 4096,
    "prompt_piece": 128,
    "max_cache_bytes": 0,
}


@dataclass(frozen=True)
class Request:
    """``prompt``: text, or token ids."""

    prompt: str | list[int]
    max_tokens: int
    stream: bool


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        threads, slots, longest, piece, cache_bytes = (
            int(parameters[name]["string_value"]) if name in parameters else default for name, default in PARAMETERS.items()
        )
        engine = next(HERE.glob("*.onnx"))
        self.manifest = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
        self.session = open_session(engine, self.manifest, HERE / "librq_moe.so", session_threads(threads))
        file = self.manifest["tokenizer"]
        self.tokenizer = None if file is None else open_tokenizer(HERE / file["name"])
        # An engine that cannot run must fail to load, not fail at the first request.
        next(decode(self.session, self.manifest, [0]))
        steps = EngineSteps(self.session, self.manifest)
        cache_tokens = min(fitting_tokens(steps.cache, slots, cache_bytes or free_memory() // 2), slots * longest)
        if cache_tokens == 0:
            raise MemoryError(f"there is no memory for the caches of {slots} requests; set a lower concurrent_requests")
        self.scheduler = Scheduler(steps, slots, longest, piece, cache_tokens, max_waiting=slots + NEXT)
        self.stepping = Thread(target=self.scheduler.run, name="scheduler")
        self.stepping.start()
        self.ended = Event()
        self.watching = Thread(target=self.watch, args=(args["model_name"], args["model_version"]), name="watch")
        self.watching.start()
        self.free = BoundedSemaphore(slots + NEXT)
        self.workers = ThreadPoolExecutor(slots + NEXT)

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
        self.ended.set()
        self.scheduler.close()
        self.watching.join()
        self.stepping.join()
        self.workers.shutdown()

    def watch(self, name: str, version: str) -> None:
        """End all answers when the model is being unloaded: the server waits for them before it calls ``finalize``."""
        while hasattr(backend, "is_model_ready") and not self.ended.wait(WATCH):
            # Before the model is ready, no request runs.
            if self.scheduler.busy and not backend.is_model_ready(name, version):
                self.scheduler.close()
                return

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
            params = SamplingParams(temperature=0, max_tokens=self.most_tokens(request))
            tokens = wanted(self.scheduler.submit(self.prompt_ids(request), params), sender)
            for text, ids in self.pieces(tokens) if request.stream else [self.whole(list(tokens))]:
                sender.send(response(text, ids))
            sender.send(flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except ValueError as error:
            refuse(sender, str(error), backend.TritonError.INVALID_ARG)
        except AnswerFailed as error:
            refuse(sender, str(error), backend.TritonError.UNAVAILABLE)
        except Exception as error:  # only the failed request must end
            refuse(sender, f"the engine failed: {error}", backend.TritonError.INTERNAL)
        finally:
            self.free.release()

    def prompt_ids(self, request: Request) -> list[int]:
        """The prompt's token ids, or a ValueError with a sentence for the client."""
        if isinstance(request.prompt, list):
            return request.prompt
        if self.tokenizer is None:
            raise ValueError("the engine has no tokenizer; give input_ids instead of text_input")
        return self.tokenizer.encode(request.prompt).ids

    def most_tokens(self, request: Request) -> int:
        """``max_tokens``, or a ValueError with a sentence for the client."""
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}; ask for at least 1")
        return request.max_tokens

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


def wanted(answer: Answer, sender: Any) -> Iterator[int]:
    """The tokens of the answer, as long as its client is there."""
    while True:
        try:
            choice = answer.next(PATIENCE)
        except TimeoutError:
            choice = ...
        if choice is None:
            return
        if sender.is_cancelled():
            answer.cancel()
        elif choice is not ...:
            yield choice.token


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
