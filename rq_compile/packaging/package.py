"""The result of packaging an engine, or the placements of a plan, for a destination."""

from typing import Literal

from pydantic import Field

from rq_compile.files import Document, Name

Destination = Literal[
    "triton",
    "edge",
    "onnxruntime-genai",
    "tensorrt-llm",
    "sglang",
    "vllm",
    "vllm-ascend",
    "ktransformers",
    "hybrid-bit-map",
    "mone",
]


class Package(Document):
    """``files``: paths within ``folder``, which may be an archive. ``run``: the command lines that start it. ``remarks``: what
    was lost or must be known, one sentence each."""

    destination: Destination
    folder: Name
    files: list[Name]
    run: list[Name]
    remarks: list[Name] = Field(default=[])
