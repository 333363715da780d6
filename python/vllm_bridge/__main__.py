"""``python -m vllm_bridge [KIND]``: a worker that speaks the protocol on file descriptors 3 and 4.

The kinds are ``engine``, which is meant without a word, ``tools`` and ``job``; see ``KINDS``. The
word ``nursery`` makes a process that forks workers of the first kind.

vLLM's processes are spawned and import this module again, so that nothing happens on import.
"""

import asyncio
import importlib.util
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from vllm_bridge import preload

if TYPE_CHECKING:
    from vllm_bridge.rpc.table import Table

# The exit status by which Elixir knows that this interpreter lacks the packages.
NOT_INSTALLED = 78  # EX_CONFIG

# What an engine needs that is not imported before `load`.
NEEDED = ("vllm", "torch")

READ_FD = 3
WRITE_FD = 4

# Set before vLLM is imported, and only where the user has not set them.
ENVIRONMENT = {
    # Standard output is nobody's in a worker; logs go where errors go.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # No usage reports leave the user's machine unless they ask for it.
    "VLLM_NO_USAGE_STATS": "1",
}


def engine() -> "Table":
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}")
    from vllm_bridge import engine_methods

    return engine_methods.table(engine_methods.Slot())


def tools() -> "Table":
    from vllm_bridge import tools

    return tools.table()


def job() -> "Table":
    from vllm_bridge import jobs
    from vllm_bridge.jobs.modesty import be_modest

    be_modest()
    return jobs.table()


# What makes the table of each kind of worker.
KINDS = {"engine": engine, "tools": tools, "job": job}


async def serve(table: "Table") -> None:
    from vllm_bridge.rpc.server import Server

    Server(READ_FD, WRITE_FD, table, exit=os._exit)
    await asyncio.Event().wait()


def work(kind: str = "engine") -> None:
    """What a worker does, in a process that was started for it or forked."""
    if kind != "tools":
        os.environ.update(preload.environment())
    for fd in (READ_FD, WRITE_FD):
        try:
            os.set_inheritable(fd, False)
        except OSError:
            sys.exit(f"vllm_bridge: file descriptor {fd} is not open; Elixir starts this program")
    try:
        table = KINDS[kind]()
    except ModuleNotFoundError as error:
        not_installed(error)
    prepare()
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(table))
    else:
        uvloop.run(serve(table))


def not_installed(error: ModuleNotFoundError) -> NoReturn:
    print(f"vllm_bridge: {error}", file=sys.stderr)
    sys.exit(NOT_INSTALLED)


def prepare() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Whatever prints to standard output prints to the log.
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


def main(kind: str = "engine") -> None:
    if kind == "tools":
        work(kind)
        return
    if kind not in (*KINDS, "nursery"):
        sys.exit(f"vllm_bridge: there is no kind of worker `{kind}`, only {', '.join(KINDS)}")
    # Libraries are preloaded by the system's loader, at the start of a program.
    if "LD_PRELOAD" in (missing := preload.environment()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})  # noqa: S606
    if kind == "nursery":
        from vllm_bridge import nursery

        os.environ.update(missing)
        prepare()
        try:
            nursery.main(work)
        except ModuleNotFoundError as error:
            not_installed(error)
    else:
        work(kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
