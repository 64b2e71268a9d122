"""A machine that holds a model and runs what is sent to it, as an NDIF server does, with nothing of this package there.

Run as a process: its argument is the model's folder; requests and answers go through standard input and output, each
behind its length.
"""

from __future__ import annotations

import io
import struct
import sys
import traceback
from typing import Any, BinaryIO


def read(stream: BinaryIO) -> bytes:
    """Read one message; empty at the end."""
    head = stream.read(8)
    return stream.read(struct.unpack("Q", head)[0]) if head else b""


def write(stream: BinaryIO, message: bytes) -> None:
    """Write one message."""
    stream.write(struct.pack("Q", len(message)) + message)
    stream.flush()


def main(folder: str) -> None:
    """Answer requests until there are no more."""
    # Of what this package needs, NDIF has nnsight, torch, transformers and numpy alone.
    for missing in ("attribution", "hypothesis", "matplotlib", "pandas", "pytest", "scipy"):
        sys.modules[missing] = None  # type: ignore[assignment]
    import torch
    from nnsight import TransformersModel
    from nnsight.schema.request import RequestModel
    from nnsight.tracing import tracer as tracing

    network: Any = TransformersModel(folder, task="text-generation", attn_implementation="eager", dispatch=True)
    while request := read(sys.stdin.buffer):
        answer: dict[str, Any]
        try:
            tracer = RequestModel.deserialize(request, network._remoteable_persistent_objects())
            tracing.inc()
            try:
                tracer.execute(tracer.info.code)
                saved = tracing._saves()
                answer = {name: each for name, each in tracer.info.frame.f_locals.items() if id(each) in saved}
            finally:
                tracing.dec()
        except Exception as error:  # It is told what happened, as by NDIF.
            answer = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
        stream = io.BytesIO()
        torch.save(answer, stream)
        write(sys.stdout.buffer, stream.getvalue())


if __name__ == "__main__":
    main(sys.argv[1])
