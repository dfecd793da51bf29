"""Serves the engine in this folder with Triton's python backend: text in, text out, token by token if requested.

All requests share one session and, through the scheduler, each of its steps. One thread sends all answers: a thread for each
answer would take the processor from the steps, and more so the more clients there are.
"""

import faulthandler
import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import _exit, getppid
from pathlib import Path
from threading import BoundedSemaphore, Event, Thread
from time import monotonic
from typing import Any

import numpy as np
import triton_python_backend_utils as backend

from .answer import Answer, AnswerFailed
from .batch import fitting_tokens
from .decoding import decode, open_session
from .inbox import Inbox
from .limits import free_memory, session_threads
from .request_parameters import PARAMETERS as SAMPLING
from .request_parameters import messages_of, request_params
from .sampling import Choice, SamplingParams
from .scheduler import Scheduler
from .step_model import EngineSteps
from .text import TextStream, open_tokenizer

HERE = Path(__file__).absolute().parent
# Requests that are accepted beside those in slots, so that a slot that becomes free is used at once.
NEXT = 8
# Microseconds for which a thread of the engine keeps its processor between two ops. ONNX Runtime's default lasts into the time in
# which the server needs the processor, to send the tokens.
SPIN = 100
# Seconds between two looks at whether a client has gone. Each asks the server, which takes as long as to send a token.
PATIENCE = 0.2
# Seconds between two looks at whether the model is being unloaded.
WATCH = 1.0
# Seconds without a run of ``watch`` after which the process ends.
SILENCE = 60.0
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
        self.session = open_session(engine, self.manifest, HERE / "librq_moe.so", session_threads(threads), SPIN)
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
        self.open: set[Reply] = set()
        self.inbox: Inbox[Reply] = Inbox()
        self.sending = Thread(target=self.send_answers, name="send", daemon=True)
        self.sending.start()

    def read_chat_template(self) -> Any:
        if self.manifest["chat_template"] is None:
            return None
        from .chat_template import ChatTemplate  # it needs jinja2, as only conversations do

        source = (HERE / self.manifest["chat_template"]["name"]).read_text(encoding="utf-8")
        return ChatTemplate(source, self.manifest["special_tokens"])

    def execute(self, requests: list) -> None:
        for request in requests:
            reply = Reply(request.get_response_sender(), self.tokenizer)
            # Further requests wait in Triton's queue, where its limits and metrics apply.
            self.free.acquire()
            self.open.add(reply)
            try:
                asked = self.read(request)
                reply.expect(asked)
                reply.answer = self.scheduler.submit(self.prompt_ids(asked), asked.params, self.inbox.listener(reply))
            except Exception as error:
                reply.refuse(error)
                self.forget(reply)

    def forget(self, reply: "Reply") -> None:
        self.open.discard(reply)
        self.free.release()

    def send_answers(self) -> None:
        """Send to each client what has arrived for it, until the model is unloaded."""
        looked = monotonic()
        while (arrived := self.inbox.take(PATIENCE)) is not None:
            for reply, (answer, choices) in arrived.items():
                if reply.add(answer, choices):
                    self.forget(reply)
            if (now := monotonic()) > looked + PATIENCE:
                looked = now
                for reply in self.open.copy():
                    reply.look()

    def finalize(self) -> None:
        self.ended.set()
        self.scheduler.close()
        self.watching.join()
        self.stepping.join()
        self.inbox.close()
        self.sending.join()

    def watch(self, name: str, version: str) -> None:
        """End all answers when the model is being unloaded: the server waits for them before it calls ``finalize``.

        Also end the process when its server was killed. Triton's own way out may wait for a lock in memory that it shared with
        the server. A thread that waits so can keep Python's lock: then this one does not run, and faulthandler ends the process.
        """
        server, asking = getppid(), hasattr(backend, "is_model_ready")
        while not self.ended.wait(WATCH):
            faulthandler.dump_traceback_later(SILENCE, exit=True)
            if getppid() != server:
                _exit(1)
            try:
                # Before the model is ready, no request runs.
                unloaded = asking and self.scheduler.busy and not backend.is_model_ready(name, version)
            except Exception:  # the server is being stopped, and waits for the answers itself
                asking = False
                continue
            if unloaded:
                self.scheduler.close()
                asking = False
        faulthandler.cancel_dump_traceback_later()

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


class Reply:
    """What a client gets: a response for each token, or for all tokens that have arrived together; or one response with all.

    ``answer``: None until the scheduler has the request. Without a tokenizer there is no text, and stop strings have no effect.
    """

    def __init__(self, sender: Any, tokenizer: Any) -> None:
        self.answer: Answer | None = None
        self._sender, self._tokenizer = sender, tokenizer
        self._text, self._choices = "", list[Choice]()
        self._ended = False

    def expect(self, request: Request) -> None:
        self._streams, self._logprobs = request.stream, request.params.logprobs is not None
        self._decoded = None if self._tokenizer is None else TextStream(self._tokenizer, stop=request.params.stop)

    def look(self) -> None:
        """Cancel the answer if its client has gone."""
        if self.answer is not None and not self.answer.cancelled and self._sender.is_cancelled():
            self.answer.cancel()

    def add(self, answer: Answer, choices: Sequence[Choice | None]) -> bool:
        """Take the next tokens of ``answer``, and None at its end. Returns whether that was the end."""
        if not self._ended:
            try:
                self._add(answer, choices)
            except Exception as error:  # only the failed request must end
                answer.cancel()
                self.refuse(error)
        return None in choices

    def refuse(self, error: Exception) -> None:
        """End with an error."""
        self._ended = True
        code = backend.TritonError.UNAVAILABLE if isinstance(error, AnswerFailed) else backend.TritonError.INTERNAL
        code = backend.TritonError.INVALID_ARG if isinstance(error, ValueError) else code
        message = str(error) if isinstance(error, ValueError | AnswerFailed) else f"the engine failed: {error}"
        failure = backend.InferenceResponse(error=backend.TritonError(message, code))
        self._sender.send(failure, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _add(self, answer: Answer, choices: Sequence[Choice | None]) -> None:
        for choice in choices:
            if choice is None:
                if answer.error is not None:
                    raise AnswerFailed(answer.error)
                self._text += self._decoded.end() if self._decoded is not None else ""
                self._ended = True
            else:
                self._choices.append(choice)
                self._text += self._decoded.push(choice.token) if self._decoded is not None else ""
                self._ended = self._decoded is not None and self._decoded.stopped is not None
            if self._ended:
                answer.cancel()
                break
        if answer.finish_reason == "cancelled" or (answer.cancelled and not self._ended):  # the client has gone
            self._text, self._choices, self._streams = "", [], True
        if (self._streams and (self._choices or self._text)) or (self._ended and not self._streams):
            self._sender.send(response(self._text, self._choices, self._logprobs))
            self._text, self._choices = "", []
        if self._ended:
            self._sender.send(flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def response(text: str, choices: list[Choice], logprobs: bool) -> Any:
    tensors = [
        backend.Tensor("text_output", np.array([text.encode()], np.object_)),
        backend.Tensor("token_ids", np.array([choice.token for choice in choices], np.int64)),
    ]
    if logprobs:
        said = [{"token": choice.token, "logprob": choice.logprob, "top": choice.top} for choice in choices]
        tensors.append(backend.Tensor("logprobs", np.array([json.dumps(said).encode()], np.object_)))
    return backend.InferenceResponse(tensors)
