"""Taxonomies, WordNet's files, and one-class tasks built from them."""

import numpy as np
import pytest

from thrifty.errors import MissingExtra
from thrifty.fewshot import one_class as oc
from thrifty.fewshot.one_class import Taxonomy, ToyWorld, WordNet, build, embed, split, units_above, units_of_size
from thrifty.fewshot.preprocess import InputError, OptionError

RANKS = ("genus", "family", "order")
SPECIES = [
    (f"o{o}", f"o{o}f{f}", f"o{o}f{f}g{g}", f"o{o}f{f}g{g}s{s}")
    for o in range(2)
    for f in range(2)
    for g in range(2)
    for s in range(3)
]
TREE = Taxonomy.from_paths([("life", *path) for path in SPECIES], RANKS)
LABELS = [path[-1] for path in SPECIES for _ in range(5)]


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- trees


def test_steps_are_ranks():
    assert TREE.steps("o0f0g0s0", "o0f0g0s1") == 1
    assert TREE.steps("o0f0g0s0", "o0f0g1s0") == 2
    assert TREE.steps("o0f0g0s0", "o0f1g0s0") == 3
    assert TREE.steps("o0f0g0s0", "o1f0g0s0") == 4
    assert TREE.steps("o0f0g0", "o0f0g0s2") == 0
    assert TREE.steps("o0f0", "o0f1g0s0") == 1  # a coarse target: the same rule one level up
    assert TREE.common("o0f0g0s0", "o0f0g1s0") == "o0f0"


def test_by_steps_covers_every_class_once_at_its_distance():
    for target in ("o0f0g0s0", "o1f1g1", "o0f1"):
        found = TREE.by_steps(target)
        assert sorted(c for classes in found.values() for c in classes) == list(TREE.leaves)
        assert all(TREE.steps(target, c) == s for s, classes in found.items() for c in classes)


def test_contraction_keeps_only_steps_that_bring_classes():
    tree = Taxonomy({"a": "x", "x": "y", "y": "root", "b": "z", "c": "z", "z": "root", "d": "w", "w": "root"})
    few = tree.contracted(["a", "b", "c"])
    assert dict(few.parent) == {"a": "root", "b": "z", "c": "z", "z": "root"}
    assert few.steps("a", "b") == 1
    with pytest.raises(InputError, match="above other classes: z"):
        tree.contracted(["z", "b"])


def test_bad_trees_are_refused():
    with pytest.raises(InputError, match=r"cycle: (a -> b -> a|b -> a -> b)"):
        Taxonomy({"a": "b", "b": "a"})
    with pytest.raises(InputError, match="two parents"):
        Taxonomy.from_paths([("r", "a", "x"), ("r", "b", "x")])
    with pytest.raises(InputError, match=r"close: o0f0g0s\d"):
        TREE.leaves_of("o0f0g0s9")
    with pytest.raises(InputError, match="hierarchical"):
        TREE.draw(rng(), 3, TREE.leaves, "hierachical")
    with pytest.raises(InputError, match="no classes"):
        TREE.draw(rng(), 3, [])


def test_hierarchical_targets_are_uniform_at_every_level():
    """a has 1 class, b has 9: uniform gives a one tenth, hierarchical one half."""
    tree = Taxonomy({"a0": "a", **{f"b{i}": "b" for i in range(9)}, "a": "r", "b": "r"})
    share = {
        how: np.mean([c == "a0" for c in tree.draw(rng(), 4000, tree.leaves, how)])
        for how in ("uniform", "hierarchical")
    }
    assert share["uniform"] == pytest.approx(0.1, abs=3 * (0.09 / 4000) ** 0.5)
    assert share["hierarchical"] == pytest.approx(0.5, abs=3 * (0.25 / 4000) ** 0.5)
    assert set(tree.draw(rng(), 200, ["b1", "b2"], "hierarchical")) == {"b1", "b2"}


# ---- tasks


@pytest.mark.parametrize(
    "targets", [TREE.leaves, [f"o{o}f{f}g{g}" for o in range(2) for f in range(2) for g in range(2)]]
)
def test_negatives_lie_at_exactly_the_level_and_half_the_pictures_are_positive(targets):
    found = build(TREE, LABELS, targets, rng(), pictures=5)
    assert {q.level for q in found.questions} >= {"genus", "family", "order"}
    for q in found.questions:
        step = [*RANKS, "4"].index(q.level) + 1
        assert len(q.positives) == len(q.negatives) == 5
        assert len({*q.positives, *q.negatives}) == 10
        assert {TREE.steps(q.target, LABELS[i]) for i in q.positives} == {0}
        assert {TREE.steps(q.target, LABELS[i]) for i in q.negatives} == {step}
        assert len({LABELS[i] for i in q.negatives}) == min(5, len(TREE.by_steps(q.target)[step]))  # spread


