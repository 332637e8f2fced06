"""The contract that a checkpoint carries."""

import json
from dataclasses import replace

import pytest

from mive_core.config import METADATA_KEY, PRESETS, MiVEConfig
from mive_core.errors import UserError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_metadata_round_trip(name):
    config = PRESETS[name]
    metadata = config.to_metadata()
    assert all(isinstance(v, str) for v in metadata.values())
    assert MiVEConfig.from_metadata(metadata) == config


def test_paper_preset_is_wan_14b_with_the_papers_layers():
    config = PRESETS["14b"]
    assert (config.width, config.num_heads, config.ffn_width, config.num_blocks) == (5120, 40, 13824, 40)
    assert (config.head_dim, config.layers, config.resolved_layers) == (128, (1, -1), (1, 36))


def test_missing_and_unknown_fields_are_named():
    with pytest.raises(UserError, match="no MiVE config"):
        MiVEConfig.from_metadata({"format": "pt"}, where="x.safetensors")
    values = json.loads(PRESETS["tiny"].to_metadata()[METADATA_KEY]) | {"colour": 1}
    with pytest.raises(UserError, match="colour"):
        MiVEConfig.from_dict(values)


@pytest.mark.parametrize("change", [{"rope_scheme": "mrope"}, {"latent_format": "wan2.2"}, {"num_heads": 5}])
def test_refused_choices(change):
    with pytest.raises(UserError):
        replace(PRESETS["tiny"], **change)
