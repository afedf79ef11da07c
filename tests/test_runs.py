"""A saved training never lies: it is found again exactly if nothing has changed that it depends on.

Cells are really edited, in real kernels. An edited function prints EDITED when it runs, so that the
output tells what ran; "found in RUNS" tells that nothing did.
"""

import ast
import os
import subprocess

import pytest
from notebook import ROOT, cells_defining, cells_needed, kernel, names_of

DEFINITIONS = ["train_seeds", "same_trainings", "summary", "Data", "softmax_objective"]
START = """
import contextlib, errno, signal

def coloured(n, seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(100, (n, 3, 32, 32), generator=random, dtype=torch.uint8)
    images[torch.arange(n), labels] += 60
    return images, labels

data = Data("colours", ("red", "green", "blue"), coloured(96, 0), coloured(60, 1))
config = Config(epochs=1, batch_size=32, learning_rate=0.02, width=4)
runs_folder = Path("runs")
DEVICE, PRECISION = torch.device("cpu"), torch.float32
torch.set_num_threads(1)

def bits(model):
    return fingerprint(model.state_dict())

def softmax(**settings):
    model, rows = train_once("softmax", softmax_objective, data, config, **settings)
    print("key", rows["key"][0], "bits", bits(model) if model else None)
    print("accuracy", rows["accuracy"].iloc[-1], "files", len(list(runs_folder.glob("*"))))
"""


def text_of(outputs):
    """What a reader sees; a line that was renewed is seen as it is at last."""
    text = ""
    for output in outputs:
        if output.output_type == "error":
            text += "\n".join(output.traceback)
        elif output.output_type == "stream":
            text += output.text
        else:
            text += output.data["text/plain"] + "\n"
    return text


def run_all_cells(run):
    """Run the cells that a training needs, but not those that load data."""
    run("import sys; sys.path.insert(0, '')")  # import the objectives.py in the kernel's folder
    for cell in cells_needed(*DEFINITIONS):
        if not names_of(cell.source)[0] & {"data", "configs", "machine"}:
            run(cell.source)
    run(START)


def start(run):
    """Run all cells, and return a function that runs source without an error and returns text."""

    def run_well(source):
        outputs = run(source)
        assert all(output.output_type != "error" for output in outputs), text_of(outputs)
        return text_of(outputs)

    run_all_cells(run_well)
    return run_well


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "objectives.py").write_bytes((ROOT / "objectives.py").read_bytes())
    return folder


@pytest.fixture(scope="module")
def run_raw(folder):
    with kernel(folder) as run:
        yield run


@pytest.fixture(scope="module")
def run(run_raw):
    return start(run_raw)


@pytest.fixture(scope="module")
def run_elsewhere(folder):
    """Another kernel, in which sets have another order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "7")
        with kernel(folder) as run:
            yield start(run)


def was_found(text):
    return "found in RUNS" in text


def numbers_of(text):
    """The lines with the key, the bits of the weights, and the accuracy."""
    return [line.split(" files")[0] for line in text.splitlines() if line[:3] in ("key", "acc")]


def edited(source, name):
    """The source, in which a function or method prints EDITED whenever it is called."""
    tree = ast.parse(source)
    body = tree.body
    for part in name.split("."):
        (definition,) = [node for node in body if getattr(node, "name", None) == part]
        body = definition.body
    has_docstring = ast.get_docstring(definition) is not None
    body.insert(int(has_docstring), ast.parse("print('EDITED')").body[0])
    return ast.unparse(tree)


# Edited cells

ON_THE_WAY = ["train", "build", "predict", "move", "normalise", "autocast", "rise_and_fall"]
ON_THE_WAY += ["small_cnn", "convolution", "whitening_layer", "whitening_filters"]
ON_THE_WAY += ["Network.__init__", "Network.forward", "muon", "Muon.step", "orthogonal"]
ON_THE_WAY += ["newton_schulz", "softmax_objective"]


@pytest.mark.parametrize("name", ON_THE_WAY)
def test_an_edited_cell_counts_at_once_and_editing_back_finds_the_earlier_training(run, name):
    (cell,) = cells_defining(name.partition(".")[0])
    before = run("softmax()")
    run(edited(cell.source, name))
    after = run("softmax()")
    assert "EDITED" in after and not was_found(after)
    assert was_found(run("softmax()"))
    run(cell.source)
    back = run("softmax()")
    assert was_found(back) and "EDITED" not in back and numbers_of(back) == numbers_of(before)


def test_an_earlier_network_can_be_kept_under_another_name(run):
    (cell,) = cells_defining("small_cnn")
    text = run(
        f"""