def test_pairs_without_negatives_are_skipped_and_counted():
    lonely = Taxonomy.from_paths(
        [("r", "f", "g1", "a"), ("r", "f", "g2", "b"), ("r", "f", "g2", "c")], ("genus", "family")
    )
    found = build(lonely, ["a", "b", "c"], ["a", "b"], rng(), levels={"genus": (1,), "family": (2,)})
    assert [(q.target, q.level) for q in found.questions] == [("a", "family"), ("b", "genus"), ("b", "family")]
    assert found.skipped == {"genus": 1, "family": 0}
    assert found.complete().targets == ("b",)
    assert build(lonely, ["a", "b", "c"], ["b"], rng(), pictures=5, least=2).questions == ()


def test_a_benchmark_is_a_function_of_the_seed():
    assert build(TREE, LABELS, TREE.leaves, rng(1)) == build(TREE, LABELS, TREE.leaves, rng(1))
    assert build(TREE, LABELS, TREE.leaves, rng(1)) != build(TREE, LABELS, TREE.leaves, rng(2))


def test_parts_share_no_class_and_no_branch():
    units = units_above(TREE, 1)
    parts = split(units, {"fit": 0.5, "calibration": 0.25, "test": 0.25}, rng())
    assert sorted(c for p in parts.values() for c in p) == list(TREE.leaves)
    assert len(parts["fit"]) == 12
    genera = [{units[c] for c in p} for p in parts.values()]
    assert not genera[0] & genera[1]
    assert not (genera[0] | genera[1]) & genera[2]
    found = build(TREE, LABELS, parts["test"], rng(), classes=parts["test"])
    assert {LABELS[i] for q in found.questions for i in (*q.positives, *q.negatives)} <= parts["test"]


def test_shares_may_leave_classes_out():
    parts = split({str(i): str(i) for i in range(100)}, {"a": 0.2, "b": 0.1}, rng())
    assert (len(parts["a"]), len(parts["b"])) == (20, 10)


def test_branches_of_a_size():
    units = units_of_size(TREE, 6)
    assert set(units.values()) == {f"o{o}f{f}" for o in range(2) for f in range(2)}
    assert set(units_of_size(TREE, 1).values()) == set(TREE.leaves)


def test_embedding_gives_the_arrays_and_names_all_that_is_missing():
    questions = build(TREE, LABELS, ["o0f0g0s0"], rng(), pictures=2).questions
    images = rng().standard_normal((len(LABELS), 4))
    texts = {"star": np.ones(4), "x": np.zeros(4), "y": np.ones(4)}
    tasks = embed(questions, LABELS, images, texts, {"o0f0g0s0": ("x", "y")}, names={"o0f0g0s0": "star"})
    assert [t.level for t in tasks] == ["genus", "family", "order", "4"]
    assert (tasks[0].target == 1).all()
    assert tasks[0].negatives.shape == (2, 4)
    assert (tasks[0].images[:2] == images[list(questions[0].positives)]).all()
    assert tasks[0].positive.tolist() == [True, True, False, False]
    assert "o0f0g0s0" in tasks[0].classes
    with pytest.raises(InputError, match=r"no negatives for o0f0g0s0 \(1\); no text embedding for o0f0g0s0"):
        embed(questions, LABELS, images, texts, {})
    empty = embed(questions, LABELS, images, texts, {"o0f0g0s0": ()}, names={"o0f0g0s0": "star"})
    assert empty[0].negatives.shape == (0, 4)  # FT only


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: build(TREE, ["unknown"], TREE.leaves, rng()), InputError, "no class of the taxonomy"),
        (lambda: build(TREE, LABELS, ["o0f0g0s0"], rng(), levels={"self": (0,)}), OptionError, "target itself"),
        (lambda: build(TREE, LABELS, TREE.leaves, rng(), pictures=1, least=2), OptionError, "least"),
        (lambda: split({"a": "a"}, {"x": 0.7, "y": 0.7}, rng()), OptionError, "at most 1"),
        (lambda: split({"a": "u", "b": "u"}, {"x": 0.5, "y": 0.5}, rng()), InputError, "got no class"),
        (lambda: oc.benchmark.spread({"a": [1]}, 2, rng()), InputError, "2 pictures asked for, 1 there"),
    ],
)
def test_bad_requests_are_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_the_toy_world_has_the_taxonomy_of_its_pictures():
    world = ToyWorld.of(0)
    assert world.taxonomy.steps("g0s0", "g0s1") == 1
    assert world.taxonomy.steps("g0s0", "g1s1") == 2
    assert world.pictures(0, 0, 3).shape == (3, 128)


# ---- WordNet


SYNSETS = {  # name: (words, hypernyms, parts)
    "entity": (["entity"], [], []),
    "animal": (["animal", "creature"], ["entity"], []),
    "cat": (["cat", "true_cat"], ["animal"], ["paw"]),
    "dog": (["dog"], ["animal"], []),
    "siamese": (["Siamese_cat", "Siamese"], ["cat"], []),
    "persian": (["Persian_cat"], ["cat"], []),
    "poodle": (["poodle"], ["dog"], []),
    "paw": (["paw"], ["entity"], []),
    "person": (["cat"], ["entity"], []),  # a spiteful one
}


