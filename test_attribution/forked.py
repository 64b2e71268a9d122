"""Processes of Python that begin with the large libraries imported: forked from a server that has done so.

To import torch and transformers takes longer than most nested runs of pytest do. Nothing of this package is imported
in the server, and no plugin of pytest, so that a nested run finds those as in a process of its own. A test whose
subject is read while a library is imported, such as the hub's address, starts a process of its own instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# Now, as pytester forgets after each test what was imported during it, and with the module its server would be lost.
with suppress(ImportError):
    import multiprocessing.popen_forkserver

# With what transformers imports of itself only when a model is loaded; without nnsight, which gives every object a
# method ``save``: what is imported after it, such as a plugin of pytest, may stumble over that.
LIBRARIES = (
    *("torch", "pandas", "scipy.stats", "matplotlib.figure", "jinja2"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
    *("transformers.generation.utils", "transformers.pipelines"),
)


_HERE = str(Path(__file__).parent)


def available() -> bool:
    """Say whether this system has a server to fork from."""
    return "forkserver" in multiprocessing.get_all_start_methods()


def _forget_plugins() -> None:
    """Let pytest import its plugins itself: it warns of one that a library has imported before."""
    plugins = {entry.module.partition(".")[0] for entry in metadata.entry_points(group="pytest11")}
    for name in [name for name in sys.modules if name.partition(".")[0] in plugins]:
        del sys.modules[name]


def _main(words: Sequence[str], folder: str, environment: Mapping[str, str], streams: tuple[str, str]) -> None:
    """Do in a forked process what ``python WORDS`` does in one of its own."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), streams, strict=True):
        # Both may be one file.
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.path.remove(_HERE)
    sys.path[:0] = [folder if words[0] in ("-m", "-c") else str(Path(words[0]).parent)]
    sys.path[1:1] = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        if words[1] == "pytest":
            _forget_plugins()
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path) -> int:
    """Run ``python WORDS`` in a forked process, and return its exit status.

    Args:
        words: As on the command line: ``-m MODULE``, ``-c CODE`` or a script, and arguments.
        folder: The current folder.
        environment: Its environment; what libraries read of it while they are imported, they have not read from here.
        stdout: File that what it prints is added to.
        stderr: Likewise; may be the same.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    arguments: tuple[Any, ...] = (list(words), str(folder), dict(environment), (str(stdout), str(stderr)))
    process = context.Process(target=_main, args=arguments)
    # The server imports without network, and a forked process looks for this file in the folders of this one.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(_HERE)
        patch.setenv("HF_HUB_OFFLINE", "1")
        process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
