"""A model that is run layer by layer: the same calibration as for the whole model, in less memory."""

import errno
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calibrated import LENGTH, TEXTS, TOKENS, Calibrated, copied, letters, same
from command_line import python
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM, PretrainedConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

from rq_compile.architectures.load import meta_model
from rq_compile.architectures.model import Model
from rq_compile.calibration import calibrate as calibrate_module
from rq_compile.calibration import dense, measure, memory, streaming
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.memory import Way, choose_way
from rq_compile.calibration.scratch import on_disk, release, scratch
from rq_compile.calibration.states import Outputs, States
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError
from rq_compile.quantization.formats import DENSE_QUANTIZED

MIB = 2**20


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calibrated]:
    """``run(checkpoint, whole, in_memory)`` calibrates in that way, however much memory is available."""

    def run(checkpoint: Model, whole: bool, in_memory: bool = True, **given: Any) -> Calibrated:
        monkeypatch.setattr(calibrate_module, "choose_way", lambda *_, **__: Way(whole, in_memory, "as asked for"))
        options = {"texts": TEXTS, "batch_size": 4, "sequence_length": LENGTH, "progress": lambda done, total: None}
        return calibrate(checkpoint, **{**options, **given})

    return run


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gives_what_the_whole_model_gives(
    tiny_checkpoint: Callable[[str], Path], run: Callable[..., Calibrated], family: str
) -> None:
    """One batch of each text is shorter than the others; the last layer's inputs have passed through all previous layers."""
    checkpoint = Model.open(tiny_checkpoint(family))
    same(run(checkpoint, True), run(checkpoint, False))


