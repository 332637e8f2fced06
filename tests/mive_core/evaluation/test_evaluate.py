import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image

from mive_core.config import PRESETS, MiVEConfig
from mive_core.errors import UserError
from mive_core.evaluation.before import Before
from mive_core.evaluation.evaluate import LOOK_STRENGTHS, EvaluationSettings, apply_modes, evaluate
from mive_core.evaluation.metrics import PSNR_CAP
from mive_core.media.video import read_clip
from mive_core.types import Clip, EditRequest, PairedEdit


class ShiftingVAE:
    """Its latents are the pixels; decoding loses exactly 0.1 everywhere."""

    def encode(self, frames):
        return frames

    def decode(self, latents):
        return latents - 0.1


class CopyingPipeline:
    """An editor whose figures can be worked out by hand: it gives the source back, 0.05 lighter."""

    def __init__(self):
        self.vae, self.config, self.requests, self.options = ShiftingVAE(), PRESETS["tiny"], [], []

    def edit(self, request, *, steps, cfg, shift, seed, progress):
        self.requests.append(request)
        self.options.append((steps, cfg, shift, seed, list(progress(range(2)))))
        return Clip(request.source.frames + 0.05, request.source.fps)


def pair(name: str = "", instruction: str = "lighten the left half", mask: bool = True, target: bool = True) -> PairedEdit:
    """Source 0.5; in the target the left half is 0.75; the reference is 0.25 off the target everywhere."""
    source = torch.full((5, 32, 32, 3), 0.5)
    truth, region = source.clone(), torch.zeros(5, 32, 32, dtype=torch.bool)
    truth[:, :, :16] = 0.75
    region[:, :, :16] = True
    return PairedEdit(EditRequest(Clip(source, 8.0), truth[0] - 0.25, instruction), truth if target else None, region if mask else None, name)


def db(error: float) -> float:
    return pytest.approx(-20 * math.log10(error), abs=1e-4)


def test_figures_by_hand(tmp_path):
    report = evaluate(
        CopyingPipeline(), [pair("a"), pair("b")], tmp_path / "out", EvaluationSettings(steps=3, seed=7), groups={"kind": ["late", ""]}, command="mive eval ..."
    )
    assert report["clips"] == report["clips_with_target"] == report["clips_with_kept"] == 2
    whole = math.sqrt((0.2**2 + 0.05**2) / 2)
    assert report["psnr_edited"] == db(0.2) and report["psnr_kept"] == db(0.05) and report["psnr"] == db(whole)
    assert report["copy_source"] == {"psnr_edited": db(0.25), "psnr_kept": PSNR_CAP, "psnr": db(0.25 / math.sqrt(2))}
    assert report["vae_ceiling"] == {"psnr_edited": db(0.1), "psnr_kept": db(0.1), "psnr": db(0.1)}
    assert report["repeat_reference"] == {"psnr_edited": db(0.25), "psnr_kept": db(0.25), "psnr": db(0.25)}
    assert (report["success_rate"], report["success_rate_ceiling"]) == (0, 1)
    assert (report["object_match"], report["object_match_ceiling"], report["clips_with_object_match"]) == (None, None, 0)  # the pairs have no colour
    assert report["mean_colour_distance"] == pytest.approx(0.2 * math.sqrt(3)) and report["mean_colour_distance_ceiling"] == pytest.approx(0.1 * math.sqrt(3))
    assert (report["psnr_worst_frame"], report["psnr_worst_frame_ceiling"]) == (db(0.2), db(0.1))
    assert report["worst_frame_gap"] == pytest.approx(20 * math.log10(2), abs=1e-4)
    gap = report["first_frame_gap"]  # the reference is 0.25 off, and the VAE loses another 0.1
    assert (gap["clips"], gap["within_1_db"]) == (2, 1) and gap["mean"] == pytest.approx(20 * math.log10(whole / 0.35), abs=1e-4)
    assert report["seconds_per_clip"] >= 0
    assert report["by_kind"]["late"]["clips"] == 1 and set(report["by_kind"]) == {"late"}
    assert report["quality"]["kept_psnr"] == report["by_kind"]["late"]["quality"]["kept_psnr"] == db(0.05)
    assert report["quality"]["flicker"] == report["quality"]["warping_error"] == 0 and 0 < report["quality"]["ssim"] < 1
    row = report["per_clip"][0]
    assert (row["name"], row["kind"], row["edited_fraction"]) == ("a", "late", 0.5)
    assert row["psnr_edited"] == db(0.2) and row["vae_ceiling"]["psnr_kept"] == db(0.1)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["command"] == "mive eval ..." and written["settings"]["steps"] == 3
    assert MiVEConfig.from_dict(written["config"]) == PRESETS["tiny"]
    assert written["per_clip"] == report["per_clip"]


