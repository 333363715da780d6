"""A worker that does what it is told, for tests of faults; standard library only.

It speaks the protocol of guides/protocol.md. The model's name says how it loads and each
prompt how it is answered: steps, parted by ";", each a name and perhaps ":" and an argument.

Loading: `ready`, `refuse:REASON`, `sleep:SECONDS`, `touch:FILE`, `exit:STATUS`, `kill`, `hang`, `garbage`, `print:TEXT`,
`once:FILE:STEP` (do STEP unless FILE exists, and make it), `if:FILE:STEP` (only STEP if FILE exists), `raw:HEX` (write these bytes), `frame:HEX`
(write a frame with these bytes, in which "ID" stands for the request's id), `litter` (make what may be left behind:
stubborn and stopped children, shared memory, a file and a socket in the temporary folder). One that is a rank
does the steps behind a step `rank`, and is ready without a word; `told:FILE` writes its options.
Prompts: `reply:TEXT`, `error:REASON`, `hold` (answer when cancelled, or on `release`), `late:TEXT`
(answer with TEXT only after a cancel), `release`, `wait:FILE` (answer once there is the file), `held` (answer with how many are held), `duplicate:TEXT`, `unknown:TEXT` (first an
answer to an id that was never used), `print:TEXT`, `garbage`, `shapeless`, `malformed`, `truncated`,
`oversized`, `exit:STATUS`, `kill`, `stop`, `child` (answer with the pid of a stubborn child),
`env:NAME`, `devices`, `http`, `pid`, `param:NAME` (answer with a param of the request), `dying` (answer as a dead
engine does, and end soon after), `once:FILE:STEP`, `stall` (hold, and make no progress any more), `slow` (hold, and take
one long step), `sleep:SECONDS`, `delta:TEXT` (a delta; other steps follow), `packed:TEXT,TEXT` (the same in columns, with as many tokens as bytes), `misshapen` (a delta
that is none), `credit` (answer with the credit granted so far). To `tokenize`, a character is a token.
Over HTTP the prompt is the one in the body: `answer:STATUS:TEXT`, or `head:STATUS` (of events, or `head:STATUS:CONTENT-TYPE`), `chunk:TEXT`
and `end` for an answer that comes bit by bit; `asked` (answer with the params of the request, as Python writes them).
"""

import os
import signal
import struct
import sys
import threading
import time

# Hundreds are started, so what few of them need is imported there.
# Isolated, so that the folder of the program is not among those with modules.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fake_wire import encode, receive, send, write


