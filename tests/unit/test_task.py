from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError, NoMatch
from thrifty.task import Split, Task, accuracy, negative_error


def blobs(n: int = 120, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points about `classes` corners of a simplex: easy to separate."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return (np.eye(classes)[y] * 4 + rng.normal(size=(n, classes)) * 0.5).astype(np.float32), y


@pytest.fixture
def task() -> Task:
    return Task.from_arrays(*blobs(), name="blobs", seed=3)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 3)


def test_all_problems_are_listed_at_once():
    x = torch.zeros(4, 2)
    x[1, 0] = math.nan
    with pytest.raises(DataError) as err:
        Task(
            Split(x, torch.tensor([0, 1, 7, 0])),
            Split(torch.zeros(0, 2), torch.zeros(0)),
            Split(torch.zeros(3, 5), torch.zeros(2, dtype=torch.int64)),
            classes=("a", "b"),
            name="broken",
        )
    text = str(err.value)
    for part in (
        "'broken' have 5 problem(s)",
        "train.x has NaN or infinity in 1 row(s), first row 1",
        "train.y has 1 label(s) outside 0..1, first 7 at row 2",
        "validation is empty",
        "test has 3 inputs, but 2 targets",
        "test.x has rows of shape (5,), train.x of (2,)",
    ):
        assert part in text


def test_a_label_that_training_never_saw_is_refused():
    with pytest.raises(DataError, match=r"test.y has 1 label\(s\) outside 0..2"):
        Task.from_arrays(*blobs(), x_test=np.zeros((1, 3)), y_test=np.array([3]))


def test_negative_labels_are_refused():
    x, y = blobs()
    with pytest.raises(DataError, match="outside"):
        Task.from_arrays(x, y - 1)


def test_empty_and_unequal_data_are_refused():
    with pytest.raises(DataError, match="0 rows"):
        Task.from_arrays(np.zeros((0, 3)), np.zeros(0))
    with pytest.raises(DataError, match="x has 5 rows and y 4"):
        Task.from_arrays(np.zeros((5, 3)), np.zeros(4))


def test_splits_do_not_overlap_and_cover_everything():
    x = np.arange(200, dtype=np.float32)[:, None]
    task = Task.from_arrays(x, np.arange(200) % 4, validation=0.1, test=0.2, seed=5)
    rows = [set(s.x[:, 0].int().tolist()) for s in (task.train, task.validation, task.test)]
    assert [len(r) for r in rows] == [140, 20, 40]
    assert set.union(*rows) == set(range(200))
    assert all(np.bincount(s.y).tolist() == [len(s) // 4] * 4 for s in (task.train, task.validation, task.test))


def test_equal_seeds_carve_equally_and_others_differently():
    one, two, three = (Task.from_arrays(*blobs(), seed=s) for s in (1, 1, 2))
    assert torch.equal(one.validation.x, two.validation.x)
    assert not torch.equal(one.validation.x, three.validation.x)


def test_groups_never_part():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 400)
    x = np.stack([groups, rng.normal(size=400)], axis=1)
    task = Task.from_arrays(x, groups % 2, groups=groups)
    found = [set(s.x[:, 0].int().tolist()) for s in (task.train, task.validation, task.test)]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]


def test_test_share_zero_means_no_test_split(task):
    bare = Task.from_arrays(*blobs(), test=0)
    assert bare.test is None
    with pytest.raises(DataError, match="has no test split"):
        bare.score(linear(), "test")
    with pytest.raises(NoMatch, match="validation"):
        task.score(linear(), "validatoin")


def test_bytes_are_scaled_and_text_labels_are_numbered():
    x = np.full((20, 1, 2, 2), 255, np.uint8)
    y = np.array(["dog", "cat"] * 10)
    task = Task.from_arrays(x, y)
    assert task.classes == ("cat", "dog")
    assert task.train.x.dtype == torch.float32
    assert float(task.train.x.max()) == 1.0
    with pytest.raises(DataError, match="cow"):
        Task.from_arrays(x, y, x_test=x[:1], y_test=np.array(["cow"]))


def test_fit_learns_and_score_is_accuracy(task):
    model = linear()
    before = task.score(model)
    assert task.fit(model, epochs=10, lr=0.1) is model
    assert task.score(model) > max(before, 0.95)
    assert task.score(model, "test") == accuracy(task.outputs(model, "test"), task.test.y.numpy())


def test_equal_seeds_give_equal_weights(task):
    one, two, three = linear(), linear(), linear()
    task.fit(one, epochs=2, lr=0.1, mixup=0.4, shift=1, seed=7)
    task.fit(two, epochs=2, lr=0.1, mixup=0.4, shift=1, seed=7)
    task.fit(three, epochs=2, lr=0.1, mixup=0.4, shift=1, seed=8)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, three.weight)


