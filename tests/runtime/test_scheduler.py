"""The scheduler with a model whose answers follow from the tokens by a sum, so that every mixture of requests can be checked."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sum_model import CACHE, IN_PLACE, ROWS_FIRST, VOCABULARY, SumModel, answered

from rq_compile.standalone.answer import Answer, AnswerFailed, QueueFull, RequestRefused
from rq_compile.standalone.batch import _Tensor
from rq_compile.standalone.sampling import GREEDY, SamplingParams
from rq_compile.standalone.scheduler import Scheduler
from rq_compile.standalone.step_model import EngineSteps

pytestmark = pytest.mark.quick


@dataclass
class Client:
    prompt: list[int]
    most: int
    comes: int  # with this step
    leaves: int | None  # cancels after so many tokens
    answer: Answer | None = None
    got: list[int] = field(default_factory=list)
    first: int | None = None  # the step that gave the first token

    def listen(self, step: int) -> None:
        while self.answer is not None:
            try:
                choice = self.answer.next(timeout=0)
            except TimeoutError:
                return
            if choice is None:
                return
            self.first = step if self.first is None else self.first
            self.got.append(choice.token)
            if self.leaves is not None and len(self.got) > self.leaves:
                self.answer.cancel()


@st.composite
def clients(draw: st.DrawFn) -> list[Client]:
    number = draw(st.integers(1, 12))
    comes = sorted(draw(st.lists(st.integers(0, 25), min_size=number, max_size=number)))
    # Of few tokens, so that some prompts begin alike.
    prompts = st.lists(st.integers(0, draw(st.sampled_from([1, VOCABULARY - 1]))), min_size=1, max_size=20)
    leaves = st.one_of(st.none(), st.integers(0, 6))
    return [Client(draw(prompts), draw(st.integers(1, 15)), step, draw(leaves)) for step in comes]


@settings(max_examples=100)
@given(
    clients=clients(),
    slots=st.integers(1, 5),
    piece=st.integers(1, 24),
    room=st.integers(35, 120),
    beyond=st.one_of(st.none(), st.integers(1, 30)),
    shares=st.booleans(),
    whole=st.booleans(),
    prefix_bytes=st.sampled_from([0, 1000, 100_000]),
    cache=st.sampled_from([CACHE, IN_PLACE, ROWS_FIRST]),
)
def test_every_answer_is_the_answer_alone(
    clients: list[Client],
    slots: int,
    piece: int,
    room: int,
    beyond: int | None,
    shares: bool,
    whole: bool,
    prefix_bytes: int,
    cache: Sequence[Mapping[str, Any]],
) -> None:
    model = SumModel(beyond, shares, whole, reuses_prefixes=beyond is None, cache=cache)
    scheduler = Scheduler(model, slots, 35, piece, cache_tokens=room, max_waiting=12, prefix_bytes=prefix_bytes)
    for step in range(2000):
        for client in clients:
            if client.comes == step:
                client.answer = scheduler.submit(client.prompt, SamplingParams(temperature=0, max_tokens=client.most))
        scheduler.step()
        assert scheduler.running <= slots
        assert sum(len(group.rows) for group in scheduler._groups.values()) <= slots
        for client in clients:
            client.listen(step)
        if not scheduler.busy and step > 25:
            break
    assert not scheduler.busy, "an answer does not end"
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    for client in clients:
        expected = answered(client.prompt, client.most)
        assert client.answer is not None
        if client.answer.finish_reason == "cancelled":
            assert client.got == expected[: len(client.got)]
            assert client.leaves is not None
            assert client.leaves < len(client.got) <= client.leaves + 3  # a step may read a prompt, decode, and read again
        else:
            assert client.got == expected
            assert client.answer.finish_reason == ("length" if len(expected) == client.most else "stop")
    assert all(rows * tokens <= room for rows, tokens in model.steps)
    if not shares:
        assert {rows for rows, _ in model.steps} == {1}
    if not whole:
        assert max(model.pieces) <= piece
    firsts = [client.first for client in clients if client.first is not None]
    assert firsts == sorted(firsts), "first come, first served"


def submitted(scheduler: Scheduler, *prompts: list[int], most: int = 8) -> list[Answer]:
    return [scheduler.submit(prompt, SamplingParams(temperature=0, max_tokens=most, ignore_eos=False)) for prompt in prompts]


def finish(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.step()


def test_sequences_in_slots_share_every_step() -> None:
    model = SumModel()
    scheduler = Scheduler(model, slots=4, max_length=64)
    answers = submitted(scheduler, *([number] * (number + 1) for number in range(4)))
    finish(scheduler)
    assert [rows for rows, _ in model.steps] == [1] * 4 + [4] * 7
    assert [[choice.token for choice in answer] for answer in answers] == [answered([n] * (n + 1), 8) for n in range(4)]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("prompt", "most", "copied"), [([9] * 3, 5, [1]), ([9] * 30, 5, [0, 1]), ([9] * 3, 60, [1, 0])])
def test_a_sequence_takes_the_row_of_one_that_has_ended(
    prompt: list[int], most: int, copied: list[int], later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the other is copied only if the new sequence has more tokens, also if it comes ``later``, or if its row is the
    last one when the other ends."""
    rows: list[int] = []
    copy = _Tensor.copy

    def noted(tensor: _Tensor, *arguments: Any) -> None:
        if tensor.in_place:
            rows.append(arguments[4])
        copy(tensor, *arguments)

    monkeypatch.setattr(_Tensor, "copy", noted)
    model = SumModel(end_of_text=(), cache=ROWS_FIRST)
    scheduler = Scheduler(model, slots=2, max_length=64)
    (stays,) = submitted(scheduler, [3] * 10, most=54)
    (ends,) = submitted(scheduler, [4] * 10, most=5)
    while later and ends.finish_reason is None:
        scheduler.step()
    scheduler.step()
    (comes,) = submitted(scheduler, prompt, most=most)
    while comes.finish_reason is None:
        scheduler.step()
    assert rows == [0, 1, *copied]
    finish(scheduler)
    assert [[choice.token for choice in answer] for answer in (stays, ends, comes)] == [
        answered([3] * 10, 54, end=None),
        answered([4] * 10, 5, end=None),
        answered(prompt, most, end=None),
    ]


