"""A saved training run never lies: it is found again only if all that it depends on is the same.

Cells are really edited, in real kernels. An edited function prints EDITED when it runs, so that the
output tells what ran; "found in RUNS" tells that nothing did.
"""

import ast
import inspect

import pytest
from notebook import (
    ROOT,
    cells_defining,
    cells_needed,
    coloured_images,
    kernel,
    names_of,
)

DEFINITIONS = ["train_seeds", "same_trainings", "summary", "Data", "softmax_objective"]
START = f"import signal\n\n{inspect.getsource(coloured_images)}"
START += """
data = Data("colours", ("red", "green", "blue"), coloured_images(96, 0), coloured_images(60, 1))
config = Config(epochs=1, batch_size=32, learning_rate=0.02, width=4)
DEVICE, PRECISION = torch.device("cpu"), torch.float32
torch.set_num_threads(1)

def softmax(folder="runs", **options):
    global runs_folder
    runs_folder = Path(folder)
    model, rows = train_once("softmax", softmax_objective, data, config, **options)
    bits = fingerprint(model.state_dict()) if model else None
    print("key", rows["key"][0], bits, rows["accuracy"].iloc[-1])
    print("files", len(list(runs_folder.glob("*"))))
"""


def text_of(outputs):
    """What a reader sees; a line that was renewed is seen as it is at last."""
    texts = []
    for output in outputs:
        if output.output_type == "error":
            texts += output.traceback
        else:
            texts.append(output.get("text") or output.data["text/plain"] + "\n")
    return "".join(texts)


def start(run):
    """Run the cells that a training needs, but not those that load data.

    Returns a function that runs source without an error and returns text.
    """

    def run_well(source):
        outputs = run(source)
        assert all(output.output_type != "error" for output in outputs), text_of(outputs)
        return text_of(outputs)

    run_well("import sys; sys.path.insert(0, '')")  # import objectives.py from the kernel's folder
    for cell in cells_needed(*DEFINITIONS):
        if not names_of(cell.source)[0] & {"data", "configs", "machine"}:
            run_well(cell.source)
    run_well(START)
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


def key_of(text):
    """The line with the key, the bits of the weights, and the accuracy."""
    (line,) = [line for line in text.splitlines() if line.startswith("key")]
    return line


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

LOOP = "train build predict move normalise autocast rise_and_fall muon Muon.step orthogonal"
NETWORK = "small_cnn convolution whitening_layer whitening_filters Network.__init__ Network.forward"


@pytest.mark.parametrize("name", [*LOOP.split(), *NETWORK.split(), "softmax_objective"])
def test_an_edited_cell_counts_at_once_and_editing_back_finds_the_earlier_training(run, name):
    (cell,) = cells_defining(name.partition(".")[0])
    before = run("softmax()")
    run(edited(cell.source, name))
    after = run("softmax()")
    assert "EDITED" in after and not was_found(after)
    assert was_found(run("softmax()"))
    run(cell.source)
    back = run("softmax()")
    assert was_found(back) and "EDITED" not in back and key_of(back) == key_of(before)


def test_what_is_saved_under_a_key_is_what_was_trained(run, run_elsewhere):
    """An optimiser that takes no step is saved under a key of its own, not under the sound one."""
    (cell,) = cells_defining("train")
    assert "scaler.step(optimizer)" in cell.source
    run(cell.source.replace("scaler.step(optimizer)", "pass"))
    crippled = run("softmax('crippled')")
    run(cell.source)
    sound = run("softmax('crippled')")
    assert not was_found(crippled) and not was_found(sound) and key_of(sound) != key_of(crippled)
    again = run_elsewhere("softmax('crippled')")
    assert was_found(again) and key_of(again) == key_of(sound)


def test_comments_docstrings_and_the_place_of_a_function_do_not_count(run):
    (cell,) = cells_defining("train")
    run("softmax()")
    run("# one line more\n\n" + cell.source.replace('"""Train', '"""(We) train'))
    assert was_found(run("softmax()"))


def test_a_decorator_counts_though_it_leaves_the_code_alone(run):
    decorators = ["", "@torch.no_grad()", "@torch.enable_grad()", "@cache"]
    keys = [run(f"{d}\ndef f(x): return x\nprint(fingerprint(f))") for d in [*decorators, ""]]
    assert len({*keys}) == 4 and keys[0] == keys[4]


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