def test_fit_leaves_the_global_random_state_alone(task):
    model = nn.Sequential(nn.Dropout(0.5), linear())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    task.fit(model, epochs=1)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training


def test_score_puts_every_module_back_into_its_mode(task):
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 3))
    model.train()
    model[1].eval()
    first, second = task.outputs(model), task.outputs(model)
    assert np.array_equal(first, second)
    assert [m.training for m in model.modules()] == [True, True, False]


def test_nan_metric_is_an_error(task):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * math.nan

    with pytest.raises(DataError, match="outputs contain NaN"):
        task.score(Broken())
    strange = Task.from_arrays(*blobs(), metric=lambda outputs, labels: math.nan)
    with pytest.raises(DataError, match="see the metric"):
        strange.score(linear())


def test_a_model_with_two_outputs_is_refused(task):
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(DataError, match="returns tuple"):
        task.score(Two())


def test_custom_metric_and_objective():
    class Margin:
        def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.multi_margin_loss(model(x), y)

    def worst_class(outputs: np.ndarray, labels: np.ndarray) -> float:
        right = outputs.argmax(1) == labels
        return min(right[labels == c].mean() for c in np.unique(labels))

    task = Task.from_arrays(*blobs(), objective=Margin(), metric=worst_class)
    assert task.score(task.fit(linear(), epochs=10, lr=0.1)) > 0.9


def test_regression_needs_no_classes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)).astype(np.float32)
    task = Task.from_arrays(x, x @ np.array([[1.0], [-2.0]], np.float32))
    model = nn.Linear(2, 1)
    task.fit(model, epochs=20, lr=0.05, weight_decay=0, mixup=0.2)
    assert task.classes == ()
    assert -1e-3 < task.score(model) <= 0
    assert task.score_outputs(task.validation.y.numpy()) == 0


def test_outputs_of_another_length_are_refused(task):
    with pytest.raises(DataError, match=r"7 outputs for the 18 rows of blobs's validation split"):
        task.score_outputs(np.zeros((7, 3)))


def test_calibration_inputs_come_from_training_only(task):
    inputs = task.calibration(20, seed=1)
    assert inputs.shape == (20, 3)
    assert torch.equal(inputs, task.calibration(20, seed=1))
    known = {tuple(r) for r in task.train.x.tolist()}
    assert all(tuple(r) in known for r in inputs.tolist())
    assert len(task.calibration(10_000)) == len(task.train)


def test_limited_keeps_the_classes_in_proportion(task):
    small = task.limited(12)
    assert (len(small.train), len(small.validation), len(small.test)) == (12, 12, 12)
    assert np.bincount(small.train.y).tolist() == [4, 4, 4]
    with pytest.raises(KnobError):
        task.limited(0)


def test_a_limit_of_fewer_rows_than_classes_still_works():
    task = Task.from_arrays(*blobs(), classes=("a", "b", "c"))
    assert len(task.limited(2).train) == 2


def test_npz_with_all_splits(tmp_path):
    x, y = blobs()
    np.savez(
        tmp_path / "a.npz",
        x_train=x[:80],
        y_train=y[:80],
        x_val=x[80:100],
        y_val=y[80:100],
        x_test=x[100:],
        y_test=y[100:],
    )
    task = Task.from_npz(tmp_path / "a.npz")
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == ("a", 80, 20, 20)


def test_npz_without_splits_and_with_classes(tmp_path):
    x, y = blobs()
    np.savez(tmp_path / "b.npz", x=x, y=y, classes=np.array(["r", "g", "b"]))
    task = Task.from_npz(tmp_path / "b.npz", seed=1)
    assert task.classes == ("r", "g", "b")
    assert len(task.train) + len(task.validation) + len(task.test) == 120


def test_an_unknown_option_of_a_file_is_refused_with_the_known_ones(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 1)), y=np.arange(20) % 2)
    with pytest.raises(KnobError, match=r"no option 'sise'"):
        Task.from_npz(tmp_path / "a.npz", sise=8)
    with pytest.raises(KnobError, match=r"'sise' \(.*size"):
        Task.from_folder(tmp_path, sise=8)


def test_a_metric_must_return_a_number():
    task = Task.from_arrays(np.zeros((20, 1)), np.arange(20) % 2, metric=lambda outputs, labels: "good")
    with pytest.raises(DataError, match="returned a str"):
        task.score_outputs(np.zeros((len(task.validation), 2)))


