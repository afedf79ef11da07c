"""Print what the objectives cost, as tables. Run by hand: python tests/benchmark.py [table ...]

classes: one training step of a last layer by number of classes, with full softmax, PyTorch's own
softmax in chunks, adaptive softmax, sampled softmax and, where it is installed, TensorFlow's.
Labels follow Zipf's law and classes are sorted by frequency, which is what adaptive softmax and
log-uniform noise are made for.

overhead: each objective against F.cross_entropy.

Every case of the first table runs in a process of its own, and the cases take turns: times are
medians over the rounds, ratios are medians of the ratios within a round. On a CPU that is shared,
--threads 1 --processor-time counts only what this process computes.
"""

import argparse
import itertools
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
METHODS = ["full", "chunked", "adaptive", "dense", "sparse", "tensorflow", "products"]
N_BATCHES = 1000


def zipf_labels(n_classes):
    """Batches of labels, class c with a frequency in proportion to 1 / (c + 1)."""
    import torch

    from objectives import ClassFrequencies

    generator = torch.Generator().manual_seed(0)
    frequencies = ClassFrequencies(1 / torch.arange(1, n_classes + 1))
    return frequencies.sample((N_BATCHES, N), generator=generator)


def torch_step(method, n_classes, device):
    """A function that makes one training step: forward, backward, SGD."""
    import torch
    import torch.nn.functional as F

    from objectives import LogUniform, sampled_softmax

    torch.manual_seed(0)
    embeddings = torch.randn(N, D, device=device, requires_grad=True)
    batches = itertools.cycle(zipf_labels(n_classes).to(device))
    noise = LogUniform(n_classes, device=device)
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
        if method == "chunked":
            options = torch.nn.LinearCrossEntropyOptions()
            settings = {"linear_bias": layer.bias, "options": options}
            return F.linear_cross_entropy(embeddings, layer.weight, labels, **settings)
        if method == "adaptive":
            return layer(embeddings, labels).loss
        settings = {"n_samples": N_SAMPLES, "noise": noise, "sparse": method == "sparse"}
        return sampled_softmax(embeddings, labels, layer.weight, layer.bias, **settings)[0]

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
    batches = itertools.cycle(tf.constant(zipf_labels(n_classes).numpy())[:, :, None])

    @tf.function
    def train(labels):
        sampled = tf.random.log_uniform_candidate_sampler(labels, 1, N_SAMPLES, False, n_classes)
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


def times_of(step, case, seconds):
    """The times of as many steps as fit into these seconds, but at least one."""
    wait = waiter(case["device"])
    clock = time.process_time if case["processor_time"] else time.perf_counter
    times = []
    while not times or sum(times) < seconds:
        started = clock()
        step()
        wait()
        times.append(clock() - started)
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
    times_of(step, case, 0.2)  # the first steps are slower
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        times = times_of(step, case, case["slice"])
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
    for n_classes in case["sizes"]:
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
    sparse = {n: {**case, "method": "sparse", "classes": n} for n in case["sizes"]}
    times = side_by_side(sparse)
    fewest, most = min(times), max(times)
    print(
        f"sparse, {most:,} classes relative to {fewest:,}: {ratio(times[most], times[fewest]):.2f}"
    )


def objective_calls(n, n_classes, device):
    """Each objective as a function of nothing that runs forward and backward on fixed inputs."""
    import torch
    import torch.nn.functional as F

    import objectives as o

    torch.manual_seed(0)
    teacher_logits = torch.randn(n, n_classes, device=device)
    x = teacher_logits.clone().requires_grad_()
    labels = torch.randint(n_classes, (n,), device=device)
    head = torch.nn.Linear(256, n_classes, device=device)
    embeddings = torch.randn(n, 256, device=device, requires_grad=True)

    def value_function():
        actions = o.epsilon_greedy(x)
        return o.value_function(x, actions, actions == labels)[0]

    def policy_gradient():
        actions = o.sample_actions(x)
        return o.policy_gradient(x, actions, actions == labels)[0]

    losses = {
        "F.cross_entropy": lambda: F.cross_entropy(x, labels),
        "softmax_cross_entropy": lambda: o.softmax_cross_entropy(x, labels)[0],
        "teacher_student": lambda: o.teacher_student(x, labels, teacher_logits)[0],
        "linear layer, F.cross_entropy": lambda: F.cross_entropy(head(embeddings), labels),
        "sampled_softmax": lambda: o.sampled_softmax(embeddings, labels, head.weight, head.bias)[0],
        "value_function": value_function,
        "policy_gradient": policy_gradient,
    }
    return {name: lambda loss=loss: loss().backward() for name, loss in losses.items()}


def measure_overhead(case):
    import torch

    torch.set_num_threads(case["threads"])
    calls = objective_calls(128, 10, case["device"])
    rounds = []
    for _ in range(1 + case["rounds"]):  # the first is slower
        times = [times_of(call, case, case["slice"]) for call in calls.values()]
        rounds.append([statistics.median(each) for each in times])
    return dict(zip(calls, zip(*rounds[1:])))


def overhead_table(case):
    """Loss, forward and backward, of each objective."""
    times = in_own_process("measure_overhead", case)
    print("loss and its gradient, N=128, C=10")
    print(f"{'':30} {'microseconds':>12} {'relative':>9}")
    for name, each in times.items():
        relative = ratio(each, times["F.cross_entropy"])
        print(f"{name:30} {1e6 * statistics.median(each):>12.0f} {relative:>9.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {"classes": classes_table, "overhead": overhead_table}
    parser.add_argument("tables", nargs="*", help=f"any of: {', '.join(tables)}; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=20, help="how often each case has its turn")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
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
