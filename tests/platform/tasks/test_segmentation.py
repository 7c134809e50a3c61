"""Segmenters: they learn, whatever splits a batch; exports, predictions and adaptation without masks."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lossworks.entries.analyses.map_cases import mistakes
from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.planning.rehearsal import rehearse
from lossworks.training.weights.export import evaluate_folder, export_run, predict_file
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import last_evaluation, losses, run_in_folder, run_training


def drawn(**changes):
    """Return a small segmenter's spec."""
    values = {
        "task": "segmentation",
        "steps": 4,
        "batch_size": 4,
        "workers": 1,
        "sharding": {"kind": "none"},
        "data": {"source": "walls:16", "side": 32},
        "model": {"levels": 2, "width": 4, "groups": 2},
        "optimizer": {"lr": 0.01},
        "evaluation": {"every": 4},
        "checkpoint": {"every": 4},
        "tracking": {"model": False},
    }
    return {**values, **changes}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The folder of a run."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    return run_in_folder(drawn())


def test_overlap_grows_in_training(tmp_path):
    values = drawn(steps=40, evaluation={"every": 20}, checkpoint={"every": 40})

    result = run_training(values, None, str(tmp_path))

    curve = [row["eval/dice"] for _, row in result["rows"] if "eval/dice" in row]
    assert curve[-1] > curve[0]
    assert curve[-1] > 0.6
    assert losses(result)[-1] < losses(result)[0]


@pytest.mark.parametrize(
    "loss", ["ce-dice", "cross-entropy", [{"name": "cross-entropy"}, {"name": "cldice", "weight": 0.5}]]
)
def test_ranks_and_micro_batches_give_what_one_process_gives(loss, tmp_path):
    values = drawn(loss=loss, model={"kind": "predict-refine", "levels": 1, "width": 4, "groups": 2})
    one = run_training(values, None, str(tmp_path / "one"))
    for sharding in ("ddp", "fsdp"):
        split = {**values, "workers": 2, "sharding": sharding, "micro_batch_size": 1}
        folder = tmp_path / sharding
        folder.mkdir()
        two = run_ranks(2, run_training, split, None, str(folder / "run"), folder=folder)[0]

        assert losses(two) == pytest.approx(losses(one), rel=1e-3)
        for name in ("eval/loss", "eval/dice", "eval/b1_error"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=2e-2, abs=0.3)


def test_going_on_gives_what_an_uninterrupted_run_gives(tmp_path):
    """Patches and their changes are drawn anew at each visit, and are the same again."""
    data = {"source": "walls:16", "side": 32, "patch": 16, "augment": {"flip": True, "scale": 1.3}}
    values = drawn(steps=6, data=data, checkpoint={"every": 3})
    whole = run_training(values, None, str(tmp_path / "whole"))

    run_training(values, None, str(tmp_path / "parts"), stop_after=3)
    rest = run_training(values, None, str(tmp_path / "parts"))

    assert losses(rest) == losses(whole)[3:]
    assert rest["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]


def test_recomputed_activations_change_nothing(tmp_path):
    plain, again = (
        run_training(drawn(activation_checkpointing=on), None, str(tmp_path / str(on)))
        for on in (False, True)
    )

    assert losses(again) == losses(plain)


def test_an_export_measures_and_predicts_as_the_run_did(trained, tmp_path):
    export_run(trained, tmp_path / "model")
    images = tmp_path / "new" / "images"
    images.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 36, 3), dtype=np.uint8)
    for name, image in zip(("a", "b"), pixels, strict=True):
        Image.fromarray(image).save(images / f"{name}.png")
    Image.fromarray(pixels[0, ..., 0]).save(images / "grey.png")

    evaluation = evaluate_folder(tmp_path / "model")
    found = predict_file(str(tmp_path / "model"), tmp_path / "new")

    before = last_evaluation(trained)
    assert evaluation.metrics() == pytest.approx(
        {name: before[name] for name in evaluation.metrics()}, rel=1e-5
    )
    assert list(found.columns["image"]) == ["a.png", "b.png", "grey.png"]
    shares = np.array([found.columns["share of brick"], found.columns["share of mortar"]])
    np.testing.assert_allclose(shares.sum(0), 1)
    mask = np.asarray(Image.open(io.BytesIO(found.files["masks/a.png"]())))
    assert mask.shape == (40, 36)
    assert (mask == 1).mean() == pytest.approx(shares[1, 0])


def test_an_image_of_other_channels_is_refused_by_name(trained, tmp_path):
    np.save(tmp_path / "five.npy", np.zeros((5, 20, 20), dtype=np.float32))

    with pytest.raises(UserError, match=r"five.npy: has 5 channels; the model's have 3"):
        predict_file(str(trained.path), tmp_path / "five.npy")


