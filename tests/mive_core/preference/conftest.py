import json
from pathlib import Path

import pytest
import torch
from preference_study import CLIPS, SYSTEMS

from mive_core.data.manifest import read_manifest
from mive_core.media.images import write_frames
from mive_core.media.video import write_video
from mive_core.preference.page import PageOptions, make_page
from mive_core.preference.systems import read_systems
from mive_core.types import Clip


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """A manifest of three clips and the edits of two systems, named as `mive edit --manifest` names them."""
    folder, random = tmp_path_factory.mktemp("study"), torch.Generator().manual_seed(0)
    lines = []
    for index, name in enumerate(CLIPS):
        write_video(folder / f"{index}.mp4", Clip(torch.rand(5, 32, 48, 3, generator=random), 8.0))
        write_frames(folder / f"reference_{index}", torch.rand(1, 32, 48, 3, generator=random))
        lines.append({"name": name, "source": f"{index}.mp4", "reference": f"reference_{index}/00000.png", "instruction": f"</script> make {name} red & blue"})
        for system in SYSTEMS:
            (folder / system).mkdir(exist_ok=True)
            write_video(folder / system / f"{index:06d}-{name.replace(' ', '-')}.mp4", Clip(torch.rand(5, 32, 48, 3, generator=random), 8.0))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def page(study) -> Path:
    """The study's page; its key lies beside it."""
    entries = read_manifest(study / "pairs.jsonl")
    systems = read_systems([(name, str(study / name)) for name in SYSTEMS], entries)
    return make_page(entries, systems, study / "page.html", PageOptions(ask_scores=True))[0]


@pytest.fixture(scope="session")
def key(page) -> dict:
    return json.loads(page.with_name("page.key.json").read_text(encoding="utf-8"))
