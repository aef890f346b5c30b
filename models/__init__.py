"""How the models that come with leansd were made; none of this is in the wheel."""
