"""The goals for a card: the figure of each in a report of card_all.py, and what is counted for it from shapes alone.

L tokens of the DiT's sequence, D its width.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import PRESETS
from ..cost.flops import Layout, block_flops, dit_flops
from ..cost.memory import activation_bytes, weight_bytes
from ..train.budget import clip_layout
from ..train.throughput import PEAK_TFLOPS
from .stage import PAPER_FORWARDS

MODEL, SIZE, NUM_FRAMES = "14b", (1280, 720), 81
CARD = "H100"  # of the goals in seconds
FEW_STEPS = 4
Figure = tuple[float, str] | None  # and what it is from


@dataclass(frozen=True)
class Goal:
    """`limit` is the largest allowed figure, or the smallest if `at_least`; `card`: the only one that it is for."""

    what: str
    limit: float
    unit: str
    figure: Callable[[dict], Figure]
    counted: Callable[[], str]
    at_least: bool = False
    card: str = ""

    def text(self, value: float) -> str:
        digits = 0 if self.unit == "s" else 1 if self.unit in ("GB", "%") else 2
        return f"{value:.{digits}f} {self.unit}"

    @property
    def limit_text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}"

    def judge(self, report: dict) -> dict:
        """The figure and whether it reaches the goal: None if it was not measured, at other shapes than the real ones, and on another card."""
        entry: dict = {"goal": self.what, "limit": self.limit_text, "counted": self.counted(), "figure": None, "from": None, "reached": None}
        found = self.figure(report)
        if found is None:
            return entry | {"note": "not measured here"}
        value, origin = found
        entry |= {"figure": value, "text": self.text(value), "from": origin}
        if report["scale"] != "real":
            return entry | {"note": "small shapes, for which the goal was not set"}
        if self.card not in report["device"]["name"]:
            return entry | {"note": f"a goal for the {self.card}"}
        return entry | {"reached": value >= self.limit if self.at_least else value <= self.limit}


def goals(report: dict) -> list[dict]:
    """Each goal, its figure and whether it is reached."""
    return [goal.judge(report) for goal in GOALS]


def print_lines(judged: list[dict]) -> list[str]:
    """A line for each goal."""
    words = {True: "reached", False: "missed", None: "open"}
    return [f"{words[entry['reached']]}: {entry['goal']}: {entry.get('text', '-')} ({'; '.join([entry['limit'], *note(entry)])})" for entry in judged]


def note(entry: dict) -> list[str]:
    return [entry["note"]] if "note" in entry else []


def forward(report: dict, *formats: str) -> tuple[str, dict] | None:
    """Name and figures of the fastest forward of the large DiT at the first size in one of the formats; one with all blocks goes first.

    Those that fell back to other products, or to other attention, are none of that format.
    """
    found = []
    for name in formats:
        for part in (f"{report['first']}_{name}_whole", f"{report['first']}_{name}"):
            figures = report["parts"].get(part, {})
            if figures.get("seconds") and figures.get("multiplied", True) and "warnings" not in figures:
                found.append((part, figures))
                break
    return min(found, key=lambda item: item[1]["seconds"], default=None)


def origin(part: str, figures: dict) -> str:
    return f"{part}: {figures['from']}"


def times_roofline(*formats: str) -> Callable[[dict], Figure]:
    def figure(report: dict) -> Figure:
        found = forward(report, *formats)
        return (found[1]["times_roofline"], origin(*found)) if found and "times_roofline" in found[1] else None

    return figure


def seconds_of(count: int, *formats: str) -> Callable[[dict], Figure]:
    def figure(report: dict) -> Figure:
        found = forward(report, *formats)
        return (count * found[1]["seconds"], f"{count} times {origin(*found)}") if found else None

    return figure


def edit_in_few_steps(report: dict) -> Figure:
    found, stages = forward(report, "bf16", "fp8", "fp8_sage"), report["parts"].get("stages", {})
    if not found or "seconds" not in stages:
        return None
    return FEW_STEPS * found[1]["seconds"] + stages["seconds"], f"the VLM, encoding, decoding, and {FEW_STEPS} times {origin(*found)}"


def peak(format_name: str) -> Callable[[dict], Figure]:
    def figure(report: dict) -> Figure:
        found = forward(report, format_name)
        return (found[1]["peak_bytes"] / 1e9, origin(*found)) if found and found[1].get("peak_bytes") else None

    return figure


def memory_model(report: dict) -> Figure:
    """The largest error of a step's and of the whole memory."""
    errors = [
        (100 * abs(figures[measured] / figures[f"counted_{measured}"] - 1), f"{name}, {measured}")
        for name, figures in report["parts"].items()
        for measured in ("step_bytes", "peak_bytes")
        if figures.get(measured) and f"counted_{measured}" in figures
    ]
    return max(errors, default=None)


