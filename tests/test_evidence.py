"""Tables of the page, and numbers in its text and in README, against the stored run's raw results.

training_runs.csv is the file that the last cell of the stored run wrote: one row for each epoch of
each training run. Means, intervals and verdicts are computed anew here, with scipy. Of the text,
every "mean ± deviation" and every "difference (low to high)" is checked, but no plain number.
"""

import functools
import html
import itertools
import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from notebook import CODE, NOTEBOOK, README, ROOT, without_code
from scipy import stats

RUNS = pd.read_csv(ROOT / "tests" / "training_runs.csv", keep_default_na=False)
RUN_COLUMNS = ["experiment", "objective", "variant", "settings", "recipe", "seed"]
LESSON = "the lesson"
EXPERIMENTS = [name for name in RUNS["experiment"].unique() if name != LESSON]


@functools.cache
def last_accuracies(experiment):
    """{(objective, variant): percents by seed}; the variants of the lesson are its settings."""
    rows = RUNS[RUNS["experiment"] == experiment]
    last = rows.groupby(RUN_COLUMNS, sort=False).tail(1)
    column = "settings" if experiment == LESSON else "variant"
    groups = last.groupby(["objective", column], sort=False)
    return {key: 100 * group.set_index("seed")["accuracy"].astype(float) for key, group in groups}


def mean_and_deviation(accuracies):
    return f"{accuracies.mean():.1f} ± {accuracies.std():.1f}"


def signed(value):
    """As the page writes a difference: with a true minus, and without the sign of zero."""
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def student(accuracies, reference):
    """(difference, low, high, p-value); without the last three if all differences are equal."""
    assert list(accuracies.index) == list(reference.index)
    differences = accuracies - reference
    if differences.std() < 1e-9:
        return differences.mean(), None, None, None
    test = stats.ttest_rel(accuracies, reference)
    return differences.mean(), *test.confidence_interval(0.95), test.pvalue


def rejected_by_holm(p_values):
    """The names of the p-values that are below Holm's limits; the first that is not ends it."""
    rejected = set()
    in_order = sorted(p_values, key=p_values.get)
    for rank, name in enumerate(in_order):
        if p_values[name] >= 0.05 / (len(in_order) - rank):
            break
        rejected.add(name)
    return rejected


# The raw results themselves


def test_every_training_run_is_complete_and_none_stopped_early():
    for key, rows in RUNS.groupby(RUN_COLUMNS):
        n_epochs = int(re.search(r"epochs (\d+)", rows["recipe"].iloc[0])[1])
        assert list(rows["epoch"]) == [*range(1, n_epochs + 1)], key
        assert float(rows["accuracy"].iloc[-1]) > 0 and set(rows["stopped"]) == {""}, key


def test_all_variants_of_an_experiment_have_the_same_three_or_five_seeds():
    for experiment in [LESSON, *EXPERIMENTS]:
        seeds = {tuple(accuracies.index) for accuracies in last_accuracies(experiment).values()}
        assert seeds in ({(0, 1, 2)}, {(0, 1, 2, 3, 4)}), experiment


def test_the_lesson_was_tested_on_test_images_and_the_experiments_on_validation_images():
    splits = RUNS.groupby("experiment")["split"].agg(set)
    assert splits.pop(LESSON) == {"test"}
    assert set().union(*splits) == {"validation"}


# Tables of the page


def tables_of(cell):
    """The tables that a cell displayed, each as {first column: {other columns: text}}."""
    for output in cell.outputs:
        text = output.get("data", {}).get("text/html", "")
        if "<table" not in text:
            continue
        text = re.search(r"(?s)<table.*</table>", text)[0]
        # XML does not know the other named characters of HTML.
        text = re.sub(r"&(?!amp|lt|gt|quot)\w+;", lambda name: html.unescape(name[0]), text)
        table = ElementTree.fromstring(text)
        lines = []
        for line in table.iter("tr"):
            lines.append(["".join(field.itertext()).strip() for field in line])
        names = lines[0][1:]
        yield {line[0]: dict(zip(names, line[1:])) for line in lines[1:] if any(line[1:])}


def experiment_of(cell):
    found = re.search(r'experiments\["(.+?)"\] = ', cell.source)
    return found[1] if found else None


def compared_tables():
    """[(experiment, table)]; a table stands in the cell of its experiment, or in the next."""
    found = []
    experiment = None
    for cell in CODE:
        experiment = experiment_of(cell) or experiment
        for table in tables_of(cell):
            if "verdict" in next(iter(table.values())):
                found.append((experiment, table))
    return found


COMPARED = compared_tables()


def test_the_page_shows_every_experiment_that_was_run():
    assert [experiment_of(cell) for cell in CODE if experiment_of(cell)] == EXPERIMENTS
    without_table = set(EXPERIMENTS) - {experiment for experiment, _ in COMPARED}
    assert without_table == {"learning rate and optimiser"}  # a figure shows it


@pytest.mark.parametrize(("experiment", "table"), COMPARED, ids=[name for name, _ in COMPARED])
def test_tables_of_the_page_are_what_the_raw_results_give(experiment, table):
    accuracies = last_accuracies(experiment)
    key_of = {}
    for objective, variant in accuracies:
        for label in (variant, f"{objective}, {variant}"):
            if label in table:
                key_of[label] = (objective, variant)
    assert set(key_of) == set(table)
    references = [key_of[label] for label in table if table[label]["verdict"] == "reference"]

    differences = {}
    p_values = {}
    for label, key in key_of.items():
        if key not in references:
            own = [other for other in references if len(references) == 1 or other[0] == key[0]]
            difference, low, high, p = student(accuracies[key], accuracies[own[0]])
            text = signed(difference)
            if p is not None:
                text += f" ({signed(low)} to {signed(high)})"
                p_values[label] = p
            differences[label] = (text, difference > 0)

    rejected = rejected_by_holm(p_values)
    for label, row in table.items():
        assert row["validation accuracy, %"] == mean_and_deviation(accuracies[key_of[label]])
        if label not in differences:
            assert row["difference in points, 95 % interval"] == row["verdict"] == "reference"
            continue
        text, is_higher = differences[label]
        verdict = "same difference for every seed"
        if label in rejected:
            verdict = "higher" if is_higher else "lower"
        elif label in p_values:
            verdict = "not settled"
        assert row["difference in points, 95 % interval"] == text, label
        assert row["verdict"] == verdict, label


