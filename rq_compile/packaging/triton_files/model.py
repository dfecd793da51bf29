"""Serves the engine in this folder with Triton's python backend: text in, text out, token by token if requested.

All requests share one session and, through the scheduler, each of its steps. A thread for each request sends its answer.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Event, Thread
from time import monotonic
from typing import Any

import numpy as np
import triton_python_backend_utils as backend

from .batch import fitting_tokens
from .decoding import decode, open_session
from .limits import free_memory, session_threads
from .request_parameters import PARAMETERS as SAMPLING
from .request_parameters import messages_of, request_params
from .sampling import Choice, SamplingParams
from .scheduler import Answer, AnswerFailed, Scheduler
from .step_model import EngineSteps
from .text import TextStream, open_tokenizer

HERE = Path(__file__).absolute().parent
# Requests that are accepted beside those in slots, so that a slot that becomes free is used at once.
NEXT = 8
# Seconds between two looks at whether a client has gone. Each asks the server, which takes as long as to send a token.
PATIENCE = 0.2
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
    """``prompt``: text, token ids, or the messages of a conversation as JSON, if ``chat``."""

    prompt: str | list[int]
    chat: bool
    params: SamplingParams
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
        self.chat_template = self.read_chat_template()
        # An engine that cannot run must fail to load, not fail at the first request.
        next(decode(self.session, self.manifest, [0]))
        steps = EngineSteps(self.session, self.manifest)
        cache_tokens = min(fitting_tokens(steps.cache, slots, cache_bytes or free_memory() // 2), slots * longest)
        if cache_tokens == 0:
            raise MemoryError(f"there is no memory for the caches of {slots} requests; set a lower concurrent_requests")
        # Daemons, so that the process also ends when its server was killed, without a call of finalize.
        self.scheduler = Scheduler(steps, slots, longest, piece, cache_tokens, max_waiting=slots + NEXT)
        self.stepping = Thread(target=self.scheduler.run, name="scheduler", daemon=True)
        self.stepping.start()
        self.ended = Event()
        watched = args["model_name"], args["model_version"]
        self.watching = Thread(target=self.watch, args=watched, name="watch", daemon=True)
        self.watching.start()
        self.free = BoundedSemaphore(slots + NEXT)
        self.workers = ThreadPoolExecutor(slots + NEXT)

    def read_chat_template(self) -> Any:
        if self.manifest["chat_template"] is None:
            return None
        from .chat_template import ChatTemplate  # it needs jinja2, as only conversations do

        source = (HERE / self.manifest["chat_template"]["name"]).read_text(encoding="utf-8")
        return ChatTemplate(source, self.manifest["special_tokens"])

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
            try:
                unloaded = self.scheduler.busy and not backend.is_model_ready(name, version)
            except Exception:  # the server is being stopped, and waits for the answers itself
                return
            if unloaded:
                self.scheduler.close()
                return

    def read(self, request: Any) -> Request:
        """The parsed request, or a ValueError with a sentence for the client."""

        def given(name: str) -> Any:
            tensor = backend.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy().ravel()

        text, messages, ids, max_tokens, stream = map(given, ("text_input", "messages", "input_ids", "max_tokens", "stream"))
        if sum(prompt is not None for prompt in (text, messages, ids)) != 1:
            raise ValueError("give either text_input or input_ids, or messages")
        if ids is None:
            name, array = ("text_input", text) if text is not None else ("messages", messages)
            try:
                prompt = array[0].decode()
            except UnicodeDecodeError:
                raise ValueError(f"{name} is not UTF-8") from None
        else:
            prompt = ids.tolist()
        sampling = {name: given(name) for name in SAMPLING}
        params = request_params(sampling, self.manifest["sampling"], 64 if max_tokens is None else int(max_tokens[0]))
        params.check_tokens(self.manifest["vocabulary"])
        return Request(prompt, messages is not None, params, stream is not None and bool(stream[0]))

    def answer(self, request: Request, sender: Any) -> None:
        try:
            choices = wanted(self.scheduler.submit(self.prompt_ids(request), request.params), sender)
            pieces = self.pieces(choices, request.params.stop)
            for text, chosen in pieces if request.stream else [whole(list(pieces))]:
                sender.send(response(text, chosen, request.params.logprobs is not None))
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
            raise ValueError("the engine has no tokenizer; give input_ids instead of text")
        if not request.chat:
            return self.tokenizer.encode(request.prompt).ids
        if self.chat_template is None:
            raise ValueError("the engine has no chat template; give text_input instead of messages")
        prompt = self.chat_template.render(messages_of(request.prompt))
        return self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def pieces(self, choices: Iterator[Choice], stop: Sequence[str]) -> Iterator[tuple[str, list[Choice]]]:
        """Each token with the text that it completes, which is empty while a character is incomplete. Text that is still held
        back comes last, without a token. Without a tokenizer, there is no text, and stop strings have no effect."""
        if self.tokenizer is None:
            yield from (("", [choice]) for choice in choices)
            return
        stream = TextStream(self.tokenizer, stop=stop)
        for choice in choices:
            yield stream.push(choice.token), [choice]
            if stream.stopped is not None:
                return
        if held := stream.end():
            yield held, []


def whole(pieces: list[tuple[str, list[Choice]]]) -> tuple[str, list[Choice]]:
    return "".join(text for text, _ in pieces), [choice for _, choices in pieces for choice in choices]


def wanted(answer: Answer, sender: Any) -> Iterator[Choice]:
    """The tokens of the answer, as long as its client is there."""
    looked = monotonic()
    try:
        while True:
            choice: Choice | None = None
            try:
                if (choice := answer.next(PATIENCE)) is None:
                    return
            except TimeoutError:
                pass  # it waits for a slot
            if (now := monotonic()) > looked + PATIENCE:
                looked = now
                if sender.is_cancelled():
                    answer.cancel()
            if choice is not None and not answer.cancelled:
                yield choice
    finally:
        answer.cancel()


def response(text: str, choices: list[Choice], logprobs: bool) -> Any:
    tensors = [
        backend.Tensor("text_output", np.array([text.encode()], np.object_)),
        backend.Tensor("token_ids", np.array([choice.token for choice in choices], np.int64)),
    ]
    if logprobs:
        said = [{"token": choice.token, "logprob": choice.logprob, "top": choice.top} for choice in choices]
        tensors.append(backend.Tensor("logprobs", np.array([json.dumps(said).encode()], np.object_)))
    return backend.InferenceResponse(tensors)


def refuse(sender: Any, message: str, code: int) -> None:
    failure = backend.InferenceResponse(error=backend.TritonError(message, code))
    sender.send(failure, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