def test_other_images_or_settings_make_another_training(run):
    text = run("""
images, labels = data.train
pixel = images.clone()
pixel[0, 0, 0, 0] ^= 1
changed = [replace(data, train=(pixel, labels)), replace(data, train=(images, labels.roll(1)))]
changed += [replace(data, test=coloured_images(60, 2)), replace(data, classes=("a", "b", "c"))]
keys = [describe(other, config)["images"] for other in [data, *changed]]
configs = [replace(config, **change) for change in [{}, {"flip": False}, {"optimizer": "SGD"}]]
keys += [describe(data, changed)["code"] for changed in configs]
keys += [fingerprint(partial(print, setting=value)) for value in [1, 1.0, np.float64(1), True]]
print(len(keys) == len(set(keys)))
images[0, 0, 0, 0] ^= 1
print(describe(data, config)["images"] == keys[1])
images[0, 0, 0, 0] ^= 1
""")
    assert text == "True\nTrue\n"


# What an objective reads

MINE = """
def mine(model, images, labels):
    loss, metrics = softmax_objective(model, images, labels)
    return loss * {}, metrics
"""
SCALE = """
class Scale:
    k = 1.0

    @staticmethod
    def one():
        return {}

    def __call__(self):
        return self.k * self.one()

scale = Scale()
"""
READ = [
    ("box = {'a': [1.0, (2, None)]}", "box['a'][0]", "box['a'][0] = 3.0"),
    ("factor = torch.ones(2)", "factor.sum()", "factor += 1"),
    ("array = np.ones(2)", "float(array[1])", "array[1] = 3"),
    ("def f(x): return 2 * x", "f(1)", "def f(x): return 2 + x"),
    ("def make(k): return lambda x: k * x\nf = make(2)", "f(1)", "f = make(3)"),
    ("f = partial(pow, 2)", "f(1)", "f = partial(pow, 3)"),
    ("layer = nn.Linear(1, 1)", "layer.bias.item()", "nn.init.ones_(layer.bias);"),
    (SCALE.format(1), "scale()", SCALE.format(2)),
    (SCALE.format(1), "scale()", "scale.k = 2.0"),
]


@pytest.mark.parametrize("before, factor, after", READ)
def test_what_an_objective_reads_is_seen(run, before, factor, after):
    train = "\ntrain_once('mine', mine, data, config);"
    run(f"runs_folder = Path(str(time.time()))\ntorch.manual_seed(0)\n{before}")
    run(MINE.format(factor))
    found = [was_found(run(source + train)) for source in ["", "", after, ""]]
    assert found == [False, True, False, True]


UNKNOWN = [
    ("def drawn(): return next(it)\nit = (1 for i in range(99))", "drawn()", "drawn", "it"),
    ("box = [open('objectives.py')]", "len(box)", "mine", "box"),
    ("", "len(vars(objectives)) ** 0", "mine", "objectives"),
]


@pytest.mark.parametrize("before, factor, reader, name", UNKNOWN)
def test_what_cannot_be_compared_is_said_and_not_saved(run, before, factor, reader, name):
    run(f"runs_folder = Path('not')\n{before}\n{MINE.format(factor)}")
    for _ in range(2):
        text = run("train_once('mine', mine, data, config);")
        assert f"Not saved: `{name}`, which `{reader}` reads, cannot" in text
        assert not was_found(text)
    assert run("print(list(runs_folder.glob('*')))") == "[]\n"


KEYS = """
class Scaled(torch.autograd.Function):
    factor = {"b", "c", "a"}

    def again(self):
        return Scaled, in_circles, super().__init__()

@torch.no_grad()
def in_circles(n, steps={"x", "y", "z", 3}):
    return n in {"p", "q", 5} or in_circles(n - 1) or Scaled.apply(n)

noise = objectives.LogUniform(10)
things = [noise, Path("a"), torch.float16, F.relu, np.arange(3), Config, in_circles, nn.ReLU()]
print([fingerprint(thing) for thing in things])
"""


def test_keys_are_the_same_in_another_kernel_and_when_cells_run_again(run, run_elsewhere):
    here = run("softmax()" + KEYS)
    assert here.splitlines()[-1] == run(KEYS).splitlines()[-1]
    there = run_elsewhere("softmax()" + KEYS)
    assert was_found(there) and there.splitlines()[-3:] == here.splitlines()[-3:]


# Files

