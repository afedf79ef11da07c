"""Print what the objectives cost, as tables. Run by hand: python tests/benchmark.py [table ...]

Tables: classes (one training step of a last layer by number of classes, against full softmax,
adaptive softmax and, where it is installed, TensorFlow), overhead (each objective against
F.cross_entropy and a training step of the notebook). Every case runs in a process of its own with
the same number of threads. The cases take turns: times are medians over the rounds, ratios are
medians of the ratios within a round.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

N, D, N_SAMPLES = 256, 128, 1000
SIZES = [10**3, 10**4, 10**5, 10**6]
METHODS = ["full", "dense", "sparse", "adaptive", "tensorflow", "products"]


def torch_step(method, n_classes, device):
    """A function that makes one training step: forward, backward, SGD."""
    import torch
    import torch.nn.functional as F

    from objectives import sampled_softmax

    torch.manual_seed(0)
    embeddings = torch.randn(N, D, device=device, requires_grad=True)
    batches = iter(torch.randint(n_classes, (10_000, N), device=device))
    if method == "products":  # what no sampled softmax can do without
        rows = torch.randn(N_SAMPLES, D, device=device)
        scores = torch.randn(N, N_SAMPLES, device=device)
        return lambda: (embeddings.detach() @ rows.T, scores @ rows, scores.T @ embeddings.detach())
    if method == "adaptive":
        cutoffs = [n_classes // 100, n_classes // 10]
        layer = torch.nn.AdaptiveLogSoftmaxWithLoss(D, n_classes, cutoffs).to(device)
    else:
        layer = torch.nn.Linear(D, n_classes, device=device)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)

    def loss(labels):
        if method == "full":
            return F.cross_entropy(layer(embeddings), labels)
        if method == "adaptive":
            return layer(embeddings, labels).loss
        how = {"n_samples": N_SAMPLES, "sparse": method == "sparse"}
        return sampled_softmax(embeddings, labels, layer.weight, layer.bias, **how)[0]

    def step():
        loss(next(batches)).backward()
        sgd.step()
        sgd.zero_grad()

    return step


def tensorflow_step(n_classes, threads):
    """The same step with tf.nn.sampled_softmax_loss, compiled, updating the rows it used."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.random.set_seed(0)
    weight = tf.Variable(tf.random.normal([n_classes, D]) / math.sqrt(D))
    bias = tf.Variable(tf.zeros([n_classes]))
    embeddings = tf.Variable(tf.random.normal([N, D]))
    batches = iter(tf.random.uniform([10_000, N, 1], maxval=n_classes, dtype=tf.int64))

    @tf.function
    def train(labels):
        sampled = tf.random.uniform_candidate_sampler(labels, 1, N_SAMPLES, False, n_classes)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                tf.nn.sampled_softmax_loss(
                    weight, bias, labels, embeddings, N_SAMPLES, n_classes, sampled_values=sampled
                )
            )
        d_weight, d_bias, _ = tape.gradient(loss, [weight, bias, embeddings])
        for variable, gradient in [(weight, d_weight), (bias, d_bias)]:
            variable.scatter_sub(tf.IndexedSlices(0.1 * gradient.values, gradient.indices))

    return lambda: train(next(batches))


