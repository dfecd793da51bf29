"""An engine of several ranks, run by that many processes: the logits of one engine, and a sentence whenever a rank is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, names, python, refused
from mpi import mpirun, needs_mpi, needs_mpich, spread
from plans import plan_of, replicated_and_quantized, tokens

from rq_compile.architectures.model import Model
from rq_compile.engine.manifest import Manifest
from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.runtime.engine import Engine
from rq_compile.targets.onnxruntime import compile_engine

# Of every rank, of which one has none.
SEQUENCES = (2, 0, 3, 1)
SUPPORT = Path(__file__).parents[1] / "support"


def rank_of(ranks: int) -> Callable[[LayerPlan, int, Slot], int]:
    """Ranks hold different numbers of slots, and the last one holds none in the first layer."""
    return lambda layer, place, slot: (place * 5 + layer.index) % ranks if layer.index else place * place % (ranks - 1)


@needs_mpi
@pytest.mark.parametrize(("family", "ranks"), [("gpt_oss", 2), ("olmoe", 3), ("switch_transformers", 4)])
def test_ranks_have_the_logits_of_one_engine(
    family: str, ranks: int, tiny_checkpoint: Callable[[str], Path], export_once: Callable, tmp_path: Path
) -> None:
    """Bit for bit, with copies, every format, and steps in which a rank has no tokens."""
    checkpoint = Model.open(tiny_checkpoint(family))
    plan = spread(plan_of(checkpoint, replicated_and_quantized), ranks, rank_of(ranks))
    exported = export_once(checkpoint)
    compile_engine(checkpoint, plan, tmp_path / "engine", "ranks", exported=exported)
    compile_engine(checkpoint, plan, tmp_path / "one.onnx", exported=exported)
    one = Engine.load(tmp_path / "one.onnx", 1)

    sequences = SEQUENCES[:ranks]
    ids, decoder = tokens(sum(sequences), 9), tokens(sum(sequences), 6, seed=9)
    np.savez(tmp_path / "given.npz", ids=ids, decoder=decoder, sequences=sequences)
    ran = mpirun(ranks, SUPPORT / "rank_steps.py", tmp_path / "engine", tmp_path / "given.npz")
    assert (ran.returncode, ran.stderr) == (0, "")
    of_rank = [np.load(tmp_path / f"{rank}.npz") for rank in range(ranks)]

    logits, rows = one.counted_logits(ids, **({"decoder_input_ids": decoder} if one.encoder_decoder else {}))
    assert np.array_equal(np.concatenate([found["logits"] for found in of_rank]), logits)
    assert np.array_equal(np.concatenate([found["again"] for found in of_rank]), logits)
    for found in of_rank:
        assert all(np.array_equal(found[f"rows of {layer}"], counted) for layer, counted in rows.items())
    for rank in range(ranks):
        expected = [] if rank == 1 else list(one.generate(ids[rank].tolist(), 3 * rank + 2, stop=False))
        assert of_rank[rank]["made"].tolist() == expected


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_row_takes_its_copy_and_comes_back(ranks: int) -> None:
    """And thousands of steps take no more memory than hundreds."""
    ran = mpirun(ranks, SUPPORT / "rank_layers.py")
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "")


@needs_mpi
@pytest.mark.parametrize("how", ["fail", "unread"])
def test_a_rank_that_fails_ends_all(how: str) -> None:
    """It is heard before that, and also ends them if its own output is not read any more."""
    ran = mpirun(3, SUPPORT / "rank_layers.py", how)
    assert ran.returncode != 0
    assert "ValueError: the second rank gives up" in ran.stderr


@pytest.fixture(scope="module")
def engine(
    stages: Path, tiny_checkpoint: Callable[[str], Path], rq_compile: Run, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``engine`` for two ranks by the command line, and beside it ``one.onnx`` of the same plan; do not write there."""
    folder, model = tmp_path_factory.mktemp("ranks"), tiny_checkpoint("olmoe")
    plan, output = folder / "plan.json", folder / "engine"
    for arguments in (
        ("plan", stages / "calibration.json", "--ranks", 2, "--memory", 0.8, "-o", plan),
        (model, "--plan", plan, "-o", output),
        (model, "--plan", plan, "-o", folder / "one.onnx"),
    ):
        result = rq_compile(*arguments, "-q")
        assert result.exit_code == 0, result.stderr
    return output


