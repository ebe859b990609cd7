"""Figures are PNG files of sensible size, drawn without a display or global state, that show what is in the data."""

import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

from protformer.evaluation.figures import ValidationCurve, plot_contact_map, plot_training_curves

TRAIN_STEPS = [float(step) for step in range(10, 510, 10)]
VAL_STEPS = [float(step) for step in range(100, 600, 100)]


def draw_map(path, contacts, chain_lengths=None, chain_ids=("sp|P12345|ABCD_ECOLI",), title=None):
    plot_contact_map(
        contacts.astype(np.float32, copy=False),
        chain_lengths=chain_lengths or (len(contacts),),
        chain_ids=chain_ids,
        title="__".join(chain_ids) if title is None else title,
        path=path,
    )
    return pixels(path)


def draw_curves(path, *, num_train=50, num_val=5, sets=("validation",), baseline=18.0):
    plot_training_curves(
        train_steps=TRAIN_STEPS[:num_train],
        train_loss=[2.9 - 0.0005 * step for step in TRAIN_STEPS[:num_train]],
        validation={name: val_curve(num_val, number, baseline) for number, name in enumerate(sets)} if num_val else {},
        path=path,
    )
    return pixels(path)


def val_curve(num_val, number, baseline):
    loss = [2.88 + 0.02 * number - 0.0005 * step for step in VAL_STEPS[:num_val]]
    return ValidationCurve(
        steps=VAL_STEPS[:num_val],
        loss=loss,
        perplexity=[float(np.exp(x)) for x in loss],
        accuracy=[0.06 + step / 10_000 for step in VAL_STEPS[:num_val]],
        unigram_perplexity=baseline,
        unigram_accuracy=0.095,
    )