runs_folder = Path("kept")
softmax()
kept_cnn = small_cnn
{edited(cell.source, "small_cnn")}
train_once("softmax", softmax_objective, data, replace(config, network=kept_cnn))
del kept_cnn
print("now the new one")
softmax()
{cell.source}
runs_folder = Path("runs")
"""
    )
    before, after = text.split("now the new one")
    assert was_found(before) and "EDITED" not in before
    assert not was_found(after) and "EDITED" in after


def test_what_is_saved_under_a_key_is_what_was_trained(run, run_elsewhere):
    """An optimiser that takes no step is saved under a key of its own, not under the sound one."""
    (cell,) = cells_defining("train")
    assert "scaler.step(optimizer)" in cell.source
    run("runs_folder = Path('crippled')")
    run(cell.source.replace("scaler.step(optimizer)", "pass"))
    crippled = run("softmax()")
    assert crippled.count("\n") and not was_found(crippled)
    run(cell.source)
    sound = run("softmax()")
    assert not was_found(sound) and numbers_of(sound) != numbers_of(crippled)
    run("runs_folder = Path('runs')")
    again = run_elsewhere("runs_folder = Path('crippled'); softmax()")
    assert was_found(again) and numbers_of(again) == numbers_of(sound)


def test_comments_docstrings_and_the_place_of_a_function_do_not_count(run):
    (cell,) = cells_defining("train")
    run("softmax()")
    run("# one line more\n\n" + cell.source.replace('"""Train', '"""(We) train'))
    assert was_found(run("softmax()"))


def test_objectives_count_as_they_are_in_memory(run, folder):
    path = folder / "objectives.py"
    source = path.read_text(encoding="utf-8")
    run("softmax()")
    path.write_text(edited(source, "softmax_cross_entropy"), encoding="utf-8")
    text = run("softmax()")
    assert was_found(text) and "EDITED" not in text
    text = run("import importlib\nimportlib.reload(objectives)\nsoftmax()")
    assert not was_found(text) and "EDITED" in text
    path.write_text(source, encoding="utf-8")
    text = run("importlib.reload(objectives)\nsoftmax()")
    assert was_found(text) and "EDITED" not in text


def test_other_images_labels_or_settings_make_another_training(run):
    text = run("""
images, labels = data.train
pixel = images.clone()
pixel[0, 0, 0, 0] ^= 1
changed = [replace(data, train=(pixel, labels)), replace(data, train=(images, labels.roll(1)))]
changed += [replace(data, test=coloured(60, 2)), replace(data, classes=("a", "b", "c"))]
for other in [data, replace(data, name="another name"), *changed]:
    print("images", describe(other, config, [])["images"])
for change in [{}, {"seed": 1}, {"width": 8}, {"flip": False}]:
    print("config", fingerprint(replace(config, **change)))
for temperature in [1, 1.0, 2.0, np.float64(2.0), True]:
    print("config", fingerprint(partial(softmax_objective, temperature=temperature)))
images[0, 0, 0, 0] ^= 1
print("in place", describe(data, config, [])["images"])
images[0, 0, 0, 0] ^= 1
""")
    images = [line for line in text.splitlines() if line.startswith("images")]
    configs = [line for line in text.splitlines() if line.startswith("config")]
    assert images[0] == images[1] and len({*images}) == 5
    assert len({*configs}) == len(configs) == 9
    assert f"in place {images[2].split()[1]}" in text


# What an objective reads

MINE = """
def mine(model, images, labels):
    {first}
    loss, metrics = softmax_objective(model, images, labels)
    return loss * {factor}, metrics

