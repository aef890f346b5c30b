"""Reports: what a command found, as data; and the page that shows it and needs nothing else.

`page` has what a report is made of, and writes it. `plans`, `measurements`, `nets` and
`training` make reports of results, from the figures of `drawings` and `plots`.
"""