@pytest.fixture
def folder(tmp_path):
    """A WordNet of nine meanings in the format of wndb(5WN)."""
    licence = "  1 Only for tests.  \n"

    def line(name, at):
        words, above, parts = SYNSETS[name]
        below = [n for n, (_, h, _) in SYNSETS.items() if name in h]
        links = [("@", n) for n in above] + [("~", n) for n in below] + [("%p", n) for n in parts]
        pointers = " ".join(f"{s} {at[n]:08d} n 0000" for s, n in links)
        spelt = " ".join(f"{w} 0" for w in words)
        return f"{at[name]:08d} 03 n {len(words):02x} {spelt} {len(links):03d} {pointers} | gloss of {name}  \n"

    at = dict.fromkeys(SYNSETS, 0)
    position = len(licence)
    for name in SYNSETS:
        at[name] = position
        position += len(line(name, dict.fromkeys(SYNSETS, 0)))
    (tmp_path / "data.noun").write_text(licence + "".join(line(n, at) for n in SYNSETS))
    senses = {}
    for name, (words, _, _) in SYNSETS.items():
        for word in words:
            senses.setdefault(word.lower(), []).append(at[name])
    lines = [f"{w} n {len(o)} 1 @ {len(o)} 0 {' '.join(f'{x:08d}' for x in o)}  \n" for w, o in sorted(senses.items())]
    (tmp_path / "index.noun").write_text(licence + "".join(lines))
    (tmp_path / "noun.exc").write_text("pawz paw\n")
    return tmp_path


def test_wordnet_reads_senses_and_what_is_around(folder):
    w = WordNet(folder)
    cat, other = w.senses("Cats")
    assert (cat.words, cat.gloss) == (("cat", "true_cat"), "gloss of cat")
    assert [s.words[0] for s in w.ancestors(cat.offset)] == ["animal", "entity"]
    assert [s.words[0] for s in w.siblings(cat.id)] == ["dog"]
    assert [s.words[0] for s in w.siblings(cat.id, 2)] == ["dog"]  # one step more: paw and person have no children
    assert w.synset(cat.id) is w.synset(cat.offset)
    assert w.senses("true cat") == (cat,)
    assert w.senses("pawz")[0].words == ("paw",)
    assert w.senses("unicorn") == ()
    assert w.words_around("cat") >= {"cat", "true cat", "animal", "entity", "Siamese cat", "paw"}
    assert "dog" not in w.words_around("cat")
    assert other.words == ("cat",)
    assert "true cat" in w.nouns()


def test_siblings_are_neither_above_nor_below(folder):
    w = WordNet(folder)
    cousins = [s.words[0] for s in w.siblings(w.senses("siamese")[0].offset, 2)]
    assert cousins == ["Persian_cat", "poodle"]  # nearest first; cat and dog are not of the same generation
    everything = {s.words[0] for s in w.siblings(w.senses("dog")[0].offset, 3)}
    assert not everything & {"dog", "poodle", "animal", "entity"}


def test_wordnet_as_a_taxonomy(folder):
    w = WordNet(folder)
    ids = {n: w.senses(n)[0].id for n in ("siamese", "persian cat", "poodle")}
    tree = w.taxonomy(ids.values())
    assert tree.steps(ids["siamese"], ids["persian cat"]) == 1
    assert tree.steps(ids["siamese"], ids["poodle"]) == 2
    assert len(tree.children) == 2  # dog has one class below and is no step


def test_wordnet_negatives_are_siblings_then_cousins(folder):
    w = WordNet(folder)
    assert oc.wordnet_negatives(w, "Siamese", 5).kept[:2] == ("Persian cat", "poodle")
    assert oc.wordnet_negatives(w, "unicorn").kept == ()
    animal = w.senses("animal")[0].id
    assert oc.wordnet_negatives(w, "cat", 1, under=[animal]).kept == ("dog",)
    assert oc.wordnet_negatives(w, "paw", under=[animal]).kept == ()
    assert oc.wordnet_negatives(w, "cat", 3, sense=w.senses("cat")[0].offset).kept[0] == "dog"


def test_wordnet_is_found_or_says_where_to_get_it(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_WORDNET", str(folder))
    assert WordNet().folder == folder
    with pytest.raises(
        MissingExtra, match=r"data.noun and index.noun not in .*apt-get install wordnet-base.*THRIFTY_WORDNET"
    ):
        WordNet(tmp_path / "nothing")
    with pytest.raises(InputError, match="no noun at offset"):
        WordNet(folder).synset("n00000003")
    with pytest.raises(InputError, match="ids look like"):
        WordNet(folder).synset("dog")


@pytest.mark.data
def test_the_real_wordnet():
    try:
        w = WordNet()
    except MissingExtra as err:
        pytest.skip(str(err))
    dog = w.senses("dogs")[0]
    assert dog.id == "n02084071"  # the id that ImageNet's tree gives to dogs
    assert "Canis_familiaris" in dog.words
    assert len(w.nouns()) > 100_000
    names = oc.wordnet_negatives(w, "tiger", 5, under=["n00015388"]).kept
    assert {"leopard", "lion"} <= {*names}