def test_a_long_prompt_does_not_stop_other_answers() -> None:
    model = SumModel()
    scheduler = Scheduler(model, slots=2, max_length=200, prompt_piece=10)
    (short,) = submitted(scheduler, [5], most=40)
    scheduler.step()
    (long,) = submitted(scheduler, [7] * 100)
    for number in range(9):
        scheduler.step()
        choice = short.next(timeout=0)
        assert choice is not None
        assert choice.token == answered([5], 40)[number]
    with pytest.raises(TimeoutError):
        long.next(timeout=0)
    finish(scheduler)
    assert [choice.token for choice in long] == answered([7] * 100, 8)


def test_short_prompts_are_read_between_the_same_two_steps() -> None:
    model = SumModel()
    scheduler = Scheduler(model, slots=8, max_length=64, prompt_piece=16)
    submitted(scheduler, *([number] * 4 for number in range(8)))
    scheduler.step()
    assert [rows for rows, _ in model.steps] == [1, 1, 1, 1, 4]
    scheduler.step()
    assert [rows for rows, _ in model.steps][5:] == [1, 1, 1, 1, 8]


@pytest.mark.parametrize(
    ("prompt", "most", "sentence"),
    [
        ([], 1, "the prompt is empty"),
        ([VOCABULARY], 1, r"outside the vocabulary \(0-96\)"),
        ([-1, 3], 1, "outside the vocabulary"),
        ([1] * 60, 5, "60 tokens of the prompt and max_tokens 5 exceed the longest sequence, 64"),
        ([1] * 64, None, "64 tokens of the prompt and max_tokens 1 exceed"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(prompt: list[int], most: int | None, sentence: str) -> None:
    scheduler = Scheduler(SumModel(), slots=2, max_length=64)
    with pytest.raises(RequestRefused, match=sentence):
        scheduler.submit(prompt, SamplingParams(max_tokens=most))
    assert not scheduler.busy


def test_a_request_that_the_cache_could_never_hold_is_refused_at_once() -> None:
    scheduler = Scheduler(SumModel(), slots=2, max_length=64, cache_tokens=20)
    with pytest.raises(RequestRefused, match="exceed the longest sequence, 20"):
        scheduler.submit([1] * 15, SamplingParams(max_tokens=6))


def test_a_full_queue_refuses_and_accepts_again_later() -> None:
    scheduler = Scheduler(SumModel(), slots=1, max_length=64, max_waiting=2)
    answers = submitted(scheduler, [1], [2])
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.submit([3], GREEDY)
    scheduler.step()
    answers += submitted(scheduler, [3])
    finish(scheduler)
    assert [[choice.token for choice in answer] for answer in answers] == [answered([n], 8) for n in (1, 2, 3)]


def test_without_max_tokens_an_answer_takes_the_room_that_is_left() -> None:
    scheduler = Scheduler(SumModel(), slots=1, max_length=30)
    answer = scheduler.submit([3, 4], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    finish(scheduler)
    assert len(list(answer)) == 28
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("failing", [1, 3, 5])
def test_an_error_ends_the_answers_of_its_step_alone(failing: int) -> None:
    """Step 1 is the first prompt, 3 the first decoding step, 5 the prompt that comes later."""
    model = SumModel(failing={failing})
    scheduler = Scheduler(model, slots=3, max_length=64)
    answers = submitted(scheduler, [1], [2])
    scheduler.step()
    scheduler.step()
    answers += submitted(scheduler, [3])
    finish(scheduler)
    failed = {1: [0], 3: [0, 1], 5: [2]}[failing]
    for number, answer in enumerate(answers):
        if number in failed:
            with pytest.raises(AnswerFailed, match="the engine failed: no luck"):
                list(answer)
            assert answer.finish_reason == "error"
        else:
            assert [choice.token for choice in answer] == answered([number + 1], 8)


def test_the_next_turn_of_a_conversation_reads_its_new_tokens() -> None:
    model = SumModel(end_of_text=())
    scheduler = Scheduler(model, slots=2, max_length=200, prefix_bytes=100_000)
    prompts = {number: [number] * 20 for number in (3, 4)}  # two conversations at a time
    for turn in range(3):
        answers = dict(zip(prompts, submitted(scheduler, *prompts.values()), strict=True))
        finish(scheduler)
        for number, answer in answers.items():
            said = [choice.token for choice in answer]
            assert said == answered(prompts[number], 8, end=None)
            # The last token of an answer is not read, because no token comes after it.
            assert answer.cached_tokens == (len(prompts[number]) - 4 if turn else 0)
            prompts[number] += [*said, 5, 6, 7]
    changed = [*prompts[3][:10], 9, *prompts[3][10:]]  # the state belongs to all tokens before
    (answer,) = submitted(scheduler, changed)
    finish(scheduler)
    assert ([choice.token for choice in answer], answer.cached_tokens) == (answered(changed, 8, end=None), 0)


@pytest.fixture
def running() -> Iterator[Scheduler]:
    scheduler = Scheduler(SumModel(), slots=4, max_length=2000, prompt_piece=16)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    yield scheduler
    scheduler.close()
    thread.join(20)
    assert not thread.is_alive()


def test_clients_in_threads_get_their_answers(running: Scheduler) -> None:
    results: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answer = running.submit([number, 5], SamplingParams(temperature=0, max_tokens=30))
        if number % 5 == 4:
            answer.cancel()
        results[number] = [choice.token for choice in answer]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for number, got in results.items():
        expected = answered([number, 5], 30)
        assert got == (expected[: len(got)] if number % 5 == 4 else expected)
    assert len(results) == 20


def test_closing_ends_every_answer_with_an_error(running: Scheduler) -> None:
    answers = [running.submit([number], SamplingParams(max_tokens=1900, ignore_eos=True)) for number in range(6)]
    answers[0].next(timeout=20)
    running.close()
    for answer in answers:
        with pytest.raises(AnswerFailed, match="unloaded before the answer was complete"):
            list(answer)
    with pytest.raises(AnswerFailed):
        running.submit([1], GREEDY)


def test_closing_a_scheduler_that_does_not_run() -> None:
    scheduler = Scheduler(SumModel(), slots=1, max_length=64)
    answers = submitted(scheduler, [1], [2])
    scheduler.step()
    scheduler.close()
    for answer in answers:
        with pytest.raises(AnswerFailed):
            list(answer)


class NoInputs:
    def get_inputs(self) -> list[Any]:
        return []

    get_overridable_initializers = io_binding = get_inputs

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits", shape=["batch", "kept", VOCABULARY])]


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ({}, True),
        ({"padding_changes_logits": False}, True),
        ({"padding_changes_logits": True}, False),
        ({"prefill_chunk": None}, False),
        ({"plan": {"layers": [{"slots": [{"expert": 0, "format": "int8"}, {"expert": 0, "format": "int4"}]}]}}, False),
    ],
)
def test_engines_whose_answers_would_depend_on_others_take_steps_alone(change: dict[str, Any], shares: bool) -> None:
    slots = [{"expert": 0, "format": "int8"}, {"expert": 0, "format": "int8"}]
    manifest = {"cache": [], "vocabulary": 8, "end_of_text": [], "prefill_chunk": 512, "plan": {"layers": [{"slots": slots}]}}
    session: Any = NoInputs()
    assert EngineSteps(session, manifest | change).shares_steps == shares
