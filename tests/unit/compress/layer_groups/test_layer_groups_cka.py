"""Linear CKA between layers, streamed, and the groups that are cut from it."""

import numpy as np
import pytest
import torch

from thrifty.compress.layer_groups import LinearCKA, MinibatchCKA, cluster, group, similarities
from thrifty.compress.layer_groups.cka import MOST_BYTES
from thrifty.compress.layer_groups.pictures import cka_matrix, groups_table, page, standalone, tree
from thrifty.errors import DataError, KnobError


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def cka_of(*states):
    cka = LinearCKA()
    cka.update([torch.as_tensor(s, dtype=torch.float64) for s in states])
    return cka.matrix()


def by_definition(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def test_the_small_case_by_hand():
    found = cka_of([[1, 0], [0, 1], [-1, -1]], [[1], [0], [-1]])
    assert found[0, 1] == pytest.approx(0.790569, abs=1e-6)
    assert found[0, 0] == found[1, 1] == 1.0


def test_one_for_a_rotation_a_scale_and_a_shift():
    x = torch.randn(50, 6, generator=draws(), dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=draws(1), dtype=torch.float64))
    other = torch.randn(50, 6, generator=draws(2), dtype=torch.float64)
    found = cka_of(x, 3.5 * x @ rotation + 7.0, other)
    assert found[0, 1] == pytest.approx(1.0, abs=1e-12)
    assert found[0, 2] == pytest.approx(found[1, 2], abs=1e-12)
    assert found[0, 2] < 0.5


def test_streaming_equals_the_definition_far_from_zero():
    """Means of a million: uncentred sums of squares would lose everything that matters."""
    states = [torch.randn(97, width, generator=draws(width), dtype=torch.float64) + 1e6 for width in (3, 5, 4)]
    states[2] = states[2] + states[0].sum(1, keepdim=True)
    cka = LinearCKA()
    for start in (0, 10, 11, 60):
        stop = {0: 10, 10: 11, 11: 60, 60: 97}[start]
        cka.update([s[start:stop] for s in states])
    found = cka.matrix()
    assert cka.frames == 97
    for a in range(3):
        for b in range(3):
            x, y = (states[i].numpy() - 1e6 for i in (a, b))
            assert found[a, b] == pytest.approx(by_definition(x, y), abs=1e-7)


def test_the_minibatch_estimate_is_near_the_exact_value_and_hardly_biased():
    x = torch.randn(2000, 8, generator=draws(), dtype=torch.float64)
    y = x[:, :4] + torch.randn(2000, 4, generator=draws(1), dtype=torch.float64)
    z = torch.randn(2000, 8, generator=draws(2), dtype=torch.float64)  # independent of x
    estimate, biased = MinibatchCKA(), []
    for start in range(0, 2000, 20):
        part = [s[start : start + 20] for s in (x, y, z)]
        estimate.update(part)
        biased.append(cka_of(*part)[0, 2])
    found, exact = estimate.matrix(), cka_of(x, y, z)
    assert found[0, 1] == pytest.approx(exact[0, 1], abs=0.03)
    assert found[0, 2] < 0.03  # the truth is 0
    assert np.mean(biased) > 0.2  # what averaging the exact value over small batches would say


