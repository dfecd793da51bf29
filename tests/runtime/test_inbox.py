"""An inbox gives the tokens of many answers to one thread, each answer's in their order and with its end."""

import threading
from functools import partial
from time import monotonic

import pytest
from test_scheduler import SumModel, answered

from rq_compile.standalone import inbox as inbox_module
from rq_compile.standalone.answer import Answer
from rq_compile.standalone.inbox import Inbox
from rq_compile.standalone.sampling import GREEDY, Choice, SamplingParams
from rq_compile.standalone.scheduler import Scheduler

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("pauses", [0.0, 0.003])
def test_every_answer_arrives_whole(pauses: float) -> None:
    inbox: Inbox[int] = Inbox()
    scheduler = Scheduler(SumModel(), slots=3, max_length=64)
    stepping = threading.Thread(target=scheduler.run)
    stepping.start()
    prompts = [[number] * (number + 1) for number in range(8)]
    for number, prompt in enumerate(prompts):
        scheduler.submit(prompt, SamplingParams(temperature=0, max_tokens=20), inbox.listener(number))
    got: dict[int, list[int]] = {number: [] for number in range(8)}
    open_ = set(got)
    while open_:
        arrived = inbox.take(timeout=10)
        assert arrived
        for number, (answer, choices) in arrived.items():
            assert number in open_, "tokens after the end"
            got[number] += [choice.token for choice in choices if choice is not None]
            if None in choices:
                assert choices[-1] is None
                assert answer.finish_reason in ("length", "stop")
                open_.remove(number)
        threading.Event().wait(pauses)
    scheduler.close()
    stepping.join()
    assert got == {number: answered(prompt, 20) for number, prompt in enumerate(prompts)}


def test_what_arrives_while_the_thread_is_busy_comes_together() -> None:
    inbox: Inbox[str] = Inbox()
    scheduler = Scheduler(SumModel(), slots=2, max_length=64)
    for name in ("a", "b"):
        scheduler.submit([5], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), inbox.listener(name))
    while scheduler.busy:
        scheduler.step()
    arrived = inbox.take()
    assert arrived is not None
    assert {name: len(choices) for name, (_, choices) in arrived.items()} == {"a": 5, "b": 5}
    assert inbox.take(timeout=0) == {}


def test_a_failed_answer_ends_and_a_closed_inbox_gives_what_it_has_first() -> None:
    inbox: Inbox[str] = Inbox()
    scheduler = Scheduler(SumModel(failing={2}), slots=1, max_length=64)
    answer = scheduler.submit([5], SamplingParams(temperature=0, max_tokens=4), inbox.listener("it"))
    while scheduler.busy:
        scheduler.step()
    inbox.close()
    arrived = inbox.take()
    assert arrived is not None
    ((name, (failed, choices)),) = arrived.items()
    assert (name, failed, len(choices), choices[-1]) == ("it", answer, 2, None)
    assert answer.error is not None
    assert inbox.take() is None


def test_tokens_of_several_answers_come_together_but_not_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "LONGEST_PAUSE", 0.3)
    answers = {name: Answer([1], GREEDY, 9) for name in "ab"}
    inbox: Inbox[str] = Inbox(pace=0.15)
    tell = {name: partial(inbox.listener(name), answer) for name, answer in answers.items()}

    def taken() -> dict[str, list[int | None]]:
        arrived = inbox.take(timeout=0) or {}
        return {name: [choice and choice.token for choice in choices] for name, (_, choices) in arrived.items()}

    tell["a"](Choice(1))
    assert taken() == {"a": [1]}
    tell["b"](Choice(2))
    assert taken() == {"b": [2]}
    later = threading.Timer(0.02, tell["a"], [Choice(4)])
    tell["a"](Choice(3))
    later.start()
    assert taken() == {"a": [3, 4]}
    begun = monotonic()
    tell["a"](Choice(5))
    tell["b"](None)
    assert taken() == {"a": [5], "b": [None]}
    tell["a"](Choice(6))  # the only answer now
    assert taken() == {"a": [6]}
    assert monotonic() - begun < 0.3, "it waited"
