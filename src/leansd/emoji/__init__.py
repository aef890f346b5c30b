"""The embedded model: where it lies, the tiny CLIP it carries, what its grid shows.

How it is made is told in `models/emoji`, outside the package.
"""
