"""The endpoints of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from time import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rq_compile.errors import UserError
from rq_compile.serving.answers import Answers, ChatCompletions, Completions
from rq_compile.serving.metrics import Metrics
from rq_compile.serving.refusals import Refusal
from rq_compile.serving.reply import Piece, Reply
from rq_compile.serving.requests import ChatRequest, CompletionRequest, Request, parsed
from rq_compile.serving.served_model import ServedModel
from rq_compile.standalone.answer import Answer, AnswerFailed, QueueFull, RequestRefused
from rq_compile.standalone.sampling import SamplingError

# Bytes of a request.
LARGEST_BODY = 4 << 20
Handler = Callable[[HttpRequest], Awaitable[Response]]


def application(model: ServedModel, largest_body: int = LARGEST_BODY) -> Starlette:
    """The server's application, which starts ``model`` and closes it at the end."""
    server = _Server(model, largest_body)

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        model.start()
        try:
            yield
        finally:
            await asyncio.to_thread(model.close)

    routes = [
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.exposed_metrics, methods=["GET"]),
        Route("/v1/models", server.models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.one_model, methods=["GET"]),
        Route("/v1/completions", server.counted(server.completions), methods=["POST"]),
        Route("/v1/chat/completions", server.counted(server.chat_completions), methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=running, exception_handlers={HTTPException: _http_error, Exception: _failed})