def pixels(path):
    """The image as (row, column, RGB) integers. Raises where the PNG is damaged."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB")).astype(int)


def random_contacts(length, seed=0):
    scores = np.random.default_rng(seed).random((length, length), dtype=np.float32) ** 8
    contacts = (scores + scores.T) / 2
    np.fill_diagonal(contacts, 0)
    return contacts


def is_dark_blue(image):
    """Where a score of 1 is drawn: ink is grey, a low score nearly white."""
    return (image[..., 2] - image[..., 0] > 90) & (image[..., 0] < 20)


def num_runs(flags):
    return int((np.diff(np.concatenate([[0], flags.astype(int)])) == 1).sum())


def assert_nothing_is_cut_off(image):
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 255).all()


CHAINS = pytest.mark.parametrize("chain_lengths", [(1,), (5,), (3000,), (90, 60), (200, 1)], ids=str)


@CHAINS
def test_a_map_of_any_length_is_a_readable_png_of_moderate_size_with_whole_labels(tmp_path, chain_lengths):
    path = tmp_path / "map.png"
    ids = ("sp|P12345|ABCD_ECOLI", "sp|Q67890|WXYZ_ECOLI")[: len(chain_lengths)]
    image = draw_map(path, random_contacts(sum(chain_lengths)), chain_lengths, ids)
    height, width, _ = image.shape
    assert 800 <= height <= 2000
    assert 800 <= width <= 2000
    assert 5_000 < path.stat().st_size < 5_000_000
    assert_nothing_is_cut_off(image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.parametrize("length", [60, 999, 1801])
def test_no_single_contact_is_lost_however_long_the_protein(tmp_path, length):
    """Lone contacts on a grid: each of its rows is seen, left of the colour bar."""
    places = np.arange(length // 50, length - length // 50, max(2, length // 90))
    contacts = np.zeros((length, length))
    contacts[np.ix_(places, places)] = 1
    image = draw_map(tmp_path / "map.png", contacts)
    dark = is_dark_blue(image[:, : int(image.shape[1] * 0.8)])
    assert num_runs(dark.any(axis=1)) == len(places)


def test_the_first_residue_is_in_the_upper_left_corner_and_rows_run_downwards(tmp_path):
    contacts = np.zeros((10, 10))
    contacts[0, 9] = 1
    image = draw_map(tmp_path / "map.png", contacts)
    rows, columns = np.nonzero(is_dark_blue(image[:, : int(image.shape[1] * 0.87)]))
    assert rows.max() < 0.25 * image.shape[0]
    assert columns.min() > 0.6 * image.shape[1]


def test_chains_of_a_pair_are_separated_by_lines(tmp_path):
    zeros = np.zeros((100, 100))
    one = draw_map(tmp_path / "one.png", zeros, title="x")
    pair = draw_map(tmp_path / "pair.png", zeros, (30, 70), ("a", "b"), title="x")
    grey = lambda image: (np.ptp(image, axis=2) < 12) & (image[..., 0] < 100)  # noqa: E731
    long_lines = [int((grey(image).mean(axis=1) > 0.5).sum()) for image in (one, pair)]
    assert long_lines[0] < long_lines[1]


@pytest.mark.parametrize("name", [r"a$\frac$b", "x" * 300, "", "\u86cb\u767d"])
def test_a_map_of_any_id_is_drawn_without_a_warning(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = draw_map(tmp_path / "map.png", random_contacts(5), (2, 3), (name, name))
    assert_nothing_is_cut_off(image)


@pytest.mark.parametrize("num_train", [1, 50])
@pytest.mark.parametrize("num_val", [0, 5])
def test_curves_are_a_readable_png_with_and_without_validation(tmp_path, num_train, num_val):
    path = tmp_path / "curves.png"
    image = draw_curves(path, num_train=num_train, num_val=num_val)
    height, width, _ = image.shape
    assert 500 <= height <= 2000
    assert 1000 <= width <= 4000
    assert 5_000 < path.stat().st_size < 1_000_000
    assert_nothing_is_cut_off(image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]


def test_without_validation_no_empty_panels_and_no_validation_curve_are_drawn(tmp_path):
    with_validation = draw_curves(tmp_path / "with.png")
    without = draw_curves(tmp_path / "without.png", num_val=0)
    assert without.shape[1] < 0.7 * with_validation.shape[1]
    blue = [int((image[..., 2] - image[..., 0] > 100).sum()) for image in (with_validation, without)]
    assert blue[0] > 1000
    assert blue[1] == 0


def test_the_baseline_is_drawn(tmp_path):
    assert not np.array_equal(draw_curves(tmp_path / "1.png"), draw_curves(tmp_path / "2.png", baseline=19.0))


def test_each_set_has_a_colour_of_its_own(tmp_path):
    one = draw_curves(tmp_path / "1.png")
    two = draw_curves(tmp_path / "2.png", sets=("validation", "a_family_whose_name_is_long"))
    orange = [int((image[..., 0] - image[..., 2] > 100).sum()) for image in (one, two)]
    assert orange[0] == 0
    assert orange[1] > 1000
    assert_nothing_is_cut_off(two)


@pytest.mark.parametrize("draw", [lambda path: draw_map(path, random_contacts(5)), draw_curves])
def test_a_figure_replaces_an_older_one_as_a_whole(tmp_path, draw):
    path = tmp_path / "figure.png"
    path.write_bytes(b"older")
    draw(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]


def test_the_same_map_is_drawn_the_same_way_whatever_was_drawn_before(tmp_path):
    first = draw_map(tmp_path / "1.png", random_contacts(20))
    before = dict(matplotlib.rcParams)
    draw_curves(tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    assert np.array_equal(draw_map(tmp_path / "2.png", random_contacts(20)), first)


DRAW_AND_LIST_MODULES = """
import sys
import protformer.evaluation.figures as figures
assert "matplotlib" not in sys.modules
import numpy as np
figures.plot_contact_map(np.zeros((3, 3), np.float32), chain_lengths=(3,), chain_ids=("a",), title="a", path=PATH / "m")
figures.plot_training_curves(train_steps=[], train_loss=[], validation={}, path=PATH / "c")
assert "matplotlib" in sys.modules
print("matplotlib.pyplot" in sys.modules)
"""


def test_figures_never_load_pyplot_and_need_no_display(tmp_path):
    """With a backend that cannot open a window, as on a cluster's node."""
    code = f"from pathlib import Path\nPATH = Path({str(tmp_path)!r})\n{DRAW_AND_LIST_MODULES}"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"MPLBACKEND": "TkAgg"}
    )
    assert (found.stdout, found.returncode) == ("False\n", 0), found.stderr