def train_mine():
    return train_once("mine", mine, data, config)
"""
SCALE = """
@dataclass
class Scale:
    k: float = 1.0

    def __call__(self):
        return {} * self.k

scale = Scale()
"""
READ = [
    ("factor = 1.0", "factor", "factor = 2.0"),
    ("factors = {'a': [1.0, (2, None)]}", "factors['a'][0]", "factors['a'][0] = 3.0"),
    ("factor = torch.ones(2)", "factor.sum()", "factor += 1"),
    ("weights = np.ones(2)", "float(weights[1])", "weights[1] = 3"),
    ("box = type('Box', (), {})()\nbox.factor = 1.0", "box.factor", "box.factor = 2.0"),
    ("def double(x): return 2 * x", "double(1)", "def double(x): return 3 * x"),
    ("def double(x): return 2 * x", "double(1)", "def double(x): return 2 + x"),
    ("def make(k): return lambda x: k * x\ndouble = make(2)", "double(1)", "double = make(3)"),
    ("double = partial(pow, 2)", "double(1)", "double = partial(pow, 3)"),
    (SCALE.format(1), "scale()", SCALE.format(2)),
]


@pytest.mark.parametrize("before, factor, after", READ)
def test_what_an_objective_reads_is_seen(run, before, factor, after):
    run(MINE.format(first="pass", factor=factor))
    assert not was_found(
        run(before + "\nruns_folder = Path('read', str(time.time()))\ntrain_mine();")
    )
    assert was_found(run("train_mine();"))
    assert not was_found(run(after + "\ntrain_mine();"))
    assert was_found(run("train_mine();"))
    assert was_found(run(before + "\ntrain_mine();"))


@pytest.mark.parametrize(
    "before, first, reader, name",
    [
        ("g = torch.Generator()", "torch.rand(1, generator=g)", "mine", "g"),
        ("numbers = (i for i in range(99))", "next(numbers)", "mine", "numbers"),
        ("box = [np.random.default_rng(0)]", "box[0].random()", "mine", "box"),
        ("def drawn(): return g.seed()\ng = torch.Generator()", "drawn()", "drawn", "g"),
        ("", "list(open('objectives.py'))", "mine", "open"),
    ],
)
def test_what_cannot_be_compared_is_said_and_not_saved(run, before, first, reader, name):
    run(before + MINE.format(first=first, factor=1) + "\nruns_folder = Path('not')")
    for _ in range(2):
        text = run("train_mine();")
        assert f"Not saved: `{reader}` reads `{name}`, and " in text and not was_found(text)
    assert "files 0" in run("print('files', len(list(runs_folder.glob('*'))))")


KEYS = """
class Scaled(torch.autograd.Function):
    factor = {"b", "c", "a"}

    @staticmethod
    def forward(ctx, x):
        return x

    def again(self):
        return Scaled, walk_in_circles, super().__init__()

@torch.no_grad()
def walk_in_circles(n, steps={"x", "y", "z", 3}):
    return n in {"p", "q", 5} or walk_in_circles(n - 1) or Scaled.apply(n) or circle

