"""The inspect commands that run a model: what the VLM's layers see, and what the DiT attends to."""

import argparse
import sys
from pathlib import Path

from .arguments import dtype_of, machine_options


def run_inspect_layers(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_input, check_output_folder

    output = check_output_folder(arguments.output, "output")
    image_path = check_input(arguments.image, "image")
    mask_path = check_input(arguments.mask, "mask") if arguments.mask else None
    from ..evaluation.evaluate import write_json
    from ..evaluation.layer_affinity import describe_affinities, measure_layers, report_of
    from ..evaluation.layer_pictures import draw_heat_map, draw_layers
    from ..layers import parse_layers
    from ..media.images import read_image, write_image
    from ..vlm_stream import load_streamed

    image = read_image(image_path, what="image")
    mask = read_image(mask_path, what="mask").mean(dim=-1) > 0.5 if mask_path else None
    vlm = load_streamed(vlm_folder(arguments.models), dtype=dtype_of(arguments.dtype), device=arguments.device)
    affinities = measure_layers(vlm, image, arguments.instruction, parse_layers(arguments.layers, vlm.num_layers), mask)
    output.mkdir(parents=True, exist_ok=True)
    for row in affinities.layers:
        write_image(output / f"layer_{row.layer:02d}.png", draw_heat_map(image, row))
    draw_layers(affinities).save(output / "plot.png")
    write_json(output / "layers.json", {"command": arguments.command_line, "instruction": arguments.instruction} | report_of(affinities))
    sys.stdout.write(f"{describe_affinities(affinities)}\n{output / 'layers.json'}\n{output / 'plot.png'}\n")


def vlm_folder(models: str) -> Path:
    """`tiny`, a folder of models, or a VLM's own folder -> the VLM's folder. Raises UserError."""
    from ..media.paths import check_input
    from ..pipeline import EMBEDDED

    folder = EMBEDDED.get(models) or check_input(models, "models")
    return folder / "vlm" if (folder / "vlm").is_dir() else folder


def run_inspect_attention(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_input, check_output_folder

    output = check_output_folder(arguments.output, "output")
    source, reference = check_input(arguments.source, "source"), check_input(arguments.reference, "reference")
    from ..data.edit_file import FileOptions, prepare
    from ..data.manifest import ManifestEntry
    from ..pipeline import Pipeline, find_config

    entry, options = ManifestEntry(source, reference, arguments.instruction), FileOptions(arguments.size, arguments.frames)
    prepared = prepare(entry, find_config(arguments.models), options)
    pipeline = Pipeline.load(arguments.models, arguments.layers, **machine_options(arguments))
    from ..evaluation.attention_picture import draw_attention
    from ..evaluation.attention_share import measure_edit, summary
    from ..evaluation.evaluate import show_steps, write_json

    report = measure_edit(pipeline, prepared.request, arguments.steps, arguments.seed, arguments.rows, show_steps)
    output.mkdir(parents=True, exist_ok=True)
    draw_attention(report["blocks"]).save(output / "attention.png")
    write_json(output / "attention.json", {"command": arguments.command_line, "instruction": arguments.instruction} | report)
    sys.stdout.write(f"{summary(report)}\n{output / 'attention.json'}\n{output / 'attention.png'}\n")
