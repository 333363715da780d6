"""What each quantization method that is installed costs a start: CPU milliseconds of a plan, which
every start begins with, and of finding a method by its name, with more and more methods that are
made up.

    PYTHON bench/installed_methods.py [MODEL]

Medians of 15 rounds in turns; a package that is a plugin of vLLM's registers its methods so.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from vllm_bridge.engine import plan
from vllm_bridge.quantization import registry
from vllm_bridge.quantization.method import Method

DEMO = Path(__file__).resolve().parents[1] / "priv" / "models" / "demo-awq"
COUNTS = (0, 1, 10, 100, 1000, 10_000)
ROUNDS = 15


def milliseconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def made_up(count: int) -> dict[str, Method]:
    return {
        (name := f"made-up-{number}"): type("MadeUp", (Method,), {"name": name})()
        for number in range(count)
    }


def main(model: str) -> None:
    methods = {count: made_up(count) for count in COUNTS}
    plans: dict[int, list[float]] = {count: [] for count in COUNTS}
    names: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(ROUNDS + 1):
        for count in COUNTS:
            registry._added = methods[count]
            plans[count].append(milliseconds(lambda: plan.plan(model, {})))
            names[count].append(milliseconds(lambda: registry.of("unheard-of")))
    print(f"{'methods':>8} {'plan, ms':>10} {'by name, ms':>12}")
    for count in COUNTS:
        # The first round warms up.
        medians = [statistics.median(figures[count][1:]) for figures in (plans, names)]
        print(f"{count:>8} {medians[0]:>10.2f} {medians[1]:>12.4f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(DEMO))
