"""``python -m vllm_bridge``: a worker that speaks the protocol on file descriptors 3 and 4.

vLLM's processes are spawned and import this module again, so that nothing happens on import.
"""

import asyncio
import logging
import os
import sys

try:
    from vllm_bridge.engine import Engine
    from vllm_bridge.server import Server
except ModuleNotFoundError as error:
    missing: ModuleNotFoundError | None = error
else:
    missing = None

# The exit status by which Elixir knows that this interpreter lacks the packages.
NOT_INSTALLED = 78  # EX_CONFIG

READ_FD = 3
WRITE_FD = 4

# Set before vLLM is imported, and only where the user has not set them.
ENVIRONMENT = {
    # Standard output is nobody's in a worker; logs go where errors go.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # No usage reports leave the user's machine unless they ask for it.
    "VLLM_NO_USAGE_STATS": "1",
}


async def serve() -> None:
    engine = Engine()
    server = Server(READ_FD, WRITE_FD, engine, exit=os._exit)
    engine.on_death = server.engine_died
    await asyncio.Event().wait()


def main() -> None:
    if missing is not None:
        print(f"vllm_bridge: {missing}", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    for fd in (READ_FD, WRITE_FD):
        try:
            os.set_inheritable(fd, False)
        except OSError:
            sys.exit(f"vllm_bridge: file descriptor {fd} is not open; Elixir starts this program")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Whatever prints to standard output prints to the log.
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())


if __name__ == "__main__":
    main()