def test_faults_of_the_frames_are_refused():
    with pytest.raises(DataError, match="same frames"):
        cka_of(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(DataError, match=r"\[1\] are the same in every frame"):
        cka_of(torch.randn(5, 2, generator=draws()), torch.ones(5, 2))
    with pytest.raises(DataError, match="at least 2"):
        cka_of(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(DataError, match="at least 4"):
        MinibatchCKA().update([torch.ones(3, 2)])
    width = int((MOST_BYTES / 8) ** 0.5) + 1
    with pytest.raises(KnobError, match="minibatch"):
        LinearCKA().update([torch.ones(1, 1).expand(1, width)])


# ---- groups


def near_copies():
    """Six representations, the last three near copies of each other."""
    states = [torch.randn(400, 5, generator=draws(i), dtype=torch.float64) for i in range(4)]
    noise = [1e-3 * torch.randn(400, 5, generator=draws(9 + i), dtype=torch.float64) for i in (0, 1)]
    return [*states, *(states[3] + n for n in noise)]


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_near_copies_are_one_group(linkage, contiguous):
    found = cluster(cka_of(*near_copies()), count=4, linkage=linkage, contiguous=contiguous)
    assert found.groups == ((0,), (1,), (2,), (3, 4, 5))
    assert cluster(found.similarity, distance=0.1, linkage=linkage, contiguous=contiguous).groups == found.groups


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_the_tree_is_scipys(linkage):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    x = torch.randn(8, 3, generator=draws(5), dtype=torch.float64)
    away = torch.cdist(x, x).numpy()
    found = cluster(1.0 - away, count=3, linkage=linkage)
    theirs = hierarchy.linkage(away[np.triu_indices(8, 1)], linkage)
    assert np.allclose([m.height for m in found.merges], theirs[:, 2])
    assert [m.size for m in found.merges] == theirs[:, 3].astype(int).tolist()
    labels = hierarchy.fcluster(theirs, 3, "maxclust")
    assert {frozenset(np.flatnonzero(labels == k).tolist()) for k in set(labels)} == set(map(frozenset, found.groups))


def test_contiguous_groups_are_intervals():
    matrix = np.eye(5)
    matrix[0, 4] = matrix[4, 0] = 0.99
    matrix[1, 2] = matrix[2, 1] = 0.5
    assert cluster(matrix, count=4).groups == ((0, 4), (1,), (2,), (3,))
    assert cluster(matrix, count=4, contiguous=True).groups == ((0,), (1, 2), (3,), (4,))


def test_cuts_at_the_ends():
    matrix = cka_of(*near_copies())
    assert cluster(matrix, count=6).groups == tuple((i,) for i in range(6))
    assert cluster(matrix, count=1).groups == (tuple(range(6)),)
    assert cluster(matrix, distance=0.0).groups == tuple((i,) for i in range(6))
    assert cluster(matrix, distance=5.0).groups == (tuple(range(6)),)
    assert len(cluster(matrix).groups) == 4


def test_faults_of_the_options_are_refused_together():
    with pytest.raises(KnobError, match=r"not both.*1\.\.2.*at least 0.*ward"):
        cluster(np.eye(2), count=9, distance=-1.0, linkage="ward")
    with pytest.raises(DataError, match="square"):
        cluster(np.zeros((2, 3)))
    with pytest.raises(DataError, match="symmetric"):
        cluster(np.array([[1.0, 0.5], [0.1, 1.0]]))


# ---- on models


def test_masked_frames_are_left_out():
    pytest.importorskip("transformers")
    from tiny_stacks import batch_for, tiny

    model, batch = tiny("bert"), batch_for("bert")
    short = {k: v[1:, :6] for k, v in batch.items()}
    alone = {k: v[:1] for k, v in batch.items()}
    found = similarities(model, [batch])
    assert found.frames == 9 + 6
    assert np.allclose(found.matrix, similarities(model, [alone, short]).matrix, atol=1e-5)
    assert found.matrix.shape == (4, 4)  # three layers and their input


def test_groups_of_a_model_and_their_pictures():
    pytest.importorskip("transformers")
    from tiny_stacks import batch_for, tiny

    model = tiny("wavlm").train()
    batches = [batch_for("wavlm", seed=s) for s in range(3)]
    moved = []
    found = group(model, batches, count=2, progress=lambda done, total, words: moved.append((done, total)))
    assert model.training
    assert moved == [(1, 3), (2, 3), (3, 3)]
    assert sorted(i for g in found.groups for i in g) == [0, 1, 2, 3]
    assert len(groups_table(found).rows) == 2
    text = page(found, "tiny <wavlm>")
    assert "tiny &lt;wavlm&gt;" in text
    assert text.count("<svg") == 2
    assert "http" not in text.replace("http-equiv", "")
    assert cka_matrix(found).count('class="cka"') == 16 + 24
    assert tree(found).count('class="branch"') == 3
    assert standalone(tree(found)).startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_a_model_that_gives_nan_is_refused_with_the_layer():
    pytest.importorskip("transformers")
    from tiny_stacks import batch_for, tiny

    model = tiny("bert")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[0] = float("nan")
    with pytest.raises(DataError, match=r"batch 0: representations \[2, 3\]"):
        similarities(model, [batch_for("bert")])
    with pytest.raises(DataError, match="no batch"):
        similarities(model, [])
    with pytest.raises(KnobError, match="method"):
        similarities(model, [], method="quick")