DAMAGES = {
    "cut short": "path.write_bytes(path.read_bytes()[:-1000])",
    "empty": "path.write_bytes(b'')",
    "other weights": """kept = torch.load(path)
kept["run"]["weights"]["head.bias"] += 1
torch.save(kept, path)""",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_set_aside_and_trained_again(run, damage):
    before = run("softmax('damaged')\n(path,) = runs_folder.glob('*.pt')")
    text = run(
        DAMAGES[damage] + "\nsoftmax('damaged')\nprint([p.name for p in runs_folder.iterdir()])"
    )
    assert "is damaged" in text and ".pt.damaged" in text and not was_found(text)
    assert key_of(text) == key_of(before) and was_found(run("softmax('damaged')"))


def test_a_full_disk_costs_the_file_and_not_the_training(run):
    text = run("""
def write_half(path, content):
    path.open("wb").write(content[:999])
    raise OSError(28, "No space left")

write_bytes, Path.write_bytes = Path.write_bytes, write_half
softmax("full")
Path.write_bytes = write_bytes
""")
    assert "Not saved in the folder" in text and "full (No space left): 0.0" in text
    assert "1 epoch" in text and "files 0" in text


def test_weights_are_kept_where_they_are_wanted(run):
    wanted = [False, False, True, True, False]
    texts = [run(f"softmax('weights', keep_model={keep_model})") for keep_model in wanted]
    assert [was_found(text) for text in texts] == [False, True, False, True, True]
    assert [" None " in text for text in texts] == [True, True, False, False, True]


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

runs_folder = Path(str(time.time()))
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


def test_a_loss_that_is_not_finite_stops_a_training_and_marks_it(run):
    run(STOPPING)
    for is_again in [False, True]:
        text = run("""
model, rows = train_once("mine", stopping, data, longer, steps=6, how="nan")
print(rows["stopped"].tolist(), rows["train_loss"].tolist()[-1])
""")
        assert "2 epochs, " in text and "STOPPED because the loss became nan" in text
        assert "['the loss became nan', 'the loss became nan'] nan" in text
        assert was_found(text) == is_again


# Tables


def test_rows_are_complete_and_survive_numbers_of_numpy(run):
    text = run("""
sound = train

def train(model, objective, data, config, progress):
    for measured in sound(model, objective, data, config, progress):
        yield measured | {"train_none": np.float64("nan"), "n": np.int64(3)}

tables = [train_once("softmax", softmax_objective, data, config)[1] for _ in range(2)]
train = sound
print(tables[0].equals(tables[1]), set(tables[0].columns))
print(tables[0][["train_none", "n", "settings", "recipe", "split", "n_images"]].values.tolist())
""")
    columns = "objective settings seed data split n_images images recipe code epoch seconds "
    columns += "train_loss train_accuracy accuracy train_none n key stopped"
    assert was_found(text) and "True {" in text and "[[nan, 3, '', 'epochs 1, batch size" in text
    assert all(f"'{column}'" in text for column in columns.split())


def test_settings_are_named_in_plain_words(run):
    text = run("""
settings = {"normalized": False, "flip": True, "with_baseline": False, "n_samples": 5}
print(as_text(settings | {"epsilon": 0.2, "teacher": nn.ReLU(), "network": None}))
""")
    assert text == "not normalized, flip, without baseline, 5 samples, epsilon 0.2\n"


def test_only_trainings_of_the_same_images_recipe_and_seeds_are_compared(run):
    text = run("""
def double(model, images, labels):
    loss, metrics = softmax_objective(model, images, labels)
    return loss * 2, metrics

longer = replace(config, epochs=2)
fewer = replace(data, train=(data.train[0][:50], data.train[1][:50]))
configs = [config, replace(config, seed=1)]
networks, rows = train_seeds("softmax", softmax_objective, data, configs)
_, of_longer = train_seeds("softmax", softmax_objective, data, [longer])
_, of_fewer = train_seeds("softmax", softmax_objective, fewer, configs)
_, edited = train_seeds("softmax", double, data, configs[:1])
results = pd.concat([rows, of_longer, of_fewer, edited], ignore_index=True)
print(list(networks) == rows["key"].tolist())
print(same_trainings(results, data, configs).index.tolist())
print(same_trainings(results, data, configs[1:]).index.tolist())
print(summary(same_trainings(results, data, [longer]))[["epoch", "seed"]].values.tolist())
print(len(same_trainings(results, data, [replace(config, seed=5)])))
print(len(same_trainings(results[:0], data, configs)))
""")
    assert text.splitlines()[-6:] == ["True", "[1, 6]", "[1]", "[[2, 0]]", "0", "0"]


def test_hundreds_of_saved_trainings_are_found_in_no_time(run):
    text = run("""
many = replace(data, train=coloured_images(50_000, 3))
describe(many, config)
started = time.perf_counter()
for _ in range(50):
    fingerprint(describe(many, config), softmax_objective)
print("milliseconds", (time.perf_counter() - started) * 1000 / 50)
""")
    assert float(text.split("milliseconds")[1]) < 100