def test_a_trained_model_adapts_to_a_folder_without_masks(trained, tmp_path):
    images = tmp_path / "mine"
    images.mkdir()
    rows = ["image,brick,mortar"]
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        rows.append(f"{number},0.8,0.2")
    (tmp_path / "priors.csv").write_text("\n".join(rows))
    data = {"source": f"folder:{images}", "unlabelled": True, "priors": f"csv:{tmp_path / 'priors.csv'}"}
    values = drawn(start=str(trained.path), loss="sfda", data=data)

    assert rehearse(parse_train_spec(values)).parameters > 0  # a plan knows the classes of its start, too

    adapted = run_in_folder(values, "adapted")

    found = last_evaluation(adapted)
    assert np.isfinite(found["eval/loss"])
    assert "eval/dice" not in found
    with pytest.raises(UserError, match=r"loss.name=ce-dice reads masks; what reads none: sfda"):
        run_in_folder({**values, "loss": "ce-dice"}, "wrong")
    (tmp_path / "priors.csv").write_text("\n".join(rows[:-1]))
    with pytest.raises(UserError, match="has no row for image 7"):
        run_in_folder(values, "missing")


def test_classes_that_arrive_in_steps_need_a_head_for_each():
    data = {"source": "shapes:8", "side": 32, "classes": ["background", "disc", "square"]}
    model = {"kind": "incremental-unet", "steps": [1, 2], "levels": 1, "width": 4, "groups": 2}
    spec = parse_train_spec(drawn(data=data, model=model, methods=[{"name": "barm", "starts": [2]}]))

    with pytest.raises(UserError, match=r"model.steps=\[1, 2\] adds 3 classes .* the data have 2 besides it"):
        task_of(spec).prepare(spec)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": {"kind": "muon"}}, "optimizer.kind=muon"),
        ({"loss": "squared-error"}, "loss.name=squared-error can't train task=segmentation"),
        ({"methods": [{"name": "barm"}]}, "model.kind=incremental-unet"),
        ({"model": {"kind": "incremental-unet"}}, r"steps=\[\]"),
        ({"data": {"source": "walls:3"}}, "N from 4"),
        ({"data": {"source": "voices:8", "augment": {"random_hue": True}}}, "random_hue"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(changes, named):
    with pytest.raises(UserError, match=named):
        parse_train_spec(drawn(**changes))


def test_mistakes_are_marked_where_they_are():
    target = np.zeros((20, 20), dtype=np.int64)
    target[10, 2:18] = 1
    prediction = target.copy()
    prediction[10, 9:11] = 0  # a gap
    prediction[10, 17] = 0  # a shorter end, which parts nothing
    prediction[3:5, 3:5] = 1  # a component of its own

    found = mistakes(prediction, target, 5)

    assert [(x, y) for x, y, _ in found["broken"]] == [(9.5, 10.0)]
    assert [(x, y) for x, y, _ in found["spurious"]] == [(3.5, 3.5)]
    assert mistakes(target, target, 5) == {"broken": [], "spurious": []}


def test_mistakes_on_ignored_pixels_are_not_marked():
    target = np.full((8, 8), -100, dtype=np.int64)
    prediction = np.ones((8, 8), dtype=np.int64)

    assert mistakes(prediction, target, 5) == {"broken": [], "spurious": []}


def test_the_worst_the_median_and_the_best_image_are_pictured(trained):
    from lossworks.reporting.finish import draw_analyses
    from lossworks.training.outcome import Outcome

    cases = Outcome.stored(trained.outcome_file).pictured["map-cases"]["cases"]

    (path,) = draw_analyses(trained)
    assert path.is_file()
    assert [case["title"].split(":")[0] for case in cases] == ["worst", "median", "best"]
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(cases[0]["mask"]))))
    assert mask.shape == (32, 32)
    assert set(np.unique(mask)) <= {0, 1}


def test_priors_come_with_each_visit():
    spec = parse_train_spec(drawn(loss="sfda", data={"source": "walls:16", "side": 32, "priors": "exact"}))
    task = task_of(spec).open(spec, None)

    batch = task.train.batch(np.array([0, len(task.train)]))

    share = (batch["targets"][0] == 1).float().mean()
    torch.testing.assert_close(batch["priors"][:, 1], share.expand(2))


def test_classes_that_arrive_in_steps_go_on_where_they_stood(tmp_path):
    """In the second step, with the previous model and the head that has begun."""
    values = drawn(
        steps=6,
        data={"source": "tinted:16", "side": 32, "classes": ["background", "disc", "square"]},
        model={"kind": "incremental-unet", "steps": [1, 1], "levels": 1, "width": 4, "groups": 2},
        methods=[{"name": "barm", "starts": [2]}],
        loss="cross-entropy",
        checkpoint={"every": 2},
    )
    whole = run_training(values, None, str(tmp_path / "whole"))
    run_training(values, None, str(tmp_path / "parts"), stop_after=4)

    rest = run_training(values, None, str(tmp_path / "parts"))

    curves = [[row["train/loss"] for _, row in run["rows"] if "train/loss" in row] for run in (whole, rest)]
    assert curves[1] == curves[0][4:]
    assert rest["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]