def test_a_plan_with_ranks_becomes_a_folder(engine: Path, rq_compile: Run) -> None:
    of_rank = [f"engine.rank{rank}.onnx{ending}" for rank in range(2) for ending in ("", ".data")]
    assert names(engine) == sorted(["engine.json", "engine.onnx.data", "engine.tokenizer.json", *of_rank])
    manifest = Manifest.model_validate_json((engine / "engine.json").read_bytes())
    one = Manifest.model_validate_json(engine.with_name("one.json").read_bytes())
    assert (manifest.lowering, len(manifest.ranks), one.lowering, one.ranks) == ("ranks", 2, "native", [])
    assert "ranks of the plan put on one device" not in manifest.replaced
    assert one.replaced["ranks of the plan put on one device"] == 2
    assert manifest.dense_bytes == one.dense_bytes
    for file in (engine, engine / "engine.json"):
        shown = rq_compile("inspect", file, "--verify")
        assert "every file is intact" in shown.stderr
        assert "engine.rank1.onnx" in shown.stdout


def test_the_same_bytes_again_over_the_old_ones(
    engine: Path, tiny_checkpoint: Callable[[str], Path], rq_compile: Run, tmp_path: Path
) -> None:
    model, plan = tiny_checkpoint("olmoe"), engine.with_name("plan.json")
    for _ in range(2):
        assert rq_compile(model, "--plan", plan, "-o", tmp_path / "again", "-q").exit_code == 0
    for name in names(engine):
        renamed = tmp_path / "again" / name
        assert renamed.read_bytes() == (engine / name).read_bytes(), name
    other = tmp_path / "other"
    other.mkdir()
    (other / "engine.json").write_text("mine")
    refused(rq_compile(model, "--plan", plan, "-o", other, "-q"), 2, "would overwrite", other / "engine.json")


@needs_mpi
def test_ranks_share_the_prompts_and_the_first_prints(engine: Path, rq_compile: Run) -> None:
    prompts = [argument for text in ("The LORD", "a", "And it came") for argument in ("--prompt", text)]
    said = ["--max-tokens", 5, "--json"]
    ours = mpirun(2, "-m", "rq_compile", "generate", engine, *prompts, *said)
    theirs = json.loads(rq_compile("generate", engine.with_name("one.onnx"), *prompts, *said).stdout)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert json.loads(ours.stdout)["prompts"] == theirs["prompts"]
    one = mpirun(2, "-m", "rq_compile", "generate", engine, *prompts[:2], "--max-tokens", 5)
    first = theirs["prompts"][0]
    assert one.stdout == first["prompt"] + first["text"] + "\n"


@needs_mpi
def test_evaluate_and_bench_on_ranks(engine: Path, stages: Path, tiny_checkpoint: Callable[[str], Path], rq_compile: Run) -> None:
    arguments = ["--reference", tiny_checkpoint("olmoe"), "--text", stages / "text.txt", "--sequence-length", 48, "--json"]
    ours = mpirun(2, "-m", "rq_compile", "evaluate", engine, *arguments)
    theirs = json.loads(rq_compile("evaluate", engine.with_name("one.onnx"), *arguments).stdout)
    found = json.loads(ours.stdout)["total"]
    # A step is a batch of each rank, and the tokens of a step take an expert's copies in turn.
    for layer, of_one in zip(found["layers"], theirs["total"]["layers"], strict=True):
        assert layer["lis_before"] == of_one["lis_before"]
        assert layer["lis_after"] == pytest.approx(of_one["lis_after"], rel=0.01)
    for field in ("predictions", "perplexity_reference", "perplexity_engine", "agreement", "kl"):
        assert found[field] == pytest.approx(theirs["total"][field], rel=1e-9), field
    timed = mpirun(2, "-m", "rq_compile", "bench", engine, "--prompt-tokens", 9, "--new-tokens", 2, "--rounds", 1)
    assert (timed.returncode, timed.stdout.count("engine ")) == (0, 1)


@needs_mpi
def test_without_mpirun_or_with_other_ranks(engine: Path) -> None:
    alone = python("-m", "rq_compile", "generate", str(engine), "--prompt", "a")
    stdout, stderr = alone.communicate(timeout=60)
    assert (alone.returncode, stdout) == (2, "")
    assert "is for 2 processes, but this one is alone; start it with mpirun -n 2" in stderr
    three = mpirun(3, "-m", "rq_compile", "generate", engine, "--prompt", "a")
    assert three.returncode == 2
    assert three.stderr.count("is for 2 processes, but 3 were started; start it with mpirun -n 2") == 1
    assert "rank" not in three.stderr.replace(str(engine), "")  # the first speaks for all