def epochs_to(level, objective, settings):
    """The mean over the seeds of the first epoch whose test showed this accuracy."""
    rows = RUNS[(RUNS["experiment"] == LESSON) & (RUNS["objective"] == objective)]
    rows = rows[(rows["settings"] == settings) & (rows["accuracy"].astype(float) >= level)]
    return rows.groupby("seed")["epoch"].min().mean()


def test_the_table_of_side_by_side_is_what_the_raw_results_give():
    (cell,) = [cell for cell in CODE if "def epochs_to" in cell.source]
    (table,) = tables_of(cell)
    n_checked = 0
    for (objective, settings), accuracies in last_accuracies(LESSON).items():
        row = table.get(objective)  # the sixth objective comes after this table
        if row and row["settings"] == settings:
            n_checked += 1
            assert row["accuracy"] == f"{mean_and_deviation(accuracies)} %"
            assert row["worst seed"] == f"{accuracies.min():.1f} %"
            for level in (0.5, 0.6, 0.7):
                shown = float(row[f"epochs to {level:.0%}"])
                assert shown == pytest.approx(epochs_to(level, objective, settings), abs=0.051)
    assert n_checked == len(table) == 5


# Numbers in text

NUMBER = r"[+-]?\d+(?:\.\d+)?"
MEAN = rf"({NUMBER})(?: %)? ?± ?({NUMBER})"
INTERVAL = rf"({NUMBER})(?: [a-z]+){{0,3}} \((?:95 % interval )?({NUMBER}) to ({NUMBER})\)"


def in_one_line(text):
    text = re.sub(r"\n> ?", " ", text).replace("−", "-").replace(r"\pm", "±")
    return " ".join(text.split())


def sections():
    """(heading, text, names of experiments) of every part of the notebook under a heading."""
    parts = []
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "markdown":
            for piece in filter(None, re.split(r"(?m)^(?=#+ )", without_code(cell.source))):
                if piece.startswith("#"):
                    heading, _, piece = piece.partition("\n")
                    parts.append((heading, [], []))
                parts[-1][1].append(piece)
        elif experiment_of(cell):
            parts[-1][2].append(experiment_of(cell))
    return [(heading, in_one_line("\n".join(texts)), names) for heading, texts, names in parts]


@functools.cache
def means_of(experiment):
    accuracies = last_accuracies(experiment).values()
    return {(f"{a.mean():.1f}", f"{a.std():.1f}") for a in accuracies}


@functools.cache
def intervals_of(experiment):
    """The difference of any two variants of an experiment, with its interval."""
    found = set()
    for one, other in itertools.permutations(last_accuracies(experiment).values(), 2):
        difference, low, high, p = student(one, other)
        if p is not None:
            found.add((round(difference, 1), round(low, 1), round(high, 1)))
    return found


def numbers_not_measured(text, experiments):
    """What stands in a text as mean ± deviation or as difference (interval), but was not found."""
    means = set().union(*map(means_of, experiments))
    intervals = set().union(*map(intervals_of, experiments))
    wrong = [mean for mean in re.findall(MEAN, text) if mean not in means]
    for interval in re.findall(INTERVAL, text):
        if tuple(map(float, interval)) not in intervals:
            wrong.append(interval)
    return wrong


QUOTING = [part for part in sections() if re.search(f"{MEAN}|{INTERVAL}", part[1])]


@pytest.mark.parametrize("part", QUOTING, ids=[heading for heading, _, _ in QUOTING])
def test_numbers_in_prose_are_those_of_the_section_they_stand_in(part):
    """A question may quote its own experiment and the lesson; other parts may quote all."""
    heading, text, names = part
    is_question = heading.startswith("### ") and names
    assert numbers_not_measured(text, [LESSON, *(names if is_question else EXPERIMENTS)]) == []


def test_the_prose_quotes_means_and_intervals():
    everything = " ".join(text for _, text, _ in QUOTING)
    assert len(re.findall(MEAN, everything)) > 20 and len(re.findall(INTERVAL, everything)) > 10


def test_numbers_in_readme_are_those_of_the_stored_run():
    text = in_one_line(without_code(README))
    assert len(re.findall(MEAN, text)) > 20
    assert numbers_not_measured(text, [LESSON, *EXPERIMENTS]) == []


def test_the_table_of_readme_has_the_five_objectives_of_the_lesson():
    shown = dict(re.findall(r"(?m)^\| `(\w+)` \|[^|]*\| (.*) \|$", README))
    assert len(shown) == 5
    for (objective, settings), accuracies in last_accuracies(LESSON).items():
        name = objective.replace(" ", "_").replace("-", "_")
        if name in shown:
            columns = [f"{mean_and_deviation(accuracies)} %", f"{accuracies.min():.1f} %"]
            columns += [f"{epochs_to(level, objective, settings):.1f}" for level in (0.6, 0.7)]
            assert shown.pop(name) == " | ".join(columns)
    assert shown == {}
