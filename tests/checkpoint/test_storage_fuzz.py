"""Quantized weights whose tensors or settings were changed at random: rejected with one sentence, or read as before.

The changes affect only the description of how weights are stored, never their numbers: a weight that is still read with its
own name and shape must have its own values. A different name or shape is left to the comparison with the model's parameters.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_storage
import torch
from hostile import one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rq_compile.checkpoint.safetensors_file import tensors_of
from rq_compile.checkpoint.storage.stated import Stated, stated_of
from rq_compile.checkpoint.storage.weights import weights_of
from rq_compile.errors import UserError

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.0.mlp.experts."
# Only their own presence shows that they exist.
OPTIONAL = (".pre_quant_scale", ".input_scale")
# Their shape determines the block, whatever the settings state.
GRIDS = (".weight_scale_inv", ".qscale_weight")
ONE_BYTE = (torch.int8, torch.uint8, torch.float8_e4m3fn)
FLOATS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Changed:
    """``how``: a word on each change."""

    how: list[str]
    tensors: Tensors = field(repr=False)
    settings: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Original:
    tensors: Tensors
    settings: dict[str, Any]
    values: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Original]:
    known: dict[str, Original] = {}

    def build(name: str) -> Original:
        if name not in known:
            folder = tiny_storage.build(name, tmp_path_factory.mktemp(name))
            found = {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
            tensors = {n: t for n, t in found.items() if n.startswith((f"{EXPERT}0.", f"{EXPERT}gate_up", f"{EXPERT}down"))}
            stated = stated_of(folder, json.loads((folder / "config.json").read_text()))
            known[name] = Original(tensors, stated.settings, read(tensors, stated.settings))
        return known[name]

    return build


def read(tensors: Tensors, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        weights = weights_of(tensors_of(file), Stated(settings, Path("config.json"), "quantization_config"))
        floats = {name: weight for name, weight in weights.items() if weight.dtype not in (np.int32, np.int8, np.uint8)}
        return {name: weight.read().astype(np.float32) for name, weight in floats.items()}


def drop(draw: st.DrawFn, tensors: Tensors, name: str) -> None:
    if not name.endswith(OPTIONAL):
        del tensors[name]


def cut(draw: st.DrawFn, tensors: Tensors, name: str) -> None:
    tensor = tensors[name]
    if tensor.dim() and not name.endswith(GRIDS):
        dim = draw(st.integers(0, tensor.dim() - 1))
        tensors[name] = tensor.narrow(dim, 0, draw(st.integers(0, tensor.shape[dim])))


def repeat(draw: st.DrawFn, tensors: Tensors, name: str) -> None:
    tensor = tensors[name]
    if tensor.dim() and not name.endswith(GRIDS):
        bytes = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        again = torch.cat([bytes, bytes], draw(st.integers(0, tensor.dim() - 1)))
        tensors[name] = again.view(tensor.dtype) if tensor.dtype.itemsize == 1 else again


def reshape(draw: st.DrawFn, tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (1, *tensors[name].shape)])))


def retype(draw: st.DrawFn, tensors: Tensors, name: str) -> None:
    tensor = tensors[name]
    if tensor.dtype.itemsize == 1 and tensor.dim():
        tensors[name] = tensor.view(draw(st.sampled_from(ONE_BYTE)))
    elif tensor.dtype == torch.int32:
        tensors[name] = tensor.view(torch.float32) if draw(st.booleans()) else tensor.to(torch.int64)
    else:
        tensors[name] = tensor.to(torch.int32) if draw(st.booleans()) else tensor.double()


def rename(draw: st.DrawFn, tensors: Tensors, name: str) -> None:
    if name.endswith(".pre_quant_scale"):
        return
    stem = name.rpartition(".")[0]
    ends = {other.rpartition(".")[2] for other in tensors} | {"weight_scale", "weight_scale_inv", "scale", "weight", "scales"}
    free = sorted(end for end in ends if f"{stem}.{end}" not in tensors)
    tensors[f"{stem}.{draw(st.sampled_from(free))}"] = tensors.pop(name)


def spoil_values(draw: st.DrawFn, tensors: Tensors, name: str) -> None:
    if tensors[name].is_floating_point() and tensors[name].dtype.itemsize > 1:
        tensors[name] = tensors[name] * draw(st.sampled_from([torch.inf, torch.nan]))


CHANGES = (drop, cut, repeat, reshape, retype, rename, spoil_values)
VALUES: st.SearchStrategy[Any] = st.sampled_from([None, 0, -1, 3, 8, 16, 64, "", "x", [], [0, 0], [7, 5], {}, True])
# They contain what the tensors cannot show: the version of the zero points.
KEPT = ("checkpoint_format",)


@st.composite
def changed(draw: st.DrawFn, original: Original) -> Changed:
    tensors, stated = dict(original.tensors), json.loads(json.dumps(original.settings))
    how = []
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        change = draw(st.sampled_from(CHANGES))
        if name not in tensors:
            continue
        change(draw, tensors, name)
        now = f"{tensors[name].dtype} {list(tensors[name].shape)}" if name in tensors else "gone"
        how.append(f"{change.__name__} {name}: {now}")
    keys = sorted(set(stated) - set(KEPT))
    if keys and not how:
        key = draw(st.sampled_from(keys))
        stated[key] = draw(VALUES)
        how.append(f"{key} = {stated[key]}")
    return Changed(how, tensors, stated)


@pytest.mark.parametrize("format", [name for name in tiny_storage.FORMATS if name != "fp8-ue8m0-fp4"])
def test_changes_at_random(original: Callable[[str], Original], format: str) -> None:
    known = original(format)

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(changed(known))
    def check(case: Changed) -> None:
        try:
            found = read(case.tensors, case.settings)
        except UserError as error:
            one_sentence(error)
            return
        for name in known.values.keys() & found.keys():
            if found[name].shape == known.values[name].shape:
                np.testing.assert_array_equal(found[name], known.values[name], err_msg=name)

    check()
