"""Network namespaces that one switch joins, each by a link that can be cut, slow, late and lossy.

``python switch.py NAME COUNT`` (as root) makes the namespaces NAME1 to NAMEcount, the n-th with the
address 10.77.0.n, and says ``ready``; they are gone when its input ends. Each line of that is for
the link of one namespace, in both directions, until the next one for it, and is answered by ``done``:

    2 up=0               cut: what is sent is lost, and nobody is told
    2 delay=0.1          seconds later
    2 loss=0.05          so much of the packets is lost
    2 rate=125000        bytes per second; what waits for longer than 0.4 s is lost

Kernels can do this, too (``tc qdisc add … netem``), where they were built with it.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import subprocess
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000

# In seconds: how long what is sent too fast may wait.
PATIENCE = 0.4

FRAME = 65_536


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Link:
    """The device of one namespace, whose other end is here."""

    def __init__(self, name: str, number: int):
        self.namespace = f"{name}{number}"
        self.set()
        # When the last frame that was sent has passed, by direction.
        self.passed = {"in": 0.0, "out": 0.0}
        self.device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        tap = f"tap{os.getpid() % 100_000}.{number}"
        flags = IFF_TAP | IFF_NO_PI
        fcntl.ioctl(self.device, TUNSETIFF, struct.pack("16sH", tap.encode(), flags))
        ip("netns", "add", self.namespace)
        ip("link", "set", tap, "netns", self.namespace, "name", "eth0")
        for device, address in [("lo", None), ("eth0", f"10.77.0.{number}/24")]:
            if address:
                ip("-n", self.namespace, "addr", "add", address, "dev", device)
            ip("-n", self.namespace, "link", "set", device, "up")

    def set(self, up: float = 1, delay: float = 0, loss: float = 0, rate: float = 0) -> None:
        self.up, self.delay, self.loss, self.rate = up, delay, loss, rate

    def pass_on(self, size: int, direction: str, now: float) -> float | None:
        """When a frame that comes now is through; None where it is lost."""
        if not self.up or random.random() < self.loss:
            return None
        if self.rate:
            begins = max(now, self.passed[direction])
            if begins - now > PATIENCE:
                return None
            now = self.passed[direction] = begins + size / self.rate
        return now + self.delay


class Switch:
    def __init__(self, links: list[Link]):
        self.links = links
        self.homes: dict[bytes, Link] = {}
        self.under_way: list[tuple[float, int, Link, bytes]] = []
        self.numbers = itertools.count()

    def take(self, link: Link) -> None:
        """All that the namespace of a link has sent."""
        with contextlib.suppress(BlockingIOError):
            while frame := os.read(link.device, FRAME):
                self.homes[frame[6:12]] = link
                home = self.homes.get(frame[:6])
                others = [other for other in self.links if other is not link]
                for to in [home] if home else others:
                    self.send(link, to, frame)

    def send(self, link: Link, to: Link, frame: bytes) -> None:
        due = link.pass_on(len(frame), "out", time.monotonic())
        if due is not None:
            due = to.pass_on(len(frame), "in", due)
        if due is not None:
            heapq.heappush(self.under_way, (due, next(self.numbers), to, frame))

    def deliver(self) -> float | None:
        """Gives what is due, and says in how many seconds the next is."""
        while self.under_way:
            due, _, link, frame = self.under_way[0]
            if due > time.monotonic():
                return due - time.monotonic()
            heapq.heappop(self.under_way)
            if link.up:
                # A device that is full loses it.
                with contextlib.suppress(BlockingIOError):
                    os.write(link.device, frame)
        return None


def main(name: str, count: str) -> None:
    links: list[Link] = []
    try:
        for number in range(1, int(count) + 1):
            links.append(Link(name, number))
        print("ready", flush=True)
        serve(Switch(links))
    finally:
        for link in links:
            ip("netns", "del", link.namespace)


def serve(switch: Switch) -> None:
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    for link in switch.links:
        selector.register(link.device, selectors.EVENT_READ, link)
    while True:
        wait = switch.deliver()
        for key, _ in selector.select(wait):
            if key.data:
                switch.take(key.data)
                continue
            line = sys.stdin.readline()
            if not line:
                return
            number, *settings = line.split()
            given = {key: float(value) for key, value in (one.split("=") for one in settings)}
            switch.links[int(number) - 1].set(**given)
            print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
