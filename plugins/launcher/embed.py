"""Turn built kernels into two sources that embed them: kernels.S with the images, and table.cc, which says how each is launched.

    python plugins/launcher/embed.py build/kernels -o build/tensorrt/embedded

The build of a library with the launcher calls this script. The same kernels give the same bytes.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

# The types in the launcher's Arguments for the type names of kernels.json.
CPP_TYPES = {"i32": "int32_t", "fp32": "float"}
RULE = re.compile(r"ceil\((\w+) / (\d+)\)|(\w+)")


def images(kernel: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The builds to embed, with their kinds: every cubin, and the latest PTX that other architectures can translate."""
    builds = sorted(kernel["builds"], key=lambda build: build["sm"])
    portable = [build for build in builds if build["portable_ptx"]]
    return [(build, "cubin") for build in builds] + [(build, "ptx") for build in portable[-1:]]


def checked(folder: Path, file: dict[str, str]) -> Path:
    """Raises:
    SystemExit: the file differs from kernels.json.
    """
    path = folder / file["file"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
        raise SystemExit(f"{path} is not the file that kernels.json describes; build the kernels again")
    return path.resolve()


def grid_rule(rule: str) -> str:
    argument, divisor, alone = RULE.fullmatch(rule).groups()  # type: ignore[union-attr]
    return f"{{offsetof(Arguments, {'one' if alone == '1' else alone or argument}), {divisor or 1}}}"


def runs_on(build: dict[str, Any], kind: str) -> str:
    """The GPUs that a build runs on. Architecture-specific instructions bind cubins, like PTX, to their architecture (CUDA
    programming guide, feature sets)."""
    if kind == "ptx":
        return "kLater"
    return "kLaterMinor" if build["portable_ptx"] else "kItself"


def table_entry(kernel: dict[str, Any], symbols: list[str]) -> str:
    """One ``Kernel``. A name that ``Arguments`` does not have, or has with another type, does not compile."""
    names = [parameter["name"] for parameter in kernel["parameters"]] + kernel["hidden_parameters"]
    builds = [
        f'{{{build["sm"]}, RunsOn::{runs_on(build, kind)}, "{build["entry"]}", {build["shared"]}, {symbol}}}'
        for (build, kind), symbol in zip(images(kernel), symbols, strict=True)
    ]
    return "\n     ".join(
        [
            f'{{"{kernel["name"]}", {kernel["warps"]}, {kernel["constants"].get("STEP", 0)},',
            f"{{{', '.join(map(grid_rule, kernel['grid']))}}},",
            f"{{{', '.join(f'offsetof(Arguments, {name})' for name in names)}}},",
            f"{{{', '.join(builds)}}}}},",
        ]
    )


def type_checks(kernels: list[dict[str, Any]]) -> list[str]:
    types = {(p["name"], CPP_TYPES.get(p["type"], "CUdeviceptr")) for kernel in kernels for p in kernel["parameters"]}
    types |= {(name, "CUdeviceptr") for kernel in kernels for name in kernel["hidden_parameters"]}
    return [f"static_assert(std::is_same_v<decltype(Arguments::{name}), {kind}>);" for name, kind in sorted(types)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=Path, help="folder with kernels.json")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the two sources")
    args = parser.parse_args()
    document = json.loads((args.kernels / "kernels.json").read_text())
    if document["version"] != 1:
        parser.error(f"kernels.json is of version {document['version']}; this reads version 1")
    assembly, declarations, entries = [".section .rodata"], [], []
    for kernel in document["kernels"]:
        symbols = []
        for build, kind in images(kernel):
            symbol = f"rq_{kernel['name']}_sm{build['sm']}_{kind}"
            # The driver takes PTX as a string that ends in a zero byte.
            image = checked(args.kernels, build[kind])
            assembly += [".balign 64", f".globl {symbol}", f"{symbol}:", f'.incbin "{image}"', ".byte 0"]
            declarations.append(f"extern const unsigned char {symbol}[];")
            symbols.append(symbol)
        entries.append(table_entry(kernel, symbols))
    sizes, few_bits = sorted(document["tiles"]["rows"].items(), key=lambda size: size[1]), document["tiles"]["few_bits"]
    tile_sizes = ", ".join(f'{{"{name}", {rows}, {str(name in few_bits).lower()}}}' for name, rows in sizes)
    table = [
        '#include "kernels.h"',
        "#include <type_traits>",
        'extern "C" {',
        *declarations,
        "}",
        "namespace rq {",
        *type_checks(document["kernels"]),
        f"const int reread = {document['tiles']['reread']};",
        f"const int small = {document['tiles']['small']};",
        f"const std::vector<TileSize> tile_sizes = {{{tile_sizes}}};",
        "const std::vector<Kernel> kernels = {",
        *(f"    {entry}" for entry in entries),
        "};",
        "}  // namespace rq",
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "kernels.S").write_text("\n".join([*assembly, '.section .note.GNU-stack,"",@progbits', ""]))
    (args.output / "table.cc").write_text("\n".join([*table, ""]))


if __name__ == "__main__":
    main()
