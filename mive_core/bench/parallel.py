"""On paper: memory and time of a forward whose tokens are shared among several cards."""

from ..config import PRESETS
from ..cost.flops import block_flops, non_block_flops
from ..cost.memory import activation_bytes, weight_bytes
from ..cost.sequence_parallel import exchanged_bytes, shared_activation_bytes
from ..errors import UserError
from ..train.budget import CARDS, NVLINK, RESERVED, SHARE_OF_PEAK, clip_layout
from ..train.throughput import PEAK_TFLOPS
from .stage import PAPER_FORWARDS

NUM_CARDS = (1, 2, 4, 8)
LINKS = {"H100": NVLINK, "A100": 300e9}  # nominal bytes per second, GPU and direction of the card's NVLink
PCIE = 32e9  # of PCIe 4.0 x16, for the other cards
ITEMSIZE = 2  # bf16


def parallel_report(
    preset: str = "14b", *, size: tuple[int, int] = (1280, 720), num_frames: int = 81, card: str = "H100", share_of_peak: float = SHARE_OF_PEAK
) -> dict:
    """Estimates `mive edit --sequence-parallel` in bf16 over numbers of cards that divide the heads: bytes of each card, seconds of a forward.

    size is (width, height) in pixels. Assumed, not measured: operations run at `share_of_peak` whatever N is, links at their nominal speed, and an
    exchange does not overlap with computing. What is outside the blocks runs on the first card alone. Raises UserError for sizes that do not fit.
    """
    if num_frames % 4 != 1 or any(side % 16 or not side for side in size):
        raise UserError("the size does not fit", got=f"{size[0]}x{size[1]}x{num_frames}", expected="multiples of 16, 4n+1 frames")
    config = PRESETS[preset]
    rows: list[dict] = []
    layout, speed, link = clip_layout(size, num_frames, config), PEAK_TFLOPS[card] * 1e12 * share_of_peak, LINKS.get(card, PCIE)
    weights, outside = weight_bytes(config, ITEMSIZE), non_block_flops(config, layout, ours=True)
    blocks = config.num_blocks * block_flops(config, layout.num_tokens)
    for num_cards in NUM_CARDS:
        if config.num_heads % num_cards:
            continue
        first = others = activation_bytes(config, layout.num_tokens, ITEMSIZE)
        moved = 0.0
        if num_cards > 1:
            first, others = shared_activation_bytes(config, layout.num_tokens, num_cards, ITEMSIZE)
            moved = exchanged_bytes(config, layout.num_tokens, num_cards, ITEMSIZE)
        seconds = {"computing": (blocks / num_cards + outside) / speed, "exchanging": moved / link}
        rows.append(
            {
                "cards": num_cards,
                "forward_bytes": {"first": first, "others": others},
                "memory_bytes": {"first": weights + first, "others": weights + others},
                "fits": weights + first + RESERVED <= CARDS[card],
                "exchanged_bytes": moved,
                "seconds": seconds,
                "seconds_a_forward": sum(seconds.values()),
                f"seconds_of_{PAPER_FORWARDS}": PAPER_FORWARDS * sum(seconds.values()),
            }
        )
    for row in rows:
        row["speedup"] = rows[0]["seconds_a_forward"] / row["seconds_a_forward"]
    return {
        "preset": preset,
        "size": list(size),
        "frames": num_frames,
        "tokens": layout.num_tokens,
        "card": card,
        "card_bytes": CARDS[card],
        "weight_bytes": weights,
        "assumed_share_of_peak": share_of_peak,
        "assumed_bytes_a_second": link,
        "rows": rows,
    }