@needs_mpi
@needs_mpich
def test_the_mpirun_of_another_mpi(engine: Path) -> None:
    """A variable that Open MPI sets; MPICH itself would end with `Internal MPI error!`."""
    ran = mpirun(2, "-m", "rq_compile", "generate", engine, "--prompt", "a", OMPI_COMM_WORLD_SIZE="2")
    assert ran.returncode == 2
    assert ran.stderr.count("was built with MPICH, but Open MPI's mpirun started this process; use the mpirun of MPICH") == 1


@needs_mpi
def test_a_rank_that_is_killed_ends_all(engine: Path) -> None:
    program = (
        "import os, sys; from rq_compile.engine.ranks import ranks; ranks().rank == 1 and os.kill(os.getpid(), 9); "
        "from rq_compile.cli.main import run; sys.argv[0] = 'rq-compile'; run()"
    )
    ran = mpirun(2, "-c", program, "generate", engine, "--prompt", "a", "--max-tokens", 5)
    assert ran.returncode != 0
    said = ran.stdout + ran.stderr
    assert "EXIT CODE: 9" in said or "exited on signal 9" in " ".join(said.split()), said  # MPICH; Open MPI


@needs_mpi
def test_a_mistake_of_one_rank_ends_all_with_its_sentence(engine: Path) -> None:
    ran = mpirun(2, "-m", "rq_compile", "generate", engine, "--prompt", "a", "--prompt", "", "--max-tokens", 3)
    assert ran.returncode == 2
    assert "error: rank 1: the prompt is empty" in ran.stderr


@needs_mpi
def test_ranks_have_no_scheduler(engine: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    ran = mpirun(2, "-m", "rq_compile", "generate", engine, "--batch", prompts)
    assert ran.returncode == 2
    assert "runs in 2 processes, which cannot share a scheduler" in ran.stderr


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_commands_for_one_process_refuse_ranks(engine: Path, rq_compile: Run, command: str) -> None:
    """Before they meet: under mpirun, the processes would wait for each other for ever."""
    refused(rq_compile(command, engine), 2, f"{command} runs engines of one process, but {engine} has 2", "-o engine.onnx")


def test_without_the_library(engine: Path, rq_compile: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise UserError(f"the custom-op library {name} is missing; build it", 2)

    monkeypatch.setattr("rq_compile.engine.ranks.library_path", missing)
    refused(rq_compile("generate", engine, "--prompt", "a"), 2, "librq_moe_mpi.so is missing")


def test_outputs_that_do_not_fit_the_ranks(
    engine: Path, stages: Path, tiny_checkpoint: Callable[[str], Path], rq_compile: Run, out: Path
) -> None:
    model, plan = tiny_checkpoint("olmoe"), engine.with_name("plan.json")
    file = rq_compile(model, "--plan", plan, "-o", out / "model.onnx", "--lowering", "ranks")
    refused(file, 2, "lowering ranks writes a folder")
    one = rq_compile(model, "--plan", stages / "plan.json", "-o", out / "model", "--lowering", "ranks")
    refused(one, 2, "the plan has 1 rank")
    refused(rq_compile(model, "--plan", plan, "-o", out / "model", "--lowering", "native"), 2, "end it in .onnx")
    refused(rq_compile(model, "--plan", stages / "plan.json", "-o", out / "model"), 2, "end it in .onnx")
    refused(rq_compile("package", engine, "--for", "edge", "-o", out / "package"), 2, "is an engine of 2 processes")
    assert names(out) == []


def test_a_dry_run_says_what_is_written_and_what_is_lost(
    engine: Path, tiny_checkpoint: Callable[[str], Path], rq_compile: Run, out: Path
) -> None:
    model, plan = tiny_checkpoint("olmoe"), engine.with_name("plan.json")
    estimated = json.loads(rq_compile(model, "--plan", plan, "-o", out / "engine", "--dry-run", "--json").stdout)["outputs"]
    assert sorted(estimated) == names(engine)
    for name in (name for name in estimated if name.endswith(".data")):
        assert 0 <= estimated[name] - (engine / name).stat().st_size < 4096, name  # but for the alignment at the end
    lost = rq_compile(model, "--plan", plan, "-o", out / "model.onnx", "--dry-run").stderr
    assert "The plan balances 2 ranks, but --lowering native puts all slots on one device" in lost
    assert "puts all slots" not in rq_compile(model, "--plan", plan, "-o", out / "engine", "--dry-run").stderr
    assert names(out) == []