circle = [1]
circle.append(circle)
noise = objectives.LogUniform(10)
objects = [noise, nn.Dropout(0.3), Path("a"), torch.float16, F.relu, math.pi, np.arange(3), Config]
objects += [walk_in_circles, Scaled, {1: {2, "3"}}, nn.Sequential(nn.ReLU()), torch.optim.SGD]
print([fingerprint(thing) for thing in objects])
"""


def test_keys_are_the_same_in_another_kernel_and_when_all_cells_run_again(run, run_elsewhere):
    here = run("runs_folder = Path('runs')\nsoftmax()" + KEYS)
    assert here.splitlines()[-1] == run(KEYS).splitlines()[-1]
    there = run_elsewhere("runs_folder = Path('runs')\nsoftmax()" + KEYS)
    assert was_found(there) and there.splitlines()[-3:] == here.splitlines()[-3:]
    run_all_cells(run_elsewhere)
    assert was_found(run_elsewhere("softmax()"))


# Files

DAMAGES = {
    "cut short": "path.write_bytes(path.read_bytes()[:-1000])",
    "empty": "path.write_bytes(b'')",
    "not ours": "torch.save({'weights': {}}, path)",
    "text": "path.write_text('hello')",
    "other weights": """kept = torch.load(path)
kept["weights"]["head.bias"] += 1
torch.save(kept, path)""",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_put_aside_and_trained_again(run, damage):
    before = run("runs_folder = Path('damaged')\nsoftmax()\n(path,) = runs_folder.glob('*.pt')")
    text = run(DAMAGES[damage] + "\nsoftmax()\nprint([p.name for p in runs_folder.iterdir()])")
    assert "is damaged" in text and ".pt.damaged" in text and not was_found(text)
    assert numbers_of(text) == numbers_of(before) and was_found(run("softmax()"))


def test_a_full_disk_costs_the_file_and_not_the_training(run, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(tmp_path)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        text = run(
            f"runs_folder = Path({str(tmp_path)!r})\nconfig = replace(config, width=16)\nsoftmax()"
        )
    finally:
        run("runs_folder = Path('runs')\nconfig = replace(config, width=4)")
        subprocess.run(["umount", str(tmp_path)])
    assert "1 epoch" in text and "files 0" in text
    assert f"Not saved in the folder {tmp_path}: 0." in text and "MB are free" in text


FAILING = """
def write_half(path, content):
    path.open("wb").write(content[:999])
    raise {error}

def write_while_another_does(path, content):
    Path.write_bytes = write_bytes
    softmax()  # the same training, in another process, does not find this one yet
    return write_bytes(path, content)

write_bytes = Path.write_bytes
runs_folder = Path("failing", str(time.time()))
Path.write_bytes = {function}
try:
    softmax()
finally:
    Path.write_bytes = write_bytes
"""


def test_a_file_that_cannot_be_written_leaves_nothing(run):
    for error in ["OSError(errno.ENOSPC, 'No space left')", "PermissionError(13, 'Not allowed')"]:
        text = run(FAILING.format(error=error, function="write_half"))
        assert "Not saved in the folder" in text and "files 0" in text
        assert error.split("'")[1] in text


def test_two_processes_may_finish_the_same_training_at_once(run):
    text = run(FAILING.format(error="None", function="write_while_another_does"))
    assert text.count("files 1") == 2 and "Not saved" not in text


def test_weights_are_kept_where_they_are_wanted(run):
    run("runs_folder = Path('weightless')")
    assert "bits None" in run("softmax(keep_model=False)")
    assert was_found(run("softmax(keep_model=False)"))
    assert not was_found(run("softmax()"))
    assert was_found(run("softmax()")) and was_found(run("softmax(keep_model=False)"))


# Trainings that stop


STOPPING = """
def stopping(model, images, labels, steps, how):
    model.steps = getattr(model, "steps", 0) + 1
    loss, metrics = softmax_objective(model, images, labels)
    if model.steps == steps and how == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)  # as Jupyter does
        time.sleep(9)
    if model.steps == steps:
        loss = loss * float(how)
    return loss, metrics

runs_folder = Path("stopping", str(time.time()))
longer = replace(config, epochs=3)
"""


@pytest.mark.parametrize("steps, epochs", [(2, 0), (5, 1)])
def test_an_interrupt_is_one_sentence_and_stops_the_section(run_raw, run, steps, epochs):
    run(STOPPING)
    *shown, error = run_raw(
        f"train_seeds('mine', stopping, data, [longer, longer], steps={steps}, how='interrupt')"
    )
    assert error.output_type == "error" and error.ename == "Interrupted"
    assert len(error.traceback) == 1 and error.traceback[0].startswith("Interrupted: mine (steps")
    text = text_of(shown)
    assert f"interrupted after {epochs} of 3 epochs" in text and text.count("mine") == 1
    kept = run("""
