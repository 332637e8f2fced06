"""What ComfyUI's BlockSparseAttention reads of MiVE's sequence, and that its condition and reference rows then stay exact.

The node is newer than the ComfyUI that the tests run in and leaves a CPU's attention alone. comfy-kitchen, by which it computes, has the same
attention for the CPU; the rows that stay exact are found here as the node finds them: the blocks of 64 rows up to the first row of the video.
"""

import pytest
import torch

kitchen = pytest.importorskip("comfy_kitchen")
GRID = (9, 24, 24)  # latents, hence 9 x 144 rows of the target
NUM_CONDITION, BLOCK = 70, 64
SPARSE = 1.0  # standard deviations of a block's score above which it is attended row by row


@pytest.fixture
def forward(loaded):
    """forward(attention or None) -> (velocity, what each block's attention gave); attention(q, k, v, layout) of (B, L, H, d)."""
    dit = loaded.model.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x, source, reference = draw(1, 16, *GRID), draw(1, 16, *GRID), draw(1, 16, 1, *GRID[1:])
    condition = draw(1, NUM_CONDITION, dit.config.width)

    @torch.inference_mode()
    def run(attention=None):
        seen = []

        def override(dense, q, k, v, heads, *args, transformer_options, **kwargs):
            if attention is None:
                out = dense(q, k, v, heads, *args, transformer_options=transformer_options, **kwargs)
            else:
                parts = (value.unflatten(-1, (heads, -1)) for value in (q, k, v))
                out = attention(*parts, transformer_options["minimax_h3_layout"]).flatten(2)
            seen.append((transformer_options, q, k, v, heads, out))
            return out

        options = {"optimized_attention_override": override}
        return dit(x, torch.tensor([0.6]), source=source, reference=reference, condition=condition, transformer_options=options), seen

    return run


def sparse(q, k, v, **options) -> torch.Tensor:
    """The node's attention of (B, L, H, d), which knows heads of 128 only: narrower ones are padded with zeros, which changes no product."""
    padded = (torch.nn.functional.pad(value, (0, 128 - value.shape[-1])) for value in (q, k, v))
    return kitchen.sol_attn(*padded, scale=q.shape[-1] ** -0.5, **options)[..., : q.shape[-1]]


def sinks(layout) -> list[int]:
    """First block and block after the last that stay exact."""
    return [0, -(-next(first for first, _, kind in layout.segments if kind == "video") // BLOCK)]


def test_the_layout_is_that_of_the_sequence(forward):
    _, seen = forward()
    for options, q, *_ in seen:
        layout = options["minimax_h3_layout"]
        assert layout.segments == ((0, 70, "text"), (70, 214, "reference"), (214, 1510, "video")) and layout.seq_len == 1510 == q.shape[1]
    assert [options["block_index"] for options, *_ in seen[-1:]] == [len(seen) - 1]


def test_condition_and_reference_stay_exact(forward, loaded):
    if not hasattr(kitchen, "sol_attn"):
        pytest.skip("comfy-kitchen is older than its sparse attention")
    dense, seen = forward()
    everything, _ = forward(lambda q, k, v, layout: sparse(q, k, v, tau=-1e9))
    assert torch.allclose(everything, dense, atol=1e-4)  # the node's attention is the dense one where no block is left out
    _, q, k, v, heads, exact = seen[1]
    q, k, v = (value.unflatten(-1, (heads, -1)) for value in (q, k, v))
    kept = sinks(seen[1][0]["minimax_h3_layout"])
    with torch.inference_mode():
        plain, sunk = (sparse(q, k, v, tau=SPARSE, sink_blocks=blocks, sink_q=blocks).flatten(2) for blocks in ([0, 0], kept))
    rows = kept[1] * BLOCK
    assert rows >= 214 and torch.allclose(sunk[:, :rows], exact[:, :rows], atol=1e-4)
    assert not torch.allclose(plain[:, :rows], exact[:, :rows], atol=1e-4)
    assert (sunk - exact)[:, rows:].norm() < (plain - exact)[:, rows:].norm()
