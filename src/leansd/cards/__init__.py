"""Model cards: what a net is, where it comes from, and under which licence."""

from leansd.cards.card import Card, Training, write_card
from leansd.cards.licences import Licence, find_licence

__all__ = ["Card", "Licence", "Training", "find_licence", "write_card"]
