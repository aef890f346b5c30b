"""The page: draw in full and by a plan side by side, edit plans, tune, profile, look back.

`studio` and what it is made of know nothing of a page and are tested without one; `page`,
`wiring` and `serving` are the page itself, and the only modules that import gradio.
"""