failed = sys.last_value
print(list(runs_folder.glob("*")), failed.model.steps, len(failed.rows))
""")
    assert kept.strip() == f"[] {steps} {epochs}"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_a_training_and_marks_it(run, value):
    run(STOPPING)
    for is_again in [False, True]:
        text = run(f"""
model, rows = train_once("mine", stopping, data, longer, steps=6, how="{value}")
print(rows["stopped"].tolist(), rows["train_loss"].tolist()[-1])
""")
        assert was_found(text) == is_again
        assert "2 epochs, " in text and f"STOPPED because the loss became {value}" in text
        assert f"['the loss became {value}', 'the loss became {value}'] {value}" in text


# Tables


def test_rows_are_complete_and_survive_numbers_of_numpy(run):
    text = run("""
sound = train

def train(model, objective, data, config, progress):
    for measured in sound(model, objective, data, config, progress):
        numbers = {"train_loss": np.float32(0.5), "train_none": np.float64("nan"), "n": np.int64(3)}
        yield measured | numbers

runs_folder = Path("numpy")
tables = [train_once("softmax", softmax_objective, data, config)[1] for _ in range(2)]
train = sound
print(tables[0].equals(tables[1]), list(tables[0].columns))
print(tables[0][["train_none", "n", "settings", "recipe", "split", "n_images"]].values.tolist())
""")
    columns = (
        "objective settings seed data split n_images images recipe code epoch seconds train_loss"
    )
    columns = [*columns.split(), "train_accuracy", "accuracy", "train_none", "n", "key", "stopped"]
    assert was_found(text) and f"True {columns}" in text
    assert "[[nan, 3, '', 'epochs 1, batch size 32" in text and "'test', 96]]" in text


def test_only_trainings_of_the_same_images_recipe_and_seeds_are_compared(run):
    text = run("""
def edited(factor):
    def mine(model, images, labels):
        loss, metrics = softmax_objective(model, images, labels)
        return loss * factor, metrics
    return mine

runs_folder = Path("same")
longer = replace(config, epochs=2)
fewer = replace(data, train=(data.train[0][:50], data.train[1][:50]))
configs = [config, replace(config, seed=1)]
tables = [
    train_seeds("softmax", softmax_objective, data, configs)[1],
    train_seeds("softmax", softmax_objective, data, [longer])[1],
    train_seeds("softmax", softmax_objective, fewer, configs)[1],
    train_seeds("mine", edited(2), data, configs)[1],
    train_seeds("mine", edited(3), data, configs)[1],
]
results = pd.concat(tables, ignore_index=True)
print("same", same_trainings(results, data, configs).index.tolist())
print("seed", same_trainings(results, data, configs[1:]).index.tolist())
print("long", summary(same_trainings(results, data, [longer]))[["epoch", "seed"]].values.tolist())
print("none", len(same_trainings(results, data, [replace(config, seed=5)])))
print("none", len(same_trainings(results[:0], data, configs)))
""")
    for line in ["same [0, 1, 8, 9]", "seed [1, 9]", "long [[2, 0]]", "none 0\nnone 0"]:
        assert line in text


def test_hundreds_of_saved_trainings_are_found_in_no_time(run):
    text = run("""
runs_folder = Path("many")
softmax()
large = coloured(50_000, 3)
many = replace(data, train=large)
describe(many, config, [])
started = time.perf_counter()
with contextlib.redirect_stdout(None):
    for _ in range(50):
        fingerprint(train, build, softmax_objective, describe(many, config, []), config)
print("milliseconds", (time.perf_counter() - started) * 1000 / 50)
""")
    assert float(text.split("milliseconds")[1]) < 100  # 5 to 10 on an idle core
