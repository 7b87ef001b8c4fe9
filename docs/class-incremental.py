"""Class-incremental learning with distilled sets: two tasks of five digits each, one after the other.

Of each task only a memory remains: its distilled set, as many random real images, or as many as fit into the bytes of
the distilled set. Run it with ``python docs/class-incremental.py``; it takes about two minutes on two CPU cores.
"""

import statistics

import condense

OLD, NEW = ("0", "1", "2", "3", "4"), ("5", "6", "7", "8", "9")
NETWORK, IPC, RUNS = "convnet-d2-w32-in", 5, 3


def accuracy(net, task):
    """Fraction of the test images of all ten classes that is classified correctly."""
    import torch

    with torch.no_grad():
        images = task.test_batch(torch.arange(len(task.test)))
        return float((net(images).argmax(1) == torch.from_numpy(task.test.labels)).float().mean())


def main():
    digits = condense.task("digits")
    old, new = digits.select_classes(OLD), digits.select_classes(NEW)
    arms = {
        "distilled": ("dm", IPC, {"steps": 500}),
        "random, equal number": ("random", IPC, {}),
        "random, equal bytes": ("random", 4 * IPC, {}),  # distilled pixels are float32, real ones uint8
    }
    for arm, (method, ipc, settings) in arms.items():
        first = condense.distill(method, old, ipc, network=NETWORK, **settings)
        second = condense.distill(method, new, ipc, network=NETWORK, **settings)
        memory = condense.join(first, second)
        runs = [accuracy(condense.fit(memory, NETWORK, seed=seed), digits) for seed in range(RUNS)]
        mean, std = 100 * statistics.mean(runs), 100 * statistics.stdev(runs)
        size = memory.stored.numel() * memory.stored.element_size()
        print(f"{arm}: {len(memory)} images, {size} bytes, {mean:.1f} ± {std:.1f} %")


if __name__ == "__main__":
    main()