def element_wise(report: dict) -> Figure:
    """In eager mode, or with compiled blocks if these leave less: what remains of their time without the matrix products of eager mode."""
    name, compiled = f"{report['first']}_bf16", report["parts"].get("compiled", {})
    shares = report["parts"].get(name, {}).get("shares_of_time")
    if not shares:
        return None
    share = shares["rest"]
    if "time_ratio" not in compiled:
        return 100 * share, f"{name}, profiled"
    left = max(1 - (1 - share) / compiled["time_ratio"], 0.0)
    return min((100 * share, f"{name}, profiled"), (100 * left, f"{name}, profiled, and the time of compiled blocks"))


def training(report: dict) -> Figure:
    figures = report["parts"].get("training_block", {})
    return (100 * figures["mfu"], f"{figures['tokens']} tokens") if figures.get("mfu") else None


def layout() -> Layout:
    return clip_layout(SIZE, NUM_FRAMES)


def operations() -> float:
    return dit_flops(PRESETS[MODEL], layout())


def attention_share() -> float:
    config = PRESETS[MODEL]
    return config.num_blocks * 4 * layout().num_tokens ** 2 * config.width / operations()


def at_peak(count: float) -> str:
    return f"{count * operations() / (PEAK_TFLOPS[CARD] * 1e12):.0f} s at its full peak"


def counted_peak(matrix_itemsize: int | None) -> str:
    config = PRESETS[MODEL]
    return f"{(weight_bytes(config, 2, matrix_itemsize) + activation_bytes(config, layout().num_tokens, 2)) / 1e9:.1f} GB"


def counted_training() -> str:
    flops = 3 * block_flops(PRESETS[MODEL], layout().num_tokens)
    return f"{flops / 1e15:.2f} PFLOP; {flops / (0.45 * PEAK_TFLOPS[CARD] * 1e12):.2f} s at 45 % of an {CARD}'s peak"


FP8_SECONDS = PAPER_FORWARDS // 2  # half of the steps from a step cache
GOALS = (
    Goal(
        "forward of the 14B, 83,400 tokens, bf16",
        1.15,
        "x the card's bf16 roofline",
        times_roofline("bf16"),
        lambda: f"{operations() / 1e15:.2f} PFLOP, attention {100 * attention_share():.0f} % of them",
    ),
    Goal(
        "the same with fp8 products",
        0.7,
        "x the card's bf16 roofline",
        times_roofline("fp8", "fp8_sage"),
        lambda: f"{attention_share() + (1 - attention_share()) / 2:.2f} x if attention stays in bf16, 0.50 x if it does not",
    ),
    Goal(f"{PAPER_FORWARDS} forwards, bf16, {CARD} (paper: 328 s)", 240, "s", seconds_of(PAPER_FORWARDS, "bf16"), lambda: at_peak(PAPER_FORWARDS), card=CARD),
    Goal(
        f"{FP8_SECONDS} forwards with fp8 products, half of {PAPER_FORWARDS} steps from a step cache, {CARD}",
        120,
        "s",
        seconds_of(FP8_SECONDS, "fp8", "fp8_sage"),
        lambda: at_peak(FP8_SECONDS * (attention_share() + (1 - attention_share()) / 2)),
        card=CARD,
    ),
    Goal(
        f"edit in {FEW_STEPS} steps with VLM and VAE, the fastest format, {CARD}",
        45,
        "s",
        edit_in_few_steps,
        lambda: f"bf16 without VLM and VAE: {at_peak(FEW_STEPS)}",
        card=CARD,
    ),
    Goal("peak memory of a forward, bf16 (paper: 50 GB)", 40, "GB", peak("bf16"), lambda: counted_peak(None)),
    Goal("peak memory of a forward, fp8", 22, "GB", peak("fp8"), lambda: counted_peak(1)),
    Goal("error of the memory model", 10, "%", memory_model, lambda: "within it of tensors counted on the meta device"),
    Goal("element-wise work in a forward, bf16", 8, "%", element_wise, lambda: "-"),
    Goal("training step of a 14B block, MFU", 45, "%", training, counted_training, at_least=True),
)
