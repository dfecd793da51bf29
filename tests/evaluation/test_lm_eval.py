"""lm-evaluation-harness gives an engine the same scores as the checkpoint in transformers."""

import functools
import json
import os
import shutil
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from command_line import SAMPLE_TEXTS

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from rq_compile.errors import UserError
from rq_compile.evaluation.harness import EngineLM
from rq_compile.evaluation.lm_eval import main
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.answer import Answer
from rq_compile.standalone.sampling import Choice

DOCUMENTS = 12
# Float32 logits of two implementations, summed over up to a window of positions.
NATS = 5e-4
TASKS: dict[str, dict[str, Any]] = {
    "heldout_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "heldout_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "heldout_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}, {"metric": "chrf"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files, and their documents from held-out text."""
    folder = tmp_path_factory.mktemp("tasks")
    text = (SAMPLE_TEXTS / "hacker.heldout.txt").read_text()
    pieces = [text[start : start + 700] for start in range(0, 700 * DOCUMENTS, 700)]
    with (folder / "documents.jsonl").open("w") as file:
        for number, piece in enumerate(pieces):
            # Contexts of many lengths, some too long for the model's 256 positions; choices of one token and of several.
            context = piece[: 20 + 25 * number]
            choices = ["a", "b", "e", "the"] if number % 2 else [piece[-9:], piece[-15:], " " + piece[-5:], piece[-9:-1]]
            document = {"context": context, "text": piece[: 1 + 60 * number], "choices": choices, "answer": number % 4}
            file.write(json.dumps(document) + "\n")
    for name, task in TASKS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))
    return folder


