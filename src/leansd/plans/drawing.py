"""The former name of `leansd.plans.grid`."""

from leansd.plans.grid import State, draw_picture, draw_text, get_states, list_states

__all__ = ["State", "draw_picture", "draw_text", "get_states", "list_states"]
