"""The page: draw in full and by a plan side by side, edit plans, tune, profile, look back.

`studio` and what it is made of (`folders`, `jobs`, `plan_grid`) know nothing of a page and are
tested without one; `page`, `handlers` and `serving` are the page itself and import gradio;
`fragments` is its HTML. `panel` is what other programs with pages of gradio show.
"""