@pytest.mark.parametrize("family", ["gpt_oss", "switch_transformers"])
def test_hidden_states_on_disk_change_nothing(
    tiny_checkpoint: Callable[[str], Path],
    run: Callable[..., Calibrated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[Path] = []
    checkpoint = Model.open(tiny_checkpoint(family))
    in_memory, on_disk = (
        run(checkpoint, False, where, progress=lambda done, total: seen.extend(tmp_path.iterdir())) for where in (True, False)
    )
    assert in_memory[0].model_dump_json() == on_disk[0].model_dump_json()
    assert seen == []  # the files have no names, so they disappear even if the process is killed


@pytest.mark.parametrize("batch_size", [3, 100])
def test_four_layers_and_experts_with_many_tokens(
    run: Callable[..., Calibrated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    def deeper(config: Callable[[], PretrainedConfig] = tiny.CONFIGS["granitemoe"]) -> PretrainedConfig:
        made = config()
        made.update({"num_hidden_layers": 4})
        return made

    monkeypatch.setitem(tiny.CONFIGS, "granitemoe", deeper)
    monkeypatch.setattr(measure, "ROWS_AT_ONCE", 7)
    checkpoint = Model.open(tiny.build("granitemoe", tmp_path / "model"))
    whole, streamed = (run(checkpoint, way, texts={"long": letters(900, 3)}, batch_size=batch_size) for way in (True, False))
    assert (len(whole[0].layers), whole[0].measured_tokens) == (4, 900)
    same(whole, streamed)
    # If the whole model would have to keep too many inputs, a sample of the tokens is measured; layer by layer, all are.
    monkeypatch.setattr(calibrate_module, "MAX_RECORDED_BYTES", 100 * 4 * 32 * 4)
    whole, again = (run(checkpoint, way, texts={"long": letters(900, 3)}, batch_size=batch_size) for way in (True, False))
    assert whole[0].measured_tokens == 100
    same(streamed, again)


def test_what_switch_drops(tiny_checkpoint: Callable[[str], Path], run: Callable[..., Calibrated], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("switch_transformers"), tmp_path / "model", expert_capacity=1)
    whole, streamed = run(checkpoint, True), run(checkpoint, False)
    assert whole[0].layers[0].dropped > 0
    same(whole, streamed)


def test_every_tensor_is_read_once_and_routers_twice(
    tiny_checkpoint: Callable[[str], Path], run: Callable[..., Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Model.open(tiny_checkpoint("qwen2_moe"))
    read: list[str] = []
    original = Checkpoint.read

    def reading(self: Checkpoint, name: str) -> np.ndarray:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", reading)
    run(checkpoint, False)
    routers = [name for name in checkpoint.checkpoint.names if name.endswith(".gate.weight")]
    assert sorted(read) == sorted([*checkpoint.checkpoint.names, *routers])


def test_progress_ends_with_all_tokens(tiny_checkpoint: Callable[[str], Path], run: Callable[..., Calibrated]) -> None:
    for family in ("switch_transformers", "deepseek"):
        told: list[tuple[int, int]] = []
        run(Model.open(tiny_checkpoint(family)), False, progress=lambda *both, told=told: told.append(both))
        assert told == sorted(told)
        assert 0 < told[0][0] < TOKENS / 2
        assert told[-1] == (TOKENS, TOKENS)


def test_refuses_a_layer_that_the_model_does_not_call(
    tiny_checkpoint: Callable[[str], Path], run: Callable[..., Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_second_layer(checkpoint: Model) -> Any:
        model = meta_model(checkpoint)
        model.config.num_hidden_layers = 1
        return model

    monkeypatch.setattr(streaming, "meta_model", without_second_layer)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts was bypassed by the model; use a transformers version"):
        run(Model.open(tiny_checkpoint("mixtral")), False)


def test_the_way_is_chosen_by_the_memory(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    layers = checkpoint.layers
    monkeypatch.setattr(memory, "PROGRAM", 0)
    monkeypatch.setattr(memory, "used_memory", lambda: 1000 * MIB)

    def way(limit: int | None, rows: int = 100) -> Way:
        return choose_way(checkpoint, layers, rows=rows, limit=limit, device="cpu")

    assert way(1002 * MIB) == Way(True, True, "the model runs as a whole, in about 1 MiB of memory")
    streamed = way(1000 * MIB + 700_000)
    assert (streamed.whole, streamed.states_in_memory) == (False, True)
    spilled = way(1014 * MIB, rows=1_000_000)
    assert (spilled.whole, spilled.states_in_memory) == (False, False)
    assert "layer by layer, 610 MiB of hidden states on disk: as a whole" in spilled.reason
    with pytest.raises(UserError, match=r"--memory-limit is 1000 MiB, but a single layer of .* takes 10\d\d MiB while"):
        way(1000 * MIB + 10_000)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    assert not way(None).whole
    monkeypatch.undo()
    assert way(None).whole
    monkeypatch.setattr(memory, "LARGEST_WHOLE", 0)
    large = way(None)
    assert (large.whole, large.states_in_memory) == (False, True)
    assert "the model runs layer by layer: its weights take 0 MiB in fp32" in large.reason


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_largest_dense_part_has_no_experts(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    checkpoint = Model.open(tiny_checkpoint(family))
    model, layers = meta_model(checkpoint), checkpoint.layers
    parts = Counter[str]()
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(layer.name) for layer in layers):
            parts[re.sub(r"(\.\d+\.).*", r"\1", name)] += tensor.numel()
    noise = 8 * 32 if family == "llama_moe" else 0  # a router's, which is stored and has no part in the model
    assert 0 <= memory.largest_dense_part(checkpoint) - max(parts.values()) <= noise


def test_memory_is_what_the_system_says() -> None:
    before = memory.used_memory()
    held = np.ones(64 * MIB, np.uint8)
    assert 50 * MIB < memory.used_memory() - before < 100 * MIB
    assert held.all()
    if sys.platform == "linux":
        found = memory.available_memory()
        told, error = python("-c", UNDER_A_LIMIT).communicate()
        assert 0 < int(told or 0) < 2**30 < found, error


UNDER_A_LIMIT = """
import resource
from rq_compile.calibration.memory import available_memory
resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
print(available_memory())
"""


def test_scratch_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    array = on_disk(np.arange(12, dtype=np.float32).reshape(3, 4))
    array[1] += 1
    release(array)
    assert array[1].tolist() == [5, 6, 7, 8]
    assert scratch((0, 4), in_memory=False).shape == (0, 4)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(UserError, match=r"cannot keep 2\.0 GiB of hidden states in .*: No space left on device; free"):
        scratch((2**19, 1024), in_memory=False)


def test_refuses_a_device_that_is_not_there(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda asks for a GPU, but torch .* finds none on this machine; use --dev"):
        calibrate(Model.open(tiny_checkpoint("olmoe")), TEXTS, batch_size=1, sequence_length=8, progress=print, device="cuda")


LIMIT = 780 * MIB
PEAK = """
import os, re, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(1)
from rq_compile.architectures.load import load_model
from rq_compile.calibration import calibrate as module
from rq_compile.architectures.model import Model

checkpoint, limit = Model.open(sys.argv[1]), int(sys.argv[2])
if limit:
    module.measure_layer = partial(module.measure_layer, formats=("fp16",))  # others take as much memory, and longer
    module.calibrate(checkpoint, {"text": sys.argv[3]}, batch_size=2, sequence_length=64, progress=lambda *_: None,
                     memory_limit=limit, remark=print)
else:
    load_model(checkpoint)
print(int(re.search(r"VmHWM: *(\\d+) kB", Path("/proc/self/status").read_text().replace("\\t", " "))[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident memory from /proc")
def test_stays_below_a_limit_that_the_whole_model_breaks(tmp_path: Path) -> None:
    """Of 100 million weights: 0.2 GB in bf16, 0.4 GB in fp32."""
    hidden, experts, layers = 512, 16, 8
    config = OlmoeConfig(**{**tiny.COMMON, "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": hidden})
    config.update({"num_experts": experts, "num_experts_per_tok": 2})
    config.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    random = (torch.randn(hidden, hidden) * 0.05).bfloat16()
    shapes = {name: tensor.shape for name, tensor in tensors_of(config).items()}
    tensors = {
        name: torch.ones(shape).bfloat16() if len(shape) == 1 else random.repeat(-(-shape[0] // hidden), 1)[: shape[0]].clone()
        for name, shape in shapes.items()
        if ".experts." not in name
    }
    for layer in range(layers):
        for expert in range(experts):
            for projection in ("gate", "up", "down"):
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"] = random.roll(expert, 0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def peak(limit: int) -> int:
        output, error = python("-c", PEAK, str(tmp_path), str(limit), letters(128, 5)).communicate()
        assert output, error
        assert not limit or output.startswith("the model runs layer by layer")
        return int(output.splitlines()[-1])

    assert peak(LIMIT) < LIMIT < peak(0)


def tensors_of(config: OlmoeConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return OlmoeForCausalLM(config).state_dict()


def test_attention_runs_once_on_every_batch(
    tiny_checkpoint: Callable[[str], Path], run: Callable[..., Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second visit of a layer takes what the first one computed. Two formats run on sampled batches only."""
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    runs: Counter[int | None] = Counter()
    forward = OlmoeAttention.forward

    def counted(self: OlmoeAttention, *args: Any, **kwargs: Any) -> Any:
        runs[self.layer_idx] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(OlmoeAttention, "forward", counted)
    monkeypatch.setattr(dense, "SAMPLED_ROWS", 1)
    run(checkpoint, False)
    batches = len(calibrate_module.work_of(checkpoint, TEXTS, batch_size=4, sequence_length=LENGTH).batches)
    assert runs == dict.fromkeys(range(len(checkpoint.layers)), batches + len(DENSE_QUANTIZED))


@pytest.mark.parametrize(
    ("returned", "complete"),
    [
        ([0.0, 1.0], True),
        ([(0.0, None), (1.0, None)], True),
        ([0.0], False),
        ([0.0, 1.0, 1.0], False),
        ([0.0, (1.0, 2.0)], False),
    ],
    ids=["tensors", "with no weights", "one batch is missing", "a batch comes twice", "with weights"],
)
def test_outputs_are_used_again_only_if_all_are_known(returned: list[Any], complete: bool) -> None:
    def tensors(value: Any) -> Any:
        return (
            tuple(map(tensors, value)) if isinstance(value, tuple) else value if value is None else torch.full((1, 2, 3), value)
        )

    outputs = Outputs(States(np.array([0, 2, 4]), 3, True, "cpu"))
    for number, value in enumerate(returned):
        outputs.keep(min(number, 1), tensors(value))
    assert outputs.complete(2) == complete
    if complete:
        for number, value in enumerate(returned):
            found, expected = outputs.of(number), tensors(value)
            assert type(found) is type(expected)
            assert torch.equal(*(one[0] if isinstance(one, tuple) else one for one in (found, expected)))
