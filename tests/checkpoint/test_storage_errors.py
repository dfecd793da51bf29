"""Quantized checkpoints that are incomplete, or in a format that is not supported: a sentence that names tensor and format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_storage
import torch
from safetensors.torch import load_file, save_file

from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.safetensors_file import tensors_of
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.checkpoint.storage.weight import Weight
from rq_compile.checkpoint.storage.weights import weights_of
from rq_compile.errors import UserError

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.0.mlp.experts.1.up_proj"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in known:
            known[name] = tiny_storage.build(name, tmp_path_factory.mktemp(name))
        return known[name]

    return build


@pytest.fixture
def spoilt(built: Callable[[str], Path], tmp_path: Path) -> Callable[..., str]:
    """``spoilt(name, change, **settings)`` is the message when opening a checkpoint whose tensors or settings were changed."""

    def spoil(name: str, change: Callable[[Tensors], object] = lambda tensors: None, **settings: Any) -> str:
        source = built(name)
        tensors = {n: t for file in sorted(source.glob("*.safetensors")) for n, t in load_file(file).items()}
        change(tensors)
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as caught:
            everything_of(tmp_path)
        message = str(caught.value)
        assert message.isprintable()
        assert "download it again" not in message
        return message

    return spoil


def everything_of(folder: Path) -> list[np.ndarray]:
    return [weight.read() for weight in Checkpoint.open(folder).weights()]


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("fp8", ".weight_scale_inv", "stored as FP8, but its scales"),
        ("modelopt-fp8", ".weight_scale", "stored as FP8, but its scales"),
        ("pack-int4", ".weight_scale", "pack-quantized, but"),
        ("pack-int4", ".weight_shape", "pack-quantized, but"),
        ("pack-int4-asymmetric", ".weight_zero_point", "asymmetric INT4, but"),
        ("nvfp4-fp8", ".weight_global_scale", "NVFP4, but its global scale"),
        ("modelopt-mixed", ".weight_scale_2", "NVFP4, but its global scale"),
        ("gptq", ".scales", "GPTQ or AWQ, but"),
        ("gptq", ".qzeros", "GPTQ or AWQ, but"),
        ("awq", ".qzeros", "GPTQ or AWQ, but"),
        ("gptq", ".qweight", "belongs to a weight that is missing"),
        ("mxfp4-pack", ".weight_packed", "belongs to a weight that is missing"),
    ],
)
def test_a_part_is_missing(spoilt: Callable[..., str], name: str, missing: str, words: str) -> None:
    message = spoilt(name, without(EXPERT + missing))
    assert EXPERT in message
    assert words in message


def test_the_scales_of_blocks_are_missing(spoilt: Callable[..., str]) -> None:
    message = spoilt("mxfp4", without("model.layers.1.mlp.experts.down_proj_scales"))
    assert "down_proj_blocks" in message
    assert "stored as MXFP4, but its scales" in message


@pytest.mark.parametrize(
    ("name", "part", "change", "words"),
    [
        ("fp8", ".weight_scale_inv", lambda t: t[:, :1], "grid of scales over a weight"),
        ("fp8", ".weight_scale_inv", lambda t: t.repeat(3, 1), "grid of scales over a weight"),
        ("fp8", ".weight_scale_inv", lambda t: t.to(torch.int32), "stored as I32, but FP8"),
        ("fp8", ".weight_scale_inv", lambda t: t * torch.inf, "not finite"),
        ("fp8", ".weight_scale_inv", lambda t: t * 1e38, "a scale that is infinite or too large"),
        ("fp8", ".weight", lambda t: torch.full_like(t.float(), torch.nan).to(t.dtype), "not finite"),
        ("mxfp8", ".weight_scale_inv", lambda t: torch.full_like(t, 255), "a scale that is infinite or too large"),
        ("nvfp4-fp8", ".weight_scale", lambda t: t[:, :2], "but [64, 4] is expected of NVFP4"),
        ("nvfp4-fp8", ".weight_global_scale", torch.zeros_like, "a scale that is infinite or too large"),
        ("nvfp4-fp8", ".weight_packed", lambda t: t[:, :16], "expected of NVFP4"),
        ("pack-int4", ".weight_packed", lambda t: t[:, :4], "cannot hold a weight of [64, 64]"),
        ("pack-int4", ".weight_scale", lambda t: t[:, :1].repeat(1, 4), "but [64, 2] is expected of INT4"),
        ("pack-int4", ".weight_shape", lambda t: torch.tensor([64, 32]), "cannot hold a weight of [64, 32]"),
        ("pack-int4-asymmetric", ".weight_zero_point", lambda t: t[:4], "zero points of 64 rows"),
        ("pack-int4-act-order", ".weight_g_idx", lambda t: t + 2, "names a group that is not one of 2"),
        ("gptq", ".scales", lambda t: t[:1], "of GPTQ with 4 bits and group_size 32"),
        ("gptq", ".qzeros", lambda t: t[:, :3], "zero points"),
        ("awq", ".scales", lambda t: t.repeat(2, 1), "of AWQ and group_size 32"),
        ("modelopt-awq", ".pre_quant_scale", lambda t: t[:5], "one number for each input"),
    ],
)
def test_a_part_is_wrong(
    spoilt: Callable[..., str], name: str, part: str, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    message = spoilt(name, changed(EXPERT + part, change))
    assert EXPERT in message
    assert words in message


def test_blocks_of_another_packing(spoilt: Callable[..., str]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    assert "expected of MXFP4 blocks" in spoilt("mxfp4", changed(name, lambda t: t.reshape(*t.shape[:2], -1, 8)))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "in the layout marlin of GPTQ"),
        ("awq", {"version": "gemv"}, "in AWQ's layout gemv"),
        ("pack-int4", {"transform_config": {"config_groups": {"u": {}}}}, "stored rotated"),
        ("pack-int4", {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8}}}}, "with 8 bits"),
    ],
)
def test_settings_that_are_not_read(spoilt: Callable[..., str], name: str, settings: dict[str, Any], words: str) -> None:
    message = spoilt(name, **settings)
    assert words in message
    assert ".self_attn." in message or ".experts." in message


@pytest.mark.parametrize(
    ("method", "parts", "words"),
    [
        ("bitsandbytes", {"weight": torch.zeros(8, 1, dtype=torch.uint8), "weight.absmax": torch.ones(1)}, "model.dequantize()"),
        ("bitsandbytes", {"weight": torch.zeros(4, 4, dtype=torch.int8), "SCB": torch.ones(4)}, "model.dequantize()"),
        ("hqq", {"weight": torch.zeros(4, 4, dtype=torch.uint8)}, "16-bit checkpoint that it was made from"),
        ("of_the_future", {"weight_packed": torch.zeros(4, 4, dtype=torch.int32)}, "is missing"),
    ],
)
def test_unknown_methods(tmp_path: Path, method: str, parts: Tensors, words: str) -> None:
    save_file({f"{EXPERT}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    stated = Stated({"quant_method": method}, tmp_path / "c", "quantization_config")
    tensors = tensors_of(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{EXPERT}") as caught:
        weights_of(tensors, stated)
    assert words in str(caught.value)


def test_a_weight_that_was_dequantized_while_its_scales_were_left(spoilt: Callable[..., str]) -> None:
    message = spoilt("fp8", changed(f"{EXPERT}.weight", lambda t: t.to(torch.bfloat16)))
    assert "BF16 but has scales" in message


@pytest.mark.parametrize("config", ['{"model_type": "olmoe"}', None])
def test_gguf_alone(tmp_path: Path, config: str | None) -> None:
    if config:
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"GGUF.*gguf_file=.*save_pretrained"):
        Checkpoint.open(tmp_path)


# Cases that the tiny checkpoints are too small for.


def opened(tensors: Tensors, folder: Path, **settings: Any) -> Weight:
    save_file(tensors, folder / "model.safetensors")
    (weight,) = weights_of(
        tensors_of(folder / "model.safetensors"), Stated(settings, folder / "c", "quantization_config")
    ).values()
    return weight


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((200, 300), (2, 3), (128, 128)),  # ragged on both sides
        ((576, 7168), (5, 56), (128, 128)),  # DeepSeek-V3's kv_a_proj
        ((256, 384), (256, 12), (1, 32)),  # experts with a block that differs from the config's
        ((192, 96), (2, 1), (128, 128)),
        ((96, 130), (96, 1), (1, 130)),
        ((70, 40), (1, 1), (70, 40)),
        ((64, 64), (1, 1), (64, 64)),
    ],
)
@pytest.mark.parametrize("stack", [(), (3,)])
def test_blocks_are_read_off_the_grid(
    tmp_path: Path, shape: tuple[int, int], grid: tuple[int, int], block: tuple[int, int], stack: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(*stack, *shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(*stack, *grid, generator=generator) + 0.5
    weight = opened({"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path, quant_method="fp8", weight_block_size=[128, 128])
    spread = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[0], : shape[1]]
    np.testing.assert_array_equal(weight.read(), (codes.float() * spread).numpy())
    rows = weight.matrix_shape[0]
    np.testing.assert_array_equal(weight.decode(slice(rows - 3, rows)), weight.read().reshape(rows, -1)[-3:])


def test_all_codes_of_the_small_floats(tmp_path: Path) -> None:
    """As in ``ml_dtypes``; 0 and 254 are the smallest and largest exponents that are numbers."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 127) != 127].repeat(2)[:256].reshape(2, 128)
    scales = torch.full((2, 1), 1.0)
    weight = opened({"a.weight": finite.view(torch.float8_e4m3fn), "a.weight_scale": scales}, tmp_path)
    np.testing.assert_array_equal(weight.read(), finite.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    pairs = codes.reshape(1, 256)
    exponents = torch.arange(2, 255 - 8, 15, dtype=torch.uint8)[None, :16]
    weight = opened({"a.weight": pairs.view(torch.int8), "a.scale": exponents}, tmp_path)
    low = (pairs & 15).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    high = (pairs >> 4).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    values = np.stack([low, high], -1).reshape(1, 16, 32) * 2.0 ** (exponents.numpy().astype(np.float64)[..., None] - 127)
    np.testing.assert_array_equal(weight.read().astype(np.float64), values.reshape(1, -1))


@pytest.mark.parametrize("columns", [40, 33, 8])
def test_rows_whose_codes_end_within_a_word(tmp_path: Path, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    numbers = torch.randint(-8, 8, (7, columns), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    tensors = {"a.weight_packed": pack_to_int32(numbers, 4), "a.weight_scale": torch.full((7, 1), 0.5)}
    weight = opened({**tensors, "a.weight_shape": torch.tensor([7, columns])}, tmp_path)
    np.testing.assert_array_equal(weight.read(), numbers.numpy() * np.float32(0.5))
    np.testing.assert_array_equal(weight.decode(slice(2, 3)), numbers.numpy()[2:3] * np.float32(0.5))
