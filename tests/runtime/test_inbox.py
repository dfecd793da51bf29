"""An inbox gives the tokens of many answers to one thread, each answer's in their order and with its end."""

import threading

import pytest
from test_scheduler import SumModel, answered

from rq_compile.standalone.inbox import Inbox
from rq_compile.standalone.sampling import SamplingParams
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
