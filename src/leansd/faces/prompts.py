"""What the demo draws where the user asks for nothing else."""

PROMPTS = (
    "a red apple, noto style",
    "a red heart, twemoji style",
    "a smiling face with sunglasses, twemoji style",
    "a cat face, twemoji style",
    "a cactus, noto style",
    "a grinning face, twemoji style",
    "a basketball, noto style",
    "a pizza, twemoji style",
)

GUIDANCE = 4.0
"""Guidance scale for the embedded model; the pipeline's default makes its colours hard."""