def waiter(device):
    """What waits until the device has done its work; nothing to wait for on a CPU."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def times_of(step, seconds, device):
    """The times of as many steps as fit into these seconds, but at least one."""
    wait, times = waiter(device), []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - started)
    return times


def peak_bytes_of(step, device):
    """How much more memory one step needs at its peak than before it."""
    for _ in range(2):
        step()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is there now
    step()
    return resident("VmHWM") - before


def step_of(case):
    if case["method"] == "tensorflow":
        return tensorflow_step(case["classes"], case["threads"])
    import torch

    torch.set_num_threads(case["threads"])
    return torch_step(case["method"], case["classes"], case["device"])


def measure_memory(case):
    return peak_bytes_of(step_of(case), case["device"])


def serve_times(case):
    """Time the step again whenever a line comes in, and answer with the median."""
    step = step_of(case)
    times_of(step, 0.2, case["device"])  # the first steps are slower
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        times = times_of(step, case["slice"], case["device"])
        print(json.dumps(statistics.median(times)), flush=True)


def own_process(function, case, **env):
    command = [sys.executable, __file__, "--run", function, json.dumps(case)]
    env = {**os.environ, "OMP_NUM_THREADS": str(case["threads"]), **env}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=env, text=True, **pipes)


def in_own_process(function, case, **env):
    """What the function prints last in a process of its own, None where that fails."""
    process = own_process(function, case, **env)
    lines = process.communicate()[0].splitlines()
    return None if process.returncode else json.loads(lines[-1])


def side_by_side(cases):
    """The times of each case in every round, one case after the other in each of them.

    A machine that is shared or warms up changes its speed from second to second. Cases that
    take turns every fraction of a second meet the same speeds, so their ratios hold.
    """
    processes = {name: own_process("serve_times", case) for name, case in cases.items()}
    for name, process in list(processes.items()):
        if not process.stdout.readline():
            del processes[name]  # its library is not installed, or the memory is too small
    times = {name: [] for name in processes}
    for _ in range(cases[name]["rounds"]):
        for name, process in processes.items():
            print(file=process.stdin, flush=True)
            times[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return times


def ratio(times, others):
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def classes_table(case):
    """Time and peak extra memory of one training step of the last layer."""
    # With every larger block mapped on its own, what is freed leaves the process at once, so
    # that resident memory is memory in use. It costs time, so times are measured without.
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print(f"one training step of the last layer: N={N}, D={D}, n_samples={N_SAMPLES}")
    print(f"{'classes':>9} {'method':11} {'ms':>9} {'memory, MB':>11} {'time / sparse':>14}")
    for n_classes in SIZES:
        cases = {method: {**case, "method": method, "classes": n_classes} for method in METHODS}
        times = side_by_side(cases)
        for method in METHODS:
            if method not in times:
                print(f"{n_classes:>9,} {method:11} {'not available':>21}")
                continue
            memory = in_own_process("measure_memory", cases[method], **mapped)
            memory = math.nan if memory is None else memory / 1e6
            print(
                f"{n_classes:>9,} {method:11} {1000 * statistics.median(times[method]):>9.2f} "
                f"{memory:>11.1f} {ratio(times[method], times['sparse']):>14.2f}",
                flush=True,
            )
    sparse = side_by_side({n: {**case, "method": "sparse", "classes": n} for n in SIZES})
    print(f"sparse by number of classes, its time relative to that at {SIZES[1]:,}:")
    for n_classes, times in sparse.items():
        print(f"{n_classes:>9,} {ratio(times, sparse[SIZES[1]]):.2f}")


def objective_calls(n, n_classes, device):
    """Each objective as a function of nothing that runs forward and backward on fixed inputs."""
    import torch
    import torch.nn.functional as F

    import objectives as o

    torch.manual_seed(0)
    logits, baseline = torch.randn(n, n_classes, device=device), torch.zeros(n, device=device)
    labels, size = torch.randint(n_classes, (n,), device=device), 256
    head = torch.nn.Linear(size, n_classes, device=device)
    embeddings = torch.randn(n, size, device=device, requires_grad=True)
    x, v = logits.clone().requires_grad_(), baseline.requires_grad_()

    def played(choose):
        actions = choose(x)
        return x, actions, actions == labels

    losses = {
        "F.cross_entropy": lambda: F.cross_entropy(x, labels),
        "softmax_cross_entropy": lambda: o.softmax_cross_entropy(x, labels)[0],
        "teacher_student": lambda: o.teacher_student(x, labels, logits)[0],
        "linear layer, F.cross_entropy": lambda: F.cross_entropy(head(embeddings), labels),
        "sampled_softmax": lambda: o.sampled_softmax(embeddings, labels, head.weight, head.bias)[0],
        "value_function": lambda: o.value_function(*played(o.epsilon_greedy))[0],
        "policy_gradient": lambda: o.policy_gradient(*played(o.sample_actions), v)[0],
    }
    return {name: lambda loss=loss: loss().backward() for name, loss in losses.items()}


def step_of_notebook(n, n_steps=20):
    """A function that returns the seconds of a training step of the notebook, by its own cells."""
    notebook = json.loads((Path(__file__).parent.parent / "training_objectives.ipynb").read_text())
    source = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    names = {"print": lambda *_: None}
    machinery = ["network", "config", "predict", "train", "stand-in", "data", "optimizers"]
    for cell in ["find-objectives", "imports", "device", *machinery]:
        exec(source[cell], names)
    classes, halves = names["stand_in"]()
    data = names["Data"]("", classes, *(names["to_device"](*half) for half in halves))
    config = names["Config"](1, n, optimizer="Muon", n_images=n * n_steps, n_test=1)

    def softmax(model, images, labels):
        return names["objectives"].softmax_cross_entropy(model(images), labels)

    def seconds():
        _, history, _ = names["train"](softmax, data, config, lambda text: None)
        return history[0]["seconds"] / n_steps

    return seconds


def measure_overhead(case):
    import torch

    torch.set_num_threads(case["threads"])
    step, calls = step_of_notebook(128), objective_calls(128, 10, case["device"])
    rounds = []
    for _ in range(1 + case["rounds"]):
        times = {"training step": step()}
        for name, call in calls.items():
            times[name] = statistics.median(times_of(call, case["slice"], case["device"]))
        rounds.append(times)
    return {name: [times[name] for times in rounds[1:]] for name in times}  # the first are slower


def overhead_table(case):
    """Loss, forward and backward, of each objective as a share of the tutorial's training step."""
    times = in_own_process("measure_overhead", case)
    step = times.pop("training step")
    milliseconds = 1000 * statistics.median(step)
    print(f"loss and its gradient, N=128, C=10; a training step takes {milliseconds:.1f} ms")
    print(f"{'':30} {'microseconds':>12} {'share of a step':>16}")
    for name, seconds in times.items():
        print(f"{name:30} {1e6 * statistics.median(seconds):>12.0f} {ratio(seconds, step):>16.2%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {"classes": classes_table, "overhead": overhead_table}
    parser.add_argument("tables", nargs="*", help=f"any of: {', '.join(tables)}; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=20, help="how often each case has its turn")
    parser.add_argument("--slice", type=float, default=0.25, help="seconds of a turn")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(globals()[args.run[0]](json.loads(args.run[1]))))
        return
    case = vars(args)
    print(f"{args.device}, {args.threads} threads")
    for name in args.tables or tables:
        tables[name](case)


if __name__ == "__main__":
    main()