def test_what_is_written(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    for _ in range(2):  # a second run replaces the first
        evaluate(CopyingPipeline(), [pair(str(i)) for i in range(9)], out)
        assert sorted(path.name for path in out.iterdir()) == ["edited", "mine.txt", "report.json", "sheet.png", "sheets"]
        assert len(list((out / "edited").iterdir())) == 9 and len(list((out / "sheets").iterdir())) == 2
    assert read_clip(out / "edited" / "008.mp4").frames.shape == (5, 32, 32, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_settings_reach_the_pipeline(tmp_path):
    pipeline = CopyingPipeline()
    evaluate(pipeline, [pair()], tmp_path / "out", EvaluationSettings(steps=3, cfg=2.0, shift=4.0, seed=5))
    assert pipeline.options == [(3, 2.0, 4.0, 5, [0, 1])]


def test_without_a_mask_the_whole_frame_counts_as_edited(tmp_path):
    report = evaluate(CopyingPipeline(), [pair(mask=False), pair()], tmp_path / "out")
    first = report["per_clip"][0]
    assert first["psnr_kept"] is None and first["edited_fraction"] == 1
    assert first["psnr_edited"] == pytest.approx(-10 * math.log10((0.2**2 + 0.05**2) / 2), abs=1e-4)
    assert report["clips_with_kept"] == 1 and report["psnr_kept"] == db(0.05)


def test_without_a_target_there_is_an_edit_and_no_figure(tmp_path):
    report = evaluate(CopyingPipeline(), [pair(target=False)], tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    assert report["clips_with_target"] == 0 and report["psnr_edited"] is None and report["vae_ceiling"]["psnr_kept"] is None
    assert report["quality"]["ssim"] is None and report["quality"]["kept_psnr"] == db(0.05) and report["quality"]["reference_psnr"] is not None
    assert "NaN" not in text and json.loads(text)["psnr_edited"] is None
    assert (tmp_path / "out" / "edited" / "000.mp4").exists()


def test_only_what_is_measured_counts(tmp_path):
    coloured = replace(pair("a"), colour=(0.75, 0.75, 0.75))
    unedited = replace(pair("b"), request=replace(pair().request, reference=pair().request.source.frames[0]))
    report = evaluate(CopyingPipeline(), [coloured, unedited, unedited], tmp_path / "out")
    assert (report["object_match"], report["object_match_ceiling"], report["clips_with_object_match"]) == (0, 0, 1)
    first, second, _ = report["per_clip"]
    assert first["object_match"]["colour_distance"] == pytest.approx(0.2 * math.sqrt(3)) and second["object_match"] is None
    assert second["first_frame_gap"] is None and report["first_frame_gap"]["clips"] == 1


def test_strengths_of_a_look_are_told_apart_at_the_models_size(tmp_path):
    near = replace(pair(), target=torch.full((5, 32, 32, 3), 0.58))
    far = replace(pair(), target=torch.full((5, 32, 32, 3), 0.9))
    report = evaluate(CopyingPipeline(), [near, far], tmp_path / "out", groups={"kind": [LOOK_STRENGTHS] * 2, "edit": ["matte"] * 2})
    assert report["strength_right_raw"] == {"clips": 2, "right": 1, "by_look": {"matte": 1}} and "strength_right" not in report
    assert [row["strength_right_raw"] for row in report["per_clip"]] == [True, False]


def test_the_reference_can_be_taken_away(tmp_path):
    pipeline = CopyingPipeline()
    report = evaluate(pipeline, [pair()], tmp_path / "out", EvaluationSettings(reference_mode="source_frame"))
    assert torch.equal(pipeline.requests[0].reference, pair().request.source.frames[0])
    assert report["repeat_reference"]["psnr_edited"] == db(0.25)  # of the real one: figures stay comparable


def test_wrong_instructions_are_always_another_and_always_the_same():
    pairs = [pair(instruction=text) for text in ("a", "b", "a", "c", "a")]
    wrong = EvaluationSettings(instruction_mode="wrong")
    given = [apply_modes(p.request, wrong, pairs, i).instruction for i, p in enumerate(pairs)]
    assert given == [apply_modes(p.request, wrong, pairs, i).instruction for i, p in enumerate(pairs)]
    assert all(text != p.request.instruction for text, p in zip(given, pairs))
    assert apply_modes(pairs[0].request, EvaluationSettings(instruction_mode="empty"), pairs, 0).instruction == ""
    assert apply_modes(pairs[0].request, EvaluationSettings(), pairs, 0) is pairs[0].request
    with pytest.raises(UserError, match="no wrong instruction"):
        apply_modes(pairs[0].request, wrong, [pairs[0], pairs[2]], 0)


def test_settings_are_checked():
    with pytest.raises(UserError, match="reference_mode: unknown mode; got 'none'"):
        EvaluationSettings(reference_mode="none")


@dataclass
class Broken(CopyingPipeline):
    """Fails on its second clip."""

    error: BaseException

    def __post_init__(self):
        super().__init__()

    def edit(self, request, **options):
        if self.requests:
            raise self.error
        return super().edit(request, **options)


@pytest.mark.parametrize("error", [UserError("bad"), KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_failure_half_way_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        evaluate(Broken(error), [pair(), pair()], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert evaluate(CopyingPipeline(), [pair()], tmp_path / "out")["clips"] == 1


def test_not_finite_edits_are_an_error_not_a_black_video(tmp_path):
    class Exploding(CopyingPipeline):
        def edit(self, request, **options):
            return Clip(request.source.frames * math.inf, request.source.fps)

    with pytest.raises(UserError, match="NaN or infinite pixels; got frame 0"):
        evaluate(Exploding(), [pair()], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_pairs(tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(CopyingPipeline(), [], tmp_path / "out")


def test_an_earlier_evaluation_stands_beside(tmp_path):
    first = evaluate(CopyingPipeline(), [pair("a"), pair("b")], tmp_path / "first", command="mive eval first")
    before = Before.read(tmp_path / "first", ["a", "b"])
    report = evaluate(CopyingPipeline(), [pair("a"), pair("b")], tmp_path / "second", before=before)
    assert report["before"] == {
        "folder": str(tmp_path / "first"),
        "command": "mive eval first",
        **{k: first[k] for k in ("psnr_edited", "psnr_kept", "success_rate")},
    }
    alone, beside = (Image.open(tmp_path / name / "sheet.png") for name in ("first", "second"))
    assert beside.width == alone.width and beside.height == alone.height + 2 * (96 + 4)  # one row more of each clip
    with pytest.raises(UserError, match="one of other pairs; got a, b; expected a, c"):
        Before.read(tmp_path / "first", ["a", "c"])
    (tmp_path / "first" / "report.json").write_text("{}")
    for folder in ("first", "none"):
        with pytest.raises(UserError, match="this is no evaluation"):
            Before.read(tmp_path / folder, ["a", "b"])