def test_unusable_npz_files(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        Task.from_npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"text\.npz is no \.npz file"):
        Task.from_npz(tmp_path / "text.npz")
    np.savez(tmp_path / "half.npz", x=np.zeros((3, 1)), x_test=np.zeros((3, 1)))
    with pytest.raises(DataError, match="lacks y, y_test"):
        Task.from_npz(tmp_path / "half.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([None, 1]), y=np.zeros(2))
    with pytest.raises(DataError, match="holds Python objects"):
        Task.from_npz(tmp_path / "objects.npz")


def pictures(folder, classes=("blue", "red"), count=10, size=(6, 5)):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_folder_of_images(tmp_path):
    pictures(tmp_path / "data")
    task = Task.from_folder(tmp_path / "data", validation=0.2, test=0.2)
    assert task.classes == ("blue", "red")
    assert task.train.x.shape == (12, 3, 6, 5)
    both = torch.cat([task.train.x, task.validation.x, task.test.x])
    assert torch.allclose(both.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(both.std((0, 2, 3)), torch.ones(3), atol=0.01)
    assert Task.from_folder(tmp_path / "data", size=(8, 8)).train.x.shape[1:] == (3, 8, 8)


def test_folder_with_splits(tmp_path):
    pictures(tmp_path / "train")
    pictures(tmp_path / "test", count=3)
    task = Task.from_folder(tmp_path)
    assert len(task.test) == 6
    assert len(task.train) + len(task.validation) == 20


def test_unusable_folders(tmp_path):
    with pytest.raises(DataError, match="0 class folder"):
        Task.from_folder(tmp_path / "nowhere")
    pictures(tmp_path / "a")
    (tmp_path / "a" / "red" / "bad.png").write_text("no picture")
    pictures(tmp_path / "b", size=(7, 7))
    (tmp_path / "b" / "red" / "0.png").rename(tmp_path / "a" / "red" / "other.png")
    with pytest.raises(DataError) as err:
        Task.from_folder(tmp_path / "a")
    assert "bad.png" in str(err.value)
    assert "2 sizes" in str(err.value)


def test_loaders_are_read_once(task):
    data = torch.utils.data.TensorDataset(task.train.x, task.train.y)
    again = Task.from_loaders(torch.utils.data.DataLoader(data, batch_size=7), validation=0.2, test=0.2)
    assert len(again.train) + len(again.validation) + len(again.test) == len(task.train)
    with pytest.raises(DataError, match="yields nothing"):
        Task.from_loaders([])
    with pytest.raises(DataError, match="pairs"):
        Task.from_loaders([torch.zeros(3, 3)])


def test_metrics_by_hand():
    assert accuracy(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 0])) == 1.0
    assert math.isnan(accuracy(np.array([[math.nan, 2.0]]), np.array([1])))
    assert negative_error(np.array([[0.0, 3.0]]), np.array([[0.0, 0.0]])) == -4.5


class TestOutputsThatDoNotFit:
    """Outputs and targets are compared row by row, or refused; never broadcast."""

    @staticmethod
    def classifier(*more: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), *more)

    @staticmethod
    def rows() -> np.ndarray:
        return np.random.default_rng(0).normal(size=(40, 3, 4)).astype(np.float32)

    def test_a_map_of_one_pixel_scores_and_trains_like_a_vector(self):
        task = Task.from_arrays(self.rows(), np.arange(40) % 4)
        plain, mapped = self.classifier(), self.classifier(nn.Unflatten(1, (4, 1, 1)))
        assert task.score(mapped) == task.score(plain)
        task.fit(plain, 1, 0.1), task.fit(mapped, 1, 0.1)
        assert torch.equal(plain[1].weight, mapped[1].weight)

    def test_a_column_of_predictions_scores_and_trains_like_a_vector(self):
        task = Task.from_arrays(self.rows(), self.rows().sum((1, 2)))
        torch.manual_seed(0)
        column = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
        vector = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0))
        vector.load_state_dict(column.state_dict())
        assert task.score(column) == task.score(vector)
        task.fit(column, 1, 0.1), task.fit(vector, 1, 0.1)
        assert torch.equal(column[1].weight, vector[1].weight)

    def test_classes_may_be_given_instead_of_scores(self):
        task = Task.from_arrays(self.rows(), np.arange(40) % 4)

        class Decided(nn.Module):
            def forward(self, x):
                return model(x).argmax(1)

        model = self.classifier()
        assert task.score(Decided()) == task.score(model)

    @pytest.mark.parametrize(
        "more",
        [(nn.Linear(4, 2),), (nn.Unflatten(1, (2, 2)),), (nn.Linear(4, 1),)],
        ids=["too few classes", "a map", "one score"],
    )
    def test_other_shapes_are_refused_in_scoring_and_in_training(self, more):
        task = Task.from_arrays(self.rows(), np.arange(40) % 4)
        with pytest.raises(DataError, match="the model gives"):
            task.score(self.classifier(*more))
        with pytest.raises(DataError, match="the model gives"):
            task.fit(self.classifier(*more), 1, 0.1)