class _Server:
    def __init__(self, model: ServedModel, largest_body: int) -> None:
        self.model = model
        self.metrics = Metrics(model)
        self._largest_body = largest_body
        self._started = int(time())

    async def health(self, http: HttpRequest) -> Response:
        return Response(status_code=200 if self.model.healthy else 503)

    async def exposed_metrics(self, http: HttpRequest) -> Response:
        return self.metrics.exposed()

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        return JSONResponse(self._described()) if name == self.model.name else self._unknown(name).response()

    def _described(self) -> dict[str, Any]:
        length = self.model.scheduler.max_length
        return {
            "id": self.model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "rq-compile",
            "max_model_len": length,
        }

    def _unknown(self, name: str) -> Refusal:
        return Refusal(404, f"there is no model {name[:100]!r}; use {self.model.name!r}", "model", "model_not_found")

    def counted(self, handle: Handler) -> Handler:
        """``handle`` with refusals as responses, counted by status. A request whose client has gone is counted as cancelled."""

        async def counting(http: HttpRequest) -> Response:
            try:
                response = await handle(http)
            except Refusal as refusal:
                response = refusal.response()
            except (ClientDisconnect, _Gone):
                self.metrics.cancelled.inc()
                return Response(status_code=499)
            self.metrics.requests.labels(http.url.path, response.status_code).inc()
            return response

        return counting

    async def completions(self, http: HttpRequest) -> Response:
        request: CompletionRequest = self._checked(parsed(CompletionRequest, await self._body(http)))
        prompts = await asyncio.to_thread(lambda: [self.model.prompt_ids(prompt) for prompt in request.prompts])
        echoed: list[str] = []
        if request.echo:
            texts = [self.model.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt for prompt in request.prompts]
            echoed = [text for text in texts for _ in range(request.n)]
        form = Completions(self.model.name, self.model.token_text, request.logprobs is not None, request.return_token_ids, echoed)
        return await self._answered(http, request, prompts, form)

    async def chat_completions(self, http: HttpRequest) -> Response:
        request: ChatRequest = self._checked(parsed(ChatRequest, await self._body(http)))
        if "messages" in request.chat_template_kwargs:
            raise Refusal(400, "chat_template_kwargs cannot have the key messages; leave it out", "chat_template_kwargs")
        variables = {
            **request.chat_template_kwargs,
            "add_generation_prompt": request.add_generation_prompt,
            "continue_final_message": request.continue_final_message,
        }
        try:
            prompt = await asyncio.to_thread(self.model.chat_ids, request.conversation, **variables)
        except UserError as error:
            raise Refusal(400, str(error), "messages") from error
        form = ChatCompletions(self.model.name, self.model.token_text, request.logprobs, request.return_token_ids)
        return await self._answered(http, request, [prompt], form)

    async def _body(self, http: HttpRequest) -> bytes:
        """
        Raises:
            Refusal: it is too large.
        """
        refusal = Refusal(413, f"the request has more than {self._largest_body} bytes; send a shorter one")
        stated = http.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > self._largest_body:
            raise refusal
        body = bytearray()
        async for piece in http.stream():
            body += piece
            if len(body) > self._largest_body:
                raise refusal
        return bytes(body)

    def _checked(self, request: Any) -> Any:
        if request.model not in (None, self.model.name):
            raise self._unknown(request.model)
        return request

    def _submit(self, request: Request, prompts: Sequence[list[int]]) -> Reply:
        """All choices of all prompts, or none of them."""
        wanted = len(prompts) * request.n
        if wanted > self.model.most_choices:
            message = f"the request asks for {wanted} answers; ask for at most {self.model.most_choices} (n times prompts)"
            raise Refusal(400, message, "n")
        reply = Reply()
        try:
            for prompt in prompts:
                for choice in range(request.n):
                    self.model.submit(prompt, request.params(self.model.defaults, choice), reply)
        except (SamplingError, RequestRefused) as error:
            raise Refusal(400, str(error)) from error
        except QueueFull as error:
            raise Refusal(429, str(error)) from error
        except AnswerFailed as error:
            raise Refusal(503, str(error)) from error
        finally:
            if len(reply.answers) < wanted:
                reply.cancel()
        return reply

    async def _answered(self, http: HttpRequest, request: Request, prompts: Sequence[list[int]], form: Answers) -> Response:
        reply = self._submit(request, prompts)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        pieces = self._timed(reply)
        if request.stream:
            events = self._events(pieces, form, reply.answers, request)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        found: list[list[Piece]] = [[] for _ in reply.answers]

        async def collect() -> None:
            async for piece in pieces:
                found[piece.index].append(piece)

        try:
            await _unless_gone(http, collect())
        except AnswerFailed as error:
            raise Refusal(503 if not self.model.healthy else 500, str(error)) from error
        written = sum(len(piece.choices) for ones in found for piece in ones)
        return JSONResponse(form.whole(found, _usage(reply.answers[:: request.n], written)))

    async def _timed(self, reply: Reply) -> AsyncGenerator[Piece, None]:
        watches = [self.metrics.watch() for _ in reply.answers]
        pieces = reply.pieces()
        try:
            async for piece in pieces:
                for _ in piece.choices:
                    watches[piece.index].token()
                if piece.finish_reason is not None:
                    watches[piece.index].end()
                yield piece
        finally:
            await pieces.aclose()

    async def _events(
        self, pieces: AsyncGenerator[Piece, None], form: Answers, answers: Sequence[Answer], request: Request
    ) -> AsyncIterator[str]:
        written, complete = 0, False
        try:
            for chunk in form.first(len(answers)):
                yield _event(chunk)
            async for piece in pieces:
                written += len(piece.choices)
                if (said := form.piece(piece)) is not None:
                    yield _event(said)
            if request.with_usage:
                yield _event(form.usage(_usage(answers[:: request.n], written)))
            complete = True
            yield "data: [DONE]\n\n"
        except AnswerFailed as error:
            complete = True
            yield _event(Refusal(500, str(error)).body)
            yield "data: [DONE]\n\n"
        finally:
            await pieces.aclose()
            if not complete:
                self.metrics.cancelled.inc()


class _Gone(Exception):
    """The client has disconnected."""


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work`` until the client disconnects.

    Raises:
        _Gone: it has.
    """

    async def until_gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        await working
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _usage(answers: Sequence[Answer], written: int) -> dict[str, Any]:
    """``answers``: one for each prompt. ``written``: tokens of all answers."""
    read = sum(len(answer.prompt_ids) for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def _failed(http: HttpRequest, error: Exception) -> Response:
    return Refusal(500, "the server failed; its log says where").response()


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    return Refusal(status, f"{http.method} {http.url.path[:100]} is not an endpoint; see /v1/models").response()
