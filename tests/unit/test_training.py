from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError
from thrifty.task import Task
from thrifty.training import Training, augment, mix, random_window


def data() -> Task:
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 2, 8)).astype(np.float32) + y[:, None, None]
    return Task.from_arrays(x, y, name="steps")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 3)
    )


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


class StopError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, optimizer):
    task, knobs = data(), {"epochs": 4, "lr": 0.01, "optimizer": optimizer, "mixup": 0.5, "shift": 1}
    whole, broken, resumed = net(), net(), net(seed=9)
    task.fit(whole, **knobs)

    def stop(epoch: int, epochs: int, loss: float) -> None:
        if epoch == 2:
            raise StopError

    with pytest.raises(StopError):
        task.fit(broken, checkpoint=tmp_path / "c", progress=stop, **knobs)
    seen = []
    task.fit(resumed, checkpoint=tmp_path / "c", progress=lambda e, n, loss: seen.append(e), **knobs)
    assert seen == [3, 4]
    assert same(whole, resumed)
    assert not same(whole, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_finished_run_gives_its_weights_back(tmp_path):
    task, one, two = data(), net(), net(seed=4)
    task.fit(one, epochs=2, checkpoint=tmp_path / "c")
    task.fit(two, epochs=2, checkpoint=tmp_path / "c")
    assert same(one, two)


def test_foreign_checkpoints_are_refused(tmp_path):
    task = data()
    task.fit(net(), epochs=1, checkpoint=tmp_path / "c")
    with pytest.raises(DataError, match=r"lr was 0.05, is 0.1.*delete it"):
        task.fit(net(), epochs=1, lr=0.1, checkpoint=tmp_path / "c")
    with pytest.raises(DataError, match="another model"):
        task.fit(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), epochs=1, checkpoint=tmp_path / "c")
    (tmp_path / "c").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        task.fit(net(), epochs=1, checkpoint=tmp_path / "c")


def test_all_wrong_options_are_listed():
    with pytest.raises(KnobError) as err:
        Training(epochs=-1, lr=0, batch=0, optimizer="sgdd", schedule="cosin", milestones=(3,), mixup=-1)
    for part in (
        "epochs is -1",
        "lr is 0",
        "batch is 0",
        "close: sgd",
        "close: cosine",
        "milestones",
        "mixup",
    ):
        assert part in str(err.value)
    with pytest.raises(KnobError, match=r"no option 'bacth' \(close: batch\)"):
        data().fit(net(), epochs=1, bacth=3)


def test_schedules():
    constant = Training(epochs=4, lr=1.0, schedule="constant", warmup=0.5)
    assert [constant.rate(s, 1) for s in range(4)] == [1 / 3, 2 / 3, 1, 1]
    steps = Training(epochs=4, lr=1.0, schedule="multistep", milestones=(1, 3), gamma=0.1)
    assert [round(steps.rate(s, 2), 6) for s in range(8)] == [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    cosine = [Training(epochs=10, lr=2.0).rate(s, 10) for s in range(100)]
    assert cosine[0] == 2
    assert cosine[50] == pytest.approx(1)
    assert all(a > b for a, b in itertools.pairwise(cosine))
    cycle = [Training(epochs=10, lr=1.0, schedule="onecycle").rate(s, 10) for s in range(100)]
    assert cycle[0] == 1 / 25
    assert cycle[30] == 1 == max(cycle)
    assert cycle[99] < 0.001


def test_sgd_step_by_hand():
    task = Task.from_arrays(np.ones((10, 1)), np.ones((10, 1)), validation=0.1, test=0.1)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    task.fit(model, epochs=1, lr=0.25, batch=100, momentum=0, weight_decay=0, schedule="constant")
    assert model.weight.item() == 0.5  # the gradient of (w - 1)^2 at 0 is -2


def test_parameter_groups_keep_their_own_step_size():
    task = data()
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": [model[5].weight], "lr": 0.05}, {"params": [model[0].weight], "lr": 1e-9}]
    task.fit(model, epochs=1, lr=0.05, parameters=groups, weight_decay=0)
    moved = [(a - b.detach()).abs().max().item() for a, b in zip(before, model.parameters())]
    assert moved[4] > 1e-3
    assert moved[0] < 1e-6
    assert moved[1] == moved[5] == 0


def test_frozen_models_are_refused():
    with pytest.raises(DataError, match="no trainable parameter"):
        data().fit(net().requires_grad_(False), epochs=1)


def test_divergence_is_reported_with_the_step():
    with pytest.raises(DataError, match=r"the loss became (nan|inf) in epoch \d+, step \d+ \(lr 1e\+30\)"):
        data().fit(net(), epochs=3, lr=1e30)


def test_before_epoch_is_called_in_order():
    seen = []
    data().fit(net(), epochs=3, before_epoch=lambda epoch, model: seen.append((epoch, type(model))))
    assert seen == [(0, nn.Sequential), (1, nn.Sequential), (2, nn.Sequential)]


def test_progress_bar_writes_to_stderr_only(capsys):
    data().fit(net(), epochs=1, progress=True)
    assert capsys.readouterr().out == ""


def test_random_windows_move_and_pad_with_zeros():
    x = torch.arange(1.0, 6.0).expand(200, 1, 5)
    moved = random_window(x, 2, 2, torch.Generator().manual_seed(0))
    rows = {tuple(r[0].int().tolist()) for r in moved}
    assert rows == {(0, 0, 1, 2, 3), (0, 1, 2, 3, 4), (1, 2, 3, 4, 5), (2, 3, 4, 5, 0), (3, 4, 5, 0, 0)}


def test_crop_moves_both_axes_of_a_picture_together():
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3).expand(300, 2, 3, 3)
    moved = augment(x, Training(crop=1), torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    assert torch.equal(moved[:, 0], moved[:, 1])  # channels stay together
    assert len({tuple(m.flatten().int().tolist()) for m in moved[:, 0]}) == 9


def test_flip_mirrors_about_half():
    x = torch.arange(3.0).expand(1000, 1, 3)
    flipped = augment(x, Training(flip=True), torch.Generator().manual_seed(0))[:, 0, 0] == 2
    assert 0.4 < float(flipped.float().mean()) < 0.6


def test_mixing_keeps_probabilities_and_pairs_inputs_with_targets():
    y = nn.functional.one_hot(torch.arange(4), 4).float()
    mixed_x, mixed_y = mix(y.clone(), y, 1.0, torch.Generator().manual_seed(2))
    assert torch.equal(mixed_x, mixed_y)
    assert torch.allclose(mixed_y.sum(1), torch.ones(4))


def test_a_last_batch_of_one_does_not_stop_batch_normalisation():
    task = Task.from_arrays(np.random.default_rng(0).normal(size=(40, 2, 8)), np.arange(40) % 2)
    batch = len(task.train) - 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    task.fit(model, epochs=1, batch=batch)
    assert all(math.isfinite(float(p.sum())) for p in model.parameters())


class Recorder:
    """An objective that remembers the targets it got."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append(y)
        return model(x).square().mean()


def test_objective_argument_wins_and_gets_soft_labels_under_mixup():
    plain, soft = Recorder(), Recorder()
    data().fit(net(), epochs=1, objective=plain)
    data().fit(net(), epochs=1, objective=soft, mixup=0.5)
    assert plain.seen[0].dtype == torch.int64
    assert soft.seen[0].shape[1] == 3
