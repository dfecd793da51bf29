"""Tiny checkpoints in the storage formats of published ones, written by the quantizers of the libraries that publish them.

If no library that runs on the CPU has a quantizer (ModelOpt's, GPTQ's and AWQ's packings), the layout is written here, number by
number, from its description; nothing of rq-compile is used. Each comes with the same checkpoint dequantized, by the library's own
dequantization or from the numbers before they were packed.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Stored = dict[str, Tensor]
# The stored form of a module's weight: its tensors by the name below the module, and their values in fp32.
Store = Callable[[Tensor], tuple[Stored, Tensor]]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP8 = torch.float8_e4m3fn
EXPERTS, ATTENTION = r"\.experts\.", r"\.self_attn\.[qkvo]_proj\.|\.self_attn\.kv_b_proj\."


@dataclass(frozen=True)
class Format:
    """How modules are stored (the first match applies), the settings in config.json, and the model used for the format."""

    modules: tuple[tuple[str, Store], ...]
    settings: dict[str, Any]
    family: str = "qwen3_moe"
    changes: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 64, "moe_intermediate_size": 64})
    file: str = "config.json"


def build(name: str, folder: Path) -> Path:
    """Write ``folder/stored`` in the format ``name`` and ``folder/dequantized``, the same in fp32; returns the first."""
    format = FORMATS[name]
    return store(tiny.build(format.family, folder / "dequantized", **format.changes), folder / "stored", format)


def store(plain: Path, made: Path, format: Format) -> Path:
    """Write the checkpoint ``plain`` into ``made`` in a format, and the dequantized values into ``plain``; returns ``made``."""
    weights = load_file(plain / "model.safetensors")
    stored: Stored = {}
    for name_, tensor in list(weights.items()):
        stores = next((stores for pattern, stores in format.modules if re.search(pattern, name_)), None)
        if stores is None or tensor.dim() < 2:
            stored[name_] = tensor
            continue
        parts, weights[name_] = stores(tensor)
        module = name_.removesuffix(".weight")
        stored |= {f"{module}{below}": part.contiguous() for below, part in parts.items()}
    save_file({n: t.contiguous() for n, t in weights.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(plain, made, ignore=shutil.ignore_patterns("*.safetensors"))
    _save(stored, made)
    config = json.loads((made / "config.json").read_text())
    if format.file == "config.json":
        config["quantization_config"] = format.settings
    else:
        (made / format.file).write_text(json.dumps(format.settings, indent=1))
    (made / "config.json").write_text(json.dumps(config, indent=1))
    return made


def _save(tensors: Stored, folder: Path) -> None:
    """In two shards: scales and zero points are in a different shard than the weights."""
    second = {name for name in tensors if re.search(r"scale|zero|_scales$|g_idx", name)}
    shards = ({n: t for n, t in tensors.items() if n not in second}, {n: t for n, t in tensors.items() if n in second})
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ------------------------------------------------------------------------------------------------- FP8 with a grid of scales
def fp8(block: tuple[int, int], scale: str = ".weight_scale_inv", exponents: torch.dtype | None = None) -> Store:
    """``exponents``: the dtype of scales that are powers of two."""

    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        scales, codes = _grid(weight, block, 448.0, exponents is not None)
        worth = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
        return {".weight": codes, scale: scales if exponents is None else _exponents(scales, exponents)}, worth

    return store


def _grid(weight: Tensor, block: tuple[int, int], largest: float, powers: bool) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    high, wide = block
    tiles = weight.reshape(rows // high, high, columns // wide, wide)
    scales = tiles.abs().amax((1, 3)) / largest
    scales = torch.exp2(torch.ceil(torch.log2(scales))) if powers else scales
    return scales, (tiles / scales[:, None, :, None]).to(FP8).reshape(rows, columns)


def _exponents(scales: Tensor, dtype: torch.dtype) -> Tensor:
    codes = (torch.log2(scales).round() + 127).to(torch.uint8)
    return codes if dtype == torch.uint8 else codes.view(torch.float8_e8m0fnu)


def fp4(weight: Tensor) -> tuple[Stored, Tensor]:
    """DeepSeek-V4's experts: e2m1 pairs in int8, float8_e8m0 scales for 32 columns, named ``.scale``."""
    codes, scales = _e2m1(weight, 32)
    packed = _pairs(codes).view(torch.int8)
    worth = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.float32)
    return {".weight": packed, ".scale": _exponents(scales, torch.float8_e8m0fnu)}, worth


