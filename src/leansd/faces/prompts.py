"""What the demo draws where the user asks for nothing else."""

PROMPTS = (
    "a red apple, noto style",
    "a pizza, twemoji style",
    "a red heart, twemoji style",
    "a smiling face with sunglasses, twemoji style",
    "a panda, noto style",
    "a cactus, noto style",
    "a tangerine, twemoji style",
    "a basketball, noto style",
)