@pytest.fixture(scope="module")
def engine(
    rq_compile: Callable[..., Result],
    stages: Path,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny OLMoE, compiled with a plan that changes nothing."""
    folder = tmp_path_factory.mktemp("unchanged")
    plan, path = folder / "plan.json", folder / "unchanged.onnx"
    for arguments in (
        ("plan", stages / "calibration.json", "--policy", "none", "-o", plan),
        (tiny_checkpoint("olmoe"), "--plan", plan, "-o", path),
    ):
        result = rq_compile(*arguments, "-q")
        assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="module", autouse=True)
def without_survey() -> Iterator[None]:
    """Skip the list of the machine and its Python packages, which the harness adds to every result and which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield


def evaluated(model: LM, tasks: Path) -> dict[str, dict[str, Any]]:
    """Scores and answers, by task."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    # The bootstrap's spread is not a score.
    found = evaluator.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)
    return {
        name: {
            "scores": [found["results"][name][f"{metric['metric']},none"] for metric in task["metric_list"]],
            "answers": [
                resps
                for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
                for (resps,) in sample["resps"]
            ],
        }
        for name, task in TASKS.items()
    }


@pytest.fixture(scope="module")
def transformers_model(tiny_checkpoint: Callable[[str], Path]) -> LM:
    pytest.importorskip("accelerate", reason="the harness needs accelerate to run transformers' models")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_checkpoint("olmoe")), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def expected(transformers_model: LM, tasks: Path) -> dict[str, dict[str, Any]]:
    return evaluated(transformers_model, tasks)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_scores_and_answers_are_those_of_transformers(
    engine: Path, expected: dict[str, dict], tasks: Path, batch_size: int | str
) -> None:
    ours = evaluated(EngineLM(engine, threads=1, batch_size=batch_size), tasks)
    for name, theirs in expected.items():
        assert ours[name]["scores"] == pytest.approx(theirs["scores"], rel=1e-6)
    assert ours["heldout_generation"]["answers"] == expected["heldout_generation"]["answers"]
    close(ours["heldout_choice"]["answers"], expected["heldout_choice"]["answers"])
    totals = expected["heldout_perplexity"]["answers"]
    assert ours["heldout_perplexity"]["answers"] == pytest.approx(totals, abs=NATS)
    assert (len(expected["heldout_choice"]["answers"]), len(totals)) == (4 * DOCUMENTS, DOCUMENTS)


def close(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=NATS)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def written_in_letters(engine: Engine) -> tuple[str, str]:
    """A letter after which the engine generates three letters (not ids that its tokenizer does not have), and these three."""
    for start in string.ascii_letters:
        tokens = [engine.tokenizer.id_to_token(token) or "" for token in engine.generate(engine.tokenizer.encode(start).ids, 3)]
        if len(tokens) == 3 and all(token.isalnum() for token in tokens):
            return start, "".join(tokens)
    raise AssertionError("no letter has such a continuation")


def test_likelihoods_of_odd_requests_are_those_of_transformers(engine: Path, transformers_model: LM) -> None:
    ours = EngineLM(engine, threads=1, batch_size=4)
    start, greedy = written_in_letters(Engine.load(engine, threads=1))
    pairs = requests(
        "loglikelihood",
        (start, greedy),
        (start, greedy[:-1] + ("b" if greedy[-1] == "a" else "a")),
        ("", "The cat"),
        ("", "T"),
        ("The cat ", "sat"),
        ("A long way to go " * 40, "home"),
        ("", "x" * 256),
    )
    scores = ours.loglikelihood(pairs)
    close(scores, transformers_model.loglikelihood(pairs))
    assert [greedy for _, greedy in scores[:2]] == [True, False]


def test_a_context_that_leaves_no_room_loses_its_beginning(engine: Path, transformers_model: LM) -> None:
    options = {"max_gen_toks": 12}
    asked = requests("generate_until", ("A long way to go " * 40, options), ("home", options))
    assert EngineLM(engine, threads=1).generate_until(asked) == transformers_model.generate_until(asked)


def test_what_is_not_said_is_what_transformers_would_take(engine: Path, transformers_model: LM) -> None:
    ours = EngineLM(engine, threads=1)
    for name in ("prefix_token_id", "eot_token_id", "max_length", "max_gen_toks"):
        assert getattr(ours, name) == getattr(transformers_model, name)
    for text in ("", "The cat", "<s>The cat"):
        assert ours.tok_encode(text) == transformers_model.tok_encode(text)


def test_an_empty_prompt_follows_the_prefix(engine: Path) -> None:
    for prefix in (0, 40):
        model = EngineLM(engine, threads=1, prefix_token_id=prefix)
        (text,) = model.generate_until(requests("generate_until", ("", {"max_gen_toks": 5})))
        assert text == model.tok_decode(list(Engine.load(engine, threads=1).generate([prefix], 5)))


def test_generation_stops_where_a_stop_string_ends(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = EngineLM(engine, threads=1), []
    following = Answer.next

    def noted(*arguments: Any, **options: Any) -> Choice | None:
        choice = following(*arguments, **options)
        tokens.extend([] if choice is None else [choice.token])
        return choice

    monkeypatch.setattr(Answer, "next", noted)

    def continued(**options: Any) -> str:
        tokens.clear()
        return model.generate_until(requests("generate_until", ("home", {"max_gen_toks": 20, **options})))[0]

    whole = continued()
    assert len(tokens) == 20
    stop = whole[14:17]
    assert continued(until=["never", stop]) == whole.split(stop)[0] == continued(until=stop)
    assert len(tokens) < 20
    assert model.tok_decode(tokens).endswith(stop)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pretrained": "model"}, "no argument pretrained"),
        ({"batch_size": "all"}, "--batch_size all"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"engine": "missing.onnx"}, "no such engine: missing.onnx"),
    ],
)
def test_arguments_that_cannot_be_are_refused(engine: Path, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        EngineLM(**{"engine": engine, **arguments})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": True, "temperature": 0.7}, "sampling"),
        ({"temperature": 0.7}, "sampling"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_gen_toks": 256}, "256 tokens to generate leave no room"),
    ],
)
def test_what_is_not_greedy_is_refused(engine: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        EngineLM(engine, threads=1).generate_until(requests("generate_until", ("home", options)))


def test_what_does_not_change_a_greedy_answer_is_taken(engine: Path) -> None:
    options = {"do_sample": False, "temperature": 0.0, "top_p": 0.9, "top_k": 5, "num_beams": 1, "repetition_penalty": 1.0}
    asked = requests("generate_until", ("home", {"max_gen_toks": 4}), ("home", {"max_gen_toks": 4, **options}))
    plain, with_options = EngineLM(engine, threads=1).generate_until(asked)
    assert plain == with_options


def test_a_text_longer_than_a_sequence_is_refused(engine: Path) -> None:
    with pytest.raises(UserError, match="257 tokens, but max_length is 256"):
        EngineLM(engine, threads=1).loglikelihood(requests("loglikelihood", ("", "x" * 257)))


def test_an_encoder_decoder_is_refused(stages: Path, tmp_path: Path) -> None:
    manifest = json.loads((stages / "model.json").read_text())
    for file in (manifest["graph"], manifest["weights"], manifest["tokenizer"]):
        shutil.copy(stages / file["name"], tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**manifest, "encoder_decoder": True}))
    with pytest.raises(UserError, match="encoder-decoder"):
        EngineLM(tmp_path / "model.onnx", threads=1)


@pytest.mark.parametrize("fewshot", [0, 2])
def test_chat_templates_give_the_prompts_of_transformers(
    chat_engine: Path, model_with_chat: Path, tasks: Path, fewshot: int
) -> None:
    pytest.importorskip("accelerate", reason="the harness needs accelerate to run transformers' models")
    from lm_eval.models.huggingface import HFLM

    ours, theirs = EngineLM(chat_engine, threads=1), HFLM(pretrained=str(model_with_chat), device="cpu", dtype="float32")
    assert ours.chat_template(True) == theirs.chat_template(True)
    prompts = []
    for model in (ours, theirs):
        found = evaluator.simple_evaluate(
            model,
            tasks=["heldout_choice"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            limit=2,
            num_fewshot=fewshot,
            apply_chat_template=True,
            fewshot_as_multiturn=fewshot > 0,
        )
        prompts.append([sample["arguments"] for sample in found["samples"]["heldout_choice"]])
    assert prompts[0] == prompts[1]
    assert str(prompts[0]).count("<user>") == (1 + fewshot) * 2 * 4
    text = ours.apply_chat_template([{"role": "user", "content": "a"}])
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    with pytest.raises(UserError, match="one chat template and no 'tools'"):
        ours.chat_template("tools")


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lm-eval", *map(str, arguments)])
    # Reading the thousands of task files of the harness would take as long as all these tests.
    monkeypatch.setattr(TaskManager, "__init__", functools.partialmethod(TaskManager.__init__, include_defaults=False))
    main()


def test_the_command_line_is_the_harness_own(
    engine: Path, tasks: Path, expected: dict[str, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = ("--model", "rq_compile", "--model_args", f"engine={engine},threads=1", "--batch_size", "auto")
    command_line(monkeypatch, *model, "--tasks", tasks / "heldout_choice.yaml", "--output_path", tmp_path)
    (path,) = tmp_path.rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["heldout_choice"]["acc,none"] == expected["heldout_choice"]["scores"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model_args", "engine=missing.onnx"), "no such engine: missing.onnx"),
        (("--model_args", "engine={engine}", "--apply_chat_template"), "no chat template"),
    ],
)
def test_a_mistake_is_one_sentence(
    engine: Path,
    tasks: Path,
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    asked = [argument.format(engine=engine) for argument in arguments]
    with pytest.raises(SystemExit) as left:
        command_line(monkeypatch, "--model", "rq_compile", "--tasks", tasks / "heldout_choice.yaml", *asked)
    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert words in said


def test_without_the_harness_its_install_command_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in ("lm_eval", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as left:
        command_line(monkeypatch, "--model", "rq_compile")
    assert left.value.code == 2
    assert 'pip install "rq-compile[lm-eval]"' in capsys.readouterr().err
