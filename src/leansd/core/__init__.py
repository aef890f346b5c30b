"""Whole-step plans for any sampler: torch, a plan and the noise levels of a run; no pipeline.

    player = Player(plan, lay_out_calls(sigmas))
    for step in range(len(sigmas) - 1):
        output = player.play(step, latents, lambda: model(latents), keys=("cond", "uncond"))
    player.clear()

Where log-SNR is known instead of sigmas, `lay_out_levels` takes it. The runtime for diffusers makes
inherited and corrected outputs by the same functions.
"""

from leansd.core.player import Player, PlayerStats, explain_unplayable
from leansd.core.schedule import (
    CallSchedule,
    Output,
    Prediction,
    Sample,
    adds_noise,
    find_denoised_output,
    lay_out_calls,
    lay_out_levels,
    list_log_snr,
    measure_response,
    place_calls,
    probe_calls,
)

__all__ = [
    "CallSchedule",
    "Output",
    "Player",
    "PlayerStats",
    "Prediction",
    "Sample",
    "adds_noise",
    "explain_unplayable",
    "find_denoised_output",
    "lay_out_calls",
    "lay_out_levels",
    "list_log_snr",
    "measure_response",
    "place_calls",
    "probe_calls",
]
