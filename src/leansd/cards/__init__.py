"""Model cards: what a net is, where it comes from, and under which licence."""

from leansd.cards.card import Card, Licence, Training, find_licence, write_card

__all__ = ["Card", "Licence", "Training", "find_licence", "write_card"]