def output(request: int, text: str) -> dict[str, object]:
    completion = {
        "index": 0,
        "text": text,
        "token_ids": struct.pack("<2I", 1, 2),
        "cumulative_logprob": None,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    return {
        "request_id": str(request),
        "prompt": None,
        "prompt_token_ids": b"",
        "prompt_logprobs": None,
        "outputs": [completion],
        "finished": True,
        "num_cached_tokens": 0,
        "metrics": None,
    }


def http_answer(status: int, text: str) -> dict[str, object]:
    headers = [["content-type", "application/json"], ["content-length", str(len(text.encode()))]]
    return {"status": status, "headers": headers, "body": text.encode()}


def error(reason: str) -> dict[str, object]:
    return {"reason": reason, "message": f"The fake worker says {reason}.", "details": {}}


INFO = {"model": "fake", "max_num_seqs": 8, "max_model_len": 128, "device": "none"}

held: dict[int, str | None] = {}
granted = 0
devices: list[str] = []
http: list[dict[str, str]] = []

# What a ping is told of the engine, and which of the two still move.
progress = {"steps": 0, "beats": 0}
moving = {"steps", "beats"}
params: dict[object, object] = {}


def answer_later(request: int, path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)
    send([1, request, None, output(request, "waited")])


def stubborn_child() -> int:
    """A grandchild in a session of its own that ignores SIGTERM and holds the protocol's pipe."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(writer, str(os.getpid()).encode())
            while True:
                signal.pause()
        os._exit(0)
    return int(os.read(reader, 32))


def litter() -> None:
    stubborn_child()
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    folder = os.environ["TMPDIR"]
    for path in (f"{folder}/file", f"/dev/shm/psm_{os.getpid()}_{os.urandom(4).hex()}"):
        with open(path, "wb") as file:
            file.write(b"left behind")
    import socket

    socket.socket(socket.AF_UNIX).bind(f"{folder}/socket")


def common(name: str, argument: str, request: int) -> bool:
    """The steps that loading and prompts share; false if `name` is none of them."""
    if name == "print":
        print(argument, flush=True)
    elif name == "exit":
        os._exit(int(argument))
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "touch":
        with open(argument, "w"):
            pass
    elif name == "sleep":
        time.sleep(float(argument))
    elif name == "garbage":
        write(struct.pack(">I", 3) + b"\xc1\xc1\xc1")
    elif name == "raw":
        write(bytes.fromhex(argument))
    elif name == "frame":
        payload = bytes.fromhex(argument.replace("ID", encode(request).hex()))
        write(struct.pack(">I", len(payload)) + payload)
    elif name == "litter":
        litter()
    elif name == "once":
        path, _, step = argument.partition(":")
        if not os.path.exists(path):
            with open(path, "w"):
                pass
            inner, _, inner_argument = step.partition(":")
            if not common(inner, inner_argument, request):
                prompt_step(inner, inner_argument, request)
            if inner in ("hang", "hold", "dying"):
                raise StopIteration
    else:
        return False
    return True


def prompt_step(name: str, argument: str, request: int) -> None:
    if name == "reply":
        send([1, request, None, output(request, argument)])
    elif name == "error":
        send([1, request, error(argument), None])
    elif name == "hold":
        held[request] = None
    elif name == "stall":
        held[request] = None
        moving.clear()
    elif name == "slow":
        held[request] = None
        moving.discard("steps")
    elif name == "wait":
        threading.Thread(target=answer_later, args=(request, argument), daemon=True).start()
    elif name == "late":
        held[request] = argument
    elif name == "release":
        for other in list(held):
            send([1, other, None, output(other, "released")])
            del held[other]
        send([1, request, None, output(request, "released")])
    elif name == "held":
        send([1, request, None, output(request, str(len(held)))])
    elif name == "duplicate":
        send([1, request, None, output(request, argument)])
        send([1, request, None, output(request, "a second answer")])
    elif name == "unknown":
        send([1, 2**40, None, output(0, "nobody asked")])
        send([1, request, None, output(request, argument)])
    elif name == "shapeless":
        send({"not": "a message"})
    elif name == "malformed":
        # The head of a response is in order, its body is not.
        payload = b"\x94\x01" + encode(request) + b"\xc0\xc1"
        write(struct.pack(">I", len(payload)) + payload)
    elif name == "truncated":
        write(struct.pack(">I", 1000) + b"\x94\x01")
        os._exit(1)
    elif name == "oversized":
        send([1, request, None, output(request, "x" * 2_000_000)])
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "child":
        send([1, request, None, output(request, str(stubborn_child()))])
    elif name == "delta":
        send([2, "deltas", {"deltas": [[request, 0, argument, b"", None, None, None]]}])
    elif name == "packed":
        texts = argument.split(",")
        columns = {
            "ids": struct.pack(f"<{len(texts)}Q", *[request] * len(texts)),
            "counts": struct.pack(f"<{len(texts)}I", *map(len, texts)),
            "token_ids": b"".join(struct.pack("<I", ord(char)) for char in "".join(texts)),
            "texts": texts,
        }
        send([2, "packed_deltas", columns])
    elif name == "misshapen":
        send([2, "deltas", {"deltas": [[request, 0, None]]}])
    elif name == "credit":
        send([1, request, None, output(request, str(granted))])
    elif name == "answer":
        status, _, text = argument.partition(":")
        send([1, request, None, http_answer(int(status), text)])
    elif name == "asked":
        send([1, request, None, http_answer(200, repr(params))])
    elif name == "head":
        status, _, content_type = argument.partition(":")
        headers = [["content-type", content_type or "text/event-stream"]]
        head = [request, int(status), headers]
        send([2, "deltas", {"deltas": [head]}])
    elif name == "chunk":
        send([2, "deltas", {"deltas": [[request, argument.encode()]]}])
    elif name == "end":
        send([1, request, None, http_answer(200, "")])
    elif name == "devices":
        send([1, request, None, output(request, ",".join(devices))])
    elif name == "http":
        send([1, request, None, output(request, str(http))])
    elif name == "pid":
        send([1, request, None, output(request, str(os.getpid()))])
    elif name == "param":
        send([1, request, None, output(request, str(params.get(argument)))])
    elif name == "dying":
        send([1, request, error("engine_dead"), None])
        # The worker lets everybody have an answer before it ends.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(70))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    elif name == "env":
        send([1, request, None, output(request, os.environ.get(argument, ""))])
    else:
        raise ValueError(name)


def load(model: str, request: int) -> None:
    for step in model.partition(";rank;")[0].split(";"):
        name, _, argument = step.partition(":")
        if name == "ready":
            send([1, request, None, INFO])
        elif name == "refuse":
            send([1, request, error(argument), None])
        elif name == "hang":
            return
        elif name == "if":
            path, _, step = argument.partition(":")
            if os.path.exists(path):
                return load(step, request)
        elif not common(name, argument, request):
            raise ValueError(name)


def rank(model: str, options: dict[str, object], request: int) -> None:
    import json

    checkpoint = os.environ.get("FAKE_CHECKPOINT", "fake")
    send([2, "progress", {"id": request, "phase": "engine", "checkpoint": checkpoint}])
    _, _, steps = model.partition(";rank;")
    for step in filter(None, steps.split(";")):
        name, _, argument = step.partition(":")
        if name == "told":
            with open(argument, "w") as file:
                json.dump(options, file)
        else:
            load(step, request)


def generate(prompt: str, request: int) -> None:
    try:
        for step in prompt.split(";"):
            name, _, argument = step.partition(":")
            if not common(name, argument, request):
                prompt_step(name, argument, request)
    except StopIteration:
        pass


def main() -> None:
    global granted, params
    while True:
        match receive():
            case [0, request, "hello", _]:
                hello = {"protocol": 2, "bridge": "0", "python": "3.11", "pid": os.getpid()}
                packages = {"vllm": os.environ.get("FAKE_VLLM", "0")}
                send([1, request, None, hello | {"packages": packages, "methods": []}])
            case [0, request, "rank", {"model": model, "options": options}]:
                rank(model, options, request)
            case [0, request, "load", {"model": model, **given}]:
                devices[:] = given.get("devices", [])
                http[:] = given.get("http", [])
                phase = {"phase": "engine"}
                if "nnodes" in given.get("options", {}):
                    phase["checkpoint"] = "fake"
                send([2, "load_progress", phase])
                load(model, request)
            case [0, request, "generate", {"prompt": prompt, **rest}]:
                params = rest
                generate(prompt, request)
            case [0, request, "tokenize", {"text": text}]:
                send([1, request, None, {"token_ids": bytes(4 * len(text))}])
            case [0, request, "prepare_http", {"settings": settings}]:
                http.append(settings)
                send([1, request, None, None])
            case [0, request, "reset_prefix_cache", _]:
                send([1, request, None, None])
            case [0, request, "http_request", given]:
                import json

                params = given
                generate(json.loads(given["body"])["prompt"], request)
            case [0, request, "metric_families", _]:
                send([1, request, None, []])
            case [2, "credit", {"count": count}]:
                granted += count
            case [2, "cancel", {"id": request}]:
                if request in held:
                    text = held.pop(request)
                    if text is None:
                        send([1, request, error("aborted"), None])
                    else:
                        send([1, request, None, output(request, text)])
            case [2, "ping", {"n": n}]:
                for name in moving:
                    progress[name] += 1
                send([2, "pong", {"n": n, "unfinished": len(held)} | progress])
            case [2, "shutdown", _]:
                sys.exit(0)


main()