def _e2m1(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales that are powers of two."""
    groups = weight.reshape(*weight.shape[:-1], -1, group)
    scales = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1) / 6)))
    return _nearest_e2m1(groups / scales[..., None]).reshape(weight.shape), scales


def _nearest_e2m1(values: Tensor) -> Tensor:
    code = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    return (code + 8 * (values < 0)).to(torch.uint8)


def _pairs(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | codes[..., 1::2] << 4


def mxfp4_blocks(weight: Tensor) -> tuple[Stored, Tensor]:
    """GPT-OSS: of ``[experts, in, out]``."""
    codes, scales = _e2m1(weight.transpose(1, 2), 32)
    blocks = _pairs(codes.reshape(*scales.shape, 32))
    exponents = _exponents(scales, torch.uint8)
    worth = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    return {"_blocks": blocks, "_scales": exponents}, worth


# ------------------------------------------------------------------------------------------------------- compressed-tensors
def compressed(format: str, **arguments: Any) -> Store:
    args = QuantizationArgs(**arguments)
    compressor, scheme = BaseCompressor.get_value_from_registry(format), QuantizationScheme(targets=["Linear"], weights=args)

    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        groups = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
        overall = (448 * 6 / weight.abs().max()).reshape(1) if args.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=overall)
        state = {"weight": weight, "weight_scale": scale}
        if overall is not None:
            state["weight_global_scale"] = overall
        if not args.symmetric:
            state["weight_zero_point"] = zero.to(torch.int8)
        packed = compressor.compress(state, scheme)
        worth = compressor.decompress(packed, scheme)["weight"].float()
        if overall is not None:  # compressed-tensors multiplies in bf16
            codes = torch.stack([packed["weight_packed"] & 15, packed["weight_packed"] >> 4], -1).reshape(weight.shape).long()
            values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
            exact = (values.reshape(groups.shape) * (packed["weight_scale"].float() / overall)[..., None]).reshape(weight.shape)
            torch.testing.assert_close(exact, worth, rtol=2**-7, atol=0)
            worth = exact
        return {f".{name}": part for name, part in packed.items()}, worth

    return store


def act_order(weight: Tensor) -> tuple[Stored, Tensor]:
    """pack-quantized with ``weight_g_idx``: the group of each column."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    parts, worth = INT4_GROUP_32(weight[:, order])
    unpacked = compressed_words(parts[".weight_packed"], 4)
    back = torch.argsort(order)
    parts[".weight_packed"] = pack_words(unpacked[:, back], 4)
    parts[".weight_g_idx"] = (back // 32).to(torch.int32)
    return parts, worth[:, back]


def pack_words(numbers: Tensor, bits: int) -> Tensor:
    """int32 of unsigned ``numbers [rows, columns]``, the first in the lowest bits."""
    groups = numbers.long().reshape(len(numbers), -1, 32 // bits)
    words = (groups << (bits * torch.arange(32 // bits))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def compressed_words(words: Tensor, bits: int) -> Tensor:
    return ((words[..., None].long() >> (bits * torch.arange(32 // bits))) & (2**bits - 1)).reshape(len(words), -1)


# ----------------------------------------------------------------------------------------------------------------- ModelOpt
def modelopt_fp8(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(FP8)
    return {".weight": codes, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}, codes.float() * scale


def modelopt_nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    overall = weight.abs().max() / (448 * 6)
    groups = weight.reshape(len(weight), -1, 16)
    scales = (groups.abs().amax(-1) / 6 / overall).to(FP8)
    step = scales.float() * overall
    codes = _nearest_e2m1(groups / step[..., None])
    worth = E2M1[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0) * step[..., None]
    parts = {".weight": _pairs(codes.reshape(weight.shape)), ".weight_scale": scales, ".weight_scale_2": overall}
    return {**parts, ".input_scale": torch.tensor(0.5)}, worth.reshape(weight.shape)


def modelopt_awq(weight: Tensor) -> tuple[Stored, Tensor]:
    before = torch.linspace(0.5, 2, weight.shape[1])
    groups = (weight / before).reshape(len(weight), -1, 32)
    scales = groups.abs().amax(-1) / 7
    numbers = (groups / scales[..., None]).round().clamp(-8, 7)
    worth = (numbers * scales[..., None]).reshape(weight.shape) * before
    nibbles = (numbers.reshape(weight.shape).long() & 15).to(torch.uint8)
    return {".weight": nibbles[0::2] | nibbles[1::2] << 4, ".weight_scale": scales, ".pre_quant_scale": before}, worth


# -------------------------------------------------------------------------------------------------------------- GPTQ and AWQ
def gptq(bits: int = 4, version: int = 1, act_order: bool = False) -> Store:
    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        columns, group = weight.shape[1], 32
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(2)) if act_order else torch.arange(columns)
        g_idx = torch.argsort(order) // group
        numbers, zeros, scales = _asymmetric(weight[:, order], group, bits)
        numbers = numbers[:, torch.argsort(order)]
        worth = (numbers - zeros[:, g_idx]) * scales.float()[:, g_idx]
        taken_off = (zeros - int(version == 1)) % 2**bits
        return {
            ".qweight": pack_words(numbers, bits).t(),
            ".qzeros": pack_words(taken_off.t(), bits),
            ".scales": scales.t(),
            ".g_idx": g_idx.to(torch.int32),
        }, worth

    return store


def awq(weight: Tensor) -> tuple[Stored, Tensor]:
    group = 32
    numbers, zeros, scales = _asymmetric(weight, group, 4)
    worth = (numbers - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    in_word = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(matrix: Tensor) -> Tensor:
        return pack_words(matrix.reshape(len(matrix), -1, 8)[:, :, in_word].reshape(matrix.shape), 4)

    return {".qweight": packed(numbers.t()), ".qzeros": packed(zeros.t()), ".scales": scales.t()}, worth


def _asymmetric(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers and zero points without a sign, scales fp16 ``[rows, groups]``."""
    groups = weight.reshape(len(weight), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(0, 2**bits - 1)
    numbers = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return numbers.reshape(weight.shape).long(), zeros.long(), scales


# ------------------------------------------------------------------------------------------------------------------- formats
def _groups(**groups: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """compressed-tensors' settings: group -> (target, format, weights)."""
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(groups) > 1 else next(iter(groups.values()))[1],
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {
            name: {"targets": [target], "format": format, "weights": weights}
            for name, (target, format, weights) in groups.items()
        },
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
LINEAR = ("Linear", "pack-quantized")
SYMMETRIC, ASYMMETRIC = {**INT4, "symmetric": True}, {**INT4, "symmetric": False}
INT4_GROUP_32 = compressed("pack-quantized", **SYMMETRIC)
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
STORE_NVFP4 = compressed("nvfp4-pack-quantized", **NVFP4, scale_dtype=FP8)
FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MODELOPT: dict[str, Any] = {"quant_method": "modelopt"}
DEEPSEEK: dict[str, Any] = {"family": "deepseek_v3", "changes": {"hidden_size": 64, "q_lora_rank": 32}}

FORMATS: dict[str, Format] = {
    "fp8": Format(((EXPERTS, fp8((16, 32))), (ATTENTION, fp8((16, 32)))), {**FP8_BLOCKS, "weight_block_size": [16, 32]}),
    "fp8-ue8m0-fp4": Format(
        ((EXPERTS, fp4), (r"\.q_[ab]_proj\.|o_proj\.", fp8((16, 16), ".scale", torch.float8_e8m0fnu))),
        {**FP8_BLOCKS, "weight_block_size": [16, 16], "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
        **DEEPSEEK,
    ),
    "fp8-qscale": Format(((EXPERTS, fp8((64, 64), ".qscale_weight")),), {**FP8_BLOCKS, "weight_block_size": [64, 64]}),
    "mxfp8": Format(
        ((EXPERTS, fp8((1, 32), exponents=torch.uint8)), (ATTENTION, fp8((1, 32), exponents=torch.uint8))),
        {"quant_method": "mxfp8"},
    ),
    "mxfp4": Format(
        ((r"experts\.(gate_up|down)_proj$", mxfp4_blocks),),
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        family="gpt_oss",
        changes={"hidden_size": 64, "intermediate_size": 64},
    ),
    "pack-int4": Format(((EXPERTS, INT4_GROUP_32), (ATTENTION, INT4_GROUP_32)), _groups(a=(*LINEAR, SYMMETRIC))),
    "pack-int4-asymmetric": Format(((EXPERTS, compressed("pack-quantized", **ASYMMETRIC)),), _groups(a=(*LINEAR, ASYMMETRIC))),
    "pack-int4-act-order": Format(((EXPERTS, act_order),), _groups(a=(*LINEAR, {**SYMMETRIC, "actorder": "group"}))),
    "pack-int8": Format(((EXPERTS, compressed("pack-quantized", **INT8)),), _groups(a=(*LINEAR, INT8))),
    "float-quantized": Format(
        ((EXPERTS, compressed("float-quantized", **CHANNEL)),), _groups(a=("Linear", "float-quantized", CHANNEL))
    ),
    "nvfp4-fp8": Format(
        ((EXPERTS, STORE_NVFP4), (ATTENTION, compressed("float-quantized", **CHANNEL))),
        _groups(experts=("re:.*experts.*", "nvfp4-pack-quantized", NVFP4), rest=("re:.*self_attn.*", "float-quantized", CHANNEL)),
    ),
    "mxfp4-pack": Format(
        ((EXPERTS, compressed("mxfp4-pack-quantized", **MXFP4, scale_dtype=torch.uint8)),),
        _groups(a=("Linear", "mxfp4-pack-quantized", MXFP4)),
    ),
    "modelopt-fp8": Format(((EXPERTS, modelopt_fp8), (ATTENTION, modelopt_fp8)), {**MODELOPT, "quant_algo": "FP8"}),
    "modelopt-mixed": Format(
        ((EXPERTS, modelopt_nvfp4), (ATTENTION, modelopt_fp8)),
        {
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        },
        file="hf_quant_config.json",
    ),
    "modelopt-awq": Format(((EXPERTS, modelopt_awq),), {**MODELOPT, "quant_algo": "W4A16_AWQ", "group_size": 32}),
    "gptq": Format(((EXPERTS, gptq()), (ATTENTION, gptq())), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq-v2-act-order": Format(
        ((EXPERTS, gptq(8, 2, act_order=True)),),
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "awq": Format(((EXPERTS, awq), (ATTENTION, awq)), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}
